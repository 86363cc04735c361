"""Pictures in and out: every kind of file becomes the right pixels or a named error, and nothing leaks."""

import dataclasses
import hashlib
import math
import os
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageOps, PngImagePlugin, features

from lowmem_imagic import pictures as images
from lowmem_imagic.errors import (
    ConfigError,
    ImageNotFoundError,
    ImageTooLargeError,
    NotAnImageError,
    TruncatedImageError,
)
from lowmem_imagic.geometry import Letterbox, Sizes
from lowmem_imagic.pictures import load_photo
from lowmem_imagic.pictures.letterbox import from_canvas, into_canvas, psnr, to_images, to_tensor
from lowmem_imagic.pictures.png import contact_sheet, encode_png
from lowmem_imagic.settings.stages import MAX_PHOTO_PIXELS


@pytest.fixture(autouse=True)
def _no_warning_leaks():
    """Every test here fails on a warning: users of the tool should never see Pillow's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth RGB picture without symmetry, so that every turn and flip of it differs."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + 2 * y) * 80 / (width + height))
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    """Samples as signed integers, fit for differences."""
    return np.asarray(image).astype(int)


def png_bytes(width: int, height: int, depth: int, kind: int, rows: bytes, *, key: bytes = b"") -> bytes:
    """A PNG that Pillow cannot write: of colour type `kind`, with the tRNS chunk `key`."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    transparency = chunk(b"tRNS", key) if key else b""
    data = chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparency + data


def icc_profile(space: bytes, tags: dict[bytes, bytes], *, connection: bytes = b"XYZ ") -> bytes:
    """A minimal ICC version 2 profile (ICC.1:2001-04) of a display or printer with the given tags."""
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text" + bytes(4) + b"none\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4sI4s4s4s", size, bytes(4), 0x02100000, kind, space, connection)
    header += bytes(12) + b"acsp" + bytes(28) + xyz(0.9642, 1.0, 0.8249)[8:]
    return header.ljust(128, b"\0") + table + body


def xyz(*values: float) -> bytes:
    """An ICC XYZ tag."""
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def gamma(value: float) -> bytes:
    """An ICC curve tag holding one exponent."""
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(value * 256))


