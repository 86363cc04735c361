"""Speed of training: packed against alone, and a step against stock libraries; one table, one JSON.

    python -m benchmarks.speed                   everything, 25 minutes on two cores
    python -m benchmarks.speed packs steps       some parts

*packs*: the bundled model trains eight edits with the whole preset ``balanced``, in one slot and in several; ratios are
of the same run. *kernels*: operations of a step of Stable Diffusion 1.5 for growing packs, and its arithmetic beside
peft's (checkpointing recomputes blocks), counted on the meta device. *steps*: seconds of its steps with random weights,
of this package, of peft on bfloat16 and of peft on stock bitsandbytes (see `memory`), and their share of the device's
own rate of matrix products. Figures of a GPU are ``null`` without one.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lowmem_imagic.diffusion.schedules import starting_noise
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.planning.counting import Counts, fused_attention
from lowmem_imagic.planning.plan import CPU_SLOTS
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig
from lowmem_imagic.training.pack import Pack, TrainingInput

from .goals import Line, fresh, table
from .memory import META, PACKS, WAYS, Case, Step, flops_of
from .results import RESULTS, provenance, write_result
from .scene_edits import VALIDATION

EDITS = 8
PACKED_GOAL, KERNELS_GOAL, STEP_GOAL = 1.5, 1.15, 1.0
REPEATS = 3
SMALL_PX = 256
"""Side of the pictures on a CPU: small enough for two cores."""
PARTS = ("packs", "kernels", "steps")


def packs() -> tuple[dict[str, Any], list[Line]]:
    """Edits a minute of the bundled model in one slot and in several."""
    found = []
    for slots in (1, CPU_SLOTS, EDITS):
        print(f"training {EDITS} edits in {slots} slots", file=sys.stderr)
        result = fresh("benchmarks.speed", "--slots", str(slots))
        found.append({"slots": slots, "seconds": result and result["seconds"]})
    alone = found[0]["seconds"]
    lines = [Line(f"{EDITS} edits, {entry['slots']} at once", entry["seconds"], "s") for entry in found]
    packed = found[1]["seconds"]
    ratio = round(alone / packed, 3) if alone and packed else None
    lines.append(Line(f"edits a minute, {CPU_SLOTS} at once to alone", ratio, "times", PACKED_GOAL, at_least=True))
    return {"edits": EDITS, "runs": found}, lines


def trained(slots: int) -> dict[str, Any]:
    """Seconds to train edits of the bundled model in this process, after a short warm-up."""
    base, config = BaseModel.load("demo"), preset("balanced")
    items = VALIDATION.items()[:EDITS]
    text = base.encode_text([item.sentence for item in items])
    noise = starting_noise(base.denoisers[0].shape(base.sizes.own), torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(1)
    photos = torch.randn(EDITS, *base.denoisers[0].shape(base.sizes.own), generator=draw)
    base.network(base.denoisers[0])

    def run(count: int, settings: EditConfig) -> float:
        draws = [torch.Generator().manual_seed(n) for n in range(count)]
        tasks = [TrainingInput({"unet": photos[n]}, text.rows([n]), draws[n], {"unet": noise}) for n in range(count)]
        started = time.perf_counter()
        list(Pack(base, tasks, settings, slots=slots).run())
        return time.perf_counter() - started

    run(slots, preset("balanced", {"embed": {"steps": 2}, "finetune": {"steps": 2}}))
    return {"seconds": round(run(EDITS, config), 2)}


def kernels() -> tuple[dict[str, Any], list[Line]]:
    """Operations of a step for growing packs."""
    found = []
    for rows in PACKS:
        step = Step(Case("sd15", "ours", False, rows), META)
        with fused_attention():
            # The first step fills caches of the later ones.
            step.run()
            with Counts() as count:
                step.run()
        found.append({"edits": rows, "operations": count.operations})
    ratio = round(found[-1]["operations"] / found[0]["operations"], 4)
    lines = [Line(f"operations of a step, {f['edits']} edits", f["operations"], "") for f in found]
    lines.append(Line(f"operations, {PACKS[-1]} edits to one", ratio, "times", KERNELS_GOAL))
    return {"counted": found}, lines


def steps() -> tuple[dict[str, Any], list[Line]]:
    """Seconds of a step of Stable Diffusion 1.5 for each way of training."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    cases = [
        Case("sd15", way, checkpointing, rows, None if on_gpu else SMALL_PX)
        for way in WAYS
        for checkpointing in (False, True)
        for rows in (PACKS if on_gpu else (1, 2))
    ]
    found, lines, baseline = [], list[Line](), dict[tuple[bool, int], float]()
    for case in sorted(cases, key=lambda case: case.way != "bf16 + peft"):
        print(f"timing {case.name}", file=sys.stderr)
        result = fresh("benchmarks.speed", "--case", json.dumps(asdict(case)), "--device", device)
        found.append({"case": asdict(case), "measured": result})
        if result is None:
            lines.append(Line(f"{case.name}: a step", None, "s"))
            continue
        lines.append(Line(f"{case.name}: a step", result["step_s"], "s"))
        lines.append(Line(f"{case.name}: share of matmul rate", result["share"], ""))
        key = (case.checkpointing, case.rows)
        if case.way == "bf16 + peft":
            baseline[key] = result["step_s"]
        elif key in baseline:
            judged = on_gpu and case.way == "ours" and case.rows == 1 and not case.checkpointing
            ratio = round(result["step_s"] / baseline[key], 3)
            lines.append(Line(f"{case.name}: step to bf16 + peft", ratio, "times", STEP_GOAL if judged else None))
    if not on_gpu:
        lines.append(Line("sd15 512 px, ours, plain, 1 row: step to bf16 + peft (GPU)", None, "times", STEP_GOAL))
    return {"device": device, "timed": found}, lines


