"""The loop both training stages share: draw rows, predict, step, for a whole pack at once.

A batch row is (edit, timestep, noise). Each edit draws from its own generator in its own order, so the
pack it travels in cannot change what it sees.
"""

import warnings
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
class Trained:
    """A tensor that training changes in place."""

    weights: Tensor
    """(N, P): everything that is trained of an edit in one row."""
    grads: Tensor
    """(N, P), where backward passes leave the gradient of `weights`."""
    learning_rate: float
    weight_decay: float = 0.0


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
    span: tuple[float, float] = (0.0, 1.0),
    anchor: Tensor | None = None,
    anchored: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents (R, C, H, W), timesteps (R,) and targets (R, C, H, W) for one step, edit by edit.

    Args:
        latents: (N, C, H, W) on the CPU.
        draws: rows per edit; R = N * draws.
        alpha_bar: (num_train_timesteps,).
        prediction_type: what the UNet predicts.
        generators: one CPU generator per edit; of each, the timesteps are drawn first, then the noise, then which
            rows have the noise `anchor` instead.
        span: part of the schedule that timesteps come from; 0 is the clean end.
        anchor: noise (C, H, W) that some rows have.
        anchored: how many of each edit's.
    """
    timesteps, noise = [], []
    for generator in generators:
        timesteps.append(draw_timesteps(draws, len(alpha_bar), generator, span))
        noise.append(torch.randn((draws, *latents.shape[1:]), generator=generator))
        if anchor is not None and anchored:
            noise[-1][torch.randperm(draws, generator=generator)[:anchored]] = anchor
    t, epsilon = torch.cat(timesteps), torch.cat(noise)
    x = latents.repeat_interleave(draws, 0)
    noisy = add_noise(x, epsilon, t, alpha_bar)
    return noisy, t, training_target(x, epsilon, t, alpha_bar, prediction_type)


def train(
    base: BaseModel,
    latents: Tensor,
    embeddings: Callable[[], Tensor],
    *,
    trained: Sequence[Trained],
    config: StageConfig,
    generators: Sequence[torch.Generator],
    start_noise: Tensor | None = None,
    progress: Progress | None = None,
) -> Losses:
    """Minimises the denoising loss (paper eq. 2) of every edit over what is trained, in place.

    Args:
        base: the frozen base, with whatever is trained already in it.
        latents: (N, C, H, W), fp32 on the CPU.
        embeddings: gives the text conditioning (N, T, D) of the step.
        trained: what is trained, each with a rate of its own.
        config: steps, draws, their timesteps and noise, fall of the rate, clipping, averaging, early stop.
        generators: one CPU generator per edit.
        start_noise: what sampling will start from (C, H, W); only read with `StageConfig.anchor`.
        progress: called after every step.

    Raises:
        DivergenceError: a loss is no longer finite.

    **Memory**: the activations of N * draws rows, freed before the optimiser steps.
    """
    edits = len(latents)
    optimizers = [
        PackedAdam(
            part.weights,
            learning_rate=part.learning_rate,
            max_grad_norm=config.max_grad_norm,
            weight_decay=part.weight_decay,
        )
        for part in trained
    ]
    averages = [part.weights.clone() for part in trained] if config.average else []
    history = torch.full((config.steps, edits), float("nan"))
    active = torch.ones(edits, dtype=torch.bool)
    steps_run = [config.steps] * edits
    for step in range(config.steps):
        noisy, timesteps, target = draw_rows(
            latents,
            config.draws,
            base.alpha_bar,
            base.family.prediction_type,
            generators,
            config.timesteps,
            start_noise,
            round(config.anchor * config.draws),
        )
        conditioning = embeddings().repeat_interleave(config.draws, 0)
        losses = loss_per_edit(base.predict(noisy, timesteps, conditioning), target.to(base.device), edits)
        share = 1 - (1 - config.final_rate) * step / max(1, config.steps - 1)
        for part in trained:
            part.grads.zero_()
        with warnings.catch_warnings():
            # The factors of several edits are strided views of one buffer, and so are their gradients, on purpose.
            warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
            losses.sum().backward()
        for part, optimizer in zip(trained, optimizers, strict=True):
            optimizer.step(part.grads, active, share)
        for part, average in zip(trained, averages, strict=False):
            _follow(average, part.weights, config.average, step, active)
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
    for part, average in zip(trained, averages, strict=False):
        part.weights.copy_(average)
    return Losses(history, tuple(steps_run))


@torch.no_grad()
def _follow(average: Tensor, weights: Tensor, decay: float, step: int, active: Tensor) -> None:
    """Moves the running average (N, P) of the weights on; early steps count less, so that the start is forgotten."""
    share = 1 - min(decay, (1 + step) / (10 + step))
    average.lerp_(weights, share * active.to(weights).unsqueeze(1))


def _stalled(losses: Tensor, config: StageConfig) -> bool:
    """Whether the mean loss over the last `patience` steps is no better than over as many before."""
    window = config.patience
    if not window or len(losses) < 2 * window:
        return False
    before, now = losses[-2 * window : -window].mean(), losses[-window:].mean()
    return bool(now > before * (1 - config.min_improvement))
