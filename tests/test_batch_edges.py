"""Facts about batches with two faults at once, or faults in an unexpected order."""

import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic.batch.attempts import Attempts
from lowmem_imagic.batch.executors import local as worker
from lowmem_imagic.batch.ledger.file import Entry
from lowmem_imagic.batch.ledger.ledger import LEASE_S, Ledger
from lowmem_imagic.batch.paths import Part
from lowmem_imagic.batch.status import status
from lowmem_imagic.cli.commands import app
from lowmem_imagic.errors import OutputUnwritableError
from tests.test_batch import SENTENCE, photo
from tests.test_batch_faults import (  # noqa: F401  `run` is a fixture
    ONE_PICTURE,
    call,
    limited,
    listed,
    run,
    spoil,
    unreadable,
)
from tests.test_ledger import change, entries, holder, jobs, mounted, opened, path  # noqa: F401  two are fixtures


def test_a_bad_photo_in_a_pack_that_does_not_fit(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where memory runs out beside a photo that is none, the photo is named, the others are made, and the run ends."""
    manifest = listed(tmp_path, 3)
    spoil(tmp_path / "p1.png")
    limited(monkeypatch, 1)
    said = run(manifest, "--out", tmp_path / "out")
    assert said.code == 3 and said.report["left"] == 0 and len(said.report["done"]) == 2


def test_fewer_side_by_side_is_recorded(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Every item's report says that fewer edits trained side by side than were planned."""
    limited(monkeypatch, 1)
    run(listed(tmp_path, 2), "--out", tmp_path / "out")
    for report in (tmp_path / "out").glob("*/report.json"):
        assert json.loads(report.read_text())["rungs"] == ["1 edits side by side"]


def test_disk_space_is_that_of_the_photos(tiny_folder: Path, tmp_path: Path) -> None:
    """A batch says the most that its results take: pictures have the size of their photos, not of the model."""
    sizes = []
    for name in ("small", "large"):
        manifest, out = listed(tmp_path / name, 2), tmp_path / name / "out"
        if name == "large":
            noise = np.random.default_rng(0).integers(0, 255, (1500, 2000, 3), np.uint8)
            Image.fromarray(noise).save(manifest.parent / "p1.png")
        words = ["batch", "run", manifest, "--out", out, "--model", tiny_folder, *ONE_PICTURE]
        result = CliRunner().invoke(app, [word for word in map(str, words) if word != "--quiet"])
        assert result.exit_code == 0, result.output
        sizes += re.findall(r"2 items to make: up to (\d+) MB on disk", result.stderr)
        assert sum(file.stat().st_size for file in out.glob("n*/*")) < int(sizes[-1]) * 1e6
    # The only picture of a photo of 1500 x 2000 px.
    assert 8 <= int(sizes[1]) - int(sizes[0]) <= 10


def test_retry_runs_every_part(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """`batch retry` goes on with the other parts where one has failures, and tells of all of them at once."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    spoil(tmp_path / "p0.png")
    for shard in ("1/2", "2/2"):
        run(manifest, "--out", out, "--shard", shard)
    shutil.rmtree(out / "n1")
    said = call("retry", out, "--quiet", "--json")
    assert said.code == 3 and (out / "n1" / "report.json").is_file()
    assert said.report["total"] == 2 and len(said.report["failed"]) == 1


def test_retry_finds_a_model_named_by_a_relative_path(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`batch retry` finds, from anywhere, a model that was named relative to where the run was started."""
    listed(tmp_path / "photos", 1).unlink()
    monkeypatch.chdir(tiny_folder.parent)
    words = (tmp_path / "photos", "--prompt", SENTENCE, "--out", tmp_path / "out", "--model", tiny_folder.name)
    call("run", *words, *ONE_PICTURE)
    monkeypatch.chdir(tmp_path)
    assert call("retry", tmp_path / "out").code == 0


def test_every_run_tries_anew(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A photo that could not be read in one run has all its tries in the next."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    with monkeypatch.context() as patch:
        unreadable(patch, tmp_path / "p0.png", range(1, 1000))
        run(manifest, "--out", out)
    unreadable(monkeypatch, tmp_path / "p0.png", range(1, 2))
    assert run(manifest, "--out", out).code == 0


def test_items_are_counted_once(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """The status counts an item once, though both the whole list and a part of it were run."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    run(manifest, "--out", out)
    run(manifest, "--out", out, "--shard", "1/2")
    assert status(out)["total"] == 2


def test_a_runner_taken_for_dead_comes_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A runner that was silent too long, and wakes up, claims items that stay its own."""
    clock = [1000.0]
    with opened(path, entries(4)) as one, opened(path, entries(4)) as two:
        change(path, "UPDATE runners SET boot = 'far' WHERE id = ?", one.me)
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])
        two.take_over()
        clock[0] += LEASE_S + 1
        two.take_over()
        first = jobs(one.claim("", 2))
        assert first and not set(first) & set(jobs(two.claim("", 4)))


def test_a_ledger_that_cannot_be_read_any_more(path: Path) -> None:  # noqa: F811
    """Damage during a run is one clear error, at a look as at a change."""
    with opened(path, entries(20000, "n" * 100)) as ledger:
        for end in ("", "-wal"):
            with open(f"{path}{end}", "r+b") as file:
                file.write(os.urandom(4_000_000))
        with pytest.raises(OutputUnwritableError):
            ledger.counts()


def test_what_a_dead_run_held_is_not_running(path: Path, holder: Any) -> None:  # noqa: F811
    """After a run was killed, the status says that its items wait."""
    hidden = path.parent / "out" / ".lowmem-imagic"
    hidden.mkdir(parents=True)
    holder.kill()
    holder.wait()
    for file in path.parent.glob("ledger*"):
        shutil.copy(file, hidden)
    seen = status(path.parent / "out")
    assert not seen["runners"] and (seen["running"], seen["waiting"]) == (0, 3)


def test_a_ledger_closed_on_a_full_disk(tmp_path: Path) -> None:
    """Items of a ledger that could not say goodbye are free for the next one of the same process."""
    with mounted(tmp_path / "disk", "512k") as disk:
        ledger = opened(disk / "ledger", entries(2))
        ledger.claim("", 2)
        with contextlib.suppress(OSError):
            (disk / "ballast").write_bytes(bytes(2**20))
        with pytest.raises(OutputUnwritableError):
            for _ in range(100):
                ledger.note("n", "x" * 5000)
        ledger.close()
        (disk / "ballast").unlink()
        with opened(disk / "ledger", entries(2)) as again:
            assert len(again.claim("", 2)) == 2


def test_a_damaged_ledger_on_a_full_disk(tmp_path: Path) -> None:
    """A ledger that can neither be read nor replaced is one clear error."""
    with mounted(tmp_path / "disk", "512k") as disk:
        (disk / "ledger").write_bytes(b"garbage" * 9)
        with contextlib.suppress(OSError):
            (disk / "ballast").write_bytes(bytes(2**20))
        with pytest.raises(OutputUnwritableError):
            Ledger(disk / "ledger")


def test_one_that_ends_the_process_keeps_nobody_else(path: Path) -> None:  # noqa: F811
    """An item that crashes its process is claimed alone after a few attempts, when the others are done."""
    done: set[str] = set()
    for _ in range(20):
        with opened(path, entries(20)) as ledger:
            for job in done:
                change(path, "UPDATE jobs SET state = 'done' WHERE job = ?", job)
            while claimed := jobs(ledger.claim("", 4)):
                if "0" in claimed:
                    break
                for job in claimed:
                    ledger.finish(job, 0.0)
                    done.add(job)
            else:
                break
    assert done == {str(n) for n in range(1, 20)} and claimed == ["0"]


def test_a_damaged_model_of_one_item(run: Any, tmp_path: Path, folder_copy: Path) -> None:  # noqa: F811
    """Items of a model that cannot be loaded fail with its name; those of other models are made."""
    from safetensors.torch import load_file, save_file

    weights = next((folder_copy / "unet").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, weights)
    manifest = listed(tmp_path, 2, model=[str(folder_copy), None])
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text("\n".join(json.dumps({k: v for k, v in line.items() if v is not None}) for line in lines))
    said = run(manifest, "--out", tmp_path / "out")
    assert said.code == 3 and said.report["done"] == ["n1"] and said.report["left"] == 0


def test_a_state_of_another_version_is_not_used(
    run: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A saved training state that does not fit is left, with a word in the log, and the edit is made from the start."""
    import torch

    from lowmem_imagic.batch.states import States
    from lowmem_imagic.training.state import TrainingState

    state = TrainingState(
        stage="finetune",
        losses={"embed": [1.0], "finetune": [1.0]},
        generator=torch.zeros(7, dtype=torch.uint8),
        finished={"embeds": torch.zeros(3, 3)},
        trained={},
        shapes={"unet": [4, 16, 16]},
        measured={},
    )
    plain = run(listed(tmp_path, 2), "--out", tmp_path / "plain")
    monkeypatch.setattr(States, "load", lambda self, assignment: state)
    said = run(tmp_path / "list.jsonl", "--out", tmp_path / "out")
    assert plain.code == said.code == 0
    one, other = ((tmp_path / out / "n1" / "eta_0.00.png").read_bytes() for out in ("plain", "out"))
    assert one == other


def test_a_state_that_is_too_large_fails_nothing(
    run: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Edits whose training states are above the limit are made without them, with one warning."""
    from lowmem_imagic.training import state as training_state

    monkeypatch.setattr(training_state, "MAX_BYTES", 1000)
    said = run(listed(tmp_path, 2), "--out", tmp_path / "out", "--save-every", 1)
    assert said.code == 0 and said.report["done"] == ["n0", "n1"]
    [warning] = [record.getMessage() for record in caplog.records if "not saved" in record.getMessage()]
    assert "at most 968 are allowed" in warning


def test_ctrl_c_with_nobody_to_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop is taken note of though standard error's reader ended of the same Ctrl-C."""
    import signal

    from lowmem_imagic.batch.stopping import listening

    def gone(*_: object) -> int:
        raise BrokenPipeError

    with listening() as stop:
        monkeypatch.setattr(os, "write", gone)
        signal.raise_signal(signal.SIGINT)
        monkeypatch.undo()
        assert stop.asked


def test_names_that_are_no_text(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """A photo whose name is not UTF-8 is made or named like any other; so is a seed that is no number."""
    (tmp_path / "photos").mkdir()
    Path(os.fsdecode(bytes(tmp_path / "photos") + b"/bad\xff.png")).write_bytes(b"no picture")
    assert run(tmp_path / "photos", "--prompt", SENTENCE, "--out", tmp_path / "out").code == 3
    (tmp_path / "list.csv").write_text("photo,sentence,seed\na.png,a cat,²\n", encoding="utf-8")
    assert run(tmp_path / "list.csv", "--out", tmp_path / "other").code == 3


def test_a_moved_folder_is_gone_on_with_where_it_is(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """`batch retry` of a folder that was moved works on that folder."""
    out, moved = tmp_path / "out", tmp_path / "moved"
    run(listed(tmp_path, 2), "--out", out)
    out.rename(moved)
    shutil.rmtree(moved / "n1")
    assert call("retry", moved, "--quiet").code == 0
    assert (moved / "n1" / "report.json").is_file() and not out.exists()


def test_a_part_and_the_whole_do_not_run_at_once(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """While a part of a list is being run, the whole is refused, and another part of as many is not."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    part = Part(1, 2).ledger(out)
    part.parent.mkdir(parents=True)
    with Ledger(part):
        said = run(manifest, "--out", out)
        assert said.code == 2 and f"--shard 1/2 is being run into {out} by process {os.getpid()}" in said.errors
        assert run(manifest, "--out", out, "--shard", "2/2").report["done"] == ["n1"]
    assert run(manifest, "--out", out).report["done"] == ["n0"]


def test_parts_and_the_whole_are_one_batch(run: Any, tmp_path: Path) -> None:  # noqa: F811
    """Run in parts, changed, and run as a whole, a list has its items once, in its order; so has its retry."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    for shard in ("1/2", "2/2"):
        run(manifest, "--out", out, "--shard", shard)
    assert [item["name"] for item in status(out)["items"]] == ["n0", "n1", "n2"]
    manifest.write_text(manifest.read_text().replace(SENTENCE, f"{SENTENCE} again"))
    with Ledger(Part().ledger(out)) as ledger:
        entry = Entry("another sentence", 0, "line 1", "n0", settings="its own")
        ledger.register([entry], finished=lambda entry: False)
        assert [item["state"] for item in status(out)["items"]] == ["done", "done", "done"]
        (out / "n0" / "report.json").unlink()
        assert [item["state"] for item in status(out)["items"]] == ["waiting", "done", "done"]
    assert run(manifest, "--out", out, "--force").code == 0
    assert status(out)["summary"] == [f"{out}: 3 items: 3 done"]
    said = call("retry", out)
    assert said.code == 0 and said.report["total"] == 3


def test_a_photo_that_changes(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A photo that has changed since the run began fails by name, and the next run edits the changed photo."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"
    load = worker.load_photo

    def changing(file: Path, **words: Any) -> Any:
        if file.name == "p1.png":
            photo(file, 7)
        return load(file, **words)

    with monkeypatch.context() as patch:
        patch.setattr(worker, "load_photo", changing)
        said = run(manifest, "--out", out)
    assert said.code == 3 and said.report["done"] == ["n0"]
    assert "p1.png has changed since the run began" in said.report["failed"][0]["reason"]
    assert run(manifest, "--out", out).report["done"] == ["n1"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_one_folder_that_cannot_be_written(
    run: Any,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    """An item with a read-only folder fails alone, also if the folder became read-only during the run."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    out.mkdir()
    with contextlib.ExitStack() as disks:
        if when == "before":
            disks.enter_context(mounted(out / "n1", "64m"))
            subprocess.run(("mount", "-o", "remount,ro", str(out / "n1")), check=True)
        else:
            replace = os.replace

            def replacing(source: Path, target: Path) -> None:
                if Path(target).parent == out / "n1":
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                replace(source, target)

            monkeypatch.setattr(os, "replace", replacing)
        said = run(manifest, "--out", out)
    assert said.code == 3 and sorted(said.report["done"]) == ["n0", "n2"] and said.report["left"] == 0
    assert "n1" in said.report["failed"][0]["reason"] and "read-only" in said.report["failed"][0]["reason"].lower()


def test_states_saved_in_between_are_kept(tmp_path: Path) -> None:
    """Unwanted states are removed; a state saved during the query for wanted states stays."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "state").write_bytes(b"1")

    def wanted() -> list[str]:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / "state").write_bytes(b"2")
        return []

    Attempts(tmp_path).keep(wanted)
    assert os.listdir(tmp_path) == ["new"]


def test_a_runner_that_cannot_be_seen(path: Path) -> None:  # noqa: F811
    """Of one on another machine, or from before this one's last start, the status does not say that it is at work."""
    out = path.parent / "out"
    whole = Part().ledger(out)
    whole.parent.mkdir(parents=True)
    with opened(whole, entries(2)) as ledger:
        ledger.claim("", 1)
        change(whole, "UPDATE runners SET boot = 'another'")
        seen = status(out)
    assert seen["runners"][0]["alive"] is None and "not visible from here" in seen["summary"][1]
    assert not any("at work" in line for line in seen["summary"])
