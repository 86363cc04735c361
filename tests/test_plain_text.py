# ruff: noqa: RUF001  letters of many scripts
"""Facts about text from outside: it is shown without misleading characters, and data keep the exact text."""

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic.actions import console
from lowmem_imagic.actions.result_folder import generation_parameters
from lowmem_imagic.batch.overview_page import Shown, page_of
from lowmem_imagic.cli.commands import app
from lowmem_imagic.cli.frame import print_report
from lowmem_imagic.edits import header as edit_header
from lowmem_imagic.pictures.png import contact_sheet
from lowmem_imagic.plain_text import one_line, shown
from lowmem_imagic.sampling.sample import Cell

HOSTILE = {
    "colours": "\x1b[31mred\x1b[0m",
    "title of the terminal": "\x1b]0;owned\x07",
    "cursor up": "\x1b[1A\x1b[2K",
    "C1 escape": "\x9b31m",
    "carriage return": "a cat\rexit 0",
    "line end": "a cat\nfailed: nothing",
    "both": "a\r\nb",
    "vertical tab": "a\vb\fc",
    "next line": "a\x85b",
    "separators": "a\u2028b\u2029c\x1cd\x1de\x1ef",
    "override": "photo\u202egnp.exe",
    "embedding": "\u202aa\u202b b\u202c",
    "isolate": "\u2066a\u2067b\u2068c\u2069",
    "marks": "\u200ea\u200fb\u061cc",
    "zero width": "c\u200bat\u2060\ufeff",
    "joiner among Latin letters": "c\u200dat",
    "joiners at the ends": "\u200dcat\u200c",
    "tags": "cat\U000e0041\U000e0042",
    "soft hyphen": "c\xadat",
    "fillers": "a\u3164b\u115fc\uffa0d\u2800e",
    "private": "\ue000\U0010ffff",
    "half a pair": "a\udce9b\ud83d",
    "unassigned": "\u0378",
    "NUL, tab, backspace, delete": "\0\t\b\x7f",
    "annotations": "\ufff9a\ufffab\ufffb",
    "deprecated formats": "\u206a\u206f",
}
HARMLESS = [
    "a photo of a cat, 100 % (really): \\n",
    "un café crème à 5 °C · naïve",
    "שלום עולם",
    "صورة قطة تنام",
    "می\u200cخواهم",
    "क्\u200dष",
    "日本語の文 カタカナ",
    "한국어 문장",
    "👩\u200d👩\u200d👧 ❤\ufe0f\u200d🔥 👩🏽\u200d🚀",
    "e\u0301 Zoë ñ",
    "C:\\photos\\new",
]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_what_misleads_is_escaped(text: str) -> None:
    """Shown text is one line without controls, formats or lone surrogates, with escapes in their place."""
    seen = shown(text)
    assert seen != text and "\\" in seen and len(seen.splitlines()) == 1
    assert not {unicodedata.category(c) for c in seen} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert seen.encode() and shown(seen) == seen


@pytest.mark.parametrize("text", HARMLESS)
def test_letters_of_every_script_stay(text: str) -> None:
    """Right-to-left words, accents, joiners inside Persian and Hindi words, and emoji are shown as they are."""
    assert shown(text) == text == one_line(text)


@given(st.text())
def test_any_text_is_one_safe_line(text: str) -> None:
    """No text at all gets past, and plain ASCII is never changed."""
    seen = shown(text)
    assert len(f"a{seen}b".splitlines()) == 1 and "\x1b" not in seen and shown(seen) == seen
    assert len(f"a{one_line(text)}b".splitlines()) == 1
    if text.isascii() and text.isprintable():
        assert seen == text


