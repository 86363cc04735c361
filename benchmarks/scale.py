"""A batch of very many items whose work is a no-op, on Ray: items a second, memory, and the cost of killed processes.

    python -m benchmarks.scale --items 100000 --actors 64 --folder /dev/shm

The list, the runner, the ledger, the executor and the actors are those of ``batch run --executor ray``; only the work
inside an actor is left out. On the way drivers and actors are killed with SIGKILL, and the same command goes on.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from lowmem_imagic.batch.ledger.file import DONE, snapshot
from lowmem_imagic.batch.outputs import FINISHED, item_state
from lowmem_imagic.batch.paths import HIDDEN, Part
from lowmem_imagic.batch.status import status

from .goals import REPOSITORY, Line, table
from .results import RESULTS, provenance, write_result
from .scale_processes import actors_folder, published_file

ACTORS, DRIVER = "actors", "driver"
KILLS = ((0.05, ACTORS), (0.1, DRIVER), (0.15, ACTORS), (0.2, DRIVER), (0.4, ACTORS), (0.6, ACTORS), (0.8, ACTORS))
"""When there is this share of the items, these processes are killed."""
ACTORS_KILLED = 4
"""Actors killed at once."""
SAMPLE_S = 1.0
_SHOWN = 200
"""Most samples in the result."""
_ACTOR_SAMPLES = 30
"""Samples of a driver for each one of all actors."""
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000080000000808020000004b6d29dc"
    "0000000c4944415478da6360181e000000c8000193bda58e0000000049454e44ae426082"
)
"""A black picture of 8 px."""


@dataclass
class Watched:
    """Drivers, one after the other, and samples of them."""

    words: tuple[str, ...]
    environment: dict[str, str]
    out: Path
    kills: list[tuple[int, str]]
    """Numbers of published items, and the processes that are killed then."""
    rng: random.Random = field(default_factory=lambda: random.Random(0))
    samples: list[dict[str, Any]] = field(default_factory=list)
    drivers: list[dict[str, Any]] = field(default_factory=list)
    killed: list[dict[str, Any]] = field(default_factory=list)
    actors: list[dict[str, Any]] = field(default_factory=list)
    """Numbers of living actors, and the bytes of all."""

    def run(self) -> dict[str, Any]:
        """Starts drivers until one of them ends by itself; returns its counts.

        Raises:
            AssertionError: a driver ended with an error.
        """
        began = time.monotonic()
        while True:
            started, before = time.monotonic(), self.published
            driver = subprocess.Popen(
                self.words, env=self.environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            first_s: float | None = None
            while driver.poll() is None:
                now, published = time.monotonic(), self.published
                if first_s is None and published > before:
                    first_s = now - started
                sample: dict[str, Any] = {
                    "s": round(now - began, 1),
                    "driver": len(self.drivers),
                    "published": published,
                }
                sample |= {"resident_bytes": resident_bytes(driver.pid), "cpu_s": processor_s(driver.pid)}
                self.samples.append(sample)
                if published and len(self.samples) % _ACTOR_SAMPLES == 0:
                    self._count_actors(published)
                if self.kills and published >= self.kills[0][0]:
                    self._kill(self.kills.pop(0)[1], driver.pid, published)
                time.sleep(SAMPLE_S)
            said, errors = driver.communicate()
            seconds = time.monotonic() - started
            entry = {"seconds": round(seconds, 1), "seconds_to_first_item": first_s and round(first_s, 1)}
            self.drivers.append(entry | {"published": self.published - before, "exit_code": driver.returncode})
            if driver.returncode == -signal.SIGKILL:
                continue
            if driver.returncode:
                raise AssertionError(f"a driver ended with {driver.returncode}: {errors.decode()[-3000:]}")
            counts: dict[str, Any] = json.loads(said.splitlines()[-1])
            return counts

    @property
    def published(self) -> int:
        """The number of published items."""
        try:
            return published_file(self.out).read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0

    def _living(self) -> list[int]:
        """Process numbers of the living actors."""
        return [int(path.name) for path in actors_folder(self.out).iterdir() if is_actor(int(path.name))]

    def _count_actors(self, published: int) -> None:
        sizes = [size for pid in self._living() if (size := own_bytes(pid))]
        self.actors.append({"published": published, "number": len(sizes), "bytes": sum(sizes)})

    def _kill(self, processes: str, driver: int, published: int) -> None:
        living = self._living()
        victims = [driver] if processes == DRIVER else self.rng.sample(living, min(ACTORS_KILLED, len(living)))
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        self.killed.append({"processes": processes, "number": len(victims), "published": published})


def is_actor(pid: int) -> bool:
    """Whether a process is an idle actor."""
    try:
        return b"IdleActor" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def resident_bytes(pid: int) -> int | None:
    """Resident bytes of a process; None if it has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") or None
    except OSError:
        return None


