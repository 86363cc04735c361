"""Facts about batches of very many items."""

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
from lowmem_imagic.batch.ledger.ledger import Ledger
from lowmem_imagic.batch.publishing import publish_files
from lowmem_imagic.batch.request import Request
from lowmem_imagic.batch.stopping import Stop


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
