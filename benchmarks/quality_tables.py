"""Rows of the tables on edit quality, from the committed results of `benchmarks.edit_quality`."""

import json
from collections.abc import Iterable
from typing import Any

from .compared import FULL_DRAWS, FULL_EMBED_STEPS, FULL_SAMPLED_ALIKE, FULL_STEPS, names
from .edit_judge import difference
from .edit_quality import result_name
from .results import RESULTS
from .scene_edits import HARD_KINDS, KINDS, TEST, VALIDATION

MAIN = "all_but_" + "_and_".join(HARD_KINDS)
"""Key of a result's figures over all kinds except the hard ones."""

COLUMNS = (
    "method",
    "items",
    "eta",
    "good (95 %)",
    "success",
    "kept",
    "background",
    "at eta 0",
    "passes",
    "seconds",
    "edit file",
)
NOTHING = ["Not measured yet."]
"""In place of a table without results."""
FULL = "full-1e-4"
"""Full fine-tuning at the rate chosen on validation."""
UNTRAINED = "ddim-inversion"
"""The best method without training."""
SHOWN = (
    FULL,
    FULL_SAMPLED_ALIKE,
    "balanced",
    "fast",
    "small",
    "embedding-only",
    "sdedit",
    UNTRAINED,
    "sentence-alone",
)
"""Methods of the short table, on the test set."""
CEILINGS = {
    "the ground truth": "ground_truth",
    "the same through the autoencoder": "round_trip",
    "`balanced`, told where and in full": "told_both",
    "`balanced`, told in full": "told_in_full",
    "`balanced`, told where": "told_where",
}
"""Parts of the result of `benchmarks.ceiling`, by name in the table."""


def results(items: str) -> dict[str, dict[str, Any]]:
    """The committed results on a set ("validation" or "test"), by method, in the order of `compared.names`."""
    found = {}
    for name in names():
        result = _result(result_name(items, name))
        if result:
            found[name] = result
    return found


def methods(items: str, names: Iterable[str] | None = None) -> list[str]:
    """Rows: one per method, with its judgements and costs."""
    found = results(items)
    rows = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    if not found:
        return NOTHING
    for name in found if names is None else names:
        if name not in found:
            rows.append(f"| `{name}` | | | not measured | | | | | | | |")
            continue
        result = found[name]
        at, cost = result["at_eta"][MAIN], result["cost"]
        seconds = cost["train_s"] + len(result["curve"]) * cost["sample_s_per_picture"]
        size = "" if cost["edit_bytes_mean"] is None else f"{cost['edit_bytes_mean'] / 1000:.0f} kB"
        rows.append(
            f"| `{name}` | {at['good']['of']} {items} | {result['eta']:g} | {_share(at['good'])} "
            f"| {100 * at['success']['value']:.0f} % | {100 * at['kept']['value']:.0f} % "
            f"| {at['background_db']['value']:.1f} dB | {result['reconstruction_db']['value']:.1f} dB "
            f"| {cost['passes']} | {seconds:.0f} | {size} |"
        )
    return rows


def kinds(items: str, names: Iterable[str]) -> list[str]:
    """Rows: one per kind of edit, with the shares of good items of some methods."""
    found = {name: result for name, result in results(items).items() if name in set(names)}
    if not found:
        return NOTHING
    rows = ["| kind | " + " | ".join(f"`{name}`" for name in found) + " |", "|---" * (1 + len(found)) + "|"]
    for kind in KINDS:
        shares = [result["at_eta"]["by_kind"][kind]["good"] for result in found.values()]
        rows.append(f"| {kind} | " + " | ".join(f"{100 * share['value']:.0f} %" for share in shares) + " |")
    return rows


def readme() -> list[str]:
    """The short table: the test set; until it is measured, the validation set."""
    items = TEST.name if results(TEST.name) else VALIDATION.name
    return methods(items, [name for name in SHOWN if name in results(items)])


def test() -> list[str]:
    """All results on the test set."""
    return methods(TEST.name)


def validation() -> list[str]:
    """The table for choosing the defaults."""
    return methods(VALIDATION.name)


def by_kind() -> list[str]:
    """The table of kinds, on the test set."""
    return kinds(TEST.name, SHOWN)


