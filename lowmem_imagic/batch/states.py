"""Training states of a batch's items on disk."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from .. import training_state
from ..atomic import remove_temporaries, write_bytes
from ..errors import EditFileError
from ..failpoints import reach
from ..training_state import TrainingState
from ..writable import unusable

SAVING_SHARE = 1 / 40
"""Most of a run's time that goes into saving training states."""


class States:
    """Training states on disk, one folder for each item so that what a killed writer left is known to be its own.

    Args:
        folder: where they are.
        every: steps between two states of an edit at least; 0 keeps none.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self._folder, self._every = folder, every
        self._steps, self._last, self._took = 0, time.perf_counter(), 0.0

    def load(self, job: str) -> TrainingState | None:
        """The state of an item; None where there is none that can be used."""
        try:
            return training_state.decode(self._file(job).read_bytes(), job)
        except (OSError, EditFileError):
            return None

    def due(self) -> bool:
        """Counts a step; whether the states should be saved now."""
        self._steps += 1
        waited = time.perf_counter() - self._last
        return bool(self._every) and self._steps >= self._every and waited * SAVING_SHARE >= self._took

    def save(self, states: Iterator[tuple[str, TrainingState]]) -> None:
        """Saves states of items by their jobs."""
        started = time.perf_counter()
        for job, state in states:
            file = self._file(job)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise unusable(file.parent, error) from error
            write_bytes(file, training_state.encode(state, job), overwrite=True)
            reach("state-saved")
        self._last = time.perf_counter()
        self._steps, self._took = 0, self._last - started

    def remove(self, job: str) -> None:
        """Removes an item's state and whatever was left beside it."""
        file = self._file(job)
        with contextlib.suppress(OSError):
            remove_temporaries(file.parent)
            file.unlink(missing_ok=True)
            file.parent.rmdir()

    def keep(self, wanted: Callable[[], Sequence[str]]) -> None:
        """Removes the states of all items but those wanted."""
        with contextlib.suppress(OSError):
            # Listed first: what another run takes and saves in between is then not in the list.
            found = [path.name for path in self._folder.iterdir()]
            kept = set(wanted())
            for job in found:
                if job not in kept:
                    self.remove(job)
            self._folder.rmdir()  # where it is empty

    def _file(self, job: str) -> Path:
        return self._folder / os.path.basename(job) / "state"
