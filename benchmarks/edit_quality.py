"""How well methods edit photos of the bundled world, judged against ground truth (`benchmarks.scene_edits`).

    python -m benchmarks.edit_quality --set validation --method balanced
    python -m benchmarks.edit_quality --set validation --method full-3e-5 --items 8 --grid grid.png

Each method is one file ``results/edit_quality_SET_METHOD.json`` with a verdict on every item at every eta. The eta a
method is reported at is one for all items, chosen on the validation set; the file of the test set names it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from lowmem_imagic.atomic import write_bytes
from lowmem_imagic.base_model import BaseModel
from lowmem_imagic.letterbox import to_images, to_tensor
from lowmem_imagic.png import contact_sheet, encode_png

from .compared import FP32, compared
from .edit_judge import Verdict, bootstrap, judge, psnr_db, summary
from .edit_methods import Method, Outcome, joined
from .oracle import Oracle
from .results import RESULTS, provenance, write_result
from .scene_edits import HARD_KINDS, KINDS, SETS, VALIDATION, SceneEdit, of_kinds
from .workers import each

ETAS = (0.0, 0.6, 0.8, 1.0, 1.2)
"""Points of every method's slider."""


class Measured(NamedTuple):
    """What a method made of the items, and what is said of it."""

    outcome: Outcome
    verdicts: dict[float, list[Verdict]]
    """For each eta a verdict on each item."""
    reconstruction_db: list[float]
    """PSNR of each item's picture at eta 0 to its photo's round trip through the autoencoder."""


def measured(oracle: Oracle, items: Sequence[SceneEdit], outcome: Outcome, base: BaseModel) -> Measured:
    """What a method made of the items, judged; its etas hold 0."""
    photos = [item.photo_picture(base.size_px) for item in items]
    verdicts = {eta: judge(oracle, items, pictures) for eta, pictures in outcome.pictures.items()}
    best = to_images(base.decode(base.encode_images(torch.cat([to_tensor(photo) for photo in photos]))))
    pairs = zip(outcome.pictures[0.0], best, strict=True)
    return Measured(outcome, verdicts, [psnr_db(np.asarray(made), np.asarray(photo)) for made, photo in pairs])


class _Bench(NamedTuple):
    """What a process needs to apply a method."""

    base: BaseModel
    method: Method
    etas: Sequence[float]


_bench: list[_Bench] = []


def _start(method: str, work: Path | None, device: str, weights: str, etas: Sequence[float]) -> None:
    """Loads the base, once in each process."""
    _bench[:] = [_Bench(BaseModel.load("demo", device=device, weights=weights), compared(work)[method], etas)]


def _apply(item: SceneEdit) -> Outcome:
    """The method applied to one item."""
    [(base, method, etas)] = _bench
    return method(base, [item.photo_picture(base.size_px)], [item.sentence], etas)


def report(items: Sequence[SceneEdit], found: Measured, eta: float) -> dict[str, Any]:
    """The result of one method: the curve along eta, and everything at the one `eta` it is reported at."""
    outcome, verdicts, reconstruction_db = found
    main = [i for i in range(len(items)) if items[i].kind not in HARD_KINDS]
    chosen = verdicts[eta]
    return {
        "eta": eta,
        "at_eta": {
            "all_but_" + "_and_".join(HARD_KINDS): summary([chosen[i] for i in main]),
            "all": summary(chosen),
            "by_kind": {
                kind: summary([chosen[i] for i in rows]) for kind in KINDS if (rows := of_kinds(items, [kind]))
            },
        },
        "reconstruction_db": bootstrap(reconstruction_db, median=True),
        "curve": [{"eta": point, **summary([judged[i] for i in main])} for point, judged in verdicts.items()],
        "cost": {
            "passes": outcome.passes,
            "train_s": round(outcome.train_s, 2),
            "sample_s_per_picture": round(outcome.sample_s, 3),
            "edit_bytes_mean": round(sum(outcome.edit_bytes) / len(outcome.edit_bytes)) if outcome.edit_bytes else None,
        },
        "items": [
            {
                "name": item.name,
                "sentence": item.sentence,
                "reconstruction_db": round(reconstruction_db[number], 3),
                "verdicts": {f"{point:g}": judged[number].as_json() for point, judged in verdicts.items()},
            }
            for number, item in enumerate(items)
        ],
    }


