"""One table of options: the command line, batches and messages all follow it."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowmem_imagic
from lowmem_imagic.batch.request import Request
from lowmem_imagic.cli.commands import app
from lowmem_imagic.cli.flags import with_flags
from lowmem_imagic.diffusion.flow import SAMPLERS
from lowmem_imagic.errors import ConfigError, MemoryLimitError
from lowmem_imagic.families.files.source import SHORT_NAMES
from lowmem_imagic.settings.options import FIRST, OPTIONS, PANELS, PICTURES, TRAINING, options_of
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.settings.text import BaseOptions, Words

PACKAGE = Path(lowmem_imagic.__file__).parent

_BASE = (
    "--attention --base-weights --compute --device --force --json --model --model-config --out --quiet --revision "
    "--text-from --vae -q"
)
_TRAINING = (
    "--adapt --background --checkpointing --draws --keep --learning-rate --preset --rank --seed --small --steps-embed "
    "--steps-finetune --vram"
)
_SHEET = (
    "--batch-rows --edit-guidance --etas --interpolation --mask --negative --photo-guidance --scheduler --seeds "
    "--source --start --steps-sample"
)
_RENDERING = f"{_SHEET} --guidance --strength"
FLAGS = {
    "edit": f"{_BASE} {_TRAINING} {_RENDERING} --cover",
    "train": f"{_BASE} {_TRAINING}",
    "sample": f"{_BASE} {_RENDERING} --prompt",
    "sheet": f"{_BASE} {_SHEET} --columns --guidances --photo --prompt --rows --strengths",
    "inspect": "--json",
    "export": "--force --json --to",
    "push": "--force --json --picture --public --thumbnail --yes",
    "pull": "--force --json --out --revision",
    "scene": "--force --seed --size",
    "ui": "--device --listen --model --out --port",
    "doctor": "--base-weights --json --model --plan --preset --size --vram",
    "batch run": (
        f"{_BASE} {_TRAINING} {_RENDERING} --address --executor --prompt --save-every --shard --slots --workers"
    ),
    "batch retry": "--failed --json --quiet -q",
    "batch status": "--json",
    "batch sheet": "--force --json",
}
"""The flags of each command, which users have in their scripts."""


def _help(command: str) -> str:
    """The help of a command, wide enough for every option to have a line of its own."""
    result = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "300"}, terminal_width=300)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", sorted(FLAGS))
def test_flags_stay(command: str) -> None:
    """Every command has the flags that scripts use, and help shows each of them once."""
    shown = re.findall(r"^  (-[a-z-]+)(?:, (-[a-z-]+))?", _help(command), re.MULTILINE)
    flags = [flag for line in shown for flag in line if flag]
    assert sorted(flags) == sorted([*FLAGS[command].split(), "-h", "--help"])


@pytest.mark.parametrize("command", ["edit", "train", "sample", "sheet", "batch run"])
def test_help_begins_with_the_options_that_people_use_first(command: str) -> None:
    """Help groups options in panels; the first has six at most, the model and the folder among them."""
    text = _help(command)
    titles = re.findall(r"^([A-Z][a-z ]+):$", text, re.MULTILINE)
    assert titles[:2] == ["Arguments", FIRST] and titles[1:] == [panel for panel in PANELS if panel in titles]
    first = text[text.index(f"{FIRST}:") : text.index(f"{titles[2]}:")]
    assert first.count("\n  --") <= 6 and "--model" in first and "--out" in first


def test_help_names_the_models_and_schedulers_of_every_kind_of_model() -> None:
    """Help names a short name of each kind of model, and the samplers of a flow beside those of other schedules."""
    help_of = {option.name: option.help for option in options_of("edit")}
    assert {"sd15", "sdxl", "klein", "if-l"} <= set(re.findall(r"[\w-]+", help_of["model"])) & set(SHORT_NAMES)
    assert {*SAMPLERS, "DDIM"} <= set(re.findall(r"\w+", help_of["scheduler"]))


def test_help_says_what_counts_without_an_option() -> None:
    """Where an option leaves a setting as it is, help has the usual preset's value, or says that the edit has it."""
    config = preset("balanced")
    etas = ",".join(f"{eta:g}" for eta in config.sample.etas)
    own = {"--mask": f"{config.sample.mask:g}", "--scheduler": config.sample.scheduler, "--etas": etas}
    own |= {"--rank": config.finetune.lora_rank, "--draws": config.embed.draws, "--strength": 1}
    lines = {command: _help(command).splitlines() for command in ("edit", "batch run", "sample")}
    for flag, value in own.items():
        for command in ("edit", "batch run"):
            [line] = [line for line in lines[command] if line.startswith(f"  {flag} ")]
            assert line.endswith(f"[balanced: {value}]"), line
    for flag, value in {"--mask": "the edit's own", "--source": "the edit's own", "--strength": 1}.items():
        [line] = [line for line in lines["sample"] if line.startswith(f"  {flag} ")]
        assert line.endswith(f"[default: {value}]"), line


