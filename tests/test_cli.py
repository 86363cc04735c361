"""The command line as a user meets it: exit codes, messages, files; run in-process except where a process matters."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic.actions.result_folder import ResultFolder
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import SMALL_KEEP
from lowmem_imagic.settings.stages import SampleConfig
from lowmem_imagic.settings.text import BaseOptions
from tests.processes import Process

SENTENCE = "a photo of a blue cube on the grass"
QUICK_TRAINING = ["--steps-embed", "2", "--steps-finetune", "2", "--draws", "2"]
QUICK = [*QUICK_TRAINING, "--steps-sample", "2", "--start", "photo", "--quiet"]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    """Default names land in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo(tmp_path) -> Path:
    """A small photo that is not square."""
    y, x = np.mgrid[0:30, 0:40]
    path = tmp_path / "my photo.png"
    Image.fromarray(np.stack([x * 6, y * 8, x + y], -1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def run(tiny_folder):
    """Runs the command line in-process; ``--model`` is the tiny model unless the words say otherwise."""

    def call(*words: object, model: bool = True):
        extra = ["--model", str(tiny_folder), "--device", "cpu"] if model else []
        return CliRunner().invoke(app, [*map(str, words), *extra])

    return call


@pytest.fixture(scope="session")
def finished(tiny_folder, tmp_path_factory) -> Path:
    """An edit file made by the command line."""
    folder = tmp_path_factory.mktemp("finished")
    photo = folder / "p.png"
    Image.new("RGB", (20, 16), (200, 40, 30)).save(photo)
    words = [
        "train",
        photo,
        SENTENCE,
        "--model",
        tiny_folder,
        "--out",
        folder / "e.safetensors",
        *QUICK_TRAINING,
        "--quiet",
    ]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return folder / "e.safetensors"


def _fails(result, code: int, *parts: str) -> None:
    """The command ended with `code` and one line on standard error that has all `parts`; no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("lowmem-imagic: ")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output
    for part in parts:
        assert part in lines[0]


def _picture(path: str) -> Image.Image:
    """A picture file, read and closed."""
    with Image.open(path) as picture:
        picture.load()
    return picture


def test_edit_writes_everything_it_promises(run, photo):
    """`edit` leaves the edit file, a PNG per eta at the photo's own size, a sheet and a report with peaks."""
    words = ["--out", "made", "--etas", "0,0.5,1", *QUICK, "--start", "inverted"]
    result = run("edit", photo, SENTENCE, *words)
    assert result.exit_code == 0, result.output
    names = {path.name for path in Path("made").iterdir()}
    assert {"eta_0.00.png", "eta_0.50.png", "eta_1.00.png", "sheet.png", "report.json"} < names
    [edit_path] = Path("made").glob("*.safetensors")
    edit = edit_file.read(edit_path)
    assert edit.target_prompt == SENTENCE and edit.etas == (0.0, 0.5, 1.0)
    assert _picture("made/eta_0.50.png").size == (40, 30)
    report = json.loads(Path("made/report.json").read_text())
    assert set(report["stages"]) == {
        *("encode", "load", "invert", "embed", "finetune"),
        *("encode sentence", "sample", "decode", "round trip"),
    }
    assert all(stage["seconds"] >= 0 for stage in report["stages"].values())
    assert edit_path.name in result.stdout
    # Random weights cannot reproduce a photo, so there is no hint that the edit is under-fitted.
    assert "this base" in report["fit"]["hint"] and report["fit"]["hint"] in report["warnings"]
    assert report["fit"]["reconstruction_db"] < 20 < 99


def test_a_weak_adapter_tells_nothing_of_the_fit(run, photo):
    """An adapter of less than its strength gives no whole photo back: that says not that the edit is under-fitted."""
    assert run("edit", photo, SENTENCE, "--out", "weak", "--etas", "0,1", *QUICK, "--strength", "0.3").exit_code == 0
    fit = json.loads(Path("weak/report.json").read_text(encoding="utf-8"))["fit"]
    assert fit["reconstruction_db"] is None and fit["change_db"] is None


def test_small_edits_are_small_and_render(run, photo):
    """`train --small` stores a fraction of the adapter, and the file renders like any other."""
    sizes = {}
    for name, words in {"whole": ("--keep", 1), "other": ("--rank", 2), "usual": (), "small": ("--small",)}.items():
        result = run("train", photo, SENTENCE, "--out", f"{name}.safetensors", *words, *QUICK_TRAINING, "--quiet")
        assert result.exit_code == 0, result.output
        sizes[name] = sum(
            f.down.nbytes + f.up.nbytes for f in edit_file.read(Path(f"{name}.safetensors")).adapters["unet"].values()
        )
    assert sizes["small"] <= SMALL_KEEP * sizes["whole"] < sizes["usual"] < sizes["whole"]
    # An adapter other than the preset's is stored whole by default.
    assert sizes["other"] == sizes["whole"] / 8
    result = run("sample", "small.safetensors", "--out", "made", "--etas", "0.8", "--steps-sample", 2, "--quiet")
    assert result.exit_code == 0, result.output


def test_png_says_how_it_was_made(run, photo):
    """A result carries its generation parameters and the mark of a picture edited with a trained model."""
    run("edit", photo, SENTENCE, "--out", "made", "--etas", "0.5", *QUICK)
    picture = _picture("made/eta_0.50.png")
    assert picture.text["parameters"].startswith(SENTENCE)
    assert "Imagic eta: 0.5" in picture.text["parameters"]
    assert "digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in picture.text["XML:com.adobe.xmp"]


def test_no_local_path_in_any_output(run, photo, tmp_path, tiny_folder):
    """No file that `edit` writes holds the photo's folder or the model's path."""
    run("edit", photo, SENTENCE, "--out", "made", "--etas", "0.5", *QUICK)
    for path in Path("made").iterdir():
        data = path.read_bytes()
        assert str(tmp_path).encode() not in data, path.name
        assert str(tiny_folder).encode() not in data, path.name


def test_same_seed_same_pictures(run, photo):
    """Two runs with one seed give the same bytes of every picture and of the adapter; another seed does not."""
    for out, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run("edit", photo, SENTENCE, "--out", out, "--etas", "0,1", "--seed", seed, *QUICK).exit_code == 0
    for name in ("eta_0.00.png", "eta_1.00.png", "sheet.png"):
        assert Path("a", name).read_bytes() == Path("b", name).read_bytes()
    assert Path("a/eta_0.00.png").read_bytes() != Path("c/eta_0.00.png").read_bytes()
    a, b = (edit_file.read(next(Path(out).glob("*.safetensors"))) for out in "ab")
    assert a.adapters["unet"] == b.adapters["unet"]


def test_sampling_a_file_gives_the_pictures_of_the_run_that_made_it(run, photo):
    """save -> load -> sample gives the same bytes, and needs neither the photo nor the training settings."""
    run("edit", photo, SENTENCE, "--out", "made", "--etas", "0,0.7", *QUICK)
    [edit_path] = Path("made").glob("*.safetensors")
    photo.unlink()
    result = run("sample", edit_path, "--out", "again", "--quiet")
    assert result.exit_code == 0, result.output
    for name in ("eta_0.00.png", "eta_0.70.png"):
        assert Path("made", name).read_bytes() == Path("again", name).read_bytes()


def test_sample_takes_other_etas_seeds_and_strengths(run, finished):
    """`sample` renders every eta with every seed; strength 0 is another picture than strength 1."""
    for out, strength in (("full", 1), ("none", 0)):
        words = ["--etas", "0.2,1.4", "--seeds", "1,2", "--steps-sample", 2, "--strength", strength, "--quiet"]
        assert run("sample", finished, "--out", out, *words).exit_code == 0
    names = sorted(path.name for path in Path("full").glob("eta_*.png"))
    assert names == [f"eta_{eta}_seed_{seed}.png" for eta in ("0.20", "1.40") for seed in (1, 2)]
    assert Path("full", names[0]).read_bytes() != Path("none", names[0]).read_bytes()


def test_sample_under_another_sentence(run, finished):
    """`sample --prompt` renders another picture, and pictures and report name the new sentence, not the trained one."""
    words = ["--etas", "1", "--steps-sample", 2, "--quiet"]
    assert run("sample", finished, "--out", "own", *words).exit_code == 0
    assert run("sample", finished, "--out", "new", "--prompt", "two birds", *words).exit_code == 0
    assert Path("own/eta_1.00.png").read_bytes() != Path("new/eta_1.00.png").read_bytes()
    assert _picture("new/eta_1.00.png").text["parameters"].startswith("two birds\n")
    report = json.loads(Path("new/report.json").read_text(encoding="utf-8"))
    assert report["sentence"] == "two birds"
    _fails(run("sample", finished, "--out", "empty", "--prompt", " "), 2, "empty")


@pytest.mark.parametrize("command", ["sample", "sheet"])
def test_settings_that_are_gone_are_named(run, finished, command):
    """Pictures of an edit that was made with settings which this version lacks come with one warning of them."""
    edit = edit_file.read(finished)
    settings = {**edit.settings, "sample": {**edit.settings["sample"], "hold": 0.5, "release": 0, "ddim_eta": 0.0}}
    edit_file.write(replace(edit, settings=settings), Path("old.safetensors"))
    words = {"sample": ["--etas", "1"], "sheet": ["--etas", "1", "--strengths", "1"]}[command]
    result = run(command, "old.safetensors", *words, "--steps-sample", 1, "--quiet")
    assert result.exit_code == 0, result.output
    [warning] = [line for line in result.stderr.splitlines() if "this version lacks" in line]
    assert "hold 0.5" in warning and "release" not in warning and "ddim" not in warning


def test_sample_takes_every_knob(run, finished):
    """Every knob of sampling changes the picture, and is named in it."""
    knobs = {
        "strength": ("--strength", "down=0,up=1.5"),
        "interpolation": ("--interpolation", "projection"),
        "start": ("--start", "noise"),
        "mask": ("--mask", "1"),
        "guidance": ("--guidance", "7"),
        "negative": ("--negative", "a red cube"),
        "source": ("--source", "a red cube"),
        "edit guidance": ("--source", "a red cube", "--edit-guidance", "5"),
    }
    for out, knob in {"plain": (), **knobs}.items():
        result = run("sample", finished, "--out", out, "--etas", "0.5", "--steps-sample", 2, "--quiet", *knob)
        assert result.exit_code == 0, result.output
    pixels = {out: _picture(f"{out}/eta_0.50.png").tobytes() for out in ("plain", *knobs)}
    assert len(set(pixels.values())) == len(pixels)
    said = {out: _picture(f"{out}/eta_0.50.png").text["parameters"] for out in knobs}
    assert "Imagic strength: down=0 mid=1 up=1.5" in said["strength"]
    assert "Imagic interpolation: projection" in said["interpolation"] and "Imagic start: noise" in said["start"]
    assert "Imagic mask: 1" in said["mask"]
    assert "CFG scale: 1.0," in said["source"] and "Imagic source: a red cube" in said["source"]
    assert "Imagic edit guidance: 5" in said["edit guidance"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--edit-guidance", "5"), "acts with a source prompt alone"),
        (("--source", "a red cube", "--guidance", "5"), "no effect with a source prompt"),
        (("--source", "a red cube", "--interpolation", "projection"), "no effect with a source prompt"),
        (("--source", "a red cube", "--negative", "grass"), "no effect with a source prompt"),
        (("--guidance", "1", "--negative", "grass"), "--negative has no effect without guidance"),
        (("--strength", "0", "--mask", "0.9"), "--mask has no effect with --strength 0"),
        (("--strength", "0", "--source", "a red cube"), "--source has no effect with --strength 0"),
    ],
)
def test_an_option_without_effect_is_refused(run, finished, words, expected):
    """Guidance and path beside a source prompt, its scale without one, a negative prompt without guidance, and the
    edit's own options at strength 0 are usage errors of `sample` and `edit`."""
    for command in (("sample", finished), ("edit", "scene.png", "a photo of a blue cube")):
        result = run(*command, "--out", "refused", *words)
        assert result.exit_code == 2 and expected in result.stderr, result.output
    assert not Path("refused").exists()


def test_a_recorded_source_prompt_is_followed_said_and_left_out_on_request(run, finished):
    """An edit's own source prompt renders it and is named by `sample` and `inspect`; an empty `--source` renders as
    without it, and so does strength 0, whose picture records none."""
    edit = edit_file.read(finished)
    sample = {**edit.settings["sample"], "source_prompt": "a red cube", "edit_guidance_scale": 3.0}
    edit_file.write(replace(edit, settings={**edit.settings, "sample": sample}), Path("told.safetensors"))
    words = ("--etas", "1", "--steps-sample", 2)
    for out, extra in {
        "given": (finished, "--source", "a red cube", "--edit-guidance", "3"),
        "recorded": ("told.safetensors",),
        "left out": ("told.safetensors", "--source", ""),
        "without": (finished,),
        "alone": ("told.safetensors", "--strength", "0"),
        "alone without": (finished, "--strength", "0"),
    }.items():
        result = run("sample", *extra, "--out", out, *words)
        assert result.exit_code == 0, result.output
        assert ("source prompt 'a red cube'" in result.stderr) == (out in ("given", "recorded", "alone")), result.stderr
    pictures = {out: _picture(f"{out}/eta_1.00.png") for out in ("given", "recorded", "left out", "without")}
    assert pictures["given"].tobytes() == pictures["recorded"].tobytes()
    assert pictures["left out"].tobytes() == pictures["without"].tobytes() != pictures["given"].tobytes()
    alone = _picture("alone/eta_1.00.png")
    assert alone.tobytes() == _picture("alone without/eta_1.00.png").tobytes()
    assert "source" not in alone.text["parameters"] and "CFG scale: 6.0" in alone.text["parameters"]
    assert "source:    a red cube" in run("inspect", "told.safetensors", model=False).stdout
    assert "a red cube" not in run("inspect", finished, model=False).stdout


def test_a_source_prompt_that_is_the_sentence_is_pointed_out(run, finished):
    """A source prompt equal to the sentence changes nothing, and a warning says so; a bad one is called by its name."""
    [sentence] = edit_file.read(finished).sentences
    result = run("sample", finished, "--out", "same", "--etas", "1", "--steps-sample", 1, "--source", sentence)
    assert result.exit_code == 0 and "nothing changes" in result.stderr, result.output
    _fails(run("sample", finished, "--out", "bad", "--source", "a\x07"), 2, "the source prompt has the unprintable")


def test_a_sheet_over_guidance_is_refused_with_a_source_prompt(run, finished):
    """Pictures with a source prompt do not depend on guidance, so no sheet shows it along an axis."""
    result = run("sheet", finished, "--rows", "guidance", "--columns", "eta", "--source", "a red cube")
    assert result.exit_code == 2 and result.stderr.count("no effect with a source prompt") == 1, result.output


def test_a_sheet_has_the_seed_of_the_edit(run, finished):
    """Without an axis of seeds a sheet shows the edit's own seed, whose noise its training knows."""
    edit = edit_file.read(finished)
    sample = {**edit.settings["sample"], "seeds": [5]}
    edit_file.write(replace(edit, settings={**edit.settings, "sample": sample}), Path("five.safetensors"))
    words = ("--rows", "strength", "--strengths", "1", "--columns", "eta", "--etas", "1", "--steps-sample", 2)
    assert run("sheet", "five.safetensors", *words, "--out", "five.png").exit_code == 0
    assert ", Seed: 5," in _picture("five.png").text["parameters"]


def test_sheet_shows_two_axes(run, finished, photo, monkeypatch):
    """`sheet` renders rows x columns with the photo, the sentence alone and the reconstruction in front, at once."""
    from lowmem_imagic.actions import sheet

    shown, batches = [], []
    drawn, rendered = sheet.contact_sheet, sheet.pictures_of
    monkeypatch.setattr(sheet, "contact_sheet", lambda cells, **how: shown.append((cells, how)) or drawn(cells, **how))
    monkeypatch.setattr(
        sheet, "pictures_of", lambda b, e, s, cells, *rest: batches.append(cells) or rendered(b, e, s, cells, *rest)
    )
    words = ["--rows", "strength", "--columns", "eta", "--strengths", "0.5,1", "--etas", "0.5,1", "--steps-sample", 2]
    result = run("sheet", finished, *words, "--photo", photo, "--out", "s.png", "--quiet")
    assert result.exit_code == 0, result.output
    [(cells, how)] = shown
    assert how["columns"] == 5
    assert [label for label, _ in cells] == [
        "photo",
        "no adapter",
        "reconstruction, strength 0.5",
        "strength 0.5, eta 0.5",
        "strength 0.5, eta 1",
        "photo",
        "no adapter",
        "reconstruction, strength 1",
        "strength 1, eta 0.5",
        "strength 1, eta 1",
    ]
    assert "strength" not in how["footer"] and "guidance" in how["footer"] and how["footer"].startswith("seed 0 | ")
    assert len(batches) == 1
    pictures = [picture.tobytes() for _, picture in cells]
    assert pictures[1] == pictures[6] and len(set(pictures)) == 8
    assert "is not the file this edit was made from" in result.stderr
    assert _picture("s.png").width > _picture("s.png").height
    _fails(run("sheet", finished, *words, "--out", "s.png"), 1, "s.png exists already")


def test_a_sheet_along_eta_shows_the_photo_once(run, finished, monkeypatch):
    """A row along eta that begins at 0 has no second picture of the same place in front of it."""
    from lowmem_imagic.actions import sheet

    shown, drawn = [], sheet.contact_sheet
    monkeypatch.setattr(sheet, "contact_sheet", lambda cells, **how: shown.append((cells, how)) or drawn(cells, **how))
    words = ["--rows", "seed", "--seeds", "0", "--columns", "eta", "--etas", "0,1", "--steps-sample", 2]
    assert run("sheet", finished, *words, "--out", "along.png").exit_code == 0
    [(cells, how)] = shown
    assert [label for label, _ in cells] == ["no adapter, seed 0", "seed 0, eta 0", "seed 0, eta 1"]
    assert how["columns"] == 3
    # Pictures to compare with have an eta of their own. A missing folder is created, as by other commands.
    words = ["--rows", "eta", "--etas", "0.4", "--columns", "seed", "--seeds", "0", "--steps-sample", 2]
    assert run("sheet", finished, *words, "--out", "new/folder/down.png").exit_code == 0
    assert [label for label, _ in shown[1][0]] == ["no adapter", "reconstruction", "eta 0.4, seed 0"]
    assert Path("new/folder/down.png").exists()


def test_a_sheet_over_other_axes_shows_the_edits_own_eta(run, finished):
    """A sheet on which eta is no axis has the eta that the edit names as its default."""
    edit = edit_file.read(finished)
    edit_file.write(replace(edit, eta_default=0.7), "other.safetensors")
    words = ["--rows", "strength", "--columns", "seed", "--strengths", 1, "--seeds", 3, "--steps-sample", 1]
    for name, etas, eta in (
        (finished, (), "1"),
        ("other.safetensors", (), "0.7"),
        (finished, ("--etas", "0.5"), "0.5"),
    ):
        result = run("sheet", name, *words, *etas, "--out", f"{eta}.png")
        assert result.exit_code == 0, result.output
        assert f"Imagic eta: {eta}," in _picture(f"{eta}.png").text["parameters"].replace(".0,", ",")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--rows", "eta"], ("--rows and --columns are both 'eta'",)),
        (["--rows", "rank"], ("--rows is 'rank'", "eta, strength, seed, guidance")),
        (["--guidances", "3,5"], ("guidance has 2 values", "neither --rows nor --columns")),
        (["--etas", "0,9", "--seeds", "-1", "--strengths", "5"], ("etas has 9", "seeds has -1", "strength is 5")),
        (["--etas", ","], ("eta is empty",)),
        (["--out", "sheet.jpg"], ("ending in .png",)),
    ],
)
def test_sheet_that_cannot_be(run, finished, words, parts):
    """A sheet over no two axes, or with values out of range, is refused before anything is loaded."""
    _fails(run("sheet", finished, *words), 2, *parts)


