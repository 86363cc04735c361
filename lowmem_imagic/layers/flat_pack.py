"""Named tensors of N edits in one flat buffer, one row per edit.

An optimiser step, a gradient or a stop mask for all edits is then one operation for any number of edits and tensors.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FlatPack:
    """Trained tensors of N edits, each a view of one flat buffer.

    Attributes:
        weights: (N, P) fp32, all tensors of an edit in one row, in the order of `shapes`.
        parameters: by name (N, *shape), views of `weights`.

    **Memory**: 4 bytes a number, 4 more while gradients are enabled.
    """

    def __init__(self, count: int, shapes: Mapping[str, Sequence[int]], *, device: torch.device | str = "cpu") -> None:
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.weights = torch.zeros(count, sum(map(math.prod, self._shapes.values())), device=device)
        self.parameters = {name: nn.Parameter(view) for name, view in self._views(self.weights)}

    def _views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Views (N, *shape) of a flat (N, P) tensor, by name."""
        start = 0
        for name, shape in self._shapes.items():
            end = start + math.prod(shape)
            yield name, flat[:, start:end].view(len(flat), *shape)
            start = end

    def enable_gradients(self) -> Tensor:
        """The flat gradient (N, P); every tensor's gradient is a view of it, which `kept_gradient` fills."""
        grads = torch.zeros_like(self.weights)
        for name, view in self._views(grads):
            self.parameters[name].grad = view
        return grads


class _KeptGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trained: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.trained = trained
        return trained.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        ctx.trained.grad.add_(grads[0])
        return None, None


def kept_gradient(trained: Tensor, dtype: torch.dtype) -> Tensor:
    """A trained tensor in `dtype` for a pass; `Tensor.backward` adds to the gradient that the tensor has.

    That is one operation, where autograd has one to cast the gradient back and another to add it. Autograd's own also
    warns of gradients of several edits in one buffer, which are apart by a whole edit.
    """
    if trained.grad is None:
        return trained.to(dtype)
    result: Tensor = _KeptGradient.apply(trained, dtype)  # type: ignore[no-untyped-call]
    return result
