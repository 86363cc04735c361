"""Checks that results can be written, before any expensive work; files in folders that need not exist."""

import shutil
import tempfile
from pathlib import Path

from ..errors import ConfigError, OutputExistsError, OutputUnwritableError
from .atomic import make_folder, write_bytes

MIN_FREE_BYTES = 32 * 2**20


def check_writable(path: Path) -> None:
    """Checks that files can be written at `path`: its nearest existing folder is neither read-only nor full.

    Raises:
        OutputUnwritableError: they cannot; the message has the reason.
    """
    folder = path
    try:
        while not folder.exists() and folder.parent != folder:
            folder = folder.parent
        if folder == path and not folder.is_dir():
            folder = folder.parent
        if not folder.is_dir():
            raise OutputUnwritableError(f"{folder} is a file, expected a folder; choose another place")
        # Permission bits are unreliable for root and on read-only mounts, so try a real file.
        with tempfile.TemporaryFile(dir=folder):
            pass
        free = shutil.disk_usage(folder).free
    except (OSError, ValueError) as error:
        raise unusable(folder, error) from error
    if free < MIN_FREE_BYTES:
        raise OutputUnwritableError(
            f"{folder} has {free / 2**20:.0f} MB free, expected at least {MIN_FREE_BYTES / 2**20:.0f} MB; make room"
        )


def check_target(path: Path, *, overwrite: bool) -> None:
    """Checks that a file can be written at `path`.

    Raises:
        OutputExistsError: the path exists and `overwrite` is False.
        OutputUnwritableError: the folder cannot be written, or the name is invalid.
    """
    check_writable(path.parent)
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise unusable(path, error) from error
    if not overwrite:
        raise OutputExistsError(f"{path} exists already; name another file, or use `force`")


def write_target(path: Path, data: bytes, *, overwrite: bool, parents: bool = True) -> None:
    """Writes a file, whole or not at all; a missing folder is created, with its own parents if `parents` is True.

    Raises:
        OutputExistsError: something is there meanwhile and `overwrite` is False.
        OutputUnwritableError: it cannot be written.
    """
    try:
        make_folder(path.parent, parents=parents)
    except OSError as error:
        raise unusable(path.parent, error) from error
    write_bytes(path, data, overwrite=overwrite)


def check_ending(path: Path | None, ending: str, *, any_case: bool = False) -> None:
    """Checks the ending of the name of a file to write; None, for a default name, passes.

    Raises:
        ConfigError: it is another one.
    """
    if path is not None and (path.suffix.lower() if any_case else path.suffix) != ending:
        raise ConfigError(f"{path} has the wrong ending, expected a name ending in {ending}")


def unusable(path: Path, error: OSError | ValueError) -> OutputUnwritableError:
    """The error for a path that cannot be written, with the system's reason."""
    reason = getattr(error, "strerror", None) or str(error)
    name = str(path)
    return OutputUnwritableError(
        f"{name if len(name) <= 200 else name[:200] + '...'} cannot be written ({reason}); choose another place"
    )
