"""Items made by Ray actors, one for each GPU of a cluster, each with the base model resident.

The ledger stays with the driving process: actors receive photos and return files, so the machines need no shared
folder. Ray restarts a lost actor, and its unfinished items are assigned again; making an item twice does no harm. The
training of a lost actor is lost too, as training states are not kept across machines.

An actor removes its photos and results when the run ends. If its process was killed, a task on its machine removes
them: as soon as the driving process learns of the loss, and on all machines at the beginning and at the end of a run.
"""

import contextlib
import math
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

from ... import errors
from ...errors import (
    BackendUnavailableError,
    ConfigError,
    LowmemImagicError,
    OutputExistsError,
    OutputUnwritableError,
    UnexpectedError,
)
from ...unexpected import first_line
from ..failures import is_of_one_item
from ..ledger.owner import Owner
from ..request import Request
from ..stopping import Stop
from .executor import Assignment, Claims, Group, OnStep, Outcome
from .ray_folders import remove_abandoned

MAX_LOSSES = 3
"""Losses of an item's actor after which the item counts as the cause."""
CHUNK = 16
"""Most items assigned to an actor at once."""
_POLL_S = 1.0
_CONNECT_S = 10.0
_LEAVE_S = 5.0
_CLEAN_S = 10.0
_MOST_BYTES = 107 - 64 - 20
"""Longest path of a temporary folder with which the paths of Ray's sockets stay within the system's limit."""
_PATIENT = {
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "20",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
}
"""Longer timeouts: on a busy machine, Ray's processes take each other for dead after seconds, and all end."""


