"""Runs the items of a manifest in refilling packs; every finished one is a folder as ``edit`` writes it.

A folder whose report names its job is finished, and is left alone when the same command is run again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base_model import BaseModel
from ..commands import finished_edit
from ..config import EditConfig
from ..console import Console
from ..edit import Edit
from ..errors import LowmemImagicError, MemoryLimitError, OutputExistsError
from ..images import Photo, load_photo
from ..memory import Meter
from ..pipeline import Job, check_sentence, stream_edits
from ..planning import CPU_SLOTS, Plan
from ..rendering import check_sentences
from ..result_folder import REPORT, ResultFolder
from .manifest import BadItem, Item

CHUNK = 64
"""Photos that are read and encoded together: what a run of thousands holds of them."""

Settings = Callable[[Mapping[str, Any]], EditConfig]
"""Gives the settings of an item from those it has of its own."""
Planner = Callable[[EditConfig, int], tuple[EditConfig, Plan | None]]
"""Fits settings for so many jobs into the memory there is."""


@dataclass
class Tally:
    """How far a batch is."""

    total: int
    done: list[str] = field(default_factory=list)
    """Names of the items made by this run."""
    before: list[str] = field(default_factory=list)
    """Names of those that were there already."""
    failed: list[BadItem] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Items that are still to be made."""
        return self.total - len(self.done) - len(self.before) - len(self.failed)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "total": self.total,
            "done": self.done,
            "done_before": self.before,
            "failed": [{"where": bad.where, "name": bad.name, "reason": bad.reason} for bad in self.failed],
            "left": self.left,
        }


@dataclass(frozen=True)
class _Ready:
    """An item whose photo and settings are known to be good."""

    item: Item
    photo: Photo
    config: EditConfig
    job: str
    """Hash of all that makes the result."""


class _Silent(Console):
    """Collects warnings for an item's report and shows nothing: the batch has a display of its own."""

    def __init__(self) -> None:
        super().__init__(quiet=True)

    def _print(self, text: str) -> None:
        pass


