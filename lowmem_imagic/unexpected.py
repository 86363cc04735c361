"""Errors and log messages of libraries: an unexpected error becomes one line; advice to developers is not logged."""

import logging
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import UnexpectedError


def unexpected(error: BaseException, remark: str = "") -> UnexpectedError:
    """The error to report in place of one that is not this package's own; it holds the traceback as text.

    It does not refer to `error`, whose traceback would keep alive what the failed call had allocated.

    Args:
        error: the exception.
        remark: a further note for the user.
    """
    reported = UnexpectedError(f"an unexpected error ended this: {first_line(error)}{remark and f'; {remark}'}")
    reported.details = "".join(traceback.format_exception(error))
    return reported


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text, if it has one."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300].removesuffix(": ")


_LIBRARIES = ("bitsandbytes", "diffusers", "transformers", "huggingface_hub")


def quiet_libraries() -> None:
    """Libraries log advice to developers, such as bitsandbytes about its kernels; after this call they log errors only.

    For programs, which own the process; the package itself calls `without_advice`.
    """
    for library in _LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)


class _Silence:
    """Keeps the libraries' logs at errors for as long as any thread is within a block; no thread waits for another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._levels: dict[str, int] = {}

    def enter(self) -> None:
        """Begins a block; the first of those that overlap remembers the levels."""
        with self._lock:
            if not self._blocks:
                self._levels = {library: logging.getLogger(library).level for library in _LIBRARIES}
                quiet_libraries()
            self._blocks += 1

    def leave(self) -> None:
        """Ends a block; the last puts the levels back."""
        with self._lock:
            self._blocks -= 1
            if not self._blocks:
                for library, level in self._levels.items():
                    logging.getLogger(library).setLevel(level)


_SILENCE = _Silence()


@contextmanager
def without_advice() -> Iterator[None]:
    """Within the block the libraries log errors only, such as while one of them is imported."""
    _SILENCE.enter()
    try:
        yield
    finally:
        _SILENCE.leave()
