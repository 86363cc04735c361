"""Facts about batches with faults: disks, photos, memory and processes fail, and no finished item is lost."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from lowmem_imagic.actions.console import Silent
from lowmem_imagic.batch import outputs, runner
from lowmem_imagic.batch.executors import build
from lowmem_imagic.batch.executors import local as worker
from lowmem_imagic.batch.failures import MAX_TRIES
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.run import run as run_batch
from lowmem_imagic.batch.states import States
from lowmem_imagic.batch.status import commands_of, status
from lowmem_imagic.batch.stopping import Stop
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.pipeline import make as pipeline
from lowmem_imagic.storage import writable
from lowmem_imagic.training.loop import Trainer
from tests import calls, crashes
from tests.test_batch import QUICK, SENTENCE, photo
from tests.test_ledger import change, mounted

FEW = ("--steps-finetune", "1", "--draws", "1", "--steps-sample", "1", "--etas", "0")
ONE_PICTURE = (*QUICK, *FEW, "--device", "cpu")
LEDGER = ".lowmem-imagic/ledger.sqlite3"
GOOD, BAD = 9, 1


@pytest.fixture(autouse=True)
def limit() -> Iterator[None]:
    """Ends a run that waits forever, as for an item that no runner has or has released."""

    def late(*_: object) -> None:
        raise TimeoutError("the run does not end")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Said:
    """The result of a command."""

    code: int
    report: dict[str, Any]
    errors: str


def call(*words: object) -> Said:
    """Runs a batch command with --json."""
    result = CliRunner().invoke(app, ["batch", *map(str, words), "--json"])
    return Said(result.exit_code, json.loads(result.stdout or "{}"), result.stderr)


@pytest.fixture(scope="module")
def run(tiny_folder: Path) -> Callable[..., Said]:
    """Runs ``batch run`` with the tiny model and few steps."""
    return lambda *words: call("run", "--model", tiny_folder, *ONE_PICTURE, *words)


def listed(folder: Path, count: int, **fields: list[Any]) -> Path:
    """A manifest of new photos, named n0, n1, ...; fields have a value for each, None for none."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number in range(count):
        line = {"photo": photo(folder / f"p{number}.png", number).name, "sentence": SENTENCE, "name": f"n{number}"}
        lines.append(line | {name: values[number] for name, values in fields.items() if values[number] is not None})
    path = folder / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def spoil(photo: Path) -> None:
    """Makes a photo one that is cut off."""
    photo.write_bytes(photo.read_bytes()[:40])


def items(out: Path) -> dict[str, dict[str, Any]]:
    """The entries of ``batch status`` for all items, by name."""
    return {item["name"]: item for item in call("status", out).report["items"]}


