"""Rows of the tables on edit quality, from the committed results of `benchmarks.edit_quality`."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from .averages import difference
from .bundled import current, outdated, read
from .compared import FULL_DRAWS, FULL_EMBED_STEPS, FULL_SAMPLED_ALIKE, FULL_STEPS, compared
from .edit_judge import Verdict
from .edit_quality import result_name
from .levers import LEVERS
from .results import RESULTS
from .scene_edits import GROUPS, HALVES, KINDS, KNOWN, STRANGERS, TEST, VALIDATION

NOTHING = ["Not measured with the present bundled model yet."]
"""In place of a table without results."""
FULL = "full-1e-4"
"""Full fine-tuning at the rate chosen on validation."""
UNTRAINED = "ddim-inversion"
"""The best method without training."""
SHOWN = (
    FULL,
    FULL_SAMPLED_ALIKE,
    "balanced",
    "source",
    "once",
    "fast",
    "embedding-only",
    "sdedit",
    UNTRAINED,
    "semantic-guidance",
)
"""Methods of the short tables."""
OURS = ("source", "balanced")
"""Methods whose differences from the others are shown."""
CEILINGS = {
    "the photo, not edited": "photo",
    "the ground truth": "ground_truth",
    "the same through the autoencoder": "round_trip",
    "the same with all that photo and sentence leave open drawn anew": "drawn_anew",
    "`balanced`, told where and in full": "told_both",
    "`balanced`, told in full": "told_in_full",
    "`balanced`, told where": "told_where",
}
"""Parts of the result of `benchmarks.ceiling`, by name in the table."""
TRUTHS = {"ground truth through the autoencoder": "round_trip", "the same drawn anew": "drawn_anew"}
"""Those of them that the tables by kind show."""
READINGS = {
    "at half its resolution": "coarse",
    "15 % darker": "dark",
    "with the object displaced by less than *kept* allows": "displaced",
    "replaced by another one": "another",
    "removed": "removed",
}
"""Parts of its measurement of the reader of patterns."""
WORLDS = {
    "balanced": "the bundled model",
    "flow": "a small FLUX.2 klein",
    "cascade": "a small DeepFloyd IF",
    "cascade-first-adapter": "the same edits, stage II without its adapter",
}
"""Methods on the small models of several families, by method."""
FAMILIES, SECOND_ADAPTER = ("balanced", "flow", "cascade"), ("cascade", "cascade-first-adapter")
"""Methods of the tables on families, and on the worth of a cascade's second adapter."""
FULL_TUNED = (FULL, FULL_SAMPLED_ALIKE, "embedding-only", "balanced", "source", UNTRAINED)
"""Methods of the table on full fine-tuning, which has few items: each takes 1440 passes."""
SOURCED = (
    "source",
    "source-late",
    "source-empty",
    "source-described",
    "source-in-full",
    "source-keep-all",
    "source-scale-1.5",
    "source-scale-6",
    "source-unlimited",
    "source-limit-1",
    "source-limit-2",
    "embedding-difference",
)
"""Methods of the table of other ways with a source prompt."""
TRIED = (
    "balanced",
    "rank-32",
    "rank-4-truncated",
    "finetune-240",
    "mask-off",
    *(lever.name for lever in LEVERS if lever.name not in SOURCED),
)
"""Methods of the table of changes that were tried for strangers."""
NAMES = ("color", "shape", "floor", "size", "material", "pose")
"""Attributes in the table of drawing."""
FEW = 30
"""Fewer items have no percentages."""
_PARTS = ("all", *GROUPS)
"""Parts of a half: all kinds, rigid ones, non-rigid ones."""


def results(items: str) -> dict[str, dict[str, Any]]:
    """The complete committed results on a set ("validation" or "test"), by method, in the order of `compared`."""
    complete = {}
    for name in compared():
        result = _at_chosen_eta(items, name)
        if result and not result["partial"]:
            complete[name] = result
    return complete


