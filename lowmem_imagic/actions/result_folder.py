"""The results of a run on disk: pictures with their parameters, the contact sheet, the report.

Existing files are replaced only on request, which is checked before any work is done. Every file appears whole or not
at all.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..diffusion.schedules import guidance_at
from ..errors import OutputError, OutputExistsError, OutputUnwritableError
from ..pictures.png import SHEET_TITLE, Box, contact_sheet, encode_png
from ..plain_text import one_line
from ..sampling.sample import Cell
from ..settings.stages import sourced, strength_text, strengths
from ..storage.file_names import MAX_REPORT_BYTES, REPORT, SHEET, safe_stem
from ..storage.regular_files import read_regular
from ..storage.writable import check_writable, unusable, write_target

_TEXTS = ("parameters", "Software")
"""The text entries of a picture."""
COVER_PX = 512
"""Longest side of a cover."""
_PICTURE = re.compile(r"([0-9]{1,2}-[a-z0-9-]{1,60}_)?eta_-?[0-9]+\.[0-9]+(_seed_[0-9]+)?\.png")
_COVER = re.compile(r"[a-z0-9-]{1,60}\.png")


@dataclass
class ResultFolder:
    """A folder that receives results; see `prepare`."""

    path: Path
    overwrite: bool
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256, in hex, of the files written so far, by name."""
    stale: frozenset[str] = frozenset()
    """Pictures of an earlier run in this folder, which this run replaces."""
    make_parents: bool = True
    """Whether missing parent folders are created; otherwise they are an error."""

    @staticmethod
    def prepare(path: Path, *, overwrite: bool) -> "ResultFolder":
        """The folder, checked to be writable before any expensive work.

        Raises:
            OutputExistsError: it exists, is not empty and `overwrite` is False.
            OutputUnwritableError: it cannot be created or written, or the disk is full.
        """
        check_writable(path)
        try:
            if os.path.lexists(path) and not path.is_dir():
                raise OutputExistsError(f"{path} is no folder; name a folder with `out`")
            if path.is_dir() and any(path.iterdir()) and not overwrite:
                raise OutputExistsError(f"{path} holds files already; name another folder with `out`, or use `force`")
        except OSError as error:
            raise unusable(path, error) from error
        return ResultFolder(path, overwrite, stale=pictures_of_report(path))

    def write(self, name: str, data: bytes) -> Path:
        """Writes one file into the folder, which is created if needed, and returns the file's path."""
        target = self.path / name
        write_target(target, data, overwrite=self.overwrite, parents=self.make_parents)
        self.files[name] = hashlib.sha256(data).hexdigest()
        return target

    def digests(self) -> dict[str, str]:
        """SHA-256 of all files but the report."""
        return {name: digest for name, digest in sorted(self.files.items()) if name != REPORT}

    def write_report(self, value: Mapping[str, Any]) -> Path:
        """Writes the report; removes pictures of an earlier run's report that this run did not write."""
        try:
            # First, so that the report never names a missing file.
            for name in self.stale - self.files.keys():
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise unusable(self.path, error) from error
        return self.write(REPORT, encode_report(value))

    def write_pictures(
        self, cells: Sequence[Cell], pictures: Iterable[Image.Image], parameters: Mapping[str, Any]
    ) -> list[str]:
        """Writes one PNG per cell with its generation parameters, and returns their names.

        **Memory**: one picture, if `pictures` creates them on demand.
        """
        names = picture_names(cells)
        for cell, picture, name in zip(cells, pictures, names, strict=True):
            text = {"parameters": generation_parameters(cell, parameters), "Software": "lowmem-imagic"}
            self.write(name, encode_png(picture, text=text))
        return names

    def write_cover(self, name: str, picture: str) -> str:
        """Writes a small copy of one of the folder's pictures; returns its name: `name`, unless that is the sheet's."""
        name = f"cover-{name}" if name == SHEET else name
        try:
            with Image.open(self.path / picture) as image:
                text = {key: image.info[key] for key in _TEXTS if key in image.info}
                image.thumbnail((COVER_PX, COVER_PX))
                self.write(name, encode_png(image, text=text))
        except OSError as error:
            raise unusable(self.path / picture, error) from error
        return name

    def write_sheet(
        self,
        cells: Sequence[tuple[str, Image.Image | None]],
        *,
        columns: int | None,
        title: str,
        footer: str,
        row_titles: Sequence[str] = (),
    ) -> list[Box]:
        """Writes the labelled contact sheet, and returns the place of each picture on it."""
        boxes: list[Box] = []
        sheet = contact_sheet(cells, columns=columns, title=title, footer=footer, row_titles=row_titles, boxes=boxes)
        self.write(SHEET, encode_png(sheet, text={"Software": "lowmem-imagic", "Title": SHEET_TITLE}))
        return boxes

    def write_rows(self, rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], *, footer: str) -> list[Box]:
        """Writes a contact sheet of rows of pictures, each under its title; see `write_sheet`."""
        columns = max(len(row) for _, row in rows)
        cells = [cell for _, row in rows for cell in (*row, *_blank(columns - len(row)))]
        titles = [title for title, _ in rows]
        return self.write_sheet(cells, columns=columns, title="", footer=footer, row_titles=titles)