def swapped_rgb_profile() -> bytes:
    """A profile whose red channel is sRGB's blue and the other way round."""
    red, green, blue = xyz(0.1431, 0.0606, 0.7141), xyz(0.3851, 0.7169, 0.0971), xyz(0.4361, 0.2225, 0.0139)
    curves = {name: gamma(2.2) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return icc_profile(b"RGB ", {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue, **curves})


def dark_cmyk_profile() -> bytes:
    """A profile that maps cyan ink to mid grey and all other ink to white (Lab table, ICC mft1)."""
    matrix = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    linear = bytes(range(256))
    lattice = b"".join(bytes([128 if cyan else 255, 128, 128]) * 8 for cyan in (0, 1))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + linear * 4 + lattice + linear * 3
    return icc_profile(b"CMYK", {b"A2B0": table}, connection=b"Lab ")


# --------------------------------------------------------------------------------------------------- reading


def test_rgb_is_untouched(tmp_path):
    """A plain RGB PNG comes back bit for bit, without remarks, with its file's digest and bare name."""
    path = tmp_path / "my photo.v2.png"
    scene().save(path)
    photo = load_photo(path)
    assert type(photo.image) is Image.Image and photo.image.mode == "RGB"
    assert (pixels(photo.image) == pixels(scene())).all()
    assert photo.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (photo.name, photo.notes, photo.icc_profile) == ("my photo.v2", (), None)
    assert load_photo(str(path)).sha256 == photo.sha256


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tif", "webp", "jp2", "avif", "gif", "jpg"])
def test_formats(tmp_path, suffix):
    """Every format that the error messages name is decoded."""
    Image.init()
    path = tmp_path / f"a.{suffix}"
    if suffix in ("webp", "avif") and not features.check(suffix):
        pytest.skip("this Pillow lacks the format")
    options = {"webp": {"lossless": True}, "jpg": {"quality": 98}}.get(suffix, {})
    scene().save(path, **options)
    tolerance = 0 if suffix in ("bmp", "ppm", "tif", "webp") else 12
    assert np.abs(pixels(load_photo(path).image) - pixels(scene())).mean() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_plain_modes(tmp_path, mode):
    """One-bit, grey, palette and YCbCr pictures become the picture that Pillow shows, without remarks."""
    source = scene().convert(mode)
    if mode == "YCbCr":
        # Pillow 12 cannot read uncompressed ones.
        path = tmp_path / "a.tif"
        source.save(path, compression="tiff_lzw")
    else:
        path = tmp_path / "a.png"
        source.save(path)
    photo = load_photo(path)
    assert np.abs(pixels(photo.image) - pixels(source.convert("RGB"))).max() <= 2
    assert photo.notes == ()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
def test_orientation(tmp_path, orientation, suffix):
    """A picture stored in any of the eight EXIF orientations comes out upright, and says so when turned."""
    stored_by = {  # the turn of the upright scene in the camera, by orientation
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }
    upright = np.asarray(scene())
    stored = Image.fromarray(np.ascontiguousarray(stored_by[orientation](upright)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, quality=98)
    photo = load_photo(path)
    assert photo.image.size == (48, 32)
    assert np.abs(pixels(photo.image) - upright.astype(int)).mean() < (0.5 if suffix in ("png", "tif") else 6)
    assert photo.notes == (() if orientation == 1 else ("turned upright by its EXIF orientation",))


def test_damaged_exif_is_no_obstacle(tmp_path):
    """EXIF data that cannot be parsed leave the picture as it is stored."""
    path = tmp_path / "a.jpg"
    scene().save(path, exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert load_photo(path).image.size == (48, 32)


def test_metadata_stays_behind(tmp_path):
    """GPS position, comments and text of the source are neither on the picture nor in a PNG made of it."""
    exif = Image.Exif()
    exif[0x010E] = "SECRET-DESCRIPTION"
    exif.get_ifd(0x8825)[1] = "N"
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "SECRET-COMMENT")
    scene().save(tmp_path / "a.png", exif=exif, pnginfo=text)
    photo = load_photo(tmp_path / "a.png")
    assert photo.image.info == {} and not photo.image.getexif()
    assert b"SECRET" not in encode_png(photo.image)


def test_alpha_on_background(tmp_path):
    """Transparent parts show the background in proportion, whatever colour hides under them."""
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[..., 0], rgba[0, :, 3] = 255, (0, 128, 255)
    rgba[1, :, 3] = 255
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert pixels(photo.image)[0].tolist() == [[255, 255, 255], [255, 127, 127], [255, 0, 0]]
    assert photo.notes == ("transparent parts placed on white",)
    black = load_photo(tmp_path / "a.png", background="#000000")
    assert pixels(black.image)[0].tolist() == [[0, 0, 0], [128, 0, 0], [255, 0, 0]]
    assert black.notes == ("transparent parts placed on #000000",)


def test_opaque_alpha_is_not_remarked_on(tmp_path):
    """An alpha channel that hides nothing changes nothing and is not mentioned."""
    source = scene()
    source.putalpha(255)
    source.save(tmp_path / "a.png")
    photo = load_photo(tmp_path / "a.png")
    assert photo.notes == () and (pixels(photo.image) == pixels(scene())).all()


def test_grey_with_alpha(tmp_path):
    """Grey pictures with alpha are composited too."""
    Image.merge("LA", (Image.new("L", (2, 1), 10), Image.fromarray(np.array([[0, 255]], np.uint8)))).save(
        tmp_path / "a.png"
    )
    assert pixels(load_photo(tmp_path / "a.png").image)[0].tolist() == [[255] * 3, [10] * 3]


def test_transparent_palette(tmp_path):
    """The transparent entry of a GIF's and of a PNG's palette becomes the background."""
    source = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    source.putpalette([255, 0, 0, 0, 0, 255])
    for name in ("a.gif", "a.png"):
        source.save(tmp_path / name, transparency=0)
        photo = load_photo(tmp_path / name)
        assert pixels(photo.image)[0].tolist() == [[255, 255, 255], [0, 0, 255]]
        assert photo.notes == ("transparent parts placed on white",)
    source.save(tmp_path / "b.png", transparency=bytes([128, 255]))
    assert pixels(load_photo(tmp_path / "b.png").image)[0].tolist() == [[255, 127, 127], [0, 0, 255]]


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key"),
    [
        (1, 0, bytes([0b01000000]), (0,)),
        (2, 0, bytes([0b00110000]), (0,)),
        (4, 0, bytes([0x5A]), (5,)),
        (8, 0, bytes([9, 200]), (9,)),
        (16, 0, struct.pack(">2H", 0x1234, 0x8000), (0x1234,)),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), (1, 2, 3)),
        (16, 2, struct.pack(">6H", 0x1234, 0, 0, 9, 9, 9), (0x1234, 0, 0)),
    ],
)
def test_png_transparent_colour_at_every_depth(tmp_path, depth, kind, row, key):
    """A PNG's one transparent colour is found at any bit depth: the first pixel is hidden, the second not."""
    data = png_bytes(2, 1, depth, kind, b"\0" + row, key=struct.pack(f">{len(key)}H", *key))
    (tmp_path / "a.png").write_bytes(data)
    first, second = pixels(load_photo(tmp_path / "a.png", background="#ff00ff").image)[0].tolist()
    assert first == [255, 0, 255] and second != [255, 0, 255]


