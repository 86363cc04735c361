"""Attempts at items; only the latest attempt can write an item's files.

An attempt owns a folder, ``.lowmem-imagic/training/JOB/ATTEMPT``, for the training state and for the item's files until
they are moved into the item's folder (`publishing`). The next attempt begins by renaming that folder to its own name.
All paths of an older attempt are then gone. So a runner that was paused can neither save a state, nor add, replace or
remove a file of the item, since each of these steps is a rename out of its folder or into it. This needs no clock, lock
or database, only a file system that renames a folder in one step. The training state moves with the folder, and the
next attempt continues the training.
"""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputUnwritableError
from ..storage.regular_files import is_plain, kind_at
from ..storage.writable import unusable

_STATE, _FILES, _ENDED = "state", "files", "ended-"
_TRIES = 20
"""Most tries to create a folder that other runs may remove at the same moment, because it is empty."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at an item."""

    folder: Path
    """Its folder; never created again once it is gone."""

    @property
    def current(self) -> bool:
        """Whether it is still the latest attempt at the item."""
        return is_plain(self.folder, stat.S_IFDIR)

    @property
    def state(self) -> Path:
        """Path of its training state."""
        return self.folder / _STATE

    @property
    def files(self) -> Path:
        """The folder of its results until they are published."""
        return self.folder / _FILES


class Attempts:
    """The attempts at a batch's items.

    Args:
        folder: the parent of their folders; other parts of the same list have sibling folders.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, job: str) -> Attempt:
        """Begins a new attempt at an item and ends all earlier ones; keeps the training state.

        Raises:
            OutputUnwritableError: the folder cannot be created.
        """
        parent = self._folder / os.path.basename(job)
        mine = parent / secrets.token_hex(8)
        try:
            for left in reversed(range(_TRIES)):
                try:
                    self._make(parent)
                    self._end_others(parent.name, mine)
                    if not is_plain(mine, stat.S_IFDIR):
                        os.mkdir(mine)
                        # Another attempt may have begun since. Of two, the later one sees the folder of the other.
                        self._end_others(parent.name, mine)
                    break
                except FileNotFoundError:
                    if not left:
                        raise
            with contextlib.suppress(FileNotFoundError):  # another attempt has ended this one already
                _clear(mine)
        except OSError as error:
            raise unusable(parent, error) from error
        return Attempt(mine)

    def jobs(self) -> list[str]:
        """Jobs of the items that have a folder here, and perhaps a training state."""
        with contextlib.suppress(OSError):
            if is_plain(self._folder, stat.S_IFDIR):
                return [path.name for path in self._folder.iterdir()]
        return []

    def leave(self, attempt: Attempt) -> None:
        """Ends an attempt that failed: removes its files, but keeps its training state for a later one."""
        with contextlib.suppress(OSError):
            _clear(attempt.folder)
            if is_plain(attempt.state, stat.S_IFREG):
                return
        self.remove(attempt)

    def remove(self, attempt: Attempt) -> None:
        """Removes an attempt's folder."""
        self._put_away(attempt.folder)
        with contextlib.suppress(OSError):
            # The parents go only if they are empty.
            attempt.folder.parent.rmdir()
            attempt.folder.parent.parent.rmdir()

    def keep(self, wanted: Callable[[], Sequence[str]]) -> None:
        """Removes the folders of all items except the wanted ones."""
        with contextlib.suppress(OSError):
            if not is_plain(self._folder, stat.S_IFDIR):
                return
            # List the folders first: an item that another run begins later must not be in this list.
            jobs = self.jobs()
            kept = set(wanted())
            for job in jobs:
                if job not in kept:
                    self._put_away(self._folder / job)
            self._folder.rmdir()  # if it is empty

    def _put_away(self, path: Path) -> None:
        """Removes a folder: renames it, so that no attempt owns it, then removes its files."""
        away = self._folder / f"{_ENDED}{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            if not path.name.startswith(_ENDED):
                os.rename(path, away)
                path = away
            _discard(path)

    def _make(self, parent: Path) -> None:
        """Creates an item's folder and its parent; does not follow a link at either path."""
        _make_plain(self._folder)
        if kind_at(parent) not in (None, stat.S_IFDIR):
            _discard(parent)
        _make_plain(parent)

    def _end_others(self, job: str, mine: Path) -> None:
        """Ends all other attempts at an item: the first one's folder becomes `mine`, the others are moved into it."""
        for folder in self._of_all_parts():
            if not is_plain(folder / job, stat.S_IFDIR):
                continue
            for other in sorted(set((folder / job).iterdir()) - {mine}):
                if not is_plain(other, stat.S_IFDIR):
                    _discard(other)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    there = is_plain(mine, stat.S_IFDIR)
                    os.rename(other, mine / f"{_ENDED}{secrets.token_hex(4)}" if there else mine)
            if folder != self._folder:
                with contextlib.suppress(OSError):
                    (folder / job).rmdir()
                    folder.rmdir()

    def _of_all_parts(self) -> Iterator[Path]:
        """Yields this part's folder, then the folders of the other parts."""
        yield self._folder
        stem = self._folder.name.partition("-")[0]
        for path in self._folder.parent.glob(f"{stem}*"):
            if path != self._folder and is_plain(path, stat.S_IFDIR):
                yield path


def check_hidden(folder: Path) -> None:
    """Checks that a batch's hidden folder and its entries are not links.

    Raises:
        OutputUnwritableError: one of them is a link.
    """
    try:
        inside = [folder, *folder.iterdir()] if is_plain(folder, stat.S_IFDIR) else [folder]
    except OSError as error:
        raise unusable(folder, error) from error
    for path in inside:
        if path.is_symlink():
            raise OutputUnwritableError(
                f"{path} is a link, expected a folder or file of the batch itself; links are not written through: "
                "remove the link, then run the command again"
            )


def _make_plain(folder: Path) -> None:
    """Creates a folder unless it exists."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if not is_plain(folder, stat.S_IFDIR):
        raise NotADirectoryError(f"{folder} is a link, or not a folder")


def _clear(folder: Path) -> None:
    """Removes everything in an attempt's folder but its training state."""
    for path in folder.iterdir():
        if path.name != _STATE or not is_plain(path, stat.S_IFREG):
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a file, a folder with its contents, or a link but not its target."""
    if is_plain(path, stat.S_IFDIR):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
