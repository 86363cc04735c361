"""Rectified flows: straight lines between pictures and noise, and samplers along their velocity.

Source: Liu et al. 2022, arXiv 2209.03003; the shift of positions by a picture's size: Esser et al. 2024, arXiv
2403.03206, section 5.3.2; FireFlow: Deng et al. 2024, arXiv 2412.07517, algorithm 1.

Positions are floats: 0 is the picture, 1 pure noise.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError

SAMPLERS = ("Euler", "FireFlow")

Shift = Callable[[int, int], float]
"""The shift mu for (places of a picture, steps): positions p become exp(mu) / (exp(mu) + 1 / p - 1)."""


class Flow:
    """The schedule of a rectified flow.

    Args:
        shift: the shift of sampling's positions. Positions of training are uniform.
    """

    def __init__(self, shift: Shift) -> None:
        self._shift = shift

    def positions(self, draws: int, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """Positions (draws,), one in each of equal parts of `span`, uniform within its part."""
        shares = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
        return span[0] + (span[1] - span[0]) * shares

    def spread(self, count: int) -> Tensor:
        """Positions (count,) from picture to noise."""
        return torch.linspace(0, 1, count)

    def position(self, share: float) -> Tensor:
        """The share itself."""
        return torch.tensor(share)

    def noised(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """``(1 - t) x + t noise``."""
        t = at.view(-1, 1, 1, 1)
        return (1 - t) * x + t * noise

    def target(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """The velocity ``noise - x``, the same at every position."""
        return noise - x

    def noise_in(self, noisy: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """The noise in `noisy`: `noised` solved for the noise; positions are above 0."""
        t = at.view(-1, 1, 1, 1)
        return (noisy - (1 - t) * x) / t

    def sampler(
        self, name: str, steps: int, shape: Sequence[int], device: torch.device | str = "cpu", *, guided: bool = True
    ) -> "Euler":
        """A sampler from noise to a picture of this shape (C, H, W), with `steps` predictions, at least two for
        FireFlow.

        Raises:
            ConfigError: the name is unknown.
        """
        short = name.removesuffix("Scheduler")
        if short in ("Euler", "FlowMatchEulerDiscrete"):
            return Euler(self._times(steps, steps, shape).to(device))
        if short == "FireFlow":
            return FireFlow(self._times(max(1, steps - 1), steps, shape).to(device))
        raise ConfigError(f"`scheduler` is {name!r}, expected {' or '.join(SAMPLERS)}, the samplers of a flow model")

    def inverter(self, steps: int, shape: Sequence[int]) -> "FireFlow":
        """FireFlow from a picture to noise: as exact as a method of second order, with one prediction a step."""
        return FireFlow(self._times(max(1, steps - 1), steps, shape).flip(0))

    def error_of(self, name: str, steps: int) -> float:
        """0: on a straight line the samplers are exact.

        Raises:
            ConfigError: the name is unknown.
        """
        self.sampler(name, steps, (1, 1, 1))
        return 0.0

    def _times(self, intervals: int, steps: int, shape: Sequence[int]) -> Tensor:
        """Positions (intervals + 1,) from 1 to 0, evenly spaced down to the last before the picture, then shifted."""
        even = torch.linspace(1, 1 / intervals, intervals, dtype=torch.float64)
        factor = math.exp(self._shift(math.prod(shape[1:]), steps))
        shifted = factor / (factor + (1 / even - 1))
        return torch.cat([shifted, torch.zeros(1, dtype=torch.float64)]).float()


class Euler:
    """Euler's method along a flow.

    Args:
        times: positions (S + 1,) of the steps' ends.
    """

    def __init__(self, times: Tensor) -> None:
        self.times = times

    @property
    def at(self) -> Sequence[Tensor]:
        """The position () where each step begins."""
        return list(self.times[:-1])

    @property
    def end(self) -> Tensor:
        """The final position ()."""
        return self.times[-1]

    def start(self, noise: Tensor, below: Tensor | None) -> Tensor:
        """The noise: a flow begins with nothing else."""
        return noise

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """x."""
        return x

    def stepped(
        self, prediction: Tensor, step: int, x: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """x a step further along the velocity."""
        return x + (self.times[step + 1] - self.times[step]) * prediction


class FireFlow(Euler):
    """The midpoint rule that takes the previous midpoint's velocity to reach the next midpoint.

    The first prediction, at the start, moves nothing; each further one is a step. Keeps the last velocity, so an object
    serves one path.
    """

    _velocity: Tensor

    @property
    def at(self) -> Sequence[Tensor]:
        """The start, then the middle of every step."""
        return [self.times[0], *((self.times[:-1] + self.times[1:]) / 2)]

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """x half a step further; x may be several copies of the rows that are stepped, one after the other."""
        if step == 0:
            return x
        half = (self.times[step] - self.times[step - 1]) / 2
        return x + half * self._velocity.repeat(len(x) // len(self._velocity), 1, 1, 1)

    def stepped(
        self, prediction: Tensor, step: int, x: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """x a step further along the midpoint's velocity."""
        self._velocity = prediction
        return x if step == 0 else x + (self.times[step] - self.times[step - 1]) * prediction
