"""Facts about the ledger: an item belongs to one runner at a time, and items of a dead runner are released."""

import contextlib
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_imagic.batch.ledger import file as ledger_file
from lowmem_imagic.batch.ledger import ledger as ledgers
from lowmem_imagic.batch.ledger.file import DONE, FAILED, RUNNING, WAITING, Entry, Runner, Snapshot, snapshot
from lowmem_imagic.batch.ledger.ledger import Ledger
from lowmem_imagic.batch.ledger.owner import Owner
from lowmem_imagic.errors import OutputUnwritableError

SPAWN = multiprocessing.get_context("spawn")
STEPS = ("register", "claim", "finish", "fail", "again", "release", "close", "lose")
HOLDER = """
import pathlib, sys
from lowmem_imagic.batch.ledger.ledger import Ledger
from lowmem_imagic.batch.ledger.file import Entry
open("/proc/self/comm", "w").write("a) Z 1 (b")
ledger = Ledger(pathlib.Path(sys.argv[1]))
ledger.register([Entry(str(n), n, "", "") for n in range(3)], finished=lambda entry: False)
print([entry.job for entry in ledger.claim("", 2)], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a ledger is to be."""
    return tmp_path / "ledger.sqlite3"


def entries(count: int, name: str = "") -> list[Entry]:
    """Items with jobs "0", "1", ..."""
    return [Entry(str(number), number, f"line {number}", name) for number in range(count)]


def opened(
    path: Path,
    items: Sequence[Entry],
    *,
    retry: Sequence[str] = (),
    gone: Sequence[str] = (),
    warn: Callable[[str], None] = lambda text: None,
) -> Ledger:
    """A ledger that has these items registered; the files of those in `gone` are no longer there."""
    ledger = Ledger(path, warn=warn)
    ledger.register(items, finished=lambda entry: entry.job not in gone, retry=retry)
    return ledger


def jobs(taken: Sequence[Entry]) -> list[str]:
    """Their jobs."""
    return [entry.job for entry in taken]


def attempts(ledger: Ledger, job: str) -> int:
    """How often an item was taken."""
    return next(entry.attempts for entry in ledger.entries() if entry.job == job)


def states(ledger: Ledger) -> list[str]:
    """The states of this run's items, in order."""
    return [entry.state for entry in ledger.entries()]


def seen(path: Path) -> Snapshot:
    """The snapshot of an existing ledger."""
    found = snapshot(path)
    assert found is not None
    return found


def holds(ledger: Ledger, path: Path, job: str) -> bool:
    """Whether an item is a runner's own, as the ledger's file has it."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        found = database.execute("SELECT state, runner FROM jobs WHERE job = ?", (job,)).fetchone()
    return bool(found == (RUNNING, ledger.me))


def change(path: Path, statement: str, *values: Any) -> None:
    """Changes a ledger behind its back."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(statement, values)


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A small separate disk; the test is skipped if none can be mounted."""
    folder.mkdir()
    words = ("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    if not shutil.which("mount") or subprocess.run(words, capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(("umount", "-l", str(folder)), check=True)


def take_all(path: Path, barrier: Any, queue: Any) -> None:
    """Takes and finishes items until there are none, at the same time as others."""
    found = list[str]()
    try:
        with opened(path, entries(60)) as ledger:
            barrier.wait(timeout=60)
            while claimed := jobs(ledger.claim("", 3)):
                if not found:
                    barrier.wait(timeout=60)
                found += claimed
                for job in claimed:
                    ledger.finish(job, 0.0)
    finally:
        queue.put(found)


@pytest.mark.parametrize("kind", [SPAWN.Process, threading.Thread], ids=["processes", "threads"])
def test_no_two_get_the_same_item(path: Path, kind: Callable[..., Any]) -> None:
    """Runners that claim items at the same time, in processes or threads, get every item once, and each gets some."""
    barrier, queue = SPAWN.Barrier(3), SPAWN.SimpleQueue()
    with opened(path, entries(60)):
        workers = [kind(target=take_all, args=(path, barrier, queue)) for _ in range(3)]
        for worker in workers:
            worker.start()
        found = [queue.get() for _ in workers]
        for worker in workers:
            worker.join()
        assert all(found) and sorted((job for one in found for job in one), key=int) == jobs(entries(60))


def test_nobody_takes_more_than_a_share(path: Path) -> None:
    """A single runner claims as many items as it asks for; of several runners each claims half of its equal part, and
    at least one item."""
    with opened(path, entries(40)) as one:
        assert len(one.claim("", 16)) == 16
        with opened(path, entries(40)) as two, opened(path, entries(40)):
            assert len(two.claim("", 16)) == 4  # of 24, for three
            assert len(one.claim("", 2)) == 2
    with opened(path, entries(1)) as one, opened(path, entries(1)):
        assert len(one.claim("", 16)) == 1


def test_what_was_lost_is_not_touched(path: Path) -> None:
    """A runner that counted as dead cannot end or release another runner's items, also with a reused process number."""
    with opened(path, entries(1)) as one, opened(path, entries(1)) as two:
        one.claim("", 1)
        assert holds(one, path, "0") and not two.claim("", 1)
        change(path, "UPDATE runners SET started = '1' WHERE id = ?", one.me)
        assert jobs(two.claim("", 1)) == ["0"]
        assert not holds(one, path, "0") and holds(two, path, "0")
        one.fail("0", "input", "no")
        one.finish("0", 1.0)
        one.release(["0"])
        one.close()
        assert holds(two, path, "0") and attempts(two, "0") == 2


