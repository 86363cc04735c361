"""Which process holds something, precisely enough to tell later whether it is still there."""

import os
import platform
import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process, on whatever machine."""

    host: str
    """Name of the machine, for people."""
    boot: str
    """Boot id and PID namespace."""
    pid: int
    started: str
    """When the process began, in the kernel's words, so that a number given out again is not taken for it."""

    @staticmethod
    def of_this_process() -> "Owner":
        """This process."""
        return Owner(platform.node(), _boot(), os.getpid(), _started(os.getpid()) or "")

    @property
    def alive(self) -> bool | None:
        """Whether the process is there; None where that cannot be seen from here, as on another machine."""
        if self.boot != _boot():
            return None
        return (_started(self.pid) or "") == self.started

    @property
    def stopped(self) -> bool:
        """Whether the process is there and suspended, as by Ctrl-Z, and that can be seen from here."""
        return bool(self.alive) and is_stopped(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _boot() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return _nowhere()


@cache
def _nowhere() -> str:
    """In place of the boot id where the system has none: no other process has it, and heartbeats decide."""
    return f"unknown {secrets.token_hex(8)}"


def is_stopped(pid: int) -> bool:
    """Whether a process of this machine is suspended."""
    return (_stat(pid) or "?")[0] in "Tt"


def _started(pid: int) -> str | None:
    """When a process began; None for one that is not there, or that has ended and only waits for its parent."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the state on."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > 19 else None
