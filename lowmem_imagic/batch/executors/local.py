"""Makes items in this process, in refilling packs; knows nothing of the ledger."""

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
from ...settings.stages import EditConfig
from ...training.pack import Pack
from .. import publishing
from ..failures import failure_of, is_of_group, is_of_one_item
from ..states import States
from ..stopping import Stop
from .executor import Assignment, Bases, Claims, Group, OnStep, Outcome, Planner


class LocalExecutor:
    """Makes items in this process.

    Args:
        bases: see `Bases`.
        fit: see `Planner`.
        out: the folder that gets a folder for each item.
        background: colour under transparent parts of photos.
        states: where training states are kept.
        stop: asks for an end; states are saved first.
        slots: most edits that train side by side; None leaves it to the plan.
        suggest: name the eta that the base model itself would take.
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
        suggest: bool = False,
        budget: Budget | None = None,
    ) -> None:
        self._bases, self._fit, self._out, self._background = bases, fit, out, background
        self._states, self._stop, self._slots, self._suggest, self._budget = states, stop, slots, suggest, budget
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

        Where not one training step fits in memory, fewer edits train side by side; where one alone does not fit, all
        that are left fail. Where a pack breaks off for another reason, each of its edits is tried once more by itself,
        so that only the one at fault fails.
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
        """See `make`; `alone`, the one item fails where its pack breaks off."""
        base = self._bases(group.model)
        if self._base is not None and self._base is not base:
            self._base.release()
        self._base = base
        slots, unmade, rungs = None, list[Assignment](), len(base.fallbacks)
        while True:
            pack = _Pack(base, self._out, self._background, self._states, self._stop, on_step, rungs, self._suggest)
            try:
                config, plan = self._fit(base, group.config, min(count, self._slots or count))
                most = min(self._slots or count, count, CPU_SLOTS if plan is None else plan.slots)
                slots = min(slots or most, most)
                with planned(base, plan, self._budget):
                    yield from pack.make(chain([unmade], claims), config, plan, slots)
                return
            except Exception as error:
                failure = failure_of(error)
                if is_of_group(failure):
                    raise
            # Here, where the error and with it what the attempt held is gone.
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
    """One refilling pack; every finished edit is a folder as ``edit`` writes it."""

    def __init__(
        self,
        base: BaseModel,
        out: Path,
        background: str,
        states: States,
        stop: Stop,
        on_step: OnStep,
        rungs: int,
        suggest: bool,
    ) -> None:
        self._base, self._out, self._background, self._rungs = base, out, background, rungs
        self._states, self._stop, self._on_step, self._suggest = states, stop, on_step, suggest
        self._held: dict[int, tuple[Assignment, Photo]] = {}
        self._fallen: list[Outcome] = []
        self.began = False
        """Whether any items were taken."""
        # Not held: what it trains in is to be free when its run ends.
        self._pack: Callable[[], Pack | None] = lambda: None

    @property
    def unmade(self) -> list[Assignment]:
        """Items that were taken and have not come out."""
        return [assignment for assignment, _ in self._held.values()]

    def make(self, claims: Claims, config: EditConfig, plan: Plan | None, slots: int) -> Iterator[Outcome]:
        """Makes what there is to claim."""
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
            for number, made in group:
                assignment, photo = self._held.pop(number)
                yield self._finish(assignment, photo, made, config, plan)
            # With others still in training the next step saves them first.
            if not self._held:
                self._stop.check()
        yield from self.unreadable()

    def _jobs(self, claims: Claims) -> Iterator[list[Job]]:
        """The claimed items as jobs; their photos are read now."""
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
                    self._fallen.append(Outcome(assignment, failure_of(error)))
                    continue
                self._held[number] = (assignment, photo)
                number += 1
                jobs.append(Job(photo, assignment.sentence, self._states.load(assignment)))
            yield jobs

    def unreadable(self) -> Iterator[Outcome]:
        """Items whose photos could not be read."""
        while self._fallen:
            yield self._fallen.pop(0)

    def _preparing(self) -> None:
        """Now and then before an item's training."""
        in_slots = pack.in_slots if (pack := self._pack()) is not None else []
        self._on_step(in_slots)
        # While others train, the next step saves them first.
        if not in_slots:
            self._stop.check()

    def _between(self, pack: Pack) -> None:
        """Before every step."""
        self._pack = weakref.ref(pack)
        self._on_step(pack.in_slots)
        if self._stop.asked or self._states.due():
            self._states.save((self._held[number][0], state) for number, state in pack.states())
        self._stop.check()

    def _finish(
        self,
        assignment: Assignment,
        photo: Photo,
        made: Edit | LowmemImagicError,
        config: EditConfig,
        plan: Plan | None,
    ) -> Outcome:
        """Writes and renders an edit; what goes wrong with it is its own matter, unless nothing can be written."""
        if isinstance(made, LowmemImagicError):
            return Outcome(assignment, made)
        attempt, folder = assignment.attempt, self._out / assignment.name
        if not attempt.current:
            return Outcome(assignment, lost=True)
        # With the fallbacks of packs that were given up.
        made = replace(made, measured={**made.measured, "rungs": self._base.fallbacks[self._rungs :]})
        started, name = time.perf_counter(), f"{assignment.name}.safetensors"
        meter = Meter(self._base.device)
        meter.stages |= made.measured["stages"]
        results = publishing.staged(attempt)
        try:
            try:
                quiet = Silent(assignment.warnings)
                report = finished_edit(
                    self._base, results, name, made, photo, config, plan, meter, quiet, suggest=self._suggest
                )
            except Exception as error:
                if isinstance(error, OutputUnwritableError) or name not in results.files:
                    raise
                if not publishing.publish(attempt, results, folder, assignment.job, None):
                    return Outcome(assignment, lost=True)
                return Outcome(assignment, failure_of(error, f"the edit itself is finished: {folder / name}"))
            render_s = round(time.perf_counter() - started, 3)
            report |= {"rungs": made.measured["rungs"], "seconds": {"render": render_s}}
            report |= {"job": assignment.job, "finished": True, "sha256": results.digests()}
            if not publishing.publish(attempt, results, folder, assignment.job, report):
                return Outcome(assignment, lost=True)
        except OutputUnwritableError as error:
            if not attempt.current:
                return Outcome(assignment, error, lost=True)
            if not is_of_one_item(error, self._out):
                raise
            return Outcome(assignment, error)
        except Exception as error:
            return Outcome(assignment, failure_of(error))
        trained = (made.measured["stages"].get(stage, {}).get("seconds") or 0.0 for stage in ("embed", "finetune"))
        return Outcome(assignment, seconds=sum(trained) + render_s)
