"""Kinds of failure of an item: what can change by itself is tried again, bad input is not."""

import errno
from pathlib import Path

from ..errors import DivergenceError, LowmemImagicError, MemoryLimitError, OutputUnwritableError
from ..writable import check_writable

INPUT, MEMORY, TRANSIENT, DIVERGED = "input", "memory", "io", "diverged"
RETRIED = (MEMORY, TRANSIENT)
"""Kinds that the same command, run again, tries again."""
MAX_TRIES = 3
"""Of an item whose photo cannot be read for a reason that passes, within one run."""

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "EAGAIN",
        "EBUSY",
        "ENETDOWN",
        "ENETUNREACH",
        "EHOSTDOWN",
        "EHOSTUNREACH",
    )
    if hasattr(errno, name)
)
"""What a network or a disk answers that may answer otherwise later."""
_FULL = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO") if hasattr(errno, name))
"""What no other item could be written for, either."""


def kind_of(error: LowmemImagicError) -> str:
    """The kind of a failure."""
    if isinstance(error, MemoryLimitError):
        return MEMORY
    if isinstance(error, DivergenceError):
        return DIVERGED
    cause = error.__cause__
    return TRANSIENT if isinstance(cause, OSError) and cause.errno in _PASSING else INPUT


def is_of_one_item(error: OutputUnwritableError, out: Path) -> bool:
    """Whether it is one item's folder that cannot be written, while others in `out` can be."""
    cause = error.__cause__
    if not isinstance(cause, OSError) or cause.errno in _FULL or not out.is_dir():
        return False
    try:
        check_writable(out)
    except OutputUnwritableError:
        return False
    return True
