"""Facts about files of photos: the main picture of a file, supported kinds, and limits for small files."""

import itertools
import logging
import os
import random
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from lowmem_imagic import pictures as images
from lowmem_imagic.errors import (
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
    NotAnImageError,
    TruncatedImageError,
)
from lowmem_imagic.pictures import load_photo, photo, photo_file


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """A smooth RGB picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    planes = (x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), (x + 2 * y) * 80 / (width + height))
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    """The bytes of a picture file."""
    buffer = BytesIO()
    (image or scene()).save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(path: Path, data: bytes) -> ImageError:
    """The error that a file of these bytes ends in, which is one line."""
    path.write_bytes(data)
    with pytest.raises(ImageError) as caught:
        load_photo(path)
    assert "\n" not in str(caught.value)
    return caught.value


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of these chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def directory(place: int, tags: dict[int, tuple[int, Sequence[int]]], after: int) -> bytes:
    """A TIFF directory that stands at a place, with its longer values behind it."""
    table, values = b"", b""
    start = place + 2 + 12 * len(tags) + 4
    for tag, (kind, numbers) in sorted(tags.items()):
        body = struct.pack(f"<{len(numbers)}{ {1: 'B', 3: 'H', 4: 'I'}[kind] }", *numbers)
        if len(body) > 4:
            body, values = struct.pack("<I", start + len(values)), values + body
        table += struct.pack("<HHI", tag, kind, len(numbers)) + body.ljust(4, b"\0")
    return struct.pack("<H", len(tags)) + table + struct.pack("<I", after) + values


def tiff(pages: Sequence[dict[int, tuple[int, Sequence[int]]]], inside: Sequence[Any] = ()) -> bytes:
    """A TIFF file of grey pages (each as wide as tag 256 says), the first with `inside` as further directories.

    A page is filled with its number from 1 times 40; those inside go on counting.
    """
    data = bytearray(b"II*\0" + bytes(4))
    places = []
    for number, page in enumerate([*inside, *pages], start=1):
        shade = 40 * (number - len(inside) if number > len(inside) else number + len(pages))
        width, height = page[256][1][0], page[257][1][0]
        tags = {258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 278: (4, [height])} | page
        tags |= {273: (4, [len(data)]), 279: (4, [width * height])}
        data += bytes([shade]) * (width * height)
        places.append((len(data), tags))
        if number == len(inside) + 1 and inside:
            tags[330] = (4, [place for place, _ in places[: len(inside)]])
        data += directory(len(data), tags, 0)
    chain = places[len(inside) :]
    struct.pack_into("<I", data, 4, chain[0][0])
    for (place, tags), (after, _) in itertools.pairwise(chain):
        struct.pack_into("<I", data, place + 2 + 12 * len(tags), after)
    return bytes(data)


def page(width: int, height: int, **tags: int) -> dict[int, tuple[int, Sequence[int]]]:
    """Tags of a page, further ones by their number."""
    return {256: (4, [width]), 257: (4, [height])} | {int(tag[1:]): (4, [value]) for tag, value in tags.items()}


# Which picture is meant


@pytest.mark.parametrize(
    ("pages", "inside", "size", "shade", "words"),
    [
        ([page(16, 12, t254=1), page(60, 50)], [], (60, 50), 80, "its first picture is a thumbnail of 16 x 12"),
        ([page(16, 12, t255=2), page(30, 20), page(60, 50)], [], (60, 50), 120, "its first picture is a thumbnail"),
        ([page(16, 12), page(64, 48)], [], (64, 48), 80, "its first picture is a thumbnail"),
        ([page(16, 12, t254=1)], [page(60, 50)], (60, 50), 80, "its first picture is a thumbnail"),
        ([page(60, 50), page(60, 50), page(60, 50)], [], (60, 50), 40, "first page of 3 used"),
        ([page(60, 50), page(90, 90)], [], (60, 50), 40, "first page of 2 used"),
        ([page(60, 50), page(30, 25, t254=1)], [], (60, 50), 40, "first page of 2 used"),
        ([page(60, 50, t254=1)], [], (60, 50), 40, "marked as a reduced copy"),
        ([page(16, 12, t254=1), page(64, 48, t254=4), page(32, 24)], [], (32, 24), 120, "thumbnail"),
        ([page(60, 50)], [page(30, 25, t254=1)], (60, 50), 40, None),
    ],
)
def test_the_real_picture_is_taken(tmp_path, pages, inside, size, shade, words):
    """If the first picture is a thumbnail, the real one is used; in other files the first page; each with a remark."""
    (tmp_path / "a.tif").write_bytes(tiff(pages, inside))
    read = load_photo(tmp_path / "a.tif")
    assert read.image.size == size and read.image.getpixel((5, 5)) == (shade,) * 3
    assert [words in note for note in read.notes] == ([True] if words else [])


def test_a_page_has_its_own_orientation_and_the_files_profile(tmp_path):
    """The picture behind a thumbnail is turned by its own tag."""
    (tmp_path / "a.tif").write_bytes(tiff([page(16, 12, t254=1), page(60, 50, t274=6)]))
    assert load_photo(tmp_path / "a.tif").image.size == (50, 60)


@pytest.mark.parametrize("big", [False, True])
def test_tiff_pages_that_libtiff_decodes(tmp_path, big):
    """A compressed page behind a thumbnail has the pixels that were saved, in a BigTIFF file as well."""
    first, second = scene(16, 12), scene(160, 120)
    data = encoded("TIFF", first, save_all=True, append_images=[second], compression="tiff_adobe_deflate", big_tiff=big)
    (tmp_path / "a.tif").write_bytes(data)
    read = load_photo(tmp_path / "a.tif")
    assert read.image.tobytes() == second.tobytes() and "thumbnail" in read.notes[0]


@pytest.mark.parametrize(
    "data",
    [
        tiff([page(16, 12, t254=1)], [page(64, 48, t262=32803)]),
        tiff([page(16, 12, t254=1)], [page(32, 24, t254=1), page(64, 48, t262=34892)]),
        tiff([page(16, 12, t50706=0x01040000)]),
        tiff([page(64, 48, t259=34713)]),
        tiff([page(64, 48), page(64, 48, t262=32803)]),
        b"II*\0\x10\0\0\0CR\x02\0" + tiff([page(8, 8)])[12:],
        b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom",
        b"FUJIFILMCCD-RAW 0201FF129502" + bytes(64),
        b"IIRO\x08\0\0\0" + bytes(64),
        b"IIU\0\x18\0\0\0" + bytes(64),
        b"FOVb" + bytes(64),
    ],
    ids=["nef", "proraw", "dng", "nikon", "second", "cr2", "cr3", "raf", "orf", "rw2", "x3f"],
)
def test_camera_raw_is_named(tmp_path, data):
    """A camera raw file, in a coat of TIFF or its own, is one error that says to develop it; no preview is edited."""
    error = refusal(tmp_path / "a.nef", data)
    assert type(error) is NotAnImageError and "camera raw file" in str(error) and "develop it" in str(error)


def test_a_cameras_own_tiff_is_no_raw_file(tmp_path):
    """A TIFF that a camera wrote is read, of any make."""
    (tmp_path / "a.tif").write_bytes(encoded("TIFF", tiffinfo={271: "NIKON CORPORATION", 272: "NIKON D850"}))
    assert load_photo(tmp_path / "a.tif").image.size == (48, 32)


def test_several_pictures_in_a_jpeg(tmp_path):
    """The first picture of a JPEG with further pictures is used, with a remark."""
    (tmp_path / "a.jpg").write_bytes(encoded("MPO", save_all=True, append_images=[scene()], quality=95))
    assert load_photo(tmp_path / "a.jpg").notes == ("first frame of 2 used",)
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"urn:com:apple:photo:2020:aux:hdrgainmap")
    assert load_photo(tmp_path / "a.jpg").notes == ("its HDR gain map was ignored, the standard picture was used",)


def test_still_picture_beside_an_animation(tmp_path):
    """A PNG with a still picture outside of its animation gives the still picture, with a remark."""
    frames = [scene(), Image.new("RGB", (48, 32), "red"), Image.new("RGB", (48, 32), "blue")]
    (tmp_path / "a.png").write_bytes(
        encoded("PNG", frames[0], save_all=True, append_images=frames[1:], default_image=True)
    )
    read = load_photo(tmp_path / "a.png")
    assert read.image.tobytes() == scene().tobytes() and read.notes == ("its still picture used, 2 frames not",)


# Kinds


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ", "AppleDouble"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL"),
        (b"\0\0\x01\0\x01\0\x10\x10", "an icon"),
        (b"gimp xcf v011\0", "a GIMP file"),
        (b"v/1\x01\x02\0\0\0", "OpenEXR"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "Radiance"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom", "a video"),
        (bytes(5000), "a file of zeros"),
        (png((b"CgBI", bytes(4))), "iOS"),
        (b"qoif" + bytes(40), "of no known picture format"),
    ],
)
def test_other_kinds_are_named(tmp_path, data, words):
    """The error for an unsupported kind of file names the kind."""
    error = refusal(tmp_path / "a.jpg", data)
    assert type(error) is NotAnImageError and words in str(error)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"])
def test_heic_names_the_package(tmp_path, monkeypatch, brand):
    """Without the package that reads HEIC, the message for any brand names it, once."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    error = refusal(tmp_path / "a.heic", b"\0\0\0\x18ftyp" + brand + b"\0\0\0\0" + b"mif1heic")
    assert type(error) is NotAnImageError and str(error).count("needs the package pillow-heif") == 1