def test_json_is_the_only_thing_on_standard_output(run, photo):
    """With --json, standard output is one JSON object with seconds, stages and files."""
    result = run("edit", photo, SENTENCE, "--out", "made", "--etas", "1", "--json", *QUICK)
    report = json.loads(result.stdout)
    assert report["seconds"]["total"] > 0
    assert set(report["files"]) == {path.name for path in Path("made").iterdir()}


def test_inspect_shows_the_edit(run, finished):
    """`inspect` prints sentence, base and adapter; its JSON has the settings and the hashes of the base."""
    shown = run("inspect", finished, model=False)
    assert SENTENCE in shown.stdout and "rank " in shown.stdout
    contents = json.loads(run("inspect", finished, "--json", model=False).stdout)
    assert contents["settings"]["finetune"]["lora_rank"] == 16
    assert len(contents["base"]["files"]["unet"]) == 64


def test_inspect_imports_no_torch(finished):
    """`inspect` answers without torch, which alone would take longer than the answer."""
    script = (
        "import sys\nfrom lowmem_imagic.edits.header import describe\n"
        f"describe({str(finished)!r})\nassert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_wrong_ending_is_refused_without_torch(tmp_path):
    """The ending of `--out` is checked at once, not after the import of torch, which takes seconds."""
    words = [["train", "a.png", "--out", "a.png"], ["sheet", "a.safetensors", "--out", "a.jpg"]]
    words += [["pull", "someone/cat", "--out", "cat.ckpt"]]
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom lowmem_imagic.cli.commands import app\n"
        f"for words in {words!r}:\n"
        "    result = CliRunner().invoke(app, words)\n"
        "    assert result.exit_code == 2, result.output\n"
        "    assert f'{words[-1]} has the wrong ending, expected a name ending in .' in result.output\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_scene_renders_a_photo(run):
    """`scene` draws its sentence, equally for equal seeds, and marks the picture as drawn by an algorithm."""
    for out in ("a.png", "new/b.png"):
        result = run("scene", "a red cube on a wooden floor", out, model=False)
        assert result.exit_code == 0
    assert Path("a.png").read_bytes() == Path("new/b.png").read_bytes()
    assert "algorithmicMedia" in _picture("a.png").text["XML:com.adobe.xmp"]
    assert "red" in result.stdout


def test_doctor_names_versions_and_paths(run):
    """`doctor` names the versions, the device, the 8-bit and the attention path in use."""
    findings = json.loads(run("doctor", "--json", model=False).stdout)
    assert {"torch", "diffusers", "bitsandbytes"} <= set(findings["versions"])
    assert findings["attention"]["used by default"] in ("sdpa", "xformers")
    assert all("work on" in findings["8-bit"][layers] for layers in ("linear layers", "convolutions"))


@pytest.mark.process
def test_doctor_plans_for_cards(run, tiny_folder, monkeypatch):
    """`doctor --plan` shows a plan for each amount of memory, for one photo and for many, or why none fits."""
    from lowmem_imagic.actions import doctor

    # The same plans, told twice: worked out once.
    plans, known = doctor.plans, []
    monkeypatch.setattr(doctor, "plans", lambda *words, **more: known or known.extend(plans(*words, **more)) or known)
    words = ["doctor", "--plan", "--model", tiny_folder, "--vram", "500MB,8GB"]
    lines = run(*words, model=False).stdout.splitlines()
    assert [line.split(",")[0] for line in lines if "hold no training step" in line] == ["500MB", "500MB"]
    table = [line.split() for line in lines if line.split()[0] in ("memory", "8GB")]
    assert [row[:2] for row in table[1:]] == [["8GB", "1"], ["8GB", "many"]]
    found = json.loads(run(*words, "--json", model=False).stdout)
    assert [line["vram"] for line in found] == ["500MB", "500MB", "8GB", "8GB"]
    assert found[2]["plan"]["slots"] == 1 < found[3]["plan"]["slots"]


def test_doctor_refuses_what_is_no_plan(run, tiny_folder):
    """An amount that is none, a size no model takes, a model that is not there: one line and the right exit code."""
    _fails(run("doctor", "--plan", "--vram", "8 cards", model=False), 2, "--vram is '8 cards'")
    _fails(run("doctor", "--plan", "--vram", "", model=False), 2, "--vram names no amount of memory")
    _fails(run("doctor", "--plan", "--size", 100, model=False), 2, "--size is 100")
    _fails(run("doctor", "--plan", "--size", 6_400_000, model=False), 2, "a multiple of", "up to 8192")
    _fails(run("doctor", "--plan", "--model", "nowhere", model=False), 1, "no model 'nowhere'")


def test_doctor_refuses_options_of_a_plan_without_one(run):
    """Options that change only a plan are refused without --plan, as they would have no effect."""
    words = ["--vram", "3GB", "--preset", "fast", "--size", 64, "--base-weights", "nf4", "--json"]
    _fails(run("doctor", *words, model=False), 2, "--preset, --base-weights, --size, --vram without --plan")


@pytest.mark.process
def test_memory_is_planned_for(run, photo, tmp_path):
    """With --vram the report has the plan, its predicted phases and no rung; too little is refused before any work."""
    words = [
        "edit",
        photo,
        SENTENCE,
        "--out",
        tmp_path / "out",
        "--vram",
        "16GB",
        *QUICK,
        "--start",
        "inverted",
        "--json",
    ]
    report = json.loads(run(*words).stdout)
    assert set(report["plan"]["phases"]) == set(report["stages"]) - {"encode sentence", "round trip"}
    assert report["plan"]["rows"] == 2 and report["rungs"] == []
    refused = run("train", photo, SENTENCE, "--out", tmp_path / "x.safetensors", "--vram", "1MB", *QUICK_TRAINING)
    _fails(refused, 1, "0.00 GB hold no training step")
    assert not (tmp_path / "x.safetensors").exists()


def test_model_left_out_is_the_bundled_one_and_said_so(photo, monkeypatch):
    """Without --model one line says that the bundled model is used and how to name a real one."""
    from lowmem_imagic.actions import console
    from lowmem_imagic.actions import edit as commands
    from lowmem_imagic.actions import render as rendering

    said = []
    monkeypatch.setattr(console.Console, "say", lambda self, text: said.append(text))
    monkeypatch.setattr(rendering.BaseModel, "load", lambda name, **options: pytest.fail(f"loads {name}"))
    with pytest.raises(pytest.fail.Exception, match="loads demo"):
        options = BaseOptions(device="cpu")
        commands.open_base(options, console.Console(), [SENTENCE])
    assert len(said) == 1 and "bundled" in said[0] and "`model=sd15`" in said[0]


# Bad input: one clear line, the right exit code, nothing lost.


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("missing.png", None, ("missing.png",)),
        ("text.jpg", b"hello, this is no picture", ("text.jpg",)),
        ("empty.png", b"", ("empty.png",)),
    ],
)
def test_unusable_photo(run, name, content, parts):
    """A photo that is missing, empty or no picture is named, and no folder is left behind."""
    if content is not None:
        Path(name).write_bytes(content)
    _fails(run("edit", name, SENTENCE, "--out", "made", *QUICK), 1, *parts)
    assert not Path("made").exists()


