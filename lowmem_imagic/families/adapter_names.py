"""Names of the layers that adapters cover, and of their factors in files."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..settings.stages import BLOCKS

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_CONVOLUTION = (
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+ff": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTION,
}
"""Endings of the names of a UNet's layers that each choice adapts."""


def kohya_key(module_name: str) -> str:
    """The name of a UNet module in kohya's LoRA files, e.g. ``lora_unet_mid_block_resnets_0_conv1``."""
    return "lora_unet_" + module_name.replace(".", "_")


def block_of(module_name: str) -> int:
    """The number in `BLOCKS` of the part of a UNet that a module belongs to; all before the middle is the encoder."""
    if module_name.startswith("mid_block"):
        return BLOCKS.index("mid")
    return BLOCKS.index("up" if module_name.startswith(("up_blocks", "conv_out")) else "down")


def peft_key(prefix: str, module_name: str) -> str:
    """The name of a module in peft's files without the factor's own ending, e.g. ``transformer.blocks.0.attn.to_q``."""
    return f"{prefix}.{module_name}"


@dataclass(frozen=True)
class KohyaNames:
    """Names of a UNet's layers, with kohya's keys."""

    targets: Mapping[str, Sequence[str]] = field(default_factory=lambda: TARGETS)

    def key(self, layer: str) -> str:
        """The key of a layer in a file."""
        return kohya_key(layer)

    def block_of(self, layer: str) -> int:
        """The number in `BLOCKS` of the part that a layer belongs to."""
        return block_of(layer)


@dataclass(frozen=True)
class PeftNames:
    """Names of the layers of a network of equal blocks in a row, with peft's keys.

    The blocks' numbers stand in the layers' names; thirds of the depth are the parts with a strength of their own.
    """

    prefix: str
    """Name of the denoiser."""
    targets: Mapping[str, Sequence[str]]
    depth: int
    """Number of blocks."""

    def key(self, layer: str) -> str:
        """The key of a layer in a file."""
        return peft_key(self.prefix, layer)

    def block_of(self, layer: str) -> int:
        """The number in `BLOCKS` of the third that a layer belongs to; one outside of the blocks is in the first."""
        number = next((int(word) for word in layer.split(".") if word.isdigit()), 0)
        return min(number, self.depth - 1) * len(BLOCKS) // self.depth