def methods(items: str, half: str, names: Sequence[str] | None = None) -> list[str]:
    """Rows: one per method, with its judgements of a half, and its costs."""
    measured = results(items)
    left_out = _left_out(items, compared() if names is None else names, partial=False)
    if not measured:
        return NOTHING + left_out
    overlap = ("overlap",) if half == STRANGERS else ()
    at_0 = ("overlap at eta 0",) if half == STRANGERS else ()
    rows = _head(
        *("method", "eta", "good (95 %)", "rigid", "non-rigid", "success", "kept", "background", "identity", *overlap),
        *("inside the object", "at eta 0", *at_0, "passes", "edit file"),
    )
    for name in measured if names is None else [name for name in names if name in measured]:
        result = measured[name]
        parts, cost, photo = result["at_eta"][half], result["cost"], result["photo"][half]
        at = parts["all"]
        cells = [f"`{name}`", f"{result['eta']:g}", *(_share(parts[part]["good"]) for part in _PARTS)]
        cells += [_percent(at[word]) for word in ("success", "kept")] + [_db(at["background_db"])]
        cells += [_percent(at["identity"])] + ([f"{at['overlap']['value']:.2f}"] if overlap else [])
        least = min(item["reconstruction_db"] for item in result["items"] if item["half"] == half)
        cells += [_db(at["object_db"]), f"{_db(photo['reconstruction_db'])} ({least:.0f})"]
        cells += [f"{photo['overlap']['value']:.2f}"] if at_0 else []
        size = "" if cost["edit_bytes_mean"] is None else f"{cost['edit_bytes_mean'] / 1000:.0f} kB"
        rows.append(_row(*cells, cost["passes"], size))
    return rows + left_out


def kinds(items: str, half: str) -> list[str]:
    """Rows: one per kind of edit, with the shares of good items of some methods, and of the ground truth."""
    measured = {name: result for name, result in results(items).items() if name in SHOWN}
    if not measured:
        return NOTHING
    ceilings = _result("edit_ceiling").get(items, {})
    parts = {f"`{name}`": result["at_eta"][half] for name, result in measured.items()}
    parts |= {name: ceilings[what][half] for name, what in TRUTHS.items() if what in ceilings}
    rows = _head("kind", *parts)
    for kind in KINDS:
        rows.append(_row(kind, *(_percent(part[kind]["good"]) for part in parts.values())))
    return rows


def curve(items: str = TEST.name) -> list[str]:
    """Rows: good items along eta of some methods, in both halves."""
    measured = {name: result for name, result in results(items).items() if name in SHOWN}
    if not measured:
        return NOTHING
    etas = sorted({point["eta"] for result in measured.values() for point in result["curve"]})
    rows = _head("method", "half", *(f"eta {eta:g}" for eta in etas))
    for name, result in measured.items():
        points = {point["eta"]: point for point in result["curve"]}
        for half in HALVES:
            shares = [_percent(points[eta][half]["all"]["good"]) if eta in points else "" for eta in etas]
            rows.append(_row(f"`{name}`", half, *shares))
    return rows


def differences(items: str = TEST.name) -> list[str]:
    """Rows: good items of `OURS` less those of other methods, on the same items."""
    measured = results(items)
    pairs = [
        (ours, other)
        for number, ours in enumerate(OURS)
        for other in SHOWN
        if ours in measured and other in measured and other not in OURS[: number + 1]
    ]
    if not pairs:
        return NOTHING
    rows = _head("difference", *(f"{half}, {part.replace('_', '-')}" for half in HALVES for part in _PARTS))
    for ours, other in pairs:
        gaps = [_gap(measured[ours], measured[other], half, part) for half in HALVES for part in _PARTS]
        rows.append(_row(f"`{ours}` less `{other}`", *("" if gap is None else _points(gap) for gap in gaps)))
    return rows


