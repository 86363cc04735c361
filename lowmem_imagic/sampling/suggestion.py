"""Which eta to take, as the base model itself judges its pictures; advisory.

The base is asked twice how well each picture is explained: by the target sentence and by the photo's own embedding.
The difference of the two denoising losses says how much more the picture looks like the sentence than like the photo
(a diffusion classifier: Li et al. 2023, arXiv 2303.16203, equation 5). It rises with eta, and so does the distance to
the photo; the suggestion is where the first, less `PRICE` times the second, is largest, both as shares of their range.
No other network is involved. The paper warns against choosing eta automatically (section 4.3): look at the pictures.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion.schedules import add_noise, draw_timesteps, loss_per_edit, training_target
from ..engine.base import BaseModel
from ..engine.memory import in_rungs
from ..errors import NonFiniteEditError

PRICE = 0.5
"""What leaving the photo costs, against following the sentence."""
SPAN = (0.2, 0.8)
"""Part of the noise schedule the losses are taken over; towards its ends the text hardly matters."""
BATCH = 32
"""Most UNet rows at once."""


@dataclass(frozen=True)
class EtaScore:
    """What the base says of the picture at one eta."""

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
    target_embedding: Tensor,
    optimized_embedding: Tensor,
    *,
    draws: int = 16,
    seed: int = 0,
    max_rows: int = BATCH,
) -> Suggestion:
    """The suggested one of `etas`.

    Args:
        base: the base, without adapters.
        latents: what was rendered at each eta, (K, C, H, W).
        etas: K values; the smallest stands for the photo.
        target_embedding: e_tgt, (T, D).
        optimized_embedding: e_opt, (T, D).
        draws: (timestep, noise) draws, the same for every eta.
        seed: of the draws.
        max_rows: most UNet rows at once; fewer are taken when memory runs out.

    Raises:
        ValueError: fewer than two etas.
        NonFiniteModelError: the base gives NaN or infinity.
        NonFiniteEditError: it does so only under the edit's embedding.
    """
    if len(etas) < 2:
        raise ValueError(f"a suggestion needs pictures at two etas or more, found {len(etas)}")
    generator = torch.Generator().manual_seed(seed)
    timesteps = draw_timesteps(draws, len(base.alpha_bar), generator, SPAN)
    noise = torch.randn((draws, *latents.shape[1:]), generator=generator)
    rows = min(BATCH, max_rows)

    def run() -> list[Tensor]:
        texts = (optimized_embedding, target_embedding)
        return [_losses(base, latents, timesteps, noise, text, rows) for text in texts]

    def fewer() -> bool:
        nonlocal rows
        if rows == 1:
            return False
        rows //= 2
        base.step_down(f"{rows} rows at once to suggest an eta")
        return True

    with base.used():
        losses = in_rungs(run, fewer)
    if not torch.stack(losses).isfinite().all():
        base.check_unet(latents[0], target_embedding)
        raise NonFiniteEditError("the edit's embedding makes the base give NaN or infinity; get the file again")
    follows = losses[0] - losses[1]
    photo = latents[min(range(len(etas)), key=etas.__getitem__)]
    distance = (latents - photo).square().flatten(1).mean(1).sqrt()
    parts = follows.tolist(), distance.tolist()
    scores = tuple(EtaScore(*values) for values in zip(etas, *parts, worth(*parts), strict=True))
    return Suggestion(max(scores, key=lambda score: score.worth).eta, scores)


def worth(follows: Sequence[float], distance: Sequence[float], price: float = PRICE) -> list[float]:
    """What each picture is worth: how it follows less `price` times how far it is, as shares of their ranges."""
    pairs = zip(_shares(follows), _shares(distance), strict=True)
    return [followed - price * left for followed, left in pairs]


def _losses(base: BaseModel, latents: Tensor, timesteps: Tensor, noise: Tensor, text: Tensor, most_rows: int) -> Tensor:
    """Mean denoising loss (K,) of each picture's latents over the draws, under one embedding (T, D)."""
    pictures, draws = len(latents), len(timesteps)
    x, epsilon = latents.repeat_interleave(draws, 0), noise.repeat(pictures, 1, 1, 1)
    t = timesteps.repeat(pictures)
    noisy = add_noise(x, epsilon, t, base.alpha_bar)
    target = training_target(x, epsilon, t, base.alpha_bar, base.family.prediction_type)
    predicted = [
        base.predict(rows, steps, text.expand(len(rows), *text.shape)).float().cpu()
        for rows, steps in zip(noisy.split(most_rows), t.split(most_rows), strict=True)
    ]
    return loss_per_edit(torch.cat(predicted), target, pictures)


def _shares(values: Sequence[float]) -> list[float]:
    """Values as shares of their range, from 0 to 1; all 0 where they are equal."""
    low, span = min(values), max(values) - min(values)
    return [(value - low) / span if span else 0.0 for value in values]