@pytest.fixture
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, with a name that is hard to read, that holds two of three items."""
    words = (sys.executable, "-c", HOLDER, str(path))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "['0', '1']\n"
        yield process
        process.kill()


def test_the_dead_give_back_and_the_living_do_not(path: Path, holder: subprocess.Popen[str]) -> None:
    """A living process keeps its items; killed, and not even waited for by its parent, it has lost them at once."""
    with opened(path, entries(3)) as ledger:
        assert jobs(ledger.claim("", 9)) == ["2"] and states(ledger) == [RUNNING] * 3
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        ledger.take_over()
        assert ledger.counts()[WAITING] == 2
        assert jobs(ledger.claim("", 9)) == ["0", "1"] and attempts(ledger, "0") == 2


def test_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A number given out again is another process; of another start of the machine, or without /proc, none is seen."""
    me = Owner.of_this_process()
    assert me.alive and Owner(me.host, me.boot, me.pid, "1").alive is False
    assert Owner(me.host, "another start", me.pid, me.started).alive is None
    monkeypatch.setattr("lowmem_imagic.batch.ledger.owner._PROC", tmp_path / "nowhere")
    assert me.alive is None and Owner.of_this_process().boot == Owner.of_this_process().boot != me.boot


def test_another_machine_is_given_up_after_silence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runner on another machine keeps its items while its heartbeat counts up, however late the observer looks; after
    a lease of silence on the observer's clock, whatever the wall clock says, they wait again, and it is not at work."""
    with opened(path, entries(2)):
        change(path, "INSERT INTO runners (id, host, boot, pid, started) VALUES (99, 'far', 'far', 1, '1')")
        change(path, f"UPDATE jobs SET state = '{RUNNING}', runner = 99 WHERE job = '0'")
    clock = [1000.0]

    def pass_time(seconds: float, *watching: Ledger) -> None:
        """Lets time pass as it does for processes that are awake."""
        for _ in range(round(seconds)):
            clock[0] += 1
            for one in watching:
                one.take_over()

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for name in ("time", "time_ns", "localtime", "gmtime"):
        monkeypatch.setattr(time, name, lambda *_: pytest.fail("the wall clock was asked"))
    with opened(path, entries(2)) as ledger:
        clock[0] += 1000
        ledger.take_over()
        assert states(ledger) == [RUNNING, WAITING], "the machine may have slept, and the other with it"
        pass_time(ledgers.LEASE_S / 2, ledger)
        change(path, "UPDATE runners SET beat = beat + 1 WHERE id = 99")
        pass_time(ledgers.LEASE_S, ledger)
        with opened(path, entries(2)) as late:
            pass_time(1, late)
            assert states(late) == [RUNNING, WAITING], "whoever has only just come waits a lease of its own"
        pass_time(2, ledger)
        assert jobs(ledger.claim("", 9)) == ["0", "1"]
        ledger.finish("0", 1.0)
    assert not seen(path).runners


