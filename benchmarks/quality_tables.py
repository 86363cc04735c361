"""Rows of the tables on edit quality, from the committed results of `benchmarks.edit_quality`."""

import json
from collections.abc import Iterable
from typing import Any

from .compared import compared
from .edit_quality import result_name
from .results import RESULTS
from .scene_edits import HARD_KINDS, KINDS, TEST, VALIDATION

MAIN = "all_but_" + "_and_".join(HARD_KINDS)
"""Key of a result's figures over all kinds but the hard ones."""

SHOWN = ("full-3e-5", "balanced", "fast", "embedding-only", "sdedit", "ddim-inversion", "sentence-alone")
"""Methods whose results on the test set the README shows."""


def results(items: str) -> dict[str, dict[str, Any]]:
    """The complete results on a set ("validation" or "test"), by method, in the order of `compared`."""
    found = {}
    for name in compared():
        path = RESULTS / f"{result_name(items, name)}.json"
        if path.exists():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def methods(items: str, names: Iterable[str] | None = None) -> list[str]:
    """Rows: a method each, with everything that is judged together and what it costs."""
    found = results(items)
    rows = [
        "| method | eta | good items (95 %) | success | kept | background | at eta 0 | passes | s | kB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in found if names is None else names:
        if name not in found:
            rows.append(f"| `{name}` | | not measured | | | | | | | |")
            continue
        result = found[name]
        at, cost = result["at_eta"][MAIN], result["cost"]
        size = "" if cost["edit_bytes_mean"] is None else f"{cost['edit_bytes_mean'] / 1000:.0f}"
        rows.append(
            f"| `{name}` | {result['eta']:g} | {_share(at['good'])} | {100 * at['success']['value']:.0f} % "
            f"| {100 * at['kept']['value']:.0f} % | {at['background_db']['value']:.1f} dB "
            f"| {result['reconstruction_db']['value']:.1f} dB | {cost['passes']} | {cost['train_s']:.0f} | {size} |"
        )
    return rows


def kinds(items: str, names: Iterable[str]) -> list[str]:
    """Rows: a kind of edit each, the share of good items of some methods side by side."""
    found = {name: result for name, result in results(items).items() if name in set(names)}
    rows = ["| kind | " + " | ".join(f"`{name}`" for name in found) + " |", "|---" * (1 + len(found)) + "|"]
    for kind in KINDS:
        shares = [result["at_eta"]["by_kind"][kind]["good"] for result in found.values()]
        rows.append(f"| {kind} | " + " | ".join(_share(share) for share in shares) + " |")
    return rows


def readme() -> list[str]:
    """The README's table: the test set."""
    return methods(TEST.name, SHOWN)


def validation() -> list[str]:
    """The table that the defaults were chosen from."""
    return methods(VALIDATION.name)


def by_kind() -> list[str]:
    """The table of kinds, on the test set."""
    return kinds(TEST.name, SHOWN)


def _share(value: dict[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{100 * value['value']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"
