"""The results of a run on disk: pictures with their parameters, the contact sheet, the report.

Nothing is replaced unless asked, which is checked before any work is done; every file appears whole or
not at all.
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
from ..settings.stages import strength_text
from ..storage.atomic import make_folder, write_bytes
from ..storage.file_names import MAX_REPORT_BYTES, REPORT
from ..storage.regular_files import read_regular
from ..storage.writable import check_writable, unusable

_TEXTS = ("parameters", "Software")
"""The remarks in a picture about itself."""
COVER_PX = 512
"""Longest side of a cover."""
_PICTURE = re.compile(r"eta_-?[0-9]+\.[0-9]+(_seed_[0-9]+)?\.png")
_COVER = re.compile(r"[a-z0-9-]{1,60}\.png")


@dataclass
class ResultFolder:
    """A folder that receives results; see `prepare`."""

    path: Path
    overwrite: bool
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256, in hex, of the files written so far, by name."""
    stale: frozenset[str] = frozenset()
    """Pictures of an earlier run in this folder, which this one replaces."""
    make_parents: bool = True
    """Whether folders above it are made; otherwise a missing one is an error."""

    @staticmethod
    def prepare(path: Path, *, overwrite: bool) -> "ResultFolder":
        """The folder, made if need be and known to be writable, before anything expensive is done.

        Raises:
            OutputExistsError: it exists, is not empty and `overwrite` is False.
            OutputUnwritableError: it cannot be made or written, or the disk is full.
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
        """Writes one file into the folder, making it first, and returns its path."""
        try:
            make_folder(self.path, parents=self.make_parents)
        except OSError as error:
            raise unusable(self.path, error) from error
        target = self.path / name
        write_bytes(target, data, overwrite=self.overwrite)
        self.files[name] = hashlib.sha256(data).hexdigest()
        return target

    def digests(self) -> dict[str, str]:
        """SHA-256 of all files but the report."""
        return {name: digest for name, digest in sorted(self.files.items()) if name != REPORT}

    def write_report(self, value: Mapping[str, Any]) -> Path:
        """Writes the report, and removes the pictures that an earlier run's report named and this run did not make."""
        try:
            # First, so that a report that is there is true.
            for name in self.stale - self.files.keys():
                (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise unusable(self.path, error) from error
        return self.write(REPORT, encode_report(value))

    def write_pictures(
        self, cells: Sequence[Cell], pictures: Iterable[Image.Image], parameters: Mapping[str, Any]
    ) -> list[str]:
        """Writes one PNG per cell with its generation parameters, and returns their names.

        **Memory**: one of `pictures`, which may be made as they are asked for.
        """
        names = picture_names(cells)
        for cell, picture, name in zip(cells, pictures, names, strict=True):
            text = {"parameters": generation_parameters(cell, parameters), "Software": "lowmem-imagic"}
            self.write(name, encode_png(picture, text=text))
        return names

    def write_cover(self, name: str, picture: str) -> str:
        """Writes a small copy of one of the folder's pictures as `name`, and returns that."""
        try:
            with Image.open(self.path / picture) as image:
                text = {key: image.info[key] for key in _TEXTS if key in image.info}
                image.thumbnail((COVER_PX, COVER_PX))
                self.write(name, encode_png(image, text=text))
        except OSError as error:
            raise unusable(self.path / picture, error) from error
        return name

    def write_sheet(
        self, cells: Sequence[tuple[str, Image.Image]], *, columns: int | None, title: str, footer: str
    ) -> list[Box]:
        """Writes the labelled contact sheet, and returns where on it each picture is."""
        boxes: list[Box] = []
        sheet = contact_sheet(cells, columns=columns, title=title, footer=footer, boxes=boxes)
        self.write("sheet.png", encode_png(sheet, text={"Software": "lowmem-imagic", "Title": SHEET_TITLE}))
        return boxes


def encode_report(value: Mapping[str, Any]) -> bytes:
    """A report as the file has it."""
    # A file name that is no text, which Linux allows, becomes JSON's escapes.
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def picture_names(cells: Sequence[Cell]) -> list[str]:
    """A file name for each cell: its eta, with digits enough to tell all apart, and its seed if there are several."""
    many_seeds = len({cell.seed for cell in cells}) > 1
    etas = {cell.eta for cell in cells}
    digits = next(d for d in range(2, 400) if len({f"{eta:.{d}f}" for eta in etas}) == len(etas))
    seeds = [f"_seed_{cell.seed}" if many_seeds else "" for cell in cells]
    return [f"eta_{cell.eta:.{digits}f}{seed}.png" for cell, seed in zip(cells, seeds, strict=True)]


def pictures_of_report(folder: Path) -> frozenset[str]:
    """Names of the pictures that the report in a folder says it wrote; nothing that is not such a name."""
    try:
        report = json.loads(read_regular(folder / REPORT, MAX_REPORT_BYTES).decode())
        names, cover = report["pictures"], report.get("cover")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return frozenset()
    found = {name for name in (names if isinstance(names, list) else []) if isinstance(name, str)}
    covers = {cover} if isinstance(cover, str) and _COVER.fullmatch(cover) else set[str]()
    return frozenset({name for name in found if _PICTURE.fullmatch(name)} | covers)


def rescue(name: str, data: bytes, error: OutputError) -> OutputError:
    """The error to raise when a finished edit cannot be written: it is kept in the temporary folder if possible."""
    try:
        handle, path = tempfile.mkstemp(prefix="rescued-", suffix="-" + name)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
    except OSError:
        return error
    return OutputUnwritableError(f"{error}; the finished edit was kept as {path}")


def generation_parameters(cell: Cell, parameters: Mapping[str, Any]) -> str:
    """The text other programs show as "generation parameters" (A1111's layout)."""
    # Programs tell the parts by their lines: a sentence with line ends must not forge one.
    lines = [one_line(str(parameters["prompt"]))]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {one_line(parameters['negative_prompt'])}")
    scale = parameters["guidance_scale"] if cell.guidance_scale is None else cell.guidance_scale
    entries = {
        "Steps": parameters["num_inference_steps"],
        "Sampler": parameters["scheduler"],
        "CFG scale": round(guidance_at(cell.eta, scale, parameters["photo_guidance"]), 4),
        "Seed": cell.seed,
        "Model": _quoted(parameters["model"]),
        "Imagic eta": cell.eta,
        "Imagic strength": strength_text(cell.strength),
        "Imagic interpolation": parameters["interpolation"],
        "Imagic start": parameters["start"],
        "Imagic mask": parameters["mask"],
        "Version": f"lowmem-imagic {parameters['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in entries.items()))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """A value as A1111 writes it: in quotes where its commas, colons or line ends would make others of it."""
    return json.dumps(value) if re.search(r"[,:\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", value) else value
