"""Writing an item's folder so that its report, which says that it is finished, comes last (see `outputs`)."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..atomic import remove_temporaries
from ..failpoints import reach
from ..names import REPORT
from ..result_folder import ResultFolder


def publish(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes an item's files as they were made elsewhere, the report last.

    Raises:
        OutputUnwritableError: they cannot be written.
    """
    target = ResultFolder.prepare(folder, overwrite=True)
    remove_temporaries(folder)
    report = json.loads(files[REPORT])
    begin(target, report["job"])
    for name, data in files.items():
        if name != REPORT and Path(name).name == name:
            target.write(name, data)
    end(target, report)


def begin(folder: ResultFolder, job: str) -> None:
    """Says whose folder it is, should the run end before the item is finished."""
    begun = {"job": job, "finished": False, "pictures": sorted(folder.stale)}
    folder.write(REPORT, json.dumps(begun).encode())


def end(folder: ResultFolder, report: Mapping[str, Any]) -> None:
    """Writes the report that makes an item finished."""
    reach("before-report")
    folder.write_report(report)
