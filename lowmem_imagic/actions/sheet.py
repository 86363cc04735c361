"""A sheet of one edit over any two of eta, strength, seed and guidance, rendered in as few batches as fit."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..edits import file as edit_file
from ..edits.edit import Edit
from ..edits.recorded import sampling_of
from ..engine.memory import Meter
from ..errors import ConfigError, PromptError
from ..pictures import Photo, load_photo
from ..pictures.png import SHEET_TITLE, contact_sheet, encode_png
from ..sampling.sample import Cell
from ..settings.stages import SampleConfig, idle_problems, strength_text
from ..settings.text import BaseOptions
from ..storage.file_names import safe_stem
from ..storage.writable import check_target, write_target
from .console import Console
from .hub import local_file
from .render import footer_of, open_edit, parameters_of, pictures_of
from .result_folder import generation_parameters

AXES: dict[str, tuple[Any, ...]] = {
    "eta": (0.4, 0.6, 0.8, 1.0),
    "strength": (0.5, 0.75, 1.0, 1.25),
    "seed": (0, 1, 2, 3),
    "guidance": (1.0, 3.0, 5.0, 7.5),
}
"""The possible axes of a sheet, with their default values."""

_NEUTRAL = {"strength": 1.0, "guidance": None}
"""Values of settings that are no axis; eta and seed have the edit's own. None is the edit's own guidance."""


def sheet(
    path: Path,
    rows: str,
    columns: str,
    values: Mapping[str, Sequence[Any]],
    overrides: Mapping[str, Any],
    options: BaseOptions,
    *,
    prompt: str | None,
    photo: Path | None,
    out: Path | None,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Renders an edit file onto one labelled sheet, and returns the report.

    Every row begins with pictures to compare with: the photo (if `photo` is given), the sentence without the adapter,
    and the reconstruction (eta 0) unless the row has it.

    Args:
        path: the edit file, or its address on the Hub.
        rows, columns: two different keys of `AXES`.
        values: values of each axis; at most one for a setting that is no axis.
        overrides: other sampling settings.
        options: the base.
        prompt: a sentence instead of the edit's own.
        photo: the edit's photo, which the file does not contain.
        out: the PNG to write.
        force: replace an existing file.
        console: remarks and progress.
    """
    started = time.perf_counter()
    opened = edit_file.read(local_file(path, console))
    config = sampling_of(opened, overrides)
    points = _points(rows, columns, values, opened.eta_default, config.seeds[0])
    _check_ranges(config, points)
    target = out or Path(safe_stem(path.stem) + "-sheet.png")
    check_target(target, overwrite=force)
    source = None if photo is None else _photo_of(photo, opened.source.sha256, console)
    base, [sentence] = open_edit(opened, options, config, _one_of(opened, prompt), console)
    meter = Meter(base.device)

    fixed = {name: values[0] for name, values in points.items() if name not in (rows, columns)}
    neutral = {**_NEUTRAL, "seed": points["seed"][0], **fixed}
    grid = [[_cell(**{**fixed, rows: down, columns: across}) for across in points[columns]] for down in points[rows]]
    first = []
    for down in points[rows]:
        place = {**neutral, rows: down}
        first.append((_cell(**{**place, "eta": 1.0, "strength": 0.0}), _cell(**{**place, "eta": 0.0})))
    # A row along eta may have the reconstruction already.
    apart = columns != "eta" or 0 not in points["eta"]
    wanted = [cell for row, before in zip(grid, first, strict=True) for cell in (*before, *row)]
    rendered = pictures_of(base, opened, sentence, wanted, config, meter, console)
    shown = [] if source is None else [("photo", source.image)]
    cells = []
    for down, row, (alone, reconstruction) in zip(points[rows], grid, first, strict=True):
        label = f"{rows} {strength_text(down)}"
        # Both have an eta of their own, and the base alone a strength.
        without = "no adapter" if rows in ("strength", "eta") else f"no adapter, {label}"
        back = "reconstruction" if rows == "eta" else f"reconstruction, {label}"
        cells += [*shown, (without, rendered[alone].preview())]
        cells += [(back, rendered[reconstruction].preview())] * apart
        for across, cell in zip(points[columns], row, strict=True):
            cells.append((f"{label}, {columns} {strength_text(across)}", rendered[cell].preview()))
    stated = {name: value for name, value in fixed.items() if value is not None}
    shared = ", ".join(f"{name} {strength_text(value)}" for name, value in stated.items())
    picture = contact_sheet(
        cells,
        columns=len(shown) + 1 + apart + len(points[columns]),
        title=sentence,
        footer=f"{shared} | {footer_of(base, opened, config, {rows, columns, *stated})}",
        cell_px=192,
    )
    parameters = generation_parameters(grid[0][0], parameters_of(base, opened, [sentence], config))
    write_target(
        target,
        encode_png(picture, text={"parameters": parameters, "Software": "lowmem-imagic", "Title": SHEET_TITLE}),
        overwrite=force,
    )
    seconds = round(time.perf_counter() - started, 3)
    return {
        "edit_file": path.name,
        "sheet": target.name,
        "sentence": sentence,
        "rows": {rows: list(points[rows])},
        "columns": {columns: list(points[columns])},
        "model": base.name,
        "stages": meter.stages,
        "seconds": {"total": seconds},
        "warnings": console.warnings,
        "summary": [f"{target}: {len(points[rows])} x {len(points[columns])} pictures ({seconds:.0f} s)"],
    }


