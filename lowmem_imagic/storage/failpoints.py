"""Places at which a test can end the process as a power cut would: between any two durable steps.

``LOWMEM_IMAGIC_FAILPOINT=renamed`` kills this process with SIGKILL when it reaches the place of that name for the
first time, ``renamed:3`` when it does for the third; ``renamed:3:stop`` suspends it there until SIGCONT. Unset, which
is always outside tests, a place costs a look at a variable. Passings are counted for the whole process, which is what
ends.
"""

import os
import signal

_NAME, _, _MORE = os.environ.get("LOWMEM_IMAGIC_FAILPOINT", "").partition(":")
_COUNT, _, _HOW = _MORE.partition(":")
_left = int(_COUNT or 1) if _NAME else 0


def reach(name: str) -> None:
    """Ends the process here, or suspends it, if it was asked for."""
    global _left
    if name == _NAME:
        _left -= 1
        if not _left:
            os.kill(os.getpid(), signal.SIGSTOP if _HOW == "stop" else signal.SIGKILL)
