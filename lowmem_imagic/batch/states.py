"""Training states of a batch's items on disk."""

import time
from collections.abc import Iterator

from ..errors import EditFileError, OutputUnwritableError
from ..storage.atomic import write_bytes
from ..storage.failpoints import reach
from ..storage.regular_files import read_regular
from ..storage.safetensors_reader import MAX_FILE_BYTES
from ..training import state as training_state
from ..training.state import TrainingState
from .executors.executor import Assignment

SAVING_SHARE = 1 / 40
"""Largest share of a run's time for saving training states."""
_MAX_BYTES = 2 * MAX_FILE_BYTES
"""Largest file that is read; valid states are smaller."""


class States:
    """Training states on disk, each in the folder of its attempt.

    Args:
        every: fewest steps between two states of an edit; 0 saves none.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._steps, self._last, self._took = 0, time.perf_counter(), 0.0

    def load(self, assignment: Assignment) -> TrainingState | None:
        """The state of an item; None if there is no usable one."""
        try:
            return training_state.decode(read_regular(assignment.attempt.state, _MAX_BYTES), assignment.job)
        except (OSError, EditFileError):
            return None

    def due(self) -> bool:
        """Counts a step; returns whether the states should be saved now."""
        self._steps += 1
        waited = time.perf_counter() - self._last
        return bool(self._every) and self._steps >= self._every and waited * SAVING_SHARE >= self._took

    def save(self, states: Iterator[tuple[Assignment, TrainingState]]) -> None:
        """Saves states of items; skips an item that has a newer attempt."""
        started = time.perf_counter()
        for assignment, state in states:
            data = training_state.encode(state, assignment.job)
            reach("before-state")
            try:
                write_bytes(assignment.attempt.state, data, overwrite=True)
            except OutputUnwritableError:
                if assignment.attempt.current:
                    raise
            reach("state-saved")
        self._last = time.perf_counter()
        self._steps, self._took = 0, self._last - started
