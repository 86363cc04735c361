"""Measured numbers with their goals, and measurements in separate processes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent

GIB = float(2**30)


@dataclass(frozen=True)
class Line:
    """One measured number."""

    name: str
    value: float | None
    """None if the measurement failed or was not made."""
    unit: str
    goal: float | None = None
    """The most or the least it may be; None without a goal."""
    at_least: bool = False
    """Whether the goal is a least value."""

    @property
    def passed(self) -> bool | None:
        """Whether the goal is reached; None without a goal or without a number."""
        if self.goal is None or self.value is None:
            return None
        return self.value >= self.goal if self.at_least else self.value <= self.goal

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "passed": self.passed}


def table(lines: Sequence[Line]) -> Iterator[str]:
    """The lines of the printed table."""
    width = max((len(line.name) for line in lines), default=0)
    for line in lines:
        value = "not measured" if line.value is None else f"{line.value:,.3f} {line.unit}"
        least = "at least " if line.at_least else ""
        goal = "" if line.goal is None else f"goal {least}{line.goal:g} {line.unit}"
        verdict = {None: "", True: "passed", False: "MISSED"}[line.passed]
        if line.goal is not None and line.value is None:
            verdict = "unknown"
        yield f"  {line.name:{width}}  {value:>16}  {goal:<14}  {verdict}".rstrip()


def in_gib(size_bytes: float | None) -> float | None:
    """Bytes as GiB."""
    return None if size_bytes is None else round(size_bytes / GIB, 4)


def fresh(
    module: str, *words: str, environment: Mapping[str, str] | None = None, timeout_s: float | None = None
) -> dict[str, Any] | None:
    """The last line printed by ``python -m MODULE WORDS``, a JSON object; None if it fails or takes too long.

    A new process, because memory left by another measurement would count as this one's.
    """
    try:
        done = subprocess.run(
            (sys.executable, "-m", module, *words),
            cwd=REPOSITORY,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        print(f"{module} {' '.join(words)} took more than {timeout_s:.0f} s", file=sys.stderr)
        return None
    if done.returncode:
        print(f"{module} {' '.join(words)} failed ({done.returncode}):\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