@pytest.mark.parametrize("sentence", ["", "   "])
def test_empty_sentence(run, photo, sentence):
    """An empty sentence is a usage error."""
    _fails(run("edit", photo, sentence, *QUICK), 2, "sentence")


def test_overlong_sentence_says_what_is_cut(run, photo):
    """A sentence beyond the text encoder's tokens is edited, with a warning that names the words cut off."""
    result = run("edit", photo, " ".join(["red"] * 40) + " zebra", "--out", "made", "--etas", "1", *QUICK)
    assert result.exit_code == 0, result.output
    assert "cut from the sentence" in result.stderr and "zebra" in result.stderr


@pytest.mark.parametrize("sentence", ["a cube\x07", "red " * 1500])
def test_sentence_that_no_edit_file_can_hold(run, photo, sentence):
    """Control characters and thousands of characters are refused before training, not after it."""
    _fails(run("edit", photo, sentence, "--out", "made", *QUICK), 2, "sentence")
    assert not Path("made").exists()


def test_long_and_foreign_sentences_are_kept_whole(run, photo):
    """A sentence of several lines, accents and emoji longer than a title is stored as it is."""
    sentence = "a photo of a café\n" + "très très long \U0001f469\u200d\U0001f680 " * 12
    assert run("train", photo, sentence, "--out", "e.safetensors", *QUICK_TRAINING, "--quiet").exit_code == 0
    assert edit_file.read("e.safetensors").target_prompt == sentence


