"""Replaces layers of a FLUX.2 transformer by layers that keep less for the backward pass (see `layers.lean`)."""

from typing import Any

from torch import Tensor, nn

from ..layers.lean import RMSNorm, swiglu

_SWIGLU = "Flux2SwiGLU"
"""diffusers' class; by its name, as diffusers before 0.36 has none."""


class _LeanSwiGLU(nn.Module):
    """`Flux2SwiGLU`."""

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x)


def make_lean(transformer: nn.Module) -> None:
    """Replaces the normalisation of queries and keys, and SwiGLU, in place; the names of the weights do not change."""
    module: Any
    for module in list(transformer.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.RMSNorm and child.elementwise_affine:
                setattr(module, name, RMSNorm.of(child))
            elif type(child).__name__ == _SWIGLU:
                setattr(module, name, _LeanSwiGLU())
