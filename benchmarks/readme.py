"""Fills the documents' tables from the committed results and from the presets: ``python -m benchmarks.readme``.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``. A test compares the documents with the output
of this module, so that every number in a table was measured.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lowmem_imagic.settings.presets import PRESETS, preset

from . import quality_tables, scale_tables
from .bundled import current, outdated
from .goals import REPOSITORY
from .results import RESULTS
from .scene_edits import HALVES, TEST, VALIDATION

WITHOUT_GOAL = {
    "engine_memory": ("bf16: a row", "int8: a row"),
    "speed": tuple(
        f"sd15 256 px, ours, {way}: step to bf16 + peft"
        for way in ("plain, 1 row", "plain, 2 rows", "checkpointing, 1 row", "checkpointing, 2 rows")
    ),
    "batch_ray": ("Ray: two workers to one that has both cores",),
}
"""Figures that have no goal and that a user should know, by result."""
USES = {
    "balanced": "default",
    "fast": "a first look",
    "paper": "the paper's Stable Diffusion schedule, as far as LoRA allows",
}


def presets() -> list[str]:
    """Rows: preset, stage 1, stage 2, use."""
    rows = []
    for name in PRESETS:
        config = preset(name)
        embed, finetune = config.embed, config.finetune
        rows.append(
            f"| `{name}` | {embed.steps} steps x {embed.draws} draws, rate {embed.learning_rate:g} "
            f"| {finetune.steps} steps x {finetune.draws} draws, rate {finetune.learning_rate:g}, "
            f"rank {finetune.lora_rank} on `{finetune.adapt}` | {USES[name]} |"
        )
    return rows


def rendering() -> list[str]:
    """Rows: preset, and its settings of pictures."""
    rows = ["| preset | etas | start | mask | guidance at eta 1, at eta 0 | steps |", "|---|---|---|---|---|---|"]
    for name in PRESETS:
        one = preset(name).sample
        etas, guidance = ", ".join(f"{eta:g}" for eta in one.etas), f"{one.guidance_scale:g}, {one.photo_scale:g}"
        rows.append(f"| `{name}` | {etas} | {one.start} | {one.mask:g} | {guidance} | {one.num_inference_steps} |")
    return rows


def measured() -> list[str]:
    """The table of measured figures and their goals."""
    rows = ["| figure | measured | goal |", "|---|---|---|"]
    for part in ("engine_memory", "engine_size", "engine_speed", "memory", "loading", "speed"):
        rows += _engine_rows(part)
    # Rows of `benchmarks.gpu` are left out until there are figures.
    rows += [_engine_row(line) for line in _result("gpu").get("lines", []) if None not in (line["goal"], line["value"])]
    for part in ("overhead", "ray", "soak", "tedbench"):
        rows += _engine_rows(f"batch_{part}")
    return rows + list(_crash_rows()) + _quality_rows(_result("demo_quality")) + _base_rows(_result("demo_base"))


def _crash_rows() -> Iterator[str]:
    """Yields rows about killed batches."""
    one, packs, places, pairs = (
        _result(f"crashes_{part}").get(part) for part in ("one_slot", "packs", "failpoints", "shared")
    )
    if one:
        kills = f"a batch of 24 killed {one['kills']} times, one slot"
        yield f"| {kills}: files that differ in a byte | {len(one['wrong'])} of {one['files'] * one['batches']} | 0 |"
    if packs:
        kills = f"the same in packs of four, {packs['kills']} kills"
        yield f"| {kills}: least PSNR to the uninterrupted picture | {packs['least_psnr_db']:.1f} dB | at least 35 dB |"
    if places:
        died = f"killed at {len(places['died'])} passings of failpoints"
        yield f"| {died}: files that differ in a byte | {len(places['wrong'])} | 0 |"
    if pairs:
        twice = sum(len(pair["twice"]) + pair["items"] - pair["made"] for pair in pairs)
        yield f"| two runs on one folder, {len(pairs)} times 24 items: made twice or not at all | {twice} | 0 |"


def recipe() -> list[str]:
    """Rows: data taken from an edit file, PSNR of the photo reproduced in diffusers."""
    edits = [edit for edit in _result("other_programs").get("pictures", []) if not outdated(edit)]
    names = " | ".join(f"`{edit['preset']}`" for edit in edits)
    rows = [f"| taken from the file | {names} |", "|---|" + "---|" * len(edits)]
    for words in sorted(edits[0]["photo_db"], key=lambda words: -edits[0]["photo_db"][words]) if edits else ():
        rows.append(f"| {words} | " + " | ".join(f"{edit['photo_db'][words]:.1f} dB" for edit in edits) + " |")
    return rows


def versions_of_diffusers() -> list[str]:
    """Rows: version, largest distance of our UNet's output to its UNet's and to one merged by hand."""
    rows = ["| diffusers | peft | edits | UNet's output: ours to diffusers' | ours to one merged by hand |"]
    rows.append("|---|---|---|---|---|")
    by_version = _result("other_programs").get("unet", {})
    for version in sorted(by_version, key=lambda text: [int(part) for part in text.split(".")]):
        measured = by_version[version]["rows"]
        furthest = [max(row[name] for row in measured) for name in ("diffusers", "merged_by_hand")]
        rows.append(
            f"| {version} | {by_version[version]['peft']} | {len(measured)} | {furthest[0]:.1e} | {furthest[1]:.1e} |"
        )
    return rows


def _result(name: str) -> dict[str, Any]:
    return current(RESULTS / f"{name}.json")


def _engine_rows(name: str) -> list[str]:
    """Rows of a result's lines that have a goal, and of those in `WITHOUT_GOAL`."""
    shown = WITHOUT_GOAL.get(name, ())
    lines = _result(name).get("lines", [])
    return [_engine_row(line) for line in lines if line["goal"] is not None or line["name"] in shown]


