"""Standard output and standard error that do not end a command: closed, full, gone, or without the letters.

What is lost is text. The files that a command makes are what took the time, so writing about them never undoes them.
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
    """A file whose writes never fail: what it cannot take is dropped, as on a full disk or when the reader is gone."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            super().write(data)
        return len(memoryview(data).cast("B"))


class _PlainRecord(logging.LogRecord):
    """A log record whose message is safe to show, whatever the library that wrote it put into it."""

    def getMessage(self) -> str:
        return shown(super().getMessage())


def steady_streams() -> None:
    """Prepares this process's standard streams; for programs, not for libraries.

    A stream that was closed is as good as ``/dev/null``, and no file that is opened later gets its number. Text that a
    stream cannot encode is escaped, not raised. Failures of standard error are nobody's business; those of standard
    output are `end_output`'s. Warnings and logs of libraries are shown on one line each, as `shown` makes them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is the one that is missing.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and os.name == "posix":
        # Elsewhere a console is no plain file.
        file = io.BufferedWriter(_Forgiving(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(
            file, encoding=sys.stderr.encoding, errors="backslashreplace", line_buffering=True, write_through=True
        )
    logging.setLogRecordFactory(_PlainRecord)
    warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {shown(str(message))}\n"


def end_output() -> None:
    """Gives standard output up, after a write to it has failed: what it still holds goes nowhere, at the end too."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
