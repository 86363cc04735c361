"""The Ray actor, which runs on the machines of the cluster."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...actions.console import Silent
from ...unexpected import quiet_libraries
from ..attempts import Attempts
from ..ledger.owner import Owner
from ..paths import HIDDEN
from ..request import Request
from ..stopping import Stop
from .executor import Assignment, Executor, Group
from .ray_folders import new_folder


class Actor:
    """Makes items with its own local executor, in a temporary folder."""

    def __init__(self, request: dict[str, Any]) -> None:
        quiet_libraries()
        self._folder = new_folder()
        self._out = request["out"]
        self._executor = self._executor_into(self._folder, Request.of(request))
        self._in_training: list[int] = []

    def _executor_into(self, folder: Path, request: Request) -> Executor:
        """The executor that makes the items, into `folder`."""
        # Imported here: an actor without work of its own, as in `benchmarks.scale`, needs no torch, which takes 0.4 GB.
        from .build import OpenBases, local_executor

        silent = Silent()
        # Training states are not kept across machines.
        return local_executor(request, OpenBases(request, silent), folder, silent, Stop(), save_every=0)

    def ready(self) -> Owner:
        """Answers with the actor's process, once it is ready."""
        return Owner.of_this_process()

    def leave(self) -> None:
        """Removes the actor's files, the photos included, before the process is ended."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def progress(self) -> list[int]:
        """Steps of each edit in training."""
        return self._in_training

    def make(self, group: Group, orders: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Makes items; yields the files or the error of each as it finishes."""
        out = self._folder
        inputs, attempts = out / HIDDEN / "photos", Attempts(out / HIDDEN / "training")
        assignments = []
        names = {str(out): self._out}
        for number, one in enumerate(orders):
            # One folder per photo: photos keep their names, which may be equal.
            name, data = one.pop("photo")
            place = inputs / str(number)
            place.mkdir(parents=True, exist_ok=True)
            photo = place / Path(name).name
            photo.write_bytes(data)
            names = {str(photo): name, **names}
            assignments.append(Assignment(photo=photo, attempt=attempts.begin(one["job"]), **one))

        def on_step(steps: list[int]) -> None:
            self._in_training = steps

        for outcome in self._executor.make(group, iter([assignments]), len(assignments), on_step=on_step):
            folder = out / outcome.assignment.name
            answer: dict[str, Any] = {"job": outcome.assignment.job, "seconds": outcome.seconds}
            # Also for a failed item: its edit may be finished.
            answer["files"] = {path.name: path.read_bytes() for path in folder.glob("*")}
            if outcome.error is not None:
                text = str(outcome.error)
                for here, there in names.items():
                    text = text.replace(here, there)
                details = getattr(outcome.error, "details", "")
                answer |= {"error": type(outcome.error).__name__, "text": text, "details": details}
            yield answer
            shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out / HIDDEN, ignore_errors=True)
        self._in_training = []
