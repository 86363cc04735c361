"""The events of a job: a console whose lines and bars are sent to the page."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from ..actions.console import Console
from ..batch.stopping import Stop
from ..plain_text import shown

Send = Callable[[Mapping[str, Any]], None]

_PAUSE_S = 0.1
"""Least time between two events of progress."""
_STOPPABLE = ("describe", "invert", "sample")
"""Stages that end at once when a stop is asked for; training saves its state first."""


class Told(Console):
    """A console whose lines are events; see `Console`.

    Args:
        send: sends an event.
        stop: ends the job when asked.
    """

    def __init__(self, send: Send, stop: Stop) -> None:
        super().__init__()
        self._send, self.stop = send, stop
        self._sent_s, self._now = 0.0, ""
        self.picture = ""
        """The picture that is being made, in words, in place of the stage's name."""

    def send(self, kind: str, **values: Any) -> None:
        """Tells an event."""
        self._send({"event": kind, **values})

    def _print(self, text: str) -> None:
        self.send("remark", text=shown(text))

    def progress(self, stage: str, step: int, steps: int, remark: str) -> None:
        """Tells the progress of a stage; ends the job here if a stop was asked for, and nothing is to be saved.

        Raises:
            KeyboardInterrupt: a stop was asked for.
        """
        if stage in _STOPPABLE:
            self.stop.check()
        stage = self.picture or stage
        now = time.perf_counter()
        if stage != self._now or step >= steps or now - self._sent_s >= _PAUSE_S:
            self._now, self._sent_s = stage, now
            self.send("progress", stage=stage, step=step, steps=steps, remark=shown(remark))

    def skip(self, steps: int) -> None:
        """Has no effect: the page counts the time of each step."""

    def close(self) -> None:
        """Has no effect: a bar of the page ends with its job."""
