"""Visitors of the studio: each browser's photos, edits and pictures, apart from those of all others.

A visitor is known by a random cookie. All files of a visitor lie in a folder of its own with a random name, and are
served by random names that only this visitor's table knows: no part of a request becomes a path.
"""

import contextlib
import hashlib
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import LowmemImagicError
from ..plain_text import shown
from . import limits
from .card import ENDED, Job

BATCH = re.compile("batch-[0-9]{3,9}")
"""Names of batches."""


class Refused(LowmemImagicError):
    """The studio does not do this for a visitor; the text is for the visitor."""


@dataclass(frozen=True)
class Served:
    """A file that a visitor may fetch."""

    path: Path
    media_type: str
    download: str | None = None
    """The name under which the browser saves it; None shows it."""


@dataclass
class Picture:
    """A rendered picture."""

    seed: int | None
    """The seed that was asked for; None is the edit's own."""
    eta: float
    name: str
    """Name of its file without extension."""
    view: str
    """Token of the small picture."""
    full: str
    """Token of the picture at the photo's own size."""


@dataclass
class Ask:
    """One sentence and its pictures."""

    sentence: str
    values: dict[str, Any]
    """Settings of the form."""
    seeds: tuple[int | None, ...] = (None,)
    """Seeds of its rows; None is the edit's own."""
    pictures: dict[tuple[int | None, float], Picture] = field(default_factory=dict)
    """By seed and eta."""
    sheet: str = ""
    """Token of the sheet."""

    @property
    def rows(self) -> list[list[Picture]]:
        """Its pictures, a row along eta for every seed."""
        ordered = sorted(self.pictures.values(), key=lambda one: one.eta)
        rows = [[one for one in ordered if one.seed == seed] for seed in self.seeds]
        return [row for row in rows if row]

    def lacking(self, etas: Sequence[float]) -> list[tuple[int | None, float]]:
        """Seed and eta of the pictures that it lacks at these etas."""
        return [(seed, eta) for eta in etas for seed in self.seeds if (seed, eta) not in self.pictures]

    def name_of(self, picture: Picture) -> str:
        """The name of one of its pictures: eta, and the seed if there are several."""
        return f"eta {picture.eta:g}" + (f", seed {picture.seed}" if len(self.seeds) > 1 else "")

    @property
    def label(self) -> str:
        """Its line in the history."""
        changed = ", ".join(f"no {name}" if value == "" else f"{name} {value}" for name, value in self.values.items())
        return f"{self.sentence} ({changed})" if changed else self.sentence


@dataclass
class Project:
    """One photo, or one edit file, and all that was made of it."""

    token: str
    folder: Path
    name: str
    photo: Path | None = None
    photo_view: str = ""
    size: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    model: str = ""
    """The base of its edit."""
    made_for: str = ""
    """The base that an edit file names."""
    edit: str = ""
    """Token of the edit file; "" before it is trained."""
    etas: tuple[float, ...] = ()
    start_sentence: str = ""
    """The sentence that its training started from."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Source and negative prompt, if its edit file records them, by the names of their options."""
    zero: Picture | None = None
    """The picture at eta 0."""
    asks: list[Ask] = field(default_factory=list)
    next_eta: tuple[Ask, float] | None = None
    """The eta that was let go last while a job was at work; rendered after it."""
    job: Job | None = None
    paused: bool = False
    """Whether a training was stopped, and its state saved."""
    message: str = ""
    """The last error or remark, in one line."""
    about: str = ""
    """The contents of an edit file in words, some lines."""

    def ask_of(self, label: str | None) -> Ask | None:
        """The ask of a line in its history."""
        return next((one for one in self.asks if one.label == label), None)

    @property
    def busy(self) -> bool:
        """Whether a job of it waits or runs."""
        return self.job is not None and self.job.state not in ENDED


