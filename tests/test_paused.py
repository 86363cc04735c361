"""Facts about runs that are suspended and wake up after another run took over: they leave its files alone."""

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem_imagic.batch import publishing
from lowmem_imagic.batch.attempts import Attempt, Attempts
from lowmem_imagic.batch.ledger import file as ledger_file
from lowmem_imagic.batch.ledger.watch import Watch
from lowmem_imagic.batch.outputs import FINISHED, UNFINISHED, item_state
from lowmem_imagic.batch.paths import Part
from lowmem_imagic.batch.publishing import publish, staged
from lowmem_imagic.batch.status import status
from lowmem_imagic.errors import OutputExistsError, OutputUnwritableError
from tests import crashes
from tests.processes import Process
from tests.test_batch_faults import ONE_PICTURE, call, listed, run  # noqa: F401  `run` is a fixture
from tests.test_ledger import change, entries, opened

PLACES = ("before-state", "before-file:2", "report-written:2")
"""Where a run is suspended: before it saves a state, between two files, and before its report."""


@pytest.fixture
def batch(tiny_folder: Path, tmp_path: Path) -> crashes.Batch:
    """Two photos for the tiny model, whose training states are saved as often as can be."""
    manifest = listed(tmp_path, 2)
    return crashes.Batch(manifest, ("--model", str(tiny_folder), *ONE_PICTURE, "--slots", "1", "--save-every", "1"))


@contextlib.contextmanager
def suspended(batch: crashes.Batch, out: Path, failpoint: str) -> Iterator[Process]:
    """A run that has come to a place and is suspended there."""
    process = batch.start(out, failpoint=f"{failpoint}{'' if ':' in failpoint else ':1'}:stop")
    try:
        _, how = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(how), how
        yield process
    finally:
        process.kill()
        process.communicate()