def goals(items: str = TEST.name) -> list[str]:
    """Rows: goals, and the results on a set.

    Full fine-tuning and `once` count with the items that they have: the set takes them hours. A row names their number.
    """
    measured = results(items)
    full, once = (_at_chosen_eta(items, name) for name in (FULL, "once"))
    balanced = measured.get("balanced")
    if balanced is None:
        return NOTHING
    rows = _head("", "goal", "measured")

    def row(name: str, goal: str, value: str | None, passed: bool | None = None) -> None:
        missed = " (missed)" if passed is False else ""
        rows.append(_row(name, goal, "not measured" if value is None else value + missed))

    def compared_with(
        one: Mapping[str, Any], other: Mapping[str, Any], half: str
    ) -> tuple[dict[str, Any] | None, str | None]:
        """A difference of two results, and its words; None for both if one of them has no figures yet."""
        # A run that was stopped has no eta yet.
        gap = _gap(one, other, half, "all") if "eta" in one and "eta" in other else None
        if gap is None:
            return None, None
        return gap, _points(gap) + (f" on {gap['of']} items" if one["partial"] or other["partial"] else "")

    ours = [name for name in ("balanced", "source") if name in measured]
    for name, other, least in ((UNTRAINED, measured.get(UNTRAINED, {}), 25), (FULL, full, 10)):
        for own in ours:
            gap, value = compared_with(measured[own], other, STRANGERS)
            passed = None if gap is None else 100 * gap["value"] >= least and gap["interval_95"][0] > 0
            row(f"good, strangers: `{own}` less `{name}`", f"at least +{least} points, interval above 0", value, passed)
    for own in ours:
        good = measured[own]["at_eta"][KNOWN]["all"]["good"]
        row(f"good, known: `{own}`", "at least 60 %", _share(good), good["value"] >= 0.6)
    for half in HALVES:
        gap, value = compared_with(once, balanced, half)
        row(
            f"good, {half}: `once` less `balanced`",
            "at least -5 points",
            value,
            None if gap is None else gap["value"] >= -0.05,
        )
    for own in ours:
        for half in HALVES:
            success = measured[own]["at_eta"][half]["non_rigid"]["success"]
            name = f"success, non-rigid kinds, {half}: `{own}`"
            row(name, "at least 80 %", _share(success), success["value"] >= 0.8)
    overlap = balanced["photo"][STRANGERS]["overlap"]
    row("overlap at eta 0, strangers", "at least 0.8", _number(overlap), overlap["value"] >= 0.8)
    of_full = full["cost"]["passes"] if "cost" in full else (FULL_EMBED_STEPS + FULL_STEPS) * FULL_DRAWS
    for name, share in (("balanced", 4), ("fast", 10)):
        if name in measured:
            passes = measured[name]["cost"]["passes"]
            value = f"{passes} of {of_full}"
            row(f"passes, `{name}` of `{FULL}`'s", f"at most 1/{share}", value, passes * share <= of_full)
    packed, fp32 = (measured.get(name) for name in ("balanced-packed", "balanced-fp32"))
    for half in HALVES:
        if packed and (gap := _gap(packed, balanced, half, "all")):
            low, high = gap["interval_95"]
            row(f"good, {half}: trained in a pack less alone", "0 within the interval", _points(gap), low <= 0 <= high)
        if fp32 and (gap := _gap(balanced, fp32, half, "all")):
            within = abs(gap["value"]) <= 0.02
            row(f"good, {half}: 8-bit base less fp32 base", "within 2 points", _points(gap), within)
    return rows


