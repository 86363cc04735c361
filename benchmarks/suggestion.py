"""Measures the value of the suggested eta: good items at it, at one fixed eta, and at the best eta of each item.

    python -m benchmarks.suggestion --set validation --work DIR

Edits are those of `benchmarks.edit_quality --method balanced` (kept in ``--work``, or trained again). The price of
leaving the photo (`lowmem_imagic.sampling.suggestion.PRICE`) is tried at several values; the validation set chooses.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.pipeline.apply import decode_cells, render_latents
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.sampling.suggestion import PRICE, Suggestion, suggest_eta, worth
from lowmem_imagic.settings.presets import preset

from .averages import share
from .bundled import model_of
from .edit_judge import Verdict, judge
from .edit_methods import ETAS, SEED, as_photo, embeds, trained
from .edit_quality import best_eta
from .oracle import Oracle
from .results import provenance, write_result
from .scene_edits import HALVES, SETS, VALIDATION, SceneEdit, rows_of

PRICES = (0.0, 0.25, PRICE, 0.75, 1.0)


def suggested(
    base: BaseModel, oracle: Oracle, items: Sequence[SceneEdit], folder: Path | None
) -> tuple[list[Suggestion], dict[float, list[Verdict]]]:
    """For each item a suggestion, and for each eta the verdicts on all items."""
    config = preset("balanced")
    suggestions: list[Suggestion] = []
    verdicts: dict[float, list[Verdict]] = {eta: [] for eta in ETAS}
    for item in items:
        data, _ = trained(base, Job(as_photo(item.photo_picture(base.sizes.own[0])), item.sentence), config, folder)
        edit = edit_file.decode(data)
        cells = [Cell(0, eta, SEED) for eta in ETAS]
        latents = render_latents(base, [edit], cells, config.sample)
        pictures = decode_cells(base, [edit], cells, latents)
        for eta, picture in zip(ETAS, pictures, strict=True):
            verdicts[eta] += judge(oracle, [item], [picture])
        target = base.encode_text([item.sentence])
        optimized = embeds(edit.conditioning["embeds"].float()[None])
        rendered = torch.stack([of["unet"] for of in latents])
        suggestions.append(suggest_eta(base, rendered, ETAS, target, optimized))
    return suggestions, verdicts


def report(
    items: Sequence[SceneEdit],
    suggestions: Sequence[Suggestion],
    verdicts: Mapping[float, Sequence[Verdict]],
    fixed: float,
) -> dict[str, Any]:
    """Shares of good items of each half, averaged over kinds, and every item's suggestion."""
    best = [max(ETAS[1:], key=lambda eta, number=number: verdicts[eta][number].good) for number in range(len(items))]
    chosen = {f"{price:g}": [_at_price(suggestion, price) for suggestion in suggestions] for price in PRICES}

    def shares(rows: Sequence[int]) -> dict[str, Any]:
        def good(etas: Sequence[float]) -> dict[str, Any]:
            return share([items[n].kind for n in rows], [verdicts[etas[n]][n].good for n in rows])

        return {
            "fixed": good([fixed] * len(items)),
            "best_of_each": good(best),
            "suggested": {price: good(etas) for price, etas in chosen.items()},
        }

    return {
        "eta": fixed,
        **{half: shares(rows) for half in HALVES if (rows := rows_of(items, half=half))},
        "items": [
            {"name": item.name, "suggestion": suggestion.as_json(), "best": eta}
            for item, suggestion, eta in zip(items, suggestions, best, strict=True)
        ],
    }


def _at_price(suggestion: Suggestion, price: float) -> float:
    """The suggested eta at another price, from a suggestion's scores; never the photo itself."""
    scores = suggestion.scores
    values = worth([s.follows for s in scores], [s.distance for s in scores], price)
    return max((v, s.eta) for v, s in zip(values, scores, strict=True) if s.eta > 0)[1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default=VALIDATION.name, help="the items [validation]")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the edits are kept")
    parser.add_argument("--eta", type=float, help="the fixed eta [the best one of this set]")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    items = SETS[args.set].items()
    base = BaseModel.load("demo", device=args.device)
    origin = provenance(base.device)
    suggestions, verdicts = suggested(base, Oracle.load(), items, args.work)
    fixed = best_eta(verdicts) if args.eta is None else args.eta
    result = report(items, suggestions, verdicts, fixed)
    for half in HALVES:
        for name in ("fixed", "best_of_each"):
            print(f"{half}, {name}: {result[half][name]}")
        for price, good in result[half]["suggested"].items():
            print(f"{half}, suggested at price {price}: {good}")
    written = write_result(
        f"suggestion_{args.set}", {"set": args.set, "model": model_of(base), **result}, origin=origin
    )
    print(f"result: {written.name}")


if __name__ == "__main__":
    main()