def timed(case: Case, device: torch.device) -> dict[str, Any]:
    """Seconds of a step in this process, its arithmetic, and the share of the measured rate of matrix products."""
    step, times = Step(case, device), list[float]()
    for _ in range(1 + REPEATS):
        _wait(device)
        started = time.perf_counter()
        step.run()
        _wait(device)
        times.append(time.perf_counter() - started)
    seconds, flops, rate = statistics.median(times[1:]), flops_of(case), matmul_rate(device, step.dtype)
    return {
        "step_s": round(seconds, 4),
        "rows_per_s": round(case.rows / seconds, 4),
        "flops": flops,
        "matmul_flops_per_s": round(rate),
        "share": round(flops / seconds / rate, 4),
        "threads": torch.get_num_threads(),
    }


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Most floating-point operations per second of this device in large matrix products."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        _wait(device)
        started = time.perf_counter()
        a @ b
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    """Command line; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here [benchmarks/results]")
    for hidden in ("--slots", "--case", "--device"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.slots or args.case:
        # One process per measurement.
        slots, case, device = args.slots, args.case, args.device
        print(json.dumps(trained(int(slots)) if slots else timed(Case(**json.loads(case)), torch.device(device))))
        return 0
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}, expected {', '.join(PARTS)}")
    measure: dict[str, Callable[[], tuple[dict[str, Any], list[Line]]]] = {
        "packs": packs,
        "kernels": kernels,
        "steps": steps,
    }
    origin, found, lines = provenance(), dict[str, Any](), list[Line]()
    for part in args.parts or PARTS:
        found[part], more = measure[part]()
        print("\n".join(table(more)), flush=True)
        lines += more
    passed = all(line.passed is not False for line in lines)
    if args.out or not args.parts:
        result = {"partial": bool(args.parts), **found, "lines": [line.as_json() for line in lines], "passed": passed}
        print(f"result: {write_result('speed', result, path=args.out or RESULTS / 'speed.json', origin=origin).name}")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
