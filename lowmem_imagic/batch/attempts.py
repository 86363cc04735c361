"""Attempts at items, of which the last one alone can put anything in place.

An attempt owns a folder, ``.lowmem-imagic/training/JOB/ATTEMPT``: the training state lies there, and the files until
they are moved into the item's folder (`publishing`). The next attempt begins by renaming that folder to a name of its
own. So a runner that was paused, for a second or a night, and at whatever place, finds that each of its paths leads
nowhere: it can neither save a state, nor add, replace or remove a file of the item, since every such step is a rename
out of its folder or into it. No clock, no lock and no answer of a database has to be trusted for that, only that the
file system renames a folder in one step. The training goes on with the next attempt: the state moves with the folder.
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
"""How often a folder is made that others remove at the same moment, because it is empty."""


@dataclass(frozen=True)
class Attempt:
    """One attempt at an item."""

    folder: Path
    """Its own; never made again once it is gone."""

    @property
    def current(self) -> bool:
        """Whether no other attempt at the item has begun since."""
        return is_plain(self.folder, stat.S_IFDIR)

    @property
    def state(self) -> Path:
        """Where its training state is."""
        return self.folder / _STATE

    @property
    def files(self) -> Path:
        """The folder of its results until they are put in place."""
        return self.folder / _FILES


class Attempts:
    """The attempts at a batch's items.

    Args:
        folder: where their folders are; other parts of the same list have theirs beside it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def begin(self, job: str) -> Attempt:
        """A new attempt at an item; all earlier ones have ended when this returns. The training state is kept.

        Raises:
            OutputUnwritableError: the folder cannot be made.
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
                        # Another may have begun since. Of two, the one whose folder is made later sees the other's.
                        self._end_others(parent.name, mine)
                    break
                except FileNotFoundError:
                    if not left:
                        raise
            with contextlib.suppress(FileNotFoundError):  # ended already by another
                _clear(mine)
        except OSError as error:
            raise unusable(parent, error) from error
        return Attempt(mine)

    def remove(self, attempt: Attempt) -> None:
        """Removes what is left of an attempt."""
        self._put_away(attempt.folder)
        with contextlib.suppress(OSError):
            # Where they are empty.
            attempt.folder.parent.rmdir()
            attempt.folder.parent.parent.rmdir()

    def keep(self, wanted: Callable[[], Sequence[str]]) -> None:
        """Removes the folders of all items but those wanted."""
        with contextlib.suppress(OSError):
            if not is_plain(self._folder, stat.S_IFDIR):
                return
            # Listed first: what another run begins in between is then not in the list.
            found = [path.name for path in self._folder.iterdir()]
            kept = set(wanted())
            for job in found:
                if job not in kept:
                    self._put_away(self._folder / job)
            self._folder.rmdir()  # where it is empty

    def _put_away(self, path: Path) -> None:
        """Removes a folder, or nothing of it: it gets a name that no attempt has, then its files are removed."""
        away = self._folder / f"{_ENDED}{secrets.token_hex(8)}"
        with contextlib.suppress(OSError):
            if not path.name.startswith(_ENDED):
                os.rename(path, away)
                path = away
            _discard(path)

    def _make(self, parent: Path) -> None:
        """Makes an item's folder, and the one above it; a link in the place of either is not followed."""
        _make_plain(self._folder)
        if kind_at(parent) not in (None, stat.S_IFDIR):
            _discard(parent)
        _make_plain(parent)

    def _end_others(self, job: str, mine: Path) -> None:
        """Takes the folders of all other attempts at an item away, and the first of them for this one."""
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
        """This part's folder first, then those of the others."""
        yield self._folder
        stem = self._folder.name.partition("-")[0]
        for path in self._folder.parent.glob(f"{stem}*"):
            if path != self._folder and is_plain(path, stat.S_IFDIR):
                yield path


def check_hidden(folder: Path) -> None:
    """Makes sure that a batch's own folder, and those in it, are no links to another place.

    Raises:
        OutputUnwritableError: one is.
    """
    try:
        inside = [folder, *folder.iterdir()] if is_plain(folder, stat.S_IFDIR) else [folder]
    except OSError as error:
        raise unusable(folder, error) from error
    for path in inside:
        if path.is_symlink():
            raise OutputUnwritableError(
                f"{path} is a link, expected a folder or file of the batch's own; nothing is written through it: "
                "remove the link, then run the command again"
            )


def _make_plain(folder: Path) -> None:
    """Makes a folder where there is none."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    if not is_plain(folder, stat.S_IFDIR):
        raise NotADirectoryError(f"{folder} is a link or no folder")


def _clear(folder: Path) -> None:
    """Removes everything in an attempt's folder but its training state."""
    for path in folder.iterdir():
        if path.name != _STATE or not is_plain(path, stat.S_IFREG):
            _discard(path)


def _discard(path: Path) -> None:
    """Removes whatever is at a path; of a link the link alone."""
    if is_plain(path, stat.S_IFDIR):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