def test_animation_gives_first_frame(tmp_path):
    """Of an animated GIF, WebP, PNG or AVIF the first frame is used, and the remark says of how many."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    names = ("a.gif", "a.webp", "a.png", *(("a.avif",) if features.check("avif") else ()))
    for name in names:
        options = {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.avif" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        photo = load_photo(tmp_path / name)
        assert np.abs(pixels(photo.image)[3, 3] - [255, 0, 0]).max() <= (3 if name == "a.avif" else 0)
        assert photo.notes == ("first frame of 3 used",)


# --------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bit_grey_is_scaled(tmp_path, suffix):
    """16-bit grey is divided by 257 and rounded; Pillow's own conversion would clip it at 255."""
    values = np.array([[0, 200, 20000, 40000, 60000, 65535]], np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 6 1 65535\n" + values.astype(">u2").tobytes())
    else:
        Image.fromarray(values).save(path)
    photo = load_photo(path)
    assert pixels(photo.image)[0, :, 0].tolist() == [0, 1, 78, 156, 233, 255]
    assert photo.notes == ("16-bit values scaled to 8 bit",)


def test_sixteen_bit_white_is_zero(tmp_path):
    """A 16-bit TIFF that stores white as zero is not shown as a negative."""
    Image.fromarray(np.array([[0, 65535]], np.uint16)).save(tmp_path / "a.tif", tiffinfo={262: 0})
    assert pixels(load_photo(tmp_path / "a.tif").image)[0, :, 0].tolist() == [255, 0]


def test_sixteen_bit_colour(tmp_path):
    """16-bit RGB keeps the upper half of each sample and says so."""
    (tmp_path / "a.png").write_bytes(png_bytes(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0x1234, 0x8000, 0xFFFF)))
    photo = load_photo(tmp_path / "a.png")
    assert photo.image.getpixel((0, 0)) == (0x12, 0x80, 0xFF)
    assert photo.notes == ("16-bit values scaled to 8 bit",)


@pytest.mark.parametrize(
    ("values", "expected", "span"),
    [
        (np.array([[0, 0.25, 1]], np.float32), [0, 64, 255], "0 to 1"),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255], "0 to 255"),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255], "-1 to 1"),
        (np.array([[0, 1.5, 3]], np.float32), [0, 128, 255], "0 to 3"),
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [0, 128, 255], "0 to 1"),
        (np.array([[-3e38, 0, 3e38]], np.float32), [0, 128, 255], "-1e+37 to 1e+37"),
        (np.array([[-7, -7, -7]], np.float32), [0, 0, 0], "-7 to -6"),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255], "0 to 255"),
        (np.array([[0, 25700, 65535]], np.int32), [0, 100, 255], "0 to 65535"),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255], "-100 to 100"),
    ],
)
def test_float_and_wide_integers(tmp_path, values, expected, span):
    """Values without a defined white are scaled by the range they fill, and the range is stated."""
    Image.fromarray(values).save(tmp_path / "a.tif")
    photo = load_photo(tmp_path / "a.tif")
    assert pixels(photo.image)[0, :, 0].tolist() == expected
    assert photo.notes == (f"values from {span} scaled to 8 bit",)


# -------------------------------------------------------------------------------------------------- colour


def test_cmyk_without_profile(tmp_path):
    """A CMYK JPEG without a profile is converted plainly and says so."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    photo = load_photo(tmp_path / "a.jpg")
    assert np.abs(pixels(photo.image) - [255, 0, 0]).max() <= 4
    assert photo.notes == ("converted from CMYK",)


def test_cmyk_through_its_profile(tmp_path):
    """A CMYK picture with a profile gets the colours of its profile, not those of the plain formula."""
    source = Image.new("CMYK", (2, 1), (255, 0, 0, 0))
    source.putpixel((1, 0), (0, 255, 255, 255))
    source.save(tmp_path / "a.tif", icc_profile=dark_cmyk_profile())
    photo = load_photo(tmp_path / "a.tif")
    (red, green, blue), paper = pixels(photo.image)[0].tolist()
    assert max(red, green, blue) - min(red, green, blue) <= 2 and 100 < red < 140
    assert min(paper) >= 253
    assert photo.notes == ("converted from CMYK through its colour profile",) and photo.icc_profile is None


def test_foreign_rgb_profile_is_applied(tmp_path):
    """RGB data in another colour space are converted to sRGB; the profile no longer fits and is dropped."""
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=swapped_rgb_profile())
    photo = load_photo(tmp_path / "a.png")
    assert np.abs(pixels(photo.image) - [0, 0, 255]).max() <= 4
    assert photo.notes == ("converted to sRGB through its colour profile",) and photo.icc_profile is None


def test_foreign_profile_under_alpha(tmp_path):
    """The profile is applied to the picture, not to the background put behind it."""
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png", icc_profile=swapped_rgb_profile())
    first, second = pixels(load_photo(tmp_path / "a.png", background="red").image)[0]
    assert np.abs(first - [0, 0, 255]).max() <= 4 and second.tolist() == [255, 0, 0]


def test_srgb_profile_is_kept(tmp_path):
    """An sRGB profile changes no pixel and is passed on, because it still describes the picture."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    scene().save(tmp_path / "a.png", icc_profile=profile)
    photo = load_photo(tmp_path / "a.png")
    assert (pixels(photo.image) == pixels(scene())).all()
    assert (photo.icc_profile, photo.notes) == (profile, ())


def test_grey_profile(tmp_path):
    """Grey data with a linear curve are brightened to sRGB's curve; the grey profile does not survive."""
    profile = icc_profile(b"GRAY", {b"kTRC": gamma(1.0)})
    Image.new("L", (4, 4), 128).save(tmp_path / "a.png", icc_profile=profile)
    photo = load_photo(tmp_path / "a.png")
    assert np.abs(pixels(photo.image) - 188).max() <= 1 and photo.icc_profile is None


