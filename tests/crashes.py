"""Kills real runs of ``batch run`` with SIGKILL, continues them, and compares them with undisturbed runs.

    python -m tests.crashes --kills 100

writes ``benchmarks/results/crashes_*.json``; the tests use its parts on a few items.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from benchmarks.results import RESULTS, provenance, write_result
from lowmem_imagic.edits import file as edit_file
from tests.processes import Process

HIDDEN = ".lowmem-imagic"
SHORT = ("--steps-embed", "6", "--steps-finetune", "10", "--steps-sample", "3", "--etas", "0,1", "--save-every", "4")
"""A schedule of seconds."""
PARTS = ("one_slot", "packs", "failpoints", "shared")
SAME_DB = 35.0
"""PSNR from which pictures of an edit that had other company count as the same."""
LONGEST_S = 30.0
"""Most seconds that a run is left alone before it is killed; every batch is then killed several times on its way."""
MEASURED = ("seconds", "stages", "plan")
"""Entries of a report that no two runs share."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch to run, again and again in different folders."""

    manifest: Path
    options: tuple[str, ...]

    def start(self, out: Path, *more: str, failpoint: str = "") -> Process:
        """A run in its own process."""
        words = ("batch", "run", str(self.manifest), "--out", str(out), *self.options, *more, "--quiet", "--json")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LOWMEM_IMAGIC_FAILPOINT": failpoint}
        return Process("lowmem_imagic", *words, environment=environment)

    def finish(self, out: Path, *more: str) -> dict[str, Any]:
        """The output of an undisturbed run."""
        done = self.start(out, *more)
        said, errors = done.communicate()
        if done.returncode:
            raise AssertionError(f"the run ended with {done.returncode}: {errors[-2000:]}")
        report: dict[str, Any] = json.loads(said)
        return report

    def killed(self, out: Path, after_s: float) -> bool:
        """Kills a run after some seconds; whether it was still there, and died of that."""
        run = self.start(out)
        try:
            run.communicate(timeout=after_s)
        except subprocess.TimeoutExpired:
            run.kill()
            run.communicate()
            return run.returncode == -signal.SIGKILL
        if run.returncode:
            raise AssertionError(f"the run ended by itself with {run.returncode}")
        return False

    def dies_at(self, out: Path, failpoint: str) -> bool:
        """Runs into a failpoint; returns whether the process died there, and not for another reason."""
        run = self.start(out, failpoint=failpoint)
        _, errors = run.communicate()
        if run.returncode not in (0, -signal.SIGKILL):
            raise AssertionError(f"the run ended with {run.returncode}: {errors[-2000:]}")
        return run.returncode == -signal.SIGKILL


def scenes(folder: Path, count: int) -> Path:
    """A manifest of rendered scenes, each with an edit of its colour."""
    from lowmem_imagic.demo.render import render
    from lowmem_imagic.demo.scene import Scene

    lines = []
    for number in range(count):
        scene = Scene.draw(random.Random(number), objects=1)
        render(scene, 128).save(folder / f"scene-{number:03}.png")
        color = "red" if scene.objects[0].color != "red" else "blue"
        line = {
            "photo": f"scene-{number:03}.png",
            "sentence": scene.edit(color=color).caption(),
            "name": f"{number:03}",
        }
        lines.append(json.dumps(line))
    path = folder / "list.jsonl"
    path.write_text("\n".join(lines))
    return path


def files_of(out: Path) -> dict[str, bytes]:
    """Every file of a batch's folder except its ledger, by name; without measured values inside of files."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_file() and not name.startswith(f"{HIDDEN}/ledger.sqlite3"):
            found[name] = _unmeasured(path)
        elif path.is_dir() and name != HIDDEN and not any(path.iterdir()):
            found[name + "/"] = b""
    return found


def _unmeasured(path: Path) -> bytes:
    """A file's bytes; of an edit and a report all but seconds and peak bytes."""
    if path.suffix == ".safetensors":
        return edit_file.encode(dataclasses.replace(edit_file.read(path), measured={}))
    if path.name == "report.json":
        report = json.loads(path.read_text())
        report["sha256"] = sorted(report["sha256"])
        return json.dumps({k: v for k, v in report.items() if k not in (*MEASURED, "edit_bytes")}).encode()
    return path.read_bytes()


