"""Silence around decoders: lines that Pillow and the libraries below it print go to the log."""

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
# Without any handler Python prints what other libraries log as warnings.
logging.getLogger("PIL").addHandler(logging.NullHandler())

_DECODING = threading.RLock()
"""`warnings.catch_warnings` swaps a list of the whole process, and descriptor 2 is one for all: two threads that
interleave would leave warnings switched off, or lines diverted."""
_MAX_LINES = 100
# libtiff begins a line with one of its functions ("TIFFReadDirectory: ... ."), others with their own name. The last
# line of a Python traceback begins alike.
_LIBRARY_LINE = re.compile(
    rb"(?!\w+(?:Error|Exception|Warning|Interrupt):)_?[A-Z]\w*[A-Z]\w*: .*\.\s*$"
    rb"|(?:Fax|Old|Predictor|tempfile|libtiff|dav1d|libheif|libpng|\[(?:ERROR|WARNING|INFO)\])\W?[^:]*[: ]",
    re.DOTALL,
)


@contextmanager
def quiet(*, captured: bool) -> Iterator[None]:
    """Lets one thread at a time decode; warnings, and with `captured` the decoders' own lines, are logged.

    C libraries write to file descriptor 2, which is the whole process's, so it leads to a temporary file meanwhile.
    Afterwards the lines of the decoders are logged and all others, which other threads wrote, are passed on.
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
    """Leads descriptor 2 to a new temporary file; None, and nothing done, where it is closed or no file can be made."""
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
    """Gives descriptor 2 back, and tells the lines of decoders from those of other threads."""
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
        pass  # nobody reads standard error any more
