"""Quality of methods that edit photos of the bundled world, judged against ground truth (`benchmarks.scene_edits`).

    python -m benchmarks.edit_quality --set validation --method balanced
    python -m benchmarks.edit_quality --set validation --method full-3e-5 --items 32 --grid grid.png
    python -m benchmarks.edit_quality --method fast --model DIR --items 16 --out result.json

Each method has one file ``results/edit_quality_SET_METHOD.json`` with a verdict on every item at every eta.
``--resume`` on a finished one computes its figures again from these. A method is reported at one eta for all items of
both halves, chosen on the validation set; the file of the test set names it.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families import DEMO
from lowmem_imagic.pictures.letterbox import to_images, to_tensor
from lowmem_imagic.pictures.png import contact_sheet, encode_png
from lowmem_imagic.storage.atomic import write_bytes

from .averages import level
from .bundled import current, model_of
from .compared import FP32, compared
from .edit_judge import Verdict, by_half, judge, photo_overlap, psnr_db
from .edit_methods import Method, Outcome
from .oracle import Oracle
from .results import RESULTS, provenance, write_result
from .scene_edits import GROUPS, HALVES, SETS, VALIDATION, SceneEdit, rows_of
from .workers import each

SAVE_EVERY = 4
"""Items after which an unfinished result is written."""


class Judged(NamedTuple):
    """The judgement of a method on one item."""

    item: SceneEdit
    verdicts: dict[float, Verdict]
    """Verdicts by eta."""
    reconstruction_db: float
    """PSNR of the picture at eta 0 to the photo's round trip through the autoencoder."""
    photo_overlap: float | None
    """Overlap of the photo's pattern at eta 0; None for known photos."""
    passes: int
    train_s: float
    sample_s: float
    """Seconds per picture."""
    edit_bytes: int | None

    def as_json(self) -> dict[str, Any]:
        """Plain values, rounded."""
        return {
            "name": self.item.name,
            "half": self.item.half,
            "kind": self.item.kind,
            "sentence": self.item.sentence,
            "reconstruction_db": round(self.reconstruction_db, 3),
            "photo_overlap": None if self.photo_overlap is None else round(self.photo_overlap, 4),
            "verdicts": {f"{eta:g}": verdict.as_json() for eta, verdict in self.verdicts.items()},
            "passes": self.passes,
            "train_s": round(self.train_s, 3),
            "sample_s": round(self.sample_s, 3),
            "edit_bytes": self.edit_bytes,
        }

    @staticmethod
    def from_json(item: SceneEdit, values: Mapping[str, Any]) -> "Judged":
        """The judgement of `item` from the values of `as_json`, up to rounding."""
        return Judged(
            item,
            {float(eta): Verdict.from_json(verdict) for eta, verdict in values["verdicts"].items()},
            *(values[name] for name in _PLAIN),
        )


_PLAIN = ("reconstruction_db", "photo_overlap", "passes", "train_s", "sample_s", "edit_bytes")


def judged(oracle: Oracle, item: SceneEdit, outcome: Outcome, base: BaseModel) -> Judged:
    """The judgement of a method's outcome for one item; its etas include 0."""
    verdicts = {eta: judge(oracle, [item], pictures)[0] for eta, pictures in outcome.pictures.items()}
    [best] = to_images(base.decode(base.encode_images(to_tensor(item.photo_picture(base.sizes.own[0])))))
    return Judged(
        item,
        verdicts,
        psnr_db(np.asarray(outcome.pictures[0.0][0]), np.asarray(best)),
        photo_overlap(item, outcome.pictures[0.0][0]),
        outcome.passes,
        outcome.train_s,
        outcome.sample_s,
        outcome.edit_bytes[0] if outcome.edit_bytes else None,
    )


class Kept(NamedTuple):
    """What a result has already."""

    judged: list[Judged]
    runs: list[dict[str, Any]]
    """The provenance of each of its runs."""
    threads: dict[str, int]
    """Processes and threads of its last run."""


