"""Train once, ask many: edits with several sentences or none, and the words that a small base knows."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic import Cell, Edit, Job, Photo, apply_edits, make_edits, read_edit, write_edit
from lowmem_imagic.cli.commands import app
from lowmem_imagic.demo import vocabulary as written
from lowmem_imagic.demo.scene import Scene, SceneObject
from lowmem_imagic.edits.header import describe, summary
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import IncompleteModelError, PromptError
from lowmem_imagic.families.vocabulary import Vocabulary
from lowmem_imagic.pipeline.make import stream_edits
from lowmem_imagic.sampling.description import NEUTRAL, best_words
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.training import state as training_state
from lowmem_imagic.training.pack import Pack

RED, BLUE = "a red cube", "a blue sphere on a wooden floor"
QUICK_TRAINING = ["--steps-embed", "2", "--steps-finetune", "2", "--draws", "2"]
CONFIG = EditConfig(
    embed=EmbedConfig(steps=2, draws=2, learning_rate=1e-2),
    finetune=FinetuneConfig(steps=2, draws=2, learning_rate=1e-2, lora_rank=2, lora_alpha=2.0),
    sample=SampleConfig(etas=(0.0, 1.0), num_inference_steps=2, start="inverted", mask=0.5),
)


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small photo."""
    path = tmp_path_factory.mktemp("photos") / "my photo.png"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="module")
def base(tiny_folder: Path) -> BaseModel:
    """The tiny model, which has no vocabulary."""
    return BaseModel.load(str(tiny_folder), device="cpu")


@pytest.fixture(scope="module")
def source() -> Photo:
    """A photo as a value."""
    image = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    return Photo(image=image, sha256="a" * 64, name="photo", notes=(), icc_profile=None)


@pytest.fixture(scope="module")
def unasked(base: BaseModel, source: Photo) -> Edit:
    """An edit without a sentence."""
    [edit] = make_edits(base, [Job(source)], CONFIG)
    return edit


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command on the tiny model, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Any:
        return CliRunner().invoke(app, [*map(str, words), "--model", str(tiny_folder), "--device", "cpu", "--quiet"])

    return call


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """The bundled model's."""
    known = BaseModel.load("demo", device="cpu").family.vocabulary
    assert known is not None
    return known


# The command line


def test_a_photo_is_trained_once_for_several_sentences(run: Any, photo: Path) -> None:
    """`edit` with several sentences: one edit file, one picture of the photo, pictures for each sentence, a report."""
    words = ["--etas", "0,0.5,1", "--steps-sample", 2, *QUICK_TRAINING]
    result = run("edit", photo, RED, BLUE, *words)
    assert result.exit_code == 0, result.output
    folder = Path("my-photo-2-sentences")
    pictures = {
        RED: ["eta_0.00.png", "1-a-red-cube_eta_0.50.png", "1-a-red-cube_eta_1.00.png"],
        BLUE: ["eta_0.00.png", *(f"2-a-blue-sphere-on-a-wooden-floor_eta_{eta}.png" for eta in ("0.50", "1.00"))],
    }
    assert {path.name for path in folder.iterdir()} == {
        *pictures[RED],
        *pictures[BLUE],
        *("my-photo-2-sentences.safetensors", "sheet.png", "report.json"),
    }
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert [(one["sentence"], one["pictures"]) for one in report["sentences"]] == list(pictures.items())
    assert report["pictures"] == list(dict.fromkeys(pictures[RED] + pictures[BLUE])) and report["sentence"] is None
    for name in report["pictures"][1:]:
        with Image.open(folder / name) as picture:
            assert picture.text["parameters"].startswith((RED, BLUE)[int(name[0]) - 1] + "\n")  # type: ignore[attr-defined]
    edit = read_edit(folder / "my-photo-2-sentences.safetensors")
    assert (edit.sentences, edit.start_sentence, edit.version) == ((RED, BLUE), NEUTRAL, 3)

    again = run("edit", photo, BLUE, "--out", folder, "--force", "--etas", "1", "--steps-sample", 2, *QUICK_TRAINING)
    assert again.exit_code == 0, again.output
    assert sorted(path.name for path in folder.glob("*.png")) == ["eta_1.00.png", "sheet.png"]