def times(out: Path) -> dict[str, int]:
    """When every file of the results was last written."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.glob("n*/*")}


@pytest.fixture(scope="module")
def ten(run: Callable[..., Said], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Said]:
    """A manifest of ten photos, one of them cut off, its folder, and the output of the run."""
    folder = tmp_path_factory.mktemp("ten")
    manifest = listed(folder, GOOD + BAD)
    spoil(folder / "p4.png")
    return manifest, folder / "out", run(manifest, "--out", folder / "out")


@pytest.fixture
def copy(ten: tuple[Path, Path, Said], tmp_path: Path) -> Path:
    """A copy of the folder that a test may damage."""
    return Path(shutil.copytree(ten[1], tmp_path / "out"))


# Photos


def test_a_tenth_is_bad(ten: tuple[Path, Path, Said]) -> None:
    """One bad photo of ten is named, the others are made, and the exit code says so; so does the status after."""
    _, out, said = ten
    good = [f"n{number}" for number in range(GOOD + BAD) if number != 4]
    assert said.code == 3 and set(said.report) == {"out", "total", "done", "done_before", "failed", "left", "summary"}
    assert sorted(said.report["done"]) == good and said.report["left"] == 0
    [bad] = said.report["failed"]
    assert (bad["where"], bad["name"]) == ("line 5", "n4") and "damaged or cut-off" in bad["reason"]
    seen = call("status", out)
    counts = {name: seen.report[name] for name in ("total", "waiting", "running", "done", "failed")}
    assert seen.code == 0 and counts == {"total": 10, "waiting": 0, "running": 0, "done": 9, "failed": 1}
    assert seen.report["runners"] == [] and seen.report["seconds_left"] is None
    assert {(i["state"], i["attempts"], i["kind"]) for i in items(out).values() if i["name"] in good} == {
        ("done", 1, None)
    }
    assert seen.report["summary"][0].endswith("10 items: 9 done, 1 failed") and "n4" in seen.report["summary"][1]


def test_a_photo_that_vanishes(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo that was there at the start and is gone when its turn comes fails by itself."""
    manifest, stream = listed(tmp_path, 2), worker.stream_edits

    def late(*args: Any, **options: Any) -> Any:
        (tmp_path / "p0.png").unlink(missing_ok=True)
        return stream(*args, **options)

    monkeypatch.setattr(worker, "stream_edits", late)
    said = run(manifest, "--out", tmp_path / "out")
    assert said.code == 3 and said.report["done"] == ["n1"]
    assert [bad["name"] for bad in said.report["failed"]] == ["n0"] and "there is no file" in said.errors


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, readings: range) -> None:
    """Lets these readings of a file, the first of which is number 0, fail as those of a bad disk do."""
    system, count = os.open, iter(range(1000))

    def opening(name: Any, *rest: Any, **more: Any) -> int:
        if str(name) == str(path) and next(count) in readings:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return system(name, *rest, **more)

    monkeypatch.setattr(os, "open", opening)


