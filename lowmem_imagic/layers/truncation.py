"""Smaller adapters: keeps the directions of each layer's update with the most energy per byte.

A layer's update ``alpha / r * up @ down`` is a matrix of rank r; its singular values measure how much each of r
directions moves the layer (Eckart & Young 1936: keeping the largest ones is the best approximation of lower rank).
Directions are chosen over all layers at once, by energy per stored byte, so layers lose different shares, and a layer
may lose all.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import NonFiniteTensorError
from .adapter_pack import Factors

MIN_RANK = 2
"""Fewest directions of a layer: stable-diffusion.cpp reads the rank from the last side above 1 of ``lora_down``."""

_Step = tuple[float, str, int, int]
"""Energy per stored number, negative; layer; directions; stored numbers."""


def truncated(adapter: Mapping[str, Factors], keep: float) -> dict[str, Factors]:
    """The adapter in at most `keep` of its bytes (at least `MIN_RANK` directions of one layer), as fp32 on the CPU.

    Args:
        adapter: factors by layer, from `AdapterPack.export`.
        keep: share of the factors' bytes, above 0; 1 and more returns the adapter unchanged.

    Raises:
        NonFiniteTensorError: the factors of a layer have NaN or infinity, which have no singular values.
    """
    if keep >= 1 or not adapter:
        return dict(adapter)
    for key, (down, up, _) in adapter.items():
        if not (down.isfinite().all() and up.isfinite().all()):
            raise NonFiniteTensorError(f"the adapter of {key} has NaN or infinity")
    spectra = {key: _decomposed(factors) for key, factors in adapter.items()}
    steps = [step for key, spectrum in spectra.items() for step in _steps(key, *spectrum)]
    # Ties are broken by name, so that the same adapter always gives the same file. The sort is stable and singular
    # values fall, so the steps of a layer stay in their order.
    steps.sort(key=lambda step: step[:2])
    budget = keep * sum(down.numel() + up.numel() for down, up, _ in adapter.values())
    ranks: dict[str, int] = {}
    for _, key, directions, numbers in steps:
        if ranks and numbers > budget:
            break
        budget -= numbers
        ranks[key] = ranks.get(key, 0) + directions
    return {key: _composed(*spectra[key], rank, adapter[key]) for key, rank in sorted(ranks.items())}


def energy(adapter: Mapping[str, Factors]) -> float:
    """The sum of the squares of all singular values of all layers' updates, which `truncated` keeps the most of."""
    total = 0.0
    for down, up, alpha in adapter.values():
        a, b = down.flatten(1).double(), up.flatten(1).double()
        # |B A|^2 is the trace of (B^T B)(A A^T).
        total += (alpha / len(a)) ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
    return total


def _steps(key: str, left: Tensor, sigmas: Tensor, right: Tensor) -> list[_Step]:
    """The steps of a layer: its first `MIN_RANK` directions together, then one after another."""
    numbers, energies = right[0].numel() + len(left), sigmas.square().tolist()
    first = -sum(energies[:MIN_RANK]) / (MIN_RANK * numbers), key, len(energies[:MIN_RANK]), MIN_RANK * numbers
    return [first, *((-energy / numbers, key, 1, numbers) for energy in energies[MIN_RANK:])]


def _decomposed(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """The update's singular value decomposition: left (out, r), values (r,) from large to small, right (r, in)."""
    down, up, alpha = factors
    q_up, r_up = torch.linalg.qr(up.flatten(1).double())
    q_down, r_down = torch.linalg.qr(down.flatten(1).double().T)
    left, sigmas, right = torch.linalg.svd(alpha / down.shape[0] * r_up @ r_down.T)
    return q_up @ left, sigmas, right @ q_down.T


def _composed(left: Tensor, sigmas: Tensor, right: Tensor, rank: int, like: Factors) -> Factors:
    """Factors of the first `rank` directions, shaped like the layer's own; their scale alpha / rank is 1."""
    root = sigmas[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    shape = (rank, *like[0].shape[1:])
    return down.reshape(shape).float(), up.reshape(len(up), rank, *like[1].shape[2:]).float(), float(rank)