def stamps(out: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content, inode and time of all files in the items' folders."""
    found = {path: path.stat() for path in sorted(out.glob("n*/*"))}
    return {str(path.relative_to(out)): (path.read_bytes(), s.st_ino, s.st_mtime_ns) for path, s in found.items()}


def given_up(out: Path) -> None:
    """Lets every runner look like one that has ended, as one in another space of process numbers may after a while."""
    change(Part().ledger(out), "UPDATE runners SET started = '1'")


@pytest.mark.process
@pytest.mark.parametrize("place", PLACES)
def test_it_leaves_alone_what_its_successor_has_made(
    batch: crashes.Batch,
    run: Any,  # noqa: F811
    tmp_path: Path,
    place: str,
) -> None:
    """A run that is suspended at any point, and woken when another run has finished everything, touches no file,
    reports that it has lost the item, and ends well."""
    out = tmp_path / "out"
    with suspended(batch, out, place) as process:
        given_up(out)
        said = run(batch.manifest, "--out", out, "--slots", 1)
        assert said.code == 0 and len(said.report["done"] + said.report["done_before"]) == 2
        before = stamps(out)
        process.send_signal(signal.SIGCONT)
        answer, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and "another run took it over" in errors and "Traceback" not in errors, errors
    assert json.loads(answer)["failed"] == [] and json.loads(answer)["left"] == 0
    assert stamps(out) == before and not list(out.glob(".lowmem-imagic/training*"))
    assert all(item_state(out / name, json.loads(files["report.json"])["job"]) == FINISHED for name, files in read(out))


def read(out: Path) -> list[tuple[str, dict[str, str]]]:
    """The reports of all items."""
    return [(path.parent.name, {"report.json": path.read_text()}) for path in sorted(out.glob("n*/report.json"))]


def test_it_leaves_alone_what_its_successor_is_at(tmp_path: Path) -> None:
    """Woken in between, while the other has put only some of its files in place, it adds, replaces and removes none."""
    attempts, folder = Attempts(tmp_path / "training"), tmp_path / "n0"
    first = attempts.begin("job")
    first.state.write_bytes(b"state")
    old = staged(first)
    old.write("a.safetensors", b"old")
    second = attempts.begin("job")
    assert not first.current and second.current and second.state.read_bytes() == b"state"
    assert not second.files.exists(), "files of another attempt are made again"
    folder.mkdir()
    (folder / "a.safetensors").write_bytes(b"new")
    (folder / "report.json").write_text(json.dumps({"job": "job", "finished": False, "pictures": ["eta_0.00.png"]}))
    (folder / "eta_0.00.png").write_bytes(b"new")
    before = stamps(tmp_path)
    assert not publish(first, old, folder, "job", {"job": "job", "finished": True})
    attempts.remove(first)
    assert stamps(tmp_path) == before and second.current
    results = staged(second)
    results.write("a.safetensors", b"newer")
    report = {"job": "job", "finished": True, "pictures": [], "sha256": results.digests()}
    assert publish(second, results, folder, "job", report)
    assert sorted(os.listdir(folder)) == ["a.safetensors", "report.json"] and item_state(folder, "job") == FINISHED


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_two_items_begin_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Of two items that find one folder free at the same moment, the first to put its report there has it; the other
    fails and changes no file, also on a disk without links."""
    attempts, folder = Attempts(tmp_path / "training"), tmp_path / "n0"
    files = [staged(attempts.begin(job)) for job in ("job", "other")]
    for word, results in zip((b"a", b"b"), files, strict=True):
        results.write("n0.safetensors", word)
    one, other = (Attempt(results.path.parent) for results in files)
    before = publishing.pictures_of_report

    def meanwhile(path: Path) -> frozenset[str]:
        monkeypatch.setattr(publishing, "pictures_of_report", before)
        assert publish(other, files[1], folder, "other", None)
        return before(path)

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(publishing, "pictures_of_report", meanwhile)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    with pytest.raises(OutputExistsError, match="n0 holds something else"):
        publish(one, files[0], folder, "job", None)
    assert (folder / "n0.safetensors").read_bytes() == b"b" and item_state(folder, "other") == UNFINISHED


def test_paused_between_any_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a run is paused at any system call and woken at any point of its successor, the item ends as the successor's,
    complete."""
    found = [interleaved(tmp_path / str(seed), random.Random(seed), monkeypatch) for seed in range(60)]
    assert {"woken in between", "woken after"} <= set(found)


def interleaved(place: Path, rng: random.Random, monkeypatch: pytest.MonkeyPatch) -> str:
    """Pauses one attempt at a random step, lets the next begin, and go on at a random step of that; how it went."""
    place.mkdir()
    (place / "n0").mkdir()
    old_report = {"job": "job", "finished": False, "pictures": ["eta_0.00.png", "eta_9.00.png"]}
    (place / "n0" / "report.json").write_text(json.dumps(old_report))
    (place / "n0" / "eta_9.00.png").write_bytes(b"stale")
    attempts, paused, go_on = Attempts(place / "training"), threading.Event(), threading.Event()
    steps, pause_at, wake_at = {"first": 0, "second": 0}, rng.randrange(1, 40), rng.randrange(1, 72)

    def put(attempt: Attempt, word: str, names: str) -> bool:
        results = staged(attempt)
        with contextlib.suppress(OutputUnwritableError):
            for name in names:
                results.write(f"eta_{name}.00.png", word.encode())
        report = {"job": "job", "finished": True, "pictures": sorted(results.files), "sha256": results.digests()}
        return publish(attempt, results, place / "n0", "job", report)

    def step() -> None:
        who = threading.current_thread().name
        if who in steps:
            steps[who] += 1
            if (who, steps[who]) == ("first", pause_at):
                paused.set()
                assert go_on.wait(60)
            elif (who, steps[who]) == ("second", wake_at):
                go_on.set()
                first.join()

    def watched(call: Any) -> Any:
        return lambda *values, **more: (step(), call(*values, **more))[1]

    def started(name: str, *values: Any) -> threading.Thread:
        thread = threading.Thread(target=lambda: put(*values), name=name)
        thread.start()
        return thread

    with monkeypatch.context() as patch:
        for name in ("open", "replace", "rename", "mkdir", "unlink", "link", "fsync"):
            patch.setattr(os, name, watched(getattr(os, name)))
        first = started("first", attempts.begin("job"), "old", "013")
        while first.is_alive() and not paused.wait(0.01):
            pass
        early = not paused.is_set()
        # The last one to begin is this one, wherever the other is.
        second = attempts.begin("job")
        started("second", second, "new", "0245").join()
        go_on.set()
        first.join()
    names = {path.name for path in (place / "n0").iterdir()}
    assert item_state(place / "n0", "job") == FINISHED and names == {
        "report.json",
        *(f"eta_{n}.00.png" for n in "0245"),
    }
    assert all((place / "n0" / f"eta_{n}.00.png").read_bytes() == b"new" for n in "0245")
    return "early" if early else "woken in between" if steps["second"] >= wake_at else "woken after"


def test_of_two_that_begin_at_once_one_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is paused while it begins, with another in between, ends that when it wakes, or is ended: never are two
    the last."""
    for number in range(1, 30):
        attempts, inside, calls = Attempts(tmp_path / str(number)), list[Attempt](), iter(range(1, 99))

        def watched(call: Any, attempts: Attempts = attempts, number: int = number, **rest: Any) -> Any:
            inside, calls = rest["inside"], rest["calls"]

            def replaced(*values: Any, **more: Any) -> Any:
                if not inside and next(calls) == number:
                    inside.append(Attempt(Path()))
                    inside[0] = attempts.begin("job")
                return call(*values, **more)

            return replaced

        with monkeypatch.context() as patch:
            for name in ("mkdir", "rename", "lstat", "listdir", "scandir"):
                patch.setattr(os, name, watched(getattr(os, name), inside=inside, calls=calls))
            outer = attempts.begin("job")
        assert [one.current for one in (outer, *inside)].count(True) == 1, number


def test_an_attempt_ends_those_of_other_parts(tmp_path: Path) -> None:
    """A whole list that is run after its part was abandoned continues from the part's state, and the part cannot write
    any more."""
    part, whole = (Attempts(tmp_path / name) for name in ("training-1-of-2", "training"))
    first = part.begin("job")
    first.state.write_bytes(b"state")
    second = whole.begin("job")
    assert not first.current and second.state.read_bytes() == b"state"
    assert isinstance(part.begin("job"), Attempt) and not second.current


@pytest.mark.process
def test_others_say_what_they_wait_for(
    batch: crashes.Batch,
    run: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run suspended while it changes the ledger is named by waiting runs, and by the status; they end after a while,
    and it continues when woken."""
    out = tmp_path / "out"
    monkeypatch.setattr(ledger_file, "BUSY_S", 0.3)
    monkeypatch.setattr(ledger_file, "PATIENCE_S", 0.1)
    with suspended(batch, out, "before-commit:4") as process:
        said = run(batch.manifest, "--out", out)
        assert said.code == 1 and f"process {process.pid} on" in said.errors and "is suspended" in said.errors
        [runner] = [one for one in status(out)["runners"] if one["pid"] == process.pid]
        assert runner["suspended"] and any(f"kill -CONT {process.pid}" in line for line in status(out)["summary"])
        process.send_signal(signal.SIGCONT)
        answer, errors = process.communicate(timeout=100)
    assert process.returncode == 0 and sorted(json.loads(answer)["done"]) == ["n0", "n1"], errors
    assert call("status", out).report["done"] == 2


def test_a_suspended_runner_is_given_up_after_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent process on this machine loses its items after a lease, with a warning."""
    path, clock, warnings = tmp_path / "ledger.sqlite3", [0.0], list[str]()
    with subprocess.Popen(("sleep", "100")) as other, opened(path, entries(1), warn=warnings.append) as ledger:
        other.send_signal(signal.SIGSTOP)
        os.waitpid(other.pid, os.WUNTRACED)
        started = Path(f"/proc/{other.pid}/stat").read_text().rpartition(")")[2].split()[19]
        fields, of_other = "host, boot, pid, started", f"host, boot, {other.pid}, '{started}'"
        change(path, f"INSERT INTO runners (id, {fields}) SELECT 99, {of_other} FROM runners")
        change(path, "UPDATE jobs SET state = 'running', runner = 99")
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        for seconds in range(64):
            clock[0] = float(seconds)
            ledger.take_over()
            assert bool(ledger.counts()["waiting"]) == (seconds > 61) or seconds in (60, 61)
        other.kill()
    [text] = warnings
    assert f"process {other.pid} on" in text and "is suspended and has been silent for 60 s" in text


def test_who_slept_gives_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the whole machine was suspended for a night, no runner counts as silent."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    from lowmem_imagic.batch.ledger.file import Runner
    from lowmem_imagic.batch.ledger.owner import Owner

    watch, runner = Watch(10.0), Runner(1, Owner("h", "b", 1, ""), 5, 0, 0.0, 0, 0)
    for now in (0.0, 5.0, 30_000.0):
        clock[0] = now
        watch.look([runner])
    assert watch.silent_s(runner) == 15.0