def test_divergence_ends_with_what_to_change(run, photo, monkeypatch):
    """A loss that is no longer finite ends the run with one line that says to lower the learning rate."""
    from lowmem_imagic.training import loop as training

    monkeypatch.setattr(
        training, "loss_per_edit", lambda prediction, target, n: prediction.sum().expand(n) * float("nan")
    )
    _fails(
        run("train", photo, SENTENCE, "--out", "e.safetensors", *QUICK_TRAINING, "--quiet"),
        1,
        "lower the learning rate",
    )
    assert not Path("e.safetensors").exists()


def test_layers_are_chosen_by_an_expression(run, photo):
    """--adapt takes a regular expression; the edit has adapters on these layers, records them, and renders as usual."""
    words = ("train", photo, SENTENCE, "--out", "e.safetensors", *QUICK_TRAINING, "--quiet")
    assert run(*words, "--adapt", r"mid_block\..*attn2\.to_[qk]").exit_code == 0
    edit = edit_file.read(Path("e.safetensors"))
    assert edit.settings["finetune"]["adapt"] == r"mid_block\..*attn2\.to_[qk]"
    assert all(re.fullmatch("lora_unet_mid_block_.*attn2_to_[qk]", layer) for layer in edit.adapters["unet"])
    assert run("sample", "e.safetensors", "--etas", "1", "--steps-sample", 2, "--quiet").exit_code == 0
    _fails(run(*words, "--force", "--adapt", "attnn"), 2, "--adapt is 'attnn', which covers no layer")
    _fails(run(*words, "--force", "--adapt", "to_q,to_vv"), 2, "but to_vv covers no layer", "to_v, to_out.0")