def _blank(count: int) -> list[tuple[str, None]]:
    """Empty cells."""
    return [("", None)] * count


def encode_report(value: Mapping[str, Any]) -> bytes:
    """The bytes of a report's file."""
    # File names in Linux may be no valid Unicode; these become escapes.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def picture_names(cells: Sequence[Cell]) -> list[str]:
    """A file name for each cell: its eta, with enough digits to differ from the others, and its seed if they differ.

    Among several sentences, the number and words of the cell's sentence come first.
    """
    many_seeds = len({cell.seed for cell in cells}) > 1
    etas = {cell.eta for cell in cells}
    digits = next(d for d in range(2, 400) if len({f"{eta:.{d}f}" for eta in etas}) == len(etas))
    seeds = [f"_seed_{cell.seed}" if many_seeds else "" for cell in cells]
    sentences = list(dict.fromkeys(cell.sentence for cell in cells if cell.sentence is not None))
    told = {sentence: f"{number}-{safe_stem(sentence)}_" for number, sentence in enumerate(sentences, start=1)}
    if len(sentences) < 2:
        told = {}
    return [
        f"{told.get(cell.sentence or '', '')}eta_{cell.eta:.{digits}f}{seed}.png"
        for cell, seed in zip(cells, seeds, strict=True)
    ]


def pictures_of_report(folder: Path) -> frozenset[str]:
    """Names of the pictures in a folder's report; other strings are left out."""
    try:
        report = json.loads(read_regular(folder / REPORT, MAX_REPORT_BYTES).decode())
        names, cover = report["pictures"], report.get("cover")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return frozenset()
    pictures = {name for name in (names if isinstance(names, list) else []) if isinstance(name, str)}
    covers = {cover} if isinstance(cover, str) and _COVER.fullmatch(cover) else set[str]()
    return frozenset({name for name in pictures if _PICTURE.fullmatch(name)} | covers)


def rescue(name: str, data: bytes, error: OutputError) -> OutputError:
    """The error for a finished edit that cannot be written; keeps the edit in the temporary folder if possible."""
    try:
        handle, path = tempfile.mkstemp(prefix="rescued-", suffix="-" + name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError:
        return error
    return OutputUnwritableError(f"{error}; the finished edit was kept as {path}")


def generation_parameters(cell: Cell, parameters: Mapping[str, Any]) -> str:
    """The text that other programs show as "generation parameters", in A1111's layout."""
    # Programs split the text into lines, so a sentence must not contain line ends.
    lines = [one_line(str(cell.sentence or parameters["prompt"]))]
    source = parameters.get("source_prompt", "")
    with_source = sourced(source, cell.eta, cell.strength)
    scale = parameters["guidance_scale"] if cell.guidance_scale is None else cell.guidance_scale
    guidance = guidance_at(0.0 if with_source else cell.eta, scale, parameters["photo_guidance"])
    # A model distilled to few steps has none, whatever the settings say.
    guidance = guidance if parameters["guided"] else 1.0
    # Without guidance a picture has no negative prompt.
    if parameters.get("negative_prompt") and guidance != 1:
        lines.append(f"Negative prompt: {one_line(parameters['negative_prompt'])}")
    way: dict[str, Any] = {"Imagic interpolation": parameters["interpolation"]}
    if with_source:
        way = {"Imagic source": _quoted(source), "Imagic edit guidance": parameters["edit_guidance_scale"]}
    # The base alone has no mask.
    mask = {"Imagic mask": parameters["mask"]} if any(strengths(cell.strength)) else {}
    entries = {
        "Steps": parameters["num_inference_steps"],
        "Sampler": parameters["scheduler"],
        "CFG scale": round(guidance, 4),
        "Seed": cell.seed,
        "Model": _quoted(parameters["model"]),
        "Imagic eta": cell.eta,
        "Imagic strength": strength_text(cell.strength),
        **way,
        "Imagic start": parameters["start"],
        **mask,
        "Version": f"lowmem-imagic {parameters['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in entries.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value in A1111's form: in quotes if it contains commas, colons or line ends."""
    return json.dumps(value) if re.search(r"[,:\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", value) else value
