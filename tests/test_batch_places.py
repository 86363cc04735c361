"""Facts about what may happen to a batch's folder, or lie in it: it goes away in mid-run, and links, pipes and garbage
are where files should be."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem_imagic import atomic
from lowmem_imagic.batch import worker
from lowmem_imagic.batch.outputs import EMPTY, OTHER, UNFINISHED, look
from tests.test_batch_faults import call, limit, listed, run  # noqa: F401  fixtures among them

HIDDEN = ".lowmem-imagic"
LEDGER = f"{HIDDEN}/ledger.sqlite3"


def before_the_last(monkeypatch: pytest.MonkeyPatch, harm: Callable[[], None]) -> None:
    """Does harm when one of two items is finished, and the other is trained."""
    finish, calls = worker._Pack._finish, iter(range(9))

    def harming(self: worker._Pack, *values: Any) -> Any:
        if next(calls) == 1:
            harm()
        return finish(self, *values)

    monkeypatch.setattr(worker._Pack, "_finish", harming)


@pytest.mark.parametrize("how", ["deleted", "moved", "its own folder deleted", "its ledger deleted", "its log deleted"])
def test_it_goes_away(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:  # noqa: F811
    """A batch's folder that is deleted or moved in mid-run, or its ledger, is one clear line and exit code 1; nothing
    is made in its old place, and where it is now, or what is left, is gone on with."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    harm = {
        "deleted": lambda: shutil.rmtree(out),
        "moved": lambda: out.rename(tmp_path / "moved"),
        "its own folder deleted": lambda: shutil.rmtree(out / HIDDEN),
        "its ledger deleted": lambda: (out / LEDGER).unlink(),
        "its log deleted": lambda: (out / f"{LEDGER}-wal").unlink(),
    }[how]
    with monkeypatch.context() as patch:
        before_the_last(patch, harm)
        said = run(manifest, "--out", out, "--slots", 1)
    assert said.code == 1 and "was deleted" in said.errors and "Traceback" not in said.errors, said.errors
    assert out.exists() == (how not in ("deleted", "moved"))
    if how == "moved":
        (tmp_path / "moved").rename(out)
    said = run(manifest, "--out", out, "--slots", 1)
    assert said.code == 0 and len(said.report["done_before"]) + len(said.report["done"]) == 2
    assert ("n0" in said.report["done_before"]) == (how != "deleted") and not (out / HIDDEN / "training").exists()


