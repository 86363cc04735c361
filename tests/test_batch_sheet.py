"""Facts about ``batch sheet``: a picture and a page of a batch's results, made without trust in the folder's files."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic.batch import overview
from lowmem_imagic.cli.commands import app
from tests.test_batch import SENTENCE, batch, some_photos  # noqa: F401  `batch` is a fixture


class Links(HTMLParser):
    """Collects the links, the pictures and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.found += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def sheet(folder: Path, *more: str) -> Any:
    """``batch sheet`` on the command line."""
    return CliRunner().invoke(app, ["batch", "sheet", str(folder), *more])


@pytest.fixture(scope="session")
def made(batch: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """A folder with photos and a batch of them: of three, and of one that is none."""
    folder = tmp_path_factory.mktemp("made")
    photos = some_photos(folder / "photos")
    assert batch(photos, "--prompt", SENTENCE, "--out", folder / "out").exit_code == 3
    return folder


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    """A copy of the batch that a test may change."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def test_the_page_shows_every_item(out: Path) -> None:
    """The page has photo, sentence, pictures, timings and files of every item, and the reasons of failures."""
    result = sheet(out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["with_pictures"] == 3
    page = (out / "index.html").read_text()
    links = Links(page)
    for name in links.found:
        assert (out / unquote(name)).exists() and not name.startswith(("/", "http", "file")), name
    text = " ".join(links.text)
    assert text.count(SENTENCE) == 3 and text.count("eta 1.00") == 3 and text.count("s training") == 3
    assert page.count('alt="the photo"') == 3
    assert "broken.png" in text and "damaged or cut-off" in text
    assert str(out.parent) not in page
    assert not links.tags & {"script", "link", "iframe", "object"} and "default-src 'none'" in page


def test_the_photo_is_where_the_report_says(out: Path) -> None:
    """The place on the sheet that a report names shows the photo: its own colours, at its own aspect."""
    sheet(out)
    name = "p1-a-photo-of-a-blue-sphere"
    report = json.loads((out / name / "report.json").read_text())
    with Image.open(out / name / "sheet.png") as picture:
        cut = picture.convert("RGB").crop(report["sheet_photo_box"])
    with Image.open(out.parent / "photos" / "p1.png") as photo:
        small = cut.resize(photo.size, Image.Resampling.BOX)
        distance = [abs(a - b) for a, b in zip(small.tobytes(), photo.convert("RGB").tobytes(), strict=True)]
    assert abs(cut.width / cut.height - 20 / 16) < 0.02
    assert sum(distance) / len(distance) < 20
    with Image.open(out / "overview.png") as whole:
        assert whole.info["Software"] == "lowmem-imagic batch sheet" and whole.height > 3 * 100


def test_nothing_of_others_is_replaced(out: Path) -> None:
    """A foreign page or picture is kept unless --force is given; the batch's own is replaced."""
    assert sheet(out).exit_code == 0 and sheet(out).exit_code == 0
    for name in ("index.html", "overview.png"):
        ours = (out / name).read_bytes()
        (out / name).write_bytes(b"mine")
        result = sheet(out)
        assert result.exit_code == 1 and "--force replaces it" in result.stderr
        assert (out / name).read_bytes() == b"mine"
        assert sheet(out, "--force").exit_code == 0
        assert (out / name).read_bytes()[:100] == ours[:100]


def test_reports_are_not_trusted(out: Path, tmp_path: Path) -> None:
    """Markup in a sentence stays text, and names that lead out of a folder, or to nothing, are not shown."""
    (tmp_path / "secret.png").write_bytes((out / "p0-a-photo-of-a-blue-sphere" / "sheet.png").read_bytes())
    path = out / "p0-a-photo-of-a-blue-sphere" / "report.json"
    report = json.loads(path.read_text())
    report |= {
        "sentence": "<script>alert(1)</script>",
        "pictures": ["../../secret.png", "nothing.png", 7, *report["pictures"]],
        "edit_file": "../../secret.png",
        "sheet_photo_box": [0, 0, 10**9, 5],
    }
    path.write_text(json.dumps(report))
    assert sheet(out).exit_code == 0
    page = (out / "index.html").read_text()
    assert "secret" not in page and "nothing.png" not in page and "<script>alert" not in page
    assert "&lt;script&gt;" in page and page.count('alt="the photo"') == 2


@pytest.mark.parametrize(
    "change",
    [
        {"stages": [1]},
        {"stages": {"embed": 3, "finetune": {"seconds": "9"}}, "seconds": None},
        {"seconds": {"render": float("inf")}, "stages": {"embed": {"seconds": float("nan")}}},
        {"sentence": "half a pair \ud800", "edit_file": ["a"]},
        {"sentence": 5, "sheet_photo_box": [0.5, 0, 9, 9]},
        {"sheet_photo_box": [0, 0, 1, 1]},
    ],
)
def test_reports_of_any_shape_make_a_page(out: Path, change: dict[str, Any]) -> None:
    """Values of other kinds than a report has are left out, and the item is shown all the same."""
    path = out / "p0-a-photo-of-a-blue-sphere" / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    result = sheet(out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["with_pictures"] == 3
    assert (out / "index.html").read_text(encoding="utf-8").count("s training") == 3


def test_only_pngs_are_opened(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another format, for which Pillow may start a program, is not shown, whatever its name."""
    (out / "p0-a-photo-of-a-blue-sphere" / "eta_0.00.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", None)
    assert sheet(out).exit_code == 0
    assert (out / "index.html").read_text().count("eta_0.00.png") == 2 * 2


def test_what_is_gone_is_said(out: Path) -> None:
    """A finished item with a removed folder or removed pictures is listed as such."""
    shutil.rmtree(out / "p0-a-photo-of-a-blue-sphere")
    for path in (out / "p1-a-photo-of-a-blue-sphere").glob("eta_*.png"):
        path.unlink()
    assert json.loads(sheet(out, "--json").stdout)["with_pictures"] == 1
    page = (out / "index.html").read_text()
    assert "its files are gone" in page and "its pictures are gone" in page


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("there is no file '/home/jane doe/our photos/cat.png'; check", "there is no file 'cat.png'; check"),
        ('there is no file "/home/o\'neil/cat.png"', 'there is no file "cat.png"'),
        ("there is no file 'C:\\\\Users\\\\jane\\\\cat.png'", "there is no file 'cat.png'"),
        ("/home/jane/models/sd has no unet/config.json", "sd has no unet/config.json"),
        ("/a folder/of jane/out/cat holds something else", "cat holds something else"),
        ("loss is nan in 3/16", "loss is nan in 3/16"),
    ],
)
def test_folders_of_this_machine_are_not_named(message: str, shown: str) -> None:
    """Of the paths in an error the page has the last part alone."""
    assert overview.without_folders(message, Path("/a folder/of jane/out")) == shown


def test_many_items_make_a_picture_of_bounded_size(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more items, and of more pictures of one, than fit the picture shows the first ones, and says so."""
    seen: dict[str, Any] = {}
    drawn = overview.contact_sheet
    monkeypatch.setattr(overview, "MAX_ROWS", 2)
    monkeypatch.setattr(overview, "contact_sheet", lambda cells, **how: seen.update(how) or drawn(cells, **how))
    assert sheet(out).exit_code == 0
    assert seen["footer"] == "and 1 more item, see index.html" and seen["columns"] == 3
    monkeypatch.setattr(overview, "MAX_PICTURES", 1)
    assert sheet(out).exit_code == 0
    assert seen["footer"] == "and 1 more item and more pictures, see index.html" and seen["columns"] == 2


def test_places_without_a_picture_are_paper(out: Path) -> None:
    """An item without a photo, as older versions made them, or with fewer pictures leaves paper, not a frame."""
    path = out / "p0-a-photo-of-a-blue-sphere" / "report.json"
    report = json.loads(path.read_text())
    del report["sheet_photo_box"]
    path.write_text(json.dumps(report))
    assert sheet(out).exit_code == 0
    assert (out / "index.html").read_text().count('alt="the photo"') == 2
    with Image.open(out / "overview.png") as whole:
        size, paper = overview._CELL_PX, whole.getpixel((0, 0))
        place = whole.crop((0, size // 4, size // 9 + size, size))
        assert place.getcolors() == [(place.width * place.height, paper)]


def test_no_folder_of_a_batch(tmp_path: Path) -> None:
    """A folder without a batch, or a missing folder, is one clear error, and no file is written."""
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = sheet(folder)
        assert result.exit_code == 2 and "name the --out of a batch run" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["sheet", "status"])
def test_looking_takes_no_torch(out: Path, command: str) -> None:
    """``batch sheet`` and ``batch status`` answer without importing torch."""
    script = (
        "import sys\nfrom lowmem_imagic.cli.commands import app\n"
        f"sys.argv = ['lowmem-imagic', 'batch', {command!r}, {str(out)!r}]\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert end.code in (0, None)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_report_of_nothing_but_brackets(out: Path) -> None:
    """A report nested deeper than can be parsed is no report: status and page are made of the others."""
    (out / "p0-a-photo-of-a-blue-sphere" / "report.json").write_text("[" * 200_000)
    assert sheet(out).exit_code == 0
    assert (out / "index.html").read_text().count('alt="the photo"') == 2