class RayExecutor:
    """Makes items on a Ray cluster; see `Executor`.

    Args:
        request: the options of the run; actors read their settings from it.
        actor: the class of the actors, see `ray_actor.Actor`.
        publish: publishes an item's files; returns False if another run has begun a new attempt.
        stop: ends the run when asked; items in training are lost.

    Raises:
        BackendUnavailableError: Ray is not installed, or the cluster does not exist.
    """

    def __init__(
        self,
        request: Request,
        actor: type[Any],
        publish: Callable[[Assignment, dict[str, bytes]], bool],
        stop: Stop,
    ) -> None:
        # Before Ray is imported: send no usage statistics.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        try:
            import ray
            import ray.util.scheduling_strategies
        except ImportError as error:
            raise BackendUnavailableError(
                "`executor=ray` was asked for, but Ray is not installed; install the extra: pip install '.[ray]'"
            ) from error
        self._ray, self._request, self._publish, self._stop = ray, request, publish, stop
        # Ray installs a handler of SIGTERM that would end the run at once; restore ours.
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            # Without an address, always start a new cluster, even if another one is running.
            where = request["address"] or os.environ.get("RAY_ADDRESS") or "local"
            ray.init(where, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            [reason, *_] = str(error).splitlines() or [type(error).__name__]
            raise BackendUnavailableError(
                f"no Ray cluster at {request['address'] or 'this machine'}: {reason}"
            ) from error
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        self._actor, self._handles = actor, list[_ActorHandle]()
        self._lost = Counter[str]()
        self._cleaning: list[Any] = []
        # Folders of an earlier run whose driving process was killed.
        self._clean()

    def close(self) -> None:
        """Ends the actors, and disconnects from the cluster."""
        # The actors first remove their files, the photos included; they cannot do so later.
        leaving = [ref for handle in self._handles for ref in handle.leave()]
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):  # no actor to wait for
            self._ray.wait(leaving, num_returns=len(leaving), timeout=_LEAVE_S)
        for handle in self._handles:
            handle.dismiss()
        # For actors that could not leave, or that were still at work while they left.
        self._clean([handle.process for handle in self._handles if handle.process is not None])
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):  # no machine left
            self._ray.wait(self._cleaning, num_returns=len(self._cleaning), timeout=_CLEAN_S)
        self._ray.shutdown()

    def __enter__(self) -> "RayExecutor":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _clean(self, ending: Collection[Owner] = ()) -> None:
        """Lets each machine remove the folders of actors that have ended, see `ray_folders.remove_abandoned`."""
        task = self._ray.remote(num_cpus=0, max_retries=0)(remove_abandoned)
        on = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        machines = [node["NodeID"] for node in self._ray.nodes() if node["Alive"]]
        self._cleaning += [
            task.options(scheduling_strategy=on(machine, soft=False)).remote(list(ending)) for machine in machines
        ]

    def _actors(self) -> list[Any]:
        """The actors: `workers`, or one for each GPU, or one for each machine of a cluster without GPUs."""
        resources = self._ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if self._request["device"] != "cpu" else 0
        machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        count = self._request["workers"] or gpus or len(machines)
        needs: dict[str, float] = {"num_gpus": 1} if gpus else {}
        share = int(resources.get("CPU", 1)) // (count if not gpus else max(gpus, count))
        # An actor that needs more than any machine has would never start.
        needs["num_cpus"] = max(1, min(share, max((int(machine.get("CPU", 0)) for machine in machines), default=1)))
        # Two threads: one makes items, one reports progress.
        kind = self._ray.remote(max_restarts=-1, max_task_retries=2, max_concurrency=2, **needs)(self._actor)
        # A machine whose torch does not see the GPU that the actor has must not take "auto" for the CPU.
        blind = gpus and self._request["device"] == "auto"
        request = self._request.but(device="cuda") if blind else self._request
        return [kind.remote(request.as_json()) for _ in range(count)]

    def make(self, group: Group, claims: Claims, count: int, *, on_step: OnStep) -> Iterator[Outcome]:
        """See `Executor`; the first call starts the actors."""
        self._handles = self._handles or [_ActorHandle(self._ray, one, self._clean) for one in self._actors()]
        waiting, assigned, more = deque[Assignment](), 0, True
        while True:
            for handle in self._handles:
                # Chunks become smaller towards the end, so that all actors finish together.
                size = min(CHUNK, max(1, math.ceil((count - assigned) / (2 * len(self._handles)))))
                while handle.idle and more and len(waiting) < size:
                    claimed = next(claims, None)
                    more = claimed is not None
                    waiting.extend(claimed or ())
                if handle.idle and waiting:
                    if self._lost[waiting[0].job]:
                        # Alone, so that no other item gets the blame if the actor is lost again.
                        size = 1
                    chunk = [waiting.popleft() for _ in range(min(size, len(waiting)))]
                    assigned += len(chunk)
                    unreadable = handle.begin(group, chunk)
                    yield from unreadable
            if not more and not waiting and not any(handle.open for handle in self._handles):
                return
            self._wait()
            for handle in self._handles:
                for assignment, result in handle.results():
                    yield self._outcome(assignment, result)
                for assignment in handle.dropped():
                    self._lost[assignment.job] += 1
                    assigned -= 1
                    if self._lost[assignment.job] < MAX_LOSSES:
                        waiting.append(assignment)
                    elif handle.failure:
                        yield Outcome(assignment, UnexpectedError(f"its worker failed: {handle.failure}"))
                    else:
                        lost = LowmemImagicError(f"its worker was lost {MAX_LOSSES} times while it was being made")
                        yield Outcome(assignment, lost)
            on_step([steps for handle in self._handles for steps in handle.in_training])
            self._stop.check()

    def _wait(self) -> None:
        """Waits for a result of any actor, at most a second."""
        pending = [ref for handle in self._handles for ref in handle.pending]
        if pending:
            self._ray.wait(pending, num_returns=1, timeout=_POLL_S, fetch_local=False)
        else:
            time.sleep(_POLL_S)

    def _outcome(self, assignment: Assignment, result: dict[str, Any]) -> Outcome:
        try:
            if result["files"] and not self._publish(assignment, result["files"]):
                return Outcome(assignment, lost=True)
        except OutputUnwritableError as error:
            if not is_of_one_item(error, self._request.out):
                raise
            return Outcome(assignment, error)
        except OutputExistsError as error:
            return Outcome(assignment, error)
        if "error" in result:
            kind = getattr(errors, result["error"], LowmemImagicError)
            failure = kind(result["text"])
            if isinstance(failure, UnexpectedError):
                failure.details = result["details"]
            return Outcome(assignment, failure)
        return Outcome(assignment, seconds=result["seconds"])


