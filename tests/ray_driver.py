"""Programs for the tests of Ray, run in their own processes: Ray ends its driving process when it loses its own.

python -m tests.ray_driver cluster       a cluster; says its address, and removes a node for each line it is given
python -m tests.ray_driver items ORDER   items made by a `RayExecutor`; makes a file when the first is there, and says
                                         what became of all
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def cluster() -> None:
    """A head that runs nothing, and two nodes of one core, until standard input ends."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [made.add_node(num_cpus=1) for _ in range(2)]
    print(made.address, flush=True)
    for _ in sys.stdin:
        # As a power cut does.
        made.remove_node(nodes.pop(0), allow_graceful=False)
    made.shutdown()


def items(order: dict[str, Any]) -> None:
    """Makes the photos of a folder, and lets harm be done after the first."""
    import ray

    from lowmem_imagic.batch.attempts import Attempts
    from lowmem_imagic.batch.executors.executor import Assignment, Group
    from lowmem_imagic.batch.executors.ray import RayExecutor
    from lowmem_imagic.batch.executors.ray_actor import Actor
    from lowmem_imagic.batch.request import Request
    from lowmem_imagic.batch.stopping import Stop
    from lowmem_imagic.edits import file as edit_file
    from lowmem_imagic.pictures import photo_sha256

    asked = Request.of(order["request"])
    folder, files = Path(order["folder"]), dict[str, dict[str, bytes]]()
    group, attempts = Group(None, asked.settings({})), Attempts(folder / "training")
    assignments = [
        Assignment(f"job {n}", f"n{n}", file, photo_sha256(file), order["sentence"], attempts.begin(f"job {n}"))
        for n in range(order["items"])
        for file in [folder / f"p{n}.png"]
    ]
    done: dict[str, str] = {}
    with RayExecutor(asked, Actor, lambda one, made: files.update({one.name: made}) is None, Stop()) as hired:
        for outcome in hired.make(group, iter([assignments]), len(assignments), on_step=lambda steps: None):
            assert outcome.assignment.name not in done, "made twice"
            done[outcome.assignment.name] = "" if outcome.error is None else str(outcome.error)
            if len(done) == 1:
                if order["kill"]:
                    busy = next(handle for handle in hired._handles if handle.open)
                    os.kill(int(ray.get(busy._actor.ready.remote()).split()[-1]), signal.SIGKILL)
                Path(order["first"]).touch()
    for name, one in files.items():
        edit_file.decode(one[f"{name}.safetensors"])
    print(json.dumps({"done": done, "files": sorted(files)}), flush=True)


if __name__ == "__main__":
    # Workers at the priority of this process: a busy machine would starve them.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    cluster() if sys.argv[1] == "cluster" else items(json.loads(sys.argv[2]))
