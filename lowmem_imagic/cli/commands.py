"""The command line ``lowmem-imagic``: its commands, words to calls.

torch is imported by the commands that need it, not by ``--help``.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..plain_text import shown
from . import options as opt
from .batch import batch
from .frame import Words, app, given, guarded, importing, print_report, put

app.add_typer(batch)


@app.command(
    epilog='Examples:  lowmem-imagic edit cat.jpg "a photo of a sleeping cat" --model sd15   |   '
    'lowmem-imagic edit scene.png "a blue cube on a wooden floor"'
)
@guarded
def edit(
    photo: Annotated[Path, typer.Argument(help="the picture to edit")],
    sentence: Annotated[str, typer.Argument(help="what the edited picture shows, with what is to stay as it is")],
    model: opt.Model = None,
    out: Annotated[
        Path | None, typer.Option(help="folder for the results [default: named after photo and sentence]")
    ] = None,
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
    photo_guidance: opt.PhotoGuidance = None,
    negative: opt.Negative = None,
    scheduler: opt.Scheduler = None,
    batch_rows: opt.BatchRows = None,
    strength: opt.StrengthText = None,
    interpolation: opt.Interpolation = None,
    start: opt.Start = None,
    mask: opt.Mask = None,
    suggest_eta: opt.SuggestEta = False,
    cover: opt.Cover = False,
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
    """Edit a photo: train, render along eta, and write the edit file, pictures, a sheet and a report."""
    words = Words(device=device, weights=base_weights, attention=attention)
    sampling = words.sampling(
        etas=etas,
        seeds=seeds,
        strength=strength,
        num_inference_steps=steps_sample,
        guidance_scale=guidance,
        photo_guidance=photo_guidance,
        negative_prompt=negative,
        scheduler=scheduler,
        batch_rows=batch_rows,
        interpolation=interpolation,
        start=start,
        mask=mask,
    )
    config = words.edit(
        preset,
        seed=seed,
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
    with importing():
        from ..actions import console
        from ..actions import edit as commands
        from ..actions import render as rendering

    report = commands.edit(
        photo,
        sentence,
        config,
        rendering.BaseOptions(model, revision, device, base_weights, attention, checkpointing, model_config),
        out=out,
        vram=vram,
        background=background,
        suggest=suggest_eta,
        cover=cover,
        force=force,
        console=console.Console(quiet=quiet),
    )
    print_report(report, as_json)


@app.command(
    epilog='Example:  lowmem-imagic train cat.jpg "a photo of a sleeping cat" --model sd15 --out cat.safetensors'
)
@guarded
def train(
    photo: Annotated[Path, typer.Argument(help="the picture to edit")],
    sentence: Annotated[str, typer.Argument(help="what the edited picture shows, with what is to stay as it is")],
    model: opt.Model = None,
    out: Annotated[
        Path | None, typer.Option(help="edit file to write [default: named after photo and sentence]")
    ] = None,
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
    """Train an edit and write its file; render it with `sample`."""
    words = Words(device=device, weights=base_weights, attention=attention)
    config = words.edit(
        preset,
        seed=seed,
        steps_embed=steps_embed,
        steps_finetune=steps_finetune,
        learning_rate=learning_rate,
        draws=draws,
        adapt=adapt,
        rank=rank,
        keep=keep,
        small=small,
    )
    with importing():
        from ..actions import console
        from ..actions import edit as commands
        from ..actions import render as rendering

    report = commands.train(
        photo,
        sentence,
        config,
        rendering.BaseOptions(model, revision, device, base_weights, attention, checkpointing, model_config),
        out=out,
        vram=vram,
        background=background,
        force=force,
        console=console.Console(quiet=quiet),
    )
    print_report(report, as_json)


@app.command(epilog="Example:  lowmem-imagic sample cat.safetensors --etas 0.6,0.7,0.8 --seeds 0,1,2 --out more")
@guarded
def sample(
    edit_file: opt.EditFile,
    model: opt.SampleModel = None,
    out: Annotated[Path | None, typer.Option(help="folder for the pictures [default: named after the edit]")] = None,
    etas: opt.Etas = None,
    seeds: opt.Seeds = None,
    prompt: opt.Prompt = None,
    strength: opt.StrengthText = None,
    interpolation: opt.Interpolation = None,
    start: opt.Start = None,
    mask: opt.Mask = None,
    suggest_eta: opt.SuggestEta = False,
    steps_sample: opt.StepsSample = None,
    guidance: opt.Guidance = None,
    photo_guidance: opt.PhotoGuidance = None,
    negative: opt.Negative = None,
    scheduler: opt.Scheduler = None,
    batch_rows: opt.BatchRows = None,
    device: opt.Device = "auto",
    base_weights: opt.SampleWeights = None,
    attention: opt.Attention = "auto",
    model_config: opt.ModelConfig = None,
    revision: opt.Revision = None,
    as_json: opt.AsJson = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Render an edit at other etas, seeds or strengths, or under another sentence; needs only the file and its base."""
    words = Words(device=device, weights=base_weights, attention=attention)
    overrides = words.sampling(
        etas=etas,
        seeds=seeds,
        strength=strength,
        num_inference_steps=steps_sample,
        guidance_scale=guidance,
        photo_guidance=photo_guidance,
        negative_prompt=negative,
        scheduler=scheduler,
        batch_rows=batch_rows,
        interpolation=interpolation,
        start=start,
        mask=mask,
    )
    words.check(overrides)
    with importing():
        from ..actions import console
        from ..actions import edit as commands
        from ..actions import render as rendering

    report = commands.sample(
        edit_file,
        overrides,
        rendering.BaseOptions(model, revision, device, base_weights, attention, False, model_config),
        prompt=prompt,
        out=out,
        suggest=suggest_eta,
        force=force,
        console=console.Console(quiet=quiet),
    )
    print_report(report, as_json)


