"""The temporary folders of Ray actors, which contain photos.

A folder's name tells the process that uses it, so any process of the same machine can remove it once that one has
ended.
"""

import hashlib
import shutil
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from ..ledger.owner import Owner

_PREFIX = "lowmem-imagic-ray"
_PATIENCE_S = 3.0
_POLL_S = 0.05


def new_folder() -> Path:
    """A new temporary folder for this process."""
    me = Owner.of_this_process()
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}-{_machine(me)}-{me.pid}-{me.started}-"))


def remove_abandoned(ending: Collection[Owner] = ()) -> None:
    """Removes the folders of this machine's processes that have ended.

    Args:
        ending: processes that are about to end; those of this machine are waited for, a few seconds at most.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while any(process.alive for process in ending) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    me = Owner.of_this_process()
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}-{_machine(me)}-*"):
        pid, started = [*path.name.split("-"), "", ""][4:6]
        if pid.isdecimal() and Owner(me.host, me.boot, int(pid), started).alive is False:
            shutil.rmtree(path, ignore_errors=True)


def _machine(process: Owner) -> str:
    """A word for the machine's start and the space of process numbers; folders may be on a shared disk."""
    return hashlib.sha256(process.boot.encode()).hexdigest()[:12]