def best_eta(items: Sequence[SceneEdit], verdicts: dict[float, list[Verdict]]) -> float:
    """The eta with most good items, the hard kinds left out; of equals, the one with the better background."""
    main = [i for i in range(len(items)) if items[i].kind not in HARD_KINDS] or list(range(len(items)))

    def worth(eta: float) -> tuple[int, float]:
        found = [verdicts[eta][i] for i in main]
        return sum(v.good for v in found), sum(v.background_db for v in found)

    return max((eta for eta in verdicts if eta > 0), key=worth)


def chosen_eta(method: str) -> float:
    """The eta that the validation set chose for a method.

    Raises:
        FileNotFoundError: the method has no complete result on the validation set yet.
    """
    path = RESULTS / f"{result_name(VALIDATION.name, method)}.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["partial"]:
        raise FileNotFoundError(f"{path.name} is a partial run")
    return float(result["eta"])


def result_name(items: str, method: str) -> str:
    """Name of the result of a method on a set."""
    return f"edit_quality_{items}_{method.replace('-', '_')}"


def grid(items: Sequence[SceneEdit], outcome: Outcome, verdicts: dict[float, list[Verdict]], eta: float) -> Image.Image:
    """A row of photo, edit and ground truth for each item, failures included."""
    cells: list[tuple[str, Image.Image]] = []
    for number, item in enumerate(items):
        made = outcome.pictures[eta][number]
        verdict = verdicts[eta][number]
        says = "good" if verdict.good else ("" if verdict.success else "not done; ") + f"{verdict.background_db:.0f} dB"
        cells.append((item.sentence.removeprefix("a photo of "), item.photo_picture(made.width)))
        cells += [(f"eta {eta:g}: {says}", made), ("ground truth", item.truth_picture(made.width))]
    return contact_sheet(cells, columns=6, title="SceneEdits", footer="", cell_px=128)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default=VALIDATION.name, help="the items [validation]")
    parser.add_argument("--method", choices=list(compared()), required=True)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep what training makes here, or take it from here")
    parser.add_argument("--items", type=int, metavar="N", help="only the first N items: a partial run")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="work on N items at once, on one thread each [1]"
    )
    parser.add_argument("--grid", type=Path, metavar="PNG", help="write a sheet of all items")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here, partial or not")
    args = parser.parse_args()

    chosen = SETS[args.set]
    items = chosen.items()[: args.items]
    partial = len(items) < len(chosen.items())
    weights = "fp32" if args.method in FP32 else "int8"
    etas, eta = ETAS, None
    if chosen is not VALIDATION:
        try:
            eta = chosen_eta(args.method)
        except FileNotFoundError:
            print(f"run --set validation --method {args.method} first: it chooses eta", file=sys.stderr)
            return 2
        etas = tuple(dict.fromkeys((*ETAS, eta)))
    base = BaseModel.load("demo", device=args.device, weights=weights)
    origin, oracle = provenance(base.device), Oracle.load()
    start = (args.method, args.work, args.device, weights, etas)
    outcomes = each(_apply, items, processes=args.processes, start=_start, args=start)
    found = measured(oracle, items, joined(outcomes), base)
    eta = best_eta(items, found.verdicts) if eta is None else eta
    result = {
        "method": args.method,
        "set": asdict(chosen),
        "partial": partial,
        "base_weights": weights,
        "processes": args.processes,
        "torch_threads": torch.get_num_threads() if args.processes == 1 else 1,
        "model": {"name": base.name, "sha256": base.identity.files},
        "judge": {"sha256": oracle.sha256},
        **report(items, found, eta),
    }
    for part, values in result["at_eta"].items():
        if part != "by_kind":
            shares = "  ".join(f"{name} {value['value']:.3g}" for name, value in values.items())
            print(f"{args.method}, eta {eta:g}, {part}: {shares}")
    if args.out or not partial:
        written = write_result(result_name(args.set, args.method), result, path=args.out, origin=origin)
        print(f"result: {written.name}")
    if args.grid:
        write_bytes(args.grid, encode_png(grid(items, found.outcome, found.verdicts, eta)), overwrite=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
