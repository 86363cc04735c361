"""Tables about very many edits: the simulation, and a million edits by the figures of committed results."""

import json
from collections.abc import Iterator
from statistics import median
from typing import Any

from lowmem_imagic.batch.entries import MAX_ITEMS
from lowmem_imagic.batch.executors.ray import CHUNK
from lowmem_imagic.settings.presets import preset

from .results import RESULTS

MILLION = 1_000_000
UNKNOWN = "not measured"
INTERRUPTIONS, DAYS, CARDS = 419, 54, 16_384
"""Unexpected interruptions of a training of Llama 3, its days and its cards (arXiv 2407.21783, section 3.3.4)."""
SIDE_PX = 512


def _result(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _figure(result: dict[str, Any], name: str) -> float | None:
    """The value of the line that ends in `name`; None if there is none."""
    return next((line["value"] for line in result.get("lines", []) if line["name"].endswith(name)), None)


def _hours(seconds: float | None) -> str:
    hours = None if seconds is None else seconds * MILLION / 3600
    return UNKNOWN if hours is None else f"{hours:,.0f} hours" if hours >= 10 else f"{hours:.1f} hours"


def simulation() -> list[str]:
    """Rows: figure, in memory, on a disk."""
    runs = [_result("scale"), _result("scale_disk")]
    rows = ["| | " + " | ".join(_place(run) for run in runs) + " |", "|---" * (len(runs) + 1) + "|"]
    for label, text in _simulated().items():
        rows.append(f"| {label} | " + " | ".join(text(run) if run else UNKNOWN for run in runs) + " |")
    return rows


def _place(run: dict[str, Any]) -> str:
    if not run:
        return UNKNOWN
    place = "in memory" if run["file_system"] == "tmpfs" else "on a disk"
    return f"{run['items']:,} items {place}, {run['actors']} actors"


def _simulated() -> dict[str, Any]:
    """Functions from a result to the text of a cell, by the label of their row."""

    def line(name: str, text: str) -> Any:
        def cell(run: dict[str, Any]) -> str:
            value = _figure(run, name)
            return UNKNOWN if value is None else text.format(value)

        return cell

    return {
        "items published a second": line("published a second", "{:.0f}"),
        "driver's processor time for an item": line("processor time for each", "{:.1f} ms"),
        "the same, second half of the list to the first": line("second half of the list to the first", "{:.2f} times"),
        "driver's resident memory": lambda run: f"{_peak(run) / 1e6:.0f} MB",
        "its growth from the second tenth to the last": line("after warm-up", "{:.2f} %"),
        "an actor's memory": _actor,
        "killed drivers, killed actors": _killed,
        "items lost, items published twice": lambda run: f"{run['lost']}, {run['published_twice']}",
        "items made again because of the kills": lambda run: str(run["work_done_again"]),
        "from the command to the first item, for the driver after the last kill": (
            lambda run: f"{run['drivers'][-1]['seconds_to_first_item']:.0f} s"
        ),
        "the command with nothing left to make": lambda run: f"{run['with_nothing_to_make_s']:.0f} s",
        "`batch status`": lambda run: f"{run['status_s']:.2f} s",
        "ledger": lambda run: f"{run['ledger_bytes'] / 1e6:.0f} MB",
    }


def _peak(run: dict[str, Any]) -> int:
    return max(sample["resident_bytes"] or 0 for sample in run["samples"])


def _actor(run: dict[str, Any]) -> str:
    counts = [one for one in run["memory_of_actors"] if one["number"]]
    if not counts:
        return UNKNOWN
    most = max(counts, key=lambda one: one["number"])
    return f"{most['bytes'] / most['number'] / 1e6:.0f} MB ({most['number']} at once)"


def _killed(run: dict[str, Any]) -> str:
    drivers, actors = (
        sum(kill["number"] for kill in run["killed"] if kill["processes"] == processes)
        for processes in ("driver", "actors")
    )
    return f"{drivers}, {actors}"


def million() -> list[str]:
    """Rows: what a million edits of Stable Diffusion 1.5 take, and the result that says so."""
    return ["| | a million edits | from |", "|---|---|---|", *_million()]


def _million() -> Iterator[str]:
    gpu, first, sizes, scale = (_result(name) for name in ("gpu", "gpu_first_run", "engine_size", "scale"))
    for words in ("an edit of 16 packed", "an edit alone"):
        yield f"| card hours, `balanced` with 8 etas, {words} | {_hours(_figure(gpu, words))} | `gpu.json` |"
    steps = preset("balanced").finetune.steps
    seconds = {run["edits"]: steps * median(run["step_s"]) / run["edits"] for run in first.get("steps", [])}
    for edits, edit_s in seconds.items():
        name = first["provenance"]["device"]["name"]
        yield (
            f"| of these, the {steps} steps of stage 2, {edits} at once, {name} | {_hours(edit_s)} "
            "| `gpu_first_run.json` |"
        )
    yield f"| of these, stage 1, inversion and rendering | {UNKNOWN} | `gpu.json` |"
    if (size_mb := _figure(sizes, "sd15, preset balanced")) is not None:
        yield f"| edit files | {size_mb * MILLION / 1e6:.1f} TB | `engine_size.json` |"
    etas = len(preset("balanced").sample.etas)
    pixels = 3 * SIDE_PX**2 * etas * MILLION / 1e12
    yield f"| pictures, {etas} etas of {SIDE_PX} px | at most {pixels:.1f} TB | their pixels, uncompressed |"
    driver_ms = _figure(scale, "processor time for each")
    yield f"| processor of the drivers | {_hours(driver_ms and driver_ms / 1000)} | `scale.json` |"
    rate = _figure(_result("scale_disk"), "published a second")
    if rate is not None and seconds:
        yield (
            f"| cards that one driver keeps busy with stage 2 alone, by its disk | {rate * min(seconds.values()):.0f} "
            "| `scale_disk.json`, `gpu_first_run.json` |"
        )
    yield f"| lists, of {MAX_ITEMS:,} items at most | {MILLION // MAX_ITEMS} | `batch/entries.py` |"
    yield (
        f"| card hours between two unexpected interruptions | {DAYS * 24 * CARDS / INTERRUPTIONS:,.0f} "
        f"| a training of Llama 3: {INTERRUPTIONS} in {DAYS} days on {CARDS:,} cards (arXiv 2407.21783) |"
    )
    yield f"| items that begin again when a card is lost | at most {CHUNK} | `batch/executors/ray.py` |"
