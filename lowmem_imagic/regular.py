"""Reading of regular files alone: no pipe is waited for, no device is read, and no link is followed."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

_FLAGS = (
    os.O_RDONLY
    # Without it, opening a pipe that nobody writes to would wait for ever.
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


class NotRegularError(OSError):
    """Something other than a regular file is there, or the file is larger than expected."""


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """Opens a regular file for reading.

    Raises:
        OSError: it is not there, or cannot be read; `NotRegularError` for a pipe, a device or a folder. A link at
            `path` is an error, too; one above it is followed.
    """
    descriptor = os.open(path, _FLAGS)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularError(f"{path} is no regular file")
        yield file


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file.

    Raises:
        OSError: as of `open_regular`; `NotRegularError` for one of more than `most_bytes`, of which none are read.
    """
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most_bytes:
            raise NotRegularError(f"{path} has {size} bytes, expected at most {most_bytes}")
        return file.read(most_bytes)


def kind_at(path: Path) -> int | None:
    """What is at `path` itself, links not followed, such as ``stat.S_IFDIR``; None where nothing can be seen."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except (OSError, ValueError):
        return None


def is_plain(path: Path, kind: int) -> bool:
    """Whether `path` itself, and no link to it, is a file of that kind."""
    return kind_at(path) == kind