def ceiling() -> list[str]:
    """Rows: good items for the ground truth, and for edits with more knowledge; the reader of patterns itself."""
    measured = _result("edit_ceiling")
    if not measured:
        return NOTHING
    columns = [(items, half) for items in (VALIDATION.name, TEST.name) for half in HALVES]
    rows = _head("picture", *(f"{items}, {half}" for items, half in columns))

    def cell(part: Mapping[str, Any] | None) -> str:
        return "" if part is None else f"{_share(part['all']['good'])}; success {_percent(part['all']['success'])}"

    def add(name: str, cells: list[str]) -> None:
        """Adds a row, if anything of it was measured."""
        if any(cells):
            rows.append(_row(name, *cells))

    for name, what in CEILINGS.items():
        add(name, [cell(measured.get(items, {}).get(what, {}).get(half)) for items, half in columns])
    for name in OURS[::-1]:
        parts = [results(items).get(name, {}).get("at_eta", {}).get(half) for items, half in columns]
        add(f"`{name}`, as it is", list(map(cell, parts)))
    for name, what in READINGS.items():
        patterns = [measured.get(items, {}).get("patterns", {}).get(what) for items, _ in columns]
        cells = [
            f"identity {_percent(part['identity'])}; overlap {part['overlap']['value']:.2f}"
            if part and half == STRANGERS
            else ""
            for part, (_, half) in zip(patterns, columns, strict=True)
        ]
        add(f"the pattern of the ground truth, {name}", cells)
    return rows


def suggestion() -> list[str]:
    """Rows: good items of validation at an eta suggested for each by the base's own losses, at one eta for all, and at
    each item's best. The measurement and what it measured are gone (commit in the result's provenance)."""
    measured = _result(f"suggestion_{VALIDATION.name}")
    if not measured:
        return NOTHING
    rows = _head("eta", *HALVES)
    prices = measured[KNOWN]["suggested"]
    rows.append(_row(f"one for all, {measured['eta']:g}", *(_share(measured[half]["fixed"]) for half in HALVES)))
    for price in prices:
        shares = (_share(measured[half]["suggested"][price]) for half in HALVES)
        rows.append(_row(f"suggested, price {price}", *shares))
    rows.append(_row("the best of each", *(_share(measured[half]["best_of_each"]) for half in HALVES)))
    return rows


def few(names: Sequence[str], labels: Mapping[str, str] | None = None, items: str = VALIDATION.name) -> list[str]:
    """Rows: methods on the items that all of them have; each at its best eta for these.

    Partial results count, too: an item of some methods takes minutes.

    Args:
        names: the methods.
        labels: what the table calls their models; None for a table of methods.
        items: the set.
    """
    measured = {name: result for name in names if (result := _result(result_name(items, name)))}
    left_out = _left_out(items, names, partial=True)
    if len(measured) < 2:
        return NOTHING + left_out
    judged = {name: {item["name"]: item for item in result["items"]} for name, result in measured.items()}
    common = sorted(set.intersection(*(set(own) for own in judged.values())))
    rows = _head(
        *("model" if labels else "method", "photos", "eta", "good", "success", "kept", "background", "identity"),
        *("overlap", "at eta 0", "overlap at eta 0", "passes"),
    )
    for name, own in judged.items():
        etas = [eta for eta in own[common[0]]["verdicts"] if float(eta) > 0]
        best = max(etas, key=lambda eta: sum(own[item]["verdicts"][eta]["good"] for item in common))
        for half in HALVES:
            part = [own[item] for item in common if own[item]["half"] == half]
            verdicts = [Verdict.from_json(item["verdicts"][best]) for item in part]
            words = ("good", "success", "kept", "background", "identity")
            shares = [f"{sum(getattr(v, word) for v in verdicts)} of {len(part)}" for word in words]
            overlaps = [v.overlap for v in verdicts if v.overlap is not None]
            at_0 = [item["photo_overlap"] for item in part if item["photo_overlap"] is not None]
            photo = f"{median(item['reconstruction_db'] for item in part):.1f} dB"
            means = [f"{mean(values):.2f}" if values else "" for values in (overlaps, at_0)]
            label = labels[name] if labels else f"`{name}`"
            rows.append(_row(label, half, best, *shares, means[0], photo, means[1], part[0]["passes"]))
    return rows + left_out