@dataclass
class BatchFolder:
    """A batch of a visitor on disk; it stays when the visitor leaves."""

    path: Path
    job: Job | None = None
    message: str = ""
    packed: str = ""
    """Token of its results in one file."""

    @property
    def results(self) -> Path:
        """The folder that the batch queue writes."""
        return self.path / "results"

    @property
    def photos(self) -> Path:
        """The folder of its photos, which goes when all of it is made."""
        return self.path / "photos"

    @property
    def unfinished(self) -> bool:
        """Whether anything of it is left to make."""
        return self.photos.is_dir()

    @property
    def busy(self) -> bool:
        """Whether its job waits or runs."""
        return self.job is not None and self.job.state not in ENDED


class Visitor:
    """A browser; see the module."""

    def __init__(self, cookie: str, folder: Path, batches: Path) -> None:
        self.cookie = cookie
        self.folder, self.batches_folder = folder, batches
        self.lock = threading.RLock()
        self.projects: dict[str, Project] = {}
        self.files: dict[str, Served] = {}
        self.batches: dict[str, BatchFolder] = {}
        self.uploads: dict[str, int] = {}
        """Bytes of each upload that was not used yet, by its path in the page library's folder."""
        self.tabs = 0
        """Open tabs."""
        self.seen_s = time.monotonic()
        self.ended_s = 0.0
        """When the last job ended."""
        if batches.is_dir():
            for path in sorted(batches.iterdir()):
                if path.is_dir() and BATCH.fullmatch(path.name):
                    self.batches[path.name] = BatchFolder(path)
        self.last_batch = max((int(name.removeprefix("batch-")) for name in self.batches), default=0)
        """The number of the newest batch. A removed one's is not given again: another tab may show it still."""

    @property
    def id(self) -> str:
        """A name of the visitor that does not tell the cookie."""
        return digest_of(self.cookie)

    @property
    def busy(self) -> bool:
        """Whether any job waits or runs."""
        works: list[Project | BatchFolder] = [*self.projects.values(), *self.batches.values()]
        return any(one.busy for one in works)

    @property
    def bytes(self) -> int:
        """Bytes of the uploads that were not used yet, of all files in the folder, and of the photos of batches."""
        files = [*self.folder.rglob("*"), *self.batches_folder.glob("*/photos/*")]
        # Files may go meanwhile.
        with contextlib.suppress(FileNotFoundError):
            return sum(path.stat().st_size for path in files if path.is_file()) + sum(self.uploads.values())
        return self.bytes

    def serve(self, path: Path, media_type: str, download: str | None = None) -> str:
        """The token under which the visitor may fetch a file."""
        token = secrets.token_urlsafe(18)
        self.files[token] = Served(path, media_type, download)
        return token

    def drop(self, token: str) -> None:
        """Deletes a file of the table, if it is there."""
        served = self.files.pop(token, None)
        if served is not None:
            served.path.unlink(missing_ok=True)

    def take_upload(self, path: str, target: Path) -> None:
        """Moves an upload of this visitor to a place of the server's choice.

        Raises:
            Refused: it is no upload of this visitor.
        """
        self.claim_uploads([path])
        move_upload(path, target)

    def claim_uploads(self, paths: Sequence[str]) -> None:
        """Takes uploads of this visitor, all of them or none, for one act alone.

        Raises:
            Refused: one is no upload of this visitor, was taken before, or is named twice.
        """
        with self.lock:
            if len(set(paths)) < len(paths) or not self.uploads.keys() >= set(paths):
                raise Refused("this is no upload of this page, or it is in use already; upload the file again")
            for path in paths:
                del self.uploads[path]

    def project(self, token: str | None) -> Project | None:
        """The project of a token, or else the newest one."""
        with self.lock:
            if token in self.projects:
                return self.projects[token or ""]
            return next(reversed(self.projects.values()), None)

    def required(self, token: str | None) -> Project:
        """The project that an act is for: the one that the page showed.

        Raises:
            Refused: there is none.
        """
        if not token:
            raise Refused("there is no photo yet; choose one first, or open an edit file")
        project = self.projects.get(token)
        if project is None:
            raise Refused("this photo is gone, as the oldest of too many; choose it again")
        return project

    def required_batch(self, name: str | None) -> BatchFolder:
        """The batch that an act is for: the one that the page showed.

        Raises:
            Refused: there is none.
        """
        if not name:
            raise Refused("no batch is chosen")
        batch = self.batches.get(name)
        if batch is None:
            raise Refused(f"{shown(name)} is gone: it was removed in another tab")
        return batch

    def add_project(self, name: str) -> Project:
        """A new project with a folder of its own; the oldest idle one goes if there are too many.

        Raises:
            Refused: all of them are at work.
        """
        with self.lock:
            while len(self.projects) >= limits.MAX_PROJECTS:
                idle = next((one for one in self.projects.values() if not one.busy), None)
                if idle is None:
                    raise Refused(f"{limits.MAX_PROJECTS} photos are at work; wait for one of them")
                self.remove(idle)
            token = secrets.token_urlsafe(18)
            folder = self.folder / secrets.token_hex(12)
            folder.mkdir(parents=True)
            self.projects[token] = Project(token, folder, name)
            return self.projects[token]

    def remove(self, project: Project) -> None:
        """Removes a project with its files."""
        with self.lock:
            self.projects.pop(project.token, None)
            self.files = {token: one for token, one in self.files.items() if project.folder not in one.path.parents}
        shutil.rmtree(project.folder, ignore_errors=True)

    def clear(self) -> None:
        """Deletes all files of the visitor but the results of batches."""
        for path in list(self.uploads):
            with contextlib.suppress(OSError):
                Path(path).unlink()
                Path(path).parent.rmdir()
        self.uploads.clear()
        self.projects.clear()
        self.files.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def move_upload(path: str, target: Path) -> None:
    """Moves an upload that was taken; over file systems this copies it."""
    shutil.move(path, target)
    with contextlib.suppress(OSError):
        Path(path).parent.rmdir()


