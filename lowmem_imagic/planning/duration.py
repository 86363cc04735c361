"""Seconds of a training, estimated before any weight is read: counted operations at a measured speed.

A pass takes the time of its products, at a share of the speed of a large product, and of starting its operations, in
Python and torch, which takes longer than the work itself in small networks and on fast GPUs.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from ..sampling import description
from ..sampling.inversion import STEPS as INVERSION_STEPS
from ..sampling.losses import BATCH
from .costs import Costs
from .counting import Cost

EFFICIENCY = 0.5
"""Speed of a pass's products, as a share of a large product's."""
STARTS = 17
"""Time to start an operation of a network, in times of a small operation alone.

Both constants are of the bundled model's passes on one core. In Stable Diffusion 1.5 on an H200 a start takes 48 us
(``benchmarks/results/gpu_first_run.json``).
"""
_SIDES = {"cpu": 1024}
"""Side of the measured product's matrices, by kind of device."""
_SIDE = 4096
"""The same for other devices."""
_SERIES, _STARTED = 10, 100
"""Measurements, of which the best counts as other programs at work disturb it least, and small operations in one."""


@dataclass(frozen=True)
class Speed:
    """The speed of a device, measured."""

    flops: float
    """Floating-point operations of a large product in a second."""
    start_s: float
    """Seconds of an operation on a few numbers."""

    def seconds(self, cost: Cost) -> float:
        """Estimated seconds of a pass."""
        return cost.flops / (EFFICIENCY * self.flops) + STARTS * self.start_s * cost.operations


@cache
def speed_of(device: torch.device, dtype: torch.dtype) -> Speed:
    """The speed of a device in a compute type; measured once in a process, in less than a second."""
    side = _SIDES.get(device.type, _SIDE)
    matrix = torch.ones(side, side, device=device, dtype=dtype)
    few = torch.ones(8, device=device, dtype=dtype)
    return Speed(2 * side**3 / _seconds(lambda: matrix @ matrix, device), _seconds(lambda: few + few, device, _STARTED))


def _seconds(run: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Seconds of one call of `run`, in the best of several series."""
    series = list[float]()
    for _ in range(_SERIES):
        began = time.perf_counter()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        series.append((time.perf_counter() - began) / times)
    return min(series)


def training_seconds(costs: Costs, speed: Speed, *, rows: int, checkpointing: bool) -> float:
    """Estimated seconds of training one edit without a sentence, from its description to its adapter.

    Loading of the base is not counted.

    Args:
        costs: costs of the architecture.
        speed: the device's speed.
        rows: most rows of a pass.
        checkpointing: whether activations are recomputed.
    """
    config, denoisers = costs.config, range(len(costs.family.denoisers))
    seconds = 0.0
    if costs.family.vocabulary is not None:
        described = description.DRAWS * description.sentences_tried(costs.family.vocabulary)
        seconds += described / BATCH * speed.seconds(costs.sampling_pass(BATCH, 1, 0))
    if config.sample.start == "inverted":
        seconds += INVERSION_STEPS * sum(speed.seconds(costs.sampling_pass(1, 1, number)) for number in denoisers)
    for name, stage in costs.stages.items():
        # A step of more rows than fit takes several passes.
        passes = -(-stage.config.draws // rows)
        one = costs.training_pass(-(-stage.config.draws // passes), 1, checkpointing, name)
        seconds += stage.config.steps * passes * speed.seconds(one)
    return seconds
