"""Facts about batches of very many items."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.scale import ACTORS, DRIVER, simulate, write_list
from benchmarks.scale_processes import idle_files
from lowmem_imagic.actions.console import Silent
from lowmem_imagic.batch import run as runs
from lowmem_imagic.batch import runner
from lowmem_imagic.batch.executors.executor import Claims, Group, OnStep, Outcome
from lowmem_imagic.batch.ledger.file import snapshot
from lowmem_imagic.batch.ledger.ledger import Ledger
from lowmem_imagic.batch.outputs import training_seconds
from lowmem_imagic.batch.publishing import publish_files
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.stopping import Stop
from tests.tiny_if import write_tiny


class Publisher:
    """An executor that publishes files of no work."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
        for assignments in claims:
            for assignment in assignments:
                folder = self._out / assignment.name
                assert publish_files(assignment.attempt, idle_files(assignment), folder, assignment.job)
                yield Outcome(assignment)


def test_a_long_list_is_counted_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting the items of a ledger takes at most a twentieth of a run's time: with a count that takes a second,
    40 items that take one each are counted at the beginning, at the end, and once or twice between."""
    clock, counted = [0.0], [0]
    count = Ledger.counts

    def slow(ledger: Ledger) -> dict[str, int]:
        clock[0] += 1
        counted[0] += 1
        return count(ledger)

    def made(ledger: Ledger, job: str, seconds: float) -> None:
        clock[0] += 1
        finish(ledger, job, seconds)

    finish = Ledger.finish
    monkeypatch.setattr(Ledger, "counts", slow)
    monkeypatch.setattr(Ledger, "finish", made)
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=time.sleep))
    monkeypatch.setattr(runs, "local_executor", lambda request, bases, out, *args, **kwargs: Publisher(out))
    out = tmp_path / "out"
    request = {"manifest": str(write_list(tmp_path, 40)), "out": str(out), "device": "cpu", "preset": "fast"}
    summary = runs.run(Request.of(request), Silent(), Stop(), own={})
    assert len(summary.done) == 40 and counted[0] <= 4


def test_a_run_plans_for_the_items_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one item of many to make again, the executor fits its plan to that one, not to the list."""
    counts: list[int] = []

    class Counting(Publisher):
        def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
            counts.append(count)
            return super().make(group, claims, count, on_step=on_step)

    monkeypatch.setattr(runs, "local_executor", lambda request, bases, out, *args, **kwargs: Counting(out))
    out = tmp_path / "out"
    request = Request.of({"manifest": str(write_list(tmp_path, 40)), "out": str(out), "device": "cpu"})
    first = runs.run(request, Silent(), Stop(), own={})
    shutil.rmtree(out / first.done[0])
    assert runs.run(request, Silent(), Stop(), own={}).done == first.done[:1]
    assert counts == [40, 1]


def test_a_cascades_steps_are_those_of_all_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's steps of an item, which progress and time left are shares of, count every stage; so do the seconds
    that a report has."""
    steps: list[int] = []

    class Stepping(Publisher):
        def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
            steps.append(group.steps)
            return super().make(group, claims, count, on_step=on_step)

    monkeypatch.setattr(runs, "local_executor", lambda request, bases, out, *args, **kwargs: Stepping(out))
    values = {"manifest": str(write_list(tmp_path, 1)), "out": str(tmp_path / "out"), "device": "cpu"}
    values |= {"model": str(write_tiny(tmp_path))}
    runs.run(Request.of(values), Silent(), Stop(), own={})
    config = Request.of(values).settings({}).for_group("cascade")
    assert steps == [config.embed.steps + 2 * config.finetune.steps]
    seen = snapshot(tmp_path / "out" / ".lowmem-imagic" / "ledger.sqlite3")
    assert seen is not None and [entry.steps for entry in seen.entries] == steps
    measured = {"encode": {"seconds": 8.0}, "embed": {"seconds": 1.0}, "finetune": {"seconds": 2.0}}
    assert training_seconds(measured | {"finetune_unet_2": {"seconds": 4.0}}) == 7.0


@pytest.mark.ray
def test_a_killed_batch_goes_on_with_nothing_lost_or_made_twice() -> None:
    """After actors and the driver of a batch on Ray were killed, the same command goes on: every item is finished,
    and published once."""
    # pytest's own folder has too long a path for Ray's sockets.
    with tempfile.TemporaryDirectory(prefix="scale-") as folder:
        result = simulate(Path(folder), 150, 4, ((0.2, ACTORS), (0.5, DRIVER)))
    assert [driver["exit_code"] for driver in result["drivers"]] == [-9, 0]
    assert [killed["processes"] for killed in result["killed"]] == [ACTORS, DRIVER]
    assert (result["lost"], result["published_twice"], result["left_behind"]) == (0, 0, [])
    assert result["done_by_the_ledger"] == result["finished_by_their_files"] == result["folders"] == 150
