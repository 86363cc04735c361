"""Group normalisation and SiLU in one, for training on a card in channels last: less memory is moved.

PyTorch's group normalisation on cards wants the other layout, so that every tensor is copied there and back, and the
activation is a pass of its own. Here the statistics are one pass and everything else another, in both directions.
"""

import importlib
import logging
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor, nn

log = logging.getLogger(__name__)

_ROWS, _COLUMNS = 64, 32
"""Pixels and channels that a program loads at a time."""
_LANES = 32
"""Most channels of a group."""
_CHUNK = 256
"""Pixels that one program sums."""


@no_type_check
def _kernels() -> Any:
    """The kernels; `triton` comes with PyTorch for cards alone."""
    triton, tl = importlib.import_module("triton"), importlib.import_module("triton.language")

    # Not made anew for every size of picture.
    @triton.jit(do_not_specialize=["pixels", "chunks"])
    def sums(x, dy, scale, shift, out, pixels, chunks, channels, BACKWARD: tl.constexpr, ACT: tl.constexpr,  # type: ignore[name-defined]
             ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[name-defined]  # fmt: skip
        picture, chunk, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        column = block * BLOCK + tl.arange(0, BLOCK)
        first, second = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        base = picture.to(tl.int64) * pixels * channels
        if BACKWARD:
            factor = tl.load(scale + picture * channels + column)[None, :]
            offset = tl.load(shift + picture * channels + column)[None, :]
        for start in range(0, CHUNK, ROWS):
            row = chunk * CHUNK + start + tl.arange(0, ROWS)
            at = base + row[:, None] * channels + column[None, :]
            inside = (row < pixels)[:, None]
            value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            if BACKWARD:
                gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
                if ACT:
                    z = value * factor + offset
                    s = 1 / (1 + tl.exp(-z))
                    gradient = gradient * (s * (1 + z * (1 - s)))
                first += tl.sum(gradient, 0)
                second += tl.sum(gradient * value, 0)
            else:
                first += tl.sum(value, 0)
                second += tl.sum(value * value, 0)
        place = ((picture * chunks + chunk) * 2) * channels + column
        tl.store(out + place, first)
        tl.store(out + place + channels, second)

    @triton.jit(do_not_specialize=["pixels"])
    def apply(x, dy, scale, shift, slope, rest, out, pixels, channels,
              BACKWARD: tl.constexpr, ACT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[name-defined]  # fmt: skip
        picture, part, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
        column = block * BLOCK + tl.arange(0, BLOCK)
        row = part * ROWS + tl.arange(0, ROWS)
        at = picture.to(tl.int64) * pixels * channels + row[:, None] * channels + column[None, :]
        inside = (row < pixels)[:, None]
        factor = tl.load(scale + picture * channels + column)[None, :]
        offset = tl.load(shift + picture * channels + column)[None, :]
        value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z = value * factor + offset
        if BACKWARD:
            gradient = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            if ACT:
                s = 1 / (1 + tl.exp(-z))
                gradient = gradient * (s * (1 + z * (1 - s)))
            along = tl.load(slope + picture * channels + column)[None, :]
            constant = tl.load(rest + picture * channels + column)[None, :]
            result = gradient * factor + value * along + constant
        else:
            result = z
            if ACT:
                result = z / (1 + tl.exp(-z))
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)

    # One program for each group of each picture: `each` channels, at most LANES.
    @triton.jit(do_not_specialize=["pixels", "each"])
    def settle(totals, weight, bias, scale, shift, mean, inverse, pixels, each, channels, eps, LANES: tl.constexpr):  # type: ignore[name-defined]
        picture, group = tl.program_id(0), tl.program_id(1)
        lane = tl.arange(0, LANES)
        inside = lane < each
        column = group * each + lane
        at = picture * 2 * channels + column
        count = (pixels * each).to(tl.float32)
        middle = tl.sum(tl.load(totals + at, mask=inside, other=0.0), 0) / count
        square = tl.sum(tl.load(totals + at + channels, mask=inside, other=0.0), 0) / count
        inv = 1 / tl.sqrt(tl.maximum(square - middle * middle, 0.0) + eps)
        factor = inv * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32) - middle * factor
        tl.store(scale + picture * channels + column, factor, mask=inside)
        tl.store(shift + picture * channels + column, offset, mask=inside)
        groups = tl.num_programs(1)
        tl.store(mean + picture * groups + group, middle)
        tl.store(inverse + picture * groups + group, inv)

    @triton.jit(do_not_specialize=["pixels", "each"])
    def settle_back(totals, weight, mean, inverse, slope, rest, normal, pixels, each, channels, LANES: tl.constexpr):  # type: ignore[name-defined]
        picture, group = tl.program_id(0), tl.program_id(1)
        lane = tl.arange(0, LANES)
        inside = lane < each
        column = group * each + lane
        at = picture * 2 * channels + column
        count = (pixels * each).to(tl.float32)
        groups = tl.num_programs(1)
        middle, inv = tl.load(mean + picture * groups + group), tl.load(inverse + picture * groups + group)
        plain = tl.load(totals + at, mask=inside, other=0.0)
        # The sum over pixels of the gradient times the normalised value.
        along = (tl.load(totals + at + channels, mask=inside, other=0.0) - middle * plain) * inv
        factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        a, b = tl.sum(plain * factor, 0) / count, tl.sum(along * factor, 0) / count
        place = picture * channels + column
        nothing = tl.zeros([LANES], tl.float32)
        tl.store(slope + place, nothing - b * inv * inv, mask=inside)
        tl.store(rest + place, nothing - a * inv + b * inv * inv * middle, mask=inside)
        tl.store(normal + place, along, mask=inside)

    return sums, apply, settle, settle_back