def test_each_sentence_has_a_labelled_row(run: Any, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sheet has the photo's row, then a row for each sentence under its words, every seed and eta in it."""
    from lowmem_imagic.actions import result_folder

    sheets, drawn = [], result_folder.contact_sheet

    def watched(cells: Any, **how: Any) -> Image.Image:
        sheets.append((cells, how))
        return drawn(cells, **how)

    monkeypatch.setattr(result_folder, "contact_sheet", watched)
    words = ["--etas", "0,1", "--seeds", "0,1", "--steps-sample", 2, *QUICK_TRAINING]
    result = run("edit", photo, RED, BLUE, "--out", "made", *words)
    assert result.exit_code == 0, result.output
    [(cells, how)] = sheets
    assert how["row_titles"] == ["", RED, BLUE] and how["columns"] == 4
    labels = [re.sub(r" \(.*\)", "", label) for label, _ in cells]
    assert labels[:4] == ["photo", "autoencoder only", "eta 0, seed 0", "eta 0, seed 1"]
    assert labels[4:] == 2 * ["no adapter", "eta 1, seed 0", "eta 1, seed 1", ""]
    plain = drawn(cells, columns=4)
    with Image.open("made/sheet.png") as sheet:
        assert sheet.height > plain.height
    report = json.loads(Path("made/report.json").read_text(encoding="utf-8"))
    assert [one["sentence"] for one in report["sentences"]] == [RED, BLUE]


def test_an_edit_is_trained_without_a_sentence_and_asked_later(run: Any, photo: Path) -> None:
    """`train` needs no sentence; `sample` asks any number, shows the photo alone, and says what is missing."""
    result = run("train", photo, *QUICK_TRAINING)
    assert result.exit_code == 0, result.output
    name = "my-photo.safetensors"
    edit = read_edit(name)
    assert (edit.sentences, edit.start_sentence, edit.target_prompt) == ((), NEUTRAL, None)
    few = ["--steps-sample", 2]
    missing = run("sample", name, *few)
    assert missing.exit_code == 2 and "--prompt" in missing.stderr and "--etas 0" in missing.stderr
    assert run("sheet", name, *few).exit_code == 2
    assert not Path("my-photo-samples").exists()

    result = run("sample", name, "--etas", "0", "--out", "alone", *few)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path("alone").iterdir()) == ["eta_0.00.png", "report.json", "sheet.png"]
    report = json.loads(Path("alone/report.json").read_text(encoding="utf-8"))
    assert (report["sentence"], report["sentences"], report["start_sentence"]) == (None, [], NEUTRAL)

    result = run("sample", name, "--prompt", RED, "--prompt", BLUE, "--etas", "0,1", "--out", "asked", *few)
    assert result.exit_code == 0, result.output
    assert run("sample", name, "--prompt", BLUE, "--etas", "0,1", "--out", "one", *few).exit_code == 0
    pixels = {}
    for place in ("asked/2-a-blue-sphere-on-a-wooden-floor_eta_1.00.png", "one/eta_1.00.png", "one/eta_0.00.png"):
        with Image.open(place) as picture:
            pixels[place] = picture.tobytes()
    many, one, alone = pixels.values()
    assert many == one != alone
    assert run("sheet", name, "--prompt", RED, "--rows", "seed", "--seeds", "0", *few).exit_code == 0
    shown = CliRunner().invoke(app, ["inspect", name])
    assert shown.exit_code == 0 and "none, to be asked later" in shown.stdout and NEUTRAL in shown.stdout


def test_a_sentence_twice_is_refused(run: Any, photo: Path) -> None:
    """Equal sentences would give two equal rows: the command says so before any training."""
    result = run("edit", photo, RED, RED, "--out", "made", *QUICK_TRAINING)
    assert result.exit_code == 2 and "there twice" in result.stderr and not Path("made").exists()


def test_sentences_multiply_the_pictures_of_one_run(run: Any, photo: Path) -> None:
    """Sentences, etas and seeds together make at most as many pictures as one edit may ask for."""
    seeds = ",".join(map(str, range(200)))
    result = run("edit", photo, RED, BLUE, "--etas", "0,0.5,1", "--seeds", seeds, *QUICK_TRAINING)
    assert result.exit_code == 2 and "1200 pictures" in result.stderr


