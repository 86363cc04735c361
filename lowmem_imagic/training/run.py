"""One edit's way through a training stage: what it draws from, the losses it saw, and when it is finished."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from ..errors import DivergenceError
from ..families.family import Denoiser
from ..settings.stages import StageConfig


def tail(losses: Sequence[float], share: float = 0.2) -> float | None:
    """Mean of the last `share` of some losses; None when there are none."""
    return fmean(losses[-max(1, round(len(losses) * share)) :]) if losses else None


@dataclass
class Run:
    """One edit's way through one stage."""

    denoiser: Denoiser
    """The network that predicts."""
    latents: Tensor
    """The photo (C, H, W) as the denoiser sees it, fp32 on the CPU."""
    config: StageConfig
    """Steps, draws, their timesteps and noise, fall of the rate."""
    generator: torch.Generator
    """What it draws from, on the CPU."""
    start_noise: Tensor | None = None
    """What sampling will start from (C, H, W); only read with `StageConfig.anchor`."""
    losses: list[float] = field(default_factory=list)
    """Mean squared error in each step it took."""
    skipped: int = 0
    """Steps whose gradients overflowed in fp16, which moved nothing."""

    @property
    def rate_share(self) -> float:
        """Share of the learning rate that its next step has."""
        return 1 - (1 - self.config.final_rate) * len(self.losses) / max(1, self.config.steps - 1)

    @property
    def diverged(self) -> DivergenceError | None:
        """The error to report when its loss is no longer finite."""
        if not self.losses or torch.tensor(self.losses[-1]).isfinite():
            return None
        return DivergenceError(
            f"the loss is {self.losses[-1]:g} after {len(self.losses)} of {self.config.steps} steps at learning "
            f"rate {self.config.learning_rate:g}; lower the learning rate of this stage"
        )

    @property
    def finished(self) -> bool:
        """Whether it took all its steps or broke."""
        return len(self.losses) >= self.config.steps or self.diverged is not None
