"""Makes items in this process, in refilling packs; does not use the ledger."""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

from ...actions.console import Silent
from ...actions.edit import finished_edit
from ...edits.edit import Edit
from ...engine.base import BaseModel
from ...engine.memory import Meter
from ...errors import ImageError, LowmemImagicError, MemoryLimitError, OutputUnwritableError
from ...pictures import Photo, load_photo
from ...pipeline.make import stream_edits
from ...pipeline.prepare import Job
from ...planning.plan import CPU_SLOTS, Budget, Plan, planned
from ...settings.stages import ONE_AT_A_TIME, EditConfig
from ...training.pack import Pack
from .. import publishing
from ..failures import failure_of, is_of_group, is_of_one_item
from ..outputs import training_seconds
from ..states import States
from ..stopping import Stop
from .executor import Assignment, Bases, Claims, Group, OnStep, Outcome, Planner


class LocalExecutor:
    """Makes items in this process.

    Args:
        bases: see `Bases`.
        fit: see `Planner`.
        out: the parent of the items' folders.
        background: colour under transparent parts of photos.
        states: saves and loads training states.
        stop: ends the run when asked; states are saved first.
        slots: most edits in training at once; None leaves it to the plan.
        budget: the memory that `fit` plans for.
    """

    def __init__(
        self,
        bases: Bases,
        fit: Planner,
        out: Path,
        *,
        background: str,
        states: States,
        stop: Stop,
        slots: int | None = None,
        budget: Budget | None = None,
    ) -> None:
        self._bases, self._fit, self._out, self._background = bases, fit, out, background
        self._states, self._stop, self._slots, self._budget = states, stop, slots, budget
        self._base: BaseModel | None = None

    def make(
        self,
        group: Group,
        claims: Claims,
        count: int,
        *,
        on_step: OnStep = lambda steps: None,
    ) -> Iterator[Outcome]:
        """See `Executor`.

        If a training step does not fit in memory, fewer edits train at once; if a single edit does not fit, all
        remaining items fail. If a pack fails for another reason, each of its edits is tried once more alone, so that
        only the faulty one fails.
        """
        return self._make(group, claims, count, on_step)

    def _make(
        self,
        group: Group,
        claims: Claims,
        count: int,
        on_step: OnStep,
        *,
        alone: bool = False,
    ) -> Iterator[Outcome]:
        """See `make`; with `alone`, the single item fails if its pack fails."""
        base = self._bases(group.model)
        if self._base is not None and self._base is not base:
            self._base.release()
        self._base = base
        slots, unmade, rungs = None, list[Assignment](), len(base.fallbacks)
        while True:
            pack = _Pack(base, self._out, self._background, self._states, self._stop, on_step, rungs)
            try:
                config, plan = self._fit(base, group.config, min(count, self._slots or count))
                most = min(self._slots or count, count, CPU_SLOTS if plan is None else plan.slots)
                slots = 1 if base.weights in ONE_AT_A_TIME else min(slots or most, most)
                with planned(base, plan, self._budget):
                    yield from pack.make(chain([unmade], claims), config, plan, slots)
                return
            except Exception as error:
                failure = failure_of(error)
                if is_of_group(failure):
                    raise
            # After the except block: the error kept the failed pack's tensors alive.
            yield from pack.unreadable()
            unmade = (pack.unmade if pack.began else unmade) or list(next(claims, ()))
            del pack
            if not isinstance(failure, MemoryLimitError):
                for assignment in unmade:
                    if alone:
                        yield Outcome(assignment, failure)
                    else:
                        yield from self._make(group, iter([[assignment]]), 1, on_step, alone=True)
                if not unmade:
                    return
                unmade = []
            elif slots is None or slots == 1:
                for assignment in chain(unmade, *claims):
                    yield Outcome(assignment, failure)
                return
            else:
                slots //= 2
                base.fall_back(f"{slots} edits side by side")