@pytest.mark.parametrize(
    ("profile", "remark"),
    [
        (b"not a profile at all", "its colour profile is damaged and was ignored"),
        (dark_cmyk_profile(), "its colour profile is for CMYK data and was ignored"),
        (icc_profile(b"RGB ", {}), "its colour profile cannot be applied and was ignored"),
    ],
    ids=["garbage", "cmyk", "empty"],
)
def test_unusable_profile_is_ignored(tmp_path, profile, remark):
    """A damaged, mismatched or empty profile changes no pixel, is not passed on, and leads to a remark."""
    scene().save(tmp_path / "a.png", icc_profile=profile)
    photo = load_photo(tmp_path / "a.png")
    assert (pixels(photo.image) == pixels(scene())).all()
    assert (photo.notes, photo.icc_profile) == ((remark,), None)


def test_lab(tmp_path):
    """CIELAB pictures, which Pillow itself refuses to convert, are converted to the right colours."""
    lab = Image.merge("LAB", [Image.new("L", (2, 2), value) for value in (137, 128, 128)])
    lab.save(tmp_path / "a.tif")
    photo = load_photo(tmp_path / "a.tif")
    assert np.ptp(pixels(photo.image)[0, 0]) <= 3 and abs(pixels(photo.image)[0, 0, 0] - 128) <= 4
    assert photo.notes == ("converted from CIELAB",)


# ------------------------------------------------------------------------------------------------ refusals


def refused(path: str | os.PathLike[str], error: type[Exception], *words: str, **options) -> None:
    """Checks that the file is refused with that error, in one line with these words and advice."""
    with pytest.raises(error) as caught:
        load_photo(path, **options)
    message = str(caught.value)
    assert type(caught.value) is error and "\n" not in message
    for word in words:
        assert word in message


def test_missing(tmp_path):
    """A missing file is ImageNotFoundError; so are impossible file names."""
    refused(tmp_path / "none.png", ImageNotFoundError, "there is no file", "check the path")
    refused(tmp_path / "a\0b.png", ImageNotFoundError)
    refused(tmp_path / ("x" * 5000), ImageNotFoundError)
    refused("https://example.org/a.png", ImageNotFoundError, "download")


def test_name_with_newline_keeps_one_line(tmp_path):
    """A hostile file name cannot break the message into several lines."""
    refused(tmp_path / "a\nb.png", ImageNotFoundError)


def test_directory(tmp_path):
    """A folder is ImageNotFoundError and is called a folder."""
    refused(tmp_path, ImageNotFoundError, "is a folder")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_fifo(tmp_path):
    """A pipe without a writer is refused at once instead of waited on."""
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", ImageNotFoundError, "pipe")


def test_device():
    """A device is no picture file."""
    refused(os.devnull, ImageNotFoundError)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no way to count open files here")
def test_refusals_close_the_file(tmp_path):
    """Neither a read nor a refusal leaves a file open; a batch would run out of open files."""
    scene().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    before = len(os.listdir("/proc/self/fd"))
    photo = load_photo(tmp_path / "a.png")
    refused(tmp_path / "b.png", NotAnImageError)
    refused(tmp_path, ImageNotFoundError)
    refused(os.devnull, ImageNotFoundError)
    assert len(os.listdir("/proc/self/fd")) == before and photo


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_unreadable(tmp_path):
    """A file without read permission is ImageNotFoundError and names the reason."""
    path = tmp_path / "a.png"
    scene().save(path)
    path.chmod(0)
    refused(path, ImageNotFoundError, "cannot be read", "permission")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"P3 is how this text begins", "PNG or JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"\x00\x01\x02\x03" * 64, "no known picture format"),
    ],
)
def test_not_an_image(tmp_path, content, words):
    """Bytes that are no supported picture are NotAnImageError, and the message names their kind."""
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    refused(path, NotAnImageError, words, "PNG or JPEG")


@pytest.mark.parametrize(
    ("content", "words", "advice"),
    [
        (b"", "an empty file", "copy or download it again"),
        (bytes(5000), "a file of zeros", "copy or download it again"),
        (b"Dear reader,\nthis is no photo.\n", "a text file", "expected a JPEG, PNG"),
        (b"BMW is a maker of cars, and this is no bitmap", "a text file", "expected a JPEG, PNG"),
        (b"  <!DOCTYPE html><html></html>", "a web page", "download the picture itself"),
    ],
)
def test_no_picture_to_convert(tmp_path, content, words, advice):
    """The message of a file that holds no picture does not say to convert it."""
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    refused(path, NotAnImageError, words, advice)
    with pytest.raises(NotAnImageError) as caught:
        load_photo(path)
    assert "convert it" not in str(caught.value)


