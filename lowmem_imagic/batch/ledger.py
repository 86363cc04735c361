"""Who makes which item, and what became of it: a sqlite file that several processes share.

It is a cache. What is finished is so because its files are there and verified (`outputs`); a ledger that is lost or
damaged is made anew from them. What it alone knows, and what is lost with it, are attempts and errors.
"""

import contextlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import OutputUnwritableError
from ..failpoints import reach
from .owner import Owner

VERSION = 1
HEARTBEAT_S = 5.0
LEASE_S = 60.0
"""How long a runner on another machine may be silent before its items are taken over, on the clock of who waits."""
SUSPECT_ATTEMPTS = 3
"""After so many an item is taken last: whatever ends the process while it is made shall not keep the others."""
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
_BUSY_S = 60.0

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runners (
    id INTEGER PRIMARY KEY AUTOINCREMENT, host TEXT NOT NULL, boot TEXT NOT NULL, pid INTEGER NOT NULL,
    started TEXT NOT NULL, beat INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0, seconds REAL NOT NULL DEFAULT 0, training INTEGER NOT NULL DEFAULT 0,
    slots INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS jobs (
    job TEXT PRIMARY KEY, position INTEGER NOT NULL, place TEXT NOT NULL, name TEXT NOT NULL, settings TEXT NOT NULL,
    steps INTEGER NOT NULL, state TEXT NOT NULL CHECK (state IN ('{WAITING}', '{RUNNING}', '{DONE}', '{FAILED}')),
    attempts INTEGER NOT NULL DEFAULT 0, kind TEXT, error TEXT, runner INTEGER, seconds REAL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, settings, position);
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True)
class Entry:
    """What a ledger says of an item."""

    job: str
    """Hash of all that makes its result; for an item that cannot be run, a word of its own."""
    position: int
    """In the manifest."""
    place: str
    """Where in the manifest, for people."""
    name: str
    """Of its folder."""
    settings: str = ""
    """Items of equal ones share a pack."""
    steps: int = 0
    """Training steps it takes."""
    state: str = WAITING
    attempts: int = 0
    kind: str | None = None
    """Of the failure, see `failures`."""
    error: str | None = None
    seconds: float | None = None
    """What it took."""


@dataclass(frozen=True)
class Runner:
    """A process that works, or worked, on a folder."""

    id: int
    owner: Owner
    beat: int
    """Counts up for as long as it is alive."""
    steps: int
    """Training steps of the items it has ended."""
    seconds: float
    """Since it began."""
    training: int
    """Steps of what it trains now."""
    slots: int
    """Edits it trains now."""


_FIELDS = tuple(Entry.__dataclass_fields__)
_SELECT = f"SELECT {', '.join(_FIELDS)} FROM jobs"


