"""The work of the command `export`: an edit as the files that another program reads."""

import os
from pathlib import Path
from typing import Any

from ..amounts import counted
from ..edits import file as edit_file
from ..errors import OutputExistsError
from ..share.export import files_for
from ..share.programs import has_base
from ..storage.atomic import make_folder, write_bytes
from ..storage.file_names import safe_stem
from ..storage.regular_files import read_regular
from ..storage.writable import check_writable, unusable
from .console import Console
from .hub import local_file

NEXT = {
    "peft": "PeftModel.from_pretrained takes the folder; README.md there has more",
    "diffusers": "README.md there has the lines of Python",
    "a1111": "copy the files into models/Lora",
    "comfyui": "copy the folders into ComfyUI's own, start it anew, and open the workflow",
}
"""The next step of a user, by program."""


def export(path: Path, program: str, folder: Path, *, force: bool, console: Console) -> dict[str, Any]:
    """Writes an edit into a folder as a program's files, and returns the report.

    Args:
        path: the edit file, or its address on the Hub.
        program: a key of `share.export.PROGRAMS`.
        folder: the folder; it may have other files.
        force: replace files that differ.
        console: remarks.

    Raises:
        ConfigError: there is no such program.
        EditFileError: the file is no edit, or the program cannot load it.
        OutputExistsError: a file is there with other contents; then nothing is written.
        OutputUnwritableError: the folder cannot be written.
    """
    edit = edit_file.read(local_file(path, console))
    files = files_for(program, edit, safe_stem(path.stem))
    if program in ("a1111", "comfyui") and not has_base(edit.base.labels):
        console.warn(f"these programs have no base such as {edit.base.source}, and cannot use this edit")
    check_writable(folder)
    try:
        same = {name for name, data in files.items() if _holds(folder / name, data)}
        there = sorted(name for name in files if name not in same and os.path.lexists(folder / name))
        if there and not force:
            raise OutputExistsError(
                f"{folder} holds {', '.join(there[:3])}{', ...' if len(there) > 3 else ''} with other contents; "
                "name another folder, or use `force`"
            )
        for name, data in files.items():
            if name not in same:
                make_folder((folder / name).parent)
                write_bytes(folder / name, data, overwrite=force)
    except OSError as error:
        raise unusable(folder, error) from error
    return {
        "program": program,
        "files": sorted(files),
        "warnings": console.warnings,
        "summary": [f"{folder}: {counted(len(files), 'file')} for {program}; {NEXT[program]}"],
    }


def _holds(path: Path, data: bytes) -> bool:
    """Whether a file has exactly these bytes."""
    try:
        return read_regular(path, len(data)) == data
    except OSError:
        return False
