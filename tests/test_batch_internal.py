# ruff: noqa: F811  fixtures of another file
"""Facts about unexpected errors in batches: no such error ends a run or fails another item."""

import errno
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_imagic.actions import edit as commands
from lowmem_imagic.batch.executors import local as worker
from lowmem_imagic.engine import base as base_model
from lowmem_imagic.pipeline import make as pipeline
from lowmem_imagic.pipeline import prepare as preparation
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.settings.stages import FinetuneConfig
from lowmem_imagic.training.loop import Trainer
from lowmem_imagic.training.run import Run
from tests.test_batch_faults import ONE_PICTURE, Said, call, items, limit, listed, run  # noqa: F401
from tests.test_nonfinite import PARTS, damage, schedule

LOG = ".lowmem-imagic/errors.log"


class Odd(Exception):
    """An error of no library in particular."""


ERRORS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied\nmore lines"),
    ValueError("tensor holds NaN"),
    KeyError("conv\x1b[31m"),
    IndexError("list index out of range"),
    RecursionError("maximum recursion depth exceeded"),
    AssertionError(),
    OSError(errno.EBADF, "Bad file descriptor"),
    sqlite3.OperationalError("no such table"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    NotImplementedError("no kernel"),
    Odd("\u202eodd\r\nline"),
    torch.linalg.LinAlgError("svd did not converge"),
    StopIteration(),
    TimeoutError("late"),
]


def fail_for(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, error: Exception, picks: Callable[..., bool]
) -> None:
    """Makes a function raise where `picks` says so of its arguments."""
    before = getattr(owner, name)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if picks(*args, **kwargs):
            raise error
        return before(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)


def of_item(name: str) -> Callable[..., bool]:
    """Picks calls about the item whose photo has this name."""
    return lambda *args, **kwargs: any(name in str(getattr(arg, "name", arg)) for arg in (*args, *kwargs.values()))


def only_n1_failed(said: Said, out: Path, kind: str = "internal") -> str:
    """Makes sure that of three items one failed; returns its reason."""
    assert (said.code, sorted(said.report["done"])) == (3, ["n0", "n2"]), said
    [bad] = said.report["failed"]
    seen = items(out)
    assert bad["name"] == "n1" and (seen["n1"]["state"], seen["n1"]["kind"]) == ("failed", kind)
    assert "Traceback" not in said.errors and "\x1b" not in said.errors and "\u202e" not in said.errors
    return str(bad["reason"])


def errors_of_items(
    run: Callable[..., Said], tmp_path: Path, count: int, *words: object
) -> tuple[dict[str, str], dict[str, str]]:
    """A batch of which all items but the first and the last fail for themselves: their reasons and kinds, by name."""
    manifest, out = listed(tmp_path, count + 2), tmp_path / "out"
    said = run(manifest, "--out", out, *words)
    assert (said.code, sorted(said.report["done"])) == (3, sorted(["n0", f"n{count + 1}"])), said
    assert "Traceback" not in said.errors and "\x1b" not in said.errors and "\u202e" not in said.errors
    kinds = {name: item["kind"] for name, item in items(out).items() if item["state"] == "failed"}
    return {bad["name"]: bad["reason"] for bad in said.report["failed"]}, kinds


