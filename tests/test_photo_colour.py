"""Facts about colours of photos: any colour information is converted to sRGB, or a remark names what was ignored."""

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from lowmem_imagic.pictures import load_photo, spaces

SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
"""IEC 61966-2-1, D65."""
XYZ_OF = {
    "sRGB": SRGB_TO_XYZ,
    "Display P3": np.array(
        [[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0, 0.0451134, 1.0439444]]
    ),
    "Adobe RGB": np.array(
        [[0.5766690, 0.1855582, 0.1882286], [0.2973450, 0.6273636, 0.0752915], [0.0270314, 0.0706889, 0.9913375]]
    ),
    "BT.2020": np.array(
        [[0.6369580, 0.1446169, 0.1688810], [0.2627002, 0.6779981, 0.0593017], [0, 0.0280727, 1.0609851]]
    ),
}
"""Of linear RGB with white D65, from the standards' own tables."""
P3 = "Display P3"
ADOBE_CHROMATICITIES = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)


def linear(values: np.ndarray) -> np.ndarray:
    """Light by sRGB's curve."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_encoded(light: np.ndarray) -> np.ndarray:
    """Samples by sRGB's curve."""
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def truth() -> np.ndarray:
    """The colours of the test picture in sRGB, [40, 60, 3]: smooth, and inside of every space used here."""
    y, x = np.mgrid[0:40, 0:60]
    return np.rint(np.stack([60 + x * 3, 70 + y * 4, 200 - x - y], axis=-1)).astype(np.uint8)


def seen_in(space: str, encoded: Any = srgb_encoded) -> np.ndarray:
    """The same colours as samples of another space, whose transfer is `encoded`."""
    light = linear(truth() / 255) @ (np.linalg.inv(XYZ_OF[space]) @ SRGB_TO_XYZ).T
    return np.clip(np.rint(encoded(np.clip(light, 0, 1)) * 255), 0, 255).astype(np.uint8)


def power(exponent: float) -> Any:
    """A transfer that is a power."""
    return lambda light: light ** (1 / exponent)


