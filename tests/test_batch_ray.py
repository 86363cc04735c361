"""Facts about batches on Ray, against a real local cluster of several nodes: whoever is lost, every item is made."""

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lowmem_imagic import edit_file
from lowmem_imagic.batch.attempts import Attempts
from lowmem_imagic.batch.crew import Assignment, Group, Outcome
from lowmem_imagic.batch.ray_cluster import RayCrew
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.stopping import Stop
from lowmem_imagic.cli import app
from lowmem_imagic.images import photo_sha256
from tests.crashes import least_psnr
from tests.test_batch import QUICK, SENTENCE, photo

ray = pytest.importorskip("ray")
# Ray's own threads and sockets.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")

ITEMS = 6


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head that runs nothing, and two nodes of one core."""
    # Workers at the priority of this process: a busy machine would starve them.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    from ray.cluster_utils import Cluster

    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        found.add_node(num_cpus=1)
    yield found
    found.shutdown()


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
    cluster: Any, manifest: Path, tiny_folder: Path, tmp_path: Path
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


def made(manifest: Path, tiny_folder: Path, cluster: Any, harm: Callable[[RayCrew], None]) -> list[Outcome]:
    """What becomes of the items when harm is done to the cluster after the first one."""
    left_open: dict[str, Any] = dict.fromkeys(Request.__dataclass_fields__)
    asked = Request(
        **left_open
        | {"manifest": str(manifest), "out": "", "preset": "fast", "seed": 0, "model": str(tiny_folder), "slots": 1}
        | {"device": "cpu", "base_weights": "int8", "attention": "auto", "background": "white", "checkpointing": False}
        | {"small": False, "force": False, "save_every": 0, "steps_sample": 2, "steps_embed": 2, "steps_finetune": 2}
        | {"executor": "ray", "address": cluster.address, "workers": 2}
    )
    group = Group(None, asked.settings({}))
    folder = manifest.parent
    attempts = Attempts(folder / "training")
    items = [
        Assignment(f"job {n}", f"n{n}", file, photo_sha256(file), SENTENCE, attempts.begin(f"job {n}"))
        for n in range(ITEMS)
        for file in [folder / f"p{n}.png"]
    ]
    files: dict[str, dict[str, bytes]] = {}
    done: list[Outcome] = []
    with RayCrew(asked, lambda one, made: files.update({one.name: made}) is None, Stop()) as crew:
        outcomes = crew.make(group, iter([items]), ITEMS, on_step=lambda steps: None)
        for outcome in outcomes:
            done.append(outcome)
            if len(done) == 1:
                harm(crew)
    good = {outcome.assignment.name for outcome in done if outcome.error is None}
    assert files.keys() == good
    for name, one in files.items():
        edit_file.decode(one[f"{name}.safetensors"])
    return done


def check(done: list[Outcome]) -> None:
    """Every item came out once: the broken photo with its error, the others with their files."""
    assert sorted(outcome.assignment.name for outcome in done) == [f"n{n}" for n in range(ITEMS)]
    assert [outcome.assignment.name for outcome in done if outcome.error is not None] == ["n3"]


def test_an_actor_that_is_killed_is_started_again(cluster: Any, manifest: Path, tiny_folder: Path) -> None:
    """An actor's process killed with SIGKILL in mid-run: what it had in hand is made all the same."""
    killed = []

    def kill(crew: RayCrew) -> None:
        busy = next(hand for hand in crew._hands if hand.open)
        pid = int(ray.get(busy._actor.ready.remote()).split()[-1])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    check(made(manifest, tiny_folder, cluster, kill))
    assert killed


def test_a_node_that_is_lost_is_done_without(cluster: Any, manifest: Path, tiny_folder: Path) -> None:
    """A node that goes away in mid-run takes its actor with it; the rest is made on the other."""
    workers = [node for node in cluster.worker_nodes]

    def remove(crew: RayCrew) -> None:
        # Beside the run, as a power cut is.
        threading.Thread(target=cluster.remove_node, args=(workers[0],), kwargs={"allow_graceful": False}).start()

    check(made(manifest, tiny_folder, cluster, remove))


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
