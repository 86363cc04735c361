"""Overhead of a batch over its edits, growth of its memory, and the gain of a second Ray worker.

    python -m benchmarks.batch --only overhead --only ray --only soak
    python -m benchmarks.batch --tedbench FOLDER

Each part is a file ``results/batch_PART.json``. TEdBench is not in this repository; FOLDER has its ``input_list.json``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from lowmem_imagic.actions.console import Silent
from lowmem_imagic.actions.edit import finished_edit
from lowmem_imagic.actions.result_folder import ResultFolder
from lowmem_imagic.batch.attempts import Attempts
from lowmem_imagic.batch.executors.executor import Assignment, Group
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.run import run
from lowmem_imagic.batch.stopping import Stop
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.engine.memory import Meter
from lowmem_imagic.pictures import load_photo, photo_file
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.settings.presets import preset
from tests.crashes import SHORT, scenes

from .goals import Line, table
from .results import RESULTS, provenance, write_result

PARTS = ("overhead", "ray", "soak", "tedbench")
SLOTS = 4


def request(manifest: Path, out: Path, **changes: Any) -> Request:
    """The request of ``batch run MANIFEST --out OUT``."""
    return Request.of({"manifest": str(manifest), "out": str(out), "device": "cpu", **changes})


def timed(run: Callable[[], Any]) -> float:
    """Seconds of `run`."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def overhead(folder: Path, items: int) -> dict[str, Any]:
    """The batch against `make_edits` in a loop: packs of `SLOTS`, rendered and written into folders one by one.

    Alternates three times; both load the base model each time.
    """
    manifest, config = scenes(folder, items), preset("fast")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]

    def loop(out: Path) -> None:
        base = BaseModel.load(device="cpu")
        for first in range(0, items, SLOTS):
            some = lines[first : first + SLOTS]
            photos = [load_photo(folder / line["photo"]) for line in some]
            jobs = [Job(photo, line["sentence"]) for photo, line in zip(photos, some, strict=True)]
            for line, photo, edit in zip(some, photos, make_edits(base, jobs, config, slots=SLOTS), strict=True):
                target = ResultFolder.prepare(out / line["name"], overwrite=False)
                meter, name = Meter(base.device), f"{line['name']}.safetensors"
                target.write_report(finished_edit(base, target, name, edit, photo, config, None, meter, Silent()))

    def queue(out: Path) -> None:
        asked = request(manifest, out, preset="fast", slots=SLOTS)
        assert len(run(asked, Silent(), Stop()).done) == items

    loop(folder / "warm-up")
    pairs = [
        (timed(lambda n=n: loop(folder / f"loop-{n}")), timed(lambda n=n: queue(folder / f"queue-{n}")))  # type: ignore[misc]
        for n in range(3)
    ]
    share = median(queue_s / loop_s for loop_s, queue_s in pairs) - 1
    return {
        "items": items,
        "seconds": [{"loop": round(a, 2), "queue": round(b, 2)} for a, b in pairs],
        "lines": [Line(f"a batch of {items}: over `make_edits` in a loop", round(100 * share, 2), "%", 3).as_json()],
    }


def ray_workers(folder: Path, items: int) -> dict[str, Any]:
    """Seconds of a batch by one Ray actor on one core, one on both, and two on a core each, start-up left out."""
    # Workers have the priority of this process, as in all other measurements.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    from lowmem_imagic.batch.executors.ray import RayExecutor
    from lowmem_imagic.batch.executors.ray_actor import Actor

    manifest = scenes(folder, items)
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    found: dict[str, Any] = {}
    for name, cores, workers in (("one core", 1, 1), ("both cores", 2, 1), ("two workers", 2, 2)):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, "include_dashboard": False})
        try:
            asked = request(
                manifest, folder / name, preset="fast", executor="ray", workers=workers, address=cluster.address
            )
            group = Group(None, asked.settings({}))

            def assignments(part: list[dict[str, Any]], round_: str) -> list[Assignment]:
                attempts = Attempts(folder / "training")
                return [
                    Assignment(
                        job, line["name"], photo, photo_file(photo).sha256, line["sentence"], attempts.begin(job)
                    )
                    for line in part
                    for photo, job in [(folder / line["photo"], f"{round_} {line['name']}")]
                ]

            with RayExecutor(asked, Actor, lambda one, files: True, Stop()) as executor:

                def make(part: list[Assignment], executor: RayExecutor = executor, group: Group = group) -> None:
                    made = executor.make(group, iter([part]), len(part), on_step=lambda s: None)
                    for outcome in made:
                        assert outcome.error is None, outcome.error

                # Warm-up with an item for each worker: imports, the base model, first steps.
                make(assignments(lines[:workers], "warm-up"))
                found[name] = round(timed(lambda make=make: make(assignments(lines, "timed"))), 2)  # type: ignore[misc]
        finally:
            cluster.shutdown()
    ratio = round(found["one core"] / found["two workers"], 3)
    both = round(found["both cores"] / found["two workers"], 3)
    return {
        "items": items,
        "seconds": found,
        "lines": [
            Line("Ray: two workers to one, a core each", ratio, "times", 1.6, at_least=True).as_json(),
            Line("Ray: two workers to one that has both cores", both, "times").as_json(),
        ],
    }


