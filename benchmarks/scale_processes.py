"""The processes of `benchmarks.scale`: a cluster of Ray, actors whose work is a no-op, and the driver of a batch.

    python -m benchmarks.scale_processes cluster ACTORS   a cluster until standard input ends; says its address
    python -m benchmarks.scale_processes drive REQUEST    runs a batch; says how many items are done

Needs no torch before a batch is driven: an actor that has none takes a fifth of the memory.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lowmem_imagic.batch.executors.executor import Assignment, Claims, Executor, Group, OnStep, Outcome
from lowmem_imagic.batch.executors.ray_actor import Actor
from lowmem_imagic.batch.request import Request
from lowmem_imagic.storage.file_names import REPORT

EDIT = b"no work"
"""The contents of every edit file."""


def actors_folder(out: Path) -> Path:
    """The folder in which each actor lists the items that it made, in a file with its process number as name."""
    return out.with_name("actors")


def published_file(out: Path) -> Path:
    """The file with the name of each published item, one a line, in the order of publishing."""
    return out.with_name("published")


def idle_files(assignment: Assignment) -> dict[str, bytes]:
    """The files of an item without work, its report included."""
    name = f"{assignment.name}.safetensors"
    report = {
        "job": assignment.job,
        "finished": True,
        "sha256": {name: hashlib.sha256(EDIT).hexdigest()},
        "pictures": [],
        "edit_file": name,
    }
    return {name: EDIT, REPORT: json.dumps(report).encode()}


class Idle:
    """An executor whose work is a no-op: an item's files are a few bytes and a report; see `Executor`.

    Args:
        folder: the parent of the items' folders.
        made: file that lists the jobs of the items, one a line.
    """

    def __init__(self, folder: Path, made: Path) -> None:
        self._folder = folder
        self._made = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
        """See `Executor`."""
        for assignments in claims:
            for assignment in assignments:
                on_step([group.steps])
                folder = self._folder / assignment.name
                folder.mkdir()
                for name, data in idle_files(assignment).items():
                    (folder / name).write_bytes(data)
                os.write(self._made, f"{assignment.job}\n".encode())
                yield Outcome(assignment)


class IdleActor(Actor):
    """The actor of a batch, with an executor whose work is a no-op."""

    def _executor_into(self, folder: Path, request: Request) -> Executor:
        return Idle(folder, actors_folder(request.out) / str(os.getpid()))


def drive(request: Request) -> None:
    """Runs a batch with idle actors, all else as `batch run` does; prints the numbers of items by their end."""
    from lowmem_imagic.actions.console import Silent
    from lowmem_imagic.batch import run as runs
    from lowmem_imagic.batch.publishing import publish_files
    from lowmem_imagic.batch.stopping import Stop

    published = os.open(published_file(request.out), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def publish(attempt: Any, files: Mapping[str, bytes], folder: Path, job: str, *, force: bool) -> bool:
        current = publish_files(attempt, files, folder, job, force=force)
        if current:
            os.write(published, f"{folder.name}\n".encode())
        return current

    with patch.object(runs, "Actor", IdleActor), patch.object(runs, "publish_files", publish):
        summary = runs.run(request, Silent(), Stop(), own={})
    counts = {"done": len(summary.done), "before": len(summary.before), "failed": len(summary.failed)}
    print(json.dumps(counts), flush=True)


def cluster(actors: int) -> None:
    """A cluster with a nominal processor for each actor, until standard input ends."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": actors, "include_dashboard": False, "object_store_memory": 256 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    print(nodes.address, flush=True)
    sys.stdin.read()
    nodes.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "cluster":
        cluster(int(sys.argv[2]))
    else:
        drive(Request.of(json.loads(sys.argv[2])))
