"""Facts about manifests: photos in folders, items in tables and lists, and limits for bad ones."""

import hashlib
import json
import os
import random
import re
from pathlib import Path

import pytest
from PIL import Image

from lowmem_imagic.batch import entries
from lowmem_imagic.batch.entries import MAX_MANIFEST_BYTES
from lowmem_imagic.batch.manifest import read_manifest
from lowmem_imagic.errors import ConfigError
from lowmem_imagic.pictures.png import SHEET_TITLE, contact_sheet, encode_png

SENTENCE = "a red cube, on grass"


def picture(path: Path, kind: str | None = None) -> None:
    """A small picture file."""
    Image.new("RGB", (8, 8), "teal").save(path, kind)


def names_in(folder: Path) -> list[str]:
    """The photos that a folder gives; none of them is bad."""
    items, bad = read_manifest(folder, SENTENCE)
    assert not bad
    return [item.photo.name for item in items]


def table(tmp_path: Path, content: str | bytes, name: str = "list.csv") -> Path:
    """A manifest file of that content."""
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Folders


def test_extensions_in_any_case(tmp_path):
    """Photos are known by the extensions of every format that is decoded, in any case."""
    names = sorted(
        ["a.JPG", "b.jpe", "c.jfif", "d.PNG", "e.Tiff", "f.avif", "g.HEIC", "h.hif", "i.j2k", "j.ppm", "k.dib"]
    )
    for name in [*names, "notes.txt", "film.mov", "list.csv", "Thumbs.db", "desktop.ini"]:
        picture(tmp_path / name, "PNG")
    assert names_in(tmp_path) == names


def test_what_systems_leave_behind(tmp_path):
    """Hidden files and companion files of macOS are no items, and the photo keeps its own name."""
    picture(tmp_path / "IMG_1.JPG")
    fork = b"\0\x05\x16\x07\0\x02\0\0Mac OS X        " + bytes(82)
    for name in ("._IMG_1.JPG", "IMG_0.jpg"):
        (tmp_path / name).write_bytes(fork)
    picture(tmp_path / ".hidden.png")
    items, bad = read_manifest(tmp_path, SENTENCE)
    assert [item.name for item in items] == ["img-1-a-red-cube-on-grass"] and not bad


def test_own_results_are_left_alone(tmp_path):
    """Overviews, sheets, and the pictures of an edit beside its report are no photos; a copy of one elsewhere is."""
    photos = tmp_path / "photos"
    photos.mkdir()
    picture(photos / "cat.png")
    cell = Image.new("RGB", (8, 8))
    sheet = contact_sheet([("", cell)], cell_px=16)
    for name, text in (
        ("overview.png", {"Software": "lowmem-imagic batch sheet"}),
        ("sheet.png", {"Software": "lowmem-imagic"}),
        ("cat-sheet.png", {"Software": "lowmem-imagic", "parameters": "x"}),
        ("renamed.png", {"Software": "lowmem-imagic", "Title": SHEET_TITLE}),
    ):
        (photos / name).write_bytes(encode_png(sheet, text=text))
    edit = {"Software": "lowmem-imagic", "parameters": "a sentence\nSteps: 4"}
    (photos / "eta_1.00.png").write_bytes(encode_png(cell, text=edit))
    assert names_in(photos) == ["cat.png", "eta_1.00.png"]
    (photos / "report.json").write_text("{}")
    assert names_in(photos) == ["cat.png"]


