"""The processes of a studio, and what visitors may put on them."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from ..plain_text import shown
from . import limits
from .card import FAILED, STOPPED, Job, Queue
from .visitors import Refused, Visitor


class Machine:
    """`card` does the heavy work one job at a time, and `desk` the quick one beside it.

    Args:
        models: the bases to choose from, by the names that a page shows.
        device: device of the bases.
    """

    def __init__(self, models: Mapping[str, str], device: str) -> None:
        self.models, self.device = dict(models), device
        self.card, self.desk = Queue(), Queue()

    def start(self) -> None:
        """Starts the processes."""
        self.card.start()
        self.desk.start()

    def close(self) -> None:
        """Ends the processes; a running training saves its state."""
        self.card.close()
        self.desk.close()

    def base(self, label: str) -> str:
        """The base of a label.

        Raises:
            Refused: it is none of those to choose from.
        """
        if label not in self.models:
            raise Refused("there is no such base here; choose one of the list")
        return self.models[label]

    def quickly(self, visitor: Visitor, order: Mapping[str, Any], title: str) -> Any:
        """The result of quick work.

        Raises:
            Refused: it failed.
        """
        job = self.desk.do(Job(order, title, visitor.id))
        if job.state == FAILED:
            raise Refused(told(job))
        return job.result

    def check_room(self, visitor: Visitor) -> None:
        """Checks that a visitor may have one more job on the card.

        Raises:
            Refused: too many wait already.
        """
        if self.card.waiting(visitor.id) >= limits.MAX_WAITING:
            raise Refused(f"{limits.MAX_WAITING} of your jobs wait already; wait for one of them")


def note_end(visitor: Visitor) -> None:
    """Notes that a job of a visitor has ended now, whose files are kept for a while after it."""
    visitor.ended_s = time.monotonic()


def told(job: Job) -> str:
    """The end of a job in one line for the page; "" if it went well. A traceback goes to the server's log."""
    if job.details:
        print(job.details, file=sys.stderr)
    if job.state == STOPPED:
        return "stopped"
    return shown(job.error)
