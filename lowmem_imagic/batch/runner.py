"""One run over a manifest's items: finds the finished ones, assigns the rest to an executor, updates the ledger."""

import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..actions.console import Console, Silent
from ..actions.render import check_sentences
from ..actions.result_folder import ResultFolder
from ..amounts import counted
from ..errors import BackendUnavailableError, ConfigError, LowmemImagicError, OutputExistsError, OutputUnwritableError
from ..pictures import photo_file
from ..settings.stages import EditConfig
from ..storage.atomic import make_folder
from ..storage.writable import unusable
from ..training.pack import stages
from . import outputs
from .attempts import Attempt, Attempts, check_hidden
from .disk import disk_bytes
from .executors.executor import Assignment, Bases, Executor, Group, Outcome
from .failures import (
    AS_BEFORE,
    MAX_TRIES,
    RESUMED,
    RETRIED,
    TRANSIENT,
    failure_of,
    is_of_one_item,
    keep_details,
    kind_of,
)
from .jobs import bad_entry, command_name, job_id, megabytes, pack_id, plain
from .ledger import file as ledgers
from .ledger.file import Entry
from .ledger.ledger import Ledger, at_work
from .manifest import BadItem, Item, Summary
from .paths import HIDDEN, Part, ledgers_in
from .publishing import check_free
from .stopping import Stop

CLAIM = 16
"""Most items claimed at once; their photos are in memory together and are encoded together."""
_WAIT_S = 0.5
_PAUSES = 20
"""Least pause between two reads of the ledger's progress, as a multiple of the time of a read: a ledger with very many
items is read less often."""

Settings = Callable[[Mapping[str, Any]], EditConfig]
"""Returns the settings of an item for its own overrides."""