def test_heic(tmp_path):
    """With the package, a HEIC photo is read, turned once, and brought to sRGB by its code points."""
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    heif.from_pillow(scene(64, 48)).save(
        tmp_path / "a.heic", quality=90, exif=exif.tobytes(), color_primaries=12, transfer_characteristics=13
    )
    read = load_photo(tmp_path / "a.heic")
    assert read.image.size == (48, 64)
    assert read.notes == ("converted to sRGB from Display P3 (code points 12/13)",)
    assert isinstance(refusal(tmp_path / "b.heic", (tmp_path / "a.heic").read_bytes()[:400]), ImageError)


def test_suffixes():
    """Extensions of every supported format mark a photo in any case; hidden files and others are none."""
    for suffix in (".jpe", ".JFIF", ".Tif", ".j2k", ".jp2", ".avifs", ".HIF", ".heif", ".dib", ".apng", ".pgm"):
        assert images.has_photo_suffix("a" + suffix)
    for name in (".a.jpg", "._a.jpg", "a", "a.txt", "Thumbs.db", "desktop.ini", "a.mov", "jpg", ".jpg"):
        assert not images.has_photo_suffix(name)


# Limits of a file


def header(width: int, height: int, kind: int = 2) -> tuple[bytes, bytes]:
    """An IHDR chunk of 8-bit samples."""
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)