class _Pack:
    """One refilling pack; each finished edit becomes a folder like that of ``edit``."""

    def __init__(
        self,
        base: BaseModel,
        out: Path,
        background: str,
        states: States,
        stop: Stop,
        on_step: OnStep,
        rungs: int,
    ) -> None:
        self._base, self._out, self._background, self._rungs = base, out, background, rungs
        self._states, self._stop, self._on_step = states, stop, on_step
        self._unfinished: dict[int, tuple[Assignment, Photo]] = {}
        self._unreadable: list[Outcome] = []
        self.began = False
        """Whether any items were claimed."""
        # A weak reference: the pack's memory must be freed when its run ends.
        self._pack: Callable[[], Pack | None] = lambda: None

    @property
    def unmade(self) -> list[Assignment]:
        """Claimed items without an outcome."""
        return [assignment for assignment, _ in self._unfinished.values()]

    def make(self, claims: Claims, config: EditConfig, plan: Plan | None, slots: int) -> Iterator[Outcome]:
        """Makes the items of `claims`; yields their outcomes."""
        groups = stream_edits(
            self._base,
            self._jobs(claims),
            config,
            slots=slots,
            max_rows=None if plan is None else plan.rows,
            preparing=lambda stage, step, steps, remark: self._preparing(),
            between=self._between,
        )
        for group in groups:
            yield from self.unreadable()
            for number, result in group:
                assignment, photo = self._unfinished.pop(number)
                yield self._finish(assignment, photo, result, config, plan)
            # If other edits are in training, the next step saves their states before it stops.
            if not self._unfinished:
                self._stop.check()
        yield from self.unreadable()

    def _jobs(self, claims: Claims) -> Iterator[list[Job]]:
        """Yields the claimed items as jobs; reads their photos."""
        number = 0
        for claimed in claims:
            self.began = True
            jobs = []
            for assignment in claimed:
                try:
                    photo = load_photo(assignment.photo, background=self._background)
                    if photo.sha256 != assignment.sha256:
                        raise ImageError(f"{assignment.photo} has changed since the run began; run the command again")
                except Exception as error:
                    self._unreadable.append(Outcome(assignment, failure_of(error)))
                    continue
                self._unfinished[number] = (assignment, photo)
                number += 1
                jobs.append(Job(photo, assignment.sentence, self._states.load(assignment)))
            yield jobs

    def unreadable(self) -> Iterator[Outcome]:
        """Yields the outcomes of items with unreadable photos."""
        while self._unreadable:
            yield self._unreadable.pop(0)

    def _preparing(self) -> None:
        """Called now and then before an item's training."""
        in_slots = pack.in_slots if (pack := self._pack()) is not None else []
        self._on_step(in_slots)
        # If other edits are in training, the next step saves their states before it stops.
        if not in_slots:
            self._stop.check()

    def _between(self, pack: Pack) -> None:
        """Called before every step."""
        self._pack = weakref.ref(pack)
        self._on_step(pack.in_slots)
        if self._stop.asked or self._states.due():
            self._states.save((self._unfinished[number][0], state) for number, state in pack.states())
        self._stop.check()

    def _finish(
        self,
        assignment: Assignment,
        photo: Photo,
        result: Edit | LowmemImagicError,
        config: EditConfig,
        plan: Plan | None,
    ) -> Outcome:
        """Writes and renders an edit; an error fails this item alone, unless no results can be written at all."""
        if isinstance(result, LowmemImagicError):
            return Outcome(assignment, result)
        attempt, folder = assignment.attempt, self._out / assignment.name
        job, force = assignment.job, assignment.force
        if not attempt.current:
            return Outcome(assignment, lost=True)
        # Include the fallbacks of earlier packs that ran out of memory.
        edit = replace(result, measured={**result.measured, "rungs": self._base.fallbacks[self._rungs :]})
        started, name = time.perf_counter(), f"{assignment.name}.safetensors"
        meter = Meter(self._base.device)
        meter.stages |= edit.measured["stages"]
        results = publishing.staged(attempt)
        try:
            try:
                quiet = Silent(assignment.warnings)
                report = finished_edit(self._base, results, name, edit, photo, config, plan, meter, quiet)
            except Exception as error:
                if isinstance(error, OutputUnwritableError) or name not in results.files:
                    raise
                if not publishing.publish(attempt, results, folder, job, None, force=force):
                    return Outcome(assignment, lost=True)
                return Outcome(assignment, failure_of(error, f"the edit itself is finished: {folder / name}"))
            render_s = round(time.perf_counter() - started, 3)
            report |= {"rungs": edit.measured["rungs"], "seconds": {"render": render_s}}
            report |= {"job": job, "finished": True, "sha256": results.digests()}
            if not publishing.publish(attempt, results, folder, job, report, force=force):
                return Outcome(assignment, lost=True)
        except OutputUnwritableError as error:
            if not attempt.current:
                return Outcome(assignment, error, lost=True)
            if not is_of_one_item(error, self._out):
                raise
            return Outcome(assignment, error)
        except Exception as error:
            return Outcome(assignment, failure_of(error))
        train_s = training_seconds(edit.measured["stages"])
        return Outcome(assignment, seconds=train_s + render_s)