def test_raw_files_beside_their_pictures(tmp_path):
    """A camera raw file is named, unless the picture that the camera made of it lies beside it."""
    picture(tmp_path / "DSC1.JPG")
    for name in ("DSC1.NEF", "DSC2.NEF"):
        (tmp_path / name).write_bytes(b"x")
    assert names_in(tmp_path) == ["DSC1.JPG", "DSC2.NEF"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file(tmp_path):
    """Pipes, devices and broken links with names of photos are named and not opened; folders are no photos."""
    picture(tmp_path / "a.png")
    (tmp_path / "linked.png").symlink_to("a.png")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    items, bad = read_manifest(tmp_path, SENTENCE)
    assert [item.photo.name for item in items] == ["a.png", "linked.png"]
    assert {one.where: one.reason.split(";")[0] for one in bad} == {
        "broken.png": "'broken.png' is a link that leads nowhere",
        "loop.png": "'loop.png' is a link that leads nowhere",
        "pipe.jpg": "'pipe.jpg' is a pipe or device",
        "zero.png": "'zero.png' is a pipe or device",
    }


# Tables


def test_an_unquoted_comma(tmp_path):
    """A sentence with a comma that stands without quotes fails its line alone, with the line as it should be."""
    path = table(tmp_path, 'photo,sentence\na.png,a red cube, on grass\nb.png,"a cube, blue"\n')
    items, [bad] = read_manifest(path)
    assert [item.sentence for item in items] == ["a cube, blue"]
    assert bad.where == "line 2" and 'put the sentence in quotes: "a red cube, on grass"' in bad.reason


@pytest.mark.parametrize(
    "content",
    [
        "photo;sentence\na.png;a cube, red\n",
        "photo\tsentence\na.png\ta cube, red\n",
        "sep=;\r\nphoto;sentence\r\na.png;a cube, red\r\n",
        '\ufeff"photo","sentence"\n"a.png","a cube, red"\n',
        'photo,sentence\ra.png,"a cube, red"\r',
        'photo,sentence\r\na.png,"a cube, red"\r\n\r\n,\r\n',
        '\n\n Photo , Sentence ,\na.png,"a cube, red",\n',
        'img_name,prompt,name\na.png,"a cube, red"\n',
        'photo, sentence\na.png, "a cube, red"\n',
        ("\ufeffphoto;sentence\na.png;a cube, red\n").encode("utf-16-le"),
        ("\ufeffphoto\tsentence\na.png\ta cube, red\n").encode("utf-16-be"),
    ],
)
def test_tables_as_programs_write_them(tmp_path, content):
    """Semicolons, tabs, marks of UTF-8 and UTF-16, and any system's ends of line are read."""
    path = tmp_path / "list.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    items, bad = read_manifest(path)
    assert [(item.photo.name, item.sentence) for item in items] == [("a.png", "a cube, red")] and not bad


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a.png,a red cube\nb.png,a blue cube\n", "line 1: no column is called photo"),
        ("photo,sentence,colour\na.png,x,red\n", "line 1: column 'colour' is no field"),
        ("photo,sentence,sentence\na.png,x,y\n", "line 1: column 'sentence' occurs twice"),
        ("photo,image\na.png,x\n", "line 1: column 'photo' occurs twice"),
        ('photo,sentence\na.png,x\nb.png,"never closed\nc.png,y\n', "line 3: .*double every quote in it"),
        ('photo,sentence\na.png,"a "red" cube"\n', "line 2: .*double every quote in it"),
        ("photo,sentence\n", "has no items"),
        ("", "no column is called photo"),
        ("photo,sentence\na.png,\xe4\n".encode("latin-1"), "save it as UTF-8"),
        (b"p\0h\0o\0t\0o\0", "save it as UTF-8"),
    ],
)
def test_tables_that_are_none(tmp_path, content, words):
    """A table without usable columns, or with a quote that is not closed, is one error that names the line."""
    path = table(tmp_path, content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_surplus_cells_make_one_line(tmp_path):
    """The advice about a row with too many cells is one line of printable text, for any cells."""
    path = table(tmp_path, 'photo,sentence\na.png,"x\n\x1b[31m",y\n')
    [bad] = read_manifest(path)[1]
    assert bad.where == "line 3" and '"x ?[31m, y"' in bad.reason


def test_short_rows_and_stray_cells(tmp_path):
    """A row that ends early only lacks its last fields; a cell in a column without a name is an error."""
    path = table(tmp_path, "photo,sentence,,name\na.png\nb.png,x,stray\nc.png,y,,n\n")
    items, bad = read_manifest(path)
    assert [item.name for item in items] == ["n"]
    assert [(one.where, one.reason) for one in bad] == [
        ("line 2", "has no sentence"),
        ("line 3", "'stray' stands in a column without a name"),
    ]


# Items


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ('"photo": "https://example.org/a.png"', "download it first"),
        ('"photo": "s3://bucket/a.png"', "download it first"),
        ('"photo": "file:///tmp/a.png"', "leave out 'file://'"),
        ('"photo": "~/a.png"', "write the home folder out"),
        ('"photo": ""', "has no photo"),
        ('"photo": "a.png", "photo": "b.png"', "'photo' occurs twice"),
        ('"photo": "a.png", "seed": NaN', "found NaN"),
        ('"photo": "a.png", "seed": 1e999', "is too large"),
        ('"photo": "a.png", "seed": ' + "9" * 5000, "is too large"),
        ('"photo": "a.png", "name": "\\ud800"', "half of a surrogate pair"),
        ('"photo": "a.png", "etas": [[0]]', "numbers"),
        ('"photo": "a.png", "etas": [' + "0," * 300 + "0]", "at most 256 numbers"),
        ('"photo": "a.png", "etas": ' + "[" * 5000, "nested"),
        ('"photo": "a.png", "etas": [' + "[]," * 9000 + "[]]", "parts"),
    ],
)
def test_bad_items_are_said(tmp_path, fields, words):
    """An item that cannot be meant is left out with one short line, and the one after it is read."""
    good = '{"photo": "c.png", "sentence": "x"}'
    path = table(tmp_path, f'{{"sentence": "x", {fields}}}\n{good}\n', "list.jsonl")
    [item], [bad] = read_manifest(path)
    assert item.photo.name == "c.png" and words in bad.reason and len(bad.reason) < 300 and "\n" not in bad.reason


def test_a_sentence_with_half_a_character(tmp_path):
    """Half of a surrogate pair in a sentence fails its item and not the run."""
    path = table(tmp_path, '[{"photo": "a.png", "sentence": "a \\udc00 cube"}]', "list.json")
    items, [bad] = read_manifest(path)
    assert not items and "sentence holds half" in bad.reason