def own_noise() -> list[str]:
    """Rows: how white the photo's own noise is, by way of inversion."""
    result = _result("own_noise")
    if not result:
        return NOTHING
    rows = _head("inversion", *(f"{name}, {half}" for name in ("standard deviation", "correlation") for half in HALVES))
    for name, way in result["ways"].items():
        deviations = [f"{way[half]['standard_deviation']:.2f}" for half in HALVES]
        rows.append(_row(name, *deviations, *(f"{way[half]['correlation']:.2f}" for half in HALVES)))
    return rows


def drawing() -> list[str]:
    """Rows: how often the small models of several families draw the attributes that a caption names."""
    rows = _head("model", "captions", *NAMES)
    found = {"the bundled model": _result("demo_quality").get("samples", {}).get("one_object")}
    found |= {WORLDS[name]: _result(f"world_quality_{name}").get("one_object") for name in ("flow", "cascade")}
    if sum(map(bool, found.values())) < 2:
        return NOTHING
    for name, part in found.items():
        if part:
            shares = (part["attributes"][attribute] for attribute in NAMES)
            rows.append(_row(name, part["captions"], *(_share_or_number(one) if one else "" for one in shares)))
    return rows


def _gap(ours: Mapping[str, Any], theirs: Mapping[str, Any], half: str, part: str) -> dict[str, Any] | None:
    """Good items of one result less those of another, in a part of a half; None without common items."""
    members = GROUPS.get(part, KINDS)
    asked = {i["name"]: i["kind"] for i in ours["items"] if i["half"] == half and i["kind"] in members}
    return difference(asked, *(_good(result) for result in (ours, theirs)))


def _good(result: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each item is good at the eta of the result, by name."""
    eta = f"{result['eta']:g}"
    return {item["name"]: item["verdicts"][eta]["good"] for item in result["items"]}


def _at_chosen_eta(items: str, name: str) -> dict[str, Any]:
    """The committed result of a method on a set; empty if its eta is no longer the one that validation chooses."""
    result, chosen = _result(result_name(items, name)), _result(result_name(VALIDATION.name, name))
    return result if chosen.get("eta", result.get("eta")) == result.get("eta") else {}


def _result(name: str) -> dict[str, Any]:
    return current(RESULTS / f"{name}.json")


def _left_out(items: str, names: Iterable[str], *, partial: bool) -> list[str]:
    """A line under a table with the methods whose results are of an earlier bundled model, if there are any.

    Args:
        items: the set.
        names: the methods of the table.
        partial: whether the table has partial results, too.
    """
    found = {name: read(RESULTS / f"{result_name(items, name)}.json") for name in names}
    old = [f"`{name}`" for name, result in found.items() if outdated(result) and (partial or not result["partial"])]
    return ["", f"Measured with an earlier bundled model alone, and left out: {', '.join(old)}."] if old else []


def _head(*columns: str) -> list[str]:
    return [_row(*columns), "|---" * len(columns) + "|"]


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _percent(value: Mapping[str, Any]) -> str:
    return f"{100 * value['value']:.0f} %"


def _share_or_number(part: Mapping[str, Any]) -> str:
    """A share, or the number itself of a few."""
    return f"{100 * part['share']:.0f} %" if part["of"] >= FEW else f"{part['share'] * part['of']:.0f} of {part['of']}"


def _db(value: Mapping[str, Any]) -> str:
    return f"{value['value']:.1f} dB"


def _number(value: Mapping[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{value['value']:.3f} ({low:.3f}-{high:.3f})"


def _share(value: Mapping[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{100 * value['value']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def _points(value: Mapping[str, Any]) -> str:
    low, high = value["interval_95"]
    return f"{100 * value['value']:+.1f} points ({100 * low:+.0f} to {100 * high:+.0f})"