ROWS = (b"IDAT", zlib.compress((b"\0" + bytes(48 * 3)) * 32))
END = (b"IEND", b"")


def test_scans_of_a_jpeg_are_counted(tmp_path):
    """A progressive JPEG of more scans than such pictures have is refused before it is decoded."""
    data = encoded("JPEG", scene().convert("L"), progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    error = refusal(tmp_path / "a.jpg", data[:-2] + last * 100 + b"\xff\xd9")
    assert type(error) is ImageTooLargeError and "100 scans" in str(error)
    (tmp_path / "a.jpg").write_bytes(data[:-2] + last * 20 + b"\xff\xd9")
    assert load_photo(tmp_path / "a.jpg").image.size == (48, 32)


def test_tiles_may_not_dwarf_the_picture(tmp_path):
    """A TIFF whose one tile is far larger than its picture is refused; tiles somewhat larger are usual."""
    tags = {256: (4, [8]), 257: (4, [8]), 258: (3, [8]), 259: (3, [8]), 262: (3, [1]), 277: (3, [1])}
    tile = zlib.compress(bytes([90]) * 256 * 256)
    for side in (46_000, 256):
        body = directory(8, tags | {322: (4, [side]), 323: (4, [side]), 324: (4, [500]), 325: (4, [len(tile)])}, 0)
        (tmp_path / "a.tif").write_bytes((b"II*\0\x08\0\0\0" + body).ljust(500, b"\0") + tile)
        if side == 256:
            assert load_photo(tmp_path / "a.tif").image.getpixel((7, 7)) == (90,) * 3
        else:
            error = refusal(tmp_path / "a.tif", (tmp_path / "a.tif").read_bytes())
            assert type(error) is ImageTooLargeError and "46000 x 46000" in str(error)


@pytest.mark.parametrize(
    "data",
    [
        encoded("WEBP", Image.new("RGB", (3600, 3600)), lossless=True),
        encoded("GIF")[:6] + struct.pack("<HH", 60_000, 1_600) + encoded("GIF")[10:],
        png(header(4000, 4000), ROWS, END),
    ],
    ids=["webp", "gif", "png"],
)
def test_pixels_need_bytes(tmp_path, data):
    """A tiny file that claims millions of pixels is refused: no photo has so few bytes for them."""
    error = refusal(tmp_path / "a", data)
    assert type(error) is ImageTooLargeError and "in only" in str(error)


def test_a_large_plain_picture_is_no_bomb(tmp_path):
    """A white picture of 13 million pixels in a PNG, which takes few bytes but not next to none, is read."""
    (tmp_path / "a.png").write_bytes(encoded("PNG", Image.new("L", (4000, 3250), 255)))
    assert load_photo(tmp_path / "a.png").image.size == (4000, 3250)


def bomb_of_exif() -> bytes:
    """A directory of 3000 tags, each of which claims the same 60,000 bytes."""
    tags = b"".join(struct.pack("<HHII", 1000 + n, 1, 60_000, 8) for n in range(3000))
    return (b"II*\0\x08\0\0\0" + struct.pack("<H", 3000) + tags).ljust(65_000, b"\0")


@pytest.mark.parametrize("kind", ["jpg", "mpf", "png", "zip", "profile"])
def test_metadata_cost_nothing(tmp_path, kind):
    """Exif tags that all claim the same bytes, and texts and profiles that unpack without end, leave the picture."""
    jpeg = encoded("JPEG")
    exif = bomb_of_exif()
    if kind in ("jpg", "mpf"):
        mark, name = {"jpg": (b"\xff\xe1", b"Exif\0\0"), "mpf": (b"\xff\xe2", b"MPF\0")}[kind]
        data = jpeg[:2] + mark + struct.pack(">H", 2 + len(name) + len(exif)) + name + exif + jpeg[2:]
    else:
        zeros = zlib.compress(bytes(50_000_000), 9)
        chunk = {
            "png": (b"eXIf", exif),
            "zip": (b"zTXt", b"Raw profile type exif\0\0" + zeros),
            "profile": (b"iCCP", b"x\0\0" + zeros),
        }[kind]
        data = png(header(48, 32), chunk, ROWS, END)
    path = tmp_path / "a"
    path.write_bytes(data)
    assert load_photo(path).image.size == (48, 32)


def test_jpeg2000_tiles(tmp_path):
    """A JPEG 2000 picture cut into tiles of a pixel each is refused."""
    data = bytearray(encoded("JPEG2000", no_jp2=True))
    data[8:16] = struct.pack(">II", 256, 256)
    data[24:32] = struct.pack(">II", 1, 1)
    assert "65536 tiles" in str(refusal(tmp_path / "a.j2k", bytes(data)))


def test_a_frame_larger_than_the_picture(tmp_path):
    """An AVIF file that says it is small is held to the size of the frames in its stream."""
    data = bytearray(encoded("AVIF", Image.new("L", (300, 200)), speed=10))
    at = data.index(b"ispe") + 8
    data[at : at + 8] = struct.pack(">II", 8, 8)
    (tmp_path / "a.avif").write_bytes(data)
    with pytest.raises(ImageTooLargeError, match="300 x 200"):
        load_photo(tmp_path / "a.avif", max_pixels=50_000)


@pytest.mark.parametrize("start", [png(header(8, 8)), tiff([page(8, 8)]), encoded("JPEG"), b"hello", b""])
def test_sparse_files(tmp_path, start):
    """A file of hundreds of megabytes that no picture of its size needs is not read; nor is its hash taken."""
    path = tmp_path / "a.png"
    with path.open("wb") as file:
        file.write(start)
        file.truncate(images.MAX_FILE_BYTES)
    for read in (load_photo, photo_file):
        with pytest.raises((ImageTooLargeError, NotAnImageError)):
            read(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "AVIF", "HEIF"])