class Ledger:
    """The ledger of a folder, for one runner; see `opened`.

    Every change is one transaction, on disk when the call returns.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] = lambda text: None) -> None:
        self._path = path
        self._silent: dict[int, tuple[int, float]] = {}
        self._lock = threading.Lock()
        self._progress = (0, 0.0, 0, 0)
        self._stop = threading.Event()
        try:
            self._database = _open(path)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise _unwritable(path, error) from error
            warn(f"the ledger was damaged ({error}) and is made anew from the finished items")
            for end in ("", "-wal", "-shm"):
                path.with_name(path.name + end).unlink(missing_ok=True)
            self._database = _open(path)
        owner = Owner.of_this_process()
        with self._changing() as database:
            values = (owner.host, owner.boot, owner.pid, owner.started)
            added = database.execute("INSERT INTO runners (host, boot, pid, started) VALUES (?, ?, ?, ?)", values)
            self.me = int(added.lastrowid or 0)
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heart.start()

    def close(self) -> None:
        """Says goodbye: what this runner still holds waits for others."""
        self._stop.set()
        self._heart.join()
        with contextlib.suppress(OutputUnwritableError), self._changing() as database:
            database.execute(
                f"UPDATE jobs SET state = '{WAITING}' WHERE state = '{RUNNING}' AND runner = ?", (self.me,)
            )
            database.execute("DELETE FROM runners WHERE id = ?", (self.me,))
        self._database.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(
        self, entries: Sequence[Entry], *, finished: Callable[[Entry], bool], retry: Sequence[str] = ()
    ) -> None:
        """Lists the items of this run, of which those that are finished say so.

        Items of other runs are forgotten where no other runner is at work.

        Args:
            entries: the items, `WAITING`, `DONE` or `FAILED` as seen before.
            finished: looks again, for items that another runner says it has finished since.
            retry: kinds of failure that are tried again.
        """
        with self._changing() as database:
            self._take_over(database)
            before = {entry.job: entry for entry in _entries(database)}
            if not self._others(database):
                database.execute(f"DELETE FROM jobs WHERE state != '{RUNNING}'")
            database.execute("CREATE TEMP TABLE IF NOT EXISTS mine (job TEXT PRIMARY KEY)")
            database.execute("DELETE FROM mine")
            for entry in entries:
                known = before.get(entry.job)
                values = {name: getattr(entry, name) for name in _FIELDS}
                if known is not None:
                    values |= {"attempts": known.attempts, "seconds": known.seconds}
                    if known.state == RUNNING and entry.state == WAITING:
                        values["state"] = RUNNING
                    elif known.state == DONE and entry.state == WAITING and finished(entry):
                        values["state"] = DONE
                    elif known.state == FAILED and entry.state == WAITING and known.kind not in retry:
                        values |= {"state": FAILED, "kind": known.kind, "error": known.error}
                marks = ", ".join(f":{name}" for name in _FIELDS)
                changes = ", ".join(f"{name} = excluded.{name}" for name in _FIELDS[1:])
                added = f"INSERT INTO jobs ({', '.join(_FIELDS)}) VALUES ({marks})"
                database.execute(f"{added} ON CONFLICT (job) DO UPDATE SET {changes}", values)
                database.execute("INSERT OR IGNORE INTO mine VALUES (?)", (entry.job,))

    def claim(self, settings: str, most: int) -> list[Entry]:
        """Takes waiting items of the same settings, and holds them for this runner.

        Where others work on the folder, no more than a share of what is left, so that all finish together.
        """
        with self._changing() as database:
            self._take_over(database)
            where = f"state = '{WAITING}' AND settings = ? AND job IN (SELECT job FROM mine)"
            [[waiting]] = database.execute(f"SELECT count(*) FROM jobs WHERE {where}", (settings,))
            if others := len(self._others(database)):
                most = min(most, math.ceil(waiting / (2 * (others + 1))))
            order = f"attempts > {SUSPECT_ATTEMPTS}, kind IS NOT NULL, position"
            found = database.execute(f"{_SELECT} WHERE {where} ORDER BY {order} LIMIT ?", (settings, most)).fetchall()
            taken = [Entry(*row) for row in found]
            database.executemany(
                f"UPDATE jobs SET state = '{RUNNING}', runner = ?, attempts = attempts + 1 WHERE job = ?",
                [(self.me, entry.job) for entry in taken],
            )
        return taken

    def holds(self, job: str) -> bool:
        """Whether an item is still this runner's: it may have been taken over from one that was silent too long."""
        with self._lock:
            row = self._database.execute("SELECT state, runner FROM jobs WHERE job = ?", (job,)).fetchone()
        return bool(row == (RUNNING, self.me))

    def finish(self, job: str, seconds: float) -> None:
        """An item's files are there."""
        self._end(job, DONE, None, None, seconds)

    def fail(self, job: str, kind: str, error: str, *, again: bool = False) -> None:
        """An item could not be made; `again` tries it once more when the others are done."""
        self._end(job, WAITING if again else FAILED, kind, error, None)

    def release(self, jobs: Sequence[str]) -> None:
        """Gives back items that were taken and not made, as if they never had been."""
        with self._changing() as database:
            database.executemany(
                f"UPDATE jobs SET state = '{WAITING}', attempts = attempts - 1 "
                f"WHERE job = ? AND state = '{RUNNING}' AND runner = ?",
                [(job, self.me) for job in jobs],
            )

    def entries(self) -> list[Entry]:
        """The items of this run, in their order."""
        with self._lock:
            return _entries(self._database, "WHERE job IN (SELECT job FROM mine)")

    def attempts(self, job: str) -> int:
        """How often an item was taken."""
        with self._lock:
            row = self._database.execute("SELECT attempts FROM jobs WHERE job = ?", (job,)).fetchone()
        return int(row[0]) if row else 0

    def unfinished(self) -> list[str]:
        """Items that wait or are being made, those of other runs included."""
        query = f"SELECT job FROM jobs WHERE state IN ('{WAITING}', '{RUNNING}')"
        with self._lock:
            return [job for [job] in self._database.execute(query)]

    def counts(self) -> dict[str, int]:
        """Items of this run by state."""
        query = "SELECT state, count(*) FROM jobs WHERE job IN (SELECT job FROM mine) GROUP BY state"
        with self._lock:
            found = dict(self._database.execute(query).fetchall())
        return {state: found.get(state, 0) for state in (WAITING, RUNNING, DONE, FAILED)}

    def steps_ended(self) -> int:
        """Training steps of the items of this run that are done or failed."""
        query = f"SELECT total(steps) FROM jobs WHERE state IN ('{DONE}', '{FAILED}') AND job IN (SELECT job FROM mine)"
        with self._lock:
            [[steps]] = self._database.execute(query)
        return int(steps)

    def take_over(self) -> None:
        """Gives items of runners that are gone back to whoever asks."""
        with self._changing() as database:
            self._take_over(database)

    def note(self, name: str, value: Any) -> None:
        """Keeps a plain value."""
        with self._changing() as database:
            database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def report(self, steps: int, seconds: float, training: int, slots: int) -> None:
        """Says how far this runner is, see `Runner`; written with the next heartbeat."""
        self._progress = (steps, seconds, training, slots)

    def _end(self, job: str, state: str, kind: str | None, error: str | None, seconds: float | None) -> None:
        with self._changing() as database:
            database.execute(
                "UPDATE jobs SET state = ?, kind = ?, error = ?, seconds = ? WHERE job = ? AND runner = ?",
                (state, kind, error, seconds, job, self.me),
            )

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer interferes with."""
        try:
            with self._lock:
                self._database.execute("BEGIN IMMEDIATE")
                try:
                    yield self._database
                    reach("before-commit")
                except BaseException:
                    self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise _unwritable(self._path, error) from error
        reach("committed")

    def _others(self, database: sqlite3.Connection) -> list[Runner]:
        """The other runners, those that are gone left out."""
        return [runner for runner in _runners(database) if runner.id != self.me and not self._gone(runner)]

    def _gone(self, runner: Runner) -> bool:
        """Whether a runner has ended: seen on its own machine, else by its silence on the clock of this process."""
        alive = runner.owner.alive
        if alive is not None:
            return not alive
        now = time.monotonic()
        beat, since = self._silent.get(runner.id, (runner.beat, now))
        if beat != runner.beat:
            since = now
        self._silent[runner.id] = (runner.beat, since)
        return now - since > LEASE_S

    def _take_over(self, database: sqlite3.Connection) -> None:
        for runner in _runners(database):
            if runner.id != self.me and self._gone(runner):
                database.execute("DELETE FROM runners WHERE id = ?", (runner.id,))
        database.execute(
            f"UPDATE jobs SET state = '{WAITING}' WHERE state = '{RUNNING}' AND runner NOT IN (SELECT id FROM runners)"
        )

    def _beat(self) -> None:
        """Shows others that this runner is alive, from a thread of its own."""
        database = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None)
        while not self._stop.wait(HEARTBEAT_S):
            # Only to be seen: what cannot be written now is written next time, or the run ends by itself.
            with contextlib.suppress(sqlite3.Error):
                database.execute(
                    "UPDATE runners SET beat = beat + 1, steps = ?, seconds = ?, training = ?, slots = ? WHERE id = ?",
                    (*self._progress, self.me),
                )
        database.close()


@dataclass(frozen=True)
class Snapshot:
    """What a ledger says at one moment."""

    entries: tuple[Entry, ...]
    runners: tuple[Runner, ...]
    notes: Mapping[str, Any]


def snapshot(path: Path) -> Snapshot | None:
    """What the ledger at `path` says, changing nothing; None where there is none that can be read."""
    if not path.is_file():
        return None
    # Writing, which is needed to leave no files beside it; reading alone where the folder cannot be written.
    for mode in ("rw", "ro", "ro&immutable=1"):
        try:
            address = f"{path.absolute().as_uri()}?mode={mode}"
            with contextlib.closing(sqlite3.connect(address, uri=True, timeout=_BUSY_S)) as database:
                database.execute("BEGIN")
                notes = {name: json.loads(value) for name, value in database.execute("SELECT name, value FROM notes")}
                runners = tuple(r for r in _runners(database) if r.owner.alive is not False)
                return Snapshot(tuple(_entries(database)), runners, notes)
        except (sqlite3.Error, ValueError):
            continue
    return None


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        # First of all, since a damaged file says so only when it is read.
        [[version]] = database.execute("PRAGMA user_version")
        [[verdict]] = database.execute("PRAGMA quick_check(1)")
        if verdict != "ok" or version not in (0, VERSION):
            raise sqlite3.DatabaseError(f"version {version}, {verdict}")
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        database.executescript(_SCHEMA)
    except BaseException:
        database.close()
        raise
    return database


def _entries(database: sqlite3.Connection, where: str = "") -> list[Entry]:
    return [Entry(*row) for row in database.execute(f"{_SELECT} {where} ORDER BY position, place")]


def _runners(database: sqlite3.Connection) -> list[Runner]:
    fields = "id, host, boot, pid, started, beat, steps, seconds, training, slots"
    found = database.execute(f"SELECT {fields} FROM runners ORDER BY id")
    return [Runner(id, Owner(host, boot, pid, started), *rest) for id, host, boot, pid, started, *rest in found]


def _unwritable(path: Path, error: sqlite3.Error) -> OutputUnwritableError:
    return OutputUnwritableError(
        f"the ledger {path} cannot be written ({error}); make room or choose another --out, then run the command again"
    )
