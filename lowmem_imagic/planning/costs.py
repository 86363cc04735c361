"""What training and rendering take, phase by phase: worked out from an architecture, before a weight is read.

The passes are the real ones, run on the meta device (see `accounting`): the network that is trained, with its
adapters, forward and backward.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedules import loss_per_edit
from ..engine.base import BaseModel
from ..families import StableDiffusion
from ..layers.adapter_pack import AdapterPack, strided_gradients
from ..layers.frozen import Int8Conv2d, weight_bytes
from ..settings.stages import EditConfig
from .counting import fused_attention, peak_of

_META = torch.device("meta")


@dataclass(frozen=True)
class _Linear:
    """Bytes that grow evenly with rows and edits."""

    fixed: float
    row: float
    edit: float

    def of(self, rows: int, edits: int) -> int:
        return math.ceil(self.fixed + self.row * rows + self.edit * edits)

    @staticmethod
    def through(found: Callable[[int, int], int]) -> "_Linear":
        """The plane through `found` (rows, edits) at its three smallest points."""
        least, more, beside = found(1, 1), found(2, 1), found(2, 2)
        row, edit = more - least, beside - more
        return _Linear(least - row - edit, row, edit)


def _once(method: Callable[..., int]) -> Callable[..., int]:
    """A method of `Costs` that works out each case once."""

    @wraps(method)
    def remembered(self: "Costs", *args: Any, **kwargs: Any) -> int:
        key = (method.__name__, args, tuple(sorted(kwargs.items())))
        if key not in self.known:
            self.known[key] = method(self, *args, **kwargs)
        return self.known[key]

    return remembered


class Costs:
    """What the phases of an architecture take under some settings, each measured on the meta device when first asked.

    Args:
        family: the model family.
        config: settings of all stages.
        weights: format of the UNet's weights, one of `config.WEIGHT_FORMATS`.
        dtype: type that the UNet computes in.
        part_dtype: type of text encoder and autoencoder.
        size_px: side of the pictures; None for the model's own.
    """

    def __init__(
        self,
        family: StableDiffusion,
        config: EditConfig,
        *,
        weights: str,
        dtype: torch.dtype,
        part_dtype: torch.dtype,
        size_px: int | None = None,
    ) -> None:
        self._family, self._config, self._part_dtype = family, config, part_dtype
        self._size_px = size_px or family.size_px
        self._base = BaseModel(family, device=_META, weights=weights, attention="sdpa", checkpointing=False)
        self._base.dtype = dtype
        self.known: dict[Any, int] = {}
        tokens = int(family.text_config["max_position_embeddings"])
        self._text_shape = (tokens, family.cross_attention_dim)

    @cached_property
    def unet(self) -> int:
        """Bytes of the frozen UNet."""
        return weight_bytes(self._base.unet)

    @cached_property
    def load(self) -> int:
        """Most bytes while the UNet is loaded and quantised, itself included.

        A kernel of n weights is there in half precision, as it came from the file, in fp32, and twice in 8 bits (see
        `layers.frozen.Int8Conv2d.quantize_`); any other weight in half precision and as it is kept.
        """
        modules = list(self._base.unet.modules())
        kernels = [7 * layer.weight.numel() for layer in modules if isinstance(layer, Int8Conv2d)]
        others = [2 * parameter.numel() for parameter in self._base.unet.parameters()]
        return self.unet + max(*kernels, *others)

    @cached_property
    def adapter_weights(self) -> int:
        """Numbers in one edit's adapter."""
        return self._adapters(1).weights.numel()

    def adapters(self, slots: int) -> int:
        """Bytes of what trains in `slots` slots, fp32, with gradients and two moments."""
        return slots * 16 * (self.adapter_weights + math.prod(self._text_shape))

    def train(
        self, rows: int, edits: int, *, checkpointing: bool, stage: str = "finetune", recorded: bool = False
    ) -> int:
        """Most bytes of a training pass, and of the optimiser's step after it (two copies, see `PackedAdam.step`).

        Where passes are recorded (see `replay`), a pass's bytes stay taken in that step, and are taken while a copy of
        the gradients is.
        """
        adapted = stage == "finetune"
        stepped = self.adapter_weights if adapted else math.prod(self._text_shape)
        both = self._pass(rows, edits, checkpointing, adapted), 2 * 4 * edits * stepped
        return sum(both) if recorded else max(both)

    def train_about(self, *, checkpointing: bool, recorded: bool = False) -> Callable[[int, int], int]:
        """`train` of (rows, edits) without running each, to a few parts in a hundred."""

        def exactly(rows: int, edits: int) -> int:
            return self.train(rows, edits, checkpointing=checkpointing, recorded=recorded)

        return _Linear.through(exactly).of

    @_once
    def sample(self, rows: int, edits: int = 1) -> int:
        """Most bytes of a sampling batch, adapters included."""
        pack = self._adapters(edits)
        # Rows of several edits gather their factors.
        pack.set_rows(torch.zeros(rows, dtype=torch.int64, device=_META))

        def run() -> None:
            # With guidance, the text of half the rows and its negative are joined.
            text = torch.cat([torch.empty(1 + rows // 2, *self._text_shape, device=_META) for _ in range(2)])
            latents = torch.cat([self._latents(rows) for _ in range(2)])[:rows]
            self._base.predict(latents, torch.empty(rows, dtype=torch.int64, device=_META), text[:rows])

        with torch.no_grad(), fused_attention(), pack.attached(self._base.unet):
            return peak_of(run) + pack.weights.nbytes

    def _text_encoder(self) -> Any:
        return self._family.load_text_encoder(device=_META, dtype=self._part_dtype)

    @cached_property
    def text_encoder(self) -> int:
        """Bytes of the text encoder."""
        return weight_bytes(self._text_encoder())

    @_once
    def encode_text(self) -> int:
        """Most bytes while a sentence is encoded."""
        encoder = self._text_encoder()
        ids = torch.empty(1, self._text_shape[0], dtype=torch.int64, device=_META)
        with torch.no_grad(), fused_attention():
            return peak_of(lambda: encoder(ids)[0])

    def _vae(self, tiling: bool) -> Any:
        return self._family.load_vae(device=_META, dtype=self._part_dtype, tiling=tiling)

    @cached_property
    def vae(self) -> int:
        """Bytes of the autoencoder."""
        return weight_bytes(self._vae(False))

    @_once
    def encode(self, *, tiling: bool = False) -> int:
        """Most bytes while a picture is encoded."""
        vae, picture = self._vae(tiling), torch.empty(1, 3, self._size_px, self._size_px, device=_META)
        with torch.no_grad(), fused_attention():
            return peak_of(lambda: vae.encode(picture.to(self._part_dtype)).latent_dist.mean)

    @_once
    def decode(self, *, tiling: bool = False) -> int:
        """Most bytes while a picture is decoded."""
        vae = self._vae(tiling)
        with torch.no_grad(), fused_attention():
            return peak_of(lambda: vae.decode(self._latents(1).to(self._part_dtype)).sample)

    def _latents(self, rows: int) -> Tensor:
        channels, side = self._family.latent_shape[0], self._size_px // self._family.vae_factor
        return torch.empty(rows, channels, side, side, device=_META)

    def _adapters(self, edits: int) -> AdapterPack:
        tuned = self._config.finetune
        return AdapterPack(
            self._base.unet,
            count=edits,
            adapt=tuned.adapt,
            blocks=tuned.blocks,
            rank=tuned.lora_rank,
            alpha=tuned.lora_alpha,
            device=_META,
        )

    @_once
    def _pass(self, rows: int, edits: int, checkpointing: bool, adapted: bool) -> int:
        """Most bytes of one pass forward and backward, as `training.Trainer` makes it."""
        unet: Any = self._base.unet
        (unet.enable_gradient_checkpointing if checkpointing else unet.disable_gradient_checkpointing)()
        text = torch.empty(edits, *self._text_shape, device=_META).requires_grad_(not adapted)
        each = rows // edits

        def run() -> None:
            expanded = text.repeat_interleave(each, 0, output_size=rows)
            latents = self._latents(rows)
            prediction = self._base.predict(latents, torch.empty(rows, dtype=torch.int64, device=_META), expanded)
            with strided_gradients():
                loss_per_edit(prediction, torch.empty_like(latents), edits).sum().backward()

        with fused_attention():
            if not adapted:
                text.grad = torch.empty_like(text)
                return peak_of(run)
            pack = self._adapters(edits)
            pack.enable_gradients()
            with pack.attached(unet):
                return peak_of(run)
