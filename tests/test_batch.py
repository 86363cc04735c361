"""Facts about batches: every item of a manifest is made or named as failed, and no item is made twice."""

import csv
import hashlib
import json
import signal
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic.actions import edit as commands
from lowmem_imagic.actions.result_folder import ResultFolder
from lowmem_imagic.batch.executors import local as worker
from lowmem_imagic.batch.manifest import read_manifest
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.errors import ConfigError, MemoryLimitError
from lowmem_imagic.pipeline import prepare as preparation
from lowmem_imagic.training import embed
from tests import calls

QUICK = [
    "--steps-embed",
    "1",
    "--steps-finetune",
    "2",
    "--draws",
    "2",
    "--steps-sample",
    "2",
    "--etas",
    "0,1",
    # Thirty passes less for every photo than from its own noise.
    "--start",
    "photo",
    "--quiet",
]
SENTENCE = "a photo of a blue sphere"


def photo(path: Path, seed: int) -> Path:
    """A small photo, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 20, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def some_photos(folder: Path) -> Path:
    """A folder of three photos, another file, and a file that only looks like a photo by its name."""
    folder.mkdir()
    for seed in range(3):
        photo(folder / f"p{seed}.png", seed)
    (folder / "notes.txt").write_text("not a photo")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """See `some_photos`."""
    return some_photos(tmp_path / "photos")


@pytest.fixture(scope="session")
def batch(tiny_folder: Path) -> Callable[..., Any]:
    """Runs ``batch run`` with the tiny model and few steps."""

    def call(*words: object) -> Any:
        fixed = ["--model", tiny_folder, "--device", "cpu", *QUICK]
        return CliRunner().invoke(app, ["batch", "run", *map(str, fixed), *map(str, words)])

    return call


# Manifests


@pytest.mark.parametrize("kind", ["jsonl", "csv", "json"])
def test_manifests_say_the_same_in_every_form(tmp_path: Path, kind: str) -> None:
    """Lines of JSON, a CSV file and TEdBench's list give the same items, photos beside the manifest."""
    rows = [{"img_name": "a.png", "target_text": "a cat"}, {"img_name": "sub/b.jpg", "target_text": 'a "dog", sitting'}]
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if kind == "jsonl" else json.dumps(rows))
    items, bad = read_manifest(path)
    assert not bad
    assert [(item.name, item.photo, item.sentence) for item in items] == [
        ("a-a-cat", tmp_path / "a.png", "a cat"),
        ("b-a-dog-sitting", tmp_path / "sub" / "b.jpg", 'a "dog", sitting'),
    ]


def test_photos_of_tedbench_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    """A photo that is not beside the manifest is looked for in ``originals``."""
    (tmp_path / "originals").mkdir()
    photo(tmp_path / "originals" / "cat.png", 0)
    (tmp_path / "input_list.json").write_text('[{"img_name": "cat.png", "target_text": "a cat"}]')
    [item] = read_manifest(tmp_path / "input_list.json")[0]
    assert item.photo == tmp_path / "originals" / "cat.png"


