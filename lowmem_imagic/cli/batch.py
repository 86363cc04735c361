"""The command line of batches: ``lowmem-imagic batch run``, ``status``, ``retry``, ``sheet``."""

import os
from collections.abc import Sequence
from typing import Any

import typer

from .flags import with_flags
from .frame import importing, print_report
from .options import command

SOME_FAILED = 3

batch = typer.Typer(
    name="batch",
    help="Edit many photos: a folder, or a list of (photo, sentence).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@batch.callback()
def _group() -> None:
    """Edit many photos: a folder, or a list of (photo, sentence)."""


@command(
    batch,
    "batch run",
    epilog='Examples:  lowmem-imagic batch run photos/ --prompt "a cat in the snow" --model sd15 --out snow   |   '
    "lowmem-imagic batch run list.jsonl --out edits --vram 8GB   |   "
    "lowmem-imagic batch run list.csv --out edits --shard 3/16",
)
def run(values: dict[str, Any]) -> None:
    """Edit every item of a manifest, each into its own folder; run it again to make the missing items.

    Several runs on one folder share the work. Ctrl-C saves the edits in training and stops; a second one stops at once.
    Exit code 0: all done; 3: some failed, the others are done.
    """
    with importing():
        from ..batch.request import Request
        from ..families import findable

    asked = dict(values)
    as_json, quiet = asked.pop("json"), asked.pop("quiet")
    for name in ("manifest", "out"):
        asked[name] = str(asked[name].absolute())
    for name in ("model", "model_config", "vae", "text_from"):
        if asked[name] is not None:
            # `batch retry` may be run in another folder.
            asked[name] = findable(asked[name])
    _run([(None, Request(asked))], as_json=as_json, quiet=quiet)


@command(batch, "batch retry", epilog="Example:  lowmem-imagic batch retry snow --failed")
def retry(values: dict[str, Any]) -> None:
    """Run a batch again with its options: missing items, and items that failed for lack of memory or disk.

    It continues the last command into the folder, and any earlier one that has unfinished items.
    """
    with importing():
        from ..batch.failures import DIVERGED, INPUT, INTERNAL, RETRIED
        from ..batch.request import Request
        from ..batch.status import commands_of

    folder = values["folder"]
    commands, lost = list[tuple[str, Request]](), list[str]()
    for one in commands_of(folder):
        # The batch's folder may have been moved.
        request = Request.of(one.request).but(out=str(folder.absolute()))
        if one.last or (one.unfinished and os.path.lexists(request["manifest"])):
            commands.append((one.name, request))
        elif one.unfinished:
            lost.append(f"{one.unfinished} not done of {one}, which is not there any more")
    # Skip parts of a list that was also run as a whole.
    wholes = [one.but(force=False) for _, one in commands if one["shard"] is None]
    commands = [
        (name, one) for name, one in commands if one["shard"] is None or one.but(shard=None, force=False) not in wholes
    ]
    again = (*RETRIED, INPUT, DIVERGED, INTERNAL) if values["failed"] else RETRIED
    _run(commands, retry=again, as_json=values["json"], quiet=values["quiet"], warnings=lost)


@command(batch, "batch status", epilog="Example:  lowmem-imagic batch status snow --json")
def status(values: dict[str, Any]) -> None:
    """Show the progress of a batch, running or finished: counts, time left, all failures; with --json all items."""
    from ..batch.status import status as status_of

    print_report(status_of(values["folder"]), values["json"])


@command(batch, "batch sheet", epilog="Example:  lowmem-imagic batch sheet snow")
def sheet(values: dict[str, Any]) -> None:
    """Make one picture of all items, overview.png, and a page to open from disk, index.html."""
    from ..batch.overview import write_overview

    print_report(write_overview(values["folder"], force=values["force"]), values["json"])


def _run(
    commands: Sequence[tuple[str | None, Any]],
    *,
    retry: Any = None,
    as_json: bool,
    quiet: bool,
    warnings: Sequence[str] = (),
) -> None:
    """Runs batches one after the other, prints their summary, and ends with their common exit code.

    Args:
        commands: the name of the stored command that each continues, or None, and its request.
        retry: kinds of failure to try again; None for the usual ones.
        as_json: print the summary as JSON.
        quiet: show warnings only.
        warnings: shown first.
    """
    with importing():
        from ..actions import console as consoles
        from ..batch.failures import RETRIED
        from ..batch.manifest import Summary
        from ..batch.run import run as run_batch
        from ..batch.stopping import listening

    total = Summary(0)
    for warning in warnings:
        consoles.Console(quiet=quiet).warn(warning)
    with listening() as stop:
        for name, request in commands:
            console = consoles.Console(quiet=quiet, wording=with_flags)
            again = RETRIED if retry is None else retry
            total += run_batch(request, console, stop, retry=again, continues=name)
    before = f", {len(total.before)} of them done before" if total.before else ""
    done, [out, *_] = len(total.done) + len(total.before), [one["out"] for _, one in commands]
    summary = f"{out}: {done} of {total.total} done{before}, {len(total.failed)} failed"
    print_report({"out": out, **total.as_json(), "summary": [summary]}, as_json)
    if total.failed:
        raise typer.Exit(SOME_FAILED)
    if total.left > 0:
        raise typer.Exit(1)