class Batch:
    """One run over a manifest's items; several runs on one folder share the work.

    Args:
        bases: see `executor.Bases`.
        executor: makes the items.
        items: items to make.
        bad: invalid entries of the manifest; reported as failed.
        out: the parent of the items' folders.
        settings: see `Settings`.
        background: colour under transparent parts of photos.
        attempts: the attempts at the items.
        console: shows progress and failures.
        force: replace folders with other contents.
        stop: ends the run when asked.
        part: the part of the manifest that the items are; each part has its own ledger.
        retry: kinds of failure to try again.
        command: options to store in the ledger, for `batch retry`.
        continues: name of the stored command that this run goes on with; None for a new one.
        made: names of items that this command made before; `force` does not hold for them.
        on_made: called with the name of each item that this run made.

    **Memory**: `CLAIM` photos and the photos in training, for any number of items.
    """

    def __init__(
        self,
        bases: Bases,
        executor: Executor,
        items: Sequence[Item],
        bad: Sequence[BadItem],
        out: Path,
        *,
        settings: Settings,
        background: str,
        attempts: Attempts,
        console: Console,
        force: bool,
        stop: Stop,
        part: Part = Part(),  # noqa: B008  a plain value
        retry: Sequence[str] = RETRIED,
        command: Mapping[str, Any] | None = None,
        continues: str | None = None,
        made: Collection[str] = (),
        on_made: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._bases, self._executor, self._items, self._bad, self._out = bases, executor, items, bad, out
        self._settings, self._background, self._attempts = settings, background, attempts
        self._console, self._force, self._stop = console, force, stop
        self._part, self._retry, self._command = part, retry, dict(command or {})
        self._command_name = continues or command_name(self._command)
        self._made, self._on_made = made, on_made
        self.summary = Summary(len(items) + len(bad))
        self._groups: dict[str, tuple[Group, list[str]]] = {}
        """Base and settings of each pack, and its jobs, by `pack_id`."""
        self._known_groups: dict[str, tuple[str, Group]] = {}
        self._assignments: dict[str, Callable[[Attempt], Assignment]] = {}
        self._places: dict[str, str] = {}
        self._pixels: dict[str, int] = {}
        self._claimed: dict[str, Assignment] = {}
        self._tries = Counter[str]()
        self._failed_jobs: set[str] = set()
        self._unfinished: set[str] = set()
        """Jobs that were to be made at the start of the run."""
        self._total_steps = self._steps = self._in_training = self._slots = 0
        self._began = self._looked = time.perf_counter()
        self._look_s = 0.0
        self._resumed: int | None = None
        self._ended_steps, self._counts = 0, dict[str, int]()

    def run(self) -> Summary:
        """Makes the unfinished items; reports and skips items that fail.

        Raises:
            OutputUnwritableError: results cannot be written, those of other items neither.
            KeyboardInterrupt: `stop` was asked for; training states are saved first.
        """
        for one in self._bad:
            self._fail(one)
        entries = [*map(self._entry, self._items), *map(bad_entry, self._bad)]
        hidden = self._part.ledger(self._out).parent
        check_hidden(hidden)
        try:
            make_folder(hidden)
        except OSError as error:
            raise unusable(hidden, error) from error
        with Ledger(self._part.ledger(self._out), warn=self._console.warn) as ledger:
            self._check_other_parts()
            ledger.note(self._command_name, self._command)
            ledger.register(
                entries,
                finished=self._is_finished,
                retry=self._retry,
                command=self._command_name,
                states=self._attempts.jobs(),
            )
            self._take_stock(ledger)
            try:
                self._make_all(ledger)
            finally:
                self._console.close()
                # If an error is being raised, an unwritable ledger must not replace it.
                with contextlib.suppress(OutputUnwritableError) if sys.exc_info()[0] else contextlib.nullcontext():
                    ledger.release(list(self._claimed))
                    self._keep_states(ledger)
                    self._take_others(ledger)
        return self.summary

    # Before anything is made

    def _check_other_parts(self) -> None:
        """Checks that no other run makes the same items with another ledger.

        Raises:
            ConfigError: another run does.
        """
        for part, path in ledgers_in(self._out).items():
            if part != self._part and part.shares_items(self._part) and (runner := at_work(path)) is not None:
                raise ConfigError(
                    f"{part} is being run into {self._out} by process {runner.owner.pid} on {runner.owner.host}, and "
                    f"has items of {self._part}; run the same beside it, or wait for its end"
                )

    def _entry(self, item: Item) -> Entry:
        """The ledger's entry for an item."""
        self._stop.check()
        try:
            pack, group = self._group(item)
            base = self._bases(group.model)
            silent = Silent()
            check_sentences(base, [item.sentence], group.config.sample, silent)
            file = photo_file(item.photo)
            job = job_id(item.name, file.sha256, item.sentence, group.config, base, self._background)
            state = self._look(item, job)
        except Exception as error:
            if isinstance(error, OutputUnwritableError) and not is_of_one_item(error, self._out):
                raise
            failure = failure_of(error)
            bad = BadItem(item.where, item.name, str(failure), item.position)
            self._keep_details(failure, item.name)
            self._fail(bad)
            return bad_entry(bad, kind_of(failure))
        fixed = (job, item.name, item.photo, file.sha256, item.sentence)
        self._assignments[job] = lambda attempt: Assignment(*fixed, attempt, tuple(silent.warnings), self._forces(item))
        self._groups.setdefault(pack, (group, []))[1].append(job)
        self._places[job], self._pixels[job] = item.where, file.pixels
        return Entry(job, item.position, plain(item.where), item.name, pack, group.steps, state)

    def _group(self, item: Item) -> tuple[str, Group]:
        """The `pack_id` of an item, and its base and settings; the same for items with equal settings of their own."""
        words = json.dumps(dict(item.settings), sort_keys=True)
        if words not in self._known_groups:
            own = dict(item.settings)
            model, config = own.pop("model", None), self._settings(own)
            base = self._bases(model)
            steps = sum(stage.config.steps for stage in stages(config.for_group(base.family.group), base.denoisers))
            self._known_groups[words] = pack_id(config, base), Group(model, config, steps)
        return self._known_groups[words]

    def _look(self, item: Item, job: str) -> str:
        """The state of an item: `WAITING` or `DONE`.

        Raises:
            OutputExistsError: its folder has other contents, or is a link.
        """
        folder = self._out / item.name
        if outputs.item_state(folder, job) == outputs.FINISHED:
            return ledgers.DONE
        check_free(folder, job, force=self._forces(item))
        ResultFolder.prepare(folder, overwrite=True)
        return ledgers.WAITING

    def _forces(self, item: Item) -> bool:
        """Whether the item may replace other contents of its folder."""
        return self._force and item.name not in self._made

    def _is_finished(self, entry: Entry) -> bool:
        return outputs.item_state(self._out / entry.name, entry.job) == outputs.FINISHED

    def _take_stock(self, ledger: Ledger) -> None:
        """Reports the number of items to make and their size on disk."""
        known = ledger.entries()
        for entry in known:
            if entry.state == ledgers.DONE:
                self.summary.before.append(entry.name)
            elif entry.state == ledgers.FAILED and entry.job in self._assignments:
                self._failed_jobs.add(entry.job)
                self._fail(BadItem(entry.place, entry.name, f"{entry.error}{AS_BEFORE}"))
        waiting = [entry for entry in known if entry.state in (ledgers.WAITING, ledgers.RUNNING)]
        self._keep_states(ledger)
        self._total_steps = sum(entry.steps for entry in known)
        self._refresh(ledger)
        if not waiting:
            return
        self._unfinished = {entry.job for entry in waiting}
        sizes = [
            disk_bytes(
                self._bases(group.model),
                group.config,
                [self._pixels[job] for job in self._unfinished.intersection(jobs)],
            )
            for group, jobs in self._groups.values()
        ]
        free, size = shutil.disk_usage(self._out).free, sum(results for results, _ in sizes)
        size += (states := max((saved for _, saved in sizes), default=0))
        remark = (
            f"{counted(len(waiting), 'item')} to make: up to {megabytes(size)} on disk, {megabytes(states)} of them "
            f"while training, {megabytes(free)} free"
        )
        self._console.say(remark)
        if size > free:
            self._console.warn(f"{remark}; the run stops when the disk is full; run it again when there is room")

    def _keep_states(self, ledger: Ledger) -> None:
        """Removes the training states of items that are finished, or that failed because of their training."""
        self._attempts.keep(lambda: ledger.unfinished(RESUMED))

    # Making

    def _make_all(self, ledger: Ledger) -> None:
        """Makes items until none is left, including items of other runners that ended."""
        while True:
            worked = False
            for pack in self._groups:
                self._stop.check()
                worked |= self._work(ledger, pack)
            self._read_progress(ledger)
            left = self._counts[ledgers.WAITING] + self._counts[ledgers.RUNNING]
            # The last item may have been shown before it was counted; a run without work shows nothing.
            if left or self._steps:
                self._show()
            if not left:
                return
            if not worked:
                # Other runs have the rest, or there is a rest that none may claim at the moment.
                self._stop.check()
                time.sleep(_WAIT_S)
                ledger.take_over()

    def _work(self, ledger: Ledger, pack: str) -> bool:
        """Makes the waiting items of a pack; returns whether there were any."""
        first = self._claim(ledger, pack)
        if not first:
            return False
        group, jobs = self._groups[pack]

        def claims() -> Iterator[list[Assignment]]:
            claimed = first
            while claimed:
                yield claimed
                # If a stop was asked for, the executor saves the training states before its next step.
                claimed = [] if self._stop.asked else self._claim(ledger, pack)

        outcomes = self._executor.make(
            group,
            claims(),
            max(len(first), len(self._unfinished.intersection(jobs))),
            on_step=lambda steps: self._step(ledger, steps),
        )
        for outcome in self._outcomes(outcomes, ledger, pack):
            self._book(ledger, outcome)
            self._steps += group.steps
            # From now on the item's steps count as ended.
            self._in_training, self._slots = max(0, self._in_training - group.steps), max(0, self._slots - 1)
            self._refresh(ledger)
            self._show()
        self._in_training = self._slots = 0
        # Release items without an outcome, or the run would wait for them forever.
        ledger.release(list(self._claimed))
        self._claimed.clear()
        return True

    def _outcomes(self, outcomes: Iterator[Outcome], ledger: Ledger, pack: str) -> Iterator[Outcome]:
        """The outcomes of a pack; if the pack as a whole fails (a damaged model), every item fails with its error."""
        try:
            yield from outcomes
            return
        except (OutputUnwritableError, BackendUnavailableError):
            # Affects all packs.
            raise
        except Exception as error:
            failure = failure_of(error)
        while assignments := list(self._claimed.values()) or self._claim(ledger, pack):
            for assignment in assignments:
                yield Outcome(assignment, failure)

    def _claim(self, ledger: Ledger, pack: str) -> list[Assignment]:
        """Claims items to make; skips items that were tried before and are finished by now, and those whose folder was
        taken since the start."""
        begun: list[Assignment] = []

        def begin(entry: Entry) -> None:
            begun.append(self._assignments[entry.job](self._attempts.begin(entry.job)))

        entries = ledger.claim(pack, CLAIM, without=self._claimed, begin=begin)
        self._claimed |= {assignment.job: assignment for assignment in begun}
        for entry, assignment in zip(entries, list(begun), strict=True):
            # Another run may have published the item and ended before it updated the ledger.
            if entry.attempts and self._is_finished(entry):
                begun.remove(assignment)
                self._end(ledger, assignment, entry.seconds or 0.0)
                self.summary.before.append(entry.name)
                continue
            try:
                # Before any work on it; it is checked again when its files are published.
                check_free(self._out / entry.name, entry.job, force=assignment.force)
            except OutputExistsError as error:
                begun.remove(assignment)
                self._book(ledger, Outcome(assignment, error))
        self._refresh(ledger)
        if begun:
            # Show progress now: reading and encoding the photos comes before the first step.
            self._show()
        return begun if begun or not entries else self._claim(ledger, pack)

    def _end(self, ledger: Ledger, assignment: Assignment, seconds: float) -> None:
        """Records that an item is finished."""
        self._claimed.pop(assignment.job, None)
        ledger.finish(assignment.job, seconds)
        self._attempts.remove(assignment.attempt)

    def _book(self, ledger: Ledger, outcome: Outcome) -> None:
        """Records the outcome of an item."""
        assignment, error = outcome.assignment, outcome.error
        if outcome.lost or (error is not None and not assignment.attempt.current):
            self._lose(ledger, assignment, error)
            return
        if error is None:
            # First, in case the process is killed: the item's files are published.
            self._on_made(assignment.name)
            self._end(ledger, assignment, outcome.seconds)
            self.summary.done.append(assignment.name)
            self._console.say(f"{assignment.name}: done")
            return
        self._keep_details(error, assignment.name)
        self._claimed.pop(assignment.job, None)
        kind = kind_of(error)
        self._tries[assignment.job] += 1
        again = kind == TRANSIENT and self._tries[assignment.job] < MAX_TRIES
        ledger.fail(assignment.job, kind, plain(str(error)), again=again)
        if again:
            self._console.say(f"{assignment.name}: {error}; tried again later", always=True)
        else:
            self._attempts.leave(assignment.attempt)
            self._failed_jobs.add(assignment.job)
            self._fail(BadItem(self._places[assignment.job], assignment.name, str(error)))

    def _lose(self, ledger: Ledger, assignment: Assignment, error: LowmemImagicError | None) -> None:
        """Leaves an item to the run that took it over; without such a run, the item waits again."""
        self._claimed.pop(assignment.job, None)
        kept = str(error).partition("the finished edit was kept as ")[2]
        rest = f"; its own edit was kept as {kept}" if kept else ""
        if not ledger.release([assignment.job], tried=True):
            self._console.warn(f"{assignment.name}: another run took it over while this one was silent{rest}")
            return
        self._tries[assignment.job] += 1
        gone = f"its folder in {HIDDEN} has gone{rest}"
        if self._tries[assignment.job] < MAX_TRIES:
            self._console.warn(f"{assignment.name}: {gone}; tried again later")
            return
        ledger.fail(assignment.job, TRANSIENT, plain(gone))
        self._failed_jobs.add(assignment.job)
        self._fail(BadItem(self._places[assignment.job], assignment.name, gone))

    def _take_others(self, ledger: Ledger) -> None:
        """Adds the items that other runners finished or failed at to the summary."""
        mine = {*self.summary.done, *self.summary.before, *self._failed_jobs}
        for entry in ledger.entries():
            if entry.name in mine or entry.job in mine or entry.job not in self._assignments:
                continue
            if entry.state == ledgers.DONE:
                self.summary.before.append(entry.name)
            elif entry.state == ledgers.FAILED:
                self._fail(BadItem(entry.place, entry.name, str(entry.error)))

    def _fail(self, bad: BadItem) -> None:
        self.summary.failed.append(bad)
        self._console.warn(f"{bad.where}{f' ({bad.name})' if bad.name else ''}: {bad.reason}")

    def _keep_details(self, error: LowmemImagicError, name: str) -> None:
        """Saves the traceback of an unexpected error."""
        path = self._part.ledger(self._out).with_name("errors.log")
        if kept := keep_details(error, name, path):
            self._console.say(f"{name}: {kept}", always=True)

    # Showing

    def _step(self, ledger: Ledger, steps: list[int]) -> None:
        """Reports progress; called now and then with the steps of each edit in training."""
        self._in_training, self._slots = sum(steps), len(steps)
        if self._resumed is None and steps:
            # Steps from saved states took no time in this run.
            self._resumed = self._in_training
            self._console.skip(self._resumed)
        if time.perf_counter() - self._looked > 1:
            self._refresh(ledger)
        own = self._steps - (self._resumed or 0)
        ledger.report(own, time.perf_counter() - self._began, self._in_training, self._slots)
        self._show()

    def _refresh(self, ledger: Ledger) -> None:
        """Reads the progress of all runs from the ledger, unless that was a moment ago."""
        if not self._counts or time.perf_counter() - self._looked > _PAUSES * self._look_s:
            self._read_progress(ledger)

    def _read_progress(self, ledger: Ledger) -> None:
        started = time.perf_counter()
        self._counts, self._ended_steps = ledger.counts(), ledger.steps_ended()
        self._looked = time.perf_counter()
        self._look_s = self._looked - started

    def _show(self) -> None:
        counts, claimed = self._counts, len(self._claimed)
        parts = {
            "done": counts[ledgers.DONE],
            "in slots": self._slots,
            "with other runs": max(0, counts[ledgers.RUNNING] - claimed),
            "waiting": counts[ledgers.WAITING] + max(0, claimed - self._slots),
            "failed": counts[ledgers.FAILED],
        }
        always = ("done", "in slots", "waiting")
        remark = ", ".join(f"{count} {name}" for name, count in parts.items() if count or name in always)
        step = min(self._ended_steps + self._in_training, self._total_steps)
        self._console.progress("train", step, self._total_steps, remark)
