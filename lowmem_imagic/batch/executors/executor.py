"""The interface between a batch and its executors; needs no torch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...errors import LowmemImagicError
from ...settings.stages import EditConfig
from ..attempts import Attempt

if TYPE_CHECKING:
    from ...engine.base import BaseModel
    from ...planning.plan import Plan

Bases = Callable[[str | None], "BaseModel"]
"""Returns the base model of a name; None is the run's own."""
Planner = Callable[["BaseModel", EditConfig, int], tuple[EditConfig, "Plan | None"]]
"""Fits the settings for a number of items into the available memory."""
Claims = Iterator[Sequence["Assignment"]]
"""Claims some more items to make on each `next`."""
OnStep = Callable[[list[int]], None]
"""Called now and then with the steps of each edit in training."""


@dataclass(frozen=True)
class Group:
    """The common base and settings of the items of a pack, as the executor takes them; see also `jobs.pack_id`."""

    model: str | None
    """Name of the base model, None for the run's own."""
    config: EditConfig
    steps: int = 0
    """Training steps of each item, in all stages."""


@dataclass(frozen=True)
class Assignment:
    """An item to make."""

    job: str
    """Hash of the inputs of the result."""
    name: str
    """Name of its folder."""
    photo: Path
    sha256: str
    """Hash of the photo at the start of the run."""
    sentence: str
    attempt: Attempt
    """This run's attempt at it."""
    warnings: tuple[str, ...] = ()
    force: bool = False
    """Whether its folder may be replaced though it has other contents."""


@dataclass(frozen=True)
class Outcome:
    """The result of an item, or its failure."""

    assignment: Assignment
    error: LowmemImagicError | None = None
    seconds: float = 0.0
    """From its first training step to its last file, an interrupted training included."""
    lost: bool = False
    """Whether another run has begun a new attempt meanwhile; that attempt's files were not touched."""


class Executor(Protocol):
    """Makes the items of a group: in this process (`LocalExecutor`), or on other machines (`RayExecutor`)."""

    def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
        """Yields the outcome of each item of `claims` after its files are published.

        Args:
            group: base and settings of the items.
            claims: see `Claims`.
            count: most items that there may be, for the plan.
            on_step: see `OnStep`.

        Raises:
            OutputUnwritableError: results cannot be written, those of other items neither.
            KeyboardInterrupt: a stop was asked for.
        """