class Batch:
    """One run over a manifest's items.

    Args:
        base: the base model of all items.
        items: what to make.
        bad: what the manifest has besides; reported as failed.
        out: the folder that gets a folder for each item.
        settings: see `Settings`.
        fit: see `Planner`.
        background: colour under transparent parts of photos.
        console: where progress and failures are told.
        force: replace folders that hold something else.
    """

    def __init__(
        self,
        base: BaseModel,
        items: Sequence[Item],
        bad: Sequence[BadItem],
        out: Path,
        *,
        settings: Settings,
        fit: Planner,
        background: str,
        console: Console,
        force: bool,
    ) -> None:
        self._base, self._items, self._out = base, items, out
        self._settings, self._fit, self._background = settings, fit, background
        self._console, self._force = console, force
        self.tally = Tally(len(items) + len(bad))
        self._slots = 1
        for one in bad:
            self._fail(one)

    def run(self) -> Tally:
        """Makes what is not there yet; what cannot be made is reported and left out.

        Raises:
            OutputUnwritableError: results cannot be written; nothing more could be.
        """
        try:
            for config, ready in self._groups():
                self._run_group(config, ready)
        finally:
            self._console.close()
        return self.tally

    def _fail(self, bad: BadItem) -> None:
        self.tally.failed.append(bad)
        self._console.warn(f"{bad.where}{f' ({bad.name})' if bad.name else ''}: {bad.reason}")

    def _groups(self) -> Iterator[tuple[EditConfig, list[_Ready]]]:
        """Items of equal settings, at most `CHUNK` together, as they can be run; those that are done are left out."""
        groups: dict[EditConfig, list[_Ready]] = {}
        for item in self._items:
            try:
                ready = self._ready(item)
            except LowmemImagicError as error:
                self._fail(BadItem(item.where, item.name, str(error)))
                continue
            if ready is None:
                self.tally.before.append(item.name)
                continue
            group = groups.setdefault(ready.config, [])
            group.append(ready)
            if len(group) == CHUNK:
                yield ready.config, groups.pop(ready.config)
        yield from groups.items()

    def _ready(self, item: Item) -> _Ready | None:
        """The item with its photo read; None where it is done.

        Raises:
            LowmemImagicError: it cannot be run.
        """
        config = self._settings(item.settings)
        check_sentence(item.sentence)
        check_sentences(self._base, [item.sentence, config.sample.negative_prompt], self._console)
        photo = load_photo(item.photo, background=self._background)
        job = job_id(photo, item.sentence, config, self._base)
        folder = self._out / item.name
        holds = _job_of(folder, item.name)
        if holds == job:
            return None
        if holds is not None and not self._force:
            raise OutputExistsError(f"{folder} holds something else; --force replaces it, or give the item a name")
        ResultFolder.prepare(folder, overwrite=True)
        return _Ready(item, photo, config, job)

    def _run_group(self, config: EditConfig, ready: Sequence[_Ready]) -> None:
        fitted, planned = self._fit(config, len(ready))
        self._slots = min(len(ready), CPU_SLOTS if planned is None else planned.slots)
        jobs = [Job(one.photo, one.item.sentence) for one in ready]
        waiting = set(range(len(ready)))
        rows = None if planned is None else planned.rows
        try:
            for group in stream_edits(
                self._base, jobs, fitted, slots=self._slots, max_rows=rows, progress=self._progress(config, len(jobs))
            ):
                for number, made in group:
                    waiting.discard(number)
                    self._finish(ready[number], made, fitted, planned)
        except MemoryLimitError as error:
            # Who is finished is finished; the others would fail alike.
            for number in sorted(waiting):
                item = ready[number].item
                self._fail(BadItem(item.where, item.name, str(error)))

    def _progress(self, config: EditConfig, jobs: int) -> Callable[[str, int, int, str], None]:
        """Turns a pack's progress into that of the batch: steps of all items that are left."""
        each = config.embed.steps + config.finetune.steps
        before = self.tally.total - self.tally.left

        def report(stage: str, step: int, steps: int, remark: str) -> None:
            # One job alone tells its stages one by one.
            step += config.embed.steps if stage == "finetune" else 0
            left = self.tally.left
            slots = min(self._slots, left)
            self._console.progress(
                "train",
                before * each + min(step, each * jobs),
                self.tally.total * each,
                f"{len(self.tally.done)} done, {slots} in slots, {left - slots} waiting",
            )

        return report

    def _finish(self, ready: _Ready, made: Edit | LowmemImagicError, config: EditConfig, planned: Plan | None) -> None:
        """Writes and renders an edit; its report, which says that all is there, comes last."""
        item = ready.item
        if isinstance(made, LowmemImagicError):
            self._fail(BadItem(item.where, item.name, str(made)))
            return
        started = time.perf_counter()
        folder = ResultFolder.prepare(self._out / item.name, overwrite=True)
        meter = Meter(self._base.device)
        meter.stages |= made.measured["stages"]
        report = finished_edit(
            self._base, folder, f"{item.name}.safetensors", made, ready.photo, config, planned, meter, _Silent()
        )
        report |= {"job": ready.job, "seconds": {"render": round(time.perf_counter() - started, 3)}}
        folder.write_report(report)
        self.tally.done.append(item.name)
        self._console.say(f"{item.name}: done")


def job_id(photo: Photo, sentence: str, config: EditConfig, base: BaseModel) -> str:
    """Hash of all that makes a result: photo, sentence, settings, base."""
    settings = config.to_dict()
    # How many rows go together is the machine's matter and changes nothing.
    del settings["sample"]["batch_rows"]
    values = [photo.sha256, sentence, settings, base.identity.files, base.weights]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _job_of(folder: Path, name: str) -> str | None:
    """The job whose finished result a folder holds; None for nothing, or what a stopped run has left; "" for other."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return str(report["job"]) if (folder / report["edit_file"]).is_file() else None
    except FileNotFoundError:
        # The edit file is what a run writes first.
        left = (folder / f"{name}.safetensors").exists()
        return None if left or not folder.is_dir() or not any(folder.iterdir()) else ""
    except (OSError, ValueError, LookupError, TypeError):
        return ""
