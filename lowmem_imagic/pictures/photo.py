"""Reads any picture file as an upright 8-bit sRGB picture.

Files are not trusted: size and cost are checked before anything is decoded, and `_refusals` turns every error of a
decoder into one of four named errors.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageColor

from ..errors import ConfigError, ImageError, ImageTooLargeError, NotAnImageError, TruncatedImageError
from ..settings.stages import MAX_PHOTO_PIXELS, MAX_PHOTO_SIDE_PX
from . import reading
from .anatomy import examine
from .colour import to_srgb
from .contents import Contents, NotThisKind, TooCostly
from .decoding import PRINTING, decode
from .depth import split_alpha, to_eight_bit
from .formats import EXPECTED, Format, describe, format_of, is_raw, is_text, with_advice
from .quiet import quiet
from .tiff import RAW

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded picture, with remarks on its conversion.

    Attributes:
        image: RGB, 8 bit, sRGB, upright, at the photo's own size, without any metadata.
        sha256: Hex digest of the file's bytes.
        name: Stem of the file name; never a path.
        notes: Remarks on the steps of the conversion, in their order.
        icc_profile: The embedded profile if it still describes `image` (an sRGB profile), otherwise None.
    """

    image: Image.Image
    sha256: str
    name: str
    notes: tuple[str, ...]
    icc_profile: bytes | None


@dataclass(frozen=True)
class PhotoFile:
    """A photo's file."""

    sha256: str
    """Hex digest of its bytes, as `Photo.sha256`."""
    pixels: int
    """Width times height as in its header; 0 if unknown."""


def load_photo(path: str | os.PathLike[str], *, background: str = "white", max_pixels: int = MAX_PHOTO_PIXELS) -> Photo:
    """The picture in a file as upright 8-bit sRGB, from any colour mode, depth or supported format.

    The file is read once: the digest and the pixels come from the same bytes.

    Args:
        path: A local file.
        background: CSS name or `#rrggbb`, put behind transparent parts.
        max_pixels: Cap on width x height, checked from the header before decoding.

    Raises:
        ConfigError: `background` is no colour.
        ImageNotFoundError: Missing, unreadable, or not a regular file (folder, pipe, device).
        NotAnImageError: Not a picture of a supported kind.
        TruncatedImageError: The picture ends early or its data are damaged.
        ImageTooLargeError: More than `max_pixels` pixels, `MAX_PHOTO_SIDE_PX` on a side or `MAX_FILE_BYTES` bytes,
            or a higher cost of decoding than a photo has.

    **Memory**: measured peaks beside the file's bytes, in bytes per pixel: 8 for JPEG, PNG and BMP, 14 with opacity or
    16 bits, 8 for TIFF, 11 for AVIF, 17 for WebP and 20 for JPEG 2000, so at most 2 GB; the photo itself has 4. The
    file's bytes count twice if metadata are cut out of them. A file with very few bytes for its pixels is refused above
    12 million pixels, so that small files cost at most 300 MB.
    """
    try:
        backdrop = ImageColor.getrgb(background)[:3]
    except ValueError:
        raise ConfigError(f"background is {background!r}; expected a colour such as 'white' or '#808080'") from None
    shown = repr(os.fspath(path))
    data = reading.read(path, shown)
    digest = hashlib.sha256(data).hexdigest()
    kind = format_of(data[:512])
    with _refusals(shown, data[:4096], len(data), kind):
        if kind is None:
            raise NotThisKind(RAW if is_raw(data[:64]) else describe(data[:4096]))
        size = len(data)
        contents = examine(data, kind, max_pixels=max_pixels)
        del data  # the contents keep the parts that the decoder needs
        with quiet(captured=kind.name in PRINTING):
            image = decode(contents, kind, size, max_pixels, MAX_PHOTO_SIDE_PX)
            contents.data = b""
            image, profile = _finished(image, kind, contents, backdrop, background)
    return Photo(
        image=image,
        sha256=digest,
        name=Path(path).stem,
        notes=tuple(contents.notes),
        icc_profile=profile,
    )


def photo_file(path: str | os.PathLike[str]) -> PhotoFile:
    """Hash and size of a photo's file, which is read and not decoded.

    Raises:
        ImageNotFoundError: Missing, unreadable, or not a regular file.
        ImageTooLargeError: More bytes than such a picture may have.
        NotAnImageError: A large file that is no picture.
    """
    return PhotoFile(*reading.digest(path, repr(os.fspath(path))))


def _finished(
    image: Image.Image, kind: Format, contents: Contents, backdrop: tuple[int, ...], background: str
) -> tuple[Image.Image, bytes | None]:
    """The photo's picture, and its colour profile if that still fits; adds remarks to the contents."""
    notes = contents.notes
    if contents.orientation in _UPRIGHT:
        notes.append("turned upright by its EXIF orientation")
    colour, alpha = split_alpha(to_eight_bit(image, kind.name, contents))
    rgb, kept_profile = to_srgb(colour, contents.signals, notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        backed = Image.new("RGB", rgb.size, backdrop)
        backed.paste(rgb, mask=alpha)
        rgb = backed
        notes.append(f"transparent parts placed on {background}")
    if contents.orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[contents.orientation])
    if type(rgb) is not Image.Image:  # a decoder's own class, which keeps its file open
        rgb = rgb.copy()
    rgb.info = {}  # EXIF, GPS and text chunks of the source must not reach any output
    return rgb, kept_profile


@contextmanager
def _refusals(shown: str, head: bytes, size: int, kind: Format | None) -> Iterator[None]:
    """Turns every exception inside except MemoryError into one of the named errors.

    On damaged data decoders raise nearly any built-in exception, until the picture is finished.
    """
    name = kind.name if kind is not None else "picture"
    # Two letters make a BMP or PPM, so a text may begin like one.
    prose = is_text(head) and name in ("BMP", "PPM")
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except NotThisKind as error:
        raise NotAnImageError(f"{shown} is {with_advice(str(error))}") from error
    except TooCostly as error:
        if prose:
            raise NotAnImageError(f"{shown} is {with_advice(describe(head))}") from error
        words = str(error)
        advice = "" if "; " in words else "; save a plain copy with an image editor"
        raise ImageTooLargeError(f"{shown} has {words}{advice}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or "its parts do not fit together"
        if prose or any(word in reason.lower() for word in ("unknown", "unsupported", "not support", "not avail")):
            raise NotAnImageError(f"{shown} is of a kind that cannot be decoded here ({reason}); {EXPECTED}") from error
        raise TruncatedImageError(
            f"{shown} is a damaged or cut-off {name} file of {size} bytes ({reason}); "
            "expected a complete picture, copy or download it again"
        ) from error
