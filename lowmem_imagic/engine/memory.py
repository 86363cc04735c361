"""Measured seconds and peak bytes of each stage, fallbacks when memory runs out, return of freed memory."""

import ctypes
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from ..errors import MemoryLimitError

T = TypeVar("T")

_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.IGNORECASE)


@contextmanager
def clear_errors(stage: str, cheaper: str) -> Iterator[None]:
    """Turns running out of memory in the ``with`` block into one clear error.

    Args:
        stage: name of the stage, for the error.
        cheaper: settings that take less memory, for the error.

    Raises:
        MemoryLimitError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        raise MemoryLimitError(f"out of memory in stage {stage}; next cheaper setting: {cheaper}") from error


def with_fallbacks(run: Callable[[], T], cheaper: Callable[[], bool]) -> T:
    """The result of `run`; each time it runs out of memory, `cheaper` steps down and `run` starts again.

    Args:
        run: the work; it may be interrupted anywhere and started again.
        cheaper: takes the next fallback; returns False if none is left, and then the error is raised.
    """
    while True:
        try:
            return run()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not ran_out(error) or not cheaper():
                raise
        # After the except block: the error kept the failed attempt's tensors alive.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def ran_out(error: BaseException) -> bool:
    """Whether memory ran out; torch on a CPU, cuBLAS and cuDNN report it as a bare RuntimeError.

    While a CUDA graph is recorded, another error is raised, with the out-of-memory error as its context.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _OUT_OF_MEMORY.search(str(error)):
        return True
    return error.__context__ is not None and ran_out(error.__context__)


@dataclass
class Meter:
    """Collects seconds and peak bytes of each stage on one device.

    On CUDA the peak is the allocator's. On Linux CPUs it is the process's resident peak, Python and torch
    included; elsewhere it is unknown and None.
    """

    device: torch.device
    stages: dict[str, dict[str, float | int | None]] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the ``with`` block under `name`."""
        reset_peak(self.device)
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = round(time.perf_counter() - started, 3)
        self.stages[name] = {"seconds": seconds, "peak_bytes": peak_bytes(self.device)}


@contextmanager
def measured_stage(meter: Meter, name: str, cheaper: str) -> Iterator[None]:
    """Measures a stage, and turns running out of memory in it into one clear error."""
    with clear_errors(name, cheaper), meter.stage(name):
        yield


_LEAST_BYTES = {False: 2**20, True: 2**17}
"""Least size of a freed block that is returned at once, by whether the network is large."""


@contextmanager
def loading_memory(*, large: bool) -> Iterator[None]:
    """Within the block glibc returns freed blocks of 128 KiB and more to the system; afterwards see below.

    For loading: temporary tensors between those that stay leave holes, 60 MiB of them in Stable Diffusion XL.
    """
    return_freed_memory(large=True)
    try:
        yield
    finally:
        return_freed_memory(large=large)


def return_freed_memory(*, large: bool) -> None:
    """Makes glibc return freed blocks to the system at once, from 1 MiB on; affects the whole process.

    By default glibc keeps freed blocks of up to 32 MiB, the size of expanded weights and activations: one training row
    of Stable Diffusion 1.5 at 512 px then peaks at 1.6 GiB over baseline instead of 1.1. Does nothing without glibc.

    Args:
        large: whether the network is large; then from 128 KiB on. A step of Stable Diffusion XL at 512 px leaves
            0.2 GiB of holes otherwise. An edit of the bundled model would take up to a tenth longer.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        m_mmap_threshold = -3
        mallopt(m_mmap_threshold, _LEAST_BYTES[large])


def reset_peak(device: torch.device) -> None:
    """Starts a new peak measurement."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        # "5" resets the resident high-water mark (proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peak_bytes(device: torch.device) -> int | None:
    """Peak bytes since `reset_peak`: allocated on CUDA, resident on Linux, None elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _of_process("VmHWM:")


def resident_bytes() -> int | None:
    """Resident bytes of this process on Linux, None elsewhere."""
    return _of_process("VmRSS:")


def _of_process(name: str) -> int | None:
    """An entry of ``/proc/self/status``, in bytes; None if there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith(name)]
    return sizes[0] if sizes else None