def soak(folder: Path, items: int) -> dict[str, Any]:
    """Resident bytes of a run of many items, recorded as items finish."""
    out = folder / "out"
    words = ("batch", "run", str(scenes(folder, items)), "--out", str(out), *SHORT, "--quiet", "--json")
    with (folder / "said").open("w") as said:
        run = subprocess.Popen((sys.executable, "-m", "lowmem_imagic", *words), stdout=said)
        seen: list[tuple[int, int]] = []
        while run.poll() is None:
            done = sum(1 for _ in out.glob("*/sheet.png"))
            if not seen or done > seen[-1][0]:
                seen.append((done, _resident(run.pid)))
            time.sleep(0.2)
    assert run.returncode == 0
    # Warm after a tenth; means over a tenth of the items each, since single values are from different steps.
    tenth = items // 10
    first = [size for done, size in seen if tenth < done <= 2 * tenth]
    last = [size for done, size in seen if done > items - tenth and size]
    growth = sum(last) / len(last) / (sum(first) / len(first)) - 1
    name = f"{items} items: growth of resident memory after warm-up"
    return {
        "items": items,
        "resident_bytes": [[done, size] for done, size in seen if size][:: max(1, len(seen) // 60)],
        "lines": [Line(name, round(100 * growth, 2), "%", 2).as_json()],
    }


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def tedbench(folder: Path, source: Path) -> dict[str, Any]:
    """The results of TEdBench's pairs with the preset `fast` and the bundled model."""
    words = ("batch", "run", str(source / "input_list.json"), "--out", str(folder), "--preset", "fast", "--json")
    started = time.perf_counter()
    run = subprocess.run((sys.executable, "-m", "lowmem_imagic", *words), stdout=subprocess.PIPE, check=False)
    report = json.loads(run.stdout)
    made = len(list(folder.glob("*/*.safetensors")))
    return {
        "exit_code": run.returncode,
        "seconds": round(time.perf_counter() - started),
        "total": report["total"],
        "done": len(report["done"]),
        "done_before": len(report["done_before"]),
        "edit_files": made,
        "failed": [{"where": bad["where"], "reason": bad["reason"]} for bad in report["failed"]],
        "lines": [
            Line("TEdBench: pairs done or named", made + len(report["failed"]), "pairs", 100, at_least=True).as_json()
        ],
    }


def main() -> None:
    """Measures, prints a table and writes a file for each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", default=[])
    parser.add_argument("--items", type=int, help="number of items")
    parser.add_argument("--tedbench", type=Path, metavar="FOLDER")
    parser.add_argument("--keep", type=Path, help="folder for TEdBench's edits, to look at")
    parser.add_argument("--results", type=Path, default=RESULTS, help="another folder for the results")
    asked = parser.parse_args()
    parts = asked.only or ([] if asked.tedbench else ["overhead", "ray", "soak"])
    if asked.tedbench:
        parts = [*parts, "tedbench"]
    for part in parts:
        origin = provenance()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            match part:
                case "overhead":
                    found = overhead(folder, asked.items or 12)
                case "ray":
                    found = ray_workers(folder, asked.items or 24)
                case "soak":
                    found = soak(folder, asked.items or 300)
                case _:
                    found = tedbench(asked.keep or folder, asked.tedbench)
        for line in table([Line(**{k: v for k, v in one.items() if k != "passed"}) for one in found["lines"]]):
            print(line)
        write_result("batch", found, path=asked.results / f"batch_{part}.json", origin=origin)


if __name__ == "__main__":
    main()