def test_suspects_come_last(path: Path) -> None:
    """An item that was under way at every end of a run is claimed after all others, retried ones included, and only
    when this run has no other item."""
    for attempt in range(ledgers.SUSPECT_ATTEMPTS + 1):
        with opened(path, entries(3)) as ledger:
            assert jobs(ledger.claim("", 1)) == ["0"] and attempts(ledger, "0") == attempt + 1
    with opened(path, entries(3)) as ledger:
        assert jobs(ledger.claim("", 1)) == ["1"]
        ledger.fail("1", "io", "again", again=True)
        assert jobs(ledger.claim("", 9)) == ["2", "1"]
        for job in ("2", "1"):
            assert jobs(ledger.claim("", 9)) == []
            ledger.finish(job, 0.0)
        assert jobs(ledger.claim("", 9)) == ["0"]


def test_an_item_ends_with_its_reason(path: Path) -> None:
    """A failed item keeps its error until it is finished; a released item looks as if it had never been claimed."""
    with opened(path, entries(4)) as ledger:
        ledger.claim("", 4)
        ledger.fail("0", "io", "the disk", again=True)
        ledger.fail("1", "input", "the photo")
        ledger.finish("2", 2.5)
        ledger.release(["1", "2", "3"])
        found = [(e.state, e.kind, e.error, e.seconds, e.attempts) for e in ledger.entries()]
        assert found[:2] == [(WAITING, "io", "the disk", None, 1), (FAILED, "input", "the photo", None, 1)]
        assert found[2:] == [(DONE, None, None, 2.5, 1), (WAITING, None, None, None, 0)]
        assert jobs(ledger.claim("", 9)) == ["3", "0"]
        ledger.finish("0", 1.0)
        assert (ledger.entries()[0].kind, ledger.entries()[0].error) == (None, None)


@pytest.mark.parametrize("working", [False, True], ids=["alone", "with another"])
def test_what_a_run_finds(path: Path, working: bool) -> None:
    """A finished item stays finished while its files exist; a failed one stays failed unless its kind is retried; files
    take precedence."""
    with contextlib.ExitStack() as others:
        first = others.enter_context(opened(path, entries(6)))
        first.claim("", 6)
        for job in ("0", "1"):
            first.finish(job, 3.0)
        for job, kind in (("2", "io"), ("3", "input"), ("4", "input")):
            first.fail(job, kind, "reason")
        if not working:
            others.close()
        now = [*entries(4), *(Entry(str(n), n, "", "", state=DONE) for n in (4, 5))]
        with opened(path, now, retry=["io"], gone=["1"]) as ledger:
            assert states(ledger) == [DONE, WAITING, WAITING, FAILED, DONE, DONE]
            assert [e.error for e in ledger.entries()] == [None, None, None, "reason", None, None]
            assert attempts(ledger, "2") == 1 and ledger.entries()[0].seconds == 3.0


def test_other_commands_are_remembered(path: Path) -> None:
    """Items of other commands stay in the ledger, while a run works on them and after; a run claims and counts only its
    own."""
    others = [Entry("x", 0, "", "x", steps=7)]
    with opened(path, entries(2)), Ledger(path) as ledger:
        ledger.register(others, finished=lambda entry: False, command="command 2")
        assert sorted(ledger.unfinished()) == ["0", "1", "x"] and jobs(ledger.claim("", 9)) == ["x"]
        ledger.fail("x", "input", "no")
        assert ledger.counts() == {WAITING: 0, RUNNING: 0, DONE: 0, FAILED: 1} and ledger.steps_ended() == 7
        assert ledger.unfinished() == ["0", "1"] and sorted(ledger.unfinished(["input"])) == ["0", "1", "x"]
    with Ledger(path) as ledger:
        ledger.register(others, finished=lambda entry: False, command="command 2", retry=["input"])
        assert states(ledger) == [WAITING] and sorted(ledger.unfinished()) == ["0", "1", "x"]