class _ActorHandle:
    """An actor, seen from the driving process.

    Args:
        ray: the library.
        actor: the actor.
        on_loss: called with the actor's process when it is lost.
    """

    def __init__(self, ray: Any, actor: Any, on_loss: Callable[[Collection[Owner]], None]) -> None:
        self._ray, self._actor, self._on_loss = ray, actor, on_loss
        self._greeting: Any = actor.ready.remote()
        self.process: Owner | None = None
        """The actor's last known process."""
        self._stream: Any = None
        self._asked: Any = None
        self._dropped: list[Assignment] = []
        self.open: dict[str, Assignment] = {}
        """The actor's unfinished items, by job."""
        self.in_training: list[int] = []
        """Steps of each edit in training."""
        self.failure = ""
        """The error that ended the actor's last task."""

    @property
    def idle(self) -> bool:
        """Whether the actor is ready and has no task."""
        return self._greeting is None and self._stream is None

    @property
    def pending(self) -> list[Any]:
        """References to wait for."""
        return [ref for ref in (self._greeting, self._stream) if ref is not None]

    def begin(self, group: Group, chunk: list[Assignment]) -> list[Outcome]:
        """Assigns items to the actor; returns failures of items with unreadable photos."""
        orders, unreadable = [], []
        for assignment in chunk:
            try:
                data = assignment.photo.read_bytes()
            except OSError as error:
                failure = errors.ImageNotFoundError(f"{str(assignment.photo)!r} cannot be read ({error.strerror})")
                failure.__cause__ = error
                unreadable.append(Outcome(assignment, failure))
                continue
            self.open[assignment.job] = assignment
            orders.append(
                {
                    "job": assignment.job,
                    "name": assignment.name,
                    "photo": (str(assignment.photo), data),
                    "sha256": assignment.sha256,
                    "sentence": assignment.sentence,
                    "warnings": assignment.warnings,
                }
            )
        if orders:
            # Without Ray's retries, which would make finished items again: `dropped` returns only the unfinished ones.
            self._stream = self._actor.make.options(num_returns="streaming", max_task_retries=0).remote(group, orders)
        return unreadable

    def results(self) -> Iterator[tuple[Assignment, dict[str, Any]]]:
        """Yields the newly finished items."""
        try:
            if self._greeting is not None and self._ready(self._greeting):
                self.process, self._greeting = self._ray.get(self._greeting), None
            self._ask()
            while self._stream is not None and self._ready(self._stream):
                try:
                    result = self._ray.get(next(self._stream))
                except StopIteration:
                    self._stream, self.in_training = None, []
                    self._drop()
                    return
                if (assignment := self.open.pop(result["job"], None)) is not None:
                    yield assignment, result
        except self._ray.exceptions.RayTaskError as error:
            self.failure = first_line(error.cause)
            if self.process is None:
                raise BackendUnavailableError(f"a worker of the cluster failed: {self.failure}") from None
            # The task failed, the actor still exists.
            self._stream, self.in_training, self._asked = None, [], None
            self._drop()
        except self._ray.exceptions.RayError as error:
            if self.process is None and isinstance(error, self._ray.exceptions.ActorDiedError):
                # The actor could not be created, as without the model or the package; Ray does not try again.
                lines = str(error).strip().splitlines() or ["no reason given"]
                raise BackendUnavailableError(f"a worker of the cluster cannot start: {lines[-1].strip()}") from None
            self.failure = ""
            if self.process is not None:
                self._on_loss([self.process])
            # Ray restarts the actor, here or on another machine; it gets no items until it answers.
            self._stream, self.in_training, self._asked = None, [], None
            self._drop()
            self._greeting = self._actor.ready.remote()

    def dropped(self) -> list[Assignment]:
        """The items that were assigned to the actor and lost."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def leave(self) -> list[Any]:
        """Tells the actor to remove its files."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            return [self._actor.leave.remote()] if self.process is not None else []
        return []

    def dismiss(self) -> None:
        """Ends the actor."""
        with contextlib.suppress(self._ray.exceptions.RayError):
            self._ray.kill(self._actor)

    def _drop(self) -> None:
        self._dropped += self.open.values()
        self.open = {}

    def _ready(self, ref: Any) -> bool:
        return bool(self._ray.wait([ref], timeout=0, fetch_local=False)[0])

    def _ask(self) -> None:
        """Asks the actor for its progress, and stores its last answer."""
        if self._stream is None:
            return
        if self._asked is not None and self._ready(self._asked):
            self.in_training, self._asked = self._ray.get(self._asked), None
        if self._asked is None:
            self._asked = self._actor.progress.remote()


@contextlib.contextmanager
def driving(address: str | None) -> Iterator[dict[str, str]]:
    """The environment of the process that drives Ray.

    If Ray loses its own processes, it ends the driving process at once and silently, so that process does nothing else.
    A new cluster can be reached only from this machine, and leaves no files behind.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    if address or os.environ.get("RAY_ADDRESS"):
        yield environment
        return
    place = tempfile.gettempdir()
    if len(os.fsencode(place)) > _MOST_BYTES and os.path.isdir("/tmp"):
        place = "/tmp"
    folder = tempfile.mkdtemp(prefix="lmi-ray-", dir=place)
    try:
        # RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 makes Ray listen only on the loopback address.
        yield (
            environment
            | {"RAY_TMPDIR": folder, "TMPDIR": folder, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
            | {name: os.environ.get(name, value) for name, value in _PATIENT.items()}
        )
    finally:
        # Ray's processes end a little later than the driving process.
        for _ in range(20):
            shutil.rmtree(folder, ignore_errors=True)
            if not os.path.lexists(folder):
                break
            time.sleep(0.25)


def check_executor(executor: str, address: str | None) -> None:
    """Checks the options `executor` and `address`.

    Raises:
        ConfigError: the executor is unknown, or does not take an address.
        BackendUnavailableError: no server listens at the address.
    """
    if executor not in ("local", "ray"):
        raise ConfigError(f"`executor` is {executor!r}, expected local or ray")
    if address is not None and executor != "ray":
        raise ConfigError("`address` names a Ray cluster; give `executor=ray` with it")
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    # Ray would try for minutes, and then end the process.
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise BackendUnavailableError(f"no Ray cluster at {address} ({error}); check `address`") from error
