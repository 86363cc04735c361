"""Identifies a process precisely enough to tell later whether it still exists."""

import os
import platform
import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process on any machine."""

    host: str
    """Name of the machine, for people."""
    boot: str
    """Boot id and PID namespace."""
    pid: int
    started: str
    """Start time of the process from the kernel; tells it from a later process with the same number."""

    @staticmethod
    def of_this_process() -> "Owner":
        """This process."""
        return Owner(platform.node(), _boot(), os.getpid(), _started(os.getpid()) or "")

    @property
    def alive(self) -> bool | None:
        """Whether the process exists; None if that is unknown here, as on another machine."""
        if self.boot != _boot():
            return None
        return (_started(self.pid) or "") == self.started

    @property
    def stopped(self) -> bool:
        """Whether the process is known to be suspended, as by Ctrl-Z."""
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
    """Start time of a process; None if it does not exist, or is a zombie."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else fields[19]


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the state on."""
    try:
        # The program's name, in parentheses, may contain spaces and parentheses.
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return fields if len(fields) > 19 else None