def test_all_settings_problems_at_once(run, photo):
    """Every setting out of range is named in one message, before anything is loaded."""
    words = ["--etas", "0,nan,9", "--rank", 0, "--steps-embed", -1, "--draws", 0, "--seed", -5, "--guidance", -1]
    _fails(
        run("edit", photo, SENTENCE, *words),
        2,
        "--etas has nan",
        "--etas has 9.0",
        "--rank is 0",
        "--steps-embed is -1",
        "--draws is 0",
        "--seed is -5",
        "--guidance is -1",
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--etas", "a,b"], "etas"),
        (["--preset", "best"], "preset"),
        (["--small", "--keep", "0.5"], "--keep and --small"),
        (["--adapt", "everything"], "adapt"),
        (["--scheduler", "Nothing"], "scheduler"),
        # Its noise would not follow the seed.
        (["--scheduler", "DPMSolverSDE"], "scheduler"),
        (["--device", "toaster"], "device"),
        (["--base-weights", "int2"], "--base-weights is"),
        (["--attention", "flash"], "attention"),
        (["--base-weights", "fp32", "--compute", "bf16"], "--compute is 'bf16' and --base-weights is 'fp32'"),
    ],
)
def test_unknown_words(photo, tiny_folder, words, part):
    """A word that is not one of the choices is a usage error that lists the choices."""
    words = ["edit", str(photo), SENTENCE, "--model", str(tiny_folder), *QUICK, *words]
    _fails(CliRunner().invoke(app, words), 2, part, "expected")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "weights.ckpt"], "pickle"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--attention", "xformers", "--device", "cpu"], "xformers"),
    ],
)
def test_unusable_model(photo, tiny_folder, words, part):
    """An unknown model, a pickle, a model that cannot be fetched, a missing backend: exit code 1."""
    Path("weights.ckpt").write_bytes(b"\x80\x04.")
    model = [] if "--model" in words else ["--model", str(tiny_folder)]
    _fails(CliRunner().invoke(app, ["edit", str(photo), SENTENCE, *QUICK, *model, *words]), 1, part)


