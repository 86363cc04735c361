"""Kinds of failure of an item: what can change by itself is tried again, bad input is not."""

import errno
import os
import time
from pathlib import Path

from ..engine.memory import ran_out
from ..errors import (
    ConfigError,
    DivergenceError,
    LowmemImagicError,
    MemoryLimitError,
    ModelError,
    NonFiniteModelError,
    OutputError,
    OutputUnwritableError,
    UnexpectedError,
)
from ..storage.writable import check_writable
from ..unexpected import first_line, unexpected

INPUT, MEMORY, TRANSIENT, DIVERGED, INTERNAL = "input", "memory", "io", "diverged", "internal"
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
"""Errors of a network or a disk that may pass."""
_FULL = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO") if hasattr(errno, name))
"""Errors that stop every item from being written."""


def kind_of(error: LowmemImagicError) -> str:
    """The kind of a failure."""
    if isinstance(error, MemoryLimitError):
        return MEMORY
    if isinstance(error, DivergenceError):
        return DIVERGED
    if isinstance(error, UnexpectedError):
        return INTERNAL
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


def failure_of(error: Exception, remark: str = "") -> LowmemImagicError:
    """The error to report for an item in place of one that was raised, and which it does not keep alive.

    Args:
        error: the package's own, or one that nobody raised on purpose.
        remark: said after it.
    """
    end = f"; {remark}" if remark else ""
    if isinstance(error, LowmemImagicError):
        failure = type(error)(f"{error}{end}")
        if isinstance(error.__cause__, OSError):
            # Its number alone is asked for, see `kind_of`; a traceback would keep what the failed call had allocated.
            failure.__cause__ = OSError(error.__cause__.errno, error.__cause__.strerror)
        if isinstance(error, UnexpectedError) and isinstance(failure, UnexpectedError):
            failure.details = error.details
        return failure
    if ran_out(error):
        return MemoryLimitError(f"out of memory ({first_line(error)}); fewer etas or seeds take less{end}")
    return unexpected(error, remark)


def is_of_group(error: LowmemImagicError) -> bool:
    """Whether no other item with the same base and settings could be made either, or none at all."""
    return isinstance(error, (ModelError, ConfigError, OutputError)) and not isinstance(error, NonFiniteModelError)


def keep_details(error: LowmemImagicError, name: str, path: Path) -> str:
    """Appends the traceback of an unexpected error to a file; says where it is, "" where there is none.

    Args:
        error: any of the package's errors.
        name: of the item.
        path: the file; several runs may write to it, and a link put in its place is not followed.
    """
    if not isinstance(error, UnexpectedError):
        return ""
    text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {name!r}\n{error.details}\n"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, flags, 0o666), "ab") as file:
            file.write(text.encode(errors="backslashreplace"))
    except OSError:
        return ""
    return f"details of the unexpected error are in {path}"
