"""Facts about several processes on one folder: they share the work, and one that crashes harms nobody."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowmem_imagic.batch.executors.processes import cpu_environments, gpu_environments
from lowmem_imagic.batch.ledger.file import DONE, snapshot
from tests.crashes import files_of
from tests.test_batch import QUICK, SENTENCE, photo

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


def start(manifest: Path, out: Path, tiny_folder: Path) -> subprocess.Popen[str]:
    """``batch run --workers 2`` as a process of its own."""
    words = ("batch", "run", str(manifest), "--out", str(out), "--model", str(tiny_folder), "--device", "cpu")
    return subprocess.Popen(
        (sys.executable, "-m", "lowmem_imagic", *words, *QUICK, "--workers", "2", "--slots", "1", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(out: Path, done: int) -> None:
    """Until so many items are done."""
    for _ in range(3000):
        seen = snapshot(out / ".lowmem-imagic" / "ledger.sqlite3")
        if seen is not None and sum(entry.state == DONE for entry in seen.entries) >= done:
            return
        time.sleep(0.1)
    raise AssertionError("nothing happens")


@pytest.mark.process
def test_a_process_that_is_killed_is_started_again(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Two processes make every item once, though one is killed on the way; nothing is left behind."""
    out = tmp_path / "out"
    run = start(manifest, out, tiny_folder)
    wait_for(out, 1)
    os.kill(children(run.pid)[0], signal.SIGKILL)
    said, errors = run.communicate(timeout=300)
    assert run.returncode == 0, errors
    tally = json.loads(said)
    assert sorted(tally["done"]) == [f"n{n}" for n in range(ITEMS)] and not tally["failed"]
    assert len(files_of(out)) == 5 * ITEMS


@pytest.mark.process
def test_ctrl_c_reaches_every_process_once(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Ctrl-C ends all of them in good order; the same command goes on with what is left."""
    out = tmp_path / "out"
    run = start(manifest, out, tiny_folder)
    wait_for(out, 1)
    below = children(run.pid)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 130 and "Traceback" not in errors, errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in below)
    run = start(manifest, out, tiny_folder)
    said, errors = run.communicate(timeout=300)
    tally = json.loads(said)
    assert run.returncode == 0 and len(tally["done"]) + len(tally["done_before"]) == ITEMS
    assert tally["done_before"] and len(files_of(out)) == 5 * ITEMS


@pytest.mark.process
def test_an_error_of_all_is_said_once(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """What no process can do, such as writing where nothing can be written, is one line and the right exit code."""
    (tmp_path / "list.jsonl").write_text("")
    run = start(manifest, tmp_path / "out", tiny_folder)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 2 and errors.count("has no items") == 1 and "Traceback" not in errors


def test_each_process_has_its_own_part_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs are given out one by one, of those that may be seen; cores in equal parts."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert list(gpu_environments(2)) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert list(gpu_environments(2)) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert list(cpu_environments(2)) == [{"OMP_NUM_THREADS": "4"}] * 2
