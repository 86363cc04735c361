"""Any picture file to an upright 8-bit sRGB picture.

Reading is the part that meets files nobody checked, so every refusal is one of four named errors, the pixel
count is known before anything is decoded, and nothing but Pillow's own decoders runs: no network, no helper
program (EPS would start Ghostscript), no process-wide Pillow setting.
"""

import hashlib
import os
import stat
import threading
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile

from .config import MAX_PHOTO_PIXELS, MAX_PHOTO_SIDE_PX
from .errors import (
    ConfigError,
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
    NotAnImageError,
    TruncatedImageError,
)

MAX_FILE_BYTES = 1 << 30

# Formats Pillow decodes by itself from bytes with a signature. EPS and WMF (helper programs), stubs such as
# GRIB, and formats without a signature (TGA: any text could pass for one) stay out.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "JPEG2000", "PPM", "QOI", "SGI", "PCX")
_KINDS = "JPEG, PNG, WebP, TIFF, GIF, BMP, AVIF or JPEG 2000"

_FOREIGN = (
    (b"%PDF", "a PDF document"),
    (b"%!PS", "a PostScript file"),
    (b"PK\x03\x04", "a zip archive"),
    (b"8BPS", "a Photoshop file"),
    (b"version https://git-lfs", "a Git LFS pointer, not the picture itself"),
)