def png(samples: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 8-bit samples with chunks before its pixels."""
    grey = samples.ndim == 2
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], 8, 0 if grey else 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    all_chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in all_chunks
    )


def gama(exponent: float) -> tuple[bytes, bytes]:
    """A gAMA chunk for samples that are light to the power of 1 / exponent."""
    return b"gAMA", struct.pack(">I", round(100_000 / exponent))


def chrm(chromaticities: tuple[float, ...]) -> tuple[bytes, bytes]:
    """A cHRM chunk."""
    return b"cHRM", struct.pack(">8I", *(round(value * 100_000) for value in chromaticities))


def exif_with(
    colour_space: int | None = None, interoperability: str | None = None, gamma: float | None = None
) -> bytes:
    """An Exif block that names a colour space."""
    block = Image.Exif()
    inner = block.get_ifd(0x8769)
    if colour_space is not None:
        inner[0xA001] = colour_space
    if interoperability is not None:
        inner[0xA005] = {1: interoperability}
    return block.tobytes()


def off_by(path: Path, data: bytes) -> tuple[int, tuple[str, ...]]:
    """Largest error of the photo over the best 95 % of samples, and the remarks about it."""
    path.write_bytes(data)
    photo = load_photo(path)
    difference = np.abs(np.asarray(photo.image).astype(int) - truth())
    return int(np.quantile(difference, 0.95)), photo.notes


@pytest.mark.parametrize(
    ("samples", "chunks", "words"),
    [
        (seen_in(P3), [(b"cICP", bytes([12, 13, 0, 1]))], "Display P3"),
        (seen_in("BT.2020"), [(b"cICP", bytes([9, 13, 0, 1]))], "BT.2020"),
        (seen_in(P3, power(2.2)), [(b"cICP", bytes([12, 4, 0, 1]))], "12/4"),
        (seen_in("sRGB", power(1.0)), [(b"cICP", bytes([1, 8, 0, 1]))], "1/8"),
        (seen_in("Adobe RGB", power(2.2)), [gama(2.2), chrm(ADOBE_CHROMATICITIES)], "gAMA chunk and cHRM chunk"),
        (seen_in("Adobe RGB"), [chrm(ADOBE_CHROMATICITIES)], "cHRM chunk"),
        (seen_in("sRGB", power(1.8)), [gama(1.8)], "gAMA chunk"),
        (seen_in("sRGB", power(1.0)), [gama(1.0)], "gAMA chunk"),
        (seen_in("Adobe RGB", power(2.2)), [(b"eXIf", exif_with(65535, "R03")[6:])], "Adobe RGB"),
    ],
    ids=["p3", "2020", "p3-2.2", "linear", "adobe", "primaries", "mac", "linear-gama", "exif"],
)
def test_png_colours(tmp_path, samples, chunks, words):
    """Code points, gamma and primaries of a PNG are applied, with a remark: the colours equal the sRGB picture's."""
    # Linear samples have but a few steps in the dark.
    tolerance = 4 if "linear" in words or "1/8" in words or chunks[0] == gama(1.0) else 2
    worst, notes = off_by(tmp_path / "a.png", png(samples, *chunks))
    assert worst <= tolerance
    assert len(notes) == 1 and words in notes[0]


@pytest.mark.parametrize(
    ("chunks", "samples"),
    [
        ([(b"cICP", bytes([12, 13, 0, 1])), (b"sRGB", b"\0"), gama(1.0)], seen_in(P3)),
        ([(b"sRGB", b"\0"), gama(1.0), chrm(ADOBE_CHROMATICITIES)], truth()),
        ([(b"sRGB", b"\0"), (b"eXIf", exif_with(65535, "R03")[6:])], truth()),
        ([gama(2.2)], truth()),
        ([(b"cICP", bytes([1, 13, 0, 1]))], truth()),
        ([(b"eXIf", exif_with(1, "R98")[6:])], truth()),
    ],
)
def test_png_signals_have_an_order(tmp_path, chunks, samples):
    """Precedence is code points, sRGB, gamma and primaries, Exif; a gamma of 1/2.2 alone counts as sRGB's."""
    worst, _ = off_by(tmp_path / "a.png", png(samples, *chunks))
    assert worst <= 2


@pytest.mark.parametrize(
    ("chunks", "words"),
    [
        ([(b"cICP", bytes([99, 13, 0, 1]))], "99/13 are not known here and were ignored"),
        ([(b"cICP", bytes([9, 200, 0, 1]))], "9/200 are not known here and were ignored"),
        ([(b"cICP", bytes([9, 13, 9, 1]))], "matrix 9"),
        ([gama(0.001)], "gAMA chunk says"),
        ([chrm((0.3, 0.3, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5))], "span no colours"),
        ([chrm((0.3, 0.0, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06))], "span no colours"),
        ([(b"eXIf", exif_with(65535)[6:])], "no known colour space"),
        ([(b"cICP", bytes([1, 1, 0, 1]))], "BT.709"),
    ],
)
def test_what_is_ignored_is_said(tmp_path, chunks, words):
    """A signal that cannot be applied leaves the samples as they are, and a remark says so."""
    (tmp_path / "a.png").write_bytes(png(truth(), *chunks))
    photo = load_photo(tmp_path / "a.png")
    assert (np.asarray(photo.image) == truth()).all()
    assert any(words in note for note in photo.notes)


def test_blocks_in_texts(tmp_path):
    """Profiles and Exif blocks that ImageMagick writes into texts of a PNG count as those in chunks of their own."""
    packed = {
        "icc": spaces.profile_of(spaces.Space(spaces.PRIMARIES[12], spaces.srgb_curve())),
        "exif": exif_with(65535, "R03"),
    }
    for (name, block), samples in zip(packed.items(), (seen_in(P3), seen_in("Adobe RGB", power(2.2))), strict=True):
        text = f"\n{name}\n{len(block):8}\n{block.hex()}\n".encode()
        chunk = (b"zTXt", f"Raw profile type {name}".encode() + b"\0\0" + zlib.compress(text))
        worst, notes = off_by(tmp_path / "a.png", png(samples, chunk))
        assert worst <= 2 and len(notes) == 1


def test_an_unknown_signal_leaves_the_next_one(tmp_path):
    """Code points that are not known do not hide the gamma that stands beside them."""
    chunks = [(b"cICP", bytes([99, 99, 0, 1])), gama(1.8)]
    worst, notes = off_by(tmp_path / "a.png", png(seen_in("sRGB", power(1.8)), *chunks))
    assert worst <= 2 and len(notes) == 2


def test_narrow_range(tmp_path):
    """RGB data of narrow range (16 to 235) are widened."""
    samples = np.rint(16 + truth() * (219 / 255)).astype(np.uint8)
    worst, notes = off_by(tmp_path / "a.png", png(samples, (b"cICP", bytes([12, 13, 0, 0]))))
    assert "narrow range" in notes[0]
    samples = np.rint(16 + seen_in(P3) * (219 / 255)).astype(np.uint8)
    worst, _ = off_by(tmp_path / "a.png", png(samples, (b"cICP", bytes([12, 13, 0, 0]))))
    assert worst <= 2


def pq(light: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, where 1 is the reference white of 203 cd/m2 (ITU-R BT.2408)."""
    power_of = (light * 203 / 10_000) ** (2610 / 16384)
    return ((3424 / 4096 + 2413 / 128 * power_of) / (1 + 2392 / 128 * power_of)) ** (2523 / 32)


def hlg(light: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100 on a screen of 1000 cd/m2, where 1 is 203 cd/m2."""
    scene = (light * 0.203) ** (1 / 1.2)
    above = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), above)


