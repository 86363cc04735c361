"""The ledger's file: its tables, its rows as values, and read-only snapshots."""

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import OutputUnwritableError
from ...storage.regular_files import kind_at
from ...storage.writable import unusable
from .owner import Owner

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

VERSION = 2
BAD = "bad "
"""Beginning of the job of an item that cannot be run."""
EARLIER = "command"
"""Command of all items in a ledger of version 1, which knew only one: the name of its note."""
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
BUSY_S = 60.0
"""Longest wait for the changes of other processes."""
LEASE_S = 60.0
"""Seconds without a heartbeat, measured locally (see `Watch`), after which a runner's items are taken over: it may be
suspended, or have ended on another machine."""
PATIENCE_S = 5.0
"""Seconds of waiting after which a message says so."""
_READS = 40
"""Most reads of a ledger that changes meanwhile."""
_UNTOUCHED = "mode=ro&immutable=1"
"""Options of an address with which sqlite makes no files, and takes no locks."""
_LOG_HEAD = 32
"""Bytes of the head of sqlite's log."""

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
    attempts INTEGER NOT NULL DEFAULT 0, kind TEXT, error TEXT, runner INTEGER, seconds REAL,
    command TEXT NOT NULL DEFAULT '{EARLIER}'
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state, settings, position);
PRAGMA user_version = {VERSION};
"""
_TO_VERSION_2 = f"""
BEGIN IMMEDIATE;
ALTER TABLE jobs ADD COLUMN command TEXT NOT NULL DEFAULT '{EARLIER}';
PRAGMA user_version = 2;
COMMIT;
"""


@dataclass(frozen=True)
class Entry:
    """One item in a ledger."""

    job: str
    """Hash of the inputs of its result; for an item that cannot be run, a unique word."""
    position: int
    """Its index in the manifest."""
    place: str
    """Its place in the manifest, for people."""
    name: str
    """Name of its folder."""
    settings: str = ""
    """Hash of its base and settings, a function of the job's inputs; items with equal ones share a pack."""
    steps: int = 0
    """Number of its training steps."""
    state: str = WAITING
    attempts: int = 0
    kind: str | None = None
    """Kind of its failure, see `failures`."""
    error: str | None = None
    seconds: float | None = None
    """Seconds of training and rendering."""
    command: str = EARLIER
    """The command that asked for it last, as the name of its note; "" if none does any more, and the row stands for a
    training state that may be of use again."""


@dataclass(frozen=True)
class Runner:
    """A process that works, or worked, on a folder."""

    id: int
    owner: Owner
    beat: int
    """Heartbeat: counts up as long as the runner is alive."""
    steps: int
    """Training steps of its finished and failed items."""
    seconds: float
    """Seconds since it began."""
    training: int
    """Steps so far of its edits in training."""
    slots: int
    """Number of its edits in training."""


FIELDS = tuple(Entry.__dataclass_fields__)
SELECT = f"SELECT {', '.join(FIELDS)} FROM jobs"


@dataclass(frozen=True)
class Snapshot:
    """A ledger at one moment."""

    entries: tuple[Entry, ...]
    runners: tuple[Runner, ...]
    notes: Mapping[str, Any]
    """Plain values by name, in the order in which they were stored."""


def snapshot(path: Path) -> Snapshot | None:
    """A snapshot of the ledger at `path`, without changing it; None if there is no readable ledger."""
    try:
        check_plain(path)
    except OutputUnwritableError:
        return None
    if not path.is_file():
        return None
    log = path.with_name(path.name + "-wal")
    for _ in range(_READS):
        before = _moment(path, log)
        seen = None
        with contextlib.suppress(sqlite3.Error, ValueError, OSError):
            seen = _copied(path, log) if before and before[1] else _read(f"{path.absolute().as_uri()}?{_UNTOUCHED}")
        # Otherwise it changed meanwhile. Changes that were added to the log are whole in its copy, or missing.
        if _moment(path, log) == before:
            return seen
        time.sleep(0.05)
    return None


def _copied(path: Path, log: Path) -> Snapshot:
    """A snapshot of a ledger with changes that wait beside it in sqlite's log, from a copy of both.

    On a file system whose locks do not reach other machines, sqlite would take itself for the ledger's only user, and
    remove the log of a run on another machine.
    """
    with tempfile.TemporaryDirectory(prefix="lmi-ledger-") as folder:
        copy = Path(folder) / path.name
        for file in (log, path):
            shutil.copyfile(file, copy.with_name(file.name))
        return _read(copy.as_uri())


def _moment(path: Path, log: Path) -> tuple[int, bytes] | None:
    """When a ledger's own file last changed, and the head of its log, of which a new log has another; None without a
    file."""
    head = b""
    try:
        with contextlib.suppress(FileNotFoundError), open(log, "rb") as file:
            head = file.read(_LOG_HEAD)
        return path.stat().st_mtime_ns, head
    except OSError:
        return None


def _read(address: str) -> Snapshot:
    with contextlib.closing(sqlite3.connect(address, uri=True)) as database:
        database.execute("BEGIN")
        notes = {
            name: json.loads(value) for name, value in database.execute("SELECT name, value FROM notes ORDER BY rowid")
        }
        runners = tuple(r for r in runners_in(database) if r.owner.alive is not False)
        at_work = {runner.id for runner in runners}
        runner_of = dict(database.execute(f"SELECT job, runner FROM jobs WHERE state = '{RUNNING}'"))
        entries = (
            replace(entry, state=WAITING) if entry.job in runner_of and runner_of[entry.job] not in at_work else entry
            for entry in entries_in(database)
            if entry.command
        )
        return Snapshot(tuple(entries), runners, notes)


