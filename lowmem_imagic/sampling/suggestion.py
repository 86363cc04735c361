"""Suggests an eta from the base model's denoising losses; advisory.

The base computes two denoising losses for each picture: under the target sentence and under the photo's embedding.
Their difference measures how much more the picture looks like the sentence than like the photo (a diffusion
classifier: Li et al. 2023, arXiv 2303.16203, equation 5). The difference rises with eta, and so does the distance to
the photo. The suggestion maximises the difference less `PRICE` times the distance, both as shares of their range.
No other network is involved. The paper warns against choosing eta automatically (section 4.3): look at the pictures.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..engine.base import BaseModel
from ..errors import NonFiniteEditError
from ..families.conditioning import Conditioning
from .losses import BATCH, Draws, in_fewer_rows

PRICE = 0.5
"""Weight of the distance to the photo, against following the sentence."""
SPAN = (0.2, 0.8)
"""Part of the noise schedule for the losses; near its ends the text hardly matters."""


@dataclass(frozen=True)
class EtaScore:
    """The base's scores of the picture at one eta."""

    eta: float
    follows: float
    """Denoising loss under the photo's embedding less that under the sentence's."""
    distance: float
    """Root mean square of the latents' difference to those at eta 0."""
    worth: float
    """``follows`` less `PRICE` times ``distance``, as shares of their ranges."""


@dataclass(frozen=True)
class Suggestion:
    """The eta to try first, and why."""

    eta: float
    scores: tuple[EtaScore, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values for the report."""
        rounded = [{name: round(value, 6) for name, value in asdict(score).items()} for score in self.scores]
        return {"eta": self.eta, "price": PRICE, "scores": rounded}


@torch.no_grad()
def suggest_eta(
    base: BaseModel,
    latents: Tensor,
    etas: Sequence[float],
    target: Conditioning,
    optimized: Conditioning,
    *,
    draws: int = 16,
    seed: int = 0,
    max_rows: int = BATCH,
) -> Suggestion:
    """The suggested eta, one of `etas`.

    Args:
        base: the base, without adapters.
        latents: the first denoiser's latents, rendered at each eta, (K, C, H, W).
        etas: K values, 0 (the photo) among them.
        target: conditioning with e_tgt, one row.
        optimized: conditioning with e_opt, one row.
        draws: number of (position, noise) draws, the same draws for every eta.
        seed: seed of the draws.
        max_rows: most network rows at once; running out of memory halves it.

    Raises:
        ValueError: fewer than two etas, or none is 0.
        NonFiniteModelError: the base gives NaN or infinity.
        NonFiniteEditError: only the edit's embedding makes the base give NaN or infinity.
    """
    if len(etas) < 2 or 0 not in etas:
        raise ValueError(f"a suggestion needs pictures at two etas or more, 0 among them, found {list(etas)}")
    denoiser = base.denoisers[0]
    drawn = Draws(denoiser, tuple(latents.shape[1:]), draws, SPAN, seed)

    def run(rows: int) -> list[Tensor]:
        return [drawn.losses(base, latents, text.expand(len(latents)), rows) for text in (optimized, target)]

    losses = in_fewer_rows(base, run, min(BATCH, max_rows), "suggest an eta")
    if not torch.stack(losses).isfinite().all():
        base.check_denoiser(denoiser, latents[0], target)
        raise NonFiniteEditError("the edit's embedding makes the base give NaN or infinity; get the file again")
    follows = losses[0] - losses[1]
    photo = latents[list(etas).index(0)]
    distance = (latents - photo).square().flatten(1).mean(1).sqrt()
    parts = follows.tolist(), distance.tolist()
    scores = tuple(EtaScore(*values) for values in zip(etas, *parts, worth(*parts), strict=True))
    return Suggestion(max(scores, key=lambda score: score.worth).eta, scores)


def worth(follows: Sequence[float], distance: Sequence[float], price: float = PRICE) -> list[float]:
    """The worth of each picture: `follows` less `price` times `distance`, as shares of their ranges."""
    pairs = zip(_shares(follows), _shares(distance), strict=True)
    return [followed - price * left for followed, left in pairs]


def _shares(values: Sequence[float]) -> list[float]:
    """Values as shares of their range, from 0 to 1; all 0 if they are equal."""
    low, span = min(values), max(values) - min(values)
    return [(value - low) / span if span else 0.0 for value in values]