def test_errors_while_photos_are_read(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the error, its item fails with its kind and its first line; where it came from is in a file."""
    for number, error in enumerate(ERRORS, 1):
        fail_for(monkeypatch, worker, "load_photo", error, of_item(f"p{number}.png"))
    reasons, kinds = errors_of_items(run, tmp_path, len(ERRORS), "--slots", 3)
    assert set(kinds.values()) == {"internal"}
    for number, error in enumerate(ERRORS, 1):
        reason = reasons[f"n{number}"]
        assert f"unexpected error ended this: {type(error).__name__}" in reason and "\n" not in reason
    log = (tmp_path / "out" / LOG).read_text()
    assert log.count("Traceback") >= len(ERRORS) and log.count("in failing") >= len(ERRORS)


def test_errors_while_a_pack_trains(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that breaks off is tried again edit by edit: those at fault fail, the others are made."""
    errors = {"p1": ERRORS[0], "p2": ERRORS[2], "p3": ERRORS[11]}
    encoded, begin = preparation.EncodedPhoto, Trainer.begin
    faults: list[tuple[Tensor, Exception]] = []

    def encoding(number: int, job: Job, box: Any, latents: dict[str, Tensor], *start: Any) -> Any:
        if job.photo.name in errors:
            faults.append((latents["unet"], errors[job.photo.name]))
        return encoded(number, job, box, latents, *start)

    def beginning(self: Trainer, slot: int, run: Run, rates: Any = None) -> None:
        for latents, error in faults:
            if isinstance(run.config, FinetuneConfig) and run.latents is latents:
                raise error
        begin(self, slot, run, rates)

    monkeypatch.setattr(preparation, "EncodedPhoto", encoding)
    monkeypatch.setattr(Trainer, "begin", beginning)
    reasons, kinds = errors_of_items(run, tmp_path, len(errors), "--slots", 3)
    assert set(kinds.values()) == {"internal"}
    assert all(type(error).__name__ in reasons[f"n{number}"] for number, error in enumerate(errors.values(), 1))


def test_errors_while_results_are_made(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendering, writing and reporting fail for their own item."""
    places: list[tuple[Any, str, Callable[..., bool]]] = [
        (worker, "finished_edit", of_item("n1")),
        (commands, "render", lambda base, made, *_, photo, **__: photo.name.startswith("p2")),
        (worker.publishing, "publish", lambda attempt, results, folder, *_, **__: "n3" in str(folder)),
        (worker.publishing, "pictures_of_report", lambda folder: "n4" in str(folder)),
    ]
    for owner, name, picks in places:
        fail_for(monkeypatch, owner, name, ValueError("no such thing"), picks)
    reasons, kinds = errors_of_items(run, tmp_path, len(places))
    assert set(kinds.values()) == {"internal"}
    for name, reason in reasons.items():
        written = (tmp_path / "out" / name / f"{name}.safetensors").exists()
        assert "ValueError" in reason and ("the edit itself is finished" in reason) == written


def test_an_error_in_the_numbers_of_one_edit(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finishing a trained edit may fail for one edit of a pack."""
    manifest, out, calls = listed(tmp_path, 3), tmp_path / "out", Counter[str]()
    edit = pipeline.Edit

    def making(**fields: Any) -> Any:
        calls["made"] += 1
        if fields["source"].sha256 == worker.load_photo(tmp_path / "p1.png").sha256:
            raise RuntimeError("lapack")
        return edit(**fields)

    monkeypatch.setattr(pipeline, "Edit", making)
    only_n1_failed(run(manifest, "--out", out, "--slots", 3), out)


def test_running_out_of_memory_where_nobody_looks(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that runs out outside the guards is a failure for want of memory, which the next run tries again."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    error = torch.OutOfMemoryError("CUDA out of memory")
    fail_for(monkeypatch, worker, "finished_edit", error, of_item("n1"))
    assert "out of memory" in only_n1_failed(run(manifest, "--out", out), out, kind="memory")


def test_an_error_while_the_list_is_looked_at(
    run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that cannot even be looked at is named with the bad lines; `batch retry --failed` tries it again."""
    from lowmem_imagic.batch import runner

    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_for(patch, runner, "photo_file", MemoryError(), of_item("p0.png"))
        fail_for(patch, runner, "photo_file", ERRORS[10], of_item("p1.png"))
        said = run(manifest, "--out", out)
    assert said.code == 3 and said.report["done"] == ["n2"]
    assert {item["kind"] for item in items(out).values()} == {"internal", "memory", None}
    again = call("retry", out, "--failed")
    assert again.code == 0 and again.report["left"] == 0


def test_an_error_of_the_crew_itself(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any error of an executor becomes the failure of its items, and the run reports."""
    manifest, out = listed(tmp_path, 2), tmp_path / "out"

    def make(*_: Any, **__: Any) -> Any:
        raise Odd("broken crew")
        yield

    monkeypatch.setattr(worker.LocalExecutor, "make", make)
    said = run(manifest, "--out", out)
    assert said.code == 3 and len(said.report["failed"]) == 2 and "Odd: broken crew" in said.errors


def test_the_log_is_no_way_out_of_the_folder(run: Callable[..., Said], tmp_path: Path) -> None:
    """A link in place of the log is not followed: the run ends with an error, and makes no items."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    (out / LOG).parent.mkdir(parents=True)
    (target := tmp_path / "precious").write_text("mine")
    (out / LOG).symlink_to(target)
    said = run(manifest, "--out", out)
    assert said.code == 1 and "errors.log is a link" in said.errors
    assert target.read_text() == "mine"


def test_stopping_is_no_error(run: Callable[..., Said], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C goes through every one of these boundaries."""
    fail_for(monkeypatch, worker, "finished_edit", KeyboardInterrupt(), of_item("n1"))  # type: ignore[arg-type]
    assert run(listed(tmp_path, 3), "--out", tmp_path / "out").code == 130


def test_models_with_a_bad_number_fail_their_own_items(
    run: Callable[..., Said], tiny_folder: Path, tmp_path: Path
) -> None:
    """Items of a damaged model fail one by one, by the part; those of another go on, whichever comes first."""
    models = list[str | None]()
    for number, part in enumerate(PARTS):
        folder = Path(shutil.copytree(tiny_folder, tmp_path / f"damaged-{number}"))
        models += [str(damage(folder, *PARTS[part], float("nan"))), None]
    # Of one of them two items, the second after those of the other model.
    manifest, out = listed(tmp_path, len(models) + 1, model=[*models, models[0]]), tmp_path / "out"
    good = [f"n{number}" for number, model in enumerate(models) if model is None]
    said = run(manifest, "--out", out)
    assert said.code == 3 and sorted(said.report["done"]) == sorted(good), said
    reasons = {bad["name"]: bad["reason"] for bad in said.report["failed"]}
    expected = {f"n{2 * number}": part for number, part in enumerate(PARTS)} | {f"n{len(models)}": next(iter(PARTS))}
    assert reasons.keys() == expected.keys() and all(part in reasons[name] for name, part in expected.items())
    assert "learning rate" not in said.errors
    assert sorted(run(manifest, "--out", out).report["done_before"]) == sorted(good)


def test_a_schedule_that_divides_by_zero_does_not_block(
    run: Callable[..., Said], folder_copy: Path, tmp_path: Path
) -> None:
    """A model that cannot be sampled, first in the list, does not keep the others from being made."""
    model = str(schedule(folder_copy, rescale_betas_zero_snr=True, timestep_spacing="trailing"))
    said = run(listed(tmp_path, 3, model=[model, None, None]), "--out", tmp_path / "out")
    assert said.code == 3 and said.report["done"] == ["n1", "n2"] and "noise schedule" in said.errors


def test_one_word_that_the_text_encoder_cannot_read(
    run: Callable[..., Said], folder_copy: Path, tmp_path: Path
) -> None:
    """Damage that only one sentence meets fails the items with that sentence."""
    base = base_model.BaseModel.load(str(folder_copy), device="cpu")
    tokens = [set(base.family.tokenizers["text_encoder"](s).input_ids) for s in ("a grass cube", "a photo")]
    token = min(tokens[0] - tokens[1])
    path = folder_copy / "text_encoder/model.safetensors"
    tensors = load_file(path)
    [name] = [name for name in tensors if name.endswith("token_embedding.weight")]
    tensors[name][token] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    manifest = listed(tmp_path, 3, sentence=["a photo", "a grass cube", "a photo"])
    out = tmp_path / "out"
    reason = only_n1_failed(
        call("run", "--model", folder_copy, *ONE_PICTURE, manifest, "--out", out), out, kind="input"
    )
    assert "the text encoder" in reason
