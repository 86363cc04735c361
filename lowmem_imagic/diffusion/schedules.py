"""The mathematics of the three stages, on plain tensors.

Symbols follow the paper (arXiv 2210.09276) and DDPM: ``x`` clean latents, ``epsilon`` noise, ``t``
timesteps, ``alpha_bar`` the cumulative product of alphas.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..settings.stages import INTERPOLATIONS

COARSE_SIDE = 4
"""Cells each way of a photo's low frequencies in an edit: 128 bytes for four channels."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
VARIATION = 0.5
"""Share of a seed's noise in the varied noise of a photo, see `varied`."""


def draw_timesteps(
    draws: int, num_train_timesteps: int, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Timesteps (draws,) int64, one from each of `draws` equal parts of the schedule, uniform within its part.

    Over many steps the draws are uniform over the schedule, as in eq. 2, but every step covers all noise levels. `span`
    is the part of the schedule to draw from, (0, 1) for all of it.
    """
    parts = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
    if span != (0.0, 1.0):
        parts = span[0] + (span[1] - span[0]) * parts
    return (parts * num_train_timesteps).long().clamp_(max=num_train_timesteps - 1)


def starting_noise(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The standard normal starting noise (C, H, W) of sampling: the first draw of a fresh CPU generator."""
    return torch.randn(tuple(shape), generator=generator)


def varied(own: Tensor, drawn: Tensor, seed: int) -> Tensor:
    """Starting noise (C, H, W) of sampling with `seed` from a photo's own noise: `own` itself for seed 0, else mixed
    with a share `VARIATION` of the seed's noise, at equal variance."""
    return own if seed == 0 else (1 - VARIATION**2) ** 0.5 * own + VARIATION * drawn


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, alpha_bar: Tensor) -> Tensor:
    """``sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) epsilon`` (eq. 1).

    Latents and noise are (R, C, H, W), timesteps (R,).
    """
    a = alpha_bar[timesteps].view(-1, 1, 1, 1)
    return a.sqrt() * latents + (1 - a).sqrt() * noise