def _engine_row(line: dict[str, Any]) -> str:
    value = "not measured" if line["value"] is None else f"{line['value']:.3g} {line['unit']}"
    missed = " (missed)" if line["passed"] is False else ""
    bound = "at least" if line.get("at_least") else "at most"
    goal = "" if line["goal"] is None else f"{bound} {line['goal']:g} {line['unit']}"
    return f"| {line['name']} | {value}{missed} | {goal} |"


def _quality_rows(result: dict[str, Any]) -> list[str]:
    """Rows about the quality of the bundled model, by its judge."""
    if not result:
        return []
    one, vae, judge = result["samples"]["one_object"], result["vae"], result["judge"]
    rows = []
    for name, part in one["attributes"].items():
        goal = f"at least {100 * part['target']:.0f} %" if "target" in part else ""
        missed = " (missed)" if goal and not part["passed"] else ""
        rows.append(
            f"| bundled model: {name} right where the caption names it ({part['of']} captions) "
            f"| {100 * part['share']:.1f} %{missed} | {goal} |"
        )
    pairs = (result["samples"]["two_objects"] or {}).get("shape_color_and_floor", {})
    if "target" in pairs:
        missed = "" if pairs["passed"] else " (missed)"
        rows.append(
            f"| bundled model: both objects and the floor as named ({pairs['of']} captions) "
            f"| {100 * pairs['share']:.1f} %{missed} | at least {100 * pairs['target']:.0f} % |"
        )
    missed = "" if vae["passed"] else " (missed)"
    rows.append(
        f"| bundled autoencoder, mean PSNR on {vae['scenes']} held-out scenes "
        f"| {vae['mean_db']:.1f} dB{missed} | at least {vae['target_db']:.0f} dB |"
    )
    lowest = min(judge["renders"]["one_object"].values())
    missed = "" if judge["passed"] else " (missed)"
    rows.append(
        f"| the judge's own accuracy on held-out renders, lowest attribute "
        f"| {100 * lowest:.1f} %{missed} | at least {100 * judge['target']:.0f} % |"
    )
    details = judge["report"]["held_out"]["one_object_with_details"]
    least = min(details["accuracy"], key=details["accuracy"].__getitem__)
    rows.append(
        f"| the same where objects and grounds have details without a name: {least}, the lowest "
        f"({details['objects']} objects) | {100 * details['accuracy'][least]:.1f} % |  |"
    )
    return rows


