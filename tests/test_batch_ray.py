"""Facts about batches on Ray, on a real local cluster of several nodes: every item is made, even if actors are lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest
from typer.testing import CliRunner

from lowmem_imagic.cli.commands import app
from tests.crashes import least_psnr
from tests.processes import Process
from tests.test_batch import QUICK, SENTENCE, photo
from tests.test_batch_processes import children, wait_for

pytest.importorskip("ray")
pytestmark = pytest.mark.ray

ITEMS = 6


@dataclass
class Cluster:
    """A cluster in its own process."""

    address: str
    orders: IO[str]
    folder: Path
    """A folder for each node's temporary files."""

    @property
    def folders_of_actors(self) -> list[Path]:
        """The folders of actors, with photos, on all nodes."""
        return list(self.folder.glob("*/lowmem-imagic-ray-*"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that runs nothing, and two nodes of one core."""
    folder = tmp_path_factory.mktemp("nodes")
    words = (sys.executable, "-m", "tests.ray_driver", "cluster", str(folder))
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        yield Cluster(process.stdout.readline().strip(), process.stdin, folder)
        process.stdin.close()
        process.wait(60)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A list of photos; one of them is none."""
    lines = []
    for number in range(ITEMS):
        photo(tmp_path / f"p{number}.png", number)
        lines.append({"photo": f"p{number}.png", "sentence": SENTENCE, "name": f"n{number}"})
    (tmp_path / "p3.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def run(manifest: Path, out: Path, tiny_folder: Path, *more: str) -> Any:
    """``batch run`` on the command line."""
    words = ["batch", "run", str(manifest), "--out", str(out), "--model", str(tiny_folder), "--device", "cpu", *QUICK]
    return CliRunner().invoke(app, [*words, "--slots", "1", "--json", *more])


def test_a_batch_on_ray_is_the_batch_it_is_here(
    cluster: Cluster, manifest: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Same files, same pictures, same verdict on the photo that is none; run again, nothing is left to do."""
    here, there = (tmp_path / "here", tmp_path / "there")
    words = ("--executor", "ray", "--address", cluster.address, "--workers", "2")
    alone = run(manifest, here, tiny_folder)
    assert alone.exit_code == 3
    result = run(manifest, there, tiny_folder, *words)
    assert result.exit_code == 3, result.output
    tally = json.loads(result.stdout)
    assert len(tally["done"]) == ITEMS - 1 and [bad["name"] for bad in tally["failed"]] == ["n3"]
    assert tally["failed"] == json.loads(alone.stdout)["failed"]
    names = [{path.relative_to(out).as_posix() for path in out.rglob("*.*")} for out in (here, there)]
    assert names[0] == names[1]
    assert least_psnr(there, here) > 35
    again = json.loads(run(manifest, there, tiny_folder, *words).stdout)
    assert again["done"] == [] and len(again["done_before"]) == ITEMS - 1


def driven(
    program: str, cluster: Cluster, manifest: Path, tiny_folder: Path, *, kill: str = "", workers: int = 2
) -> Process:
    """A program of `tests.ray_driver` on the cluster; `kill` names the process that is killed after the first item."""
    request = {"manifest": str(manifest), "out": "", "preset": "fast", "seed": 0, "model": str(tiny_folder), "slots": 1}
    request |= {"device": "cpu", "base_weights": "int8", "attention": "auto", "background": "white"}
    request |= {"checkpointing": False, "small": False, "force": False, "save_every": 0, "steps_sample": 2}
    request |= {"steps_embed": 2, "steps_finetune": 2, "executor": "ray", "address": cluster.address}
    order = {"request": request | {"workers": workers}, "folder": str(manifest.parent), "sentence": SENTENCE}
    order |= {"items": ITEMS, "kill": kill, "first": str(manifest.parent / "first")}
    return Process("tests.ray_driver", program, json.dumps(order))


def check(cluster: Cluster, manifest: Path, tiny_folder: Path, *, kill: str = "", remove: bool = False) -> None:
    """Makes items, with harm done to the cluster after the first; every item comes out once, the broken photo with its
    error, the others with their files."""
    process = driven("items", cluster, manifest, tiny_folder, kill=kill)
    first = manifest.parent / "first"
    while remove and not first.exists() and process.poll() is None:
        time.sleep(0.05)
    if remove:
        print("remove", file=cluster.orders, flush=True)
    said, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    # Ray prints words of its own to the standard output of the process that drives it.
    [answer] = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    good = [f"n{n}" for n in range(ITEMS) if n != 3]
    assert sorted(answer["done"]) == [f"n{n}" for n in range(ITEMS)] and answer["files"] == good
    assert [name for name, error in answer["done"].items() if error] == ["n3"]


def test_an_actor_that_is_killed_is_started_again(cluster: Cluster, manifest: Path, tiny_folder: Path) -> None:
    """If an actor's process is killed with SIGKILL during a run, its items are made nevertheless, and no photos stay on
    its machine."""
    check(cluster, manifest, tiny_folder, kill="actor")
    assert int((manifest.parent / "killed").read_text()) > 0 and not cluster.folders_of_actors


def test_photos_of_a_killed_run_are_removed_by_the_next(cluster: Cluster, manifest: Path, tiny_folder: Path) -> None:
    """If the process that drives a run is killed, an actor's folder with photos stays; the next run removes it, also
    without actors."""
    killed = driven("items", cluster, manifest, tiny_folder, kill="driver", workers=1)
    killed.communicate(timeout=300)
    assert killed.returncode == -signal.SIGKILL
    [folder] = cluster.folders_of_actors
    pid = folder.name.split("-")[4]
    while Path("/proc", pid).exists():
        # Ray ends the actors of a driver that is gone.
        time.sleep(0.05)
    assert list(folder.rglob("p*.png"))
    visit = driven("visit", cluster, manifest, tiny_folder)
    assert visit.communicate(timeout=300) and visit.returncode == 0
    assert not cluster.folders_of_actors


def test_a_node_that_is_lost_is_done_without(cluster: Cluster, manifest: Path, tiny_folder: Path) -> None:
    """A node that goes away in mid-run takes its actor with it; the rest is made on the other."""
    check(cluster, manifest, tiny_folder, remove=True)


def left_behind() -> set[str]:
    """Files of Ray, and of this package's actors, in temporary folders."""
    found = {name for folder in {"/tmp", tempfile.gettempdir()} for name in os.listdir(folder)}
    return {name for name in found if name.startswith(("lmi-ray-", "lowmem-imagic-ray-", "ray"))}


def listening(place: str) -> list[str]:
    """Addresses at which the processes listen that have a word in their environment."""
    inodes = set[str]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if place.encode() in (process / "environ").read_bytes():
                inodes |= {os.readlink(one) for one in (process / "fd").iterdir() if one.is_symlink()}
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                # Four bytes at a time, in the machine's order.
                number = fields[1].split(":")[0]
                words = [bytes.fromhex(number[k : k + 8])[::-1] for k in range(0, len(number), 8)]
                found.append(socket.inet_ntop(family, b"".join(words)))
    return found


def test_a_driver_that_is_lost(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Without an address Ray listens at the loopback address alone. Its driver, killed in mid-run, is said to have
    ended and started again; every item is made, and nothing is left in temporary folders."""
    before, out = left_behind(), tmp_path / "out"
    words = ("batch", "run", str(manifest), "--out", str(out), "--model", str(tiny_folder), "--device", "cpu", *QUICK)
    run = Process("lowmem_imagic", *words, "--slots", "1", "--executor", "ray", "--workers", "1", "--json")
    wait_for(out, 1)
    # An actor of an earlier test may have been starting when its cluster was ended.
    strays = {name for name in left_behind() - before if not name.startswith("lmi-ray-")}
    [place] = left_behind() - before - strays
    addresses = listening(place)
    assert addresses and set(addresses) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, addresses
    os.kill(children(run.pid)[0], signal.SIGKILL)
    said, errors = run.communicate(timeout=300)
    tally = json.loads(said)
    assert run.returncode == 3 and len(tally["done"]) == ITEMS - 1, errors
    assert "ended without a word (signal 9); it is started again" in errors and "Traceback" not in errors
    assert left_behind() <= before | strays


def test_no_cluster_there(manifest: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """An address without a cluster, an executor of another name, and an address without Ray are one line each."""
    for words, said in (
        (("--executor", "slurm"), "expected local or ray"),
        (("--address", "auto"), "give --executor ray"),
        (("--executor", "ray", "--address", "127.0.0.1:1"), "no Ray cluster at 127.0.0.1:1"),
    ):
        result = run(manifest, tmp_path / "out", tiny_folder, *words)
        assert result.exit_code in (1, 2) and said in result.stderr, result.output
        assert "Traceback" not in result.stderr
