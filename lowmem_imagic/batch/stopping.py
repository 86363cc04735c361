"""Ctrl-C in two steps: the first asks for an orderly end, the second ends at once."""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType


class Stop:
    """A request to end the run; see `listening`."""

    def __init__(self) -> None:
        self.asked = False

    def check(self) -> None:
        """Ends the run here if a stop was asked for.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        if self.asked:
            raise KeyboardInterrupt


def stop_at_sigterm(stop: Stop) -> None:
    """Asks for an orderly end at SIGTERM, which a job scheduler sends to every process of a job."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.asked = True

    signal.signal(signal.SIGTERM, on_signal)


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` for the ``with`` block, set by the first Ctrl-C (or SIGTERM from a job scheduler).

    The second Ctrl-C raises KeyboardInterrupt at once.
    """
    stop = Stop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.asked:
            raise KeyboardInterrupt
        stop.asked = True
        # os.write, as print is not safe in a signal handler.
        with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the reader of the pipe
            os.write(2, b"\nstopping when the training states are saved; Ctrl-C once more stops at once\n")

    try:
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # only the main thread may set handlers
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
