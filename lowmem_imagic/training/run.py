"""One edit in one training stage: its inputs, its losses, and whether it is finished."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from ..errors import DivergenceError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser
from ..settings.stages import StageConfig


def tail(losses: Sequence[float], share: float = 0.2) -> float | None:
    """Mean of the last `share` of the losses; None if there are none."""
    return fmean(losses[-max(1, round(len(losses) * share)) :]) if losses else None


@dataclass
class Run:
    """One edit in one stage."""

    denoiser: Denoiser
    """The predicting network."""
    latents: Tensor
    """The photo (C, H, W) as the denoiser sees it, fp32 on the CPU."""
    config: StageConfig
    """Steps, draws, their timesteps and noise, decay of the learning rate."""
    generator: torch.Generator
    """Source of its random draws, on the CPU."""
    start_noise: Tensor | None = None
    """Starting noise of sampling (C, H, W); only used with `StageConfig.anchor`."""
    extra: Conditioning = field(default_factory=lambda: Conditioning({}))
    """The denoiser's conditioning beside the text, one row, without its random part."""
    losses: list[float] = field(default_factory=list)
    """Mean squared error of each step so far."""
    skipped: int = 0
    """Steps whose gradients overflowed in fp16 and changed no weights."""

    @property
    def rate_share(self) -> float:
        """Learning rate of the next step, as a share of the full rate."""
        return 1 - (1 - self.config.final_rate) * len(self.losses) / max(1, self.config.steps - 1)

    @property
    def anchored(self) -> int:
        """Draws of the next step that take the starting noise: their share of all draws up to it, rounded.

        So a share that is no whole number of draws is kept over the steps.
        """
        before, share = len(self.losses), self.config.anchor * self.config.draws
        return math.floor((before + 1) * share + 0.5) - math.floor(before * share + 0.5)

    @property
    def diverged(self) -> DivergenceError | None:
        """The error to report if the loss is no longer finite; None otherwise."""
        if not self.losses or torch.tensor(self.losses[-1]).isfinite():
            return None
        return DivergenceError(
            f"the loss is {self.losses[-1]:g} after {len(self.losses)} of {self.config.steps} steps at learning "
            f"rate {self.config.learning_rate:g}; lower the learning rate of this stage"
        )

    @property
    def failed(self) -> DivergenceError | None:
        """The error to report of a finished run: its loss is no longer finite, or no step changed a weight; or None."""
        if self.diverged is None and 0 < self.skipped == len(self.losses):
            return DivergenceError(
                f"the gradients of all {self.skipped} steps of a stage overflowed in fp16, so that nothing was "
                "trained; take another type (`compute=fp32`, or bf16 on cards that have it), or more steps"
            )
        return self.diverged

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or the loss diverged."""
        return len(self.losses) >= self.config.steps or self.diverged is not None