_compiled: Any = None


def _sums(x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, *, backward: bool, act: bool) -> Tensor:
    """Two sums (B, 2, C) over the pixels."""
    pictures, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    chunks = -(-pixels // _CHUNK)
    out = torch.empty(pictures, chunks, 2, channels, dtype=torch.float32, device=x.device)
    _compiled[0][(pictures, chunks, channels // _COLUMNS)](
        x, dy, scale, shift, out, pixels, chunks, channels,
        BACKWARD=backward, ACT=act, ROWS=_ROWS, BLOCK=_COLUMNS, CHUNK=_CHUNK,
    )  # fmt: skip
    return out.sum(1) if chunks > 1 else out[:, 0]


def _apply(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, slope: Tensor, rest: Tensor, *, backward: bool, act: bool
) -> Tensor:
    pictures, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    out = torch.empty_like(x)
    _compiled[1][(pictures, -(-pixels // _ROWS), channels // _COLUMNS)](
        x, dy, scale, shift, slope, rest, out, pixels, channels,
        BACKWARD=backward, ACT=act, ROWS=_ROWS, BLOCK=_COLUMNS,
    )  # fmt: skip
    return out


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, act: bool) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        pictures, channels, height, width = x.shape
        nothing = x.new_empty(0)
        totals = _sums(x, nothing, nothing, nothing, backward=False, act=False)
        scale, shift = (torch.empty(pictures, channels, dtype=torch.float32, device=x.device) for _ in range(2))
        mean, inverse = (torch.empty(pictures, groups, dtype=torch.float32, device=x.device) for _ in range(2))
        each = channels // groups
        _compiled[2][(pictures, groups)](
            totals, weight, bias, scale, shift, mean, inverse, height * width, each, channels, eps,
            LANES=_LANES, num_warps=1,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, scale, shift, mean, inverse)
        ctx.groups, ctx.act = groups, act
        return _apply(x, nothing, scale, shift, nothing, nothing, backward=False, act=act)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, mean, inverse = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=torch.channels_last)
        pictures, channels, height, width = x.shape
        totals = _sums(x, dy, scale, shift, backward=True, act=ctx.act)
        slope, rest, normal = (torch.empty_like(scale) for _ in range(3))
        _compiled[3][(pictures, ctx.groups)](
            totals, weight, mean, inverse, slope, rest, normal, height * width, channels // ctx.groups, channels,
            LANES=_LANES, num_warps=1,
        )  # fmt: skip
        dx = _apply(x, dy, scale, shift, slope, rest, backward=True, act=ctx.act)
        return dx, normal.sum(0).to(weight.dtype), totals[:, 0].sum(0).to(weight.dtype), None, None, None


class FusedNorm(nn.GroupNorm):
    """A group normalisation followed by SiLU, or by nothing."""

    act = False

    def forward(self, input: Tensor) -> Tensor:
        """The normalised tensor, in channels last."""
        if input.ndim != 4:
            return super().forward(input)
        result: Tensor = _NormAct.apply(  # type: ignore[no-untyped-call]
            input, self.weight, self.bias, self.num_groups, self.eps, self.act
        )
        return result


class _ElsewhereSiLU(nn.Module):
    """SiLU of vectors; pictures had theirs with the normalisation."""

    def forward(self, x: Tensor) -> Tensor:
        """The activated vector, or the picture as it is."""
        return x if x.ndim == 4 else F.silu(x)


def usable(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels run on the device and compute what PyTorch computes."""
    global _compiled
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    try:
        _compiled = _compiled or _kernels()
        for act in (False, True):
            x = torch.randn(2, 96, 40, 40, device=device).mul(2).add(0.5).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
            weight, bias = (torch.randn(96, device=device).to(dtype).requires_grad_() for _ in range(2))
            inputs, dy = (x, weight, bias), torch.randn(2, 96, 40, 40, device=device).to(dtype)
            mine = _NormAct.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, 16, 1e-5, act
            )
            exact = [t.detach().float().requires_grad_() for t in inputs]
            theirs = F.group_norm(exact[0], 16, exact[1], exact[2], 1e-5)
            theirs = F.silu(theirs) if act else theirs
            found = (mine, *torch.autograd.grad(mine, inputs, dy))
            expected = (theirs, *torch.autograd.grad(theirs, exact, dy.float()))
            for f, e in zip(found, expected, strict=True):
                if not (f.float() - e).norm() <= tolerance * e.norm():
                    log.warning("fused normalisation is not used: it is off by %s", (f - e).norm() / e.norm())
                    return False
    except Exception as error:
        # Whatever goes wrong with a compiler that this package does not bring: training goes on without it.
        log.warning("fused normalisation is not used: %s: %s", type(error).__name__, str(error)[:500])
        return False
    return True


def fuse(module: nn.Module) -> None:
    """Replaces normalisations in a diffusers network, and the activations behind them; weights keep their names."""
    for part in module.modules():
        for name, child in part.named_children():
            if type(child) is nn.GroupNorm:
                child.__class__ = FusedNorm
                child.act = name in ("norm1", "norm2", "conv_norm_out")  # type: ignore[assignment]
            elif isinstance(child, nn.SiLU) and name in ("nonlinearity", "conv_act"):
                setattr(part, name, _ElsewhereSiLU())
