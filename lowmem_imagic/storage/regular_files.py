"""Opens only regular files for reading: opening a pipe would wait, and reading a device may never end."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

# Without O_NONBLOCK, opening a pipe without a writer would wait forever, before its kind can be checked.
_NAMES = ("O_RDONLY", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY")
_FLAGS = sum(getattr(os, name, 0) for name in _NAMES)


class NotRegularError(OSError):
    """The path is a pipe, socket or device, or the file is larger than expected."""


@contextmanager
def open_regular(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, open for reading, and its size in bytes.

    Args:
        path: the file; links above it are followed.
        follow: whether a link at `path` itself is followed. Else it is an error.

    Raises:
        IsADirectoryError: The path is a folder.
        NotRegularError: The path is a pipe, socket or device.
        OSError, ValueError: The file cannot be opened, or the path is invalid.
    """
    # Checked before and after opening, because opening alone can have an effect on some devices.
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
        # Not `most_bytes`, for which Python would allocate; of a file that grows meanwhile, the beginning.
        return file.read(size)


def kind_at(path: Path) -> int | None:
    """The kind of file at `path`, such as ``stat.S_IFDIR``, without following links; None if there is none, or if the
    path cannot be read."""
    try:
        return stat.S_IFMT(path.lstat().st_mode)
    except (OSError, ValueError):
        return None


def is_plain(path: Path, kind: int) -> bool:
    """Whether `path` is a file of that kind, and not a link to one."""
    return kind_at(path) == kind


def _check(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("is a folder")
    if not stat.S_ISREG(mode):
        raise NotRegularError("is a pipe, link or device")
