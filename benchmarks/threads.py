"""Seconds of an edit with spinning and with sleeping threads, on an idle and on a busy machine.

    python -m benchmarks.threads --rounds 5 --beside 0,2

Every round runs every variant once, each in its own process with the command line's code, so that other load affects
all variants equally. The load before each round is recorded, as the machine may be busy with other work. `--beside` is
the number of programs that multiply matrices on all cores meanwhile.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results import provenance, write_result

VARIANTS: dict[str, dict[str, str]] = {
    "as OpenMP does": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Not `python -m lowmem_imagic`, which sets the threads' waiting itself.
EDIT = "from lowmem_imagic.cli.commands import app; app()"
LOAD = "import torch\nx = torch.randn(700, 700)\nwhile True:\n    x = (x @ x).tanh()"
WORDS = ("--preset", "fast", "--steps-embed", "2", "--steps-finetune", "4", "--steps-sample", "3", "--etas", "0")


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    """Runs this many busy programs on all cores within the block."""
    running = [subprocess.Popen([sys.executable, "-c", LOAD], env=clean()) for _ in range(programs)]
    try:
        time.sleep(8 if programs else 0)
        yield
    finally:
        for program in running:
            program.kill()
            program.wait()


def clean() -> dict[str, str]:
    """This process's environment without settings for threads."""
    return {name: value for name, value in os.environ.items() if name not in SETTINGS}


def seconds(folder: Path, photo: Path, variant: dict[str, str]) -> tuple[float, float]:
    """Wall and processor time of one edit with the bundled model, start of the program included."""
    words = ["edit", str(photo), "a photo of a blue cube on a wooden floor", "--out", str(folder / "made"), "--force"]
    command = [sys.executable, "-c", EDIT, *words, "--device", "cpu", "--quiet", *WORDS]
    started, before = time.perf_counter(), os.times()
    subprocess.run(command, env=clean() | variant, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return round(time.perf_counter() - started, 2), round(used, 2)


def measured(folder: Path, photo: Path, programs: int, rounds: int) -> dict[str, Any]:
    """Seconds of every variant in every round, their medians, and the medians of the ratios within rounds."""
    runs: dict[str, list[float]] = {name: [] for name in VARIANTS}
    used: dict[str, list[float]] = {name: [] for name in VARIANTS}
    loads = []
    with busy(programs):
        seconds(folder, photo, VARIANTS["passive"])  # files are in memory from here on
        for number in range(rounds):
            loads.append(round(os.getloadavg()[0], 1))
            names = list(VARIANTS)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                wall, processor = seconds(folder, photo, VARIANTS[name])
                runs[name].append(wall)
                used[name].append(processor)
                print(f"{programs} beside, {name}: {wall} s, of the processor {processor} s", flush=True)
    first = next(iter(VARIANTS))
    ratios = {name: [a / b for a, b in zip(runs[name], runs[first], strict=True)] for name in VARIANTS}
    return {
        "programs_beside": programs,
        "load_before_rounds": loads,
        "seconds": runs,
        "processor_seconds": used,
        "median_s": {name: median(values) for name, values in runs.items()},
        "median_of_ratios_to_first": {name: round(median(values), 3) for name, values in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", default="0,2", help="programs beside, one or several numbers")
    parser.add_argument("--out", type=Path, help="file to write [default: results/threads.json]")
    asked = parser.parse_args()
    origin = provenance()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scene = [sys.executable, "-m", "lowmem_imagic", "scene", "a red cube on a wooden floor", str(folder / "c.png")]
        subprocess.run(scene, check=True, stdout=subprocess.DEVNULL)
        beside = map(int, asked.beside.split(","))
        found = [measured(folder, folder / "c.png", programs, asked.rounds) for programs in beside]
    payload = {"variants": VARIANTS, "words": list(WORDS), "machines": found, "rounds": asked.rounds}
    print(write_result("threads", payload, path=asked.out, origin=origin))


if __name__ == "__main__":
    main()
