"""Reads the bytes of a photo's file: only regular files, of a plausible size for their picture."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader

from ..errors import ImageNotFoundError, ImageTooLargeError, NotAnImageError
from ..settings.stages import MAX_PHOTO_PIXELS
from ..storage.regular_files import NotRegularError, open_regular
from .anatomy import UNREADABLE, examine
from .boxes import largest_pixels
from .contents import NotThisKind, TooCostly
from .formats import Format, describe, format_of, with_advice
from .tiff import pixels_of

MAX_FILE_BYTES = 1 << 30
"""Size limit for formats with uncompressed samples: 100 million pixels of 16-bit RGBA are 800 MB."""
MAX_PACKED_BYTES = 256 * 2**20
"""Size limit for all other formats."""
_SMALL_BYTES = 32 * 2**20
_HEAD_BYTES = 1 << 20


def read(path: str | os.PathLike[str], shown: str) -> bytes:
    """The bytes of a picture file.

    Raises:
        ImageNotFoundError: The file is missing, unreadable, or not a regular file (folder, pipe, device).
        ImageTooLargeError: The file has more bytes than its picture can need.
        NotAnImageError: A large file does not begin as a picture; small files are left to the decoder.
    """
    with _opened(path, shown) as (file, size):
        return file.read(size)


def digest(path: str | os.PathLike[str], shown: str) -> tuple[str, int]:
    """Hex SHA-256 of a picture file, and the number of pixels that its header names, 0 if unknown.

    The file is read in parts; raises the errors of `read`.
    """
    with _opened(path, shown) as (file, size):
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        kind = format_of(file.read(64))
        file.seek(0)
        return sha256, 0 if kind is None else _pixels(file, size, kind, _SMALL_BYTES, MAX_PHOTO_PIXELS)


@contextmanager
def _opened(path: str | os.PathLike[str], shown: str) -> Iterator[tuple[BufferedReader, int]]:
    """The open file and its size, both checked."""
    try:
        with open_regular(path) as (file, size):
            _check_size(file, size, shown)
            yield file, size
    except NotRegularError:
        raise ImageNotFoundError(
            f"{shown} is a pipe or device; expected a picture file, copy the picture to a file first"
        ) from None
    except FileNotFoundError:
        hint = "check the path"
        if "://" in shown:
            hint = "give its path instead" if shown[1:].startswith("file:") else "download the picture first"
        elif shown[1:].startswith("~"):
            hint = "write the home folder out in place of ~"
        raise ImageNotFoundError(f"there is no file {shown}; expected a local picture file, {hint}") from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):  # on Windows opening one is already an error, and a misleading one
            raise ImageNotFoundError(f"{shown} is a folder; name one picture file inside it") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageNotFoundError(
            f"{shown} cannot be read ({reason}); expected a readable picture file, check path and permissions"
        ) from error


def _check_size(file: BufferedReader, size: int, shown: str) -> None:
    """Checks, from its first bytes, that a large file is a picture of a plausible size.

    Raises:
        ImageTooLargeError: It has more bytes than its picture can need.
        NotAnImageError: It does not begin as a picture.
    """
    if size <= _SMALL_BYTES:
        return
    kind = format_of(file.read(64))
    file.seek(0)
    if size <= MAX_FILE_BYTES and kind is None:
        head = file.read(4096)
        raise NotAnImageError(f"{shown} is {with_advice(describe(head))}")
    most = MAX_FILE_BYTES if kind is None or kind.is_plain else MAX_PACKED_BYTES
    if size <= most and kind is not None and (pixels := _pixels(file, size, kind, _HEAD_BYTES, 1)):
        most = min(most, _SMALL_BYTES + 16 * pixels)
    if size > most:
        raise ImageTooLargeError(f"{shown} has {size} bytes, the cap for it is {most}; save a smaller copy")
    file.seek(0)


def _pixels(file: BufferedReader, size: int, kind: Format, head_bytes: int, max_pixels: int) -> int:
    """The number of pixels of a file's pictures, from its first bytes; 0 if unknown or above the limit of a format."""
    try:
        if kind.name == "TIFF":
            return pixels_of(_Slices(file, size))
        head = file.read(head_bytes)
        contents = examine(head, kind, max_pixels=max_pixels)
        if kind.name in ("AVIF", "HEIF"):
            return largest_pixels(head)
    except (NotThisKind, TooCostly, *UNREADABLE):
        return 0
    return contents.width * contents.height


class _Slices:
    """A file as `tiff.Source`."""

    def __init__(self, file: BufferedReader, size: int) -> None:
        self._file, self._size = file, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, place: slice) -> bytes:
        start, stop, _ = place.indices(self._size)
        self._file.seek(start)
        return self._file.read(max(0, stop - start))
