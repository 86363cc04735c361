"""The state of an item, from its files alone.

An item's report is written last. It contains the job and the SHA-256 of every other file. A folder whose files match
its report is finished, whatever the ledger says.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ..storage.file_names import MAX_REPORT_BYTES, REPORT
from ..storage.regular_files import open_regular, read_regular

EMPTY, UNFINISHED, FINISHED, OTHER = "empty", "unfinished", "finished", "other"


def item_state(folder: Path, job: str) -> str:
    """The state of an item's folder: no files (`EMPTY`), the job begun (`UNFINISHED`) or `FINISHED`, or other files
    (`OTHER`)."""
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
    """The report of a folder with a finished item; None for any other folder."""
    try:
        report = _report(folder)
        return report if report["finished"] is True and isinstance(report["job"], str) else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def training_seconds(stages: Any) -> float:
    """The seconds of training in the stages that a report has measured; a cascade has a stage 2 for each denoiser."""
    names = [name for name in stages if name.startswith(("embed", "finetune"))] if isinstance(stages, dict) else []
    return sum(seconds_at(stages, name, "seconds") for name in names)


def seconds_at(report: Any, *keys: str) -> float:
    """The seconds under these keys of a report; 0 if they are no valid time."""
    for key in keys:
        report = report.get(key) if isinstance(report, dict) else None
    return float(report) if isinstance(report, int | float) and 0 <= report < 1e9 else 0.0


def _report(folder: Path) -> Any:
    return json.loads(read_regular(folder / REPORT, MAX_REPORT_BYTES).decode())


def _whole(folder: Path, digests: dict[str, str]) -> bool:
    """Whether every file exists and has its digest."""
    for name, digest in digests.items():
        # A report may only name files of its own folder.
        if Path(name).name != name:
            return False
        try:
            with open_regular(folder / name, follow=False) as (file, _):
                actual = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return False
        if actual != digest:
            return False
    return True


def _without_report(folder: Path) -> str:
    """The state of a folder without a report: `EMPTY`, hidden files aside, or `OTHER`."""
    try:
        return OTHER if any(not path.name.startswith(".") for path in folder.iterdir()) else EMPTY
    except FileNotFoundError:
        return EMPTY
    except OSError:
        return OTHER
