"""The command line of batches: ``lowmem-imagic batch run``, ``status``, ``retry``, ``sheet``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options as opt
from .frame import guarded, importing, print_report

SOME_FAILED = 3
MAX_SLOTS = 64
MAX_WORKERS = 64

batch = typer.Typer(
    name="batch",
    help="Edit many photos: a folder, or a list of (photo, sentence).",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the --out of a batch run")]


@batch.callback()
def _group() -> None:
    """Edit many photos: a folder, or a list of (photo, sentence)."""


@batch.command(
    epilog='Examples:  lowmem-imagic batch run photos/ --prompt "a cat in the snow" --model sd15 --out snow   |   '
    "lowmem-imagic batch run list.jsonl --out edits --vram 8GB   |   "
    "lowmem-imagic batch run list.csv --out edits --shard 3/16"
)
@guarded
def run(
    manifest: Annotated[
        Path, typer.Argument(help="a folder of photos, or a .jsonl, .csv or .json list of photo, sentence, ...")
    ],
    out: Annotated[Path, typer.Option(help="folder that gets a folder for each item")],
    prompt: Annotated[
        str | None, typer.Option(help="sentence for items that have none of their own; a folder needs it")
    ] = None,
    model: opt.Model = None,
    etas: opt.Etas = None,
    seeds: opt.Seeds = None,
    preset: opt.Preset = "balanced",
    seed: opt.Seed = 0,
    steps_embed: opt.StepsEmbed = None,
    steps_finetune: opt.StepsFinetune = None,
    learning_rate: opt.LearningRate = None,
    draws: opt.Draws = None,
    adapt: opt.Adapt = None,
    rank: opt.Rank = None,
    keep: opt.Keep = None,
    small: opt.Small = False,
    steps_sample: opt.StepsSample = None,
    guidance: opt.Guidance = None,
    negative: opt.Negative = None,
    scheduler: opt.Scheduler = None,
    background: opt.Background = "white",
    device: opt.Device = "auto",
    base_weights: opt.BaseWeights = "int8",
    attention: opt.Attention = "auto",
    checkpointing: opt.Checkpointing = False,
    vram: opt.Vram = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=MAX_SLOTS, help="most edits that train side by side [default: as fit]")
    ] = None,
    model_config: opt.ModelConfig = None,
    revision: opt.Revision = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="only the Ith of N parts of the manifest, for array jobs")
    ] = None,
    executor: Annotated[
        str, typer.Option(help="who makes the items: local (this machine), or ray (a Ray cluster)")
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(help="of the Ray cluster, auto for the one of this machine [default: RAY_ADDRESS, or a new one]"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=MAX_WORKERS, help="processes, or Ray actors, to share the work [default: one a GPU]"),
    ] = None,
    save_every: Annotated[
        int, typer.Option(min=0, help="training steps between two saved states of an edit; 0 saves only when stopped")
    ] = 25,
    as_json: opt.AsJson = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Edit every item of a manifest into a folder of its own; run again, it goes on with what is missing.

    Several runs on one folder share the work. Ctrl-C saves what is in training; once more, it stops at once.
    Exit code 0: all done; 3: some failed, the others are done.
    """
    words = dict(locals())
    del words["as_json"], words["quiet"]
    with importing():
        from ..batch.request import Request
        from ..families import findable

    for name in ("manifest", "out"):
        words[name] = str(words[name].absolute())
    for name in ("model", "model_config"):
        if words[name] is not None:
            # For `batch retry`, from wherever.
            words[name] = findable(words[name])
    _run([Request(**words)], as_json=as_json, quiet=quiet)


@batch.command(epilog="Example:  lowmem-imagic batch retry snow --failed")
@guarded
def retry(
    folder: Folder,
    failed: Annotated[
        bool, typer.Option("--failed", help="also what failed for a reason that does not pass, such as a bad photo")
    ] = False,
    as_json: opt.AsJson = False,
    quiet: opt.Quiet = False,
) -> None:
    """Run a batch again with the options it had: what is missing, and what failed for want of memory or disk."""
    with importing():
        from ..batch.failures import DIVERGED, INPUT, INTERNAL, RETRIED
        from ..batch.request import Request
        from ..batch.status import commands_of

    # As it lies now: it may have been moved. What was forced once is not forced again.
    requests = [replace(Request.of(note), out=str(folder.absolute()), force=False) for note in commands_of(folder)]
    # Parts of a list that has been run as a whole, too, are run with it.
    requests = [one for one in requests if one.shard is None or replace(one, shard=None) not in requests]
    _run(requests, retry=(*RETRIED, INPUT, DIVERGED, INTERNAL) if failed else RETRIED, as_json=as_json, quiet=quiet)


@batch.command(epilog="Example:  lowmem-imagic batch status snow --json")
@guarded
def status(folder: Folder, as_json: opt.AsJson = False) -> None:
    """Show how far a batch is, live or finished: counts, time left, every failure; with --json every item."""
    from ..batch.status import status as look

    print_report(look(folder), as_json)


@batch.command(epilog="Example:  lowmem-imagic batch sheet snow")
@guarded
def sheet(folder: Folder, as_json: opt.AsJson = False, force: opt.Force = False) -> None:
    """Make one picture of all items, overview.png, and a page to open from disk, index.html."""
    from ..batch.overview import write_overview

    print_report(write_overview(folder, force=force), as_json)


def _run(requests: Sequence[Any], *, retry: Any = None, as_json: bool, quiet: bool) -> None:
    """Runs batches one after the other, prints what came of them, and ends with the exit code of all."""
    with importing():
        from ..actions import console as consoles
        from ..batch.failures import RETRIED
        from ..batch.stopping import listening
        from ..batch.tally import Tally

    tally = Tally(0)
    with listening() as stop:
        for request in requests:
            tally += request.run(consoles.Console(quiet=quiet), stop, retry=RETRIED if retry is None else retry)
    before = f", {len(tally.before)} were there already" if tally.before else ""
    made, out = len(tally.done) + len(tally.before), requests[0].out
    summary = f"{out}: {made} of {tally.total} done{before}, {len(tally.failed)} failed"
    print_report({"out": out, **tally.as_json(), "summary": [summary]}, as_json)
    if tally.failed:
        raise typer.Exit(SOME_FAILED)
    if tally.left > 0:
        raise typer.Exit(1)
