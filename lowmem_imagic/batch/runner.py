"""Runs the items of a manifest in refilling packs; every finished one is a folder as ``edit`` writes it.

A folder's report names its job and says whether it is finished; such a one is left alone when the same command is run
again, an unfinished one is made anew, and a folder with anything else in it is not touched.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base_model import BaseModel
from ..commands import finished_edit
from ..config import EditConfig
from ..console import Console
from ..edit import Edit
from ..errors import ImageError, LowmemImagicError, MemoryLimitError, OutputExistsError, OutputUnwritableError
from ..images import Photo, load_photo
from ..memory import Meter
from ..pipeline import Job, check_sentence, stream_edits
from ..planning import CPU_SLOTS, Plan
from ..rendering import check_sentences
from ..result_folder import REPORT, ResultFolder
from .manifest import BadItem, Item

CHUNK = 64
"""Photos that are in memory together, and encoded in one go."""

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
    """An item that can be run, as far as can be seen."""

    item: Item
    job: str
    """Hash of all that makes the result."""
    warnings: tuple[str, ...]


class _Silent(Console):
    """Collects warnings for an item's report and shows nothing: the batch has a display of its own."""

    def __init__(self, warnings: Sequence[str] = ()) -> None:
        super().__init__(quiet=True)
        self.warnings += warnings

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

    **Memory**: `CHUNK` photos at a time, whatever the number of items.
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
        self._steps_before = self._steps = 0
        for one in bad:
            self._fail(one)

    def run(self) -> Tally:
        """Makes what is not there yet; what cannot be made is reported and left out.

        Raises:
            OutputUnwritableError: results cannot be written; nothing more could be.
        """
        try:
            groups = self._groups()
            self._steps = sum(_steps(config) * len(ready) for config, ready in groups.items())
            for config, ready in groups.items():
                for first in range(0, len(ready), CHUNK):
                    some = ready[first : first + CHUNK]
                    self._run_chunk(config, some)
                    self._steps_before += _steps(config) * len(some)
        finally:
            self._console.close()
        return self.tally

    def _fail(self, bad: BadItem) -> None:
        self.tally.failed.append(bad)
        self._console.warn(f"{bad.where}{f' ({bad.name})' if bad.name else ''}: {bad.reason}")

    def _fail_item(self, item: Item, error: LowmemImagicError | str) -> None:
        self._fail(BadItem(item.where, item.name, str(error)))

    def _groups(self) -> dict[EditConfig, list[_Ready]]:
        """The items that are to be run, by their settings; those that are done are left out."""
        groups: dict[EditConfig, list[_Ready]] = {}
        for item in self._items:
            try:
                config = self._settings(item.settings)
                ready = self._ready(item, config)
            except OutputUnwritableError:
                raise
            except LowmemImagicError as error:
                self._fail_item(item, error)
                continue
            if ready is None:
                self.tally.before.append(item.name)
            else:
                groups.setdefault(config, []).append(ready)
        return groups

    def _ready(self, item: Item, config: EditConfig) -> _Ready | None:
        """The item looked at; None where it is done.

        Raises:
            LowmemImagicError: it cannot be run.
        """
        check_sentence(item.sentence)
        own = _Silent()
        check_sentences(self._base, [item.sentence, config.sample.negative_prompt], own)
        job = job_id(self._photo(item), item.sentence, config, self._base, self._background)
        folder = self._out / item.name
        holds, finished = _job_of(folder)
        if holds == job and finished:
            return None
        if holds not in (None, job) and not self._force:
            raise OutputExistsError(f"{folder} holds something else; --force replaces it, or give the item a name")
        ResultFolder.prepare(folder, overwrite=True)
        return _Ready(item, job, tuple(own.warnings))

    def _photo(self, item: Item) -> Photo:
        return load_photo(item.photo, background=self._background)

    def _run_chunk(self, config: EditConfig, ready: Sequence[_Ready]) -> None:
        """Trains and renders some items of equal settings."""
        photos: list[tuple[_Ready, Photo]] = []
        for one in ready:
            try:
                photos.append((one, self._photo(one.item)))
            except ImageError as error:
                # It was there when the run began.
                self._fail_item(one.item, error)
        if not photos:
            return
        waiting = dict(enumerate(photos))
        jobs = [Job(photo, one.item.sentence) for one, photo in photos]
        try:
            fitted, planned = self._fit(config, len(jobs))
            slots = min(len(jobs), CPU_SLOTS if planned is None else planned.slots)
            rows = None if planned is None else planned.rows
            report = self._progress(config, slots)
            for group in stream_edits(self._base, jobs, fitted, slots=slots, max_rows=rows, progress=report):
                for number, made in group:
                    one, photo = waiting.pop(number)
                    self._finish(one, photo, made, fitted, planned)
        except MemoryLimitError as error:
            # A training step does not fit at the last rung: whoever still trains or waits would fail alike.
            for one, _ in waiting.values():
                self._fail_item(one.item, error)

    def _progress(self, config: EditConfig, slots: int) -> Callable[[str, int, int, str], None]:
        """Turns a pack's progress into that of the batch: steps of all items."""

        def report(stage: str, step: int, steps: int, remark: str) -> None:
            # One job alone tells its stages one by one.
            step += config.embed.steps if stage == "finetune" else 0
            left = self.tally.left
            training = min(slots, left)
            self._console.progress(
                "train",
                self._steps_before + step,
                self._steps,
                f"{len(self.tally.done)} done, {training} in slots, {left - training} waiting",
            )

        return report

    def _finish(
        self, one: _Ready, photo: Photo, made: Edit | LowmemImagicError, config: EditConfig, planned: Plan | None
    ) -> None:
        """Writes and renders an edit; what goes wrong with it is its own matter, unless nothing can be written."""
        item = one.item
        if isinstance(made, LowmemImagicError):
            self._fail_item(item, made)
            return
        started, name = time.perf_counter(), f"{item.name}.safetensors"
        folder = ResultFolder.prepare(self._out / item.name, overwrite=True)
        meter = Meter(self._base.device)
        meter.stages |= made.measured["stages"]
        try:
            # Whose folder this is, should the run end here.
            folder.write_report({"job": one.job, "finished": False})
            report = finished_edit(self._base, folder, name, made, photo, config, planned, meter, _Silent(one.warnings))
            report |= {"rungs": made.measured["rungs"], "seconds": {"render": round(time.perf_counter() - started, 3)}}
            folder.write_report(report | {"job": one.job, "finished": True})
        except OutputUnwritableError:
            raise
        except LowmemImagicError as error:
            self._fail_item(item, f"{error}; the edit itself is finished: {folder.path / name}")
            return
        self.tally.done.append(item.name)
        self._console.say(f"{item.name}: done")


def _steps(config: EditConfig) -> int:
    return config.embed.steps + config.finetune.steps


def job_id(photo: Photo, sentence: str, config: EditConfig, base: BaseModel, background: str) -> str:
    """Hash of all that makes a result: photo and what is put under it, sentence, settings, base."""
    settings = config.to_dict()
    # How many rows go together is the machine's matter and changes nothing but rounding.
    del settings["sample"]["batch_rows"]
    values = [photo.sha256, background, sentence, settings, base.identity.files, base.weights]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _job_of(folder: Path) -> tuple[str | None, bool]:
    """The job whose result a folder holds, and whether it is finished; None for an empty folder, "" for other files."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        return str(report["job"]), report["finished"] is True and (folder / report["edit_file"]).is_file()
    except FileNotFoundError:
        return ("" if folder.is_dir() and any(folder.iterdir()) else None), False
    except (OSError, ValueError, LookupError, TypeError):
        return "", False
