"""How long other runners have been silent, on the clock of the one that watches, while it was awake itself."""

import threading
import time
from collections.abc import Iterable

from .file import Runner


class Watch:
    """Sees whether hearts beat.

    Between two looks no more than `most_s` counts as silence: where more has passed, this process or the whole machine
    was asleep, and the others may have been, too. So nobody is given up because a lid was closed.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}

    def look(self, runners: Iterable[Runner]) -> None:
        """Takes note of the beats of all runners that there are."""
        with self._lock:
            now = time.monotonic()
            passed = 0.0 if self._looked is None else min(now - self._looked, self._most_s)
            self._looked = now
            before, self._seen = self._seen, {}
            for runner in runners:
                beat, silent_s = before.get(runner.id, (None, 0.0))
                self._seen[runner.id] = (runner.beat, silent_s + passed if runner.beat == beat else 0.0)

    def silent_s(self, runner: Runner) -> float:
        """How long a runner has been seen to be silent."""
        with self._lock:
            return self._seen.get(runner.id, (0, 0.0))[1]