def kept(path: Path, facts: Mapping[str, Any], items: Sequence[SceneEdit], etas: Sequence[float]) -> Kept:
    """What the result at `path` has of `items`.

    Raises:
        ValueError: the result's facts differ from `facts`, or its etas from `etas`.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    # Through JSON, which has no tuples.
    other = [name for name, value in facts.items() if result.get(name) != json.loads(json.dumps(value))]
    if any(sorted(map(float, values["verdicts"])) != sorted(etas) for values in result["items"]):
        other.append("etas")
    if other:
        raise ValueError(f"{path.name} was made with other {', '.join(other)}")
    found = {values["name"]: values for values in result["items"]}
    results = [Judged.from_json(item, found[item.name]) for item in items if item.name in found]
    threads = {name: result[name] for name in ("processes", "torch_threads")}
    return Kept(results, [*result["earlier_runs"], result["provenance"]], threads)


class _Bench(NamedTuple):
    """The objects for applying a method in a process."""

    base: BaseModel
    method: Method
    etas: Sequence[float]


_bench: list[_Bench] = []


def _start(method: str, model: str, work: Path | None, device: str, weights: str, etas: Sequence[float]) -> None:
    """Loads the base, once in each process."""
    _bench[:] = [_Bench(BaseModel.load(model, device=device, weights=weights), compared(work)[method], etas)]


def _apply(items: Sequence[SceneEdit]) -> list[Outcome]:
    """The outcomes of the method for some items at once."""
    [(base, method, etas)] = _bench
    photos, sentences = [item.photo_picture(base.sizes.own[0]) for item in items], [item.sentence for item in items]
    outcome = method(base, photos, sentences, etas, sources=[item.source for item in items])
    return [outcome.of(number) for number in range(len(items))]


def report(results: Sequence[Judged], eta: float) -> dict[str, Any]:
    """The result of one method: all figures at the reported `eta`, the curve along eta, the photo at eta 0, costs."""
    items = [result.item for result in results]
    sizes = [result.edit_bytes for result in results if result.edit_bytes is not None]
    along = along_eta(results)
    return {
        "eta": eta,
        "at_eta": by_half(items, along[eta]),
        "curve": [{"eta": point, **by_half(items, verdicts, kinds=False)} for point, verdicts in along.items()],
        "photo": {half: _photo([results[n] for n in rows]) for half in HALVES if (rows := rows_of(items, half=half))},
        "cost": {
            "passes": results[0].passes,
            # Medians: other programs at work can hold up an item for minutes.
            "train_s": round(median(result.train_s for result in results), 2),
            "sample_s_per_picture": round(median(result.sample_s for result in results), 3),
            "edit_bytes_mean": round(sum(sizes) / len(sizes)) if sizes else None,
        },
    }


def _photo(results: Sequence[Judged]) -> dict[str, Any]:
    """The photo at eta 0: PSNR to its round trip, and the overlap of its pattern, None without one."""
    kinds = [result.item.kind for result in results]
    overlaps = [result.photo_overlap for result in results if result.photo_overlap is not None]
    return {
        "reconstruction_db": level(kinds, [result.reconstruction_db for result in results], median=True),
        "overlap": level(kinds, overlaps) if overlaps else None,
    }


def along_eta(results: Sequence[Judged]) -> dict[float, list[Verdict]]:
    """The verdicts on all items, by eta."""
    return {eta: [result.verdicts[eta] for result in results] for eta in results[0].verdicts}


def best_eta(verdicts: Mapping[float, Sequence[Verdict]]) -> float:
    """The eta with the most good items; ties go to the better background."""

    def worth(eta: float) -> tuple[int, float]:
        return sum(v.good for v in verdicts[eta]), sum(v.background_db for v in verdicts[eta])

    return max((eta for eta in verdicts if eta > 0), key=worth)


def chosen_eta(method: str) -> float:
    """The eta chosen for a method on the validation set.

    Raises:
        FileNotFoundError: the method has no complete result on the validation set with this bundled model yet.
    """
    path = RESULTS / f"{result_name(VALIDATION.name, method)}.json"
    result = current(path)
    if not result or result["partial"]:
        raise FileNotFoundError(path.name)
    return float(result["eta"])


def result_name(items: str, method: str) -> str:
    """Name of the result of a method on a set."""
    return f"edit_quality_{items}_{method.replace('-', '_')}"


def grid(results: Sequence[Judged], pictures: Mapping[str, Image.Image], eta: float) -> Image.Image:
    """A row of photo, edit at `eta` and ground truth for each item, failures included; `pictures` by item's name."""
    cells: list[tuple[str, Image.Image]] = []
    for item, verdicts in ((result.item, result.verdicts) for result in results if result.item.name in pictures):
        made, verdict = pictures[item.name], verdicts[eta]
        says = "good" if verdict.good else "; ".join(_faults(verdict))
        cells.append((item.sentence.removeprefix("a photo of "), item.photo_picture(made.width)))
        cells += [(f"eta {eta:g}: {says}", made), ("ground truth", item.truth_picture(made.width))]
    return contact_sheet(cells, columns=6, title="SceneEdits", footer="", cell_px=128)


def _line(part: Mapping[str, Any]) -> str:
    """The values of a part of a result."""
    return "  ".join(f"{name} {value['value']:.3g}" for name, value in part.items() if value is not None)


