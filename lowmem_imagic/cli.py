"""The command line ``lowmem-imagic``: words to calls, printing, exit codes.

Exit codes: 0 done, 1 failure, 2 usage (settings, sentence), 130 stopped by Ctrl-C. Results go to standard
output (with ``--json`` as one JSON object), everything else to standard error. torch is imported by the
commands that need it, not by ``--help``.
"""

import functools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .config import ADAPT_TARGETS, PRESETS
from .errors import ConfigError, LowmemImagicError, PromptError

app = typer.Typer(
    name="lowmem-imagic",
    help="Edit a real photo with a sentence (Imagic), on an 8-12 GB graphics card or a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130

Model = Annotated[
    str | None,
    typer.Option(
        help="demo, sd14, sd15, sd21, sd21-base, a diffusers folder, a .safetensors file or a Hub id [default: demo]"
    ),
]
ModelConfig = Annotated[
    Path | None,
    typer.Option(
        help="diffusers folder whose configuration a .safetensors file uses; one of SD 2.x needs it, others offline"
    ),
]
Revision = Annotated[str | None, typer.Option(help="commit, tag or branch of a Hub model")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:N or cpu")]
BaseWeights = Annotated[str, typer.Option(help="format of the frozen UNet: int8, bnb-int8, bf16 or fp32")]
Attention = Annotated[str, typer.Option(help="auto, xformers or sdpa")]
Checkpointing = Annotated[bool, typer.Option("--checkpointing", help="recompute activations: less memory, more time")]
Preset = Annotated[str, typer.Option(help=f"settings to start from: {', '.join(PRESETS)}")]
Seed = Annotated[int, typer.Option(help="seed of everything drawn while training")]
Etas = Annotated[str | None, typer.Option(help="comma-separated: 0 is the photo, 1 the sentence, above 1 beyond it")]
Seeds = Annotated[str | None, typer.Option(help="comma-separated seeds of the starting noise")]
StepsSample = Annotated[int | None, typer.Option(help="denoising steps per image")]
Guidance = Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1 switches it off")]
Negative = Annotated[str | None, typer.Option(help="sentence to steer away from")]
Scheduler = Annotated[
    str | None, typer.Option(help="diffusers scheduler: DDIM, EulerDiscrete, DPMSolverMultistep, ...")
]
BatchRows = Annotated[int | None, typer.Option(help="UNet rows in one sampling batch at most")]
Background = Annotated[str, typer.Option(help="colour under transparent parts of the photo")]
AsJson = Annotated[bool, typer.Option("--json", help="print the report as JSON")]
Force = Annotated[bool, typer.Option("--force", help="replace files that are there already")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]
StepsEmbed = Annotated[int | None, typer.Option(help="steps of stage 1 (embedding)")]
StepsFinetune = Annotated[int | None, typer.Option(help="steps of stage 2 (adapter)")]
LearningRate = Annotated[float | None, typer.Option(help="learning rate of stage 2")]
Draws = Annotated[int | None, typer.Option(help="(timestep, noise) draws a step, both stages")]
Adapt = Annotated[str | None, typer.Option(help=f"layers to adapt: {', '.join(ADAPT_TARGETS)}")]
Rank = Annotated[int | None, typer.Option(help="LoRA rank, 1 to 256; alpha follows it")]


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the package's errors turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        # Libraries advise developers in their logs; a user of the command line can do nothing about it.
        for library in ("bitsandbytes", "diffusers", "transformers", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.ERROR)
        try:
            command(*args, **kwargs)
        except LowmemImagicError as error:
            _fail(str(error), 2 if isinstance(error, (ConfigError, PromptError)) else 1)
        except KeyboardInterrupt:
            _fail("stopped; nothing half-written was left behind", INTERRUPTED)
        except BrokenPipeError:
            # The reader of our output went away, as `head` does.
            sys.stderr.close()
            raise typer.Exit(0) from None

    return run


def _fail(message: str, code: int) -> NoReturn:
    typer.echo(f"lowmem-imagic: {message}", err=True)
    raise typer.Exit(code)


def _numbers(text: str | None, name: str, kind: type) -> tuple[Any, ...] | None:
    """The numbers of a comma-separated option; None where it was not given."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, expected comma-separated numbers such as 0,0.6,1") from None


def _given(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def _sampling(
    etas: str | None,
    seeds: str | None,
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    scheduler: str | None,
    batch_rows: int | None,
) -> dict[str, Any]:
    return _given(
        etas=_numbers(etas, "etas", float),
        seeds=_numbers(seeds, "seeds", int),
        num_inference_steps=steps,
        guidance_scale=guidance,
        negative_prompt=negative,
        scheduler=scheduler,
        batch_rows=batch_rows,
    )


@app.command(
    epilog='Examples:  lowmem-imagic edit cat.jpg "a photo of a sleeping cat" --model sd15   |   '
    'lowmem-imagic edit scene.png "a blue cube on a wooden floor"'
)
@_guarded
def edit(
    photo: Annotated[Path, typer.Argument(help="the picture to edit")],
    sentence: Annotated[str, typer.Argument(help="what the edited picture shows")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the results [default: named after photo and sentence]")
    ] = None,
    etas: Etas = None,
    seeds: Seeds = None,
    preset: Preset = "balanced",
    seed: Seed = 0,
    steps_embed: StepsEmbed = None,
    steps_finetune: StepsFinetune = None,
    learning_rate: LearningRate = None,
    draws: Draws = None,
    adapt: Adapt = None,
    rank: Rank = None,
    steps_sample: StepsSample = None,
    guidance: Guidance = None,
    negative: Negative = None,
    scheduler: Scheduler = None,
    batch_rows: BatchRows = None,
    background: Background = "white",
    device: Device = "auto",
    base_weights: BaseWeights = "int8",
    attention: Attention = "auto",
    checkpointing: Checkpointing = False,
    model_config: ModelConfig = None,
    revision: Revision = None,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Edit a photo: train, render along eta, and write the edit file, pictures, a sheet and a report."""
    sampling = _sampling(etas, seeds, steps_sample, guidance, negative, scheduler, batch_rows)
    config = _config(preset, seed, steps_embed, steps_finetune, learning_rate, draws, adapt, rank, sampling)
    from . import commands

    report = commands.edit(
        photo,
        sentence,
        config,
        commands.BaseOptions(model, revision, device, base_weights, attention, checkpointing, model_config),
        out=out,
        background=background,
        force=force,
        console=commands.Console(quiet=quiet),
    )
    _print_report(report, as_json)


@app.command(
    epilog='Example:  lowmem-imagic train cat.jpg "a photo of a sleeping cat" --model sd15 --out cat.safetensors'
)
@_guarded
def train(
    photo: Annotated[Path, typer.Argument(help="the picture to edit")],
    sentence: Annotated[str, typer.Argument(help="what the edited picture shows")],
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="edit file to write [default: named after photo and sentence]")
    ] = None,
    preset: Preset = "balanced",
    seed: Seed = 0,
    steps_embed: StepsEmbed = None,
    steps_finetune: StepsFinetune = None,
    learning_rate: LearningRate = None,
    draws: Draws = None,
    adapt: Adapt = None,
    rank: Rank = None,
    background: Background = "white",
    device: Device = "auto",
    base_weights: BaseWeights = "int8",
    attention: Attention = "auto",
    checkpointing: Checkpointing = False,
    model_config: ModelConfig = None,
    revision: Revision = None,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Train an edit and write its file; render it with `sample`."""
    config = _config(preset, seed, steps_embed, steps_finetune, learning_rate, draws, adapt, rank, {})
    from . import commands

    report = commands.train(
        photo,
        sentence,
        config,
        commands.BaseOptions(model, revision, device, base_weights, attention, checkpointing, model_config),
        out=out,
        background=background,
        force=force,
        console=commands.Console(quiet=quiet),
    )
    _print_report(report, as_json)


@app.command(epilog="Example:  lowmem-imagic sample cat.safetensors --etas 0.6,0.7,0.8 --seeds 0,1,2 --out more")
@_guarded
def sample(
    edit_file: Annotated[Path, typer.Argument(metavar="EDIT", help="an edit file")],
    model: Annotated[str | None, typer.Option(help="base model [default: the one named in the edit]")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for the pictures [default: named after the edit]")] = None,
    etas: Etas = None,
    seeds: Seeds = None,
    strength: Annotated[float | None, typer.Option(help="factor on the adapter, 0 to 2; 0 is the base alone")] = None,
    steps_sample: StepsSample = None,
    guidance: Guidance = None,
    negative: Negative = None,
    scheduler: Scheduler = None,
    batch_rows: BatchRows = None,
    device: Device = "auto",
    base_weights: Annotated[
        str | None, typer.Option(help="format of the frozen UNet [default: as in training]")
    ] = None,
    attention: Attention = "auto",
    model_config: ModelConfig = None,
    revision: Revision = None,
    as_json: AsJson = False,
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Render an edit at other etas, seeds or strengths; needs only the edit file and its base."""
    overrides = _sampling(etas, seeds, steps_sample, guidance, negative, scheduler, batch_rows)
    from . import commands

    report = commands.sample(
        edit_file,
        {**overrides, **_given(strength=strength)},
        commands.BaseOptions(model, revision, device, base_weights, attention, False, model_config),
        out=out,
        force=force,
        console=commands.Console(quiet=quiet),
    )
    _print_report(report, as_json)


@app.command(epilog="Example:  lowmem-imagic inspect cat.safetensors --json")
@_guarded
def inspect(
    edit_file: Annotated[Path, typer.Argument(metavar="EDIT", help="an edit file")],
    as_json: AsJson = False,
) -> None:
    """Show what an edit file holds: sentence, base, settings, sizes."""
    from .edit_header import describe, summary

    contents = describe(edit_file)
    typer.echo(json.dumps(contents, indent=2, ensure_ascii=False) if as_json else summary(contents))


@app.command(epilog='Example:  lowmem-imagic scene "a red cube on a wooden floor" cube.png --seed 3')
@_guarded
def scene(
    sentence: Annotated[str, typer.Argument(help="one or two of sphere, cube, cylinder, cone on a floor")],
    out: Annotated[Path, typer.Argument(help="PNG file to write")],
    seed: Annotated[int, typer.Option(help="seed of everything the sentence leaves open")] = 0,
    size: Annotated[int, typer.Option(min=16, max=2048, help="side of the picture in pixels")] = 64,
    force: Force = False,
) -> None:
    """Render a photo of the bundled world, to try edits on."""
    from .atomic import write_bytes
    from .demo.render import render
    from .demo.scene import Scene
    from .png import encode_png

    drawn = Scene.from_sentence(sentence, seed=seed)
    picture = render(drawn, size)
    write_bytes(
        out,
        encode_png(picture, text={"Title": drawn.caption()}, provenance="algorithmicMedia"),
        overwrite=force,
    )
    typer.echo(f"{out}: {drawn.caption()}")


@app.command(epilog="Example:  lowmem-imagic doctor --json")
@_guarded
def doctor(as_json: AsJson = False) -> None:
    """Show versions, devices and memory, and which 8-bit and attention paths are used here."""
    from .doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
        return
    for topic, entries in findings.items():
        typer.echo(topic)
        for name, value in entries.items():
            typer.echo(f"  {name}: {value}")


def _config(
    preset: str,
    seed: int,
    steps_embed: int | None,
    steps_finetune: int | None,
    learning_rate: float | None,
    draws: int | None,
    adapt: str | None,
    rank: int | None,
    sampling: dict[str, Any],
) -> Any:
    """The settings of a preset with the given options on top; all problems at once."""
    from .config import preset as settings

    alpha = None if rank is None else float(rank)
    return settings(
        preset,
        {
            "": {"seed": seed},
            "embed": _given(steps=steps_embed, draws=draws),
            "finetune": _given(
                steps=steps_finetune,
                learning_rate=learning_rate,
                draws=draws,
                adapt=adapt,
                lora_rank=rank,
                lora_alpha=alpha,
            ),
            "sample": sampling,
        },
    )


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for line in report["summary"]:
        typer.echo(line)


def main() -> None:
    """Entry point of the command line."""
    app()