def test_what_a_command_replaces(path: Path) -> None:
    """An item is replaced by another job of its command, or by one of another command that gets its folder. With a
    training state it is remembered, unseen, until its folder is finished."""

    def register(command: str, *items: Entry) -> Ledger:
        ledger = Ledger(path)
        ledger.register(items, finished=lambda entry: True, command=command, states=["a1", "b1"])
        return ledger

    def shown() -> list[tuple[str, str]]:
        return sorted((entry.job, entry.command) for entry in seen(path).entries)

    first, second = "command 1", "command 2"
    register(first, *(Entry(f"{name}1", 0, "", name) for name in "abc")).close()
    # Of the list's own: one that cannot be run, one that is no longer there, one that has another job.
    with register(first, Entry("bad 1", 0, "", "a", state=FAILED, kind="input"), Entry("c2", 2, "", "c")) as ledger:
        assert shown() == [("bad 1", first), ("c2", first)]
        assert sorted(ledger.unfinished()) == ["a1", "b1", "c2"]
        ledger.finish(*(jobs(ledger.claim("", 1))), 1.0)
    # Of another command: one that cannot be run replaces none.
    with register(second, Entry("bad 2", 0, "", "c", state=FAILED), Entry("a2", 1, "", "a")) as ledger:
        assert shown() == [("a2", second), ("bad 2", second), ("c2", first)]
        assert sorted(ledger.unfinished()) == ["a1", "a2", "b1"]
        ledger.finish(*(jobs(ledger.claim("", 1))), 1.0)
        assert ledger.unfinished() == ["b1"]
    register(first, Entry("b1", 1, "", "b")).close()
    assert shown() == [("a2", second), ("b1", first), ("bad 2", second), ("c2", first)]


def test_a_ledger_of_the_first_version(path: Path) -> None:
    """A ledger of version 1 is read as it is, and gets the fields that it lacks when it is opened."""
    opened(path, entries(2)).close()
    change(path, "ALTER TABLE jobs DROP COLUMN command")
    change(path, "PRAGMA user_version = 1")
    assert [entry.command for entry in seen(path).entries] == [ledger_file.EARLIER] * 2
    with opened(path, entries(2)) as ledger:
        assert jobs(ledger.claim("", 9)) == ["0", "1"]
    assert len(seen(path).entries) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: os.urandom(len(data)),
        lambda data: data[: len(data) // 2],
        lambda data: data[:50],
        lambda data: data[:8192] + bytes(range(256)) * 32 + data[16384:],
        lambda data: b"",
    ],
    ids=["noise", "half", "start", "a page", "empty"],
)
def test_a_damaged_ledger_is_made_anew(path: Path, damage: Callable[[bytes], bytes]) -> None:
    """Any file in its place is replaced by a working ledger, with a warning unless the file was empty or missing."""
    opened(path, entries(300, name="n" * 50)).close()
    path.write_bytes(damaged := damage(path.read_bytes()))
    Path(f"{path}-wal").write_bytes(os.urandom(5000))
    warnings: list[str] = []
    with Ledger(path, warn=warnings.append) as ledger:
        assert len(warnings) == bool(damaged) and all("made anew" in text for text in warnings)
        ledger.register(entries(2), finished=lambda entry: False)
        assert jobs(ledger.claim("", 9)) == ["0", "1"]
    assert {name for name in os.listdir(path.parent) if not name.endswith(".lock")} == {path.name}
    assert len(seen(path).entries) == 2


