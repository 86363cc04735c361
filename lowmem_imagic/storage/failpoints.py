"""Failpoints: places between two durable steps where a test can kill the process, like a power cut.

``LOWMEM_IMAGIC_FAILPOINT=renamed`` kills this process with SIGKILL when it reaches the failpoint ``renamed`` for the
first time, ``renamed:3`` for the third time; ``renamed:3:stop`` suspends it there until SIGCONT. Without the variable,
as always outside tests, a failpoint costs one comparison. The count is of the whole process, which is killed.
"""

import os
import signal

_NAME, _, _MORE = os.environ.get("LOWMEM_IMAGIC_FAILPOINT", "").partition(":")
_COUNT, _, _HOW = _MORE.partition(":")
_left = int(_COUNT or 1) if _NAME else 0


def reach(name: str) -> None:
    """Kills or suspends the process if this failpoint is set."""
    global _left
    if name == _NAME:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGSTOP if _HOW == "stop" else signal.SIGKILL)