def test_it_becomes_read_only(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A disk that becomes read-only in mid-run is one clear line; what is finished stays, and is gone on with."""
    manifest, out, read_only = listed(tmp_path, 2), tmp_path / "out", OSError(errno.EROFS, os.strerror(errno.EROFS))

    def refuse(*_: object, **__: object) -> Any:
        raise read_only

    with monkeypatch.context() as patch:

        def harm() -> None:
            patch.setattr(os, "replace", refuse)
            patch.setattr(tempfile, "TemporaryFile", refuse)

        before_the_last(patch, harm)
        said = run(manifest, "--out", out, "--slots", 1)
    assert said.code == 1 and "read-only" in said.errors.lower() and "Traceback" not in said.errors
    assert run(manifest, "--out", out).report["done_before"] == ["n0"]


@pytest.mark.parametrize("name", [HIDDEN, f"{HIDDEN}/training", LEDGER, f"{LEDGER}-wal", f"{LEDGER}.lock"])
def test_links_are_not_followed(run: Any, tmp_path: Path, name: str) -> None:  # noqa: F811
    """A link in the place of anything of the batch's own is refused in one line, and nothing at its end is touched."""
    manifest, out, precious = listed(tmp_path, 1), tmp_path / "out", tmp_path / "precious"
    (precious / "job").mkdir(parents=True)
    (precious / "job" / "state").write_bytes(b"precious")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(precious if "." not in name.removeprefix(HIDDEN) else precious / "job" / "state")
    said = run(manifest, "--out", out)
    assert said.code == 1 and "is a link" in said.errors and "Traceback" not in said.errors, said.errors
    assert [path.read_bytes() for path in precious.rglob("state")] == [b"precious"] and len(list(out.iterdir())) == 1
    (out / name).unlink()
    assert run(manifest, "--out", out).code == 0


def test_links_deeper_down_are_removed_alone(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Links among training states are taken away, never what they lead to; the folder itself may be a link."""
    manifest, out, precious = listed(tmp_path, 1), tmp_path / "out", tmp_path / "precious"
    (precious / "deep").mkdir(parents=True)
    (precious / "state").write_bytes(b"precious")
    (tmp_path / "disk" / HIDDEN / "training").mkdir(parents=True)
    (tmp_path / "disk" / HIDDEN / "training" / "job").symlink_to(precious)
    (tmp_path / "disk" / HIDDEN / "training-1-of-2").mkdir()
    (tmp_path / "disk" / HIDDEN / "training-1-of-2" / "job").symlink_to(precious)
    out.symlink_to(tmp_path / "disk")
    assert run(manifest, "--out", out).report["done"] == ["n0"]
    assert (precious / "state").read_bytes() == b"precious" and (precious / "deep").is_dir()
    assert not (out / HIDDEN / "training").exists() and out.is_symlink()


def test_an_item_in_the_place_of_a_link(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """An item's folder that is a link is written through for nobody, `--force` or not; a finished one is read."""
    manifest, out, other = listed(tmp_path, 2), tmp_path / "out", tmp_path / "other"
    other.mkdir()
    out.mkdir()
    (out / "n1").symlink_to(other)
    for words in ((), ("--force",)):
        said = run(manifest, "--out", out, *words)
        assert said.code == 3 and "n1 is a link" in said.report["failed"][0]["reason"] and not list(other.iterdir())
    shutil.move(out / "n0", tmp_path / "kept")
    (out / "n0").symlink_to(tmp_path / "kept")
    assert run(manifest, "--out", out).report["done_before"] == ["n0"]


@pytest.mark.parametrize("content", [b"garbage" * 999, b"SQLite format 3\0" + bytes(80), b"", os.urandom(4096)])
def test_garbage_in_the_lock(run: Any, tmp_path: Path, content: bytes) -> None:  # noqa: F811
    """What the lock file holds does not matter."""
    (tmp_path / "out" / HIDDEN).mkdir(parents=True)
    (tmp_path / "out" / f"{LEDGER}.lock").write_bytes(content)
    assert run(listed(tmp_path, 1), "--out", tmp_path / "out").code == 0


@pytest.mark.parametrize("end", ["", "-wal", "-shm", ".lock"])
@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_no_file_in_the_place_of_the_ledger(run: Any, tmp_path: Path, kind: str, end: str) -> None:  # noqa: F811
    """A folder or a pipe in the place of any of the ledger's files is one line; the status is told from the files."""
    out = tmp_path / "out"
    (out / HIDDEN).mkdir(parents=True)
    {"folder": os.mkdir, "pipe": os.mkfifo}[kind](out / f"{LEDGER}{end}")
    said = run(listed(tmp_path, 1), "--out", out)
    assert said.code == 1 and "expected a file of the batch's own; remove it" in said.errors
    assert call("status", out).code == 2


def test_pipes_are_not_waited_for(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Pipes in the place of reports, pictures, states and pages are what something else is: no command waits."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    assert run(manifest, "--out", out).code == 0
    for name in ("n0/report.json", "n1/sheet.png", "index.html", "overview.png"):
        (out / name).unlink(missing_ok=True)
        os.mkfifo(out / name)
    assert call("status", out).code == 0
    said = call("sheet", out)
    assert said.code == 1 and "--force replaces it" in said.errors
    assert call("sheet", out, "--force").code == 0
    said = run(manifest, "--out", out)
    assert said.code == 3 and "n0 holds something else" in said.report["failed"][0]["reason"]
    assert run(manifest, "--out", out, "--force").report["done"] == ["n0"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe{\0}\0", b"1" * 5000, b"[" * 100_000, None])
def test_reports_that_are_none(tmp_path: Path, content: bytes | None) -> None:
    """Whatever lies in the place of a report, an item's folder is looked at without harm."""
    (tmp_path / "n0").mkdir()
    report = tmp_path / "n0" / "report.json"
    if content is None:
        with report.open("wb") as file:
            file.truncate(2**30)
    else:
        report.write_bytes(content)
    assert look(tmp_path / "n0", "job") == OTHER
    report.unlink()
    assert look(tmp_path / "n0", "job") == EMPTY
    report.write_text('{"job": "job", "finished": true, "sha256": {"pipe": ""}}')
    os.mkfifo(tmp_path / "n0" / "pipe")
    assert look(tmp_path / "n0", "job") == UNFINISHED


def test_folders_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each folder that is made is forced into the one above it before anything is written into it."""
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "sync_folder", lambda folder: synced.append(folder))
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    atomic.make_folder(tmp_path / "a")
    assert len(synced) == 3
