"""Runs a request: in this process, in several processes of this machine, or on a Ray cluster."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..actions.console import Console
from ..engine.device import pick_device
from ..errors import OutputExistsError
from ..pictures import photo_file
from ..settings.text import parse_bytes
from ..storage.writable import check_writable
from .attempts import Attempts
from .executors.build import OpenBases, local_executor
from .executors.executor import Bases, Executor
from .executors.processes import cpu_environments, gpu_environments, run_in_processes
from .executors.ray import RayExecutor, check_executor, driving
from .executors.ray_actor import Actor
from .failures import RETRIED
from .jobs import job_id
from .ledger.file import DONE, snapshot
from .manifest import Item, Summary
from .naming import settled
from .publishing import publish_files
from .request import Request
from .runner import Batch
from .stopping import Stop

_SHARED = 0.9
"""Share of a GPU's memory that processes divide among themselves."""


def run(
    request: Request,
    console: Console,
    stop: Stop,
    *,
    retry: Sequence[str] = RETRIED,
    continues: str | None = None,
    own: Mapping[str, Any] | None = None,
    on_made: Callable[[str], None] = lambda name: None,
) -> Summary:
    """Makes the items of a request; returns a summary. See `Batch.run`.

    Args:
        request: the options of the run.
        console: shows progress.
        stop: ends the run when asked.
        retry: kinds of failure to try again.
        continues: name of the stored command that this run goes on with. It leaves items alone that another command has
            asked for since, and forces only those that the command has not made yet.
        own: options of this process in place of the request's, which the ledger keeps as it is. Given, all is made in
            this process, whatever the request's executor and workers are.
        on_made: called with the name of each item that this process made, when its files are published.
    """
    request.settings({})
    check_executor(request["executor"], request["address"])
    if request["vram"] is not None:
        parse_bytes(request["vram"])
    items, bad = request.items()
    out = request.out
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is no folder; name a folder with `out`")
    if own is None:
        with contextlib.ExitStack() as places:
            environments = _environments(request, places)
            if environments:
                return run_in_processes(
                    request.as_json(),
                    environments,
                    request.part.ledger(out),
                    console,
                    stop,
                    own=_own(request, environments, console),
                    retry=retry,
                    continues=continues,
                )
    here = request.but(**own or {})
    bases = OpenBases(here, console)
    items = settled(items, out, lambda item: _job(item, request, bases, stop))
    made, others = _known(request, continues) if continues else (set(), set())
    items = [item for item in items if item.name not in others]
    with contextlib.ExitStack() as hired:
        executor: Executor
        if request["executor"] == "ray":
            executor = hired.enter_context(
                RayExecutor(
                    request,
                    Actor,
                    lambda one, files: publish_files(one.attempt, files, out / one.name, one.job, force=one.force),
                    stop,
                )
            )
        else:
            executor = local_executor(here, bases, out, console, stop, save_every=request["save_every"])
        batch = Batch(
            bases,
            executor,
            items,
            bad,
            out,
            settings=request.settings,
            background=request["background"],
            attempts=Attempts(request.part.attempts(out)),
            console=console,
            force=request["force"],
            stop=stop,
            part=request.part,
            retry=retry,
            command=request.as_json(),
            continues=continues,
            made=made,
            on_made=on_made,
        )
        try:
            return batch.run()
        except KeyboardInterrupt:
            done, left = len(batch.summary.done), batch.summary.left
            console.say(f"{done} done, {left} left; run the same command again to continue", always=True)
            raise


def _known(request: Request, command: str) -> tuple[set[str], set[str]]:
    """Names of the items that a stored command has made, and of those that only other commands have."""
    seen = snapshot(request.part.ledger(request.out))
    entries = () if seen is None else seen.entries
    own = [entry for entry in entries if entry.command == command]
    made = {entry.name for entry in own if entry.state == DONE}
    return made, {entry.name for entry in entries} - {entry.name for entry in own}


def _job(item: Item, request: Request, bases: Bases, stop: Stop) -> str | None:
    """The job of an item; None if it has none, for a reason that the run will give."""
    stop.check()
    own = dict(item.settings)
    try:
        base, config = bases(own.pop("model", None)), request.settings(own)
        sha256 = photo_file(item.photo).sha256
    except Exception:
        # Errors of an item are told where it is made, of any kind.
        return None
    return job_id(item.name, sha256, item.sentence, config, base, request["background"])


def _environments(request: Request, places: contextlib.ExitStack) -> list[dict[str, str]]:
    """The environments of the processes for a request; empty if this process runs it."""
    if request["executor"] == "ray":
        return [places.enter_context(driving(request["address"]))]
    if (count := _processes(request)) == 1:
        return []
    device = pick_device(request["device"])
    if device.type == "cpu":
        return list(cpu_environments(count))
    if device.index is not None:
        # All on the named GPU, by its number in this process.
        return [{} for _ in range(count)]
    return list(gpu_environments(count, torch.cuda.device_count()))


def _own(request: Request, environments: Sequence[Mapping[str, str]], console: Console) -> dict[str, Any]:
    """Options of the processes in place of the request's: their device, and their share of the memory they share."""
    if request["executor"] == "ray":
        # The machine that drives a cluster may lack the device of its workers. It only reads the base's configuration.
        return {"device": "cpu", "attention": "auto", "compute": "auto"}
    device = pick_device(request["device"])
    # A process whose torch sees no GPU must not take "auto" for the CPU.
    own: dict[str, Any] = {"device": str(device)}
    most = max(Counter(environment.get("CUDA_VISIBLE_DEVICES") for environment in environments).values())
    if most == 1:
        return own
    shares = [] if request["vram"] is None else [parse_bytes(request["vram"]) / most]
    if device.type != "cpu":
        console.say(f"up to {most} processes share a GPU (`workers`)")
        numbers = range(torch.cuda.device_count()) if device.index is None else [device.index]
        smallest = min(torch.cuda.get_device_properties(number).total_memory for number in numbers)
        shares.append(_SHARED * smallest / most)
    return own | ({"vram": f"{min(shares) / 1e9:.2f}GB"} if shares else {})


def _processes(request: Request) -> int:
    """The number of processes: `workers`, or one for each GPU, or one on a CPU or on a named GPU."""
    if request["workers"] is not None:
        return int(request["workers"])
    everything = request["device"] in ("auto", "cuda") and pick_device(request["device"]).type == "cuda"
    return torch.cuda.device_count() if everything else 1
