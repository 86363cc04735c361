"""The contents of a picture file, found before its pixels are decoded."""

from dataclasses import dataclass, field

import numpy as np

MAX_PROFILE_BYTES = 16 * 2**20
"""Size limit of a colour profile; profiles of printing presses have 3 MB."""


class NotThisKind(Exception):
    """The bytes are of an unsupported kind; the text continues "FILE is"."""


class TooCostly(Exception):
    """Decoding would take more time or memory than a photo does; the text continues "FILE has"."""


class MissingReader(NotThisKind):
    """The package that decodes this kind is not installed."""


@dataclass(frozen=True)
class Icc:
    """An embedded ICC profile."""

    data: bytes


@dataclass(frozen=True)
class Cicp:
    """Coding-independent code points (ITU-T H.273)."""

    primaries: int
    transfer: int
    matrix: int = 0
    full_range: bool = True
    decoded: bool = False
    """Whether the decoder undoes the matrix and the range, as for AVIF and HEIF."""


@dataclass(frozen=True)
class Calibrated:
    """Primaries and transfer given as numbers; None stands for sRGB's.

    Attributes:
        words: Name of the space, or the place of its numbers, e.g. "the numbers in its gAMA chunk".
        gamma: Exponent from samples to linear light.
        curves: In place of `gamma`: linear light for equally spaced samples, [1 or 3, entries], 0 to 1.
        chromaticities: x and y of white, red, green and blue.
    """

    words: str
    gamma: float | None = None
    curves: np.ndarray | None = None
    chromaticities: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Srgb:
    """The file is marked as sRGB."""


@dataclass(frozen=True)
class Unheeded:
    """A colour space that is named in the file but not applied."""

    remark: str


Signal = Icc | Cicp | Calibrated | Srgb | Unheeded


@dataclass
class Contents:
    """A parsed file.

    Attributes:
        data: Bytes for the decoder: the parts for the pixels, without metadata and further pictures.
        width, height: Size in the header; 0 if only the decoder knows it.
        bits: Bits per sample if the format can have more than 8, otherwise 8.
        orientation: Exif's number of the orientation; 1 if the decoder turns the picture itself.
        signals: Colour signals, by precedence.
        notes: Remarks, e.g. on ignored parts.
        white_is_zero: Whether zero is white, as in some TIFF files.
    """

    data: bytes
    width: int = 0
    height: int = 0
    bits: int = 8
    orientation: int = 1
    signals: list[Signal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    white_is_zero: bool = False
