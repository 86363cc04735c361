"""Named tensors of N edits in one flat buffer, one row per edit.

An optimiser step, a gradient or a stop mask for all edits is then one operation for any number of edits and tensors.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..unexpected import WARNINGS


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
        """The flat gradient (N, P), filled by backward passes; every tensor's gradient is a view of it."""
        grads = torch.zeros_like(self.weights)
        for name, view in self._views(grads):
            self.parameters[name].grad = view
        return grads


@contextmanager
def strided_gradients() -> Iterator[None]:
    """Silences torch's warning about strided gradients in a backward pass: they are intended here, as one flat buffer
    holds all edits."""
    with WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        yield
