"""Facts about a damaged batch folder: it disappears during a run, or has links, pipes and garbage in place of files."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowmem_imagic.batch.ledger.file import WAITING, snapshot
from lowmem_imagic.batch.ledger.ledger import Ledger, at_work
from lowmem_imagic.batch.outputs import EMPTY, OTHER, UNFINISHED, item_state
from lowmem_imagic.errors import OutputUnwritableError
from lowmem_imagic.storage import atomic
from tests import calls
from tests.test_batch_faults import call, limit, listed, run  # noqa: F401  fixtures among them
from tests.test_ledger import entries, opened

HIDDEN = ".lowmem-imagic"
LEDGER = f"{HIDDEN}/ledger.sqlite3"


def before_the_last(monkeypatch: pytest.MonkeyPatch, harm: Callable[[], None]) -> None:
    """Does harm when one of two items is finished, and the other is trained."""
    calls.before_each_edit(monkeypatch, lambda count: harm() if count == 1 else None)


@pytest.mark.parametrize("how", ["deleted", "moved", "its ledger deleted"])
def test_it_goes_away(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:  # noqa: F811
    """If a batch's folder or its ledger is deleted or moved during a run, the run ends with one clear line and exit
    code 1; no file is made at the old path, and the batch can be continued at the new one."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    harm = {
        "deleted": lambda: shutil.rmtree(out),
        "moved": lambda: out.rename(tmp_path / "moved"),
        "its ledger deleted": lambda: (out / LEDGER).unlink(),
    }[how]
    with monkeypatch.context() as patch:
        before_the_last(patch, harm)
        said = run(manifest, "--out", out, "--slots", 1)
    assert said.code == 1 and "was deleted" in said.errors and "Traceback" not in said.errors, said.errors
    assert out.exists() == (how == "its ledger deleted")
    if how == "deleted":
        return
    if how == "moved":
        (tmp_path / "moved").rename(out)
    said = run(manifest, "--out", out, "--slots", 1)
    assert said.code == 0 and said.report["done_before"][0] == "n0" and said.report["left"] == 0
    assert not (out / HIDDEN / "training").exists()


@pytest.mark.parametrize("end", ["", "-wal", "-shm", "all"])
def test_a_ledger_that_goes_away_is_noticed(tmp_path: Path, end: str) -> None:
    """sqlite goes on writing into deleted files; the ledger's next call reports it."""
    path = tmp_path / "out" / LEDGER
    path.parent.mkdir(parents=True)
    with opened(path, entries(2)) as ledger:
        assert ledger.counts()[WAITING] == 2
        shutil.rmtree(path.parent) if end == "all" else Path(f"{path}{end}").unlink()
        for ask in (ledger.counts, ledger.take_over, lambda: ledger.claim("", 1)):
            with pytest.raises(OutputUnwritableError, match=r"was deleted or replaced.*run the command again"):
                ask()
    path.parent.mkdir(exist_ok=True)
    with opened(path, entries(2)) as ledger:
        assert ledger.counts()[WAITING] == 2


def test_it_becomes_read_only(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A disk that becomes read-only during a run is one clear line; finished items stay, and the batch can be
    continued."""
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


@pytest.mark.parametrize("name", [HIDDEN, f"{HIDDEN}/training"])
def test_links_are_not_followed(run: Any, tmp_path: Path, name: str) -> None:  # noqa: F811
    """A link in place of the batch's own folders is refused in one line, and its target is not touched."""
    manifest, out, precious = listed(tmp_path, 1), tmp_path / "out", tmp_path / "precious"
    (precious / "job").mkdir(parents=True)
    (precious / "job" / "state").write_bytes(b"precious")
    (out / name).parent.mkdir(parents=True)
    (out / name).symlink_to(precious)
    said = run(manifest, "--out", out)
    assert said.code == 1 and "is a link" in said.errors and "Traceback" not in said.errors, said.errors
    assert [path.read_bytes() for path in precious.rglob("*") if path.is_file()] == [b"precious"]
    assert os.listdir(out) == [HIDDEN]


def test_links_deeper_down_are_removed_alone(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Links among training states are removed, but not their targets; the batch's folder itself may be a link."""
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
    """An item's folder that is a link is never written through, with or without `--force`; a finished one is read."""
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
def test_garbage_in_the_lock(tmp_path: Path, content: bytes) -> None:
    """The contents of the lock file do not matter."""
    path = tmp_path / "ledger.sqlite3"
    Path(f"{path}.lock").write_bytes(content)
    with opened(path, entries(2)) as ledger:
        assert ledger.counts()[WAITING] == 2


@pytest.mark.parametrize("end", ["", "-wal", "-shm", ".lock"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "broken link"])
def test_no_file_in_the_place_of_the_ledger(tmp_path: Path, kind: str, end: str) -> None:
    """A folder, a pipe or a link in place of any of the ledger's files is one error line, and is not opened."""
    path, elsewhere = tmp_path / "ledger.sqlite3", tmp_path / "elsewhere"
    place = Path(f"{path}{end}")
    if kind == "link":
        elsewhere.write_bytes(b"precious")
    make = {"folder": os.mkdir, "pipe": os.mkfifo}.get(kind, lambda place: place.symlink_to(elsewhere))
    make(place)
    with pytest.raises(OutputUnwritableError, match=r"expected a file of the batch; remove it"):
        Ledger(path)
    assert snapshot(path) is None and at_work(path) is None
    assert elsewhere.exists() == (kind == "link") and (not elsewhere.exists() or elsewhere.read_bytes() == b"precious")


def test_pipes_are_not_waited_for(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Pipes in place of reports, pictures, states and pages count as foreign files: no command waits for them."""
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
    """Any file in place of a report is read without harm."""
    (tmp_path / "n0").mkdir()
    report = tmp_path / "n0" / "report.json"
    if content is None:
        with report.open("wb") as file:
            file.truncate(2**30)
    else:
        report.write_bytes(content)
    assert item_state(tmp_path / "n0", "job") == OTHER
    report.unlink()
    assert item_state(tmp_path / "n0", "job") == EMPTY
    report.write_text('{"job": "job", "finished": true, "sha256": {"pipe": ""}}')
    os.mkfifo(tmp_path / "n0" / "pipe")
    assert item_state(tmp_path / "n0", "job") == UNFINISHED


def test_folders_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new folder is synced into its parent before files are written into it."""
    synced: list[Path] = []
    monkeypatch.setattr(atomic, "sync_folder", lambda folder: synced.append(folder))
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    atomic.make_folder(tmp_path / "a")
    assert len(synced) == 3
