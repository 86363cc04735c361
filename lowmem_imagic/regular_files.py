"""Files opened for reading only where they are regular ones: a pipe would be waited on, a device never ends."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader


class NotRegularError(OSError):
    """There is a pipe, socket or device in place of the file."""


@contextmanager
def open_regular(path: str | os.PathLike[str]) -> Iterator[tuple[BufferedReader, int]]:
    """A regular file, open for reading, and its size in bytes.

    Raises:
        IsADirectoryError: It is a folder.
        NotRegularError: It is no file either.
        OSError, ValueError: It cannot be opened, or not be named.
    """
    # Asked before opening as well as after: to open some devices is to use them.
    _check(os.stat(path).st_mode)
    # O_NONBLOCK: opening a pipe without a writer would wait for ever before its kind can be asked.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(descriptor)
        _check(status.st_mode)
        with open(descriptor, "rb", closefd=False) as file:
            yield file, status.st_size
    finally:
        os.close(descriptor)


def _check(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("is a folder")
    if not stat.S_ISREG(mode):
        raise NotRegularError("is a pipe or device")