def test_avif_without_support(tmp_path, monkeypatch):
    """Where Pillow lacks AVIF the message says to convert the picture."""
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF", raising=False)
    (tmp_path / "a.avif").write_bytes(b"\x00\x00\x00\x1cftypavif\x00\x00\x00\x00avifmif1miaf")
    refused(tmp_path / "a.avif", NotAnImageError, "AVIF", "convert it to PNG or JPEG")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated(tmp_path, kind, share):
    """A picture that ends early is TruncatedImageError, never a half-grey photo."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    buffer = BytesIO()
    noise.save(buffer, kind)
    data = buffer.getvalue()
    (tmp_path / "a").write_bytes(data[: int(len(data) * share)])
    refused(tmp_path / "a", TruncatedImageError, kind if kind not in ("WEBP", "TIFF") else "", "download it again")


@settings(deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"]),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=6),
)
def test_damaged_bytes_give_a_picture_or_a_named_error(tmp_path_factory, kind, cut, flips):
    """A file cut and altered at random is a picture or one of the named errors."""
    buffer = BytesIO()
    scene(24, 16).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for where, value in flips:
        data[int(where * len(data))] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(data[: math.ceil(cut * len(data))])
    try:
        photo = load_photo(path, max_pixels=10_000)
    except (NotAnImageError, TruncatedImageError, ImageTooLargeError) as error:
        assert "\n" not in str(error)
    else:
        assert photo.image.mode == "RGB"


@pytest.mark.parametrize("side", [9_700, 12_000, 60_000])
def test_bomb_by_header(tmp_path, side):
    """A header beyond our cap is refused by its numbers alone, near Pillow's own limits and far above."""
    (tmp_path / "bomb.png").write_bytes(png_bytes(side, side, 8, 2, b"\0"))
    refused(
        tmp_path / "bomb.png",
        ImageTooLargeError,
        f"{side} x {side}",
        "100.0 million" if side > 10_000 else "90.0 million",
        "scale it down",
        max_pixels=MAX_PHOTO_PIXELS if side > 10_000 else 90_000_000,
    )