def test_nothing_is_overwritten_unasked(run, photo):
    """A folder with files in it, or an edit file, is left alone without --force and replaced with it."""
    Path("made").mkdir()
    Path("made/mine.txt").write_text("precious")
    _fails(run("edit", photo, SENTENCE, "--out", "made", *QUICK), 1, "--force")
    assert [path.name for path in Path("made").iterdir()] == ["mine.txt"]
    assert run("edit", photo, SENTENCE, "--out", "made", "--etas", "1", "--force", *QUICK).exit_code == 0
    assert Path("made/mine.txt").read_text() == "precious"

    Path("e.safetensors").write_text("precious")
    _fails(run("train", photo, SENTENCE, "--out", "e.safetensors", *QUICK_TRAINING), 1, "--force")
    assert Path("e.safetensors").read_text() == "precious"


def test_output_that_cannot_be_written(run, photo, finished):
    """A file where a folder is needed, and a read-only place, are refused before any training."""
    Path("file").write_text("x")
    _fails(run("edit", photo, SENTENCE, "--out", "file", *QUICK), 1, "file")
    _fails(run("edit", photo, SENTENCE, "--out", "file/below", *QUICK), 1, "file")
    _fails(run("edit", photo, SENTENCE, "--out", "/proc/here", *QUICK), 1, "/proc")
    _fails(run("sample", finished, "--out", "/proc/here", "--quiet"), 1, "/proc")


def test_outputs_the_system_cannot_name(run, photo, finished):
    """A name too long for the file system, and a link to nowhere, are refused before any training."""
    _fails(run("edit", photo, SENTENCE, "--out", "x" * 300, *QUICK), 1, "cannot be written")
    _fails(run("train", photo, SENTENCE, "--out", "x" * 300 + ".safetensors", *QUICK_TRAINING), 1, "cannot be written")
    Path("link").symlink_to("nowhere")
    _fails(run("edit", photo, SENTENCE, "--out", "link", *QUICK), 1, "link is no folder")
    _fails(run("sample", finished, "--out", "link", "--quiet"), 1, "link is no folder")


def test_etas_that_are_close_have_names_of_their_own(run, finished):
    """Etas that agree to two decimals are written under names with more of them."""
    words = ["--etas", "0.601,0.604,1", "--steps-sample", 1, "--quiet"]
    assert run("sample", finished, "--out", "close", *words).exit_code == 0
    assert {path.name for path in Path("close").glob("eta*")} == {"eta_0.601.png", "eta_0.604.png", "eta_1.000.png"}


def test_force_leaves_no_pictures_of_an_earlier_run(run, finished):
    """With --force the pictures that the folder's report names are gone unless made again; nothing else is touched."""
    words = ["--steps-sample", 1, "--quiet", "--out", "made"]
    assert run("sample", finished, "--etas", "0.2,1", *words).exit_code == 0
    Path("made/eta_0.77.png").write_bytes(b"mine")
    report = json.loads(Path("made/report.json").read_text(encoding="utf-8"))
    report["pictures"] += ["../precious.png", "sheet.png", 5]
    Path("made/report.json").write_text(json.dumps(report), encoding="utf-8")
    Path("precious.png").write_bytes(b"mine")
    assert run("sample", finished, "--etas", "0.4,1", "--force", *words).exit_code == 0
    assert {path.name for path in Path("made").glob("eta*")} == {"eta_0.40.png", "eta_1.00.png", "eta_0.77.png"}
    assert Path("precious.png").exists() and Path("made/sheet.png").exists()


