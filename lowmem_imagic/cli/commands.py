"""The commands of the command line ``lowmem-imagic``.

torch is imported by the commands that need it, not by ``--help``.
"""

import json
import os
import sys
from typing import Any

import typer

from ..demo.sentence import known_words
from ..errors import ConfigError
from ..plain_text import shown
from ..settings.options import options_of
from ..settings.text import Words
from ..share.address import SUFFIX
from ..storage.writable import check_ending
from .batch import batch
from .flags import with_flags
from .frame import app, importing, print_report, put, put_text
from .options import command

app.add_typer(batch)


@command(
    app,
    "edit",
    epilog='Examples:  lowmem-imagic edit cat.jpg "a photo of a sleeping cat" --model sd15   |   '
    'lowmem-imagic edit cat.jpg "a photo of a sleeping cat" --source "a photo of a cat" --model sd15   |   '
    'lowmem-imagic edit scene.png "a blue cube on a wooden floor" "a red cube on a grass floor"',
)
def edit(values: dict[str, Any]) -> None:
    """Edit a photo: train once, render each sentence along eta; write the edit file, pictures, a sheet and a report."""
    words = Words("edit", values)
    config = words.edit()
    with importing():
        from ..actions import console
        from ..actions import edit as commands

    report = commands.edit(
        values["photo"],
        values["sentence"] or (),
        config,
        words.base,
        out=values["out"],
        vram=values["vram"],
        background=values["background"],
        cover=values["cover"],
        force=values["force"],
        console=console.Console(quiet=values["quiet"], wording=with_flags),
    )
    print_report(report, values["json"])


@command(
    app,
    "train",
    epilog="Examples:  lowmem-imagic train cat.jpg --model sd15   |   "
    'lowmem-imagic train cat.jpg "a photo of a sleeping cat" --model sd15 --out cat.safetensors',
)
def train(values: dict[str, Any]) -> None:
    """Train an edit and write its file; render it with `sample`, under any sentences."""
    words = Words("train", values)
    config = words.edit()
    if values["out"] is None or not os.path.isdir(values["out"]):
        check_ending(values["out"], SUFFIX)
    with importing():
        from ..actions import console
        from ..actions import edit as commands

    report = commands.train(
        values["photo"],
        values["sentence"] or (),
        config,
        words.base,
        out=values["out"],
        vram=values["vram"],
        background=values["background"],
        force=values["force"],
        console=console.Console(quiet=values["quiet"], wording=with_flags),
    )
    print_report(report, values["json"])


@command(
    app,
    "sample",
    epilog="Examples:  lowmem-imagic sample cat.safetensors --etas 0.6,0.7,0.8 --seeds 0,1,2 --out more   |   "
    'lowmem-imagic sample cat.safetensors --prompt "a photo of a sleeping cat" --prompt "a photo of a wet cat"',
)
def sample(values: dict[str, Any]) -> None:
    """Render an edit at other etas, seeds or strengths, or under other sentences; needs only the file and its base."""
    words = Words("sample", values)
    overrides = words.sampling()
    with importing():
        from ..actions import console
        from ..actions import edit as commands

    report = commands.sample(
        values["edit_file"],
        overrides,
        words.base,
        prompts=values["prompt"] or (),
        out=values["out"],
        force=values["force"],
        console=console.Console(quiet=values["quiet"], wording=with_flags),
    )
    print_report(report, values["json"])


@command(
    app,
    "sheet",
    epilog="Example:  lowmem-imagic sheet cat.safetensors --rows seed --columns eta --etas 0.6,0.8,1 --photo cat.jpg",
)
def sheet(values: dict[str, Any]) -> None:
    """Render an edit over any two of eta, strength, seed and guidance, on one labelled sheet."""
    words = Words("sheet", values)
    overrides = words.sampling()
    check_ending(values["out"], ".png", any_case=True)
    with importing():
        from ..actions import console
        from ..actions import sheet as sheets

    report = sheets.sheet(
        values["edit_file"],
        values["rows"],
        values["columns"],
        words.axes,
        overrides,
        words.base,
        prompt=values["prompt"],
        photo=values["photo"],
        out=values["out"],
        force=values["force"],
        console=console.Console(quiet=values["quiet"], wording=with_flags),
    )
    print_report(report, values["json"])


@command(app, "inspect", epilog="Example:  lowmem-imagic inspect cat.safetensors --json")
def inspect(values: dict[str, Any]) -> None:
    """Show the contents of an edit file: sentence, base, settings, sizes, and the programs that load it."""
    from ..share.address import Address
    from ..share.programs import inspected, told

    path = values["edit_file"]
    if Address.is_one(path.as_posix()):
        with importing():
            from ..share.hub import download

        path, _ = download(Address.of(path.as_posix()))
    contents = inspected(path)
    put(json.dumps(contents, indent=2) if values["json"] else told(contents))


@command(
    app,
    "export",
    epilog="Examples:  lowmem-imagic export cat.safetensors cat-peft --to peft   |   "
    "lowmem-imagic export cat.safetensors ComfyUI --to comfyui",
)
def export(values: dict[str, Any]) -> None:
    """Write an edit as the files that another program reads."""
    with importing():
        from ..actions import console
        from ..actions.export import export as write

    report = write(
        values["edit_file"],
        values["to"],
        values["folder"],
        force=values["force"],
        console=console.Console(wording=with_flags),
    )
    print_report(report, values["json"])