def test_a_batch_takes_what_an_edit_takes() -> None:
    """Every option of training and of pictures that `edit` has, `batch run` has, too, with the same default."""
    rows = {
        command: {option.name: option.default for option in options_of(command) if option.fills}
        for command in ("edit", "batch run")
    }
    assert rows["edit"] == rows["batch run"]
    names = {
        command: {option.name for option in options_of(command) if option.panel in (TRAINING, PICTURES)} - {"seeds"}
        for command in ("edit", "batch run")
    }
    assert names["edit"] == names["batch run"] and "source" in names["edit"]


def test_an_option_gives_an_item_of_a_batch_the_settings_of_an_edit() -> None:
    """The same words give the same settings to `edit` and to the items of `batch run`."""
    values = {option.name: option.default for option in options_of("edit")}
    words = {"strength": "down=0.5", "mask": 0.2, "start": "photo", "photo_guidance": 2.0, "interpolation": "linear"}
    words |= {"batch_rows": 4, "etas": "0,0.5", "seeds": "3,4", "rank": 3, "draws": 5, "adapt": "attn", "keep": None}
    config = Words("edit", {**values, **words}).edit()
    request = Request.of({"manifest": "list.csv", "out": "out", **words})
    assert request.settings({}) == config
    assert config.sample.strength == (0.5, 1.0, 1.0) and config.sample.batch_rows == 4
    assert (config.finetune.lora_alpha, config.finetune.keep, config.embed.draws) == (3.0, 1.0, 5)
    own = request.settings({"seed": 9, "etas": [0, 1.5], "preset": "fast"})
    assert (own.seed, own.sample.etas, own.sample.seeds) == (9, (0.0, 1.5), (3, 4))


def test_every_row_fills_a_setting_that_there_is() -> None:
    """An option that fills a setting names one that exists."""
    kinds = {"": EditConfig, "embed": EmbedConfig, "finetune": FinetuneConfig, "sample": SampleConfig}
    known = {f"{stage}.{field.name}".lstrip(".") for stage, kind in kinds.items() for field in dataclasses.fields(kind)}
    known |= {f"base.{field.name}" for field in dataclasses.fields(BaseOptions)}
    known |= {f"axes.{axis}" for axis in ("eta", "strength", "seed", "guidance")}
    assert {place for option in OPTIONS for place in option.fills} <= known
    assert {option.panel for option in OPTIONS} == set(PANELS)


def test_a_request_is_a_value_that_needs_no_torch() -> None:
    """A request comes back from JSON as it was, is read without torch, and an older ledger's takes the defaults and
    loses options that there are no more."""
    request = Request.of({"manifest": "list.csv", "out": "out", "rank": 3})
    assert Request.of(json.loads(json.dumps(request.as_json()))) == request
    assert (request["save_every"], request["mask"]) == (25, None)
    assert Request.of({**request.as_json(), "suggest_eta": True}) == request
    with pytest.raises(ConfigError, match="of another version"):
        Request.of({**request.as_json(), "colour": "red"})
    script = "import sys, lowmem_imagic.batch.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_messages_name_settings_and_the_command_line_flags() -> None:
    """An error names settings as Python has them; the command line shows its flags in their place, and nothing else."""
    error = MemoryLimitError("out of memory; try `batch_rows`, `adapt=attn` or `sample.num_inference_steps`; see `x y`")
    assert error.settings == ("batch_rows", "adapt", "sample.num_inference_steps")
    assert with_flags(str(error)) == "out of memory; try --batch-rows, --adapt attn or --steps-sample; see `x y`"
    assert with_flags("`sample` and `nothing` are no settings") == "`sample` and `nothing` are no settings"


def test_only_the_command_line_speaks_of_flags() -> None:
    """No text of the library names a flag: people who call it from Python or from a page have none."""
    flags = {option.flag for option in OPTIONS if not option.positional}
    speaking = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        # The bundled model's training script has a command line of its own.
        if parts[0] in ("cli", "demo") or parts == ("settings", "options.py"):
            continue
        texts = [node.value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if _is_text(node)]
        if named := flags & {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}:
            speaking["/".join(parts)] = named
    assert speaking == {}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
