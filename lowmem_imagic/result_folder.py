"""What a run leaves on disk: pictures with their parameters, the contact sheet, the report.

Nothing is replaced unless asked, which is checked before any work is done; every file appears whole or
not at all.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from .atomic import write_bytes
from .config import strength_text
from .errors import OutputError, OutputExistsError, OutputUnwritableError
from .png import contact_sheet, encode_png
from .sample import Cell

MIN_FREE_BYTES = 32 * 2**20


@dataclass
class ResultFolder:
    """A folder that receives results; see `prepare`."""

    path: Path
    overwrite: bool
    files: list[str] = field(default_factory=list)
    """Names written so far."""

    @staticmethod
    def prepare(path: Path, *, overwrite: bool) -> "ResultFolder":
        """The folder, made if need be and known to be writable, before anything expensive is done.

        Raises:
            OutputExistsError: it exists, is not empty and `overwrite` is False.
            OutputUnwritableError: it cannot be made or written, or the disk is full.
        """
        check_writable(path)
        if path.exists() and not path.is_dir():
            raise OutputExistsError(f"{path} is a file; name a folder with --out")
        if path.is_dir() and any(path.iterdir()) and not overwrite:
            raise OutputExistsError(f"{path} holds files already; name another folder with --out, or use --force")
        return ResultFolder(path, overwrite)

    def write(self, name: str, data: bytes) -> Path:
        """Writes one file into the folder, making it first, and returns its path."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputUnwritableError(
                f"{self.path} cannot be made ({error.strerror}); choose another --out"
            ) from error
        target = self.path / name
        write_bytes(target, data, overwrite=self.overwrite)
        self.files.append(name)
        return target

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Writes a JSON file."""
        return self.write(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def write_pictures(
        self, cells: Sequence[Cell], pictures: Sequence[Image.Image], parameters: Mapping[str, Any]
    ) -> list[str]:
        """Writes one PNG per cell with its generation parameters, and returns their names."""
        many_seeds = len({cell.seed for cell in cells}) > 1
        names = []
        for cell, picture in zip(cells, pictures, strict=True):
            name = f"eta_{cell.eta:.2f}" + (f"_seed_{cell.seed}" if many_seeds else "") + ".png"
            text = {"parameters": generation_parameters(cell, parameters), "Software": "lowmem-imagic"}
            self.write(name, encode_png(picture, text=text))
            names.append(name)
        return names

    def write_sheet(
        self, cells: Sequence[tuple[str, Image.Image]], *, columns: int | None, title: str, footer: str
    ) -> Path:
        """Writes the labelled contact sheet."""
        sheet = contact_sheet(cells, columns=columns, title=title, footer=footer)
        return self.write("sheet.png", encode_png(sheet, text={"Software": "lowmem-imagic"}))


def check_writable(path: Path) -> None:
    """Makes sure that something can be written at `path`: an existing folder above it, not read-only, not full.

    Raises:
        OutputUnwritableError: with the reason.
    """
    folder = path
    while not folder.exists():
        if folder.parent == folder:
            break
        folder = folder.parent
    if not folder.is_dir():
        folder = folder.parent if folder == path else folder
    if not folder.is_dir():
        raise OutputUnwritableError(f"{folder} is a file, expected a folder; choose another --out")
    try:
        # Permission bits do not tell the truth for root or on read-only mounts; a real file does.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputUnwritableError(f"{folder} cannot be written ({error.strerror}); choose another --out") from error
    free = shutil.disk_usage(folder).free
    if free < MIN_FREE_BYTES:
        raise OutputUnwritableError(
            f"{folder} has {free / 2**20:.0f} MB free, expected at least {MIN_FREE_BYTES / 2**20:.0f} MB; make room"
        )


def must_not_exist(path: Path) -> None:
    """Makes sure that nothing is at `path`.

    Raises:
        OutputExistsError: something is.
    """
    if path.exists():
        raise OutputExistsError(f"{path} exists already; name another with --out, or use --force")


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
    lines = [str(parameters["prompt"])]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    entries = {
        "Steps": parameters["num_inference_steps"],
        "Sampler": parameters["scheduler"],
        "CFG scale": parameters["guidance_scale"] if cell.guidance_scale is None else cell.guidance_scale,
        "Seed": cell.seed,
        "Model": parameters["model"],
        "Imagic eta": cell.eta,
        "Imagic strength": strength_text(cell.strength),
        "Imagic interpolation": parameters["interpolation"],
        "Imagic start": parameters["start"],
        "Version": f"lowmem-imagic {parameters['version']}",
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in entries.items()))
    return "\n".join(lines)
