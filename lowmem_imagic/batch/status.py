"""The progress of a batch, read from its ledgers without changing them; needs no torch."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..amounts import counted, duration
from ..errors import ConfigError
from .ledger.file import DONE, EARLIER, FAILED, LEASE_S, RUNNING, WAITING, Entry, Runner, Snapshot, snapshot
from .outputs import report_of
from .paths import ledgers_in


def ledgers_of(folder: Path) -> list[Snapshot]:
    """Snapshots of a folder's ledgers: one, or one for each shard."""
    return [seen for path in ledgers_in(folder).values() if (seen := snapshot(path)) is not None]


@dataclass(frozen=True)
class Command:
    """A `batch run` into a folder."""

    name: str
    """Name of its note in the ledger."""
    request: Mapping[str, Any]
    """Its options, as plain values."""
    unfinished: int
    """Number of its items that are not done."""
    last: bool
    """Whether it was the last one with its ledger."""

    def __str__(self) -> str:
        manifest, prompt = self.request.get("manifest"), self.request.get("prompt")
        return f"{manifest}" if prompt is None else f"{manifest} with the sentence {prompt!r}"


def commands_of(folder: Path) -> list[Command]:
    """The commands that have items in a folder, in the order in which they were last run.

    Raises:
        ConfigError: there are none.
    """
    seen = ledgers_of(folder)
    commands = list(_commands(seen, list(_merged(folder, seen))))
    if not commands:
        raise ConfigError(f"{folder} has no ledger of a batch; run `batch run` with its options again")
    return commands


def _commands(seen: list[Snapshot], entries: list[Entry]) -> Iterator[Command]:
    unfinished = Counter(entry.command for entry in entries if entry.state != DONE)
    for one in seen:
        notes = {name: value for name, value in one.notes.items() if name.startswith(EARLIER) and value}
        for number, (name, request) in enumerate(notes.items(), start=1):
            yield Command(name, request, unfinished[name], number == len(notes))


def status(folder: Path) -> dict[str, Any]:
    """Counts, every item's state, the runners, and the time left, for the items of all commands.

    Finished items that no ledger has are found from their files.

    Raises:
        ConfigError: the folder is no batch's.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder; name the `out` of a batch run")
    seen = ledgers_of(folder)
    entries = list(_merged(folder, seen))
    entries += _from_files(folder, {entry.name for entry in entries})
    if not seen and not entries:
        raise ConfigError(f"{folder} has no batch in it; name the `out` of a batch run")
    counts = _counts(entries)
    runners = [runner for one in seen for runner in one.runners]
    left_s = _seconds_left(seen, entries)
    return {
        "out": str(folder),
        "total": len(entries),
        **counts,
        "seconds_left": left_s,
        "runners": [
            {
                "host": r.owner.host,
                "pid": r.owner.pid,
                "alive": r.owner.alive,
                "suspended": r.owner.stopped,
                "in_slots": r.slots,
            }
            for r in runners
        ],
        "items": [_item(entry) for entry in entries],
        "summary": list(_summary(folder, entries, list(_commands(seen, entries)), runners, left_s)),
    }


def _counts(entries: list[Entry]) -> dict[str, int]:
    return {state: sum(entry.state == state for entry in entries) for state in (WAITING, RUNNING, DONE, FAILED)}


def _merged(folder: Path, seen: list[Snapshot]) -> Iterator[Entry]:
    """Yields every item once, in its most advanced state in any ledger: of the whole list or of its parts."""
    furthest = {state: rank for rank, state in enumerate((DONE, RUNNING, FAILED, WAITING))}
    entries: dict[tuple[int, str, int], Entry] = {}
    for place, entry in (placed for one in seen for placed in _placed(one)):
        known = entries.setdefault(place, entry)
        both = [known, entry]
        if known.job != entry.job:
            # The item was changed between two runs: only the entry whose job matches the files is done.
            both = [one for one in both if one.state != DONE or _is_of(folder / one.name, one.job)] or both
        entries[place] = min(both, key=lambda one: furthest[one.state])
    yield from sorted(entries.values(), key=lambda entry: entry.position)


def _placed(seen: Snapshot) -> Iterator[tuple[tuple[int, str, int], Entry]]:
    """Yields the items of a ledger with their places; items of several commands with the same one are numbered."""
    numbers = Counter[tuple[int, str]]()
    for entry in seen.entries:
        place = (entry.position, entry.name)
        numbers[place] += 1
        yield (*place, numbers[place]), entry


def _is_of(folder: Path, job: str) -> bool:
    """Whether an item's folder is finished for this job."""
    report = report_of(folder)
    return report is not None and report["job"] == job


def _from_files(folder: Path, known: Collection[str]) -> Iterator[Entry]:
    """Yields the finished items in a folder except those of known names."""
    for position, path in enumerate(sorted(folder.iterdir())):
        if path.name not in known and (report := report_of(path)) is not None:
            yield Entry(report["job"], position, "", path.name, state=DONE)


def _seconds_left(seen: list[Snapshot], entries: list[Entry]) -> float | None:
    """The time left, from the steps left and the speed of the runners; None if it is unknown."""
    runners = [runner for one in seen for runner in one.runners if runner.seconds]
    # Commands with no item at work wait for a run of their own.
    at_work = {entry.command for entry in entries if entry.state == RUNNING}
    left = sum(entry.steps for entry in entries if entry.state in (WAITING, RUNNING) and entry.command in at_work)
    left -= sum(runner.training for runner in runners)
    rate = sum((runner.steps + runner.training) / runner.seconds for runner in runners)
    return round(max(0, left) / rate, 1) if rate else None


def _item(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "where": entry.place,
        "state": entry.state,
        "attempts": entry.attempts,
        "seconds": entry.seconds,
        "kind": entry.kind,
        "error": entry.error,
    }


def _summary(
    folder: Path, entries: list[Entry], commands: list[Command], runners: list[Runner], left_s: float | None
) -> Iterator[str]:
    counts = _counts(entries)
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    yield f"{folder}: {counted(len(entries), 'item')}: {said}"
    if len(commands) > 1:
        yield from (f"{command.unfinished} not done of {command}" for command in commands if command.unfinished)
    open_items = counts[WAITING] + counts[RUNNING]
    suspended = [runner for runner in runners if runner.owner.stopped]
    seen = sum(bool(runner.owner.alive) for runner in runners) - len(suspended)
    if seen:
        time_left = "" if left_s is None or not open_items else f", about {duration(left_s)} left"
        yield f"{seen} at work{time_left}"
    for runner in suspended:
        yield (
            f"{runner.owner} is suspended: continue it (`fg`, or kill -CONT {runner.owner.pid}) or end it; after "
            f"{LEASE_S:.0f} s of silence another run takes its items over"
        )
    if unseen := len(runners) - seen - len(suspended):
        yield (
            f"{unseen} on another machine, or from before this one's last start: not visible from here; if they have "
            "ended, the next run takes their items over"
        )
    if not runners and open_items:
        yield "no process is at work; run `batch retry`, or the same `batch run`, to continue"
    for entry in entries:
        if entry.state == FAILED:
            yield f"failed: {entry.place}{f' ({entry.name})' if entry.name else ''}: {entry.error}"