def test_a_sheet_of_several_sentences_asks_for_one(run: Any, unasked: Edit) -> None:
    """`sheet` varies settings of one sentence: of several the user chooses one."""
    write_edit(replace(unasked, sentences=(RED, BLUE)), "many.safetensors")
    result = run("sheet", "many.safetensors", "--steps-sample", 2)
    assert result.exit_code == 2 and RED in result.stderr and "--prompt" in result.stderr


# Python


def test_cells_name_their_sentences(base: BaseModel, unasked: Edit) -> None:
    """A cell's own sentence comes before `prompts`, and these before the edit's; at eta 0 no sentence is needed."""
    sample = CONFIG.sample
    with pytest.raises(PromptError, match="without a sentence"):
        apply_edits(base, [unasked], [Cell(0, 1.0, 0)], sample)
    photo, first, own, other = apply_edits(
        base,
        [unasked],
        [Cell(0, 0.0, 0), Cell(0, 1.0, 0), Cell(0, 1.0, 0, sentence=BLUE), Cell(0, 1.0, 0, sentence=RED)],
        sample,
        prompts=[RED],
    )
    assert first.tobytes() == other.tobytes() != own.tobytes() != photo.tobytes()
    [alone] = apply_edits(base, [unasked], [Cell(0, 0.0, 0)], sample)
    assert alone.tobytes() == photo.tobytes()
    [blue] = apply_edits(base, [replace(unasked, sentences=(BLUE,))], [Cell(0, 1.0, 0)], sample)
    assert blue.tobytes() == own.tobytes()


def test_sentences_asked_later_change_no_training(base: BaseModel, source: Photo, unasked: Edit) -> None:
    """An edit for several sentences is the one for none; an edit for one sentence starts from that sentence."""
    [several, one] = make_edits(base, [Job(source, [RED, BLUE]), Job(source, RED)], CONFIG, slots=1)
    assert several.adapters == unasked.adapters and several.sentences == (RED, BLUE)
    assert torch.equal(several.conditioning["embeds"], unasked.conditioning["embeds"])
    assert (one.sentences, one.start_sentence, one.version) == ((RED,), RED, 1)
    assert not torch.equal(one.conditioning["embeds"], unasked.conditioning["embeds"])
    with pytest.raises(PromptError, match="there twice"):
        make_edits(base, [Job(source, [RED, RED])], CONFIG)


# The edit file


def test_files_say_what_is_new_by_their_version(unasked: Edit, tmp_path: Path) -> None:
    """Version 3 holds sentences and start; an edit whose only sentence is its start stays in version 1."""
    for sentences in ((), (BLUE,), (RED, BLUE)):
        path = tmp_path / f"{len(sentences)}.safetensors"
        edit = replace(unasked, sentences=sentences)
        write_edit(edit, path)
        assert read_edit(path) == edit and edit.version == 3
        shown = describe(path)
        assert (shown["sentences"], shown["start_sentence"]) == (list(sentences), NEUTRAL)
        assert shown["sentence"] == (sentences[0] if len(sentences) == 1 else None)
        assert all(sentence in summary(shown) for sentence in (*sentences, NEUTRAL))
    assert replace(unasked, sentences=(NEUTRAL,)).version == 1


# Words


def test_the_bundled_vocabulary_is_the_renderers(vocabulary: Vocabulary) -> None:
    """The bundled model's file has the words and the sentences of the scenes that it was trained on."""
    assert (vocabulary.groups, vocabulary.pieces) == (written.GROUPS, written.PIECES)
    solid = SceneObject(shape="cone", color="orange", material="metal", size="small", pose="lying")
    scene = Scene(objects=(solid,), floor="tiled")
    chosen = {"shape": "cone", "colour": "orange", "material": "metal", "size": "small", "pose": "lying"}
    assert vocabulary.sentence({**chosen, "floor": "tiled"}) == scene.caption()
    assert vocabulary.sentence({"shape": "cone", "colour": "orange"}) == "a photo of an orange cone"
    assert vocabulary.unknown(scene.caption()) == []


