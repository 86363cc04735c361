"""Decodes one frame of a picture file with Pillow's own decoders or, for HEIC, with the package pillow-heif.

Uses no network, no helper program, and no process-wide Pillow setting.
"""

import importlib
from io import BytesIO
from types import ModuleType

from PIL import Image

from .contents import Contents, MissingReader, NotThisKind, TooCostly
from .formats import Format, missing_reader

MAX_EMPTY_PIXELS = 12_000_000
"""Most pixels of a picture with almost no bytes; they take as much time and memory as a photo's."""
_PIXELS_PER_BYTE = 1000

PRINTING = frozenset({"TIFF", "AVIF", "HEIF", "JPEG2000"})
"""Formats of libraries that print on standard error."""


def decode(contents: Contents, kind: Format, file_bytes: int, max_pixels: int, max_side_px: int) -> Image.Image:
    """The picture with its pixels loaded, in the decoder's mode.

    Checks sizes before decoding, both from the file's header and from the decoder.

    Raises:
        TooCostly: The picture has too many pixels in all, on a side, or for so few bytes.
        NotThisKind: This installation cannot decode the kind.
        Exception: Any error of a decoder on damaged data.
    """
    if contents.width and contents.height:
        _check_size(contents.width, contents.height, file_bytes, max_pixels, max_side_px)
    if kind.name == "HEIF":
        heif = _heif()
        file = heif.open_heif(BytesIO(contents.data))
        _check_size(file.size[0], file.size[1], file_bytes, max_pixels, max_side_px)
        if len(file) > 1:
            contents.notes.append(f"first picture of {len(file)} used")
        contents.bits = file.info.get("bit_depth", 8)
        return file.to_pillow()  # type: ignore[no-any-return]
    image = _opened(contents.data, kind)
    _check_size(*image.size, file_bytes, max_pixels, max_side_px)
    image.load()
    if kind.name == "AVIF":
        # The decoder reports its own rotation as Exif, whatever Exif data the file has.
        contents.orientation = int(image.getexif().get(0x0112, 1))
        if (frames := getattr(image, "n_frames", 1)) > 1:
            contents.notes.append(f"first frame of {frames} used")
    return image


def _opened(data: bytes, kind: Format) -> Image.Image:
    """The picture with only its header read.

    `Image.open` is not used: it has its own pixel limit, with a warning at 89 million and an exception without the
    size at 179 million, and it drops the error of the format that recognised the bytes.
    """
    Image.init()
    if kind.name not in Image.OPEN:
        raise NotThisKind(f"{_article(kind.name)} {kind.name} picture, which the installed Pillow cannot decode")
    factory, _ = Image.OPEN[kind.name]
    return factory(BytesIO(data), "")


def _article(word: str) -> str:
    return "an" if word[0] in "AEIOU" else "a"


def _heif() -> ModuleType:
    """The package that reads HEIC.

    Raises:
        MissingReader: It is not installed.
    """
    try:
        return importlib.import_module("pillow_heif")
    except ImportError:
        raise MissingReader(missing_reader()) from None


def _check_size(width: int, height: int, file_bytes: int, max_pixels: int, max_side_px: int) -> None:
    """Checks the size of a picture before decoding.

    Raises:
        TooCostly: The picture has too many pixels in all, on a side, or for so few bytes.
    """
    pixels = width * height
    if pixels > max_pixels:
        raise TooCostly(
            f"{width} x {height} pixels ({pixels / 1e6:.1f} million), the cap is {max_pixels / 1e6:.1f} million; "
            "scale it down first"
        )
    if max(width, height) > max_side_px:
        raise TooCostly(f"{width} x {height} pixels, a side may have {max_side_px}; cut or scale it first")
    if pixels > max(MAX_EMPTY_PIXELS, _PIXELS_PER_BYTE * file_bytes):
        raise TooCostly(
            f"{width} x {height} pixels in only {file_bytes} bytes, fewer than any such photo has; scale it down first"
        )