def test_pictures_are_made_one_after_another(tmp_path):
    """A folder asks for its next picture when the one before is on disk: a hundred megapixels are in memory once."""
    folder = ResultFolder.prepare(tmp_path / "made", overwrite=False)
    cells = [Cell(0, eta, 0) for eta in (0.0, 0.5, 1.0)]

    def pictures():
        for count in range(len(cells)):
            assert len(list((tmp_path / "made").glob("eta_*.png"))) == count
            yield Image.new("RGB", (8, 8))

    parameters = {**SampleConfig().__dict__, "prompt": "x", "model": "demo", "version": "1", "guided": True}
    assert len(folder.write_pictures(cells, pictures(), parameters)) == 3


def test_a_cover_is_written_on_request_and_goes_with_its_run(run, photo):
    """--cover writes the edited picture under the edit file's name, for galleries; without it none is left."""
    words = ["edit", photo, SENTENCE, "--out", "made", "--etas", "0,0.9,1.4", *QUICK]
    assert run(*words, "--cover").exit_code == 0
    [edit] = Path("made").glob("*.safetensors")
    cover = edit.with_suffix(".png")
    assert np.array_equal(_picture(str(cover)), _picture("made/eta_0.90.png"))
    assert json.loads(Path("made/report.json").read_text(encoding="utf-8"))["cover"] == cover.name
    assert run(*words, "--force").exit_code == 0
    assert not cover.exists() and edit.exists()
    # An edit may be called as the contact sheet is.
    sheet = shutil.copy(photo, "sheet.png")
    assert run("edit", sheet, "猫", "--out", "named", "--etas", "0,0.9", *QUICK, "--cover").exit_code == 0
    assert json.loads(Path("named/report.json").read_text(encoding="utf-8"))["cover"] == "cover-sheet.png"
    assert _picture("named/sheet.png").size != _picture("named/cover-sheet.png").size


def test_all_wrong_words_at_once(photo):
    """Words that are no numbers, values out of range and unknown choices are reported together, before any import."""
    words = ["--etas", "x", "--strength", "y", "--guidance", "nan", "--learning-rate", "9", "--device", "gpu"]
    result = CliRunner().invoke(app, ["edit", str(photo), SENTENCE, "--attention", "flash", *words])
    _fails(result, 2, "--etas", "--strength", "--guidance", "--learning-rate", "--device", "--attention")
    result = CliRunner().invoke(app, ["sample", "none.safetensors", "--seeds", "x", "--etas", "9", "--start", "here"])
    _fails(result, 2, "seeds", "etas", "start")


def test_steps_a_scheduler_cannot_take(run, photo, finished):
    """Settings that would fail in the middle of sampling are refused before training."""
    words = ["--scheduler", "DDIM", "--steps-sample", "1000"]
    _fails(run("edit", photo, SENTENCE, "--out", "made", *QUICK_TRAINING, *words), 2, "timestep 1000 of 1000")
    assert not Path("made").exists()
    _fails(run("sample", finished, "--scheduler", "PNDM", "--steps-sample", 2), 2, "PNDM cannot take")


@pytest.mark.parametrize("words", [["--negative", "\udcff"], ["--prompt", "a \udcff cube"]])
def test_words_that_are_no_text(run, finished, words):
    """Bytes of the command line that are no text are refused as such."""
    _fails(run("sample", finished, *words), 2, "unprintable character '\\udcff'")


def test_a_model_of_no_name_is_not_the_bundled_one(photo):
    """An empty --model, as from an unset variable, is an error, not the default."""
    _fails(CliRunner().invoke(app, ["edit", str(photo), SENTENCE, "--model", ""]), 1, "no model ''")


def test_scene_that_cannot_be(run):
    """A seed below 0 and a sentence that is not understood are usage errors, a name of another kind of picture is
    refused, and an existing file is left alone."""
    assert run("scene", "a red cube", "s.png", "--seed", "-1", model=False).exit_code == 2
    _fails(run("scene", "a crimson cube", "s.png", model=False), 2, "'crimson'")
    _fails(run("scene", "a red and blue cube", "s.png", model=False), 2, "'red' and 'blue'")
    assert not Path("s.png").exists()
    _fails(run("scene", "a red cube", "s.jpg", model=False), 2, "expected a name ending in .png")
    assert not Path("s.jpg").exists()
    Path("s.png").write_bytes(b"mine")
    _fails(run("scene", "a red cube", "s.png", model=False), 1, "--force")


def test_a_base_of_another_size(run, finished, tiny_folder, tmp_path):
    """A base of the same architecture made for larger pictures renders the edit at the photo's own size, though not
    from the noise that the photo has in the smaller one."""
    import shutil

    larger = Path(shutil.copytree(tiny_folder, tmp_path / "larger"))
    config = json.loads((larger / "unet/config.json").read_text(encoding="utf-8"))
    (larger / "unet/config.json").write_text(json.dumps({**config, "sample_size": 16}), encoding="utf-8")
    words = ["sample", str(finished), "--model", str(larger), "--device", "cpu", "--out", "made", "--etas", "1"]
    _fails(CliRunner().invoke(app, words), 1, "own noise has shape (4, 8, 8)", "--start photo")
    result = CliRunner().invoke(app, [*words, "--start", "photo", "--steps-sample", "1", "--quiet", "--force"])
    assert result.exit_code == 0, result.output
    assert _picture("made/eta_1.00.png").size == (20, 16)


def test_full_disk_keeps_the_finished_edit(run, photo, monkeypatch):
    """An edit that cannot be written after training is kept in the temporary folder, and the message says where."""
    from lowmem_imagic.errors import OutputUnwritableError
    from lowmem_imagic.storage import writable

    real = writable.write_bytes

    def full(path, data, *, overwrite):
        if str(path).endswith(".safetensors"):
            raise OutputUnwritableError(f"{path} cannot be written (No space left on device)")
        real(path, data, overwrite=overwrite)

    monkeypatch.setattr(writable, "write_bytes", full)
    result = run("edit", photo, SENTENCE, "--out", "made", *QUICK)
    _fails(result, 1, "No space left", "kept as")
    kept = Path(result.stderr.strip().split("kept as ")[1])
    assert edit_file.read(kept).target_prompt == SENTENCE
    kept.unlink()