def test_bomb_for_real(tmp_path):
    """A complete picture of 144 million pixels in a few kilobytes is refused before it is decoded."""
    rows = zlib.compressobj(9)
    body = b"".join(rows.compress(bytes(1 + 12_000 // 8)) for _ in range(12_000)) + rows.flush()
    assert len(body) < 50_000
    data = png_bytes(12_000, 12_000, 1, 0, b"").replace(zlib.compress(b"", 9), body)
    (tmp_path / "bomb.png").write_bytes(data)
    refused(tmp_path / "bomb.png", ImageTooLargeError, "12000 x 12000")


def test_own_cap_is_exact(tmp_path):
    """A picture of exactly `max_pixels` is read, one with more is not."""
    scene(20, 10).save(tmp_path / "a.png")
    assert load_photo(tmp_path / "a.png", max_pixels=200).image.size == (20, 10)
    refused(tmp_path / "a.png", ImageTooLargeError, "20 x 10", max_pixels=199)


def test_file_size_cap(tmp_path):
    """A file above the byte cap is refused unread (here a sparse one)."""
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(images.MAX_FILE_BYTES + 1)
    refused(tmp_path / "big.png", ImageTooLargeError, "bytes", "cap")


def test_unknown_background(tmp_path):
    """A background that is no colour is a ConfigError, whether or not the picture has alpha."""
    scene().save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match="expected a colour"):
        load_photo(tmp_path / "a.png", background="whiteish")


def test_no_global_state(tmp_path):
    """Reading good and bad files leaves Pillow's limits and the warning filters as they were."""
    filters = list(warnings.filters)
    before = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    scene().save(tmp_path / "a.png")
    load_photo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    refused(tmp_path / "b.png", TruncatedImageError)
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert list(warnings.filters) == filters


# ----------------------------------------------------------------------------------------------- letterbox

sides = st.integers(1, 5000)


model_sizes = st.sampled_from([(64, 64), (512, 512), (576, 384), (256, 1024)])


@settings(deadline=None)
@given(width=sides, height=sides, size=model_sizes)
def test_letterbox_fit(width, height, size):
    """The box is centred in the model's picture, as large as it fits, and keeps the photo's aspect to half a pixel."""
    box = Letterbox.fit(width, height, size)
    across, down = box.right - box.left, box.bottom - box.top
    assert 0 <= box.left < box.right <= size[0] and 0 <= box.top < box.bottom <= size[1]
    assert across == size[0] or down == size[1]
    assert abs(box.left - (size[0] - box.right)) <= 1 and abs(box.top - (size[1] - box.bottom)) <= 1
    scale = min(size[0] / width, size[1] / height)
    assert across == 1 or abs(across - width * scale) <= 0.5
    assert down == 1 or abs(down - height * scale) <= 0.5


SD15, SDXL = Sizes((512, 512), 64, 256), Sizes((1024, 1024), 64, 512)


@pytest.mark.parametrize(
    ("photo", "sizes", "expected"),
    [
        ((3000, 2000), SD15, (576, 384)),
        ((2000, 3000), SD15, (384, 576)),
        ((4032, 3024), SD15, (576, 448)),
        ((1000, 1000), SD15, (512, 512)),
        ((1920, 1080), SD15, (640, 384)),
        ((9000, 1000), SD15, (1024, 256)),
        ((1, 5000), SD15, (256, 1024)),
        ((3000, 2000), SDXL, (1216, 832)),
        ((1920, 1080), SDXL, (1344, 768)),
        ((3000, 2000), Sizes((64, 64), 16, 64), (64, 64)),
    ],
)
def test_a_photo_is_edited_at_its_own_aspect(photo, sizes, expected):
    """The model's picture has the photo's aspect as far as the grid allows; a model for squares keeps its square."""
    assert sizes.nearest(*photo) == expected


@given(
    width=sides, height=sides, sizes=st.sampled_from([SD15, SDXL, Sizes((64, 64), 16, 64), Sizes((520, 520), 64, 260)])
)
def test_no_size_has_more_pixels_than_the_own_one(width, height, sizes):
    """A model's picture is on its grid, no larger than the model's own, shows more of the photo, and is stable."""
    size = sizes.nearest(width, height)
    assert size[0] * size[1] <= sizes.own[0] * sizes.own[1]
    assert size == sizes.own or (
        min(size) >= sizes.least and not size[0] % sizes.multiple and not size[1] % sizes.multiple
    )
    assert sizes.nearest(*size) == size

    def pixels_of(fitted):
        box = Letterbox.fit(width, height, fitted)
        return (box.right - box.left) * (box.bottom - box.top)

    assert pixels_of(size) >= pixels_of(sizes.own)


@settings(max_examples=15, deadline=None)
@given(width=sides, height=sides, size=model_sizes)
def test_square_round_trip_has_the_photo_size(width, height, size):
    """Into the square and back gives exactly the photo's own width and height."""
    box = Letterbox.fit(width, height, size)
    square = into_canvas(Image.new("RGB", (width, height), (200, 30, 60)), box)
    assert square.size == size
    assert np.abs(pixels(square) - [200, 30, 60]).max() <= 1
    assert from_canvas(square, box).size == (width, height)


@pytest.mark.parametrize("size", [(10_000, 3), (3, 10_000), (1, 1), (1, 5000)])
def test_extreme_aspect(size):
    """Ribbons of pictures keep at least one pixel of width and still go there and back."""
    box = Letterbox.fit(*size, (64, 64))
    assert from_canvas(into_canvas(Image.new("RGB", size, "teal"), box), box).size == size


def test_square_of_its_own_size_is_the_picture():
    """A picture that already is the model's square passes unchanged both ways."""
    box = Letterbox.fit(64, 64, (64, 64))
    assert (pixels(into_canvas(scene(64, 64), box)) == pixels(scene(64, 64))).all()
    assert (pixels(from_canvas(scene(64, 64), box)) == pixels(scene(64, 64))).all()


def test_padding_continues_the_picture():
    """The box holds exactly the resized photo; beside it the edge goes on, with no step and no black."""
    photo = ImageOps.autocontrast(scene(128, 64))
    box = Letterbox.fit(128, 64, (128, 128))
    square = pixels(into_canvas(photo, box))
    assert (square[box.top : box.bottom] == pixels(photo)).all()
    assert np.abs(square[box.top - 1] - square[box.top]).max() <= 6
    assert np.abs(square[box.bottom] - square[box.bottom - 1]).max() <= 6
    fine = Image.fromarray(np.tile(np.array([[[0] * 3, [255] * 3]], np.uint8), (64, 64, 1)))
    assert np.asarray(into_canvas(fine, box))[0].std() < 16, "stripes are softened far from the photo"


def test_padding_does_not_bleed_back():
    """The padding does not change the photo on the way back."""
    box = Letterbox.fit(100, 40, (64, 64))
    square = Image.new("RGB", (64, 64), "red")
    square.paste("blue", box.box)
    assert from_canvas(square, box).getcolors() == [(4000, (0, 0, 255))]


def test_round_trip_keeps_the_photo():
    """A smooth photo survives the square and back nearly unchanged."""
    box = Letterbox.fit(300, 200, (256, 256))
    assert psnr(from_canvas(into_canvas(scene(300, 200), box), box), scene(300, 200)) > 38


@pytest.mark.parametrize(
    "change",
    [
        {"left": -1},
        {"right": 65},
        {"left": 64, "right": 64},
        {"top": 40, "bottom": 30},
        {"width_px": 0},
        {"size": (64.0, 64)},
        {"size": 64},
        {"height_px": True},
        {"left": "0"},
        {"top": None},
    ],
)
def test_a_letterbox_is_of_whole_pixels_inside_its_picture(change):
    """Values of another type, or outside the model's picture, are a ValueError naming what was expected."""
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(Letterbox.fit(64, 32, (64, 64)), **change)


def test_letterbox_refuses_other_pictures():
    """A picture of another size or mode, and a size below one, are refused rather than stretched."""
    box = Letterbox.fit(48, 32, (64, 64))
    with pytest.raises(ValueError, match="48 x 32"):
        into_canvas(scene(32, 48), box)
    with pytest.raises(ValueError, match="expected RGB"):
        into_canvas(scene().convert("L"), box)
    with pytest.raises(ValueError, match="64 x 64"):
        from_canvas(scene(), box)
    with pytest.raises(ValueError, match="expected 1 or more"):
        Letterbox.fit(0, 5, (64, 64))


# ------------------------------------------------------------------------------------------------- tensors


def test_tensor_round_trip_is_exact():
    """All 256 values of every channel survive the way to [-1, 1] and back."""
    ramp = np.stack([np.arange(256).reshape(16, 16)] * 3, axis=-1).astype(np.uint8)
    tensor = to_tensor(Image.fromarray(ramp))
    assert tensor.shape == (1, 3, 16, 16) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    assert (tensor.min().item(), tensor.max().item()) == (-1.0, 1.0)
    (back,) = to_images(tensor)
    assert (np.asarray(back) == ramp).all()


def test_tensor_axes():
    """Channels come first, then rows from the top, then columns."""
    tensor = to_tensor(scene())
    assert tensor.shape == (1, 3, 32, 48)
    red, _, _ = scene().getpixel((47, 0))
    assert tensor[0, 0, 0, 47].item() == pytest.approx(red / 127.5 - 1, abs=1e-6)


def test_to_images_clamps_and_rounds():
    """Values outside [-1, 1] are clamped, those between two levels go to the nearer, in any float type."""
    values = torch.tensor([-7.0, -1 + 0.4 / 127.5, -1 + 0.6 / 127.5, 9.0, math.inf]).expand(2, 3, 1, 5)
    first, second = to_images(values)
    assert np.asarray(first)[0, :, 0].tolist() == [0, 0, 1, 255, 255]
    assert first == second
    assert to_images(torch.zeros(1, 3, 2, 2, dtype=torch.bfloat16))[0].size == (2, 2)
    assert to_images(torch.zeros(0, 3, 2, 2)) == []


def test_tensor_refusals():
    """Other modes, shapes and NaN are ValueErrors, not pictures in arbitrary colours."""
    with pytest.raises(ValueError, match="expected RGB"):
        to_tensor(scene().convert("RGBA"))
    with pytest.raises(ValueError, match="expected"):
        to_images(torch.zeros(3, 4, 4))
    with pytest.raises(ValueError, match="NaN"):
        to_images(torch.full((1, 3, 2, 2), math.nan))


def test_psnr():
    """Equal pictures give infinity, one level of difference 48.13 dB, and a picture can be compared with a tensor."""
    grey, next_grey = Image.new("RGB", (8, 8), (100,) * 3), Image.new("RGB", (8, 8), (101,) * 3)
    assert psnr(grey, grey) == math.inf
    assert psnr(grey, next_grey) == pytest.approx(20 * math.log10(255), abs=1e-4)
    tall = Image.new("RGB", (3, 1000))
    tall.putpixel((2, 999), (255, 255, 255))
    assert psnr(tall, Image.new("RGB", (3, 1000))) == pytest.approx(10 * math.log10(3000), abs=1e-6)
    assert psnr(Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "white")) == pytest.approx(0)
    with pytest.raises(ValueError, match="differ"):
        psnr(grey, scene())


# ----------------------------------------------------------------------------------------------- png output


def test_png_text_reads_back():
    """Text entries, Latin-1 or not, and the profile read back through Pillow; the pixels are unchanged."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = {"parameters": "a blue cube\nSteps: 20, Seed: 1", "note": "größer als 中文 <&>"}
    image = Image.open(BytesIO(encode_png(scene(), text=text, icc_profile=profile)))
    assert {name: str(image.text[name]) for name in text} == text
    assert image.info["icc_profile"] == profile
    assert (pixels(image) == pixels(scene())).all()


def test_png_says_how_it_was_made():
    """The XMP packet holds IPTC's digital source type, by default that of a photo composited with AI."""
    namespaces = {"rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#"}
    for arguments, term in (
        ({}, "compositeWithTrainedAlgorithmicMedia"),
        ({"provenance": "a&<b>\"'"}, "a&<b>\"'"),
    ):
        packet = Image.open(BytesIO(encode_png(scene(), **arguments))).text["XML:com.adobe.xmp"]
        ElementTree = pytest.importorskip("xml.etree.ElementTree")
        description = ElementTree.fromstring(packet.replace("\ufeff", "")).find(".//rdf:Description", namespaces)
        key = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
        assert description.attrib[key] == "http://cv.iptc.org/newscodes/digitalsourcetype/" + term


def test_png_mark_can_be_left_out():
    """Without provenance there is no XMP packet, and a plain PNG holds no text at all."""
    assert Image.open(BytesIO(encode_png(scene(), provenance=None))).text == {}


def test_png_bytes_are_reproducible():
    """Equal content gives equal bytes, in whatever order entries come and whatever the picture carried."""
    carrying = scene()
    carrying.info = {
        "icc_profile": b"x" * 200,
        "transparency": (0, 0, 0),
        "dpi": (72, 72),
        "Comment": "secret",
    }
    first = encode_png(scene(), text={"b": "2", "a": "1"})
    assert first == encode_png(carrying, text={"a": "1", "b": "2"})
    assert b"tIME" not in first and b"tRNS" not in first
    assert carrying.info["Comment"] == "secret", "the caller's picture is left alone"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"": "x"}, "keyword"),
        ({"k" * 80: "x"}, "keyword"),
        ({" lead": "x"}, "keyword"),
        ({"two  spaces": "x"}, "keyword"),
        ({"中": "x"}, "keyword"),
        ({"a\0b": "x"}, "keyword"),
        ({"XML:com.adobe.xmp": "x"}, "reserved"),
        ({"a": "x\0y"}, "NUL"),
    ],
)
def test_png_refuses_what_the_format_does_not_allow(text, words):
    """Keywords and texts outside the PNG specification are refused instead of written as broken chunks."""
    with pytest.raises(ValueError, match=words):
        encode_png(scene(), text=text)


