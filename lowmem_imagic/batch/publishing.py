"""Moves an item's files into its folder; the report, which marks the item as finished, comes last (see `outputs`).

Every step moves a file between the attempt's folder and the item's. So no step succeeds once another attempt has begun
(see `attempts`). The first step puts a report in place. In an empty folder it fails if another run has put one there
meanwhile: of two runs with different items of one name, one gets the folder.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..actions.result_folder import ResultFolder, encode_report, pictures_of_report
from ..errors import OutputExistsError, OutputUnwritableError
from ..storage.atomic import link_new, remove_temporaries, sync_folder, write_bytes
from ..storage.failpoints import reach
from ..storage.file_names import REPORT
from ..storage.writable import unusable
from . import outputs
from .attempts import Attempt


def staged(attempt: Attempt) -> ResultFolder:
    """The folder for an item's files until they are published."""
    return ResultFolder(attempt.files, overwrite=True, make_parents=False)


def publish(
    attempt: Attempt,
    results: ResultFolder,
    folder: Path,
    job: str,
    report: Mapping[str, Any] | None,
    *,
    force: bool = False,
) -> bool:
    """Moves an item's files into its folder, the report last; returns False if another attempt has begun.

    Removes pictures of an earlier report that this run did not make.

    Args:
        attempt: the attempt that made the files.
        results: folder of the files.
        folder: the item's folder.
        job: the item's job.
        report: the report; None for an unfinished item with files worth keeping.
        force: replace other contents of the folder.

    Raises:
        OutputUnwritableError: the folder cannot be written.
        OutputExistsError: the folder is not free, see `check_free`.
    """
    try:
        _publish(attempt, results, folder, job, report, force)
    except OSError as error:
        if attempt.current:
            raise unusable(folder, error) from error
        return False
    except OutputUnwritableError:
        if attempt.current:
            raise
        return False
    return True


def publish_files(attempt: Attempt, files: Mapping[str, bytes], folder: Path, job: str, *, force: bool = False) -> bool:
    """Publishes files from another machine, their report included; see `publish`.

    Raises:
        OutputUnwritableError: the folder cannot be written.
        OutputExistsError: the folder is not free, see `check_free`.
    """
    results, report = staged(attempt), json.loads(files[REPORT])
    try:
        for name, data in files.items():
            if name != REPORT and Path(name).name == name:
                results.write(name, data)
    except OutputUnwritableError:
        if attempt.current:
            raise
        return False
    return publish(attempt, results, folder, job, report if report["finished"] else None, force=force)


def check_free(folder: Path, job: str, *, force: bool) -> str:
    """Checks that an item's folder may be written; returns its state, see `outputs.item_state`.

    A run asks at its start, to fail before any work, and again before it writes: that may be hours later.

    Args:
        folder: the item's folder.
        job: the item's job.
        force: replace other contents.

    Raises:
        OutputExistsError: it is a link, or has other contents and `force` is False.
    """
    state = outputs.item_state(folder, job)
    if folder.is_symlink():
        raise OutputExistsError(
            f"{folder} is a link, expected a folder; links are not written through: remove the link, or give the item "
            "another name"
        )
    if state == outputs.OTHER and not force:
        raise OutputExistsError(f"{folder} holds something else; `force` replaces it, or give the item a name")
    return state


def _publish(
    attempt: Attempt,
    results: ResultFolder,
    folder: Path,
    job: str,
    report: Mapping[str, Any] | None,
    force: bool,
) -> None:
    state = check_free(folder, job, force=force)
    # Without its parents: if the batch's folder was removed meanwhile, it must not be created again.
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder)
    remove_temporaries(folder)
    stale = pictures_of_report(folder)
    # First record the job and the possible pictures, in case the run ends before the item is finished.
    begun = {"job": job, "finished": False, "pictures": sorted(stale | results.files.keys())}
    try:
        _put(attempt, folder, begun, new=state == outputs.EMPTY)
    except FileExistsError:
        check_free(folder, job, force=force)
        _put(attempt, folder, begun)
    # Before the report, so that a report is always true.
    for name in sorted(stale - results.files.keys()):
        if os.path.lexists(folder / name):
            os.replace(folder / name, attempt.folder / "stale")
    for name in sorted(results.files.keys() - {REPORT}):
        reach("before-file")
        os.replace(results.path / name, folder / name)
    sync_folder(folder)
    if report is not None:
        reach("before-report")
        _put(attempt, folder, report)
        sync_folder(folder)
    # Sync the folder's own name, too.
    sync_folder(folder.parent)


def _put(attempt: Attempt, folder: Path, report: Mapping[str, Any], *, new: bool = False) -> None:
    """Puts a report in place.

    Raises:
        FileExistsError: there is one, and `new` is True.
    """
    own = attempt.folder / REPORT
    write_bytes(own, encode_report(report), overwrite=True)
    reach("report-written")
    (link_new if new else os.replace)(own, folder / REPORT)
