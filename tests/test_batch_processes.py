"""Facts about several processes on one folder: they share the work, and a crash of one does not harm the others."""

import contextlib
import json
import os
import signal
import subprocess
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_imagic import children as children_of
from lowmem_imagic.actions.console import Silent
from lowmem_imagic.batch import run as batch_run
from lowmem_imagic.batch import run_one
from lowmem_imagic.batch.executors import build
from lowmem_imagic.batch.executors.processes import cpu_environments, gpu_environments
from lowmem_imagic.batch.executors.ray import RayExecutor
from lowmem_imagic.batch.ledger.file import DONE, snapshot
from lowmem_imagic.batch.manifest import Summary
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.stopping import Stop
from lowmem_imagic.children import command_of, environment
from tests.crashes import files_of
from tests.processes import Process
from tests.test_batch import QUICK, SENTENCE, photo
from tests.test_batch_faults import listed, spoil
from tests.test_scale import Publisher

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
    ("device", "gpus", "environments", "asked", "own"),
    [
        ("auto", 1, ["0", "0", "0"], None, {"device": "cuda", "vram": "2.40GB"}),
        ("cuda", 2, ["0", "1", "0"], None, {"device": "cuda", "vram": "3.60GB"}),
        ("cuda", 3, ["0", "1", "2"], None, {"device": "cuda"}),
        ("cuda", 3, ["0", "1", "2"], "6GB", {"device": "cuda"}),
        ("cuda:1", 2, [None, None, None], None, {"device": "cuda:1", "vram": "2.40GB"}),
        ("auto", 1, ["0", "0", "0"], "6GB", {"device": "cuda", "vram": "2.00GB"}),
        ("auto", 1, ["0", "0", "0"], "80GB", {"device": "cuda", "vram": "2.40GB"}),
        ("cpu", 0, [None, None, None], "6GB", {"device": "cpu", "vram": "2.00GB"}),
        ("cpu", 0, [None, None, None], None, {"device": "cpu"}),
    ],
)
def test_processes_that_share_a_gpu(
    device: str,
    gpus: int,
    environments: list[str | None],
    asked: str | None,
    own: dict[str, Any],
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More processes than GPUs share them and their memory, or what `vram` says of it; none is left without one, to
    train on the CPU. The ledger keeps the request as it was given."""
    orders: list[Any] = []

    def run_in_processes(order: Any, places: Any, *_: Any, own: Any, **__: Any) -> Summary:
        assert order == request.as_json()
        orders.append((own, [place.get("CUDA_VISIBLE_DEVICES") for place in places]))
        return Summary(0, done=[], before=[], failed=[])

    place = torch.device("cuda" if device == "auto" else device)
    monkeypatch.setattr(batch_run, "pick_device", lambda _: place)
    monkeypatch.setattr(batch_run, "run_in_processes", run_in_processes)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    # A small GPU that is not named takes nothing from the others.
    memory = {number: types.SimpleNamespace(total_memory=8e9) for number in range(gpus)}
    if device == "cuda:1":
        memory[0].total_memory = 2e9
    monkeypatch.setattr(torch.cuda, "get_device_properties", memory.__getitem__)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    values = {"manifest": str(manifest), "out": str(tmp_path / "out"), "device": device, "workers": 3, "vram": asked}
    request = Request.of(values)
    batch_run.run(request, Silent(), Stop())
    assert orders == [(own, environments)]


def test_a_cluster_is_driven_from_a_machine_without_its_device(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Ray batch for GPUs starts on a machine that has none; its actors get the device that was asked for."""
    orders: list[Any] = []

    def run_in_processes(order: Any, *_: Any, own: Any, **__: Any) -> Summary:
        orders.append((order, own))
        return Summary(0, done=[], before=[], failed=[])

    monkeypatch.setattr(batch_run, "run_in_processes", run_in_processes)
    monkeypatch.setattr(batch_run, "check_executor", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    values = {"manifest": str(manifest), "out": str(tmp_path / "out"), "device": "cuda", "executor": "ray"}
    batch_run.run(Request.of({**values, "address": "127.0.0.1:1"}), Silent(), Stop())
    [(order, own)] = orders
    assert order["device"] == "cuda" and own["device"] == "cpu"
    # The driver itself: it finds the items' jobs, and fails none for want of a GPU.
    driven: list[Any] = []

    class Executor(Publisher):
        def __init__(self, request: Request, *_: Any) -> None:
            driven.append(request["device"])
            super().__init__(tmp_path / "out")

    monkeypatch.setattr(batch_run, "RayExecutor", lambda *args: contextlib.nullcontext(Executor(*args)))
    summary = batch_run.run(Request.of({**values, "address": "127.0.0.1:1"}), Silent(), Stop(), own=own)
    assert len(summary.done) == ITEMS and driven == ["cuda"]


@pytest.mark.parametrize(
    ("device", "gpus", "given"), [("auto", 2.0, "cuda"), ("auto", 0.0, "auto"), ("cpu", 2.0, "cpu")]
)
def test_an_actor_with_a_gpu_trains_on_it(device: str, gpus: float, given: str) -> None:
    """On a machine whose torch does not see the GPU that Ray gives an actor, "auto" must not mean the CPU."""
    executor: Any = object.__new__(RayExecutor)
    orders: list[Any] = []
    kind = types.SimpleNamespace(remote=orders.append)
    executor._ray = types.SimpleNamespace(
        cluster_resources=lambda: {"GPU": gpus, "CPU": 8.0},
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 8.0, "GPU": gpus}}],
        remote=lambda **_: lambda actor: kind,
    )
    executor._request, executor._actor = Request.of({"device": device, "manifest": "m", "out": "o"}), object
    executor._actors()
    assert {order["device"] for order in orders} == {given}


