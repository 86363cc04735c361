"""The interface between a batch and its executors."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ...engine.base import BaseModel
from ...errors import LowmemImagicError
from ...planning.plan import Plan
from ...settings.stages import EditConfig
from ..attempts import Attempt

Bases = Callable[[str | None], BaseModel]
"""Gives the base model of a name, None for the run's own."""
Planner = Callable[[BaseModel, EditConfig, int], tuple[EditConfig, Plan | None]]
"""Fits settings for so many items into the memory there is."""
Claims = Iterator[Sequence["Assignment"]]
"""Gives items to make, some at a time, whenever it is asked."""
OnStep = Callable[[list[int]], None]
"""Told now and then the steps that each edit in training has taken."""


@dataclass(frozen=True)
class Group:
    """The base and the settings that items of one pack share."""

    model: str | None
    """Name of the base model, None for the run's own."""
    config: EditConfig

    @property
    def key(self) -> str:
        """A hash of it."""
        return hashlib.sha256(json.dumps([self.model, self.config.to_dict()], sort_keys=True).encode()).hexdigest()

    @property
    def steps(self) -> int:
        """Training steps of each item."""
        return self.config.embed.steps + self.config.finetune.steps


@dataclass(frozen=True)
class Assignment:
    """An item to make."""

    job: str
    """Hash of all that makes the result."""
    name: str
    """Of its folder."""
    photo: Path
    sha256: str
    """Of the photo, as it was when the run began."""
    sentence: str
    attempt: Attempt
    """Where it is made."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """The result of an item, or its failure."""

    assignment: Assignment
    error: LowmemImagicError | None = None
    seconds: float = 0.0
    """From its first training step to its last file, those of an interrupted training included."""
    lost: bool = False
    """Another run has begun an attempt of its own meanwhile; nothing of it was touched."""


class Executor(Protocol):
    """Makes the items of a group: in this process (`LocalExecutor`), or on other machines (`RayExecutor`)."""

    def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
        """Gives the outcome of each item of `claims` when it is finished; its files are in place by then.

        Args:
            group: what the items have in common.
            claims: see `Claims`.
            count: how many items there may be, for the plan.
            on_step: see `OnStep`.

        Raises:
            OutputUnwritableError: results cannot be written; nothing more could be.
            KeyboardInterrupt: the run shall end.
        """
