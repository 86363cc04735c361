"""Atomic writing: a file appears complete or not at all.

A reader of the target path sees the old file or the new one, never a part, whatever happens to the writer:
the bytes go to a temporary in the same folder, are forced to disk, and only then get their name. A process
killed in between may leave a hidden ``.lowmem-imagic-*.tmp`` behind; no code reads such files. A later write into the
folder removes it once it is old, and `remove_temporaries` at once, where no writer can be at work.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from contextlib import suppress
from pathlib import Path

from lowmem_imagic.errors import OutputExistsError, OutputUnwritableError
from lowmem_imagic.storage.failpoints import reach

_PREFIX, _SUFFIX = ".lowmem-imagic-", ".tmp"
_OWN = re.compile(rf"{re.escape(_PREFIX)}[0-9a-f]{{16}}{re.escape(_SUFFIX)}")
_OLD_S = 3600.0
"""Age of a temporary that is taken for one of a killed writer. A writer that was suspended so long writes again."""

_REASONS = {
    errno.ENOSPC: "no space left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the place is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOTDIR: "a part of the path is not a folder",
    errno.ENOENT: "the folder does not exist",
    errno.EISDIR: "a folder of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
}

# Errors of link() on file systems without hard links (FAT, some network and container mounts).
_NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EINVAL})

# A folder that cannot be opened for reading, or a file system that has no fsync for folders. By then the file
# is in place and its bytes are on disk, so this is no reason to report a failure.
_NO_FOLDER_SYNC = frozenset({errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EBADF})


def write_bytes(path: str | os.PathLike[str], data: bytes | bytearray | memoryview, *, overwrite: bool) -> None:
    """Guarantees that `path` holds exactly `data` on disk, or that nothing there has changed.

    The file's mode is ``0o666 & ~umask``, as for any file a program creates. A symbolic link at `path` is
    replaced, not followed. No temporary is left behind by any exception, KeyboardInterrupt included.

    Args:
        path: The file to write; its folder must exist.
        data: The whole content.
        overwrite: With False an existing `path` is left alone; of several writers at once one wins.

    Raises:
        OutputExistsError: Something is at `path` and `overwrite` is False.
        OutputUnwritableError: No space left, no permission, a read-only or missing folder.
    """
    target = Path(path)
    try:
        # Saves a needless write; the exclusive publishing below makes the final check.
        if not overwrite and os.path.lexists(target):
            raise _exists(target)
        try:
            written_s = _write(target, memoryview(data).cast("B"), overwrite=overwrite)
        except FileNotFoundError:
            # Perhaps the temporary is gone, see `_remove_old`; if the folder is, this fails, too.
            written_s = _write(target, memoryview(data).cast("B"), overwrite=overwrite)
        sync_folder(target.parent)
        _remove_old(target.parent, written_s)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or type(error).__name__
        raise OutputUnwritableError(f"cannot write {target}: {reason}") from error
    except ValueError as error:  # a NUL character in the path
        raise OutputUnwritableError(f"cannot write {str(target)!r}: {error}") from error


def link_new(source: Path, target: Path) -> None:
    """Gives a file a second name, unless something has that name; where links do not exist, the file is renamed.

    Raises:
        FileExistsError: something has the name.
        OSError: the name cannot be given.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        os.replace(source, target)


def make_folder(path: Path, *, parents: bool = True) -> None:
    """Creates a folder and its parents durably: they survive a power cut.

    Raises:
        OSError: a folder cannot be created, or the path is a file.
    """
    try:
        os.mkdir(path)
    except FileExistsError:
        if not path.is_dir():
            raise
        return
    except FileNotFoundError:
        if not parents or path.parent == path:
            raise
        make_folder(path.parent)
        make_folder(path, parents=False)
        return
    sync_folder(path.parent)


def remove_temporaries(folder: Path) -> None:
    """Removes the temporaries of killed writers from a folder; no writer may be at work in it."""
    with suppress(OSError):
        for path in folder.glob(f"{_PREFIX}*{_SUFFIX}"):
            path.unlink(missing_ok=True)


def _remove_old(folder: Path, now_s: float) -> None:
    """Removes the temporaries of killed writers from a folder in which others may be at work.

    Args:
        folder: the folder.
        now_s: the time of the folder's file system, whose clock may not be this machine's.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if _OWN.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    if now_s - entry.stat(follow_symlinks=False).st_mtime > _OLD_S:
                        os.unlink(entry.path)


def _write(target: Path, data: memoryview, *, overwrite: bool) -> float:
    """Guarantees that `target` names a file with `data`; returns the time of that file.

    Raises:
        FileNotFoundError: the folder, or meanwhile the temporary, is not there.
        OutputExistsError, OSError: see `write_bytes`.
    """
    temporary = target.parent / f"{_PREFIX}{secrets.token_hex(8)}{_SUFFIX}"
    try:
        written_s = _write_temporary(temporary, data)
        reach("temporary-written")
        if overwrite:
            os.replace(temporary, target)
        else:
            _publish_new(temporary, target)
        reach("renamed")
        return written_s
    finally:
        # After a replace the temporary is gone already; after a link this removes the second name.
        with suppress(OSError):
            os.unlink(temporary)


def _write_temporary(temporary: Path, data: memoryview) -> float:
    """Guarantees that `temporary`, created here, holds `data` on disk, and returns the time of the file.

    The kernel applies the umask.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        while data:
            data = data[os.write(descriptor, data) :]  # write() may write only a part
        os.fsync(descriptor)
        return os.fstat(descriptor).st_mtime
    finally:
        os.close(descriptor)


def _publish_new(temporary: Path, target: Path) -> None:
    """Guarantees that `target` names the new file and that nothing was overwritten."""
    try:
        os.link(temporary, target)
        return
    except FileExistsError as error:
        raise _exists(target) from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    # Without links: create an empty file with the name, which is exclusive, then replace it by the full one.
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError as error:
        raise _exists(target) from error
    try:
        os.replace(temporary, target)
    except FileNotFoundError:
        os.unlink(target)
        raise
    except BaseException:
        # An interrupt can arrive after the replace succeeded: then the file of that name is finished.
        if os.path.lexists(temporary):
            os.unlink(target)
        raise


def sync_folder(folder: Path) -> None:
    """Guarantees that the names in a folder survive a power cut, if the system supports that."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows has no handle for folders
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def _exists(target: Path) -> OutputExistsError:
    """Returns the error for an occupied name."""
    return OutputExistsError(f"{target} exists already; choose another name or allow overwriting")