def _one_of(edit: Edit, prompt: str | None) -> list[str]:
    """The sentence of a sheet: `prompt`, or none to take the edit's own.

    Raises:
        PromptError: the edit has several sentences, or none.
    """
    if prompt is not None:
        return [prompt]
    if not edit.sentences:
        raise PromptError("this edit was trained without a sentence; ask one with `prompt`")
    if len(edit.sentences) > 1:
        known = ", ".join(map(repr, edit.sentences))
        raise PromptError(f"this edit has {len(edit.sentences)} sentences ({known}); choose one with `prompt`")
    return []


def _points(
    rows: str, columns: str, values: Mapping[str, Sequence[Any]], eta: float, seed: int
) -> dict[str, tuple[Any, ...]]:
    """The values of each of `AXES`: from `values`, else the default values of an axis, else the neutral value.

    Args:
        rows, columns: the axes.
        values: see `sheet`.
        eta, seed: those if they are no axis.

    Raises:
        ConfigError: an axis is unknown or named twice, or a setting that is no axis has several values.
    """
    problems = [
        f"`{side}` is {name!r}, expected one of {', '.join(AXES)}"
        for side, name in (("rows", rows), ("columns", columns))
        if name not in AXES
    ]
    if rows == columns:
        problems.append(f"`rows` and `columns` are both {rows!r}, expected two different ones of {', '.join(AXES)}")
    for name, numbers in values.items():
        if not numbers:
            problems.append(f"{name} is empty, expected at least one number")
        if name not in (rows, columns) and len(numbers) > 1:
            problems.append(
                f"{name} has {len(numbers)} values and is neither `rows` nor `columns`; give one, or name it"
            )
    if problems:
        raise ConfigError(problems)
    neutral = {"eta": eta, "seed": seed, **_NEUTRAL}
    usual = {name: AXES[name] if name in (rows, columns) else (neutral[name],) for name in AXES}
    return {name: tuple(values.get(name, usual[name])) for name in AXES}


def _check_ranges(config: SampleConfig, points: Mapping[str, Sequence[Any]]) -> None:
    """Checks that sampling accepts every value of every axis.

    Raises:
        ConfigError: some are out of range; names all of them.
    """
    problems: list[str] = []
    tried: list[dict[str, Any]] = [{"etas": points["eta"]}, {"seeds": points["seed"]}]
    tried += [{"strength": value} for value in points["strength"]]
    tried += [{"guidance_scale": value} for value in points["guidance"] if value is not None]
    for settings in tried:
        try:
            problems += idle_problems(replace(config, **settings), settings)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)


def _cell(**place: Any) -> Cell:
    """The cell with these values on each of `AXES`."""
    return Cell(0, place["eta"], place["seed"], place["strength"], place["guidance"])


def _photo_of(path: Path, sha256: str, console: Console) -> Photo:
    """The photo to show; warns if it is not the edit's own."""
    photo = load_photo(path)
    if photo.sha256 != sha256:
        console.warn(f"{path} is not the file this edit was made from (its bytes differ)")
    return photo