def test_edit_for_another_base(run, finished, photo, tiny_folder, tmp_path):
    """The same architecture with other weights warns and renders; another architecture is refused by both names, and
    other weights under the same name are called another version."""
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    weights = load_file(other / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] += 1
    save_file(weights, other / "unet/diffusion_pytorch_model.safetensors")
    words = ["sample", str(finished), "--device", "cpu", "--etas", "1", "--steps-sample", "2", "--quiet"]
    warned = CliRunner().invoke(app, [*words, "--model", str(other), "--out", "warned"])
    assert warned.exit_code == 0 and "was made for tiny-sd, not other" in warned.stderr
    edit = edit_file.read(finished)
    edit_file.write(replace(edit, base=replace(edit.base, source="other")), Path("older.safetensors"))
    words[1] = "older.safetensors"
    again = CliRunner().invoke(app, [*words, "--model", str(other), "--out", "again"])
    assert again.exit_code == 0 and "was made for another version of other" in again.stderr

    scheduler = other / "scheduler/scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace('"epsilon"', '"v_prediction"'))
    refused = CliRunner().invoke(app, [*words, "--model", str(other), "--out", "refused"])
    _fails(refused, 1, "was made for", "v_prediction")
    assert not Path("refused").exists() or not list(Path("refused").iterdir())


def test_edit_file_does_not_name_a_download(finished):
    """A base named only by the file is not fetched: the user must say so."""
    _fails(CliRunner().invoke(app, ["sample", str(finished), "--quiet"]), 1, "--model")


@pytest.mark.parametrize("content", [b"", b"no edit at all, just text", None])
def test_unusable_edit_file(run, content):
    """A missing, empty or foreign file is named by `sample` and `inspect`."""
    if content is not None:
        Path("bad.safetensors").write_bytes(content)
    _fails(run("sample", "bad.safetensors", "--quiet"), 1, "bad.safetensors")
    _fails(run("inspect", "bad.safetensors", model=False), 1, "bad.safetensors")


def test_truncated_edit_file(run, finished):
    """An edit file cut short is refused by name."""
    Path("cut.safetensors").write_bytes(finished.read_bytes()[:-100])
    _fails(run("sample", "cut.safetensors", "--quiet"), 1, "cut.safetensors")


@pytest.mark.process
@pytest.mark.parametrize("stage", ["encode", "load", "embedding", "adapter", "pictures", "decode"])
def test_ctrl_c_in_each_stage(stage, photo, tiny_folder, tmp_path):
    """Ctrl-C while a stage runs ends with code 130, one line, and no half file; a finished edit file is kept."""
    script = tmp_path / "run.py"
    # A real process and a real signal; the stage announces itself through a file and then takes its time.
    script.write_text(
        "import contextlib, time, pathlib\n"
        "from lowmem_imagic.actions import console\n"
        "from lowmem_imagic.engine import memory\n"
        "def wait():\n"
        "    pathlib.Path('ready').touch(); time.sleep(30)\n"
        "real = console.Console.progress\n"
        "def slow(self, name, step, steps, remark):\n"
        f"    if {stage!r} in console.STAGES.get(name, ''): wait()\n"
        "    real(self, name, step, steps, remark)\n"
        "console.Console.progress = slow\n"
        "measured = memory.Meter.stage\n"
        "@contextlib.contextmanager\n"
        "def stage(self, name):\n"
        "    with measured(self, name):\n"
        f"        if name == {stage!r}: wait()\n"
        "        yield\n"
        "memory.Meter.stage = stage\n"
        "from lowmem_imagic.cli.commands import main\n"
        "main()\n"
    )
    words = ["edit", str(photo), SENTENCE, "--model", str(tiny_folder), "--device", "cpu", "--out", "made", *QUICK]
    process = Process(str(script), *words)
    while not Path("ready").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 130, stderr
    assert "stopped" in stderr and "Traceback" not in stderr
    left = {path.name for path in Path("made").glob("*")} if Path("made").exists() else set()
    if stage in ("pictures", "decode"):
        [name] = left
        assert edit_file.read(Path("made", name)).target_prompt == SENTENCE
        assert f"lowmem-imagic sample {Path('made', name)}" in stderr
    else:
        assert left == set()


@pytest.mark.process
@pytest.mark.parametrize("after_s", [0.1, 0.6, 1.5])
def test_ctrl_c_while_libraries_are_imported(after_s, photo):
    """Ctrl-C before any work ends the process without a traceback, during any import."""
    words = ["edit", str(photo), SENTENCE, "--out", "made", *QUICK]
    # From the package's first line on; before it the interpreter itself would speak.
    script = (
        "import sys, pathlib\n"
        f"sys.argv = ['lowmem-imagic', *{words!r}]\n"
        "from lowmem_imagic.__main__ import main\n"
        "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "pathlib.Path('started').touch()\n"
        "main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path("started").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode in (-signal.SIGINT, 130), stderr
    assert "Traceback" not in stderr and not list(Path().glob("made/*"))


def test_every_command_is_documented():
    """Every command and option has help, and every command's help shows an example."""
    from typer.main import get_command

    group = get_command(app)
    files = {"inspect", "export", "push", "pull"}
    assert set(group.commands) == {"edit", "train", "sample", "sheet", "scene", "ui", "doctor", "batch"} | files
    commands = {name: command for name, command in group.commands.items() if name != "batch"}
    commands |= {f"batch {name}": command for name, command in group.commands["batch"].commands.items()}
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    for name, command in commands.items():
        assert command.help and "Example" in (command.epilog or ""), name
        assert f"`{name}" in readme or f"lowmem-imagic {name}" in readme, name
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"
