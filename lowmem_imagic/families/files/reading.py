"""Reads a model's files: only regular files within a size limit, so that reading never waits."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from ...errors import IncompleteModelError

MAX_CONFIGURATION_BYTES = 2**20
"""Largest configuration; those of published models have a few kB."""
MAX_INDEX_BYTES = 16 * 2**20
"""Largest list of the tensors in several weight files; 1.2 MB for a model of 10,000 tensors."""
MAX_VOCABULARY_BYTES = 32 * 2**20
"""Largest file of a tokenizer; CLIP's have at most 3.7 MB."""


def check_regular(path: Path, name: str, limit: int | None = None) -> int:
    """The size in bytes of the file at `path`: a regular file (or a link to one) of at most `limit` bytes.

    Args:
        path: the file.
        name: model and file, for messages.
        limit: most bytes; None for no limit.

    Raises:
        IncompleteModelError: the file is missing, too large, or a pipe, device or folder.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise IncompleteModelError(f"{name} is missing ({_reason(error)}); download it again") from error
    if not stat.S_ISREG(status.st_mode):
        raise IncompleteModelError(f"{name} is not a regular file (a folder, pipe or device); download it again")
    if limit is not None and status.st_size > limit:
        raise IncompleteModelError(
            f"{name} has {status.st_size} bytes, expected at most {limit}: not a model's file; download it again"
        )
    return status.st_size


def read_bytes(path: Path, name: str, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        IncompleteModelError: see `check_regular`; or the file cannot be read.
    """
    check_regular(path, name, limit)
    # Without O_NONBLOCK, opening a pipe that has replaced the file would wait forever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise IncompleteModelError(f"{name} cannot be read ({_reason(error)})") from error
    if len(content) > limit:
        raise IncompleteModelError(f"{name} has more than {limit} bytes: not a model's file; download it again")
    return content


def read_json(path: Path, name: str, limit: int = MAX_CONFIGURATION_BYTES) -> dict[str, Any]:
    """The JSON object in a file, without duplicate keys.

    Numbers may be infinite: diffusers writes an infinite ``lambda_min_clipped`` for DPMSolver.

    Raises:
        IncompleteModelError: see `read_bytes`; or the content is not a JSON object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        # Editors on Windows begin a file with a byte order mark.
        text = read_bytes(path, name, limit).decode("utf-8-sig")
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error).splitlines()[0][:100]
        raise IncompleteModelError(f"{name} is not usable JSON ({reason}); download it again") from error
    if not isinstance(values, dict):
        raise IncompleteModelError(f"{name} is not a JSON object; download it again")
    return values


def _reason(error: OSError | ValueError) -> str:
    """The system's reason for an error, without the path."""
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__