def test_a_disk_that_fails_once(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo that cannot be read at one moment is read at another, by the same run."""
    manifest = listed(tmp_path, 2)
    unreadable(monkeypatch, tmp_path / "p0.png", range(1, 2))
    said = run(manifest, "--out", tmp_path / "out")
    assert said.code == 0 and said.report["done"] == ["n1", "n0"] and "tried again later" in said.errors
    assert [item["attempts"] for item in items(tmp_path / "out").values()] == [2, 1]


def test_what_is_tried_again(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that always fails, an item fails after some tries, and the same command tries it again; a bad photo is
    tried again only by `retry --failed`."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    spoil(tmp_path / "p1.png")

    def found() -> list[tuple[str, str | None, int]]:
        return [(item["state"], item["kind"], item["attempts"]) for item in items(out).values()]

    with monkeypatch.context() as patch:
        unreadable(patch, tmp_path / "p0.png", range(1, 1000))
        said = run(manifest, "--out", out)
        assert said.code == 3 and said.report["done"] == ["n2"]
        assert found() == [("failed", "io", MAX_TRIES), ("failed", "input", 1), ("done", None, 1)]
    said = run(manifest, "--out", out)
    assert said.code == 3 and said.report["done"] == ["n0"] and "as before" in said.report["failed"][0]["reason"]
    for words, attempts in (((), 1), (("--failed",), 2)):
        said = call("retry", out, "--quiet", *words)
        assert said.code == 3 and not said.report["done"] and len(said.report["done_before"]) == 2
        assert found()[1] == ("failed", "input", attempts)


# Files on disk


@pytest.mark.parametrize("content", [b"", b"garbage" * 9999, None], ids=["empty", "garbage", "gone"])
def test_a_lost_ledger_loses_nothing(
    run: Callable[..., Said], ten: tuple[Path, Path, Said], copy: Path, content: bytes | None
) -> None:
    """Without its ledger, or with a damaged one, a batch finds its finished items from their files, and makes none
    again."""
    before = times(copy)
    (copy / LEDGER).unlink() if content is None else (copy / LEDGER).write_bytes(content)
    seen = call("status", copy)
    assert seen.code == 0 and seen.report["total"] == seen.report["done"] == GOOD
    said = run(ten[0], "--out", copy)
    assert said.code == 3 and said.report["done"] == [] and len(said.report["done_before"]) == GOOD
    assert times(copy) == before and ("made anew" in said.errors) == bool(content)
    assert call("status", copy).report["failed"] == BAD


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("eta_0.00.png", None),
        ("eta_0.00.png", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("sheet.png", lambda data: data[:1000]),
        ("report.json", lambda data: data.replace(b'"finished": true', b'"finished": false')),
    ],
    ids=["deleted", "a bit", "cut", "unfinished"],
)
def test_a_damaged_result_is_made_again(
    run: Callable[..., Said],
    ten: tuple[Path, Path, Said],
    copy: Path,
    name: str,
    damage: Callable[[bytes], bytes] | None,
) -> None:
    """An item with a missing or changed file is made again, whatever the ledger says; other items are not."""
    file, before = copy / "n7" / name, times(copy)
    job = json.loads((copy / "n7" / "report.json").read_text())["job"]
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    said = run(ten[0], "--out", copy)
    assert said.report["done"] == ["n7"] and len(said.report["done_before"]) == GOOD - 1
    assert outputs.item_state(copy / "n7", job) == outputs.FINISHED and items(copy)["n7"]["attempts"] == 2
    assert {path for path, when in times(copy).items() if before.get(path) != when} == {
        path for path in before if path.startswith("n7/")
    }


def test_a_folder_that_cannot_be_written(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only disk, or one with hardly any room, is one clear error before any model is opened."""
    monkeypatch.setattr(build, "open_base", lambda *_: pytest.fail("a model was opened"))
    manifest = listed(tmp_path, 1)
    with mounted(tmp_path / "disk", "2m") as disk:
        said = run(manifest, "--out", disk / "out")
        assert said.code == 1 and "2 MB free, expected at least 32 MB; make room" in said.errors
        subprocess.run(("mount", "-o", "remount,ro", str(disk)), check=True)
        said = run(manifest, "--out", disk / "out")
        assert said.code == 1 and "Read-only file system" in said.errors and "choose another place" in said.errors
        assert not list(disk.iterdir())


def test_a_disk_that_fills_up(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk, the run ends with one clear error; finished items stay, half-made items do not count as done, and
    with free space the same command makes the rest."""
    monkeypatch.setattr(writable, "MIN_FREE_BYTES", 0)
    manifest = listed(tmp_path, 3)
    with mounted(tmp_path / "disk", "3m") as disk:
        (disk / "ballast").write_bytes(bytes(3 * 2**20 - 700_000))
        said = run(manifest, "--out", disk / "out", "--slots", 1)
        assert said.code == 1 and "no space left on the device" in said.errors and not said.report
        kept = times(disk / "out")
        assert {name[:2] for name in kept} == {"n0"} and not list(disk.rglob("*.tmp"))
        (disk / "ballast").unlink()
        said = run(manifest, "--out", disk / "out")
        assert said.code == 0 and said.report["done_before"] == ["n0"] and sorted(said.report["done"]) == ["n1", "n2"]
        assert {name for name, when in times(disk / "out").items() if kept.get(name) == when} == {
            name for name in kept if name.startswith("n0")
        }


# Training states


@pytest.fixture
def stopped(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A list of two photos, and the folder of a run that was stopped with both in training."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    due = iter([False, True])

    def stop(*_: object) -> bool:
        if saved := next(due):
            signal.raise_signal(signal.SIGINT)
        return saved

    with monkeypatch.context() as patch:
        patch.setattr(States, "due", stop)
        assert run(manifest, "--out", out).code == 130
    assert len(states(out)) == 2
    return manifest, out


def states(out: Path) -> set[str]:
    """The jobs with a saved training state."""
    return {path.parent.parent.name for path in out.glob(".lowmem-imagic/training/*/*/state")}


def resumed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the items that go on from a state, as they do."""
    names, load = list[str](), States.load

    def loading(self: States, assignment: Any) -> Any:
        state = load(self, assignment)
        names.extend([assignment.name] if state is not None else [])
        return state

    monkeypatch.setattr(States, "load", loading)
    return names


def test_a_state_outlives_its_photos_absence(
    run: Callable[..., Said], stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit in training whose photo is away for a run goes on from its state when the photo is back."""
    manifest, out = stopped
    names = resumed(monkeypatch)
    (tmp_path / "p0.png").rename(tmp_path / "away")
    said = run(manifest, "--out", out)
    assert said.code == 3 and said.report["done"] == ["n1"] and len(states(out)) == 1
    assert call("status", out).report["total"] == 2
    (tmp_path / "away").rename(tmp_path / "p0.png")
    assert run(manifest, "--out", out).report["done"] == ["n0"] and names == ["n1", "n0"]
    assert not (out / ".lowmem-imagic" / "training").exists()


def test_a_state_outlives_a_disks_failure(
    run: Callable[..., Said], stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An edit in training whose photo could not be read in a run, at its start or later, goes on from its state."""
    manifest, out = stopped
    names = resumed(monkeypatch)
    for readings in (range(1000), range(1, 1000)):
        with monkeypatch.context() as patch:
            unreadable(patch, tmp_path / "p0.png", readings)
            assert run(manifest, "--out", out).code == 3
        assert len(states(out)) == 1
    assert run(manifest, "--out", out).report["done"] == ["n0"] and names == ["n1", "n0"]


def test_states_outlive_other_lists(
    run: Callable[..., Said], stopped: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edits in training go on from their states after another list was made into the same folder."""
    manifest, out = stopped
    kept = states(out)
    assert run(another_list(tmp_path), "--out", out).report["done"] == ["another"] and states(out) == kept
    names = resumed(monkeypatch)
    assert run(manifest, "--out", out).code == 0 and sorted(names) == ["n0", "n1"]


def test_states_end_with_their_folder(run: Callable[..., Said], stopped: tuple[Path, Path]) -> None:
    """Edits in training whose folder another edit gets, as with another seed, leave no states."""
    manifest, out = stopped
    assert run(manifest, "--out", out, "--seed", 5).code == 0
    assert not (out / ".lowmem-imagic" / "training").exists()
    assert call("status", out).report["total"] == 2


def test_a_folder_that_is_free_again(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that failed because its folder was taken meanwhile is made by the next run, once the folder is free."""
    manifest, out = listed(tmp_path, 1), tmp_path / "out"

    def take(count: int) -> None:
        (out / "n0").mkdir()
        (out / "n0" / "mine.txt").touch()

    with monkeypatch.context() as patch:
        calls.before_each_edit(patch, take)
        assert run(manifest, "--out", out).code == 3
    (out / "n0" / "mine.txt").unlink()
    assert run(manifest, "--out", out).report["done"] == ["n0"]


# Several commands into one folder


def test_two_sentences(run: Callable[..., Said], tmp_path: Path) -> None:
    """A second sentence for the same photos makes further items: status and page have those of both, also if the ledger
    was lost in between."""
    listed(tmp_path / "photos", 2).unlink()
    out = tmp_path / "out"
    for number, sentence in enumerate(("one", "two", "three"), start=1):
        if number == 3:
            (out / LEDGER).unlink()
        assert len(run(tmp_path / "photos", "--prompt", sentence, "--out", out).report["done"]) == 2
        seen = call("status", out).report
        assert (seen["total"], seen["done"]) == (2 * number, 2 * number) and len(seen["summary"]) == 1
    assert call("sheet", out).report["with_pictures"] == 6
    assert (out / "index.html").read_text().count("<article>") == 6


def another_list(folder: Path, **fields: Any) -> Path:
    """A list of one further photo."""
    photo(folder / "photo.png", 9)
    path = folder / "other.jsonl"
    path.write_text(json.dumps({"photo": "photo.png", "sentence": SENTENCE, "name": "another"} | fields))
    return path


def test_an_earlier_list_is_not_forgotten(run: Callable[..., Said], stopped: tuple[Path, Path], tmp_path: Path) -> None:
    """After a list that was stopped and another one, the status names the list with unfinished items, and `retry` makes
    them; without the list, `retry` says so."""
    manifest, out = stopped
    assert run(another_list(tmp_path), "--out", out).report["total"] == 1
    seen = call("status", out).report
    assert (seen["total"], seen["done"], seen["waiting"]) == (3, 1, 2)
    assert f"2 not done of {manifest}" in seen["summary"]
    manifest.rename(tmp_path / "away.jsonl")
    said = call("retry", out)
    assert said.code == 0 and said.report["total"] == 1
    assert f"2 not done of {manifest}, which is not there any more" in said.errors
    (tmp_path / "away.jsonl").rename(manifest)
    said = call("retry", out)
    assert said.code == 0 and (said.report["total"], sorted(said.report["done"])) == (3, ["n0", "n1"])
    assert call("status", out).report["summary"] == [f"{out}: 3 items: 3 done"]
    assert call("retry", out).report["total"] == 1


def test_retry_leaves_what_another_list_got(run: Callable[..., Said], tmp_path: Path) -> None:
    """An item whose folder a later command has got is that command's: `retry` of the earlier one leaves it alone."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    spoil(tmp_path / "p1.png")
    assert run(manifest, "--out", out).code == 3
    assert run(another_list(tmp_path, name="n0"), "--out", out, "--force").report["done"] == ["n0"]
    before = times(out)
    said = call("retry", out)
    assert said.code == 3 and [bad["name"] for bad in said.report["failed"]] == ["n1"]
    assert said.report["done_before"] == ["n0"] and times(out) == before


def test_retry_goes_on_with_force(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`retry` of a forced run that was stopped replaces the items that it has not made yet; what was put in place of
    those that it made stays."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    assert run(manifest, "--out", out).code == 0
    with monkeypatch.context() as patch:
        calls.before_each_edit(patch, lambda count: signal.raise_signal(signal.SIGINT))
        assert run(manifest, "--out", out, "--seed", 5, "--slots", 1, "--force").code == 130
    said = call("retry", out)
    assert said.code == 0 and (said.report["done_before"], said.report["done"]) == (["n0"], ["n1"])
    shutil.rmtree(out / "n0")
    (out / "n0").mkdir()
    (out / "n0" / "mine.txt").touch()
    said = call("retry", out)
    assert said.code == 3 and [bad["name"] for bad in said.report["failed"]] == ["n0"]
    assert os.listdir(out / "n0") == ["mine.txt"]


# Memory


def limited(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Lets no more than so many edits train side by side; returns the sizes of packs that tried."""
    step, sizes = Trainer.step, list[int]()

    def limited_step(self: Trainer) -> Any:
        if not sizes or sizes[-1] != len(self.runs):
            sizes.append(len(self.runs))
        if len(self.runs) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self)

    monkeypatch.setattr(Trainer, "step", limited_step)
    return sizes


def test_fewer_side_by_side(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that does not fit continues with half as many edits until it fits, and every item is made once."""
    sizes = limited(monkeypatch, 1)
    said = run(listed(tmp_path, 4), "--out", tmp_path / "out")
    assert said.code == 0 and sorted(said.report["done"]) == ["n0", "n1", "n2", "n3"] and sizes == [4, 2, 1]
    assert {item["attempts"] for item in items(tmp_path / "out").values()} == {1}


def test_not_even_one(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not one edit fits, every item fails for want of memory, and the same command tries them again."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    with monkeypatch.context() as patch:
        assert limited(patch, 0) == [] and run(manifest, "--out", out).code == 3
    assert [item["kind"] for item in items(out).values()] == ["memory", "memory"]
    assert sorted(run(manifest, "--out", out).report["done"]) == ["n0", "n1"]


# Runs


def test_shards(run: Callable[..., Said], tmp_path: Path) -> None:
    """Two parts make all of a manifest, each with a ledger of its own; the status counts them together."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    for shard, names in (("1/2", ["n0", "n2"]), ("2/2", ["n1"])):
        assert run(manifest, "--out", out, "--shard", shard).report["done"] == names
    assert call("status", out).report["summary"] == [f"{out}: 3 items: 3 done"]
    assert {name: (item["where"], item["attempts"]) for name, item in items(out).items()} == {
        f"n{number}": (f"line {number + 1}", 1) for number in range(3)
    }
    for shard in ("0/2", "3/2", "half"):
        said = run(manifest, "--out", out, "--shard", shard)
        assert said.code == 2 and "expected i/n" in said.errors


@pytest.mark.parametrize("force", [False, True])
def test_two_runs_with_items_of_one_name(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    """An item whose folder another run has filled since this one began fails, and the other's files stay; with
    `--force` they are replaced."""
    first, second, out = listed(tmp_path / "a", 1), listed(tmp_path / "b", 1), tmp_path / "out"
    photo(tmp_path / "b" / "p0.png", 7)
    others, made = list[Said](), dict[str, int]()

    def meanwhile(count: int) -> None:
        if count == 0:
            others.append(run(second, "--out", out))
            made.update(times(out))

    calls.before_each_edit(monkeypatch, meanwhile)
    said = run(first, "--out", out, *["--force"] * force)
    assert others[0].code == 0 and others[0].report["done"] == ["n0"]
    if force:
        assert said.report["done"] == ["n0"] and not set(made.values()) & set(times(out).values())
        return
    assert said.code == 3 and not said.report["done"] and times(out) == made
    assert "n0 holds something else; --force replaces it" in said.errors and said.report["failed"][0]["name"] == "n0"


def at_the_first_photo(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    """Calls `action` when a run reads its first photo; with claims of one item the others still wait then."""
    load = worker.load_photo

    def loading(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(worker, "load_photo", load)
        action()
        return load(*args, **options)

    monkeypatch.setattr(worker, "load_photo", loading)


def test_runs_with_other_rows_share_the_items(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two runs with different `--batch-rows`, each may make any item: what the other leaves is made by the first,
    which ends."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    monkeypatch.setattr(runner, "CLAIM", 1)

    class Ending(Silent):
        """Asks for a stop when the items have been counted."""

        def __init__(self, stop: Stop) -> None:
            super().__init__()
            self._stop = stop

        def say(self, text: str, *, always: bool = False) -> None:
            self._stop.asked |= "items to make" in text

    def meanwhile() -> None:
        request, stop = Request.of(commands_of(out)[0].request).but(batch_rows=1), Stop()
        with pytest.raises(KeyboardInterrupt):
            run_batch(request, Ending(stop), stop, own={})

    at_the_first_photo(monkeypatch, meanwhile)
    said = run(manifest, "--out", out)
    assert said.code == 0 and said.report["done"] == ["n0", "n1"]


def test_a_taken_folder_is_seen_before_the_work(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item whose folder was taken before its turn fails before its photo is read."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    monkeypatch.setattr(runner, "CLAIM", 1)
    loaded, load = list[str](), worker.load_photo

    def loading(path: Path, **options: Any) -> Any:
        loaded.append(path.name)
        return load(path, **options)

    monkeypatch.setattr(worker, "load_photo", loading)
    at_the_first_photo(monkeypatch, lambda: (out / "n1" / "mine").mkdir(parents=True))
    said = run(manifest, "--out", out)
    assert said.report["done"] == ["n0"] and "n1 holds something else" in said.report["failed"][0]["reason"]
    assert loaded == ["p0.png"]


def test_nothing_to_claim_is_waited_for(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that finds waiting items and may claim none sleeps before it looks again."""
    manifest, out, slept = listed(tmp_path, 2), tmp_path / "out", list[float]()
    monkeypatch.setattr(runner, "CLAIM", 1)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        change(out / LEDGER, "UPDATE jobs SET settings = substr(settings, 2) WHERE name = 'n1'")

    rename = "UPDATE jobs SET settings = 'x' || settings WHERE name = 'n1'"
    at_the_first_photo(monkeypatch, lambda: change(out / LEDGER, rename))
    monkeypatch.setattr(time, "sleep", sleep)
    assert run(manifest, "--out", out).report["done"] == ["n0", "n1"] and len(slept) == 1


def test_one_base_of_two_names_is_one_pack(
    run: Callable[..., Said], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items whose own model is the run's under another name train beside the others."""
    packs, stream = [], pipeline.stream_edits

    def streaming(base: Any, *values: Any, **options: Any) -> Any:
        packs.append(base.name)
        return stream(base, *values, **options)

    monkeypatch.setattr(worker, "stream_edits", streaming)
    manifest = listed(tmp_path, 3, model=[None, str(tiny_folder), None])
    assert run(manifest, "--out", tmp_path / "out").report["done"] == ["n0", "n1", "n2"] and len(packs) == 1


def test_a_run_seen_from_outside(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The status names a run at work, with its edits in training and the time left."""
    seen, out = list[dict[str, Any]](), tmp_path / "out"
    calls.before_each_edit(monkeypatch, lambda count: seen.append(status(out)))
    assert run(listed(tmp_path, 2), "--out", out, "--slots", 1).code == 0
    assert [(one["running"], one["done"]) for one in seen] == [(2, 0), (1, 1)]
    assert [runner["pid"] for one in seen for runner in one["runners"]] == [os.getpid()] * 2
    assert all("1 at work" in one["summary"][1] for one in seen)


def test_no_batch_is_an_error(tmp_path: Path) -> None:
    """A folder without a batch, or a missing folder, has no status and no retry."""
    (tmp_path / "photo").mkdir()
    for command in ("status", "retry"):
        for folder in (tmp_path, tmp_path / "nowhere"):
            said = call(command, folder)
            assert said.code == 2 and str(folder) in said.errors and "batch run" in said.errors


def test_retry_has_the_options(
    run: Callable[..., Said], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`retry` needs no option of the run, and works from any folder: missing items keep their jobs."""
    listed(tmp_path / "photos", 2).unlink()
    monkeypatch.chdir(tmp_path)
    words = ("photos", "--out", "out", "--prompt", SENTENCE, "--seed", 5, "--etas", "0.5", "--background", "black")
    [name, _] = run(*words).report["done"]
    expected = crashes.files_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / name)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    said = call("retry", tmp_path / "out", "--quiet")
    assert said.code == 0 and said.report["done"] == [name]
    found = crashes.files_of(tmp_path / "out")
    edit = edit_file.read(tmp_path / "out" / name / f"{name}.safetensors")
    assert found.keys() == expected.keys() and f"{name}/eta_0.50.png" in found
    assert (edit.seed, edit.target_prompt) == (5, SENTENCE)
    jobs = [json.loads(files[f"{name}/report.json"])["job"] for files in (found, expected)]
    assert jobs[0] == jobs[1]


def test_models_of_their_own(
    run: Callable[..., Said], folder_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items with a model of their own train on it, those of one model in one pack, wherever they stand in the list."""
    packs, stream = [], pipeline.stream_edits

    def streaming(base: Any, *values: Any, **options: Any) -> Any:
        packs.append(base.name)
        return stream(base, *values, **options)

    monkeypatch.setattr(worker, "stream_edits", streaming)
    other = folder_copy.rename(tmp_path / "other")
    weights = next((other / "unet").glob("*.safetensors"))
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    manifest = listed(tmp_path, 3, model=[None, str(other), None])
    assert run(manifest, "--out", tmp_path / "out").code == 0
    made = [edit_file.read(tmp_path / "out" / name / f"{name}.safetensors").base.source for name in ("n0", "n1", "n2")]
    assert made[0] == made[2] != made[1] and len(packs) == len(set(packs)) == 2


@pytest.mark.process
def test_a_killed_run_goes_on(run: Callable[..., Said], tmp_path: Path, tiny_folder: Path) -> None:
    """A process killed while it writes a file of its second item loses no work: the same command ends with the bytes of
    an undisturbed run, and no other files."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    batch = crashes.Batch(manifest, ("--model", str(tiny_folder), *ONE_PICTURE, "--slots", "1"))
    assert batch.dies_at(out, "temporary-written:8") and list(out.glob(".lowmem-imagic/training/*/*/files/.*.tmp"))
    said = run(manifest, "--out", out, "--slots", 1)
    assert said.code == 0 and said.report["done_before"] == ["n0"] and said.report["done"] == ["n1"]
    assert run(manifest, "--out", tmp_path / "expected", "--slots", 1).code == 0
    assert crashes.different(crashes.files_of(out), crashes.files_of(tmp_path / "expected")) == []