_ORIENTATION_TAG, _BITS_TAG, _PHOTOMETRIC_TAG = 0x0112, 0x0102, 0x0106
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# `warnings.catch_warnings` swaps a process-wide list, so our own threads must not interleave in it.
_decoding = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A decoded picture and what had to be done to it.

    Attributes:
        image: RGB, 8 bit, sRGB, upright, at the photo's own size, without any metadata.
        sha256: Hex digest of the file's bytes.
        name: Stem of the file name; never a path.
        notes: Plain-words remarks on what was done, in the order it was done.
        icc_profile: The embedded profile where it still describes `image` (an sRGB one), otherwise None.
    """

    image: Image.Image
    sha256: str
    name: str
    notes: tuple[str, ...]
    icc_profile: bytes | None


def load_photo(path: str | os.PathLike[str], *, background: str = "white", max_pixels: int = MAX_PHOTO_PIXELS) -> Photo:
    """The picture in a file as upright 8-bit sRGB, whatever its colour mode, depth or format.

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
        ImageTooLargeError: More than `max_pixels` pixels, `MAX_PHOTO_SIDE_PX` on a side or `MAX_FILE_BYTES` bytes.

    **Memory**: beside the file's bytes 8 (RGB) to 17 (RGBA, float) bytes per pixel while converting, 4 then.
    """
    try:
        backdrop = ImageColor.getrgb(background)[:3]
    except ValueError:
        raise ConfigError(f"background is {background!r}; expected a colour such as 'white' or '#808080'") from None
    shown = repr(os.fspath(path))
    data = _read(path, shown)
    image, bits, notes = _decode(data, shown, max_pixels)
    profile = image.info.get("icc_profile")
    colour, alpha = _split_alpha(_to_eight_bit(image, bits, notes))
    rgb, kept_profile = _to_srgb(colour, profile, notes)
    if alpha is not None and alpha.getextrema() != (255, 255):
        backed = Image.new("RGB", rgb.size, backdrop)
        backed.paste(rgb, mask=alpha)
        rgb = backed
        notes.append(f"transparent parts placed on {background}")
    orientation = _orientation(image)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    rgb.info = {}  # EXIF, GPS and text chunks of the source must not reach any output
    return Photo(
        image=rgb,
        sha256=hashlib.sha256(data).hexdigest(),
        name=Path(path).stem,
        notes=tuple(notes),
        icc_profile=kept_profile,
    )


def photo_sha256(path: str | os.PathLike[str]) -> str:
    """`Photo.sha256` of a file, which is read and not decoded.

    Raises:
        ImageNotFoundError: Missing, unreadable, or not a regular file.
        ImageTooLargeError: More than `MAX_FILE_BYTES` bytes.
    """
    return hashlib.sha256(_read(path, repr(os.fspath(path)))).hexdigest()


def _read(path: str | os.PathLike[str], shown: str) -> bytes:
    """The bytes of a regular file; never waits on a pipe or a device."""
    try:
        # O_NONBLOCK: opening a pipe without a writer would wait for ever before its kind can be asked.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(f"{shown} is a folder")
            if not stat.S_ISREG(status.st_mode):
                raise ImageNotFoundError(
                    f"{shown} is a pipe or device; expected a picture file, copy the picture to a file first"
                )
            if status.st_size > MAX_FILE_BYTES:
                raise ImageTooLargeError(
                    f"{shown} has {status.st_size} bytes, the cap is {MAX_FILE_BYTES}; save a smaller copy"
                )
            with open(descriptor, "rb", closefd=False) as file:
                return file.read(MAX_FILE_BYTES)
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        hint = "download the picture first" if "://" in shown else "check the path"
        raise ImageNotFoundError(f"there is no file {shown}; expected a local picture file, {hint}") from None
    except (OSError, ValueError) as error:
        if os.path.isdir(path):  # on Windows opening one is already an error, and a misleading one
            raise ImageNotFoundError(f"{shown} is a folder; name one picture file inside it") from None
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageNotFoundError(
            f"{shown} cannot be read ({reason}); expected a readable picture file, check path and permissions"
        ) from error


def _decode(data: bytes, shown: str, max_pixels: int) -> tuple[ImageFile.ImageFile, int, list[str]]:
    """The first frame with its pixels loaded, its bits per sample, and the remarks so far."""
    notes = []
    image = None
    with _decoding, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _open(data)
            if image is None:
                raise NotAnImageError(
                    f"{shown} is {_describe(data)}; expected a {_KINDS} picture, convert it to PNG or JPEG"
                )
            width, height = image.size
            if width * height > max_pixels:
                raise ImageTooLargeError(
                    f"{shown} has {width} x {height} pixels ({width * height / 1e6:.1f} million), "
                    f"the cap is {max_pixels / 1e6:.1f} million; scale it down first"
                )
            if max(width, height) > MAX_PHOTO_SIDE_PX:
                raise ImageTooLargeError(
                    f"{shown} has {width} x {height} pixels, a side may have {MAX_PHOTO_SIDE_PX}; cut or scale it first"
                )
            frames = getattr(image, "n_frames", 1)
            orientation = _orientation(image)
            bits = _bits_per_sample(image, data)
            image.load()
        except (ImageError, MemoryError):
            raise
        except Image.DecompressionBombError as error:
            raise ImageTooLargeError(
                f"{shown} has far too many pixels ({error}), the cap is {max_pixels / 1e6:.1f} million; "
                "scale it down first"
            ) from error
        except Exception as error:  # on damaged data Pillow's plugins raise nearly any built-in exception
            reason = " ".join(str(error).split()) or type(error).__name__
            kind = (image.format if image is not None else None) or "picture"
            # Two letters make a BMP or PPM, so prose may have been taken for one.
            prose = image is None and _is_text(data)
            if prose or any(word in reason.lower() for word in ("unknown", "unsupported", "not support", "not avail")):
                raise NotAnImageError(
                    f"{shown} is of a kind that cannot be decoded here ({reason}); "
                    f"expected a {_KINDS} picture, convert it to PNG or JPEG"
                ) from error
            raise TruncatedImageError(
                f"{shown} is a damaged or cut-off {kind} file of {len(data)} bytes ({reason}); "
                "expected a complete picture, copy or download it again"
            ) from error
    if frames > 1:
        notes.append(f"first frame of {frames} used")
    if orientation in _UPRIGHT:
        notes.append("turned upright by its EXIF orientation")
    return image, bits, notes


def _open(data: bytes) -> ImageFile.ImageFile | None:
    """The picture with only its header read, or None where no allowed format claims the bytes.

    `Image.open` would apply its own pixel limit here: a warning at 89 million, an exception without the size
    at 179 million, whatever our cap is; and it forgets why the format that recognised the bytes gave up.
    """
    Image.init()
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue  # Pillow was built without it
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is True:
            return factory(BytesIO(data), "")
    return None


def _describe(data: bytes) -> str:
    """What bytes that are no supported picture look like, for an error message."""
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"):
        return "a HEIC picture, which this program does not decode"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "an AVIF picture, which the installed Pillow cannot decode"
    for start, words in _FOREIGN:
        if data.startswith(start):
            return words
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page"
    if head.startswith((b"<svg", b"<?xml")):
        return "an SVG drawing or XML text"
    return "a text file" if _is_text(data) else "of no known picture format"


def _is_text(data: bytes) -> bool:
    """Whether the first bytes are free of control characters, as no binary format's are."""
    return all(byte >= 32 or byte in b"\t\r\n" for byte in data[:512])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF data are damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # the EXIF reader raises nearly anything on damaged data, and the pixels are fine
        return 1


