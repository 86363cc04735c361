"""Several processes on one folder, one for each GPU: each is a separate run, and they share the work by the ledger.

A crash ends one process, not the others, and the process is started again. The processes stop in an orderly way when
the pipe to their standard input closes, also if this process is killed. They tell what they made, and their warnings,
in lines of JSON on standard output (`run_one`).
"""

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ...actions.console import Console
from ...children import command_of
from ...children import environment as of_children
from ...errors import ConfigError, LowmemImagicError
from ..failures import AS_BEFORE
from ..jobs import command_name
from ..ledger.file import DONE, FAILED, LEASE_S, RUNNING, WAITING, Entry, Runner, snapshot
from ..ledger.owner import is_stopped
from ..manifest import BadItem, Summary
from ..stopping import Stop

MAX_STARTS = 4
"""Most starts of a process that keeps crashing."""
RESULTS = ("total", "error", "stopped")
"""Keys of a process's last line; one of them is in it."""
_PROGRAM = "lowmem_imagic.batch.run_one"
_POLL_S = 0.5
_PAUSES = 20
"""Least pause between two reads of the ledger, as a multiple of the time of a read."""


class _Process:
    """One of the processes, started again when it crashes."""

    def __init__(
        self,
        order: Mapping[str, Any],
        environment: Mapping[str, str],
        console: Console,
        hear: Callable[[Mapping[str, Any]], None],
    ) -> None:
        self._console, self._hear = console, hear
        self._order = json.dumps(order) + "\n"
        self._environment = {**of_children(), **environment}
        self._starts, self._given_up, self._suspended = 0, False, False
        self._opened = contextlib.ExitStack()
        self.result: dict[str, Any] | None = None
        """Its result, once it has ended in good order."""
        self._start()

    def _start(self) -> None:
        self._starts += 1
        self._opened.close()
        # A file: a pipe could fill up, or be held open by a process that this one has started.
        self._said: IO[bytes] = self._opened.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._heard, self._rest = 0, b""
        self._process = subprocess.Popen(
            command_of(_PROGRAM),
            stdin=subprocess.PIPE,
            stdout=self._said,
            env=self._environment,
            # Ctrl-C must reach this process alone, which passes it on.
            start_new_session=True,
        )
        self._opened.callback(self._close_pipe)
        with contextlib.suppress(OSError):
            self._pipe.write(self._order.encode())
            self._pipe.flush()

    @property
    def _pipe(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def poll(self, *, again: bool) -> bool:
        """Whether the process is running; with `again`, a crashed process is started again."""
        running = self._process.poll() is None
        self._listen()
        if running:
            return True
        if self.result is None and again:
            code = self._process.returncode
            how = f"process {self._process.pid} of the batch ended without a word ({_end_of(code)})"
            if self._starts < MAX_STARTS:
                self._console.warn(f"{how}; it is started again and goes on with the missing items")
                self._start()
                return True
            if not self._given_up:
                self._console.warn(f"{how}, the last of {MAX_STARTS} starts")
                self._given_up = True
        return False

    @property
    def suspended(self) -> bool:
        """Whether the process is suspended, as after SIGSTOP; warns when that begins."""
        before, self._suspended = self._suspended, self._process.poll() is None and is_stopped(self._process.pid)
        if self._suspended and not before:
            after = f"others take its items over after {LEASE_S:.0f} s"
            self._console.warn(f"process {self._process.pid} of the batch is suspended; {after}")
        return self._suspended

    def ask_to_stop(self) -> None:
        """Asks the process to stop in an orderly way."""
        self._close_pipe()

    def kill(self) -> None:
        """Kills the process; each of its files is complete or missing."""
        self._process.kill()
        self._process.wait()
        self._listen()
        self._opened.close()

    def _listen(self) -> None:
        """Reads the lines that the process has written since."""
        # Not by the file's own position, where the process writes.
        while data := os.pread(self._said.fileno(), 2**20, self._heard):
            self._heard += len(data)
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                event: Any = None
                with contextlib.suppress(ValueError):  # a library's own output
                    event = json.loads(line)
                if isinstance(event, dict) and not event.keys().isdisjoint(RESULTS):
                    self.result = event
                elif isinstance(event, dict):
                    self._hear(event)

    def _close_pipe(self) -> None:
        with contextlib.suppress(OSError):
            self._pipe.close()


def run_in_processes(
    request: Mapping[str, Any],
    environments: Sequence[Mapping[str, str]],
    ledger: Path,
    console: Console,
    stop: Stop,
    *,
    own: Mapping[str, Any],
    retry: Sequence[str],
    continues: str | None = None,
) -> Summary:
    """Runs a batch in one process for each environment; returns a summary.

    Args:
        request: a `request.Request` as plain values.
        environments: additional environment variables of each process.
        ledger: path of the shared ledger.
        console: shows progress.
        stop: ends the run when asked; the processes save their training states first.
        own: see `run.run`; the same for each process.
        retry: kinds of failure to try again.
        continues: see `run.run`.

    Raises:
        LowmemImagicError: a process could not go on; the message is that process's.
        KeyboardInterrupt: `stop` was asked for.
    """
    command = continues or command_name(request)
    processes: list[_Process] = []
    made: dict[str, None] = {}
    """Names of the items that the processes made, also those of a process that crashed since."""
    asked, told = False, set[str]()

    def hear(event: Mapping[str, Any]) -> None:
        if "made" in event:
            made[event["made"]] = None
            console.say(f"{event['made']}: done")
        # The processes have the same list, and most warnings in common; a process that begins later says "as before".
        elif (warning := event.get("warning")) and (reason := warning.removesuffix(AS_BEFORE)) not in told:
            told.add(reason)
            console.warn(warning)
        # When stopped, each of them says how many items are left.
        elif (remark := event.get("remark")) and remark not in told and not stop.asked:
            told.add(remark)
            console.say(remark, always=True)

    try:
        order = {"request": request, "own": own, "retry": list(retry), "continues": continues}
        processes += (_Process(order, environment, console, hear) for environment in environments)
        while at_work := [process for process in processes if process.poll(again=not stop.asked)]:
            if stop.asked and not asked:
                asked = True
                for process in processes:
                    process.ask_to_stop()
            started = time.perf_counter()
            entries = [] if (seen := snapshot(ledger)) is None else [e for e in seen.entries if e.command == command]
            if seen is not None:
                _show(entries, seen.runners, console)
            # All running processes are suspended: end if the finished ones have made every item.
            idle = all([process.suspended for process in at_work]) and len(at_work) < len(processes)
            if idle and not any(entry.state in (WAITING, RUNNING) for entry in entries):
                break
            # A ledger with very many items is read less often.
            time.sleep(max(_POLL_S, _PAUSES * (time.perf_counter() - started)))
    finally:
        for process in processes:
            process.kill()
        console.close()
    stop.check()
    results = [process.result for process in processes]
    errors = [result["error"] for result in results if result and "error" in result]
    summaries = [result for result in results if result and "total" in result]
    if errors or not summaries:
        kind = ConfigError if any(result and result.get("usage") for result in results) else LowmemImagicError
        raise kind(
            errors[0]
            if errors
            else "every process of the batch crashed; see their messages above. Run the same command again for the rest"
        )
    return _common(summaries, made)


def _common(summaries: Sequence[Mapping[str, Any]], made: Collection[str]) -> Summary:
    """The summary of processes that had the same list.

    Args:
        summaries: those of the processes that did not crash; each knows all items.
        made: names of the items that any process made.
    """
    ended = dict.fromkeys(name for one in summaries for name in (*one["done_before"], *one["done"]))
    failed = {(bad["where"], bad["name"]): BadItem(**bad) for one in summaries for bad in one["failed"]}
    counts = Counter((bad["where"], bad["name"]) for one in summaries for bad in one["failed"])
    return Summary(
        summaries[0]["total"],
        done=list(made),
        before=[name for name in ended if name not in made],
        # One that failed in a process may have been made by another, started again.
        failed=[bad for key, bad in failed.items() if bad.name not in ended or counts[key] == len(summaries)],
    )


def _end_of(code: int) -> str:
    """The end of a process, as text for people."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def _show(entries: Sequence[Entry], runners: Sequence[Runner], console: Console) -> None:
    """Shows the common progress of all processes."""
    total = sum(entry.steps for entry in entries)
    ended = sum(entry.steps for entry in entries if entry.state in (DONE, FAILED))
    count = {state: sum(entry.state == state for entry in entries) for state in (WAITING, RUNNING, DONE, FAILED)}
    slots = sum(runner.slots for runner in runners)
    waiting = count[WAITING] + max(0, count[RUNNING] - slots)
    failed = f", {count[FAILED]} failed" if count[FAILED] else ""
    if total:
        step = min(total, ended + sum(runner.training for runner in runners))
        console.progress("train", step, total, f"{count[DONE]} done, {slots} in slots, {waiting} waiting{failed}")


def gpu_environments(count: int, gpus: int) -> Iterator[dict[str, str]]:
    """Yields the environment of each process: one of this process's visible GPUs in turn, so some may share one."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = visible[:gpus] or [str(number) for number in range(gpus)]
    for number in range(count):
        yield {"CUDA_VISIBLE_DEVICES": names[number % len(names)]}


def cpu_environments(count: int) -> Iterator[dict[str, str]]:
    """Yields the environment of each process: its share of the CPU cores."""
    threads = max(1, len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]) // count)
    for _ in range(count):
        yield {"OMP_NUM_THREADS": str(threads)}