def test_a_newer_ledger_is_left_alone(path: Path) -> None:
    """A ledger of a later version, which may be in use, is not removed; the error gives advice."""
    opened(path, entries(2)).close()
    change(path, f"PRAGMA user_version = {ledger_file.VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(OutputUnwritableError, match=r"newer version.*update"):
        Ledger(path)
    assert path.read_bytes() == before


def test_a_damaged_ledger_is_removed_once(path: Path) -> None:
    """If several runs find the ledger damaged at the same moment, one replaces it, and all use the new one."""
    for damage in range(40):
        path.write_bytes(os.urandom(20000))
        warnings: list[str] = []
        barrier = threading.Barrier(4, timeout=30)

        def meet(name: str, barrier: threading.Barrier = barrier, warnings: list[str] = warnings) -> None:
            barrier.wait()
            with contextlib.closing(ledger_file.opened(path, warnings.append)) as database:
                barrier.wait()
                database.execute("INSERT INTO notes VALUES (?, ?)", (name, "1"))

        with ThreadPoolExecutor(4) as threads:
            list(threads.map(meet, "abcd"))
        found = snapshot(path)
        assert found is not None and found.notes.keys() == set("abcd"), damage
        assert len(warnings) == 1


def test_who_is_at_work(path: Path) -> None:
    """A living process is; one on another machine is if its heart beats, and is not if it is silent."""
    assert ledgers.at_work(path) is None
    with opened(path, entries(1)):
        assert ledgers.at_work(path) is not None
        change(path, "UPDATE runners SET boot = 'another machine'")
        assert ledgers.at_work(path, patience_s=0.1) is None
        change(path, "CREATE TRIGGER later AFTER INSERT ON notes BEGIN UPDATE runners SET beat = beat + 1; END")
        timer = threading.Timer(0.3, change, (path, "INSERT INTO notes VALUES ('beat', '1')"))
        timer.start()
        assert ledgers.at_work(path, patience_s=20) is not None
        timer.join()
    assert ledgers.at_work(path) is None


def test_a_snapshot_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A snapshot of a ledger in use has its runners with growing heartbeats and their progress; without a readable
    ledger, no file is made."""
    assert snapshot(path) is None and not path.exists()
    monkeypatch.setattr(ledgers, "HEARTBEAT_S", 0.01)
    with opened(path, entries(2)) as ledger:
        ledger.claim("", 1)
        ledger.report(30, 1.5, 7, 2)
        for _ in range(500):
            found = seen(path)
            [runner] = found.runners
            if runner.beat > 2:
                break
            time.sleep(0.02)
        assert [entry.state for entry in found.entries] == [RUNNING, WAITING] and holds(ledger, path, "0")
    assert runner.beat > 2 and replace(runner, beat=0) == Runner(ledger.me, Owner.of_this_process(), 0, 30, 1.5, 7, 2)
    assert not seen(path).runners and set(os.listdir(path.parent)) == {path.name, f"{path.name}.lock"}
    for content in (b"", b"not a ledger"):
        path.write_bytes(content)
        assert snapshot(path) is None and path.read_bytes() == content


@pytest.mark.parametrize("ended", ["closed", "killed"])
def test_a_snapshot_where_nothing_can_be_written(path: Path, ended: str) -> None:
    """A ledger on a read-only disk is read; that of a run that was killed, to the last word it had written."""
    with opened(path, entries(2)) as ledger:
        ledger.claim("", 1)
        ledger.finish("0", 1.0)
        if ended == "closed":
            ledger.close()
        with mounted(path.parent / "disk", "8m") as disk:
            for file in path.parent.glob("ledger*"):
                shutil.copy(file, disk)
            subprocess.run(("mount", "-o", "remount,ro", str(disk)), check=True)
            found = seen(disk / path.name).entries
    assert [entry.state for entry in found] == [DONE, WAITING]


def test_what_cannot_be_written_is_one_clear_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing folder, a folder in place of the ledger, or a lock that is never released: each is the package's own
    error."""
    for place, said in ((path.parent / "nowhere" / "ledger", "cannot be written"), (path.parent, "is a folder")):
        with pytest.raises(OutputUnwritableError, match=said):
            Ledger(place)
    monkeypatch.setattr(ledger_file, "BUSY_S", 0.05)
    monkeypatch.setattr(ledger_file, "PATIENCE_S", 0.05)
    with opened(path, entries(1)) as ledger, contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OutputUnwritableError, match="locked"):
            ledger.claim("", 1)
        other.execute("ROLLBACK")


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """On a full disk the ledger keeps its contents unchanged; with free space it works again."""
    with mounted(tmp_path / "disk", "512k") as disk, opened(disk / "ledger", entries(2)) as ledger:
        ledger.claim("", 1)
        with contextlib.suppress(OSError):
            (disk / "ballast").write_bytes(bytes(2**20))
        with pytest.raises(OutputUnwritableError, match="full"):
            for _ in range(100):
                ledger.note("note", "x" * 5000)
        assert states(ledger) == [RUNNING, WAITING]
        (disk / "ballast").unlink()
        ledger.finish("0", 1.0)
        assert states(ledger) == [DONE, WAITING]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 5)), min_size=20, max_size=40))