@app.command(
    epilog="Example:  lowmem-imagic sheet cat.safetensors --rows seed --columns eta --etas 0.6,0.8,1 --photo cat.jpg"
)
@guarded
def sheet(
    edit_file: opt.EditFile,
    rows: Annotated[str, typer.Option(help="what varies from row to row: eta, strength, seed or guidance")] = "seed",
    columns: Annotated[str, typer.Option(help="what varies from column to column")] = "eta",
    etas: opt.Etas = None,
    strengths: Annotated[str | None, typer.Option(help="comma-separated factors on the adapter")] = None,
    seeds: opt.Seeds = None,
    guidances: Annotated[str | None, typer.Option(help="comma-separated guidance scales")] = None,
    photo: Annotated[Path | None, typer.Option(help="the edit's photo, to be shown beside (no file holds it)")] = None,
    model: opt.SampleModel = None,
    out: Annotated[Path | None, typer.Option(help="PNG to write [default: named after the edit]")] = None,
    prompt: opt.Prompt = None,
    interpolation: opt.Interpolation = None,
    start: opt.Start = None,
    mask: opt.Mask = None,
    steps_sample: opt.StepsSample = None,
    photo_guidance: opt.PhotoGuidance = None,
    negative: opt.Negative = None,
    scheduler: opt.Scheduler = None,
    batch_rows: opt.BatchRows = None,
    device: opt.Device = "auto",
    base_weights: opt.SampleWeights = None,
    attention: opt.Attention = "auto",
    model_config: opt.ModelConfig = None,
    revision: opt.Revision = None,
    as_json: opt.AsJson = False,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
) -> None:
    """Render an edit over any two of eta, strength, seed and guidance, on one labelled sheet."""
    words = Words(device=device, weights=base_weights, attention=attention)
    values = given(
        eta=words.numbers(etas, "etas", float),
        strength=words.numbers(strengths, "strengths", float),
        seed=words.numbers(seeds, "seeds", int),
        guidance=words.numbers(guidances, "guidances", float),
    )
    overrides = words.sampling(
        num_inference_steps=steps_sample,
        photo_guidance=photo_guidance,
        negative_prompt=negative,
        scheduler=scheduler,
        batch_rows=batch_rows,
        interpolation=interpolation,
        start=start,
        mask=mask,
    )
    words.check(overrides)
    with importing():
        from ..actions import console
        from ..actions import render as rendering
        from ..actions import sheet as sheets

    report = sheets.sheet(
        edit_file,
        rows,
        columns,
        values,
        overrides,
        rendering.BaseOptions(model, revision, device, base_weights, attention, False, model_config),
        prompt=prompt,
        photo=photo,
        out=out,
        force=force,
        console=console.Console(quiet=quiet),
    )
    print_report(report, as_json)