def training_target(
    latents: Tensor, noise: Tensor, timesteps: Tensor, alpha_bar: Tensor, prediction_type: str
) -> Tensor:
    """The target (R, C, H, W) of the UNet's prediction: the noise, or v (Salimans & Ho 2022, appendix D)."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        a = alpha_bar[timesteps].view(-1, 1, 1, 1)
        return a.sqrt() * noise - (1 - a).sqrt() * latents
    raise ValueError(f"prediction type {prediction_type!r} is not one of {', '.join(PREDICTION_TYPES)}")


class DiscreteNoise:
    """A discrete schedule (DDPM, arXiv 2006.11239): `alpha_bar` for each of its timesteps.

    Args:
        alpha_bar: (num_train_timesteps,), the cumulative product of alphas.
        prediction_type: one of `PREDICTION_TYPES`.
    """

    def __init__(self, alpha_bar: Tensor, prediction_type: str) -> None:
        self.alpha_bar, self.prediction_type = alpha_bar, prediction_type

    def positions(self, draws: int, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Timesteps (draws,), see `draw_timesteps`."""
        return draw_timesteps(draws, len(self.alpha_bar), generator, span)

    def spread(self, count: int) -> Tensor:
        """Timesteps (count,) from the first to the last."""
        return torch.linspace(0, len(self.alpha_bar) - 1, count).long()

    def position(self, share: float) -> Tensor:
        """The timestep () at a share of the schedule."""
        return torch.tensor(int(share * len(self.alpha_bar)))

    def noised(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """See `add_noise`."""
        return add_noise(x, noise, at, self.alpha_bar)

    def target(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """See `training_target`."""
        return training_target(x, noise, at, self.alpha_bar, self.prediction_type)

    def noise_in(self, noisy: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """The noise in `noisy`, by eq. 1."""
        a = self.alpha_bar[at].view(-1, 1, 1, 1)
        return (noisy - a.sqrt() * x) / (1 - a).sqrt()


def loss_per_edit(prediction: Tensor, target: Tensor, edits: int) -> Tensor:
    """Mean squared error (N,) of each edit over its rows (eq. 2); rows (R, C, H, W) lie edit by edit.

    Edits never mix: with respect to one edit's parameters, the gradient of the sum over N is that edit's own gradient.
    """
    error = (prediction.float() - target.float()).square()
    return error.reshape(edits, -1).mean(1)


def interpolate(target_embedding: Tensor, optimized_embedding: Tensor, eta: float | Tensor) -> Tensor:
    """``eta * e_tgt + (1 - eta) * e_opt`` (eq. 3)."""
    return eta * target_embedding + (1 - eta) * optimized_embedding


def project(target_embedding: Tensor, optimized_embedding: Tensor, eta: float | Tensor) -> Tensor:
    """``e_opt + eta * (e_tgt - (e_tgt . u) u)``, u = e_opt / ``|e_opt|``, token by token.

    Forgedit's vector projection (arXiv 2309.10556, ``alpha e_src + beta e_edit`` as in its released code) with
    alpha = 1 and beta = eta: the photo's direction stays whole, and eta scales only the part of the sentence that is
    orthogonal to it. Embeddings are (..., T, D).
    """
    direction = torch.nn.functional.normalize(optimized_embedding, dim=-1)
    along = (target_embedding * direction).sum(-1, keepdim=True) * direction
    return optimized_embedding + eta * (target_embedding - along)


PATHS = dict(zip(INTERPOLATIONS, (interpolate, project), strict=True))
"""Paths from e_opt (eta 0) towards e_tgt, by name."""


def coarse(latents: Tensor, side: int) -> Tensor:
    """The low spatial frequencies of latents (B, C, H, W): means over side x side equal cells, (B, C, side, side)."""
    return torch.nn.functional.adaptive_avg_pool2d(latents, side)


def refined(coarse_latents: Tensor, height: int, width: int) -> Tensor:
    """Smooth latents (B, C, height, width) with these cell values, bilinear in between."""
    return torch.nn.functional.interpolate(coarse_latents, size=(height, width), mode="bilinear")


def guidance_at(eta: float, guidance_scale: float, photo_guidance: float | None) -> float:
    """The guidance scale at `eta`: rises evenly from `photo_guidance` at 0 to `guidance_scale` at 1 and stays there. If
    `photo_guidance` is None, it is `guidance_scale` at every eta."""
    if photo_guidance is None:
        return guidance_scale
    return photo_guidance + (guidance_scale - photo_guidance) * min(max(eta, 0.0), 1.0)


EDIT_LIMIT = 1.5
"""Most of the way from the photo's prediction to the sentence's that `edit_guided` goes, in each value."""


def edit_guided(photo: Tensor, sentence: Tensor, described: Tensor, scale: float | Tensor) -> Tensor:
    """``photo + scale * (sentence - described)``, in no value further than `EDIT_LIMIT` times the way to `sentence`.

    The difference is semantic guidance (SEGA, arXiv 2301.12247). A scale that moves an object makes the whole way to
    another floor and as much again, which turns a brown floor red; the limit ends it there, in either direction. Where
    a photo has a detail that neither text names, `sentence` is far away, and the difference is small.

    Args:
        photo: the photo's prediction (B, ...).
        sentence: the prediction under the sentence, (B, ...).
        described: the prediction under the source prompt, (B, ...).
        scale: edit guidance times eta; may differ between rows, (B, 1, 1, 1).
    """
    change, way = scale * (sentence - described), EDIT_LIMIT * (sentence - photo)
    return photo + change.clamp(-way.abs(), way.abs())


def guide(unconditional: Tensor, conditional: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022); the scale may differ between rows, (B, 1, 1, 1)."""
    return unconditional + guidance_scale * (conditional - unconditional)