def test_the_size_of_a_photo_is_known_before_it_is_decoded(tmp_path, kind):
    """A photo's number of pixels is read from the header of every format; of a damaged file it is unknown."""
    try:
        data = encoded(kind)
    except (KeyError, OSError):
        pytest.skip(f"Pillow cannot write {kind} here")
    path = tmp_path / "a"
    path.write_bytes(data)
    width, height = load_photo(path).image.size
    assert photo_file(path).pixels == width * height
    path.write_bytes(data[:20])
    assert photo_file(path).pixels in (0, width * height)


def test_large_files_are_what_they_are(tmp_path):
    """A large camera raw file is called that, and a large TIFF whose picture is behind a thumbnail is read."""
    path = tmp_path / "a.tif"

    def write(data: bytes) -> None:
        path.write_bytes(data)
        os.truncate(path, 40 * 2**20)

    write(tiff([page(16, 12, t254=1)], [page(64, 48, t262=32803)]))
    assert len(photo_file(path).sha256) == 64
    with pytest.raises(NotAnImageError, match="camera raw"):
        load_photo(path)
    write(tiff([page(16, 12, t254=1)], [page(2000, 1500)]))
    assert load_photo(path).image.size == (2000, 1500)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_only_files_are_opened(tmp_path):
    """Pipes, devices and links to them are refused without being opened, for the hash of a photo too."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    for name in ("pipe.jpg", "zero.jpg", "loop.jpg"):
        for read in (load_photo, photo_file):
            with pytest.raises(ImageNotFoundError):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("path", "words"),
    [("https://example.org/a.png", "download"), ("file:///tmp/a.png", "give its path"), ("~/a.png", "in place of ~")],
)
def test_what_is_no_path(path, words):
    """A URL or a tilde in place of a path gets the advice that helps."""
    with pytest.raises(ImageNotFoundError, match=words):
        load_photo(path)


# One boundary


@pytest.mark.parametrize(
    "data",
    [
        png(header(8, 8, kind=3), (b"IDAT", zlib.compress(bytes(9 * 8))), END),
        png((b"IHDR", b"\0"), ROWS, END),
        b"\x89PNG\r\n\x1a\n",
        b"II*\0\x08\0\0\0\xff\xff",
        b"MM\0+\0\x08\0\0" + b"\xff" * 40,
        b"BM" + b"\xff" * 12,
        b"GIF89a" + b"\xff" * 7,
        b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\0",
        b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\0",
        b"\xff\x4f\xff\x51" + b"\xff" * 60,
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + struct.pack(">I4s", 40, b"meta") + b"\xff" * 32,
        b"P6\n9 9\n70000\n" + bytes(9),
    ],
)
def test_damage_is_one_line(tmp_path, data):
    """Any error of a decoder on damaged data becomes one of the named errors."""
    assert type(refusal(tmp_path / "a", data)) in (TruncatedImageError, NotAnImageError, ImageTooLargeError)


def test_surplus_opacities(tmp_path):
    """A palette picture with more opacities than colours is read, as other programs read it."""
    rows = zlib.compress(b"\0\0\1\0\1\0")
    data = png(
        header(2, 2, kind=3), (b"PLTE", bytes([255, 0, 0, 0, 0, 255])), (b"tRNS", bytes(300)), (b"IDAT", rows), END
    )
    (tmp_path / "a.png").write_bytes(data)
    assert load_photo(tmp_path / "a.png").image.getpixel((0, 0)) == (255, 255, 255)


def broken_strip() -> bytes:
    """A TIFF whose LZW data are damaged, of which libtiff prints a line."""
    data = bytearray(encoded("TIFF", scene(64, 64), compression="tiff_lzw"))
    data[20:200] = b"\xff" * 180
    return bytes(data)


def test_libraries_print_nothing(tmp_path, capfd, caplog):
    """Messages of libtiff about damaged data go to the log and not to standard error."""
    with caplog.at_level(logging.DEBUG, logger="lowmem_imagic"):
        refusal(tmp_path / "a.tif", broken_strip())
    assert capfd.readouterr().err == ""
    assert any("not yet in table" in record.message for record in caplog.records)


def test_lines_of_other_threads_are_kept(tmp_path, capfd, monkeypatch):
    """Text that another thread writes to standard error while a picture is decoded still gets there."""
    decode = photo.decode

    def interrupted(*arguments: Any) -> Image.Image:
        thread = threading.Thread(target=os.write, args=(2, b"a line of another thread\n"))
        thread.start()
        thread.join()
        return decode(*arguments)

    monkeypatch.setattr(photo, "decode", interrupted)
    refusal(tmp_path / "a.tif", broken_strip())
    assert capfd.readouterr().err == "a line of another thread\n"


def test_reading_without_standard_error(tmp_path):
    """A process without standard error reads pictures all the same."""
    (tmp_path / "a.tif").write_bytes(encoded("TIFF"))
    script = (
        "import os, sys; os.close(2); from lowmem_imagic import load_photo; print(load_photo(sys.argv[1]).image.size)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a.tif")], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(48, 32)"


SEEDS = [
    encoded("JPEG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    encoded("JPEG", progressive=True),
    png(header(48, 32), (b"gAMA", struct.pack(">I", 100_000)), (b"cICP", bytes([12, 13, 0, 1])), ROWS, END),
    encoded("PNG", scene().convert("P"), transparency=bytes(200)),
    *(encoded("TIFF", compression=how) for how in (None, "tiff_lzw", "tiff_adobe_deflate", "jpeg")),
    tiff([page(16, 12, t254=1), page(60, 50)], [page(30, 25)]),
    *(encoded(kind) for kind in ("WEBP", "GIF", "BMP", "PPM", "JPEG2000", "AVIF")),
]


def test_mutated_files(tmp_path):
    """Files of every format with numbers, bytes and pieces exchanged give a picture or one of the named errors."""
    numbers = [0, 1, 127, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]
    path = tmp_path / "a"
    for seed in range(600):
        draw = random.Random(seed)
        data = bytearray(draw.choice(SEEDS))
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(min(len(data), draw.choice((64, 400, len(data)))))
            wide = draw.choice((1, 2, 4))
            how = draw.randrange(4)
            if how == 0:
                data[at] = draw.randrange(256)
            elif how == 1:
                number = draw.choice(numbers) & (1 << 8 * wide) - 1
                data[at : at + wide] = number.to_bytes(wide, draw.choice(("big", "little")))
            elif how == 2:
                del data[at : at + draw.choice((1, 4, 40))]
            else:
                data[at:at] = data[draw.randrange(len(data)) :][:40]
            data = data or bytearray(1)
        path.write_bytes(data)
        try:
            assert load_photo(path).image.mode == "RGB"
        except ImageError as error:
            assert "\n" not in str(error)
