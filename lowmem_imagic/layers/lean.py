"""Layers of a frozen network that keep less for the backward pass, and compute the same bits.

Stock layers keep two tensors of the input's size for a normalisation with SiLU, and three for GEGLU. The layers here
keep the input alone and recompute the rest in a fraction of a convolution's time. At Stable Diffusion 1.5's shape a row
then keeps a fifth less memory (see ``benchmarks/memory.py``). `RMSNorm` and `swiglu`, of transformers, are equal to the
stock layers to rounding.

For frozen weights; a normalisation with trained weights uses torch's own code.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        normed, mean, rstd = _native_group_norm(x, weight, bias, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normed, inplace=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        normed, _, _ = _native_group_norm(x, weight, bias, ctx.groups, ctx.eps)
        # Overwrites the normalised values, which are not needed any more.
        grad = torch.ops.aten.silu_backward.grad_input(
            grads[0].contiguous(memory_format=_layout(normed)), normed, grad_input=normed
        )
        rows, channels = x.shape[:2]
        grads_in = torch.ops.aten.native_group_norm_backward(
            grad,
            _kernel_layout(x),
            mean,
            rstd,
            weight,
            rows,
            channels,
            x[0, 0].numel(),
            ctx.groups,
            [True, False, False],
        )
        return grads_in[0], None, None, None, None


def _native_group_norm(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> tuple[Tensor, ...]:
    """Normalised values, mean and reciprocal deviation of each row's groups."""
    rows, channels = x.shape[:2]
    result: tuple[Tensor, ...] = torch.native_group_norm(
        _kernel_layout(x), weight, bias, rows, channels, x[0, 0].numel(), groups, eps
    )
    return result


def _kernel_layout(x: Tensor) -> Tensor:
    """`x` in the memory layout of this device's kernel: unchanged on CPUs, channels first elsewhere."""
    return x.contiguous(memory_format=_layout(x)) if x.device.type == "cpu" else x.contiguous()


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format of `x`: channels-last or channels first."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation followed by SiLU, (R, C, H, W) to the same; with frozen weights it keeps its input alone."""

    @staticmethod
    def of(norm: nn.GroupNorm) -> "GroupNormSiLU":
        """The layer with the weights of `norm`, which may be on the meta device."""
        layer = GroupNormSiLU(norm.num_groups, norm.num_channels, norm.eps, device="meta")
        layer.weight, layer.bias = norm.weight, norm.bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return F.silu(super().forward(x))
        result: Tensor = _GroupNormSiLU.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.num_groups, self.eps
        )
        return result


class _Geglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        values, gate = projected.chunk(2, dim=-1)
        return F.gelu(gate).mul_(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [projected] = ctx.saved_tensors
        values, gate = projected.chunk(2, dim=-1)
        grad = torch.empty_like(projected)
        of_values, of_gate = grad.chunk(2, dim=-1)
        # All in place: a training row of Stable Diffusion 1.5 reaches its peak memory here.
        torch.mul(grads[0], values, out=of_gate)
        torch.ops.aten.gelu_backward.grad_input(of_gate, gate, approximate="none", grad_input=of_gate)
        torch.ops.aten.gelu.out(gate, out=of_values)
        of_values.mul_(grads[0])
        return (grad,)


def geglu(projected: Tensor) -> Tensor:
    """``values * gelu(gate)`` (..., D) of the halves of (..., 2 D); keeps its input alone (arXiv 2002.05202)."""
    result: Tensor = _Geglu.apply(projected)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        reciprocal = square.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, reciprocal, weight)
        normed: Tensor = (x * reciprocal).to(x.dtype)
        return normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, reciprocal, weight = ctx.saved_tensors
        # In fp32: y = x r w with r = (mean(x^2) + eps)^-1/2, so dx = r (g w - n mean(g w n)) with n = x r.
        normed, grad = x * reciprocal, grads[0] * weight.float()
        grad.sub_(normed * (grad * normed).mean(-1, keepdim=True)).mul_(reciprocal)
        return grad.to(x.dtype), None, None


class RMSNorm(nn.RMSNorm):
    """Normalisation by the root mean square of the last side; with frozen weights it keeps its input alone.

    On GPUs torch's own fused kernel keeps no more.
    """

    @staticmethod
    def of(norm: nn.RMSNorm) -> "RMSNorm":
        """The layer with the weights of `norm`, which may be on the meta device."""
        layer = RMSNorm(norm.normalized_shape, norm.eps, device="meta")
        layer.weight = norm.weight
        return layer

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.requires_grad or x.is_cuda or self.eps is None:
            return super().forward(x)
        result: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return result


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, projected: Tensor) -> Tensor:
        ctx.save_for_backward(projected)
        gate, values = projected.chunk(2, dim=-1)
        return F.silu(gate).mul_(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [projected] = ctx.saved_tensors
        gate, values = projected.chunk(2, dim=-1)
        grad = torch.empty_like(projected)
        of_gate, of_values = grad.chunk(2, dim=-1)
        torch.mul(grads[0], values, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        torch.ops.aten.silu.out(gate, out=of_values)
        of_values.mul_(grads[0])
        return (grad,)


def swiglu(projected: Tensor) -> Tensor:
    """``silu(gate) * values`` (..., D) of the halves of (..., 2 D); keeps its input alone (arXiv 2002.05202)."""
    result: Tensor = _SwiGLU.apply(projected)  # type: ignore[no-untyped-call]
    return result
