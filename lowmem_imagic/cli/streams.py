"""Keeps a command alive if standard output or standard error is closed, full, gone, or lacks the characters.

Only text is lost. The files of a command matter more than its messages, so a failed message never undoes them.
"""

import contextlib
import io
import logging
import os
import sys
import warnings
from typing import Any

from ..plain_text import shown


class _Forgiving(io.FileIO):
    """A file whose writes never fail: on a full disk, or if the reader is gone, the text is dropped."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(memoryview(data).cast("B"))


class _PlainRecord(logging.LogRecord):
    """A log record of any library, with its message made safe to show."""

    def getMessage(self) -> str:
        return shown(super().getMessage())


def steady_streams() -> None:
    """Prepares this process's standard streams; for programs, not for libraries.

    A closed stream becomes ``/dev/null``, so that no file opened later gets its number. Characters that a stream cannot
    encode are escaped. Failures of standard error are ignored; `end_output` handles those of standard output. Warnings
    and logs of libraries go through `shown`, one line each.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The system gives out the lowest free number, which is this one.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and os.name == "posix":
        # On other systems a console is no plain file.
        file = io.BufferedWriter(_Forgiving(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(
            file, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True, write_through=True
        )
    logging.setLogRecordFactory(_PlainRecord)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {shown(str(message))}\n"


def end_output() -> None:
    """Redirects standard output to ``/dev/null`` after a failed write, as buffered text would fail again at exit."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