def test_folder_names_never_meet(tmp_path, monkeypatch):
    """Items of one name get as many digits as tell them all apart."""
    sha256 = hashlib.sha256

    class Weak:
        """A hash whose digests agree in their first digits, as some of 100,000 real ones do in the first eight."""

        def __init__(self, data):
            self._hash = sha256(data)

        def hexdigest(self):
            return "a" * 20 + self._hash.hexdigest()[:44]

    monkeypatch.setattr(hashlib, "sha256", Weak)
    lines = [json.dumps({"photo": "p.png", "sentence": "x" * n, "name": "n"}) for n in range(1, 9)]
    path = table(tmp_path, "\n".join(lines), "list.jsonl")
    names = [item.name for item in read_manifest(path)[0]]
    assert len(set(names)) == 8 and all(len(name) <= 60 for name in names)
    assert all(name.startswith("n-" + "a" * 20) and len(name) == 34 for name in names)
    path.write_text("\n".join(lines[:5]))
    assert [item.name for item in read_manifest(path)[0]] == names[:5]


def test_a_name_that_lacks_letters_gets_digits(tmp_path):
    """An item whose texts have letters that its folder's name has not gets digits, also if it is alone."""
    path = table(tmp_path, "photo,sentence\nfoto.png,a café\n写真.png,a cat\nb.png,кот\n")
    names = [item.name for item in read_manifest(path)[0]]
    assert names[0] == "foto-a-cafe" and re.fullmatch("a-cat-[0-9a-f]{8}", names[1])
    assert re.fullmatch("b-[0-9a-f]{8}", names[2])


def test_the_same_item_twice(tmp_path):
    """An item that stands twice is made once; the second is named."""
    path = table(tmp_path, "photo,sentence\na.png,x\na.png,y\na.png,x\n")
    items, [bad] = read_manifest(path)
    assert len(items) == 2 and bad.where == "line 4" and "stand above already" in bad.reason


# Limits of a manifest


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_manifests_are_files(tmp_path):
    """A pipe or device in place of a manifest is refused and not waited on."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    (tmp_path / "loop.json").symlink_to("loop.json")
    for name, words in (
        ("pipe.jsonl", "pipe or device"),
        ("zero.csv", "pipe or device"),
        ("loop.json", "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_manifest(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.json", b"[" + b"[]," * 2_100_000 + b"[]]", "parts"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[" + b"0," * 50 + b"0]", "more than 50 items"),
        ("a.jsonl", b"{}\n" * 51, "more than 50 items"),
        ("a.csv", b"photo,sentence\n" + b"a,b\n" * 51, "more than 50 items"),
        ("a.jsonl", b"\n" * 1_000_001, "more than 1000000 lines"),
        ("a.jsonl", b"a" * (2**20 + 1), "characters"),
        ("a.csv", b"," * 20_000, "characters"),
    ],
)
def test_manifests_are_bounded(tmp_path, monkeypatch, name, content, words):
    """Items, lines, their length and the parts of a list are bounded before they are all in memory."""
    monkeypatch.setattr(entries, "MAX_ITEMS", 50)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_manifest(tmp_path / name)


def test_a_sparse_manifest(tmp_path):
    """A manifest above the cap is refused unread."""
    with (tmp_path / "a.jsonl").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(ConfigError, match="bytes"):
        read_manifest(tmp_path / "a.jsonl")


def test_mutated_manifests(tmp_path):
    """Manifests with bytes and pieces exchanged give items, bad items, or one error of one line."""
    rows = [
        {"photo": "a.png", "sentence": "a cat, asleep", "seed": 3, "etas": [0, 0.5]},
        {"img_name": "b.png", "target_text": 'größer \u2028 "q"'},
    ]
    seeds = [
        (".jsonl", "\n".join(map(json.dumps, rows)).encode()),
        (".json", json.dumps(rows).encode()),
        (".csv", 'photo,sentence,seed\na.png,"a cat, ""asleep""",3\nb.png,größer,\n'.encode()),
        (".csv", "photo;sentence\na.png;x\n".encode("utf-16")),
    ]
    pieces = [
        b'"',
        b"{",
        b"[",
        b"]",
        b",",
        b":",
        b"\n",
        b"\r",
        b"\0",
        b"\xff\xfe",
        b"NaN",
        b"\\ud800",
        b"9" * 400,
        b"[[" * 20,
    ]
    for seed in range(400):
        draw = random.Random(seed)
        suffix, content = draw.choice(seeds)
        data = bytearray(content)
        for _ in range(draw.choice((1, 2, 5))):
            at = draw.randrange(len(data) + 1)
            if draw.random() < 0.6:
                data[at:at] = draw.choice(pieces)
            else:
                del data[at : at + draw.choice((1, 3, 20))]
        path = tmp_path / f"a{suffix}"
        path.write_bytes(data)
        try:
            items, bad = read_manifest(path, draw.choice((None, "x")))
        except ConfigError as error:
            assert "\n" not in str(error)
        else:
            assert len({item.name for item in items}) == len(items)
            assert all("\n" not in one.reason for one in bad) and all(item.sentence.encode() for item in items)
