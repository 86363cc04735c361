"""Files opened for reading only where they are regular ones: a pipe would be waited on, a device never ends."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

# Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever before its kind can be asked.
_NAMES = ("O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
_FLAGS = sum(getattr(os, name, 0) for name in _NAMES)


class NotRegularError(OSError):
    """There is a pipe, socket or device in place of the file, or the file is larger than expected."""


@contextmanager
def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, open for reading, and its size in bytes.

    Args:
        path: the file; links above it are followed.
        follow: whether a link at `path` itself is followed. Else it is an error.

    Raises:
        IsADirectoryError: It is a folder.
        NotRegularError: It is no file either.
        OSError, ValueError: It cannot be opened, or not be named.
    """
    # Asked before opening as well as after: to open some devices is to use them.
    _check(os.stat(path, follow_symlinks=follow).st_mode)
    descriptor = os.open(path, _FLAGS | (0 if follow else getattr(os, "O_NOFOLLOW", 0)))
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check(status.st_mode)
        yield file, status.st_size


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The bytes of a regular file; no link at `path` is followed.

    Raises:
        OSError, ValueError: See `open_regular`; `NotRegularError` for one of more than `most_bytes`, which is not read.
    """
    with open_regular(path, follow=False) as (file, size):
        if size > most_bytes:
            raise NotRegularError(f"has {size} bytes, expected at most {most_bytes}")
        return file.read(most_bytes)


def kind_at(path: Path) -> int | None:
    """The kind of what is at `path` itself, links not followed, as ``stat.S_IFDIR``; None where nothing can be seen."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except (OSError, ValueError):
        return None


def is_plain(path: Path, kind: int) -> bool:
    """Whether `path` itself, and no link to it, is a file of that kind."""
    return kind_at(path) == kind


def _check(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("is a folder")
    if not stat.S_ISREG(mode):
        raise NotRegularError("is a pipe, link or device")
