"""The command line of batches: ``lowmem-imagic batch run``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .. import cli_options as opt
from ..cli_frame import Words, guarded, importing, print_report
from ..config import EditConfig

SOME_FAILED = 3

batch = typer.Typer(
    name="batch",
    help="Edit many photos at once: a folder, or a list of (photo, sentence).",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@batch.callback()
def _group() -> None:
    """Edit many photos at once: a folder, or a list of (photo, sentence)."""


@batch.command(
    epilog='Examples:  lowmem-imagic batch run photos/ --prompt "a cat in the snow" --model sd15 --out snow   |   '
    "lowmem-imagic batch run list.jsonl --out edits --vram 8GB"
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
    model_config: opt.ModelConfig = None,
    revision: opt.Revision = None,
    as_json: opt.AsJson = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Edit every item of a manifest into a folder of its own; run again, it goes on with what is missing.

    Exit code 0: all done; 3: some failed, the others are done.
    """

    def settings(own: Mapping[str, Any]) -> EditConfig:
        words = Words(device=device, weights=base_weights, attention=attention)
        sampling = words.sampling(
            etas=_listed(own.get("etas", etas)),
            seeds=_listed(own.get("seeds", seeds)),
            num_inference_steps=steps_sample,
            guidance_scale=guidance,
            negative_prompt=negative,
            scheduler=scheduler,
        )
        return words.edit(
            own.get("preset", preset),
            seed=own.get("seed", seed),
            steps_embed=steps_embed,
            steps_finetune=steps_finetune,
            learning_rate=learning_rate,
            draws=draws,
            adapt=adapt,
            rank=rank,
            keep=keep,
            small=small,
            sampling=sampling,
        )

    config = settings({})
    with importing():
        from .. import console as consoles
        from .. import rendering
        from ..commands import fit_memory, open_base
        from ..errors import OutputExistsError
        from ..planning import Budget
        from ..writable import check_writable
        from .manifest import read_manifest
        from .runner import Batch

    items, bad = read_manifest(manifest, prompt)
    check_writable(out)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out} is no folder; name a folder with --out")
    console = consoles.Console(quiet=quiet)
    base = open_base(
        rendering.BaseOptions(model, revision, device, base_weights, attention, checkpointing, model_config),
        console,
        ["a photo", config.sample.negative_prompt],
    )
    # Before any weight is there: later, what is loaded would count twice.
    budget = Budget.of(base.device, vram)
    runner = Batch(
        base,
        items,
        bad,
        out,
        settings=settings,
        fit=lambda config, jobs: fit_memory(base, config, budget, console, jobs=jobs, beside=True),
        background=background,
        console=console,
        force=force,
    )
    try:
        tally = runner.run()
    except KeyboardInterrupt:
        console.say(f"{len(runner.tally.done)} done, {runner.tally.left} left; the same command goes on", always=True)
        raise
    before = f", {len(tally.before)} were there already" if tally.before else ""
    summary = f"{out}: {len(tally.done)} of {tally.total} done{before}, {len(tally.failed)} failed"
    print_report({"out": str(out), **tally.as_json(), "summary": [summary]}, as_json)
    if tally.failed:
        raise typer.Exit(SOME_FAILED)


def _listed(values: Any) -> str | None:
    """Numbers as an option has them."""
    return ",".join(map(str, values)) if isinstance(values, list) else values