def digest_of(cookie: str) -> str:
    """A short name of a visitor."""
    return hashlib.sha256(cookie.encode()).hexdigest()[:16]


class Visitors:
    """All visitors, by cookie.

    Args:
        folder: parent of their folders; deleted at the end of the server.
        out: parent of their batches, which stay.
        clock: seconds; for tests.
    """

    def __init__(self, folder: Path, out: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._out, self._clock = folder, out, clock
        self._visitors: dict[str, Visitor] = {}
        self._lock = threading.Lock()

    @staticmethod
    def new_cookie() -> str:
        """A cookie that nobody can guess."""
        return secrets.token_urlsafe(24)

    def of(self, cookie: str) -> Visitor:
        """The visitor of a cookie, seen now."""
        with self._lock:
            visitor = self._visitors.get(cookie)
            if visitor is None:
                name = digest_of(cookie)
                visitor = self._visitors[cookie] = Visitor(cookie, self._folder / name, self._out / name)
            visitor.seen_s = self._clock()
            return visitor

    @property
    def bytes(self) -> int:
        """Bytes of the uploads of all visitors."""
        with self._lock:
            return sum(visitor.bytes for visitor in self._visitors.values())

    def sweep(self) -> list[Visitor]:
        """Deletes the files of visitors who have left, and returns these visitors.

        A visitor has left who has had no tab open for `LEAVE_S`, and no job at work. If a job ended while the visitor
        was away, its results stay for `KEEP_S`.
        """
        now, gone = self._clock(), []
        with self._lock:
            for cookie, visitor in list(self._visitors.items()):
                unseen = visitor.ended_s > visitor.seen_s
                since = max(visitor.seen_s, visitor.ended_s)
                if (
                    not visitor.tabs
                    and not visitor.busy
                    and now - since > (limits.KEEP_S if unseen else limits.LEAVE_S)
                ):
                    del self._visitors[cookie]
                    gone.append(visitor)
        for visitor in gone:
            visitor.clear()
        return gone
