"""Frozen layers with the adapters of N edits; each row of a batch uses its own edit's (see `layers.adapter_pack`)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flat_pack import kept_gradient


class Rows:
    """The edit and the strength of each row of the batch; shared by all layers of a pack.

    `index` is None if the rows lie edit by edit in equal shares, which needs no gathering of factors.
    `strengths` (R, 3), a factor for each row and each of `settings.stages.BLOCKS`, is None if all are 1.
    """

    def __init__(self) -> None:
        self.index: Tensor | None = None
        self.strengths: Tensor | None = None

    def select(self, factors: Tensor) -> Tensor:
        """The factors (G, ...) for G equal groups of rows: one group per edit, or one per row."""
        return factors if self.index is None else factors[self.index]


class PackedLoraLayer(nn.Module):
    """A frozen layer with the adapters of N edits; replaces the layer in the network while attached."""

    def __init__(
        self, base: nn.Module, down: nn.Parameter, up: nn.Parameter, scale: Tensor | None, rows: Rows, block: int
    ) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = down, up
        # Not a buffer: the pack owns it. None is 1 for all edits.
        self.scale = scale
        self.rows, self.block = rows, block

    def _group(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Down and scaled up factors for groups of rows, in x's type."""
        return self._factors(self.down, None, x.dtype), self._factors(self.up, self.scale, x.dtype)

    def _factors(self, trained: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Factors for groups of rows, each edit's scaled by its own number, in `dtype`."""
        if scale is None and self.rows.index is None:
            return kept_gradient(trained, dtype)
        factors = kept_gradient(trained, trained.dtype)
        if scale is not None:
            factors = factors * scale.view(-1, 1, 1)
        return self.rows.select(factors).to(dtype)

    def _strengths(self, x: Tensor) -> Tensor | None:
        """The factor (R,) on each row's adapter in this layer, in x's type; None if all are 1."""
        strengths = self.rows.strengths
        return None if strengths is None else strengths[:, self.block].to(x.dtype)


class PackedLoraLinear(PackedLoraLayer):
    """Packed LoRA on a linear layer: (R, ..., in) to (R, ..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        # The base product comes first: after the adapters it would save 2 % of a checkpointed step's arithmetic, but
        # cost 2 % more memory.
        y: Tensor = self.base(x)
        down, up = self._group(x)
        rows = x.reshape(down.shape[0], -1, x.shape[-1])
        hidden = torch.bmm(rows, down.transpose(1, 2))
        if (strengths := self._strengths(x)) is not None:
            hidden = (hidden.view(len(x), -1) * strengths[:, None]).view(hidden.shape)
        # Not in place: y is a view, and autograd would rewrite its history with copies.
        return torch.baddbmm(y.view(down.shape[0], -1, y.shape[-1]), hidden, up.transpose(1, 2)).view(y.shape)


class PackedLoraConv2d(PackedLoraLayer):
    """Packed LoRA on a convolution: (R, C, H, W) to (R, C', H', W')."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        # In place: the base layer does not save its output, and nothing else refers to it.
        return y.add_(self._delta(x))

    def _delta(self, x: Tensor) -> Tensor:
        """The sum that the adapters add to the base layer's output."""
        down, up = self._group(x)
        groups, each = down.shape[0], x.shape[0] // down.shape[0]
        conv = self.base
        assert isinstance(conv, nn.Conv2d)
        # All groups' channels side by side: one grouped convolution for all edits.
        beside = x if groups == 1 else x.view(groups, each, *x.shape[1:]).transpose(0, 1).flatten(1, 2)
        hidden = F.conv2d(beside, down.flatten(0, 1), None, conv.stride, conv.padding, 1, groups)
        if (strengths := self._strengths(x)) is not None:
            shares = strengths.view(groups, each).T[..., None, None, None]
            hidden = (hidden.unflatten(1, (groups, -1)) * shares).flatten(1, 2)
        delta = F.conv2d(hidden, up.flatten(0, 1)[..., None, None], groups=groups)
        return delta if groups == 1 else delta.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)


class _LastConv2d(PackedLoraConv2d):
    """The same at the end of a residual block (see `families.lean_unet`), with the frozen product last.

    Gradient checkpointing recomputes a block only up to its last saved tensor. The frozen product saves none, so it is
    not recomputed if it comes after the adapters.
    """

    def forward(self, x: Tensor) -> Tensor:
        delta = self._delta(x)
        y: Tensor = self.base(x)
        return y.add_(delta)


def packed_kind(name: str, base: nn.Module) -> type[PackedLoraLayer]:
    """The kind of layer that replaces `base`, the module of this name."""
    if not isinstance(base, nn.Conv2d):
        return PackedLoraLinear
    return _LastConv2d if name.endswith(".conv2") else PackedLoraConv2d
