"""The studio's batches: many photos under many sentences, for one visitor."""

import json
import secrets
import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..batch.outputs import report_of
from ..batch.overview_page import PAGE, PICTURE
from ..batch.request import DEFAULTS
from ..batch.status import commands_of
from ..errors import ConfigError
from ..settings.text import Words
from ..storage.file_names import REPORT, safe_stem
from ..storage.regular_files import is_plain
from . import limits
from .card import DONE, Job
from .machine import Machine, note_end, told
from .visitors import BatchFolder, Refused, Visitor, move_upload

_REQUEST = "request.json"
"""The request of a batch, beside its list."""


class Batches:
    """The acts on batches.

    Args:
        machine: the processes that run them.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def begin(
        self,
        visitor: Visitor,
        uploads: Sequence[tuple[str, str]],
        sentences: Sequence[str],
        values: Mapping[str, Any],
        model: str,
    ) -> BatchFolder:
        """Begins a batch: every photo under every sentence.

        Args:
            visitor: its owner.
            uploads: the path of each upload with its name.
            sentences: one or more.
            values: options of `batch run`.
            model: the base.

        Raises:
            LowmemImagicError: a setting is not valid, or there is nothing to make.
        """
        sentences = list(dict.fromkeys(" ".join(one.split()) for one in sentences if one.strip()))
        if not uploads or not sentences:
            raise Refused("a batch needs one photo or more, and one sentence or more")
        if len(uploads) * len(sentences) > limits.MAX_BATCH_ITEMS:
            raise Refused(f"found {len(uploads) * len(sentences)} items, expected at most {limits.MAX_BATCH_ITEMS}")
        Words("batch run", {"preset": "balanced", **values}).edit()
        base = self._machine.base(model)
        self._machine.check_room(visitor)
        with visitor.lock:
            visitor.claim_uploads([upload for upload, _ in uploads])
            visitor.last_batch += 1
            folder = visitor.batches_folder / f"batch-{visitor.last_batch:03d}"
            batch = BatchFolder(folder)
            batch.photos.mkdir(parents=True)
            visitor.batches[folder.name] = batch
        lines = []
        for number, (upload, called) in enumerate(uploads, start=1):
            # The name of the upload is only a label.
            file = batch.photos / f"{number:03d}-{safe_stem(Path(called).stem)}{_suffix(called)}"
            move_upload(upload, file)
            lines += [json.dumps({"photo": f"photos/{file.name}", "sentence": one}) for one in sentences]
        manifest = folder / "list.jsonl"
        manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
        own = {key: value for key, value in values.items() if value not in (None, "")}
        request = {
            **DEFAULTS,
            **own,
            "manifest": str(manifest),
            "out": str(batch.results),
            "model": base,
            "device": self._machine.device,
        }
        # For a batch that is stopped before its queue is made.
        (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        self._run(visitor, batch, request)
        return batch

    def resume(self, visitor: Visitor, batch: BatchFolder) -> None:
        """Goes on with a batch that was stopped, also by the end of the server.

        Raises:
            LowmemImagicError: it cannot be continued.
        """
        if not batch.unfinished:
            raise Refused("this batch is finished")
        try:
            [*_, last] = commands_of(batch.results)
            request = last.request
        except ConfigError:
            try:
                request = json.loads((batch.path / _REQUEST).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise Refused("this batch never began and cannot be continued; begin it again") from None
        # The folder may have been moved.
        moved = {"manifest": str(batch.path / "list.jsonl"), "out": str(batch.results), "force": False}
        self._run(visitor, batch, {**request, **moved})

    def _run(self, visitor: Visitor, batch: BatchFolder, request: Mapping[str, Any]) -> None:
        if batch.busy:
            raise Refused("this batch is at work already")

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "end":
                note_end(visitor)
                batch.message = told(job)
                if job.state == DONE and not job.result["failed"]:
                    # The uploads are of no further use.
                    shutil.rmtree(batch.photos, ignore_errors=True)

        job = Job({"work": "batch", "request": dict(request)}, batch.path.name, visitor.id, on_event)
        self._machine.check_room(visitor)
        batch.job = self._machine.card.add(job)

    def stop(self, batch: BatchFolder) -> None:
        """Stops the job of a batch, which can be continued."""
        if batch.job is not None:
            self._machine.card.stop(batch.job)

    def files(self, batch: BatchFolder) -> dict[str, Path]:
        """The result files of a batch by the names that its overview uses."""
        results, files = batch.results, {}
        for name in (PAGE, PICTURE):
            if is_plain(results / name, stat.S_IFREG):
                files[name] = results / name
        for item in _folders(results):
            report = report_of(item)
            for name in () if report is None else (*report["sha256"], REPORT):
                if Path(name).name == name and is_plain(item / name, stat.S_IFREG):
                    files[f"{item.name}/{name}"] = item / name
        return files

    def pack(self, visitor: Visitor, batch: BatchFolder) -> None:
        """Packs the results of a batch into one file to download.

        Raises:
            Refused: there are no results yet.
        """
        files = self.files(batch)
        if not files:
            raise Refused("this batch has no results yet")
        visitor.folder.mkdir(exist_ok=True)
        visitor.drop(batch.packed)
        out = visitor.folder / f"{secrets.token_hex(8)}.zip"
        order = {"work": "pack", "out": str(out), "files": [(name, str(path)) for name, path in files.items()]}
        self._machine.quickly(visitor, order, "packing a batch")
        batch.packed = visitor.serve(out, "application/zip", f"{batch.path.name}.zip")

    def remove(self, visitor: Visitor, batch: BatchFolder) -> None:
        """Deletes a batch with its photos and results.

        Raises:
            Refused: it is at work.
        """
        if batch.busy:
            raise Refused("this batch is at work; stop it first")
        with visitor.lock:
            visitor.batches.pop(batch.path.name, None)
        visitor.drop(batch.packed)
        shutil.rmtree(batch.path, ignore_errors=True)


def _folders(parent: Path) -> list[Path]:
    """The folders in a folder, sorted; none if it is not there."""
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if is_plain(path, stat.S_IFDIR))


def _suffix(name: str) -> str:
    """The ending of an upload's name, if it is a plain one."""
    ending = Path(name).suffix.lower()
    return ending if ending[1:].isalnum() and ending.isascii() and len(ending) <= 6 else ""