def _faults(verdict: Verdict) -> list[str]:
    """What keeps a picture from being good, in words for a small cell."""
    inside = f"object {verdict.object_db:.0f} dB" if verdict.overlap is None else f"overlap {verdict.overlap:.2f}"
    faults = {
        "not done": verdict.success,
        "not kept": verdict.kept,
        f"background {verdict.background_db:.0f} dB": verdict.background,
        inside: verdict.identity,
    }
    return [words for words, holds in faults.items() if not holds]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default=VALIDATION.name, help="the items [validation]")
    parser.add_argument("--method", choices=list(compared()), required=True)
    parser.add_argument(
        "--model", default=DEMO, metavar="DIR", help="a diffusers folder; its result goes to --out [the bundled model]"
    )
    parser.add_argument("--work", type=Path, metavar="DIR", help="folder for trained edits, to keep and to reuse")
    parser.add_argument("--items", type=int, metavar="N", help="only the first N items: a partial run")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="work on N items at once, on one thread each [1]"
    )
    parser.add_argument("--resume", action="store_true", help="continue a result: keep its finished items")
    parser.add_argument("--force", action="store_true", help="replace a result")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write a sheet of the items of this run")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here [benchmarks/results]")
    args = parser.parse_args()
    if args.model != DEMO and args.out is None:
        parser.error("the committed results are the bundled model's: name a file with --out")

    chosen, method = SETS[args.set], compared()[args.method]
    items = [replace(item, in_full=method.in_full) for item in chosen.items()[: args.items]]
    weights = "fp32" if args.method in FP32 else "int8"
    etas, eta = method.etas, None
    if chosen is not VALIDATION:
        try:
            eta = chosen_eta(args.method)
        except FileNotFoundError:
            print(f"run --set validation --method {args.method} first: it chooses eta", file=sys.stderr)
            return 2
        etas = tuple(dict.fromkeys((*method.etas, eta)))
    base, oracle = BaseModel.load(args.model, device=args.device, weights=weights), Oracle.load()
    origin = provenance(base.device)
    facts = {
        "method": args.method,
        "settings": method.settings,
        "set": asdict(chosen),
        "base_weights": weights,
        "model": model_of(base),
        "judge": {"sha256": oracle.sha256},
    }
    path = args.out or RESULTS / f"{result_name(args.set, args.method)}.json"
    results: dict[str, Judged] = {}
    earlier: list[dict[str, Any]] = []
    threads = {
        "processes": args.processes,
        "torch_threads": torch.get_num_threads() if args.processes == 1 else 1,
    }
    if path.exists() and args.resume:
        try:
            found = kept(path, facts, items, etas)
        except ValueError as error:
            print(f"{error}; start anew with --force", file=sys.stderr)
            return 2
        results, earlier = {result.item.name: result for result in found.judged}, found.runs
        if len(results) == len(items):
            # Its figures are computed again, and nothing is measured.
            *earlier, origin = earlier
            threads = found.threads
        print(f"{len(results)} of {len(items)} items are in {path.name} already")
    elif path.exists() and not args.force:
        print(f"{path.name} exists; go on with it by --resume, or replace it by --force", file=sys.stderr)
        return 2
    pictures: dict[float, dict[str, Image.Image]] = {point: {} for point in etas}

    def written(figures: Mapping[str, Any]) -> None:
        """Writes the results so far, partial ones without figures: intervals would take longer than an item."""
        done = [results[item.name] for item in items if item.name in results]
        result = {
            **facts,
            "partial": not figures or len(done) < len(chosen.items()),
            "earlier_runs": earlier,
            **threads,
            **figures,
            "items": [result.as_json() for result in done],
        }
        write_result(result_name(args.set, args.method), result, path=path, origin=origin)

    def take(group: Sequence[SceneEdit], outcomes: Sequence[Outcome]) -> None:
        for item, outcome in zip(group, outcomes, strict=True):
            results[item.name] = judged(oracle, item, outcome, base)
            for point, made in outcome.pictures.items():
                pictures[point][item.name] = made[0]
        # Written now and then, so that a stopped run loses little.
        if len(results) % SAVE_EVERY == 0:
            written({})

    start = (args.method, args.model, args.work, args.device, weights, etas)
    missing = [item for item in items if item.name not in results]
    groups = [missing[begin : begin + method.together] for begin in range(0, len(missing), method.together)]
    each(_apply, groups, processes=args.processes, start=_start, args=start, on_result=take)
    done = [results[item.name] for item in items]
    at = best_eta(along_eta(done)) if eta is None else eta
    figures = report(done, at)
    written(figures)
    for half, parts in figures["at_eta"].items():
        for part in ("all", *GROUPS):
            if part in parts:
                print(f"{args.method}, eta {at:g}, {half}, {part.replace('_', '-')}: {_line(parts[part])}")
    print(f"result: {path.name}")
    if args.grid:
        write_bytes(args.grid, encode_png(grid(done, pictures[at], at)), overwrite=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