# Places that print


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_every_way_to_standard_output_and_error(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Remarks, warnings, summaries and bars are as many lines as there are messages; reports keep the exact text."""
    talk = console.Console()
    talk.say(f"rendered under {text}")
    talk.warn(text)
    print_report({"summary": [f"{text}: 3 of 3 done"]}, False)
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and len(err.splitlines()) == 2 and talk.warnings == [text]
    assert "\x1b" not in out + err and "\u202e" not in out + err
    print_report({"summary": [], "sentence": text}, True)
    written = capsys.readouterr().out
    assert written.isascii() and json.loads(written)["sentence"] == text


def test_a_bar_shows_no_escapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A remark beside a progress bar cannot move the cursor."""
    from tests.test_console import watched

    terminal, bars = watched(monkeypatch), console.Console()
    bars.progress("train", 0, 8, "\x1b[2Jn\u202eame\nx")
    bars.close()
    assert "\x1b[2J" not in terminal.getvalue() and "n\\u202eame\\nx" in terminal.getvalue()


@pytest.mark.parametrize("kind", ["prediction_type", "interface"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_listings_of_an_edit_have_their_own_lines(text: str, kind: str) -> None:
    """No value of an edit file, of any version, adds a line to what `inspect` shows."""
    contents: dict[str, Any] = {
        "sentences": [text],
        "start_sentence": text,
        "base": {
            "source": text,
            "revision": text,
            "family": text,
            kind: {"text": {text: 1}, "denoisers": {text: text}} if kind == "interface" else text,
        },
        "base_weights": text,
        "source": {"width_px": 1, "height_px": 1, "sha256": text},
        "adapter": {"ranks": [2], "layers": 1, "alphas": [1.0]},
        "tensors": {f"text.{text}": {"shape": [1, 1]}},
        "etas": [0.0],
        "seed": 0,
        "format": 1,
        "file_bytes": 1,
        "settings": {"embed": {"steps": text}, "finetune": {"adapt": text}},
    }
    assert len(edit_header.summary(contents).splitlines()) == 10
    several = {**contents, "sentences": [text, f"{text}!"]}
    assert len(edit_header.summary(several).splitlines()) == 11


@pytest.mark.parametrize("words", [["--o\x1b[2Jdd"], ["ed\nit"], ["edit", "a", "b", "--see\u202ed", "1"]])
def test_usage_errors_repeat_words_safely(words: list[str]) -> None:
    """A word that is no option or command is escaped where it is repeated."""
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 2 and "\x1b" not in said.output and "\u202e" not in said.output
    assert [line for line in said.output.splitlines() if line.startswith("Error:")]


@pytest.mark.parametrize("text", [text for text in HOSTILE.values() if not {"\0", "\ud83d"} & set(text)])
def test_errors_about_files_are_one_line(text: str) -> None:
    """A name from the command line, such as a shell's pattern gives, is escaped in the error."""
    said = CliRunner().invoke(app, ["inspect", f"no-such-{text}"])
    assert said.exit_code == 1 and len(said.output.splitlines()) == 1 and "\x1b" not in said.output


# Pages and pictures


class Texts(HTMLParser):
    """The texts and attributes of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.found = list[str](), list[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value or "" for _, value in attrs]

    def handle_data(self, data: str) -> None:
        self.found.append(data)


@pytest.mark.parametrize("text", [*HOSTILE.values(), '"><script>alert(1)</script>', "' onload='x", "a & b < c"])
def test_a_batchs_page_takes_no_text_for_more(text: str) -> None:
    """Sentences, names and reasons on the page are neither markup nor able to turn what follows around."""
    picture = ("eta 1", "eta_1.00.png", (8, 8))
    items = [
        Shown(text, text, (picture,), "x.safetensors", (80, 40), (0, 0, 8, 8), (1.0, 1.0)),
        Shown(text, state="failed", remark=text),
    ]
    found = {"total": 2, "done": 1, "running": 0, "waiting": 0, "failed": 1}
    page, plain = Texts(), Texts()
    page.feed(page_of(text, items, found, True))
    plain.feed(page_of("x", [Shown("x", "x", *vars_of(items[0])), Shown("x", state="failed", remark="x")], found, True))
    assert page.tags == plain.tags
    shown_there = "".join(page.found).replace("\n", "")
    assert not {unicodedata.category(c) for c in shown_there} & {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


def vars_of(item: Shown) -> list[Any]:
    return [item.pictures, item.edit, item.sheet, item.photo, item.seconds]


def test_labels_of_a_sheet_have_no_lines_of_their_own() -> None:
    """A sentence with line ends makes a sheet no higher: it is escaped, and wrapped like any other."""
    picture = Image.new("RGB", (64, 64))
    plain = contact_sheet([("a b c", picture)], title="a b c", footer="f")
    forged = contact_sheet([("a\nb\nc", picture)], title="a\nb\nc", footer="f\nf")
    assert plain.size == forged.size


@pytest.mark.parametrize("end", ["\n", "\r\n", "\x85", "\u2028", "\v"])
def test_generation_parameters_keep_their_lines(end: str) -> None:
    """A sentence cannot forge the line of settings that other programs read; the report has the exact sentence."""
    settings = {
        "prompt": f"a cat{end}Steps: 99, Seed: 5",
        "negative_prompt": f"x{end}Steps: 1",
        "model": f"m{end}, Size: 1",
    }
    rest = dict.fromkeys(("interpolation", "start", "mask", "version"), 0)
    cell = Cell(0, 1.0, 0, guidance_scale=2.0)
    values = {
        **settings,
        **rest,
        "num_inference_steps": 4,
        "scheduler": "DDIM",
        "guidance_scale": 1,
        "photo_guidance": None,
        "guided": True,
    }
    lines = generation_parameters(cell, values).splitlines()
    assert len(lines) == 3 and lines[2].startswith("Steps: 4, ") and lines[1].startswith("Negative prompt: x\\")
    assert 'Model: "m' in lines[2]


# Streams


def command(*words: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the command line as its own process."""
    environment = {**os.environ, **options.pop("env", {})}
    environment.pop("LOWMEM_IMAGIC_DEBUG", None)
    return subprocess.run(
        [sys.executable, "-m", "lowmem_imagic", *words], env=environment, check=False, timeout=100, **options
    )


@pytest.fixture(scope="module")
def pipes() -> dict[str, int]:
    return {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.mark.parametrize("encoding", ["ascii", "cp932", "cp437", "cp1252", "utf-8"])
def test_streams_without_the_letters(encoding: str, pipes: dict[str, int]) -> None:
    """Characters that a stream cannot encode are escaped, without an error."""
    said = command("inspect", "кот-猫-é.safetensors", env={"PYTHONIOENCODING": encoding}, **pipes)
    assert said.returncode == 1 and said.stderr.decode(encoding).startswith("lowmem-imagic: ")
    assert len(said.stderr.splitlines()) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(
    "words", [["--help"], ["edit", "--help"], ["scene", "a red cube on a wooden floor", "made.png"]]
)
def test_standard_output_on_a_full_disk(words: list[str], tmp_path: Path) -> None:
    """A result that cannot be printed is exit code 1 and one line; files are there, and named."""
    with open("/dev/full", "wb") as full:
        said = command(*words, stdout=full, stderr=subprocess.PIPE, cwd=tmp_path)
    assert said.returncode == 1 and len(said.stderr.splitlines()) == 1 and b"cannot be written" in said.stderr
    assert (words[0] == "scene") == (tmp_path / "made.png").exists() == (b"made.png" in said.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_standard_error_on_a_full_disk(tmp_path: Path) -> None:
    """Remarks that cannot be shown change no exit code."""
    with open("/dev/full", "wb") as full:
        assert command("--no-such", stdout=subprocess.PIPE, stderr=full).returncode == 2
        assert command("inspect", "no-such", stdout=full, stderr=full).returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="streams are closed by a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed: str, tmp_path: Path) -> None:
    """With all streams closed, files are made, and none of them gets the number of a stream."""
    script = f'"$0" -m lowmem_imagic scene "a red cube on a wooden floor" made.png {closed}'
    done = subprocess.run(["sh", "-c", script, sys.executable], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.size == (128, 128)


@pytest.mark.skipif(os.name != "posix", reason="as pipes are on POSIX")
@pytest.mark.parametrize("words", [["doctor", "--help"], ["scene", "a red cube on a wooden floor", "made.png"]])
def test_a_reader_that_goes_away(words: list[str], tmp_path: Path) -> None:
    """A pipe without a reader causes no message, also at the end of the process."""
    read, write = os.pipe()
    os.close(read)
    try:
        said = command(*words, stdout=write, stderr=subprocess.PIPE, cwd=tmp_path)
    finally:
        os.close(write)
    assert said.stderr == b"" and said.returncode in (0, 1)


# Unexpected errors


def test_an_unexpected_error_is_one_line_with_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Callable[[], list[Path]]
) -> None:
    """It ends with exit code 1, its kind and first line, and its traceback in a file that is named."""
    from lowmem_imagic.actions import doctor

    def broken() -> Any:
        raise KeyError("\x1b[31mtwo\nlines")

    monkeypatch.setattr(doctor, "examine", broken)
    with pytest.raises(KeyError):  # developers see it as it is
        CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    monkeypatch.delenv("LOWMEM_IMAGIC_DEBUG")
    said = CliRunner().invoke(app, ["doctor"])
    assert said.exit_code == 1 and len(said.output.splitlines()) == 1 and "\x1b" not in said.output
    [log] = folder()
    assert "KeyError" in said.output and str(log) in said.output and "in broken" in log.read_text()


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[Path]]:
    """Logs in the temporary folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return lambda: list(tmp_path.glob("lowmem-imagic-*.log"))


def test_libraries_speak_on_one_line(pipes: dict[str, int], tmp_path: Path) -> None:
    """Warnings and logs of libraries are escaped like our own text."""
    script = (
        "import logging, warnings\nfrom lowmem_imagic.cli.streams import steady_streams\nsteady_streams()\n"
        "warnings.warn('\\x1b[2J\\u202ea\\nb')\nlogging.getLogger('any').warning('%s', '\\x1b[2J\\u202ea\\nb')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1], **pipes)  # type: ignore[call-overload]
    assert done.stderr.splitlines() == [b"UserWarning: \\x1b[2J\\u202ea\\nb", b"\\x1b[2J\\u202ea\\nb"]