def _base_rows(result: dict[str, Any]) -> list[str]:
    """Rows about any picture, and about patterns, in the bundled autoencoder."""
    rows = []
    for name, words in (("photographs", "photographs"), ("strangers", "scenes with strangers")):
        if part := result.get(name):
            missed = "" if part["passed"] else " (missed)"
            figure = f"bundled autoencoder, mean PSNR on {part['pictures']} {words}"
            rows.append(f"| {figure} | {part['mean_db']:.1f} dB{missed} | at least {part['target_db']:.0f} dB |")
    if part := result.get("overlap"):
        missed = "" if part["passed"] else " (missed)"
        figure = f"bundled autoencoder, overlap of {part['patterns']} patterns with those of the renders"
        rows.append(f"| {figure} | {part['mean']:.2f}{missed} | at least {part['target']:.2f} |")
    return rows


Table = Callable[[], list[str]]


def by_half(name: str, table: Callable[..., list[str]], items: str, **arguments: Any) -> dict[str, Table]:
    """A table for each half of SceneEdits."""
    return {f"{name}, {half}": partial(table, items, half, **arguments) for half in HALVES}


DOCUMENTS: dict[str, dict[str, Table]] = {
    "README.md": {},
    "docs/guide.md": {"presets": presets, "rendering": rendering},
    "docs/measured.md": {
        "measured": measured,
        **{
            f"quality, {half}": partial(quality_tables.methods, TEST.name, half, quality_tables.SHOWN)
            for half in HALVES
        },
    },
    "docs/batch.md": {},
    "docs/scale.md": {"million": scale_tables.million, "simulation": scale_tables.simulation},
    "docs/python.md": {},
    "docs/memory.md": {},
    "docs/edit_file.md": {},
    "docs/limits.md": {},
    "docs/architecture.md": {},
    "docs/quality.md": {
        **by_half("validation", quality_tables.methods, VALIDATION.name),
        "curve, validation": partial(quality_tables.curve, VALIDATION.name),
        **by_half("kinds on validation", quality_tables.kinds, VALIDATION.name),
        "differences, validation": partial(quality_tables.differences, VALIDATION.name),
        "goals, validation": partial(quality_tables.goals, VALIDATION.name),
        "families": partial(quality_tables.few, quality_tables.FAMILIES, quality_tables.WORLDS),
        "second adapter": partial(quality_tables.few, quality_tables.SECOND_ADAPTER, quality_tables.WORLDS),
        "full fine-tuning": partial(quality_tables.few, quality_tables.FULL_TUNED),
        "changes that were tried": partial(quality_tables.few, quality_tables.TRIED),
        "other ways with a source prompt": partial(quality_tables.few, quality_tables.SOURCED),
        "own noise": quality_tables.own_noise,
        "drawing": quality_tables.drawing,
        "goals": quality_tables.goals,
        **by_half("test", quality_tables.methods, TEST.name),
        "differences": quality_tables.differences,
        "curve": quality_tables.curve,
        **by_half("kinds", quality_tables.kinds, TEST.name),
        "ceiling": quality_tables.ceiling,
        "suggestion": quality_tables.suggestion,
    },
    "docs/scene_edits_1.md": {},
    "docs/other_programs.md": {"recipe": recipe, "diffusers": versions_of_diffusers},
}
"""Every document with its tables."""


def filled(text: str, tables: Mapping[str, Table]) -> str:
    """`text` with every table replaced by one of the current results.

    Raises:
        ValueError: a table does not occur exactly once.
    """
    for name, rows in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- /table -->)", re.DOTALL)
        body = "".join(row + "\n" for row in rows())
        text, found = pattern.subn(lambda match, body=body: match[1] + body + match[2], text)
        if found != 1:
            raise ValueError(f"the text has {found} tables called {name}, expected one")
    return text


def main() -> None:
    """Rewrites the tables."""
    for name, tables in DOCUMENTS.items():
        path = REPOSITORY / name
        path.write_text(filled(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