def opened(path: Path, warn: Callable[[str], None]) -> sqlite3.Connection:
    """Opens the ledger at `path`, and replaces it by a new one if it is damaged.

    Raises:
        OutputUnwritableError: the ledger cannot be read or written, or is of a newer version.
    """
    check_plain(path)
    since = time.monotonic()
    while True:
        try:
            with _locked(path):
                try:
                    return _open(path)
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError as error:
                    _remove_damaged(path)
                    warn(f"the ledger was damaged ({error}) and is made anew from the finished items")
                    return _open(path)
        except sqlite3.Error as error:
            # The first switch of a file to write-ahead logging fails at once if another process does the same.
            if not is_busy(error) or time.monotonic() - since > BUSY_S:
                raise unwritable(path, error) from error
            time.sleep(0.05)


def is_busy(error: sqlite3.Error) -> bool:
    """Whether the error says that another process is using the ledger."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY


def files_of(path: Path) -> Iterator[Path]:
    """Yields the files of a ledger: sqlite's extra files, then the database."""
    yield from (path.with_name(path.name + end) for end in ("-wal", "-shm", ""))


def identity(path: Path) -> tuple[tuple[int, int] | None, ...]:
    """The identities (device, inode) of a ledger's files; None for a missing file."""
    identities: list[tuple[int, int] | None] = []
    for file in files_of(path):
        try:
            status = file.lstat()
            identities.append((status.st_dev, status.st_ino))
        except OSError:
            identities.append(None)
    return tuple(identities)


def check_same(path: Path, known: tuple[tuple[int, int] | None, ...]) -> None:
    """Checks that the open ledger is still the file at `path`: sqlite goes on writing to a deleted file.

    Does nothing if `known` is empty.

    Raises:
        OutputUnwritableError: the file was deleted or replaced.
    """
    if not known or identity(path) == known:
        return
    out = path.parent.parent
    raise OutputUnwritableError(
        f"{path} was deleted or replaced while this run was at work; run the command again, it goes on with the rest"
        if out.is_dir()
        else f"the folder {out} was deleted, moved or unmounted while this run was at work; nothing was made elsewhere"
    )


def check_plain(path: Path) -> None:
    """Checks that the existing files of a ledger are regular files, not links.

    Raises:
        OutputUnwritableError: one of them is a folder, a pipe, a device or a link.
    """
    for file in (*files_of(path), _lock_of(path)):
        if kind_at(file) not in (None, stat.S_IFREG):
            raise OutputUnwritableError(
                f"{file} is a folder, a link or a device, expected a file of the batch; remove it, then run the "
                "command again"
            )


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Within the block only this process opens the ledger, or replaces a damaged one.

    Without the lock, a run with the damaged file still open could take the log of the new file for its own.

    Raises:
        OutputUnwritableError: the lock cannot be taken.
    """
    # A lock of the system, which ends with its process. The file's contents do not matter. The file is not removed,
    # since other processes may be waiting for it.
    try:
        descriptor = os.open(_lock_of(path), os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise unusable(_lock_of(path), error) from error
    try:
        since = time.monotonic()
        while not _lock(descriptor):
            if time.monotonic() - since > BUSY_S:
                raise OutputUnwritableError(
                    f"another run has been opening the ledger {path} for {BUSY_S:.0f} s, and may be suspended; "
                    "continue it or end it, then run the command again"
                )
            time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Locks a file until it is closed; returns False if another process has locked it.

    Returns True on a file system without locks.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def _remove_damaged(path: Path) -> None:
    try:
        for file in files_of(path):
            file.unlink(missing_ok=True)
    except OSError as reason:
        raise OutputUnwritableError(f"the damaged ledger {path} cannot be removed ({reason.strerror})") from reason


def _open(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(path, timeout=PATIENCE_S, isolation_level=None, check_same_thread=False)
    try:
        # Read first: damage shows only in reading.
        [[version]] = database.execute("PRAGMA user_version")
        [[verdict]] = database.execute("PRAGMA quick_check(1)")
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        if version > VERSION:
            # Not removed: runs of that version may be at work.
            raise OutputUnwritableError(
                f"the ledger {path} is of a newer version (its format is {version}, this one writes {VERSION}); update "
                "lowmem-imagic, or delete it, which loses no finished item"
            )
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        if version == 1:
            database.executescript(_TO_VERSION_2)
        elif version != VERSION:
            # The schema sets the version last: with the right version all tables exist, and no lock is needed.
            database.executescript(_SCHEMA)
    except BaseException:
        database.close()
        raise
    return database


def entries_in(database: sqlite3.Connection, where: str = "") -> list[Entry]:
    # A snapshot may be of a ledger of version 1, which lacks the last field.
    there = {name for _, name, *_ in database.execute("PRAGMA table_info(jobs)")}
    fields = ", ".join(name for name in FIELDS if name in there)
    return [Entry(*row) for row in database.execute(f"SELECT {fields} FROM jobs {where} ORDER BY position, place")]


def runners_in(database: sqlite3.Connection) -> list[Runner]:
    fields = "id, host, boot, pid, started, beat, steps, seconds, training, slots"
    rows = database.execute(f"SELECT {fields} FROM runners ORDER BY id")
    return [Runner(id, Owner(host, boot, pid, started), *rest) for id, host, boot, pid, started, *rest in rows]


def unwritable(path: Path, error: sqlite3.Error) -> OutputUnwritableError:
    return OutputUnwritableError(
        f"the ledger {path} cannot be written ({error}); make room or choose another `out`, then run the command again"
    )
