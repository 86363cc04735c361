"""The ledger: runners and the states of items, in a sqlite file that several processes share.

The ledger is a cache. The verified files of an item decide whether it is finished (`outputs`); a lost or damaged ledger
is made anew from them. Only the counts of attempts, the errors and the training states of other commands are lost with
it.

Several commands may work in one folder, one after the other or at the same time. Each item belongs to the command that
asked for it last, and stays when another command is run.
"""

import contextlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ...errors import OutputUnwritableError
from ...storage.failpoints import reach
from . import file as ledger_file
from .file import (
    BAD,
    DONE,
    EARLIER,
    FAILED,
    FIELDS,
    LEASE_S,
    RUNNING,
    SELECT,
    WAITING,
    Entry,
    Runner,
    check_same,
    entries_in,
    identity,
    is_busy,
    opened,
    runners_in,
    snapshot,
    unwritable,
)
from .owner import Owner
from .watch import Watch

HEARTBEAT_S = 5.0
SUSPECT_ATTEMPTS = 3
"""Attempts after which an item is claimed last, and alone, so that an item that crashes its process does not stop the
others."""


class Ledger:
    """The ledger of a folder, for one runner; see `opened`.

    Every change is one transaction, on disk when the call returns.
    """

    _open: ClassVar[set[tuple[Path, int]]] = set()
    """The ledgers that this process has open: file and runner's number."""

    def __init__(self, path: Path, *, warn: Callable[[str], None] = lambda text: None) -> None:
        self._path, self._warn = path, warn
        self._watch = Watch(2 * HEARTBEAT_S)
        self._lock = threading.Lock()
        self._progress = (0, 0.0, 0, 0)
        self._stop = threading.Event()
        self._owner = Owner.of_this_process()
        self._identity: tuple[tuple[int, int] | None, ...] = ()
        self._database = opened(path, warn)
        try:
            with self._changing() as database:
                fields, values = "host, boot, pid, started", (self._owner.host, self._owner.boot, *self._process)
                self.me = int(
                    database.execute(f"INSERT INTO runners ({fields}) VALUES (?, ?, ?, ?)", values).lastrowid or 0
                )
            self._identity = identity(path)
        except BaseException:
            self._database.close()
            raise
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        try:
            self._heart.start()
        except RuntimeError:
            self._database.close()
            raise
        self._open.add((path, self.me))

    def close(self) -> None:
        """Closes the ledger; unfinished items of this runner wait for other runners."""
        self._stop.set()
        self._heart.join()
        with contextlib.suppress(OutputUnwritableError), self._changing() as database:
            database.execute(
                f"UPDATE jobs SET state = '{WAITING}' WHERE state = '{RUNNING}' AND runner = ?", (self.me,)
            )
            database.execute("DELETE FROM runners WHERE id = ?", (self.me,))
        self._open.discard((self._path, self.me))
        self._database.close()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def register(
        self,
        entries: Sequence[Entry],
        *,
        finished: Callable[[Entry], bool],
        retry: Sequence[str] = (),
        command: str = EARLIER,
        states: Collection[str] = (),
    ) -> None:
        """Adds the items of this run to the ledger.

        If no other runner is at work, it forgets what these items replace, see `_forget`.

        Args:
            entries: the items with their state: `WAITING`, `DONE` or `FAILED`.
            finished: checks an item again that another runner has marked as finished meanwhile.
            retry: kinds of failure to try again.
            command: name of the command that asks for them.
            states: jobs with a training state on disk.
        """
        with self._changing() as database:
            self._take_over(database)
            before = {entry.job: entry for entry in entries_in(database)}
            database.execute("CREATE TEMP TABLE IF NOT EXISTS mine (job TEXT PRIMARY KEY)")
            database.execute("DELETE FROM mine")
            for entry in entries:
                known = before.get(entry.job)
                values = {name: getattr(entry, name) for name in FIELDS} | {"command": command}
                if known is not None:
                    values |= {"attempts": known.attempts, "seconds": known.seconds}
                    if known.state == RUNNING and entry.state == WAITING:
                        values["state"] = RUNNING
                    elif known.state == DONE and entry.state == WAITING and finished(entry):
                        values["state"] = DONE
                    elif known.state == FAILED and entry.state == WAITING and known.kind not in retry:
                        values |= {"state": FAILED, "kind": known.kind, "error": known.error}
                marks = ", ".join(f":{name}" for name in FIELDS)
                changes = ", ".join(f"{name} = excluded.{name}" for name in FIELDS[1:])
                added = f"INSERT INTO jobs ({', '.join(FIELDS)}) VALUES ({marks})"
                database.execute(f"{added} ON CONFLICT (job) DO UPDATE SET {changes}", values)
                database.execute("INSERT OR IGNORE INTO mine VALUES (?)", (entry.job,))
            if not self._others(database):
                self._forget(database, command, states)

    def _forget(self, database: sqlite3.Connection, command: str, states: Collection[str]) -> None:
        """Forgets items that this run's items replace, and commands without items.

        These are the earlier items of the same command, except finished ones that its list no longer has, and items of
        other commands whose folder an item of this run gets. An unfinished one with a training state stays in the
        ledger without a command, until a job of its folder is finished.
        """
        database.execute("CREATE TEMP TABLE IF NOT EXISTS saved (job TEXT PRIMARY KEY)")
        database.execute("DELETE FROM saved")
        database.executemany("INSERT OR IGNORE INTO saved VALUES (?)", [(job,) for job in states])
        own = "SELECT name FROM jobs WHERE job IN (SELECT job FROM mine)"
        # An item that cannot be run leaves a folder as it is.
        gets = f"{own} AND NOT (job LIKE '{BAD}%')"
        replaced = (
            f"state != '{RUNNING}' AND job NOT IN (SELECT job FROM mine) AND ("
            f"(command = :command AND (state != '{DONE}' OR name IN ({own}))) OR name IN ({gets}))"
        )
        database.execute(f"UPDATE jobs SET command = '' WHERE {replaced}", {"command": command})
        done = f"SELECT name FROM jobs WHERE state = '{DONE}' AND command != ''"
        database.execute(
            f"DELETE FROM jobs WHERE command = '' AND (state = '{DONE}' OR name IN ({done}) "
            "OR job NOT IN (SELECT job FROM saved))"
        )
        database.execute(
            f"DELETE FROM notes WHERE name LIKE '{EARLIER}%' AND name != ? AND name NOT IN (SELECT command FROM jobs)",
            (command,),
        )

    def claim(
        self,
        settings: str,
        most: int,
        *,
        without: Collection[str] = (),
        begin: Callable[[Entry], None] = lambda entry: None,
    ) -> list[Entry]:
        """Claims waiting items with the same settings for this runner.

        If other runners are at work, it claims at most a share of the waiting items, so that all finish together.

        Args:
            settings: the items' `Entry.settings`.
            most: most items to claim.
            without: jobs that this runner is working on; another runner may have taken them over unnoticed.
            begin: called for each item before the claim becomes visible to others.
        """
        with self._changing() as database:
            self._sign_in(database)
            self._take_over(database)
            database.execute("CREATE TEMP TABLE IF NOT EXISTS under_way (job TEXT PRIMARY KEY)")
            database.execute("DELETE FROM under_way")
            database.executemany("INSERT OR IGNORE INTO under_way VALUES (?)", [(job,) for job in without])
            # The plus keeps sqlite from looking up every job of this run: it reads rows in order, up to the limit.
            where = (
                f"state = '{WAITING}' AND settings = ? AND +job IN (SELECT job FROM mine) "
                "AND +job NOT IN (SELECT job FROM under_way)"
            )
            if others := len(self._others(database)):
                enough = 2 * (others + 1) * most
                query = f"SELECT count(*) FROM (SELECT 1 FROM jobs WHERE {where} LIMIT ?)"
                [[waiting]] = database.execute(query, (settings, enough))
                most = min(most, math.ceil(waiting / (2 * (others + 1))))
            rows: list[Any] = []
            # Two queries, each in the order of the index: one sorted by failures would read all waiting items.
            for earlier in ("kind IS NULL", "kind IS NOT NULL"):
                query = (
                    f"{SELECT} WHERE {where} AND attempts <= {SUSPECT_ATTEMPTS} AND {earlier} ORDER BY position LIMIT ?"
                )
                rows += database.execute(query, (settings, most - len(rows)))
                if len(rows) == most:
                    break
            if not rows and not self._at_work(database):
                # Alone: if this item crashes the process, no other item loses its training or gets the blame.
                order = "attempts, kind IS NOT NULL, position"
                rows = database.execute(f"{SELECT} WHERE {where} ORDER BY {order} LIMIT 1", (settings,)).fetchall()
            entries = [Entry(*row) for row in rows]
            for entry in entries:
                begin(entry)
            database.executemany(
                f"UPDATE jobs SET state = '{RUNNING}', runner = ?, attempts = attempts + 1 WHERE job = ?",
                [(self.me, entry.job) for entry in entries],
            )
        return entries

    def finish(self, job: str, seconds: float) -> None:
        """Records that an item's files are published."""
        self._end(job, DONE, None, None, seconds)

    def fail(self, job: str, kind: str, error: str, *, again: bool = False) -> None:
        """Records that an item failed; with `again`, it is tried once more after the others."""
        self._end(job, WAITING if again else FAILED, kind, error, None)

    def release(self, jobs: Sequence[str], *, tried: bool = False) -> int:
        """Releases claimed items that were not made; with `tried`, the attempt still counts.

        Returns the number of them that still belonged to this runner.
        """
        with self._changing() as database:
            changed = database.executemany(
                f"UPDATE jobs SET state = '{WAITING}', attempts = attempts - {int(not tried)} "
                f"WHERE job = ? AND state = '{RUNNING}' AND runner = ?",
                [(job, self.me) for job in jobs],
            )
            return max(0, changed.rowcount)

    def entries(self) -> list[Entry]:
        """The items of this run, in their order."""
        with self._reading() as database:
            return entries_in(database, "WHERE job IN (SELECT job FROM mine)")

    def unfinished(self, failed: Sequence[str] = ()) -> list[str]:
        """Jobs that are waiting or running, or failed in one of these kinds; those of other runs and commands included,
        unless another job of the item's folder is finished."""
        kinds = ", ".join("?" * len(failed))
        query = (
            "SELECT job FROM jobs WHERE "
            f"(state IN ('{WAITING}', '{RUNNING}') OR state = '{FAILED}' AND kind IN ({kinds})) "
            f"AND (command != '' OR name NOT IN (SELECT name FROM jobs WHERE state = '{DONE}'))"
        )
        with self._reading() as database:
            return [job for [job] in database.execute(query, list(failed))]

    def counts(self) -> dict[str, int]:
        """The number of this run's items by state."""
        query = "SELECT state, count(*) FROM jobs WHERE job IN (SELECT job FROM mine) GROUP BY state"
        with self._reading() as database:
            counts = dict(database.execute(query).fetchall())
        return {state: counts.get(state, 0) for state in (WAITING, RUNNING, DONE, FAILED)}

    def steps_ended(self) -> int:
        """Training steps of this run's finished and failed items."""
        query = f"SELECT total(steps) FROM jobs WHERE state IN ('{DONE}', '{FAILED}') AND job IN (SELECT job FROM mine)"
        with self._reading() as database:
            [[steps]] = database.execute(query)
        return int(steps)

    def take_over(self) -> None:
        """Releases the items of runners that have ended."""
        with self._changing() as database:
            self._take_over(database)

    def note(self, name: str, value: Any) -> None:
        """Stores a plain value under a name."""
        with self._changing() as database:
            database.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, json.dumps(value)))

    def report(self, steps: int, seconds: float, training: int, slots: int) -> None:
        """Sets this runner's progress, see `Runner`; written with the next heartbeat."""
        self._progress = (steps, seconds, training, slots)

    def _end(self, job: str, state: str, kind: str | None, error: str | None, seconds: float | None) -> None:
        with self._changing() as database:
            database.execute(
                "UPDATE jobs SET state = ?, kind = ?, error = ?, seconds = ? WHERE job = ? AND runner = ?",
                (state, kind, error, seconds, job, self.me),
            )

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        """The database, locked for this thread."""
        try:
            with self._lock:
                check_same(self._path, self._identity)
                yield self._database
        except sqlite3.Error as error:
            raise unwritable(self._path, error) from error

    @contextlib.contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that no other writer interferes with."""
        try:
            with self._lock:
                check_same(self._path, self._identity)
                self._begin()
                try:
                    yield self._database
                    reach("before-commit")
                except BaseException:
                    self._database.execute("ROLLBACK")
                    raise
                self._database.execute("COMMIT")
        except sqlite3.Error as error:
            raise unwritable(self._path, error) from error
        reach("committed")

    def _begin(self) -> None:
        """Begins a transaction; waits for other writers."""
        since, told = time.monotonic(), False
        while True:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not is_busy(error):
                    raise
                stopped = [str(one.owner) for one in runners_in(self._database) if one.owner.stopped]
                who = f"{' or '.join(stopped)}, which is suspended" if stopped else "another run"
                if time.monotonic() - since > ledger_file.BUSY_S:
                    raise OutputUnwritableError(
                        f"the ledger {self._path} cannot be written (it is locked by {who}); continue that or end it, "
                        "then run the command again"
                    ) from error
                if not told:
                    self._warn(f"waiting for the ledger, which is locked by {who}")
                told = True

    def _sign_in(self, database: sqlite3.Connection) -> None:
        """Adds this runner again if other runners removed it as dead."""
        database.execute(
            "INSERT OR IGNORE INTO runners (id, host, boot, pid, started) VALUES (?, ?, ?, ?, ?)",
            (self.me, self._owner.host, self._owner.boot, *self._process),
        )

    @property
    def _process(self) -> tuple[int, str]:
        return self._owner.pid, self._owner.started

    def _at_work(self, database: sqlite3.Connection) -> bool:
        """Whether this runner has claimed items."""
        query = f"SELECT EXISTS (SELECT 1 FROM jobs WHERE state = '{RUNNING}' AND runner = ?)"
        [[claimed]] = database.execute(query, (self.me,))
        return bool(claimed)

    def _others(self, database: sqlite3.Connection) -> list[Runner]:
        """The other runners that have not ended."""
        return [runner for runner in runners_in(database) if runner.id != self.me and not self._gone(runner)]

    def _gone(self, runner: Runner) -> bool:
        """Whether a runner has ended: by its process on this machine, else by its silence on this process's clock."""
        if runner.owner == self._owner:
            # Closed in this process, but a full disk kept its row.
            return (self._path, runner.id) not in self._open
        return runner.owner.alive is False or self._watch.silent_s(runner) > LEASE_S

    def _take_over(self, database: sqlite3.Connection) -> None:
        runners = runners_in(database)
        self._watch.look(runners)
        for runner in runners:
            if runner.id != self.me and self._gone(runner):
                its_own = f"state = '{RUNNING}' AND runner = ?"
                [[count]] = database.execute(f"SELECT count(*) FROM jobs WHERE {its_own}", (runner.id,))
                if count and runner.owner.alive is not False:
                    why = "is suspended and " if runner.owner.stopped else ""
                    self._warn(
                        f"{runner.owner} {why}has been silent for {LEASE_S:.0f} s; its items ({count}) go on here"
                    )
                database.execute("DELETE FROM runners WHERE id = ?", (runner.id,))
        database.execute(
            f"UPDATE jobs SET state = '{WAITING}' WHERE state = '{RUNNING}' AND runner NOT IN (SELECT id FROM runners)"
        )

    def _beat(self) -> None:
        """Writes heartbeats; runs in its own thread."""
        # A short timeout, as `close` waits for this thread.
        with contextlib.suppress(sqlite3.Error, OutputUnwritableError):
            check_same(self._path, self._identity)
            with contextlib.closing(sqlite3.connect(self._path, timeout=1.0, isolation_level=None)) as database:
                while not self._stop.wait(HEARTBEAT_S):
                    # A failed heartbeat does no harm: the next one follows, or another write ends the run.
                    check_same(self._path, self._identity)
                    with contextlib.suppress(sqlite3.Error):
                        self._watch.look(runners_in(database))
                        self._sign_in(database)
                        database.execute(
                            "UPDATE runners SET beat = beat + 1, steps = ?, seconds = ?, training = ?, slots = ? "
                            "WHERE id = ?",
                            (*self._progress, self.me),
                        )


def at_work(path: Path, patience_s: float = 3 * HEARTBEAT_S) -> Runner | None:
    """A runner at work with the ledger at `path`; None if there is none.

    A runner on another machine, or from before this one's last start, counts if its heartbeat changes within
    `patience_s`.
    """
    first = snapshot(path)
    if first is None or not first.runners:
        return None
    beats = {runner.id: runner.beat for runner in first.runners}
    end = time.monotonic() + patience_s
    while (seen := snapshot(path)) is not None:
        for runner in seen.runners:
            if runner.owner.alive or runner.beat != beats.get(runner.id):
                return runner
        if not seen.runners or time.monotonic() > end:
            break
        time.sleep(HEARTBEAT_S / 10)
    return None
