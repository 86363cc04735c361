"""Kinds of failure of an item: temporary ones are tried again, bad input is not."""

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
    OutputExistsError,
    OutputUnwritableError,
    UnexpectedError,
)
from ..storage.writable import check_writable
from ..unexpected import first_line, unexpected

INPUT, MEMORY, TRANSIENT, DIVERGED, INTERNAL = "input", "memory", "io", "diverged", "internal"
FOLDER = "folder"
"""The item's folder has other contents."""
RETRIED = (MEMORY, TRANSIENT, FOLDER)
"""Kinds that are tried again when the same command is run again."""
RESUMED = (INPUT, *RETRIED)
"""Kinds after which an edit goes on from its training state: the state has no part in the failure."""
AS_BEFORE = " (as before; a retry with `failed` tries again)"
"""End of the reason of an item that failed in an earlier run, or in another process."""
MAX_TRIES = 3
"""Most tries within one run for an item with a temporary failure, such as a network error on its photo."""

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
"""Temporary errors of a network or a disk."""
_FULL = frozenset(getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EIO") if hasattr(errno, name))
"""Errors that stop every item from being written."""


def kind_of(error: LowmemImagicError) -> str:
    """The kind of a failure."""
    if isinstance(error, MemoryLimitError):
        return MEMORY
    if isinstance(error, DivergenceError):
        return DIVERGED
    if isinstance(error, OutputExistsError):
        return FOLDER
    if isinstance(error, UnexpectedError):
        return INTERNAL
    cause = error.__cause__
    return TRANSIENT if isinstance(cause, OSError) and cause.errno in _PASSING else INPUT


def is_of_one_item(error: OutputUnwritableError, out: Path) -> bool:
    """Whether only one item's folder is unwritable, and others in `out` can be written."""
    cause = error.__cause__
    if not isinstance(cause, OSError) or cause.errno in _FULL or not out.is_dir():
        return False
    try:
        check_writable(out)
    except OutputUnwritableError:
        return False
    return True


def failure_of(error: Exception, remark: str = "") -> LowmemImagicError:
    """The error to report for an item in place of a raised one, without a reference to it.

    Args:
        error: an error of this package, or an unexpected one.
        remark: text to append to the message.
    """
    end = f"; {remark}" if remark else ""
    if isinstance(error, LowmemImagicError):
        failure = type(error)(f"{error}{end}")
        if isinstance(error.__cause__, OSError):
            # `kind_of` needs only the number; the traceback would keep the failed call's tensors alive.
            failure.__cause__ = OSError(error.__cause__.errno, error.__cause__.strerror)
        if isinstance(error, UnexpectedError) and isinstance(failure, UnexpectedError):
            failure.details = error.details
        return failure
    if ran_out(error):
        return MemoryLimitError(f"out of memory ({first_line(error)}); fewer etas or seeds take less{end}")
    return unexpected(error, remark)


def is_of_group(error: LowmemImagicError) -> bool:
    """Whether the error affects all items with the same base and settings, or all items."""
    return isinstance(error, (ModelError, ConfigError, OutputError)) and not isinstance(error, NonFiniteModelError)


def keep_details(error: LowmemImagicError, name: str, path: Path) -> str:
    """Appends the traceback of an unexpected error to a file; returns a remark with the file's path, or "".

    Args:
        error: any error of the package.
        name: the item's name.
        path: the file; several runs may write to it, and a link at this path is not followed.
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