def different(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> list[str]:
    """Names that only one of them has, or that differ in a byte."""
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def least_psnr(out: Path, expected: Path) -> float:
    """The lowest PSNR in decibels of a picture of one folder to the other's; the sets of files are the same."""
    found = [_psnr(path, expected / path.relative_to(out)) for path in out.glob("*/eta_*.png")]
    return min(found)


def _psnr(one: Path, other: Path) -> float:
    a, b = (np.asarray(Image.open(path).convert("RGB"), np.float64) for path in (one, other))
    error = float(((a - b) ** 2).mean())
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def campaign(batch: Batch, folder: Path, kills: int, seed: int, *, exact: bool) -> dict[str, Any]:
    """Kills runs at random moments until there were so many kills, and compares every batch that came to its end.

    Args:
        batch: the batch to run.
        folder: folder for its outputs.
        kills: number of processes to kill.
        seed: seed of the random moments.
        exact: whether bytes must be equal; else pictures within `SAME_DB`.
    """
    expected, rng = folder / "expected", random.Random(seed)
    started = time.perf_counter()
    batch.finish(expected)
    length_s = time.perf_counter() - started
    reference = files_of(expected)
    made, batches, kill_counts, wrong, psnr = 0, 0, list[int](), list[str](), list[float]()
    bar = tqdm(total=kills, unit="kill", desc="exact" if exact else "packs", disable=None)
    while made < kills:
        out, here = folder / f"run-{batches}", 0
        while made < kills and batch.killed(out, rng.uniform(min(1.0, length_s / 4), min(length_s, LONGEST_S))):
            made, here = made + 1, here + 1
            bar.update()
        report = batch.finish(out)
        assert report["left"] == 0 and not report["failed"]
        found = files_of(out)
        if exact:
            wrong += [f"{batches}: {name}" for name in different(found, reference)]
        else:
            wrong += [f"{batches}: {name}" for name in sorted(found.keys() ^ reference.keys())]
            psnr.append(least_psnr(out, expected))
        kill_counts.append(here)
        batches += 1
    bar.close()
    return {
        "kills": made,
        "batches": batches,
        "kills_of_each_batch": kill_counts,
        "uninterrupted_s": round(length_s, 1),
        "files": len(reference),
        "wrong": wrong,
        "least_psnr_db": round(min(psnr), 2) if psnr else None,
    }


PLACES = (
    "temporary-written",
    "renamed",
    "before-commit",
    "committed",
    "state-saved",
    "before-file",
    "before-report",
)
"""Failpoints: between any two durable steps."""


def failpoints(batch: Batch, folder: Path, counts: Sequence[int]) -> dict[str, Any]:
    """Kills runs at every failpoint, at these passes of it, and compares their results."""
    expected = folder / "expected"
    batch.finish(expected)
    reference = files_of(expected)
    died, never, wrong = [], [], []
    for place in tqdm(PLACES, desc="failpoints", disable=None):
        for count in counts:
            name = f"{place}:{count}"
            out = folder / name.replace(":", "-")
            (died if batch.dies_at(out, name) else never).append(name)
            batch.finish(out)
            wrong += [f"{name}: {path}" for path in different(files_of(out), reference)]
    return {"died": died, "never_reached": never, "wrong": wrong}


def shared(batch: Batch, out: Path) -> dict[str, Any]:
    """Two runs on one folder at the same time, and the items that each made."""
    runs = [batch.start(out), batch.start(out)]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    reports = [json.loads(text) for text, _ in said]
    done = [report["done"] for report in reports]
    return {
        "done": [len(names) for names in done],
        "twice": sorted(set(done[0]) & set(done[1])),
        "items": reports[0]["total"],
        "made": len(set(done[0]) | set(done[1])),
    }


def main() -> None:
    """Runs everything and writes a result for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="of each kind")
    parser.add_argument("--items", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder for the results")
    asked = parser.parse_args()
    for part in asked.only or PARTS:
        origin = provenance()
        with tempfile.TemporaryDirectory() as name:
            found = _part(part, Path(name), asked.items, asked.kills, asked.seed)
        print(json.dumps({part: found}, indent=2), file=sys.stderr)
        payload = {"items": asked.items, "options": list(SHORT), "seed": asked.seed, part: found}
        write_result("crashes", payload, path=asked.results / f"crashes_{part}.json", origin=origin)


def _part(part: str, place: Path, items: int, kills: int, seed: int) -> Any:
    manifest = scenes(place, 6 if part == "failpoints" else items)
    one, four = (Batch(manifest, (*SHORT, "--slots", slots)) for slots in ("1", "4"))
    match part:
        case "one_slot":
            return campaign(one, place, kills, seed, exact=True)
        case "packs":
            return campaign(four, place, kills, seed, exact=False)
        case "failpoints":
            return failpoints(one, place, (1, 2, 5, 12, 30))
    return [shared(four, place / f"run-{n}") for n in range(3)]


if __name__ == "__main__":
    main()
