"""Ctrl-C in two steps: the first asks for an orderly end, the second ends at once."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Whether the run shall end; see `listening`."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Ends what can be ended here.

        Raises:
            KeyboardInterrupt: the run shall end.
        """
        if self.asked:
            raise KeyboardInterrupt


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` that the first Ctrl-C (or SIGTERM, as job schedulers send it) sets in the ``with`` block.

    The second raises KeyboardInterrupt wherever the code is.
    """
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        # Not print, which must not be entered from within itself.
        with contextlib.suppress(OSError):  # its reader may have ended of the same Ctrl-C
            os.write(2, b"\nstopping when what is under way is saved; Ctrl-C once more stops at once\n")

    try:
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
