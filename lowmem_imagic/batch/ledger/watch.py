"""Measures the silence of other runners on this process's clock, without time in which this process was suspended."""

import threading
import time
from collections.abc import Iterable

from .file import Runner


class Watch:
    """Watches the heartbeats of runners.

    Between two looks at most `most_s` counts as silence: if more time passed, this process or the whole machine was
    suspended, and perhaps the other runners too. So closing a laptop's lid makes no runner count as dead.
    """

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._lock = threading.Lock()
        self._looked: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}

    def look(self, runners: Iterable[Runner]) -> None:
        """Records the heartbeats of all runners."""
        with self._lock:
            now = time.monotonic()
            passed = 0.0 if self._looked is None else min(now - self._looked, self._most_s)
            self._looked = now
            before, self._seen = self._seen, {}
            for runner in runners:
                beat, silent_s = before.get(runner.id, (None, 0.0))
                self._seen[runner.id] = (runner.beat, silent_s + passed if runner.beat == beat else 0.0)

    def silent_s(self, runner: Runner) -> float:
        """Seconds since the last new heartbeat of a runner, as seen here."""
        with self._lock:
            return self._seen.get(runner.id, (0, 0.0))[1]
