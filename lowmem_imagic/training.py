"""The loop both training stages share: draw rows, predict, step, for a whole pack at once.

A batch row is (edit, timestep, noise). Each edit draws from its own generator in its own order, so the
pack it travels in cannot change what it sees.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base_model import BaseModel
from .config import StageConfig
from .diffusion import add_noise, draw_timesteps, loss_per_edit, training_target
from .errors import DivergenceError
from .optimizer import PackedAdam

Progress = Callable[[int, int, str], None]
"""Called as ``progress(step, steps, remark)`` after every step."""


@dataclass(frozen=True)
class Losses:
    """What a training stage saw."""

    per_step: Tensor
    """(steps, N) mean squared error of each edit; NaN after an edit stopped."""
    steps_run: tuple[int, ...]
    """Steps each edit took."""

    def tail(self, edit: int, share: float = 0.2) -> float | None:
        """Mean loss of an edit over the last `share` of its steps; None when it took none."""
        steps = self.steps_run[edit]
        if not steps:
            return None
        return float(self.per_step[steps - max(1, round(steps * share)) : steps, edit].mean())


def draw_rows(
    latents: Tensor,
    draws: int,
    alpha_bar: Tensor,
    prediction_type: str,
    generators: Sequence[torch.Generator],
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents (R, C, H, W), timesteps (R,) and targets (R, C, H, W) for one step, edit by edit.

    Args:
        latents: (N, C, H, W) on the CPU.
        draws: rows per edit; R = N * draws.
        alpha_bar: (num_train_timesteps,).
        prediction_type: what the UNet predicts.
        generators: one CPU generator per edit; of each, the timesteps are drawn first, then the noise.
    """
    timesteps, noise = [], []
    for generator in generators:
        timesteps.append(draw_timesteps(draws, len(alpha_bar), generator))
        noise.append(torch.randn((draws, *latents.shape[1:]), generator=generator))
    t, epsilon = torch.cat(timesteps), torch.cat(noise)
    x = latents.repeat_interleave(draws, 0)
    noisy = add_noise(x, epsilon, t, alpha_bar)
    return noisy, t, training_target(x, epsilon, t, alpha_bar, prediction_type)


def train(
    base: BaseModel,
    latents: Tensor,
    embeddings: Callable[[], Tensor],
    *,
    weights: Tensor,
    grads: Tensor,
    config: StageConfig,
    generators: Sequence[torch.Generator],
    progress: Progress | None = None,
) -> Losses:
    """Minimises the denoising loss (paper eq. 2) of every edit over the rows of `weights`, in place.

    Args:
        base: the frozen base, with whatever is trained already in it.
        latents: (N, C, H, W), fp32 on the CPU.
        embeddings: gives the text conditioning (N, T, D) of the step.
        weights: (N, P), what is trained.
        grads: (N, P), where backward passes leave the gradient of `weights`.
        config: steps, rate, draws, clipping, early stop.
        generators: one CPU generator per edit.
        progress: called after every step.

    Raises:
        DivergenceError: a loss is no longer finite.

    **Memory**: the activations of N * draws rows, freed before the optimiser steps.
    """
    edits = len(latents)
    optimizer = PackedAdam(weights, learning_rate=config.learning_rate, max_grad_norm=config.max_grad_norm)
    history = torch.full((config.steps, edits), float("nan"))
    active = torch.ones(edits, dtype=torch.bool)
    steps_run = [config.steps] * edits
    for step in range(config.steps):
        noisy, timesteps, target = draw_rows(
            latents, config.draws, base.alpha_bar, base.family.prediction_type, generators
        )
        conditioning = embeddings().repeat_interleave(config.draws, 0)
        losses = loss_per_edit(base.predict(noisy, timesteps, conditioning), target.to(base.device), edits)
        grads.zero_()
        losses.sum().backward()
        optimizer.step(grads, active)
        history[step] = torch.where(active, losses.detach().cpu(), torch.nan)
        if not history[step][active].isfinite().all():
            raise DivergenceError(
                f"the loss is {history[step][active].max():g} after {step + 1} of {config.steps} steps at learning "
                f"rate {config.learning_rate:g}; lower the learning rate of this stage"
            )
        for edit in range(edits):
            if active[edit] and _stalled(history[: step + 1, edit], config):
                active[edit], steps_run[edit] = False, step + 1
        if progress is not None:
            progress(step + 1, config.steps, f"loss {history[step].nanmean():.4f}")
        if not active.any():
            break
    return Losses(history, tuple(steps_run))


def _stalled(losses: Tensor, config: StageConfig) -> bool:
    """Whether the mean loss over the last `patience` steps is no better than over as many before."""
    window = config.patience
    if not window or len(losses) < 2 * window:
        return False
    before, now = losses[-2 * window : -window].mean(), losses[-window:].mean()
    return bool(now > before * (1 - config.min_improvement))