@pytest.mark.parametrize(
    ("sentence", "unknown"),
    [
        ("a photo of a sitting dog on a grass floor", ["sitting", "dog"]),
        ("A red cube with Stripes!", ["stripes"]),
        ("two cubes, a dog's ball & the dog", ["two", "cubes", "dog's", "ball", "dog"]),
        ("ein roter Würfel", ["ein", "roter", "würfel"]),
        ("a small lying metal cone and an orange sphere on the tiled floor", []),
    ],
)
def test_unknown_words_are_named(vocabulary: Vocabulary, sentence: str, unknown: list[str]) -> None:
    """Words beyond the vocabulary are named once each; articles and the like are not."""
    assert vocabulary.unknown(sentence) == unknown


def test_the_command_says_which_words_the_bundled_model_lacks(photo: Path, tmp_path: Path) -> None:
    """`edit` warns in one line of words that the bundled model does not know, with those that it does, and goes on."""
    words = ["train", photo, "a sitting dog", "--out", tmp_path / "e.safetensors", "--device", "cpu", "--quiet"]
    few = ["--steps-embed", 0, "--steps-finetune", 0, "--json"]
    result = CliRunner().invoke(app, [*map(str, words), *map(str, few)])
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stderr.splitlines() if "does not know" in line]
    assert line.startswith("warning: demo does not know 'sitting', 'dog'") and "floor: wooden, stone" in line
    assert len(json.loads(result.stdout)["warnings"]) == 1


def test_words_of_a_source_prompt_are_not_drawn_anyway(photo: Path, tmp_path: Path) -> None:
    """A source prompt's unknown words are named as such: what it says is not to be drawn."""
    words = ["edit", photo, "a red cube", "--source", "a dog", "--out", tmp_path / "made", "--device", "cpu", "--quiet"]
    few = ["--steps-embed", 0, "--steps-finetune", 0, "--steps-sample", 2, "--etas", "0"]
    result = CliRunner().invoke(app, [*map(str, words), *map(str, few)])
    assert result.exit_code == 0, result.output
    [line] = [line for line in result.stderr.splitlines() if "does not know" in line]
    assert line == "warning: demo does not know 'dog' of the source prompt: they have no effect there"


@pytest.mark.parametrize("command", ["edit", "train"])
def test_an_empty_sentence_is_refused_before_a_model_is_loaded(run: Any, photo: Path, command: str) -> None:
    """An empty sentence is one error, without a remark about a source prompt that nobody gave."""
    result = run(command, photo, "", "--model", "no such model")
    assert result.exit_code == 2 and "warning" not in result.stderr, result.output
    assert "sentence is empty" in result.stderr and "no such model" not in result.stderr