@app.command(epilog="Example:  lowmem-imagic inspect cat.safetensors --json")
@guarded
def inspect(
    edit_file: opt.EditFile,
    as_json: opt.AsJson = False,
) -> None:
    """Show what an edit file holds: sentence, base, settings, sizes."""
    from ..edits.header import describe, summary

    contents = describe(edit_file)
    put(json.dumps(contents, indent=2) if as_json else summary(contents))


@app.command(epilog='Example:  lowmem-imagic scene "a red cube on a wooden floor" cube.png --seed 3')
@guarded
def scene(
    sentence: Annotated[str, typer.Argument(help="one or two of sphere, cube, cylinder, cone on a floor")],
    out: Annotated[Path, typer.Argument(help="PNG file to write")],
    seed: Annotated[int, typer.Option(min=0, help="seed of everything the sentence leaves open")] = 0,
    size: Annotated[int, typer.Option(min=16, max=2048, help="side of the picture in pixels")] = 64,
    force: opt.Force = False,
) -> None:
    """Render a photo of the bundled world, to try edits on."""
    with importing():
        from ..demo.render import render
        from ..demo.scene import Scene
        from ..pictures.png import encode_png
        from ..storage.atomic import write_bytes
        from ..storage.writable import check_target

    check_target(out, overwrite=force)
    drawn = Scene.from_sentence(sentence, seed=seed)
    picture = render(drawn, size)
    write_bytes(
        out,
        encode_png(picture, text={"Title": drawn.caption()}, provenance="algorithmicMedia"),
        overwrite=force,
    )
    print_report({"summary": [f"{out}: {drawn.caption()}"]}, False)


@app.command(
    epilog="Examples:  lowmem-imagic doctor --json   |   lowmem-imagic doctor --plan --model sd15 --vram 6GB,8GB,12GB"
)
@guarded
def doctor(
    plan: Annotated[bool, typer.Option("--plan", help="show instead what fits on a graphics card")] = False,
    model: Annotated[str, typer.Option(help="with --plan: the base model; nothing is downloaded for sd15")] = "sd15",
    size: Annotated[int | None, typer.Option(help="with --plan: side of the pictures [default: the model's]")] = None,
    vram: Annotated[str, typer.Option(metavar="MEMORY", help="with --plan: memory of cards")] = "6GB,8GB,12GB",
    preset: opt.Preset = "balanced",
    as_json: opt.AsJson = False,
) -> None:
    """Show versions, devices and memory, and which 8-bit and attention paths are used here; or what fits on a card."""
    with importing():
        from ..actions.doctor import examine, plan_table, plans
        from ..settings.presets import preset as settings_of

    if plan:
        amounts = [amount for amount in vram.split(",") if amount]
        found = plans(model, amounts, settings_of(preset), size_px=size)
        for line in [json.dumps(found, indent=2)] if as_json else plan_table(found):
            put(line if as_json else shown(line))
        return
    findings = examine()
    if as_json:
        put(json.dumps(findings, indent=2))
        return
    for topic, entries in findings.items():
        put(topic)
        for name, value in entries.items():
            put(shown(f"  {name}: {value}"))


def main() -> None:
    """Entry point of the command line."""
    app()