def _bits_per_sample(image: Image.Image, data: bytes) -> int:
    """Bits per sample in the file where the format can hold more than 8, otherwise 8."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF" and image.mode not in ("I", "F"):
        return int(max(image.tag_v2.get(_BITS_TAG, (8,))))  # type: ignore[attr-defined]
    # Pillow widens JPEG 2000 and PGM samples of any depth above 8 to the full 16 bits.
    return 16 if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM") else 8


def _to_eight_bit(image: Image.Image, bits: int, notes: list[str]) -> Image.Image:
    """The picture with 8-bit samples; wide ones are scaled, where Pillow's own `convert` clips at 255."""
    key = image.info.get("transparency")
    if image.mode[0] not in "IF":
        if bits > 8:
            notes.append(f"{bits}-bit values scaled to 8 bit")
        # A PNG's transparent colour is given at the file's depth; Pillow scales the pixels but not the key.
        if image.format == "PNG" and bits == 16 and image.mode == "RGB" and key is not None:
            image.info["transparency"] = tuple(value >> 8 for value in key)
        elif image.format == "PNG" and bits in (2, 4) and image.mode == "L" and key is not None:
            image.info["transparency"] = key * 255 // (2**bits - 1)
        return image
    values = np.asarray(image).astype(np.float32)
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if bits > 8:
        low, high = 0.0, float(2**bits - 1)
        notes.append(f"{bits}-bit values scaled to 8 bit")
        if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC_TAG) == 0:  # type: ignore[attr-defined]
            values = high - values  # white is zero, which Pillow heeds up to 8 bit only
    else:
        low, high = _range(values, scales=(1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0))
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        notes.append(f"values from {low:g} to {high:g} scaled to 8 bit")
    scaled = np.rint((np.clip(values, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)
    grey = Image.fromarray(scaled)
    return grey if alpha is None else Image.merge("LA", (grey, alpha))


def _range(values: np.ndarray, scales: tuple[float, ...]) -> tuple[float, float]:
    """The values that become black and white in a picture whose format does not say.

    The first of `scales` that holds the values and is used to a sixteenth or more (the smallest always counts
    as used), otherwise the values' own range.
    """
    finite = values[np.isfinite(values)]
    lowest, highest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    lowest, highest = max(lowest, -1e37), min(highest, 1e37)  # their difference must fit float32
    if lowest >= 0:
        for scale in scales:
            if highest <= scale and (scale == scales[0] or highest > scale / 16):
                return 0.0, scale
        return 0.0, highest
    return lowest, max(highest, lowest + 1.0)


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in L, RGB, CMYK or LAB, and the opacity (mode L) or None."""
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _to_srgb(colour: Image.Image, profile: bytes | None, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """The picture as sRGB, through its own colour profile where it has a usable one.

    The second value is the embedded profile if it still describes the result, that is if it was sRGB already.
    """
    named = {"CMYK": "CMYK", "LAB": "CIELAB"}
    source = None
    if colour.mode == "LAB":  # self-describing
        source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    elif profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            space = source.profile.xcolor_space.strip()
        except (OSError, ImageCms.PyCMSError):
            notes.append("its colour profile is damaged and was ignored")
        else:
            if space == "RGB" and colour.mode == "L":
                colour = colour.convert("RGB")
            if space != {"L": "GRAY"}.get(colour.mode, colour.mode):
                notes.append(f"its colour profile is for {space} data and was ignored")
                source = None
    if source is not None:
        try:
            transform = ImageCms.buildTransform(
                source,
                ImageCms.createProfile("sRGB"),
                colour.mode,
                "RGB",
                ImageCms.Intent.RELATIVE_COLORIMETRIC,
                ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            if _changes_nothing(transform, colour.mode):
                return colour.convert("RGB"), profile if colour.mode == "RGB" else None
            rgb = ImageCms.applyTransform(colour, transform)
        except (ImageCms.PyCMSError, ValueError):
            notes.append("its colour profile cannot be applied and was ignored")
        else:
            words = f"converted from {named[colour.mode]}" if colour.mode in named else "converted to sRGB"
            through = "" if colour.mode == "LAB" else " through its colour profile"
            notes.append(words + through)
            assert rgb is not None  # None is returned only for in-place conversion
            return rgb, None
    if colour.mode in named:
        notes.append(f"converted from {named[colour.mode]}")
    return colour.convert("RGB"), None


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a colour transform moves no sample of a coarse colour grid by more than rounding."""
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    elif mode == "RGB":
        grid = np.stack(np.meshgrid(*[np.arange(0, 256, 17)] * 3), axis=-1)
        probe = Image.fromarray(grid.reshape(16, -1, 3).astype(np.uint8))
    else:
        return False
    moved = ImageCms.applyTransform(probe, transform)
    difference = np.asarray(moved, dtype=np.int16) - np.asarray(probe.convert("RGB"), dtype=np.int16)
    return bool(np.abs(difference).max() <= 2)
