"""Names of the layers that adapters cover, and of their factors in files."""

import re
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
"""Endings of the UNet layers' names for each choice of `adapt`."""


_IF_ATTENTION = (*_ATTENTION, "add_k_proj", "add_v_proj")
IF_TARGETS: dict[str, tuple[str, ...]] = {
    "attn": _IF_ATTENTION,
    "attn+ff": _IF_ATTENTION,
    "all": _IF_ATTENTION + _CONVOLUTION,
}
"""The same for DeepFloyd IF: its attention reads the text through layers of its own, and no feed-forward follows."""


def kohya_key(module_name: str) -> str:
    """The name of a UNet module in kohya's LoRA files, e.g. ``lora_unet_mid_block_resnets_0_conv1``."""
    return "lora_unet_" + module_name.replace(".", "_")


_WORDS = (
    "down_blocks",
    "up_blocks",
    "mid_block",
    "transformer_blocks",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "proj_in",
    "proj_out",
    "time_emb_proj",
    "conv_shortcut",
    "conv_in",
    "conv_out",
    "conv_norm_out",
    "time_embedding",
    "add_embedding",
    "class_embedding",
    "linear_1",
    "linear_2",
)
"""Names of a UNet's modules that have an underscore."""
_PART = re.compile(rf"({'|'.join(_WORDS)}|[a-z0-9]+)(?:_|$)")


def module_name(key: str) -> str:
    """The name of the UNet module of a kohya key: `kohya_key` undone."""
    return ".".join(_PART.findall(key.removeprefix("lora_unet_")))


def block_of(module_name: str) -> int:
    """The index in `BLOCKS` of a module's part of the UNet; everything before the middle counts as the encoder."""
    if module_name.startswith("mid_block"):
        return BLOCKS.index("mid")
    return BLOCKS.index("up" if module_name.startswith(("up_blocks", "conv_out")) else "down")


def peft_key(prefix: str, module_name: str) -> str:
    """The name of a module in peft's files without the factor's ending, e.g. ``transformer.blocks.0.attn.to_q``."""
    return f"{prefix}.{module_name}"


@dataclass(frozen=True)
class KohyaNames:
    """Names of a UNet's layers, with kohya's keys."""

    targets: Mapping[str, Sequence[str]] = field(default_factory=lambda: TARGETS)

    def key(self, layer: str) -> str:
        """The key of a layer in a file."""
        return kohya_key(layer)

    def block_of(self, layer: str) -> int:
        """The index in `BLOCKS` of a layer's part of the UNet."""
        return block_of(layer)


@dataclass(frozen=True)
class PeftUNetNames:
    """Names of a UNet's layers, with peft's keys: kohya's lose layers such as ``add_k_proj`` in diffusers."""

    prefix: str
    """Name of the denoiser."""
    targets: Mapping[str, Sequence[str]]

    def key(self, layer: str) -> str:
        """The key of a layer in a file."""
        return peft_key(self.prefix, layer)

    def block_of(self, layer: str) -> int:
        """The index in `BLOCKS` of a layer's part of the UNet."""
        return block_of(layer)


@dataclass(frozen=True)
class PeftNames:
    """Names of the layers of a network with a sequence of equal blocks, with peft's keys.

    The layers' names contain the blocks' numbers; each third of the depth has its own strength.
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
        """The index in `BLOCKS` of a layer's third of the depth; layers outside the blocks are in the first."""
        number = next((int(word) for word in layer.split(".") if word.isdigit()), 0)
        return min(number, self.depth - 1) * len(BLOCKS) // self.depth
