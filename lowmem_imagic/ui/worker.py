"""A process of the studio that works: takes orders as lines of JSON, and tells events as lines of JSON.

The page's own process loads no model and decodes no picture. A crash of this process, for example by a damaged picture
or for lack of memory, is the end of one job; the page goes on and starts another. The process ends when its standard
input closes, also if the page was killed.
"""

import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ..actions.console import Console
from ..batch.stopping import Stop
from ..errors import ConfigError, LowmemImagicError
from ..plain_text import shown
from ..unexpected import quiet_libraries, unexpected

Send = Callable[[Mapping[str, Any]], None]

PROGRAM = "lowmem_imagic.ui.worker"
_PAUSE_S = 0.1
"""Least time between two events of progress."""
_STOPPABLE = ("invert", "sample")
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


def main() -> None:
    """Takes orders until standard input closes."""
    # Libraries print to standard output; events have a descriptor of their own.
    told = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(event: Mapping[str, Any]) -> None:
        with lock:
            told.write((json.dumps(event) + "\n").encode())

    quiet_libraries()
    orders: queue.Queue[dict[str, Any]] = queue.Queue()
    stop = Stop()
    threading.Thread(target=_listen, args=(orders, stop), daemon=True).start()
    from .work import Work

    work = Work()
    send({"event": "ready"})
    while True:
        order = orders.get()
        stop.asked = False
        send(_answer(work, order, Told(send, stop)))


def _listen(orders: "queue.Queue[dict[str, Any]]", stop: Stop) -> None:
    """Reads orders, and requests to stop the one at work; ends the process when they end."""
    for line in sys.stdin.buffer:
        order = json.loads(line)
        if order["work"] == "stop":
            stop.asked = True
        else:
            orders.put(order)
    os._exit(0)


def _answer(work: Any, order: dict[str, Any], told: Told) -> dict[str, Any]:
    """The last event of an order: its result, or the error in one line."""
    try:
        result = work.do(order, told)
    except KeyboardInterrupt:
        return {"event": "stopped"}
    except ConfigError as error:
        return {"event": "failed", "text": "; ".join(dict.fromkeys(error.problems))}
    except LowmemImagicError as error:
        return {"event": "failed", "text": str(error)}
    except Exception as error:
        if isinstance(error, MemoryError) or "out of memory" in str(error):
            return {"event": "failed", "text": "out of memory; a smaller photo, or fewer etas, take less"}
        failure = unexpected(error)
        return {"event": "failed", "text": str(failure), "details": failure.details}
    return {"event": "done", "result": result}


if __name__ == "__main__":
    main()
