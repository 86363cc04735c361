"""The queue of one card: jobs of all visitors, one after another, in a process of their own."""

import contextlib
import json
import queue
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from ..children import command_of, environment
from .worker import PROGRAM

WAITING, RUNNING, DONE, FAILED, STOPPED = "waiting", "running", "done", "failed", "stopped"
ENDED = (DONE, FAILED, STOPPED)
_POLL_S = 0.2
_ENDING_S = 20
"""A process that has been told to end is killed after so long."""


@dataclass(eq=False)
class Job:
    """One order to a process, and its progress."""

    order: Mapping[str, Any]
    title: str
    """Shown in the queue of its owner."""
    owner: str = ""
    """Its visitor."""
    on_event: Callable[[Mapping[str, Any]], None] = lambda event: None
    """Called with each event, in the queue's thread."""
    state: str = WAITING
    stage: str = ""
    step: int = 0
    steps: int = 0
    remarks: list[str] = field(default_factory=list)
    result: Any = None
    error: str = ""
    details: str = ""
    """The traceback of an unexpected error; for the log, not for the page."""
    plan: list[tuple[str, float]] = field(default_factory=list)
    """Its stages with their shares of the work, in order."""
    began_s: float = 0.0
    ended_s: float = 0.0
    working_s: float = 0.0
    """When its first step was done."""
    first_share: float = 0.0
    """The share of the work that was done then, such as by an earlier training that it goes on with."""
    stop_asked: bool = False
    ended: threading.Event = field(default_factory=threading.Event)

    def take(self, event: Mapping[str, Any]) -> None:
        """Books an event of the process."""
        kind = event["event"]
        if kind == "stages":
            self.plan = [(str(name), float(share)) for name, share in event["stages"]]
        elif kind == "progress":
            self.stage, self.step, self.steps = event["stage"], event["step"], event["steps"]
            if not self.working_s:
                self.working_s, self.first_share = time.monotonic(), self.share
        elif kind == "remark":
            self.remarks.append(event["text"])
        elif kind == "done":
            self.state, self.result = DONE, event["result"]
        elif kind == "failed":
            self.state, self.error, self.details = FAILED, event["text"], event.get("details", "")
        elif kind == "stopped":
            self.state = STOPPED

    @property
    def share(self) -> float:
        """The share of its work that is done, from 0 to 1."""
        within = self.step / self.steps if self.steps else 0.0
        names = [name for name, _ in self.plan]
        if self.stage not in names:
            return within
        place, whole = names.index(self.stage), sum(share for _, share in self.plan)
        return (sum(share for _, share in self.plan[:place]) + within * self.plan[place][1]) / whole

    @property
    def seconds_left(self) -> float | None:
        """An estimate, from the steps of this job so far; None before there is one."""
        done = self.share - self.first_share
        if self.state != RUNNING or done < 0.02:
            return None
        return (time.monotonic() - self.working_s) / done * (1 - self.share)


class Process:
    """A process that does one order at a time; it is started for the first, and again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self.ready = False
        """Whether it has imported its libraries, which takes some seconds."""
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()

    def start(self) -> None:
        """Starts the process, if there is none; it takes some seconds to import its libraries."""
        if self._process is not None and self._process.poll() is None:
            return
        self._events, self.ready = queue.Queue(), False
        self._process = subprocess.Popen(
            command_of(PROGRAM),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            # Ctrl-C must reach the page's process alone.
            start_new_session=True,
        )
        threading.Thread(target=self._read, args=(self._process.stdout, self._events), daemon=True).start()

    def do(self, job: Job) -> None:
        """Does a job to its end; a crash of the process is the job's failure."""
        self.start()
        self._tell(dict(job.order))
        stopping = False
        while job.state == RUNNING:
            if job.stop_asked and not stopping:
                stopping = True
                self._tell({"work": "stop"})
            try:
                event = self._events.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if event is None:
                assert self._process is not None and self._process.stdin is not None
                code = self._process.wait()
                with contextlib.suppress(OSError):  # the last line may not have been read
                    self._process.stdin.close()
                event = {"event": "failed", "text": f"the process at work ended without a word ({_end_of(code)})"}
                self._process = None
            job.take(event)
            job.on_event(event)

    def _tell(self, order: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        # A process that has crashed is seen by its closed output.
        with contextlib.suppress(OSError):
            self._process.stdin.write((json.dumps(order) + "\n").encode())
            self._process.stdin.flush()

    def _read(self, output: IO[bytes] | None, events: "queue.Queue[dict[str, Any] | None]") -> None:
        """Passes events on; None at the end of the process."""
        assert output is not None
        with output:
            for line in output:
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    self.ready = True
                    if event["event"] != "ready":
                        events.put(event)
        events.put(None)

    def end(self) -> None:
        """Ends the process: at once if it is idle, after a save of the training state if it is at work."""
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_ENDING_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _end_of(code: int) -> str:
    """The end of a process in words."""
    if code >= 0:
        return f"exit code {code}"
    out_of_memory = ", perhaps for lack of memory" if code == -9 else ""
    return f"signal {-code}{out_of_memory}"


class Queue:
    """Jobs in their order, done by one process; see `Job`."""

    def __init__(self) -> None:
        self._process = Process()
        self._jobs: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)

    def start(self) -> None:
        """Starts the process and the thread that feeds it."""
        self._process.start()
        self._thread.start()

    def add(self, job: Job) -> Job:
        """Adds a job to the end of the queue."""
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job

    def do(self, job: Job) -> Job:
        """Adds a job and waits for its end."""
        self.add(job).ended.wait()
        return job

    def stop(self, job: Job) -> None:
        """Stops a job: at once while it waits, else as soon as its state is saved."""
        with self._changed:
            job.stop_asked = True
            if job not in self._jobs:
                return
            self._jobs.remove(job)
        self._end(job, STOPPED)

    def place(self, job: Job) -> int:
        """The number of jobs before this one; 0 for the running one."""
        with self._changed:
            before = self._jobs.index(job) if job in self._jobs else 0
            return before + (job in self._jobs and self._running is not None)

    def waiting(self, owner: str) -> int:
        """The number of jobs of a visitor that have not ended."""
        with self._changed:
            running = self._running is not None and self._running.owner == owner
            return sum(job.owner == owner for job in self._jobs) + running

    @property
    def ready(self) -> bool:
        """Whether its process can begin with a job at once."""
        return self._process.ready

    @property
    def length(self) -> int:
        """The number of jobs, the running one included."""
        with self._changed:
            return len(self._jobs) + (self._running is not None)

    def close(self) -> None:
        """Ends the queue: the running job is stopped and saves its state; waiting ones do not begin."""
        with self._changed:
            self._closed = True
            waiting, running = list(self._jobs), self._running
            self._jobs.clear()
            if running is not None:
                running.stop_asked = True
            self._changed.notify()
        for job in waiting:
            self._end(job, STOPPED)
        if running is not None:
            running.ended.wait(_ENDING_S)
        self._process.end()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._running = self._jobs.popleft()
                job.state, job.began_s = RUNNING, time.monotonic()
            try:
                self._process.do(job)
            except Exception as error:  # a fault of the page's own code must not end the queue
                job.error, job.details = f"an unexpected error ended this: {type(error).__name__}", repr(error)
                job.state = FAILED
            with self._changed:
                self._running = None
            self._end(job, job.state)

    @staticmethod
    def _end(job: Job, state: str) -> None:
        job.ended_s = time.monotonic()
        job.state = state
        with contextlib.suppress(Exception):
            job.on_event({"event": "end", "state": state})
        job.ended.set()