def test_png_modes():
    """Grey and RGBA can be written too, other modes cannot."""
    assert Image.open(BytesIO(encode_png(scene().convert("RGBA")))).mode == "RGBA"
    assert Image.open(BytesIO(encode_png(scene().convert("L")))).mode == "L"
    with pytest.raises(ValueError, match="expected L, RGB or RGBA"):
        encode_png(scene().convert("CMYK"))


# -------------------------------------------------------------------------------------------- contact sheet


def ink_columns(sheet: Image.Image) -> np.ndarray:
    """The columns of a sheet that hold anything darker than its hairlines."""
    return np.flatnonzero((np.asarray(sheet.convert("L")) < 200).any(axis=0))


def test_sheet_grid():
    """Pictures lie in reading order in equal cells, scaled up or down to the cell with their aspect kept."""
    cells = [(str(i), Image.new("RGB", (30, 20), colour)) for i, colour in enumerate(("red", "lime", "blue"))]
    sheet = contact_sheet(cells, columns=2, cell_px=96)
    margin, gap = 96 // 9, 96 // 16
    assert sheet.size[0] == 2 * margin + 2 * 96 + gap
    for column, colour in enumerate(((255, 0, 0), (0, 255, 0))):
        corner = margin + column * (96 + gap)
        assert sheet.getpixel((corner, margin)) == colour
        assert sheet.getpixel((corner + 95, margin + 63)) == colour, "30 x 20 fills 96 x 64"
    assert (0, 0, 255) in {sheet.getpixel((margin + 48, y)) for y in range(sheet.size[1])}