def test_each_seed_has_a_row(run: Any, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several seeds the sheet of one sentence has a row for each seed below what there is to compare with."""
    from lowmem_imagic.actions import result_folder

    sheets, drawn = [], result_folder.contact_sheet
    monkeypatch.setattr(
        result_folder, "contact_sheet", lambda cells, **how: sheets.append((cells, how)) or drawn(cells, **how)
    )
    words = ["--etas", "0,0.5,0.7,1", "--seeds", "0,1", "--steps-sample", 2, *QUICK_TRAINING]
    assert run("edit", photo, RED, "--out", "made", *words).exit_code == 0
    assert run("train", photo, "--out", "e.safetensors", *QUICK_TRAINING).exit_code == 0
    assert run("sample", "e.safetensors", "--etas", "0", "--seeds", "0,1", "--steps-sample", 2).exit_code == 0
    (cells, how), (_, unasked) = sheets
    assert how["row_titles"] == [RED, "seed 0", "seed 1"] and how["columns"] == 4
    labels = [label.removesuffix(" (no training)").replace(" (reconstruction)", "") for label, _ in cells]
    assert labels[:4] == ["photo", "autoencoder only", "no adapter", ""]
    assert labels[4:] == [f"eta {eta:g}, seed {seed}" for seed in (0, 1) for eta in (0, 0.5, 0.7, 1)]
    without = "the photo, without a sentence"
    assert unasked["row_titles"] == [f"{without}, seed 0", f"{without}, seed 1"]


def test_other_models_say_nothing_of_words(run: Any, photo: Path) -> None:
    """A model without a vocabulary file knows whole languages, as far as anyone can tell."""
    result = run("train", photo, "a sitting dog", *QUICK_TRAINING)
    assert result.exit_code == 0 and "does not know" not in result.stderr


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '{"groups": {"shape": ["cube"]}}',
        '{"groups": {"shape": ["cube"]}, "pieces": ["a photo"]}',
        '{"groups": {"shape": ["cube"]}, "pieces": ["a {shape}", "{colour}"]}',
        '{"groups": {"shape": []}, "pieces": ["a {shape}"]}',
        '{"groups": {"shape": ["\\u001b[2J"]}, "pieces": ["a {shape}"]}',
        '{"groups": {"shape": "cube"}, "pieces": ["a {shape}"]}',
        '{"groups": {"shape": [1]}, "pieces": ["a {shape}"]}',
    ],
)
def test_an_unusable_vocabulary_is_named(folder_copy: Path, content: str) -> None:
    """A model's file of words is read strictly: the error names it."""
    (folder_copy / "vocabulary.json").write_text(content, encoding="utf-8")
    with pytest.raises(IncompleteModelError, match="vocabulary"):
        _ = BaseModel.load(str(folder_copy), device="cpu").family.vocabulary


def test_the_words_of_least_loss_describe_a_photo(vocabulary: Vocabulary) -> None:
    """Of each kind the word with the least loss is said: the first kinds together, the others beside them."""
    caption = "a photo of a small lying red metal cone on a grass floor"
    true, asked = set(caption.split()), list[int]()

    def losses(sentences: Any) -> list[float]:
        asked.append(len(sentences))
        return [-float(len(true & set(sentence.split()))) for sentence in sentences]

    assert set(best_words(vocabulary, losses).split()) == true
    assert asked == [32, 10]
    only = Vocabulary({"shape": ("cube", "cone")}, ("a {shape}",))
    assert best_words(only, losses) == "a cone"


@pytest.fixture
def wordy(folder_copy: Path) -> BaseModel:
    """The tiny model with a vocabulary."""
    groups = {"shape": ["cube", "sphere", "cone"], "colour": ["red", "blue", "green"]}
    words = {"groups": groups, "pieces": ["a {colour}", "{shape}"]}
    (folder_copy / "vocabulary.json").write_text(json.dumps(words))
    return BaseModel.load(str(folder_copy), device="cpu")


def test_a_base_with_words_describes_the_photo_to_itself(wordy: BaseModel, source: Photo) -> None:
    """With a vocabulary, an edit without a sentence is the one for the base's own description of the photo.

    Its search tells its progress.
    """
    steps = list[tuple[int, int]]()

    def progress(stage: str, step: int, of: int, remark: str) -> None:
        if stage == "describe":
            steps.append((step, of))

    [edit] = make_edits(wordy, [Job(source)], CONFIG, progress=progress)
    assert steps == [(4, 9), (8, 9), (9, 9)]
    assert re.fullmatch("a (red|blue|green) (cube|sphere|cone)", edit.start_sentence)
    [told] = make_edits(wordy, [Job(source, edit.start_sentence)], CONFIG)
    assert told.adapters == edit.adapters
    assert torch.equal(told.conditioning["embeds"], edit.conditioning["embeds"])


def test_a_stopped_training_keeps_its_description(wordy: BaseModel, source: Photo) -> None:
    """A training that goes on from its state does not describe the photo again, and comes to the same edit."""
    states, stages = list[bytes](), list[str]()

    def stop(pack: Pack) -> None:
        states.extend(training_state.encode(state, "key") for _, state in pack.states())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(stream_edits(wordy, [Job(source)], CONFIG, between=stop))
    [whole] = make_edits(wordy, [Job(source)], CONFIG)
    saved = training_state.decode(states[0], "key")
    [edit] = make_edits(wordy, [Job(source, state=saved)], CONFIG, progress=lambda stage, *_: stages.append(stage))
    assert "describe" not in stages and "embed" in stages
    assert edit.start_sentence == whole.start_sentence and edit.adapters == whole.adapters
    assert torch.equal(edit.conditioning["embeds"], whole.conditioning["embeds"])