def test_any_sequence(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, int]]) -> None:
    """For any actions of two runners, no item belongs to both, each has the right state, and a last run makes all."""
    path = tmp_path_factory.mktemp("any") / "ledger.sqlite3"
    working, known, files = dict[int, Ledger](), dict[str, Any](), set[str]()  # known: a state, or who holds it

    def now() -> list[Entry]:
        return [Entry(n, 0, "", "", "ab"[int(n) % 2], state=DONE if n in files else WAITING) for n in "012345"]

    for step, who, number in steps:
        ledger, held, again = working.get(who), [job for job, state in known.items() if state == who], number % 2 == 0
        if step == "register" or not ledger:
            ledger = working[who] = ledger or Ledger(path, warn=pytest.fail)
            ledger.register(now(), finished=lambda entry: entry.job in files, retry=["kind"] if again else [])
            for job in jobs(now()):
                stays = known.get(job) in (0, 1) or (known.get(job) == FAILED and not again)
                known[job] = DONE if job in files else known[job] if stays else WAITING
        elif step == "lose":
            files.discard(str(number))
        elif step == "close":
            working.pop(who).close()
            known |= dict.fromkeys(held, WAITING)
        elif step == "claim":
            free = [job for job, state in known.items() if state == WAITING and int(job) % 2 == number % 2]
            taken = jobs(ledger.claim("ab"[number % 2], number + 1))
            assert set(taken) <= set(free) and len(taken) <= number + 1 and bool(taken) == bool(free)
            known |= dict.fromkeys(taken, who)
        elif held:
            job = held[number % len(held)]
            if step == "finish":
                files.add(job)
                ledger.finish(job, 1.0)
            elif step == "release":
                ledger.release([job])
            else:
                ledger.fail(job, "kind", "", again=step == "again")
            known[job] = {"finish": DONE, "fail": FAILED}.get(step, WAITING)
        found = {e.job: e.state for e in seen(path).entries} if known else {}
        assert found == {job: RUNNING if state in (0, 1) else state for job, state in known.items()}
        for one, other in working.items():
            assert all(holds(other, path, job) == (state == one) for job, state in known.items())
    while working:
        working.popitem()[1].close()
    with opened(path, now(), retry=["kind"], gone=[entry.job for entry in now() if entry.state == WAITING]) as ledger:
        # An item that failed before is claimed alone.
        while taken := jobs(ledger.claim("a", 9) + ledger.claim("b", 9)):
            for job in taken:
                ledger.finish(job, 1.0)
        assert states(ledger) == [DONE] * 6


def claim_work(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps of sqlite's machine, in hundreds, for a claim of 16 of many items."""
    connections, connect = list[sqlite3.Connection](), sqlite3.connect

    def remembered(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connections.append(connect(*args, **kwargs))
        return connections[-1]

    monkeypatch.setattr(sqlite3, "connect", remembered)
    with opened(path, entries(count)) as ledger:
        steps = [0]
        connections[0].set_progress_handler(lambda: steps.__setitem__(0, steps[0] + 1), 100)
        assert jobs(ledger.claim("", 16)) == [str(number) for number in range(16)]
        connections[0].set_progress_handler(None, 0)
    monkeypatch.undo()
    return steps[0]


def test_a_claim_costs_the_same_in_a_list_of_any_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim reads the rows that it takes, not all that wait: of 4000 items as few as of 100."""
    few, many = (claim_work(tmp_path / f"{count}.sqlite3", count, monkeypatch) for count in (100, 4000))
    assert many <= 1.2 * few


def test_reading_a_ledger_leaves_it_to_its_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that a run has open is read from a copy, and one at rest without locks: where locks do not reach other
    machines, sqlite would remove the log of a run there."""
    addresses: list[str] = []
    connect = sqlite3.connect

    def noted(address: Any, **options: Any) -> Any:
        addresses.append(str(address))
        return connect(address, **options)

    with opened(path, entries(3)) as ledger:
        ledger.claim("", 1)
        assert Path(f"{path}-wal").stat().st_size
        before = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.parent.iterdir()}
        monkeypatch.setattr(ledger_file.sqlite3, "connect", noted)
        seen = snapshot(path)
        monkeypatch.undo()
        assert seen is not None and sorted(entry.state for entry in seen.entries) == [RUNNING, WAITING, WAITING]
        assert {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.parent.iterdir()} == before
        ledger.finish("0", 1.0)
    assert not Path(f"{path}-wal").exists()
    monkeypatch.setattr(ledger_file.sqlite3, "connect", noted)
    seen = snapshot(path)
    assert seen is not None and sorted(entry.state for entry in seen.entries) == [DONE, WAITING, WAITING]
    copied, untouched = addresses
    assert not copied.startswith(path.as_uri()) and untouched == f"{path.as_uri()}?mode=ro&immutable=1"
    assert not Path(f"{path}-wal").exists() and not Path(f"{path}-shm").exists()
