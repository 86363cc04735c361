"""Putting an item's files in place so that its report, which says that it is finished, comes last (see `outputs`).

Every step is a rename between the attempt's folder and the item's, so that none succeeds once another attempt has
begun (see `attempts`).
"""

import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..actions.result_folder import ResultFolder, encode_report, pictures_of_report
from ..errors import OutputExistsError, OutputUnwritableError
from ..storage.atomic import remove_temporaries, sync_folder, write_bytes
from ..storage.failpoints import reach
from ..storage.file_names import REPORT
from ..storage.regular_files import is_plain
from ..storage.writable import unusable
from .attempts import Attempt


def staged(attempt: Attempt) -> ResultFolder:
    """The folder that gets an item's files until they are put in place."""
    return ResultFolder(attempt.files, overwrite=True, make_parents=False)


def publish(attempt: Attempt, results: ResultFolder, folder: Path, job: str, report: Mapping[str, Any] | None) -> bool:
    """Moves an item's files into its folder, the report last; whether the attempt is still the last one at the item.

    Pictures that the report of an earlier run names, and this one did not make, are removed.

    Args:
        attempt: whose files they are.
        results: where they are.
        folder: the item's.
        job: the item's.
        report: None for an item that is not finished, of which some files are worth keeping.

    Raises:
        OutputUnwritableError: the folder cannot be written.
        OutputExistsError: the folder is a link.
    """
    try:
        _publish(attempt, results, folder, job, report)
    except OSError as error:
        if attempt.current:
            raise unusable(folder, error) from error
        return False
    except OutputUnwritableError:
        if attempt.current:
            raise
        return False
    return True


def publish_files(attempt: Attempt, files: Mapping[str, bytes], folder: Path, job: str) -> bool:
    """The same as `publish`, for files that were made elsewhere, their report among them.

    Raises:
        OutputUnwritableError: the folder cannot be written.
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
    return publish(attempt, results, folder, job, report if report["finished"] else None)


def check_own(folder: Path) -> None:
    """Makes sure that an item's folder is none that a link leads to.

    Raises:
        OutputExistsError: it is.
    """
    if folder.is_symlink():
        raise OutputExistsError(
            f"{folder} is a link, expected a folder; nothing is written through it: remove the link, or give the item "
            "another name"
        )


def _publish(attempt: Attempt, results: ResultFolder, folder: Path, job: str, report: Mapping[str, Any] | None) -> None:
    check_own(folder)
    # Not those above it: where the batch's folder has gone meanwhile, it is not made anew.
    if not is_plain(folder, stat.S_IFDIR):
        os.mkdir(folder)
    remove_temporaries(folder)
    stale = pictures_of_report(folder)
    # First of all whose folder it is, and what may be in it, should the run end before the item is finished.
    _put(attempt, folder, {"job": job, "finished": False, "pictures": sorted(stale | results.files.keys())})
    # Before the report, so that one that is there is true.
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
    # Its own name, too.
    sync_folder(folder.parent)


def _put(attempt: Attempt, folder: Path, report: Mapping[str, Any]) -> None:
    """Puts a report in place."""
    own = attempt.folder / REPORT
    write_bytes(own, encode_report(report), overwrite=True)
    reach("report-written")
    os.replace(own, folder / REPORT)
