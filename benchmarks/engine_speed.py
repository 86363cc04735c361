"""Seconds of commands from the start of the process to its end.

Each command runs once to warm the disk's cache, which is reported separately, and then three times; the figure is the
median. The edit is of a rendered scene, with the bundled model and the default preset on the CPU.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowmem_imagic.families import DEMO

from .engine_size import has_model, of_sd15
from .goals import REPOSITORY, Line

EDIT_GOAL_S, FAST_GOAL_S, START_GOAL_S, PROMPT_GOAL_S = 60.0, 25.0, 8.0, 1.5
REPEATS = 3


def measure(*, quick: bool, model: str = DEMO) -> tuple[dict[str, Any], list[Line]]:
    """The result and its table."""
    repeats = 1 if quick else REPEATS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        edit_path = folder / "edit.safetensors"
        of_sd15("attn", edit_path)
        help_s = _repeated(["--help"], repeats)
        inspect_s = _repeated(["inspect", str(edit_path)], repeats)
        edit = _edit(folder, model, repeats)
        fast = _edit(folder, model, repeats, "--preset", "fast")
    goal = EDIT_GOAL_S if model == DEMO else None
    lines = [
        Line("lowmem-imagic --help", _median(help_s), "s", PROMPT_GOAL_S),
        Line("lowmem-imagic inspect", _median(inspect_s), "s", PROMPT_GOAL_S),
        Line("lowmem-imagic edit", _median(edit), "s", goal),
        Line("  of which imports and loading", _median(edit, "start_s"), "s", START_GOAL_S if goal else None),
        *(Line(f"  of which {stage}", _median(edit, stage), "s") for stage in _stages(edit)),
        Line("lowmem-imagic edit --preset fast", _median(fast), "s", FAST_GOAL_S if goal else None),
        Line("lowmem-imagic edit, first run", edit["first"]["wall_s"] if edit else None, "s"),
    ]
    return {"help": help_s, "inspect": inspect_s, "edit": edit, "fast": fast, "repeats": repeats}, lines


def _edit(folder: Path, model: str, repeats: int, *options: str) -> dict[str, Any] | None:
    """The runs of an edit, with the seconds of its parts."""
    if not has_model(model):
        print("speed: the bundled model is not there; edit skipped", file=sys.stderr)
        return None
    photo, out = folder / "photo.png", folder / "out"
    if _run(["scene", "a red cube on a wooden floor", str(photo), "--force"]) is None:
        return None
    words = ["edit", str(photo), "a blue cube on a wooden floor", "--out", str(out), "--force", "--device", "cpu"]
    words += options
    if model != DEMO:
        words += ["--model", model]
    return _repeated(words, repeats, out / "report.json")


def _repeated(words: Sequence[str], repeats: int, report: Path | None = None) -> dict[str, Any] | None:
    """The first run, and the `repeats` after it; None if one fails."""
    print(f"speed: {words[0]}", file=sys.stderr)
    runs = []
    for _ in range(1 + repeats):
        wall = _run(words)
        if wall is None:
            return None
        runs.append({"wall_s": round(wall, 3)})
        if report is not None:
            runs[-1] |= _parts(wall, json.loads(report.read_text(encoding="utf-8")))
    return {"first": runs[0], "runs": runs[1:]}


def _parts(wall_s: float, report: dict[str, Any]) -> dict[str, float]:
    """Seconds of an edit's parts; ``start_s`` is Python, imports, and loading of configurations and of the UNet.

    Text encoder and autoencoder are loaded within the stages that use them and counted there.
    """
    stages = {name: float(stage["seconds"]) for name, stage in report["stages"].items()}
    before = wall_s - report["seconds"]["total"] + report["seconds"]["load"]
    return {"start_s": round(before + stages.pop("load"), 3), **stages}


def _stages(edit: dict[str, Any] | None) -> list[str]:
    return [] if edit is None else [name for name in edit["runs"][0] if not name.endswith("_s")]


def _run(words: Sequence[str]) -> float | None:
    """Seconds of one run of the command line; None if it fails."""
    started = time.perf_counter()
    done = subprocess.run(
        (sys.executable, "-m", "lowmem_imagic", *words),
        cwd=REPOSITORY,
        env=os.environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        print(f"lowmem-imagic {words[0]} failed ({done.returncode}):\n{done.stderr[-2000:]}", file=sys.stderr)
        return None
    return time.perf_counter() - started


def _median(found: dict[str, Any] | None, key: str = "wall_s") -> float | None:
    return None if found is None else round(statistics.median(run[key] for run in found["runs"]), 3)