def processor_s(pid: int) -> float | None:
    """Seconds of processor time that a process has had; None if it has ended."""
    try:
        # Behind the name, which may contain spaces, from the third field on.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_bytes(pid: int) -> int | None:
    """Bytes of a process, with its share of what it has in common with others; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None


def write_list(folder: Path, items: int) -> Path:
    """Writes a list with a photo of its own for each item."""
    photos = folder / "photos"
    photos.mkdir()
    path = folder / "list.jsonl"
    with path.open("w") as lines:
        for number in range(items):
            (photos / f"{number:06}.png").write_bytes(_PNG)
            item = {"photo": f"photos/{number:06}.png", "sentence": "a blue cube", "name": f"{number:06}"}
            lines.write(json.dumps(item) + "\n")
    return path


@contextmanager
def cluster(actors: int, environment: dict[str, str]) -> Iterator[str]:
    """The address of a cluster."""
    words = (sys.executable, "-m", "benchmarks.scale_processes", "cluster", str(actors))
    with subprocess.Popen(
        words, env=environment, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        process.wait(120)


def simulate(folder: Path, items: int, actors: int, kills: Sequence[tuple[float, str]]) -> dict[str, Any]:
    """Runs a batch to its end in spite of `kills` (see `KILLS`), and counts.

    Args:
        folder: an empty folder for photos, results and temporary files.
        items: number of items.
        actors: number of actors.
        kills: see `KILLS`.
    """
    out = folder / "out"
    actors_folder(out).mkdir()
    manifest = write_list(folder, items)
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "RAY_USAGE_STATS_ENABLED": "0",
        # The actors are many, and short of processors: they must not be taken for dead.
        "RAY_health_check_timeout_ms": "60000",
        "RAY_health_check_failure_threshold": "20",
        "TMPDIR": str(folder),
    }
    with cluster(actors, environment) as address:
        request: dict[str, Any] = {"manifest": str(manifest), "out": str(out), "device": "cpu", "preset": "fast"}
        request |= {"executor": "ray", "address": address, "workers": actors}
        words = (sys.executable, "-m", "benchmarks.scale_processes", "drive", json.dumps(request))
        steps = [(round(share * items), processes) for share, processes in kills]
        watched = Watched(words, environment, out, steps)
        counts = watched.run()
        again = Watched(words, environment, out, [])
        nothing = again.run()
    book = books(out, items)
    assert nothing == {"done": 0, "before": items, "failed": 0}, nothing
    return {
        "items": items,
        "actors": actors,
        "file_system": file_system(folder),
        "last_driver": counts,
        "drivers": watched.drivers,
        "killed": watched.killed,
        "memory_of_actors": watched.actors,
        "samples": watched.samples[:: max(1, len(watched.samples) // _SHOWN)],
        "with_nothing_to_make_s": again.drivers[0]["seconds"],
        **book,
        "lines": [line.as_json() for line in figures(watched, book, items)],
    }


def file_system(folder: Path) -> str | None:
    """The kind of file system of a folder."""
    done = subprocess.run(("stat", "-f", "-c", "%T", str(folder)), capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def books(out: Path, items: int) -> dict[str, Any]:
    """What became of the items, by the ledger, by their files, by the actors and by the publisher."""
    ledger = Part().ledger(out)
    seen = snapshot(ledger)
    assert seen is not None
    finished = sum(item_state(out / entry.name, entry.job) == FINISHED for entry in seen.entries)
    published = Counter(published_file(out).read_text().split())
    made = Counter(job for path in actors_folder(out).iterdir() for job in path.read_text().split())
    started = time.perf_counter()
    counts = status(out)
    return {
        "ledger_bytes": ledger.stat().st_size,
        "status_s": round(time.perf_counter() - started, 2),
        "done_by_the_ledger": counts[DONE],
        "finished_by_their_files": finished,
        "folders": sum(not path.name.startswith(".") for path in out.iterdir()),
        "lost": items - finished,
        "published_twice": sum(count - 1 for count in published.values()),
        "work_done_again": sum(made.values()) - len(made),
        "left_behind": sorted({path.name for path in (out / HIDDEN).iterdir()} - {ledger.name, f"{ledger.name}.lock"}),
    }


def figures(watched: Watched, book: Mapping[str, Any], items: int) -> Iterator[Line]:
    """Yields the figures of the documents, of the driver that came to the end."""
    last = len(watched.drivers) - 1
    mine = [sample for sample in watched.samples if sample["driver"] == last and sample["resident_bytes"]]
    making = [sample for sample in mine if sample["published"] > mine[0]["published"]]
    begin, end = (making[0]["published"], making[-1]["published"]) if making else (0, 0)
    each_s = seconds_each(making, "s")
    yield Line(f"{items} items: published a second", each_s and round(1 / each_s, 1), "items")
    # Processor time, unlike speed, does not depend on the other programs of a machine.
    each = seconds_each(making, "cpu_s")
    yield Line(f"{items} items: the driver's processor time for each", each and round(1000 * each, 2), "ms")
    halves = ([one for one in making if (2 * one["published"] > begin + end) == late] for late in (False, True))
    first, second = (seconds_each(half, "cpu_s") for half in halves)
    times = round(second / first, 3) if first and second else None
    yield Line(f"{items} items: the same, second half of the list to the first", times, "times", 1.1)
    # As in a soak of 300 items: warm after a tenth, and a mean over a tenth each.
    tenth = (end - begin) / 10
    early = [one["resident_bytes"] for one in making if begin + tenth < one["published"] <= begin + 2 * tenth]
    late = [one["resident_bytes"] for one in making if one["published"] > end - tenth]
    growth = 100 * (mean(late) / mean(early) - 1) if early and late else None
    name = f"{items} items: growth of the driver's resident memory after warm-up"
    yield Line(name, growth and round(growth, 2), "%", 2)
    wrong = book["lost"] + book["published_twice"]
    yield Line(f"{items} items, {len(watched.killed)} times killed: lost or published twice", wrong, "items", 0)


def seconds_each(samples: Sequence[Mapping[str, Any]], clock: str) -> float | None:
    """Seconds of a clock for an item, between the first and the last sample; None in a run too short to tell."""
    published = samples[-1]["published"] - samples[0]["published"] if samples else 0
    return float(samples[-1][clock] - samples[0][clock]) / published if published else None


def main() -> None:
    """Runs the batch, prints a table and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument(
        "--folder", type=Path, help="parent of the batch's folder; one in memory is not slowed by a disk"
    )
    parser.add_argument("--no-kills", action="store_true", help="leave all processes alone")
    parser.add_argument("--result", type=Path, default=RESULTS / "scale.json", help="another path for the result")
    asked = parser.parse_args()
    origin = provenance()
    with tempfile.TemporaryDirectory(prefix="scale-", dir=asked.folder) as name:
        result = simulate(Path(name), asked.items, asked.actors, () if asked.no_kills else KILLS)
    for line in table([Line(**{k: v for k, v in one.items() if k != "passed"}) for one in result["lines"]]):
        print(line)
    write_result("scale", result, path=asked.result, origin=origin)


if __name__ == "__main__":
    main()
