"""Programs for the tests of Ray, run in their own processes: Ray ends its driving process when it loses its own.

python -m tests.ray_driver cluster FOLDER   a cluster, whose nodes have their temporary files in FOLDER; says its
                                            address, and removes a node for each line it is given
python -m tests.ray_driver items ORDER      items made by a `RayExecutor`; makes a file when the first is there, and
                                            says what became of all
python -m tests.ray_driver visit ORDER      a `RayExecutor` without items
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def cluster(folder: Path) -> None:
    """A head that runs nothing, and two nodes of one core, until standard input ends."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    workers = []
    for number in range(2):
        # As if it were a machine of its own.
        (place := folder / str(number)).mkdir()
        workers.append(nodes.add_node(num_cpus=1, env_vars={"TMPDIR": str(place)}))
    print(nodes.address, flush=True)
    for _ in sys.stdin:
        # As a power cut does.
        nodes.remove_node(workers.pop(0), allow_graceful=False)
    nodes.shutdown()


def items(order: dict[str, Any]) -> None:
    """Makes the photos of a folder, and lets harm be done after the first."""
    from lowmem_imagic.batch.attempts import Attempts
    from lowmem_imagic.batch.executors.executor import Assignment, Group
    from lowmem_imagic.batch.executors.ray import RayExecutor
    from lowmem_imagic.batch.executors.ray_actor import Actor
    from lowmem_imagic.batch.request import Request
    from lowmem_imagic.batch.stopping import Stop
    from lowmem_imagic.edits import file as edit_file
    from lowmem_imagic.pictures import photo_file

    class Mortal(Actor):
        """An actor whose process is killed after its first item, the first time; leaves the number of its photos."""

        def make(self, group: Group, orders: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
            killed = Path(order["folder"]) / "killed"
            for answer in super().make(group, orders):
                yield answer
                if not killed.exists():
                    photos = list(Path(tempfile.gettempdir()).glob("lowmem-imagic-ray-*/**/p*.png"))
                    killed.write_text(str(len(photos)))
                    os.kill(os.getpid(), signal.SIGKILL)

    asked = Request.of(order["request"])
    folder, files = Path(order["folder"]), dict[str, dict[str, bytes]]()
    group, attempts = Group(None, asked.settings({})), Attempts(folder / "training")
    assignments = [
        Assignment(f"job {n}", f"n{n}", file, photo_file(file).sha256, order["sentence"], attempts.begin(f"job {n}"))
        for n in range(order["items"])
        for file in [folder / f"p{n}.png"]
    ]
    done: dict[str, str] = {}
    actor = Mortal if order["kill"] == "actor" else Actor
    with RayExecutor(asked, actor, lambda one, results: files.update({one.name: results}) is None, Stop()) as executor:
        for outcome in executor.make(group, iter([assignments]), len(assignments), on_step=lambda steps: None):
            assert outcome.assignment.name not in done, "made twice"
            done[outcome.assignment.name] = "" if outcome.error is None else str(outcome.error)
            if len(done) == 1:
                if order["kill"] == "driver":
                    os.kill(os.getpid(), signal.SIGKILL)
                Path(order["first"]).touch()
    for name, one in files.items():
        edit_file.decode(one[f"{name}.safetensors"])
    print(json.dumps({"done": done, "files": sorted(files)}), flush=True)


def visit(order: dict[str, Any]) -> None:
    """Begins and ends a run that has nothing to make."""
    from lowmem_imagic.batch.executors.ray import RayExecutor
    from lowmem_imagic.batch.executors.ray_actor import Actor
    from lowmem_imagic.batch.request import Request
    from lowmem_imagic.batch.stopping import Stop

    with RayExecutor(Request.of(order["request"]), Actor, lambda one, results: True, Stop()):
        pass


if __name__ == "__main__":
    # Workers at the priority of this process: a busy machine would starve them.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    match sys.argv[1]:
        case "cluster":
            cluster(Path(sys.argv[2]))
        case "items":
            items(json.loads(sys.argv[2]))
        case _:
            visit(json.loads(sys.argv[2]))