def test_a_folder_is_its_photos(photos: Path) -> None:
    """A folder gives its photos in order of their names, each with the sentence; other files are no items."""
    items, bad = read_manifest(photos, SENTENCE)
    assert [item.photo.name for item in items] == ["broken.png", "p0.png", "p1.png", "p2.png"] and not bad
    with pytest.raises(ConfigError, match="describe the edited pictures with `prompt`"):
        read_manifest(photos)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "found list, expected an object"),
        ('{"photo": "a.png"}', "has no sentence"),
        ('{"sentence": "x"}', "has no photo"),
        ('{"photo": 3, "sentence": "x"}', "photo is '3', expected str"),
        ('{"photo": "a.png", "sentence": "x", "seed": true}', "seed is 'True', expected int"),
        ('{"photo": "a.png", "sentence": "x", "colour": "red"}', "'colour' is no field of an item"),
    ],
)
def test_bad_lines_are_named_and_the_rest_is_read(tmp_path: Path, line: str, reason: str) -> None:
    """A line that is no item is reported with its number and why; those around it are items."""
    good = '{"photo": "a.png", "sentence": "%s"}'
    path = tmp_path / "list.jsonl"
    path.write_text(f"{good % 'one'}\n\n{line}\n{good % 'two'}\n")
    items, [bad] = read_manifest(path)
    assert [item.sentence for item in items] == ["one", "two"]
    assert bad.where == "line 3" and reason in bad.reason


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("list.jsonl", b"", "has no items"),
        ("list.json", b"{}", "not a JSON list"),
        ("list.jsonl", b"\xff\xfe\x00", "not UTF-8"),
        ("list.txt", b"a", "expected .jsonl, .csv, .json"),
    ],
)
def test_what_is_no_manifest(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    """A file that is no manifest is one clear error."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=reason):
        read_manifest(tmp_path / name)


def test_lines_end_where_files_say_so(tmp_path: Path) -> None:
    """Separators that JSON allows within text end no line, and a short CSV row only lacks its last fields."""
    sentence = "a cat\u2028asleep\x85here"
    (tmp_path / "list.jsonl").write_text(
        json.dumps({"photo": "a.png", "sentence": sentence}, ensure_ascii=False) + "\r\n", encoding="utf-8"
    )
    assert [item.sentence for item in read_manifest(tmp_path / "list.jsonl")[0]] == [sentence]
    (tmp_path / "list.csv").write_text("photo,sentence,name\na.png,a cat\n")
    assert [item.name for item in read_manifest(tmp_path / "list.csv")[0]] == ["a-a-cat"]


def test_a_photo_no_system_can_name(batch: Callable[..., Any], tmp_path: Path) -> None:
    """A photo's name that is too long, or no name at all, fails its item alone."""
    lines = [{"photo": name, "sentence": SENTENCE} for name in ("x" * 300 + ".png", "a\0b.png", "..")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = batch(tmp_path / "list.jsonl", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 3 and len(json.loads(result.stdout)["failed"]) == 3


def test_a_manifest_that_is_not_there(tmp_path: Path) -> None:
    """A missing manifest is one clear error."""
    with pytest.raises(ConfigError, match="is not there"):
        read_manifest(tmp_path / "nowhere.jsonl")


@given(
    entries=st.lists(
        st.fixed_dictionaries(
            {"photo": st.sampled_from(["a.png", "b/a.png", "é.png", "../a.png"]), "sentence": st.text(max_size=80)},
            optional={"name": st.text(max_size=70), "seed": st.integers(0, 3)},
        ),
        min_size=1,
        max_size=12,
    )
)
def test_names_are_safe_unique_and_of_no_order(
    tmp_path_factory: pytest.TempPathFactory, entries: list[dict[str, Any]]
) -> None:
    """Names of folders are portable and unique for any manifest, and the same for its lines in another order."""
    path = tmp_path_factory.mktemp("manifest") / "list.jsonl"

    def names(some: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
        path.write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
        # Lines may say the same in other words, such as an empty name for none: then the first one counts.
        return {(item.stem, item.digest): item.name for item in read_manifest(path)[0]}

    found = names(entries)
    assert len(set(found.values())) == len(found)
    assert all(
        set(name) <= set(string.ascii_lowercase + string.digits + "-") and 1 <= len(name) <= 60
        for name in found.values()
    )
    assert names(entries[::-1]) == found


# Runs


def finished(out: Path) -> list[str]:
    """Names of the finished items in a folder."""
    return sorted(path.parent.name for path in out.glob("*/report.json"))


def made(result: Any) -> tuple[set[str], set[str]]:
    """Names of the items that a run made, and that were finished before; none failed."""
    assert result.exit_code == 0, result.output
    tally = json.loads(result.stdout)
    return set(tally["done"]), set(tally["done_before"])


def test_an_item_keeps_its_folder_when_others_come_and_go(batch: Callable[..., Any], tmp_path: Path) -> None:
    """Photos of one name, added and removed in any order, are each made once, also with `force`."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "away").mkdir()
    jpg, png = (photo(tmp_path / "photos" / f"cat.{kind}", seed) for seed, kind in enumerate(("jpg", "png")))
    words = (tmp_path / "photos", "--prompt", "a cat", "--out", tmp_path / "out", "--json")
    away = png.rename(tmp_path / "away" / "cat.png")
    assert made(batch(*words)) == ({"cat-a-cat"}, set())
    away.rename(png)
    [second], before = made(batch(*words))
    assert second.startswith("cat-a-cat-") and before == {"cat-a-cat"}
    both = {"cat-a-cat", second}
    assert made(batch(*words, "--force")) == (set(), both)
    away = jpg.rename(tmp_path / "away" / "cat.jpg")
    assert made(batch(*words, "--force")) == (set(), {second})
    away.rename(jpg)
    assert made(batch(*words)) == (set(), both)
    assert set(finished(tmp_path / "out")) == both


def test_a_batch_of_an_earlier_version_is_continued(batch: Callable[..., Any], tmp_path: Path) -> None:
    """Of photos with names in one script the first had the plain name, the others digits: these folders are found,
    whatever photo comes before them."""
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(("写真.png", "絵.png")):
        photo(tmp_path / "photos" / name, seed)
    [first, second], _ = read_manifest(tmp_path / "photos", SENTENCE)
    assert first.stem == second.stem == "a-photo-of-a-blue-sphere"
    old = [{"photo": "写真.png", "name": first.stem}, {"photo": "絵.png", "name": second.name}]
    (tmp_path / "photos" / "old.jsonl").write_text("\n".join(map(json.dumps, old)), encoding="utf-8")
    words = ("--prompt", SENTENCE, "--out", tmp_path / "out", "--json")
    before, _ = made(batch(tmp_path / "photos" / "old.jsonl", *words))
    assert before == {first.stem, second.name}
    photo(tmp_path / "photos" / "一.png", 2)
    [done], again = made(batch(tmp_path / "photos", *words))
    assert again == before and done.startswith(f"{first.stem}-")


def test_an_item_that_was_begun_keeps_its_name(
    batch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that a stopped run had begun goes on under its name, though another of that name has come."""
    (tmp_path / "photos").mkdir()
    photo(tmp_path / "photos" / "cat.png", 0)
    words = (tmp_path / "photos", "--prompt", "a cat", "--out", tmp_path / "out", "--json")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(worker, "finished_edit", stop)
        assert batch(*words).exit_code == 130
    photo(tmp_path / "photos" / "cat.jpg", 1)
    done, _ = made(batch(*words))
    assert "cat-a-cat" in done and len(done) == 2
    begun = edit_file.read(tmp_path / "out" / "cat-a-cat" / "cat-a-cat.safetensors")
    assert begun.source.sha256 == hashlib.sha256((tmp_path / "photos" / "cat.png").read_bytes()).hexdigest()


def test_a_folder_of_photos_is_edited(batch: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """Every photo gets a folder as `edit` writes it; the broken one is named, and the exit code says so."""
    result = batch(photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 3, result.output
    tally = json.loads(result.stdout)
    assert [bad["where"] for bad in tally["failed"]] == ["broken.png"] and tally["left"] == 0
    names = [f"p{n}-a-photo-of-a-blue-sphere" for n in range(3)]
    assert sorted(tally["done"]) == names == finished(tmp_path / "out")
    for name in names:
        folder = tmp_path / "out" / name
        assert {path.name for path in folder.iterdir()} == {
            "eta_0.00.png",
            "eta_1.00.png",
            "sheet.png",
            "report.json",
            f"{name}.safetensors",
        }
        assert edit_file.read(folder / f"{name}.safetensors").target_prompt == SENTENCE
    assert str(tmp_path) not in (tmp_path / "out" / names[0] / "report.json").read_text()


def test_an_item_is_what_edit_makes(batch: Callable[..., Any], photos: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """In one slot, an item's edit has the very weights that `train` gives for its photo, sentence and settings."""
    words = ["train", photos / "p1.png", SENTENCE, "--out", tmp_path / "e.safetensors", "--model", tiny_folder]
    CliRunner().invoke(app, [*map(str, words), "--device", "cpu", *QUICK[:6], "--quiet"])
    (tmp_path / "one.jsonl").write_text(json.dumps({"photo": "photos/p1.png", "sentence": SENTENCE, "name": "one"}))
    assert batch(tmp_path / "one.jsonl", "--out", tmp_path / "out", "--start", "inverted").exit_code == 0
    mine, theirs = (
        edit_file.read(tmp_path / "out" / "one" / "one.safetensors"),
        edit_file.read(tmp_path / "e.safetensors"),
    )
    assert mine.adapters["unet"].keys() == theirs.adapters["unet"].keys()
    assert all(
        (mine.adapters["unet"][key].up == theirs.adapters["unet"][key].up).all() for key in mine.adapters["unet"]
    )
    assert (mine.conditioning["embeds"] == theirs.conditioning["embeds"]).all()


def test_the_same_command_goes_on(batch: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """Run again, finished items stay unchanged; an item that lost its edit, or was under way, is made again."""
    (photos / "broken.png").unlink()
    words = (photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json")
    assert batch(*words).exit_code == 0
    reports = sorted((tmp_path / "out").glob("*/report.json"))
    next(reports[1].parent.glob("*.safetensors")).unlink()
    under_way = json.loads(reports[2].read_text()) | {"finished": False}
    reports[2].write_text(json.dumps(under_way))
    before = {path: path.stat().st_mtime_ns for path in reports}
    result = batch(*words)
    tally = json.loads(result.stdout)
    assert result.exit_code == 0
    assert tally["done"] == [path.parent.name for path in reports[1:]]
    assert tally["done_before"] == [reports[0].parent.name]
    assert [path for path in reports if path.stat().st_mtime_ns != before[path]] == reports[1:]


def test_nothing_else_is_replaced(batch: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """A folder with another edit, or with files of another kind, is kept unless --force is given."""
    list_path = tmp_path / "list.jsonl"
    list_path.write_text(
        "\n".join(json.dumps({"photo": f"photos/p{n}.png", "sentence": SENTENCE, "name": f"n{n}"}) for n in range(2))
    )
    out = tmp_path / "out"
    (out / "n1").mkdir(parents=True)
    (out / "n1" / "mine.txt").write_text("mine")
    assert batch(list_path, "--out", out).exit_code == 3
    assert finished(out) == ["n0"]
    report = (out / "n0" / "report.json").read_bytes()
    result = batch(list_path, "--out", out, "--seed", "1")
    assert result.exit_code == 3 and result.stderr.count("holds something else") == 2
    assert (out / "n0" / "report.json").read_bytes() == report
    assert batch(list_path, "--out", out, "--seed", "1", "--force").exit_code == 0
    assert finished(out) == ["n0", "n1"] and (out / "n1" / "mine.txt").read_text() == "mine"


def test_results_of_other_commands_are_not_replaced(
    batch: Callable[..., Any], photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """A folder that `sample` or `train` has written is not a stopped batch's: it is kept, and the item fails."""
    words = ["--model", tiny_folder, "--device", "cpu", "--quiet"]
    edit = tmp_path / "out" / "a" / "a.safetensors"
    edit.parent.mkdir(parents=True)
    for command in (
        ["train", photos / "p0.png", SENTENCE, "--out", edit, *QUICK[:6]],
        ["sample", edit, "--out", tmp_path / "out" / "b", "--etas", "0", "--steps-sample", "2"],
    ):
        assert CliRunner().invoke(app, [*map(str, command), *map(str, words)]).exit_code == 0
    lines = [{"photo": "photos/p0.png", "sentence": SENTENCE, "name": name} for name in "ab"]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = batch(tmp_path / "list.jsonl", "--out", tmp_path / "out", "--json")
    assert [bad["name"] for bad in json.loads(result.stdout)["failed"]] == ["a", "b"]
    assert {path.name for path in edit.parent.iterdir()} == {"a.safetensors"}


def test_another_background_is_another_job(batch: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """The colour under transparent parts of a photo affects the result, so it is part of the job."""
    (photos / "broken.png").unlink()
    words = (photos, "--prompt", SENTENCE, "--out", tmp_path / "out")
    assert batch(*words).exit_code == 0
    assert batch(*words, "--background", "black").exit_code == 3


def test_no_memory_for_pictures_fails_the_item_alone(
    batch: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that cannot be rendered is reported with where its edit is; the others are finished."""
    (photos / "broken.png").unlink()
    render, seen = commands.render, []

    def failing(*args: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 3:
            raise MemoryLimitError("out of memory in stage decode")
        return render(*args, **options)

    monkeypatch.setattr(commands, "render", failing)
    result = batch(photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json")
    tally = json.loads(result.stdout)
    assert result.exit_code == 3 and len(tally["done"]) == 2 and tally["left"] == 0
    [bad] = tally["failed"]
    assert "the edit itself is finished" in bad["reason"]
    assert (tmp_path / "out" / bad["name"] / f"{bad['name']}.safetensors").is_file()
    monkeypatch.setattr(commands, "render", render)
    assert json.loads(batch(photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json").stdout)["done"] == [
        bad["name"]
    ]


def test_too_little_memory_fails_items_not_the_run(batch: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """If no plan fits, every item is reported, unread, with a plan that would fit, and the exit code shows it."""
    result = batch(photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--vram", "1MB", "--json")
    tally = json.loads(result.stdout)
    assert result.exit_code == 3 and tally["left"] == 0
    assert sum("hold no training step" in bad["reason"] for bad in tally["failed"]) == 4


def test_items_have_settings_of_their_own(batch: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """Seed, etas and seeds of a line apply to its item; a line with a value out of range fails alone."""
    lines = [
        {"photo": "photos/p0.png", "sentence": SENTENCE, "name": "own", "seed": 7, "etas": [0, 0.5], "seeds": "1,2"},
        {"photo": "photos/p0.png", "sentence": SENTENCE, "name": "plain"},
        {"photo": "photos/p0.png", "sentence": SENTENCE, "name": "wrong", "etas": [99]},
        {"photo": "photos/p0.png", "sentence": " ", "name": "empty"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    result = batch(tmp_path / "list.jsonl", "--out", tmp_path / "out", "--json")
    tally = json.loads(result.stdout)
    assert sorted(tally["done"]) == ["own", "plain"]
    assert {bad["name"]: bad["where"] for bad in tally["failed"]} == {"wrong": "line 3", "empty": "line 4"}
    pictures = {path.name for path in (tmp_path / "out" / "own").glob("eta*.png")}
    assert pictures == {f"eta_{eta}_seed_{seed}.png" for eta in ("0.00", "0.50") for seed in (1, 2)}
    assert edit_file.read(tmp_path / "out" / "own" / "own.safetensors").seed == 7


def test_one_that_diverges_harms_nobody(
    batch: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit whose loss is no longer finite is reported; those beside it in the pack are finished."""
    (photos / "broken.png").unlink()
    start = embed.from_sentence

    def poisoned(slot: Any) -> None:
        start(slot)
        if slot.number == 1:
            slot.text["embeds"].fill_(float("nan"))

    monkeypatch.setattr(embed, "from_sentence", poisoned)
    result = batch(photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json")
    tally = json.loads(result.stdout)
    assert [bad["where"] for bad in tally["failed"]] == ["p1.png"] and "loss is nan" in tally["failed"][0]["reason"]
    assert len(tally["done"]) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_ctrl_c_keeps_what_is_finished(
    batch: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Stopped once, a batch saves its edits in training and reports how many items are done and left; the same command
    continues from there."""
    handler = signal.getsignal(number)
    (photos / "broken.png").unlink()
    words = (photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json")
    with monkeypatch.context() as patch:
        calls.before_each_edit(patch, lambda count: signal.raise_signal(number))
        patch.setattr(worker, "CPU_SLOTS", 1)
        result = batch(*words)
    assert result.exit_code == 130 and "1 done, 2 left; run the same command again to continue" in result.stderr
    assert len(finished(tmp_path / "out")) == 1
    assert signal.getsignal(number) == handler
    assert len(json.loads(batch(*words).stdout)["done"]) == 2


def test_ctrl_c_is_heard_while_photos_are_inverted(
    batch: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything trains there is nothing to save: a batch ends at the next step of the inversion."""
    invert = preparation.own_noise

    def stop_before(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        invert(*args, **kwargs)
        raise AssertionError("still there")

    monkeypatch.setattr(preparation, "own_noise", stop_before)
    words = (photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--start", "inverted", "--json")
    result = batch(*words)
    assert result.exit_code == 130 and "0 done, 4 left" in result.stderr


def test_the_second_ctrl_c_stops_at_once(
    batch: Callable[..., Any], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice, a batch ends at once, leaves no half-written file, and can still be continued."""
    (photos / "broken.png").unlink()
    words = (photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--json")

    def stop_twice(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still there")

    with monkeypatch.context() as patch:
        patch.setattr(ResultFolder, "write_sheet", stop_twice)
        assert batch(*words).exit_code == 130
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert len(json.loads(batch(*words).stdout)["done"]) == 3


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_progress_is_one_for_all(
    photos: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int
) -> None:
    """The display counts steps of all items to their end, and says how many are done, in slots and waiting; it begins
    before the first photo is inverted, and never goes back."""
    from lowmem_imagic.actions.console import Console, Silent

    monkeypatch.setattr(worker, "CPU_SLOTS", slots)
    seen: list[tuple[str, int, int, str]] = []
    monkeypatch.setattr(Console, "progress", lambda self, *report: isinstance(self, Silent) or seen.append(report))
    words = [photos, "--prompt", SENTENCE, "--out", tmp_path / "out", "--model", tiny_folder, "--device", "cpu"]
    result = CliRunner().invoke(app, ["batch", "run", *map(str, words), *QUICK[:-1]])
    assert result.exit_code == 3, result.output
    steps = [step for _, step, _, _ in seen]
    assert {report[0] for report in seen} == {"train"} and steps == sorted(steps) and steps[-1] == 4 * 3
    assert seen[0][1:] == (0, 4 * 3, "0 done, 0 in slots, 4 waiting")
    assert (4 * 3, f"0 done, {slots} in slots, {4 - slots} waiting") in [report[2:] for report in seen]
    assert seen[-1][3] == "3 done, 0 in slots, 0 waiting, 1 failed"