@command(app, "push", epilog="Example:  lowmem-imagic push cat.safetensors USER/cat")
def push(values: dict[str, Any]) -> None:
    """Upload an edit to the Hugging Face Hub, with a card; asks first, as an edit gives its photo back."""
    with importing():
        from ..actions import console, hub

    path, repository, pictures = values["edit_file"], values["repository"], values["picture"] or ()
    agreed = values["yes"]
    if not agreed and sys.stdin.isatty():
        asked = hub.question(path, repository, public=values["public"], pictures=pictures, force=values["force"])
        if not typer.confirm(f"{shown(asked)} Upload it?", err=True):
            raise typer.Exit(1)
        agreed = True
    report = hub.push(
        path,
        repository,
        agreed=agreed,
        public=values["public"],
        pictures=pictures,
        thumbnail=values["thumbnail"],
        force=values["force"],
        console=console.Console(wording=with_flags),
    )
    print_report(report, values["json"])


@command(
    app,
    "pull",
    epilog="Examples:  lowmem-imagic pull USER/cat   |   lowmem-imagic pull https://huggingface.co/USER/cat",
)
def pull(values: dict[str, Any]) -> None:
    """Download an edit from the Hugging Face Hub into a file; its base is not downloaded."""
    check_ending(values["out"], SUFFIX)
    with importing():
        from ..actions import console, hub

    report = hub.pull(
        values["repository"],
        revision=values["revision"],
        out=values["out"],
        force=values["force"],
        console=console.Console(wording=with_flags),
    )
    print_report(report, values["json"])


@command(
    app,
    "scene",
    epilog='Examples:  lowmem-imagic scene "a red cube on a wooden floor" cube.png --seed 3   |   '
    'lowmem-imagic scene "a red cube with cyan stripes on a wooden floor in front of a wall" striped.png   |   '
    f"Words:  {known_words()}",
)
def scene(values: dict[str, Any]) -> None:
    """Render a photo of the bundled world, for trying edits."""
    out = values["out"]
    check_ending(out, ".png", any_case=True)
    with importing():
        from ..demo.render import render
        from ..demo.scene import Scene
        from ..pictures.png import encode_png
        from ..storage.writable import check_target, write_target

    check_target(out, overwrite=values["force"])
    drawn = Scene.from_sentence(values["sentence"], seed=values["seed"])
    picture = render(drawn, values["size"])
    write_target(
        out,
        encode_png(picture, text={"Title": drawn.caption()}, provenance="algorithmicMedia"),
        overwrite=values["force"],
    )
    lines = [f"{out}: {drawn.caption()}"]
    if not drawn.plain:
        *most, last = drawn.unnamed
        words, them = (f"{', '.join(most)} or {last}", "these words") if most else (last, "this word")
        lines.append(
            f"the bundled model has no word for {words}: leave {them} out of the sentences of an edit; eta 0 keeps "
            "such details, most edits lose them at eta 1, and more keep them with `source_prompt`"
        )
    print_report({"summary": lines}, False)


@command(
    app,
    "doctor",
    epilog="Examples:  lowmem-imagic doctor --json   |   lowmem-imagic doctor --plan --model sd15 --vram 6GB,8GB,12GB",
)
def doctor(values: dict[str, Any]) -> None:
    """Show versions, devices, memory, and the 8-bit and attention paths in use; or which edits fit on a card."""
    with importing():
        from ..actions.doctor import examine, plan_table, plans, speed_here
        from ..settings.presets import preset

    if values["plan"]:
        amounts = [amount for amount in values["vram"].split(",") if amount]
        config, weights = preset(values["preset"]), values["base_weights"]
        speed = speed_here(weights=weights)
        fitting = plans(values["model"], amounts, config, size_px=values["size"], weights=weights, speed=speed)
        if values["json"]:
            put(json.dumps(fitting, indent=2))
        else:
            for line in plan_table(fitting):
                put_text(line)
        return
    idle = [f"`{row.name}`" for row in options_of("doctor") if row.name != "json" and values[row.name] != row.default]
    if idle:
        raise ConfigError(f"{', '.join(idle)} without `plan`, which alone they change; give `plan`, too")
    findings = examine()
    if values["json"]:
        put(json.dumps(findings, indent=2))
        return
    for topic, entries in findings.items():
        put(topic)
        for name, value in entries.items():
            put_text(f"  {name}: {value}")


@command(
    app,
    "ui",
    epilog="Examples:  lowmem-imagic ui   |   lowmem-imagic ui --model sd15 --model sdxl",
)
def ui(values: dict[str, Any]) -> None:
    """Open the studio, a page in the browser: train on a photo, ask sentences, slide along eta, run batches."""
    with importing():
        from ..ui.server import serve

    serve(
        values["model"] or (),
        device=values["device"],
        out=values["out"],
        port=values["port"],
        listen=values["listen"],
        announce=put_text,
    )


def main() -> None:
    """Entry point of the command line."""
    app()