def goals(items: str = TEST.name) -> list[str]:
    """Rows: goals, and the results on a set."""
    found = results(items)
    if not found:
        return NOTHING
    rows = ["| | goal | measured |", "|---|---|---|"]

    def row(name: str, goal: str, measured: str | None, passed: bool | None = None) -> None:
        missed = " (missed)" if passed is False else ""
        rows.append(f"| {name} | {goal} | {'not measured' if measured is None else measured + missed} |")

    balanced, full, fp32 = (found.get(name) for name in ("balanced", FULL, "balanced-fp32"))
    if balanced:
        good = balanced["at_eta"][MAIN]["good"]
        row("good items, `balanced`", "at least 60 %", _share(good), good["value"] >= 0.6)
        db = balanced["reconstruction_db"]["value"]
        row("picture at eta 0 to the photo's round trip, median", "at least 24 dB", f"{db:.1f} dB", db >= 24)
    name, goal = "good items, `balanced` less full fine-tuning", "at least 0, the interval not below"
    if balanced and full:
        gap = difference(_good(balanced), _good(full))
        row(f"{name}, same {gap['of']} items", goal, _points(gap), gap["value"] >= 0)
    else:
        row(name, goal, None)
    alike = found.get(FULL_SAMPLED_ALIKE)
    if balanced and alike:
        gap = difference(_good(balanced), _good(alike))
        row(f"the same, full fine-tuning sampled as `balanced` is, {gap['of']} items", "", _points(gap))
    untrained = found.get(UNTRAINED)
    if balanced and untrained:
        gap = difference(_good(balanced), _good(untrained))
        row(f"the same, `{UNTRAINED}`, which trains nothing, {gap['of']} items", "", _points(gap))
    of_full = full["cost"]["passes"] if full else (FULL_EMBED_STEPS + FULL_STEPS) * FULL_DRAWS
    for name, share in (("balanced", 4), ("fast", 10)):
        if name in found:
            passes = found[name]["cost"]["passes"]
            row(
                f"passes, `{name}` of full fine-tuning's",
                f"at most 1/{share}",
                f"{passes} of {of_full}",
                passes * share <= of_full,
            )
    packed = found.get("balanced-packed")
    if balanced and packed:
        gap = difference(_good(packed), _good(balanced))
        low, high = gap["interval_95"]
        row("good items, trained in a pack less alone", "0 within the interval", _points(gap), low <= 0 <= high)
    if balanced and fp32:
        gap = difference(_good(balanced), _good(fp32))
        row("good items, 8-bit base less fp32 base", "within 2 points", _points(gap), abs(gap["value"]) <= 0.02)
    return rows


def goals_on_validation() -> list[str]:
    """The same on the validation set."""
    return goals(VALIDATION.name)


def ceiling() -> list[str]:
    """Rows: good items for the ground truth, for edits with more knowledge, and for the sentence alone."""
    found = _result("edit_ceiling")
    rows = ["| picture | validation | test |", "|---|---|---|"]
    sets = (VALIDATION.name, TEST.name)
    shares = {name: [found.get(items, {}).get(what) for items in sets] for name, what in CEILINGS.items()}
    for name, method in (("`balanced`, as it is", "balanced"), ("the sentence alone", "sentence-alone")):
        shares[name] = [results(items).get(method, {}).get("at_eta", {}).get(MAIN) for items in sets]
    for name, values in shares.items():
        cells = (
            f"{_share(value['good'])}; success {100 * value['success']['value']:.0f} %" if value else ""
            for value in values
        )
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    return rows if any(any(values) for values in shares.values()) else NOTHING


def suggestion() -> list[str]:
    """Rows: good items at the suggested eta, at one eta for all, and at each item's best eta."""
    rows = ["| eta | validation | test |", "|---|---|---|"]
    found = [_result(f"suggestion_{items}") for items in (VALIDATION.name, TEST.name)]
    if not any(found):
        return NOTHING
    names = list(next((result["suggested"] for result in found if result), {}))
    shares: dict[str, list[Any]] = {
        "one for all": [result.get("fixed") for result in found],
        **{
            f"suggested, price {price}": [result.get("suggested", {}).get(price) for result in found] for price in names
        },
        "the best of each": [result.get("best_of_each") for result in found],
    }
    for name, values in shares.items():
        rows.append(f"| {name} | " + " | ".join("" if value is None else _share(value) for value in values) + " |")
    return rows


def _good(result: dict[str, Any]) -> dict[str, float]:
    """Whether each item is good at the eta of the result, by name, without the hard kinds."""
    eta = f"{result['eta']:g}"
    return {
        item["name"]: float(item["verdicts"][eta]["good"])
        for item in result["items"]
        if item["name"].split("-")[0] not in HARD_KINDS
    }


def _result(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _share(value: dict[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{100 * value['value']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def _points(value: dict[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{100 * value['value']:+.1f} points ({100 * low:+.0f} to {100 * high:+.0f})"
