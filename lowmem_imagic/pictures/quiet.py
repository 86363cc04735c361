"""Silences decoders: lines printed by Pillow and its libraries go to the log."""

import logging
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

log = logging.getLogger(__name__)
# Without any handler Python prints warnings in this log on standard error.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_DECODING = threading.RLock()
"""Lock for `warnings.catch_warnings` and descriptor 2, which belong to the whole process: interleaving threads would
leave warnings switched off, or lines diverted."""
_MAX_LINES = 100
# libtiff begins a line with the name of a function ("TIFFReadDirectory: ... ."), other libraries with their own name.
# The last line of a Python traceback looks similar.
_LIBRARY_LINE = re.compile(
    rb"(?!\w+(?:Error|Exception|Warning|Interrupt):)_?[A-Z]\w*[A-Z]\w*: .*\.\s*$"
    rb"|(?:Fax|Old|Predictor|tempfile|libtiff|dav1d|libheif|libpng|\[(?:ERROR|WARNING|INFO)\])\W?[^:]*[: ]",
    re.DOTALL,
)


@contextmanager
def quiet(*, captured: bool) -> Iterator[None]:
    """Lets one thread at a time decode; logs warnings and, with `captured`, the decoders' own lines.

    C libraries write to file descriptor 2 of the whole process, so it is redirected to a temporary file meanwhile.
    Afterwards the decoders' lines are logged, and lines of other threads are passed on.
    """
    with _DECODING, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        diverted = _divert() if captured else None
        try:
            yield
        finally:
            if diverted is not None:
                _restore(*diverted)
            for warning in caught[:20]:
                log.debug("%s", " ".join(str(warning.message).split()))


def _divert() -> tuple[BinaryIO, int] | None:
    """Redirects descriptor 2 to a new temporary file; does nothing and returns None if it is closed or that fails."""
    try:
        kept = os.dup(2)
    except OSError:
        return None
    try:
        sink = tempfile.TemporaryFile()  # noqa: SIM115  closed by `_restore`
    except OSError:
        os.close(kept)
        return None
    os.dup2(sink.fileno(), 2)
    return sink, kept


def _restore(sink: BinaryIO, kept: int) -> None:
    """Restores descriptor 2; logs the decoders' lines, and passes the lines of other threads on."""
    os.dup2(kept, 2)
    os.close(kept)
    with sink:
        sink.seek(0)
        for count, line in enumerate(sink):
            if not _LIBRARY_LINE.match(line):
                _pass_on(line)
            elif count < _MAX_LINES:
                log.debug("%s", line.decode(errors="backslashreplace").strip())


def _pass_on(line: bytes) -> None:
    try:
        os.write(2, line)
    except OSError:
        pass  # the reader of standard error is gone
