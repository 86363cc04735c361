"""Whether an item is finished, told from its files alone.

An item's report is written last. It names the job and the SHA-256 of every other file, so a folder whose files agree
with it is finished, whatever anything else says.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..storage.file_names import MAX_REPORT_BYTES, REPORT
from ..storage.regular_files import open_regular, read_regular

EMPTY, UNFINISHED, FINISHED, OTHER = "empty", "unfinished", "finished", "other"


def item_state(folder: Path, job: str) -> str:
    """The state of an item by its folder: nothing there (`EMPTY`), the job begun (`UNFINISHED`) or `FINISHED`, or
    something else (`OTHER`)."""
    try:
        report = _report(folder)
        if report["job"] != job:
            return OTHER
        return FINISHED if report["finished"] is True and _whole(folder, report["sha256"]) else UNFINISHED
    except FileNotFoundError:
        return _without_report(folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return OTHER


def report_of(folder: Path) -> dict[str, Any] | None:
    """The report of a folder with a finished item; None for any other."""
    try:
        report = _report(folder)
        return report if report["finished"] is True and isinstance(report["job"], str) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _report(folder: Path) -> Any:
    return json.loads(read_regular(folder / REPORT, MAX_REPORT_BYTES).decode())


def _whole(folder: Path, digests: dict[str, str]) -> bool:
    """Whether every file is there as it was written."""
    for name, digest in digests.items():
        # A report names files of its own folder and nothing else.
        if Path(name).name != name:
            return False
        try:
            with open_regular(folder / name, follow=False) as (file, _):
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return False
        if found != digest:
            return False
    return True


def _without_report(folder: Path) -> str:
    """Nothing, but for files that are hidden, as temporaries are; or something else."""
    try:
        return OTHER if any(not path.name.startswith(".") for path in folder.iterdir()) else EMPTY
    except FileNotFoundError:
        return EMPTY
    except OSError:
        return OTHER
