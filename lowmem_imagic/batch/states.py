"""Training states of a batch's items on disk."""

import logging
import time
from collections.abc import Iterator

from ..errors import EditTooLargeError, OutputUnwritableError
from ..storage.atomic import write_bytes
from ..storage.failpoints import reach
from ..training import state as training_state
from ..training.state import TrainingState
from .executors.executor import Assignment

SAVING_SHARE = 1 / 40
"""Largest share of a run's time for saving training states."""

log = logging.getLogger(__name__)


class States:
    """Training states on disk, each in the folder of its attempt.

    Args:
        every: fewest steps between two states of an edit; 0 saves none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps, self._last, self._took = 0, time.perf_counter(), 0.0
        self._warned = False

    def load(self, assignment: Assignment) -> TrainingState | None:
        """The state of an item; None if there is no usable one."""
        return training_state.saved(assignment.attempt.state, assignment.job)

    def due(self) -> bool:
        """Counts a step; returns whether the states should be saved now."""
        self._steps += 1
        waited = time.perf_counter() - self._last
        return bool(self._every) and self._steps >= self._every and waited * SAVING_SHARE >= self._took

    def save(self, states: Iterator[tuple[Assignment, TrainingState]]) -> None:
        """Saves states of items; skips an item that has a newer attempt, and, with one warning, a state too large."""
        started = time.perf_counter()
        for assignment, state in states:
            try:
                data = training_state.encode(state, assignment.job)
            except EditTooLargeError as error:
                self._warn(error)
                continue
            reach("before-state")
            try:
                write_bytes(assignment.attempt.state, data, overwrite=True)
            except OutputUnwritableError:
                if assignment.attempt.current:
                    raise
            reach("state-saved")
        self._last = time.perf_counter()
        self._steps, self._took = 0, self._last - started

    def _warn(self, error: EditTooLargeError) -> None:
        """Warns once that a state is not saved."""
        if not self._warned:
            log.warning("an edit in training is not saved (%s); if the run is stopped, the edit begins anew", error)
        self._warned = True