def test_a_process_saves_its_states_at_sigterm(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job scheduler sends SIGTERM to every process of a batch: each asks its training to stop, and says so."""

    def at_work(request: Request, console: Any, stop: Stop, **_: Any) -> Summary:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        stop.check()
        raise AssertionError("it goes on")

    order = {"request": {"manifest": str(manifest), "out": str(tmp_path)}, "own": {}, "retry": [], "continues": None}
    read, write = os.pipe()
    os.write(write, json.dumps(order).encode() + b"\n")
    before = signal.getsignal(signal.SIGTERM)
    try:
        with open(read) as pipe:
            monkeypatch.setattr("sys.stdin", pipe)
            monkeypatch.setattr(batch_run, "run", at_work)
            run_one.main()
            os.close(write)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads(capsys.readouterr().out) == {"stopped": True}


def test_a_process_takes_no_module_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder that a batch is started in may hold anything, and files in it are no part of the program."""
    for name in ("json.py", "torch.py", "accelerate.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'taken')!r}, 'w')")
    subprocess.run(command_of("lowmem_imagic.batch.status"), cwd=tmp_path, env=environment(), check=True, timeout=400)
    assert not (tmp_path / "taken").exists()
    # In a clone without an installation the current folder alone leads to the package.
    clone = str(Path(children_of.__file__).resolve().parents[1])
    monkeypatch.setattr("sys.path", [clone, "/somewhere"])
    monkeypatch.setenv("PYTHONPATH", "/else")
    assert environment()["PYTHONPATH"] == os.pathsep.join([clone, "/else"])
    monkeypatch.setattr("sys.path", ["", clone])
    assert environment()["PYTHONPATH"] == "/else"


@pytest.mark.parametrize("order", [(None, "X"), ("X", None)])
def test_the_folders_of_a_request_are_those_of_its_own_model(
    order: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item that names the request's own model gets it as it is, without `vae`, whichever item comes first."""
    monkeypatch.setattr(build, "open_base", lambda options, *_: options)
    bases = build.OpenBases(Request.of({"model": "X", "vae": "DIR", "manifest": "m", "out": "o"}), Silent())
    opened: dict[str | None, Any] = {name: bases(name) for name in order}
    assert (opened[None].vae, opened["X"].vae) == ("DIR", None)
    assert bases(None) is opened[None] and bases("X") is opened["X"]
