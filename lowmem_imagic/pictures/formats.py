"""The supported picture formats: first bytes and extensions of their files.

These are common formats of photos that Pillow decodes by itself. Not included: EPS and WMF (they need helper programs),
TGA (any text could pass for one), and rare formats with slow or little used decoders.
"""

import re
from dataclasses import dataclass
from pathlib import PurePath

KINDS = "JPEG, PNG, WebP, TIFF, GIF, BMP, PPM, AVIF, HEIC or JPEG 2000"
"""Names of the formats, for messages."""
EXPECTED = f"expected a {KINDS} picture, convert it to PNG or JPEG"
HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 heif MiHB MiHE mif3".split())


@dataclass(frozen=True)
class Format:
    """One kind of picture file.

    Attributes:
        name: Pillow's name.
        suffixes: Extensions of its files, in lower case.
        starts: Pattern of its first bytes.
        is_plain: Whether its samples may be uncompressed, so that its files may be large.
    """

    name: str
    suffixes: tuple[str, ...]
    starts: re.Pattern[bytes]
    is_plain: bool = False


def _format(name: str, suffixes: str, starts: bytes, is_plain: bool = False) -> Format:
    return Format(name, tuple(f".{suffix}" for suffix in suffixes.split()), re.compile(starts, re.DOTALL), is_plain)


FORMATS = (
    _format("JPEG", "jpg jpeg jpe jfif jfi jif", rb"\xff\xd8\xff"),
    _format("PNG", "png apng", rb"\x89PNG\r\n\x1a\n", is_plain=True),
    _format("WEBP", "webp", rb"RIFF....WEBP"),
    _format("GIF", "gif", rb"GIF8[79]a"),
    _format("TIFF", "tif tiff", rb"II[*+]\0|MM\0[*+]", is_plain=True),
    _format("AVIF", "avif avifs", rb"....ftypavi[fs]"),
    _format("HEIF", "heic heif heics heifs hif", rb"....ftyp(?:%s)" % b"|".join(sorted(HEIF_BRANDS))),
    _format("BMP", "bmp dib", rb"BM", is_plain=True),
    _format("JPEG2000", "jp2 j2k j2c jpc jpf jpx", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
    _format("PPM", "ppm pgm pbm pnm", rb"P[456]\s", is_plain=True),
)
RAW_SUFFIXES = frozenset(
    {".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".dng", ".pef", ".ptx", ".orf", ".rw2", ".rwl"}
    | {".raf", ".srw", ".3fr", ".fff", ".iiq", ".kdc", ".dcr", ".mrw", ".x3f"}
)
"""Extensions of camera raw files, which get a hint to develop them first."""
PHOTO_SUFFIXES = frozenset(suffix for one in FORMATS for suffix in one.suffixes)
"""Extensions of photos in a folder; a manifest may name any file."""

_FOREIGN = (
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript file"),
    (rb"PK\x03\x04", "a zip archive"),
    (rb"8BPS", "a Photoshop file"),
    (rb"gimp xcf", "a GIMP file"),
    (rb"version https://git-lfs", "a Git LFS pointer, not the picture itself"),
    (
        rb"\0\x05\x16[\x07\0]",
        "a companion file of macOS (AppleDouble), not the picture; name the one without '._'",
    ),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture, which this program does not decode"),
    (rb"\0\0[\x01\x02]\0", "an icon"),
    (rb"v/1\x01", "an OpenEXR picture, which this program does not decode"),
    (rb"#\?RADIANCE|#\?RGBE", "a Radiance HDR picture, which this program does not decode"),
    (rb"P[123]\s", "a PPM file in plain text"),
    (rb"....ftyp", "a video"),
    (rb"RIFF....AVI |\x1a\x45\xdf\xa3", "a video"),
)
_RAW = re.compile(
    rb"....ftypcrx |FUJIFILMCCD-RAW|II(?:RO|RS|U\0)|MMOR|FOVb|\0MRM|II\x1a\0\0\0HEAPCCDR|ARRI|IIII.\0\0\0", re.DOTALL
)
"""Raw files of Canon, Fujifilm, Olympus, Panasonic, Sigma, Minolta and Phase One; other raw files look like TIFF."""


def format_of(data: bytes) -> Format | None:
    """The format of a file, from its first 64 bytes."""
    for one in FORMATS:
        if one.starts.match(data):
            return one if one.name != "HEIF" or not _is_avif(data) else _NAMED["AVIF"]
    return None


_NAMED = {one.name: one for one in FORMATS}


def _is_avif(data: bytes) -> bool:
    """Whether a file of a general brand is also marked as AVIF."""
    size = int.from_bytes(data[:4], "big")
    brands = {data[at : at + 4] for at in range(16, min(size, len(data), 512), 4)}
    return bool(brands & {b"avif", b"avis"}) and not brands & {b"heic", b"heix", b"hevc"}


def is_raw(data: bytes) -> bool:
    """Whether the bytes begin as a camera raw file that does not look like TIFF."""
    return _RAW.match(data) is not None


def has_photo_suffix(name: str) -> bool:
    """Whether a file of this name counts as a photo: by its extension, in upper or lower case, and not hidden."""
    path = PurePath(name)
    return not name.startswith(".") and path.suffix.lower() in PHOTO_SUFFIXES | RAW_SUFFIXES


def describe(data: bytes) -> str:
    """The likely kind of an unsupported file, for an error message; after a semicolon what to do, if that is clear."""
    if not data:
        return "an empty file; expected a picture, copy or download it again"
    if not data[:4096].strip(b"\0"):
        return "a file of zeros, as from an interrupted copy; expected a picture, copy or download it again"
    for start, words in _FOREIGN:
        if re.match(start, data, re.DOTALL):
            return words
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page; expected a picture, download the picture itself"
    if head.startswith((b"<svg", b"<?xml")):
        return "an SVG drawing or XML text"
    return f"a text file; expected a {KINDS} picture" if is_text(data) else "of no known picture format"


def with_advice(words: str) -> str:
    """The words of `describe`, always with what was expected and what to do."""
    return words if "; " in words else f"{words}; {EXPECTED}"


def is_text(data: bytes) -> bool:
    """Whether the first bytes have no control characters, unlike binary formats."""
    return all(byte >= 32 or byte in b"\t\r\n" for byte in data[:512])


def missing_reader() -> str:
    """The message for a HEIC file without a package to read it."""
    return "a HEIC picture, which needs the package pillow-heif; install it or convert the picture to PNG or JPEG"
