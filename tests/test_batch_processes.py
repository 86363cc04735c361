"""Facts about several processes on one folder: they share the work, and a crash of one does not harm the others."""

import json
import os
import signal
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_imagic.actions.console import Silent
from lowmem_imagic.batch import run as batch_run
from lowmem_imagic.batch.executors.processes import cpu_environments, gpu_environments
from lowmem_imagic.batch.ledger.file import DONE, snapshot
from lowmem_imagic.batch.manifest import Summary
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.stopping import Stop
from tests.crashes import files_of
from tests.processes import Process
from tests.test_batch import QUICK, SENTENCE, photo
from tests.test_batch_faults import listed, spoil

ITEMS = 8


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A list of photos."""
    lines = []
    for number in range(ITEMS):
        photo(tmp_path / f"p{number}.png", number)
        lines.append({"photo": f"p{number}.png", "sentence": SENTENCE, "name": f"n{number}"})
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def start(manifest: Path, out: Path, tiny_folder: Path) -> Process:
    """``batch run --workers 2`` in its own process; the two processes that it starts are cold, like a user's."""
    words = ("batch", "run", str(manifest), "--out", str(out), "--model", str(tiny_folder), "--device", "cpu")
    return Process("lowmem_imagic", *words, *QUICK, "--workers", "2", "--slots", "1", "--json")


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def done(out: Path) -> list[str]:
    """Names of the items that are done."""
    seen = snapshot(out / ".lowmem-imagic" / "ledger.sqlite3")
    return [] if seen is None else [entry.name for entry in seen.entries if entry.state == DONE]


def wait_for(out: Path, count: int) -> None:
    """Until so many items are done."""
    for _ in range(3000):
        if len(done(out)) >= count:
            return
        time.sleep(0.1)
    raise AssertionError("nothing happens")


@pytest.mark.process
def test_processes_that_are_stopped_and_killed(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C ends all processes in good order. The same command continues with the rest and makes every item once, even
    if a process is killed; no temporary files are left."""
    out = tmp_path / "out"
    run = start(manifest, out, tiny_folder)
    wait_for(out, 1)
    below = children(run.pid)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 130 and "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    before = set(done(out))
    run = start(manifest, out, tiny_folder)
    wait_for(out, len(before) + 1)
    os.kill(children(run.pid)[0], signal.SIGKILL)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0 and "ended without a word (signal 9); it is started again" in errors, errors
    tally = json.loads(said)
    assert before and set(tally["done_before"]) == before and not tally["failed"]
    assert sorted(tally["done"] + tally["done_before"]) == [f"n{n}" for n in range(ITEMS)]
    assert len(files_of(out)) == 5 * ITEMS


@pytest.mark.process
def test_processes_tell_what_they_made(tiny_folder: Path, tmp_path: Path) -> None:
    """The summary of several processes is about the files, as that of one: an item that is made again was not done
    before, and one that was, was, though the ledger is lost. A warning of theirs is shown once."""
    manifest, out = listed(tmp_path, 3), tmp_path / "out"
    spoil(tmp_path / "p2.png")

    def run() -> tuple[list[str], list[str]]:
        said, errors = (run := start(manifest, out, tiny_folder)).communicate(timeout=300)
        assert run.returncode == 3 and errors.count("line 3 (n2)") == 1, errors
        report = json.loads(said)
        assert (report["total"], report["left"], [bad["name"] for bad in report["failed"]]) == (3, 0, ["n2"])
        return sorted(report["done"]), sorted(report["done_before"])

    assert run() == (["n0", "n1"], [])
    (out / "n1" / "eta_0.00.png").unlink()
    assert run() == (["n1"], ["n0"])
    (out / ".lowmem-imagic" / "ledger.sqlite3").unlink()
    assert run() == ([], ["n0", "n1"])


@pytest.mark.process
def test_an_error_of_all_is_said_once(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """An error of all processes, such as an unwritable folder, is one line and the right exit code."""
    (tmp_path / "list.jsonl").write_text("")
    run = start(manifest, tmp_path / "out", tiny_folder)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 2 and errors.count("has no items") == 1 and "Traceback" not in errors


def test_each_process_has_its_own_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are given out in turn, of those that may be seen and are there; cores in equal parts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in gpu_environments(3, 2)] == ["3", "5", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in gpu_environments(2, 2)] == ["0", "1"]
    # Number 1 is a GPU that is not there, and "auto" would train on the CPU.
    assert [e["CUDA_VISIBLE_DEVICES"] for e in gpu_environments(2, 1)] == ["0", "0"]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert list(cpu_environments(2)) == [{"OMP_NUM_THREADS": "4"}] * 2


@pytest.mark.parametrize(
    ("device", "gpus", "environments", "vram"),
    [
        ("auto", 1, ["0", "0", "0"], "2.40GB"),
        ("cuda", 2, ["0", "1", "0"], "3.60GB"),
        ("cuda", 3, ["0", "1", "2"], None),
        ("cuda:1", 2, [None, None, None], "2.40GB"),
    ],
)
def test_processes_that_share_a_gpu(
    device: str,
    gpus: int,
    environments: list[str | None],
    vram: str | None,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More processes than GPUs share them and their memory; none is left without one, to train on the CPU."""
    orders: list[Any] = []

    def run_in_processes(order: Any, places: Any, *_: Any, **__: Any) -> Summary:
        orders.append((order["vram"], [place.get("CUDA_VISIBLE_DEVICES") for place in places]))
        return Summary(0, done=[], before=[], failed=[])

    place = torch.device("cuda" if device == "auto" else device)
    monkeypatch.setattr(batch_run, "pick_device", lambda _: place)
    monkeypatch.setattr(batch_run, "run_in_processes", run_in_processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    memory = types.SimpleNamespace(total_memory=8e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: memory)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = {"manifest": str(manifest), "out": str(tmp_path / "out"), "device": device, "workers": 3}
    batch_run.run(Request.of(values), Silent(), Stop())
    assert orders == [(vram, environments)]


def test_a_cluster_is_driven_from_a_machine_without_its_device(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray batch for GPUs starts on a machine that has none."""
    orders: list[Any] = []

    def run_in_processes(order: Any, *_: Any, **__: Any) -> Summary:
        orders.append(order)
        return Summary(0, done=[], before=[], failed=[])

    monkeypatch.setattr(batch_run, "run_in_processes", run_in_processes)
    monkeypatch.setattr(batch_run, "check_executor", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = {"manifest": str(manifest), "out": str(tmp_path / "out"), "device": "cuda", "executor": "ray"}
    batch_run.run(Request.of({**values, "address": "127.0.0.1:1"}), Silent(), Stop())
    assert [order["device"] for order in orders] == ["cuda"]