@pytest.mark.parametrize(
    ("count", "columns"), [(1, 1), (3, 3), (5, 5), (6, 3), (7, 4), (12, 4), (16, 4), (20, 5), (100, 13)]
)
def test_sheet_default_columns(count, columns):
    """Up to five pictures make one row, more a wide grid with a full last row where possible."""
    sheet = contact_sheet([("", Image.new("RGB", (4, 4)))] * count, cell_px=16)
    assert sheet.size[0] == 2 * 8 + columns * 16 + (columns - 1) * 4


@pytest.mark.parametrize("text", ["word " * 60, "w" * 300, "W" * 3000, "a\nb\nc\nd\ne", "中文 é \x07 η ≥ 1"])
@pytest.mark.parametrize("cell_px", [16, 64, 256])
def test_sheet_text_stays_inside(text, cell_px):
    """No title, label or footer, however long, runs over the margins or into the neighbouring cell."""
    white = Image.new("RGB", (8, 8), "white")
    sheet = contact_sheet([("", white), (text, white), ("", white)], title=text, footer=text, cell_px=cell_px)
    margin, gap = max(8, cell_px // 9), max(4, cell_px // 16)
    inked = ink_columns(sheet)
    assert inked.min() >= margin - 1 and inked.max() <= sheet.size[0] - margin
    label_only = ink_columns(contact_sheet([("", white), (text, white), ("", white)], cell_px=cell_px))
    assert label_only.min() >= margin + cell_px + gap - 1
    assert label_only.max() <= margin + 2 * cell_px + gap + 1


def test_sheet_grows_by_its_text():
    """Title, labels and footer each add height of their own, so nothing is drawn over a picture."""
    cells = [("", scene())]
    plain = contact_sheet(cells).size[1]
    for extra in ({"title": "A title"}, {"footer": "seed 0"}):
        assert contact_sheet(cells, **extra).size[1] > plain
    assert contact_sheet([("label", scene())]).size[1] > plain
    photo_rows = np.asarray(contact_sheet([("label", Image.new("RGB", (64, 64), "red"))], title="T"))
    assert ((photo_rows == (255, 0, 0)).all(axis=-1)).sum() == 256 * 256


def test_sheet_takes_any_mode_and_leaves_the_cells_alone():
    """Grey and RGBA pictures are accepted, and stay unchanged."""
    source = scene().convert("L")
    before = source.tobytes()
    ImageDraw.Draw(contact_sheet([("a", source), ("b", scene().convert("RGBA"))])).rectangle((0, 0, 999, 999))
    assert source.tobytes() == before


@pytest.mark.parametrize("arguments", [{"columns": 0}, {"cell_px": 0}])
def test_sheet_refusals(arguments):
    """No cells, no columns and cells without size are ValueErrors."""
    with pytest.raises(ValueError, match="expected 1 or more"):
        contact_sheet([("a", scene())], **arguments)
    with pytest.raises(ValueError, match="0 cells"):
        contact_sheet([])


some_sizes = st.tuples(st.integers(1, 600), st.integers(1, 600))


@given(st.integers(1, 3000), st.integers(1, 3000), some_sizes, some_sizes)
def test_a_place_in_a_picture_of_another_size(width, height, size, other):
    """A photo's place scales with the picture, stays inside it and never vanishes; at its own size it is the same."""
    box = Letterbox.fit(width, height, size)
    scaled = box.scaled(other)
    assert box.scaled(size) == box
    for before, after, side, now in zip(box.box, scaled.box, size * 2, other * 2, strict=True):
        assert abs(after - before * now / side) <= 1
    assert (scaled.width_px, scaled.height_px, scaled.size) == (width, height, other)


@pytest.mark.parametrize(("size", "expected"), [((4000, 3000), (256, 192)), ((3, 900), (1, 256)), ((90, 70), (90, 70))])
def test_a_preview_is_no_larger_than_asked(size, expected):
    """A picture made small has the photo's aspect, and the photo's own size where that is smaller."""
    box = Letterbox.fit(*size, (64, 64))
    assert from_canvas(scene(64, 64), box, most_px=256).size == expected
