"""Costs of the engine: memory of training, size of edit files, time of commands.

    python -m benchmarks.engine                  all parts, about ten minutes on two cores
    python -m benchmarks.engine size speed       some
    python -m benchmarks.engine --quick          smaller and fewer; a check that keeps no results

Each part of a full run writes ``results/engine_PART.json``. A failed measurement is ``null``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowmem_imagic.families import DEMO

from . import engine_memory, engine_size, engine_speed
from .goals import Line, table
from .results import RESULTS, provenance, write_result

PARTS = ("memory", "size", "speed")


def main() -> int:
    """Command line; returns 1 if a full run misses a goal or fails to measure it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--quick", action="store_true", help="smaller and fewer")
    parser.add_argument("--model", default=DEMO, metavar="DIR", help="a diffusers folder [the bundled model]")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write results here, quick or not")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}, expected {', '.join(PARTS)}")
    model = args.model if args.model == DEMO else str(Path(args.model).resolve())
    measure: dict[str, Callable[[], tuple[dict[str, Any], list[Line]]]] = {
        "memory": lambda: engine_memory.measure(quick=args.quick),
        "size": lambda: engine_size.measure(quick=args.quick, model=model),
        "speed": lambda: engine_speed.measure(quick=args.quick, model=model),
    }

    missed = False
    for part in args.parts or PARTS:
        origin = provenance()
        result, lines = measure[part]()
        print(f"{part}\n" + "\n".join(table(lines)), flush=True)
        goals = [line for line in lines if line.goal is not None]
        passed = all(line.passed for line in goals)
        missed |= not passed and not args.quick
        # The kept results are full runs on the bundled model.
        if args.out is None and (args.quick or args.model != DEMO):
            continue
        result |= {
            "partial": args.quick or args.model != DEMO,
            "lines": [line.as_json() for line in lines],
            "passed": passed,
        }
        written = write_result(
            f"engine_{part}", result, path=(args.out or RESULTS) / f"engine_{part}.json", origin=origin
        )
        print(f"result: {written.name}")
    return int(missed)


if __name__ == "__main__":
    raise SystemExit(main())