@pytest.mark.parametrize(("transfer", "encoded", "name"), [(16, pq, "PQ"), (18, hlg, "HLG")])
def test_hdr_is_brought_to_the_standard_range(tmp_path, transfer, encoded, name):
    """PQ and HLG pictures show reference white as white, the colours below it as they are, and it is said."""
    samples = seen_in("BT.2020", encoded)
    worst, notes = off_by(tmp_path / "a.png", png(samples, (b"cICP", bytes([9, transfer, 0, 1]))))
    assert worst <= 8, "eight bits have coarse steps here"
    assert name in notes[0] and "cut off" in notes[0]


def test_grey_with_gamma(tmp_path):
    """A grey picture with a gamma of its own is brought to sRGB's curve."""
    grey = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    (tmp_path / "a.png").write_bytes(png(grey, gama(1.0)))
    photo = load_photo(tmp_path / "a.png")
    wanted = srgb_encoded(np.arange(256) / 255) * 255
    assert np.abs(np.asarray(photo.image)[0, :, 1] - wanted).max() <= 2 and "gAMA" in photo.notes[0]


def jpeg(samples: np.ndarray, **options: Any) -> bytes:
    """A JPEG of hardly any loss."""
    buffer = BytesIO()
    Image.fromarray(samples).save(buffer, "JPEG", quality=100, subsampling=0, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("exif", [exif_with(65535, "R03"), exif_with(2), exif_with(None, "R03")])
def test_adobe_rgb_by_exif(tmp_path, exif):
    """A camera's JPEG that Exif says to be Adobe RGB is converted, whether by index R03 or by number 2."""
    worst, notes = off_by(tmp_path / "_DSC1.JPG", jpeg(seen_in("Adobe RGB", power(2.2)), exif=exif))
    assert worst <= 3 and notes == ("converted to sRGB from Adobe RGB, by its Exif data",)


def test_exif_numbers(tmp_path):
    """Primaries, white point and gamma in Exif data are applied where no colour space is named."""
    block = Image.Exif()
    block[318], block[319] = ADOBE_CHROMATICITIES[:2], ADOBE_CHROMATICITIES[2:]
    block.get_ifd(0x8769)[0xA001] = 65535
    block.get_ifd(0x8769)[0xA500] = 2.2
    worst, notes = off_by(tmp_path / "a.jpg", jpeg(seen_in("Adobe RGB", power(2.2)), exif=block))
    assert worst <= 3 and "Exif" in notes[0]


def test_a_leading_underscore_is_no_signal(tmp_path):
    """A file name that DCF reserves for Adobe RGB says nothing by itself."""
    worst, notes = off_by(tmp_path / "_DSC0001.JPG", jpeg(truth()))
    assert worst <= 2 and notes == ()


def test_a_profile_goes_before_exif(tmp_path):
    """An embedded profile takes precedence over Exif."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    data = jpeg(truth(), icc_profile=profile, exif=exif_with(65535, "R03"))
    worst, notes = off_by(tmp_path / "a.jpg", data)
    assert worst <= 2 and notes == ()


def test_tiff_tags(tmp_path):
    """White point, primaries and transfer function of a TIFF are applied."""
    table = tuple(round((n / 255) ** 1.8 * 65535) for n in range(256))
    for samples, tags in (
        (seen_in("Adobe RGB"), {318: ADOBE_CHROMATICITIES[:2], 319: ADOBE_CHROMATICITIES[2:]}),
        (seen_in("sRGB", power(1.8)), {301: table * 3}),
    ):
        buffer = BytesIO()
        Image.fromarray(samples).save(buffer, "TIFF", tiffinfo=tags)
        worst, notes = off_by(tmp_path / "a.tif", buffer.getvalue())
        assert worst <= 2 and "its TIFF tags" in notes[0]


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow lacks AVIF")
def test_avif_code_points(tmp_path):
    """The code points of an AVIF file are applied; so are those of its AV1 stream where the file itself has none."""
    buffer = BytesIO()
    Image.fromarray(seen_in(P3)).save(buffer, "AVIF", quality=100, subsampling="4:4:4", speed=8)
    data = buffer.getvalue()
    at = data.index(b"colrnclx") + 8
    worst, notes = off_by(tmp_path / "a.avif", data[:at] + struct.pack(">H", 12) + data[at + 2 :])
    assert worst <= 4 and "Display P3" in notes[0]
    worst, notes = off_by(tmp_path / "b.avif", data.replace(b"colrnclx", b"freenclx"))
    assert notes == ()


def test_jpeg2000_header(tmp_path):
    """ROMM RGB, named in the header of a JPEG 2000 file, is applied; a space that is not known is said."""
    to_xyz = np.array([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0, 0, 0.8249]])  # of D50
    to_d50 = np.array([[1.0479, 0.0229, -0.0502], [0.0296, 0.9904, -0.0171], [-0.0092, 0.0151, 0.7519]])
    light = linear(truth() / 255) @ (np.linalg.inv(to_xyz) @ to_d50 @ SRGB_TO_XYZ).T
    samples = np.rint(np.clip(light, 0, 1) ** (1 / 1.8) * 255).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(samples).save(buffer, "JPEG2000")
    data = buffer.getvalue()
    at = data.index(b"colr") + 7
    worst, notes = off_by(tmp_path / "a.jp2", data[:at] + struct.pack(">I", 21) + data[at + 4 :])
    assert worst <= 3 and "ROMM RGB" in notes[0]
    assert "e-sRGB" in off_by(tmp_path / "a.jp2", data[:at] + struct.pack(">I", 20) + data[at + 4 :])[1][0]


def bitmap(samples: np.ndarray, space: bytes, numbers: tuple[int, ...] = (0,) * 12, profile: bytes = b"") -> bytes:
    """A BMP with a header of version 5."""
    height, width, _ = samples.shape
    rows = b"".join(row[:, ::-1].tobytes().ljust(-(-3 * width // 4) * 4, b"\0") for row in samples[::-1])
    head = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 24, 0, len(rows), 0, 0, 0, 0) + bytes(16) + space
    head += struct.pack("<12I", *numbers) + struct.pack("<IIII", 4, 124 + len(rows), len(profile), 0)
    return b"BM" + struct.pack("<IHHI", 138 + len(rows) + len(profile), 0, 0, 138) + head + rows + profile


def test_bitmap_headers(tmp_path):
    """Colour spaces of bitmaps: calibrated by XYZ or by chromaticities, sRGB, an embedded profile, a linked one."""
    xyz = XYZ_OF["Adobe RGB"].T.ravel()
    x, y = np.array(ADOBE_CHROMATICITIES[2:]).reshape(3, 2).T
    for ends in (xyz, np.stack([x, y, 1 - x - y], axis=1).ravel()):
        numbers = (*(round(float(value) * 2**30) for value in ends), *(round(2.2 * 65536),) * 3)
        worst, notes = off_by(tmp_path / "a.bmp", bitmap(seen_in("Adobe RGB", power(2.2)), bytes(4), numbers))
        assert worst <= 2 and "its bitmap header" in notes[0]
    ends = (0.64, 0.33, 0.03, 0.30, 0.60, 0.10, 0.15, 0.06, 0.79)  # sRGB's, as most programs write them
    numbers = (*(round(value * 2**30) for value in ends), *(round(2.2 * 65536),) * 3)
    assert off_by(tmp_path / "a.bmp", bitmap(truth(), bytes(4), numbers)) == (0, ())
    assert off_by(tmp_path / "a.bmp", bitmap(truth(), b"BGRs")) == (0, ())
    assert off_by(tmp_path / "a.bmp", bitmap(truth(), bytes(4))) == (0, ())
    assert "a file of its own" in off_by(tmp_path / "a.bmp", bitmap(truth(), b"KNIL"))[1][0]
    assert "damaged" in off_by(tmp_path / "a.bmp", bitmap(truth(), b"DEBM", profile=b"x" * 200))[1][0]


def test_gain_maps_are_said(tmp_path):
    """Of a picture with an HDR gain map the standard picture is used, and the remark says so."""
    packet = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta hdrgm:Version="1.0"/>'
    plain = jpeg(truth())
    for segment in (
        b"\xff\xe1" + struct.pack(">H", 2 + len(packet)) + packet,
        b"\xff\xe2\0\x1eurn:iso:std:iso:ts:21496:-1\0",
    ):
        worst, notes = off_by(tmp_path / "a.jpg", plain[:2] + segment + plain[2:] + plain)
        assert worst <= 2 and notes == ("its HDR gain map was ignored, the standard picture was used",)
