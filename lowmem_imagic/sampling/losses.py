"""Denoising losses of the base: how well a text describes a picture, by the base's own measure.

The loss falls with the likelihood of the picture under the text (a diffusion classifier: Li et al. 2023, arXiv
2303.16203, equation 5). Losses are compared on the same positions and noise, which removes most of their variance.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..diffusion.schedules import loss_per_edit
from ..engine.base import BaseModel
from ..engine.memory import with_fallbacks
from ..families.conditioning import Conditioning
from ..families.family import Denoiser

T = TypeVar("T")

BATCH = 32
"""Most rows at once."""


class Draws:
    """Positions and noise on which losses are compared.

    Args:
        denoiser: the network.
        shape: (C, H, W) of the pictures' latents.
        count: number of draws.
        span: part of the noise schedule.
        seed: seed of the draws.
    """

    def __init__(
        self, denoiser: Denoiser, shape: tuple[int, ...], count: int, span: tuple[float, float], seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.denoiser = denoiser
        self.at = denoiser.schedule.positions(count, generator, span)
        self.noise = torch.randn((count, *shape), generator=generator)

    @torch.no_grad()
    def losses(self, base: BaseModel, latents: Tensor, text: Conditioning, most_rows: int = BATCH) -> Tensor:
        """Mean loss (K,) over the draws of K pairs of a picture's latents (K, C, H, W) and a row of conditioning."""
        pairs, draws = len(latents), len(self.at)
        x, noise, at = latents.repeat_interleave(draws, 0), self.noise.repeat(pairs, 1, 1, 1), self.at.repeat(pairs)
        schedule, index = self.denoiser.schedule, torch.arange(pairs).repeat_interleave(draws)
        predicted = [
            base.predict(self.denoiser, rows, part, text.rows(own)).float().cpu()
            for rows, part, own in zip(
                schedule.noised(x, noise, at).split(most_rows), at.split(most_rows), index.split(most_rows), strict=True
            )
        ]
        return loss_per_edit(torch.cat(predicted), schedule.target(x, noise, at), pairs)


def in_fewer_rows(base: BaseModel, work: Callable[[int], T], rows: int, purpose: str) -> T:
    """The result of `work`, called with the most rows at once; running out of memory halves them."""

    def fewer() -> bool:
        nonlocal rows
        if rows == 1:
            return False
        rows //= 2
        base.fall_back(f"{rows} rows at once to {purpose}")
        return True

    with base.used():
        return with_fallbacks(lambda: work(rows), fewer)
