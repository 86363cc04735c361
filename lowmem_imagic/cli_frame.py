"""What the command line's commands share: the application, errors to exit codes, words to settings.

Exit codes: 0 done, 1 failure, 2 usage (settings, sentence), 130 stopped by Ctrl-C. Results go to standard
output (with ``--json`` as one JSON object), everything else to standard error.
"""

import functools
import json
import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer

from .config import EditConfig, parse_strength, preset
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


def guarded(command: Callable[..., None]) -> Callable[..., None]:
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


def numbers(text: str | None, name: str, kind: type) -> tuple[Any, ...] | None:
    """The numbers of a comma-separated option; None where it was not given."""
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, expected comma-separated numbers such as 0,0.6,1") from None


def given(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def sampling_settings(
    *, etas: str | None = None, seeds: str | None = None, strength: str | None = None, **others: Any
) -> dict[str, Any]:
    """The fields of `config.SampleConfig` that were given, words turned into numbers."""
    return given(
        etas=numbers(etas, "etas", float),
        seeds=numbers(seeds, "seeds", int),
        strength=None if strength is None else parse_strength(strength),
        **others,
    )


def edit_config(
    name: str,
    *,
    seed: int,
    steps_embed: int | None,
    steps_finetune: int | None,
    learning_rate: float | None,
    draws: int | None,
    adapt: str | None,
    rank: int | None,
    keep: float | None,
    sampling: dict[str, Any] | None = None,
) -> EditConfig:
    """The settings of the preset `name` with the given options on top; all problems at once."""
    finetune = given(
        steps=steps_finetune,
        learning_rate=learning_rate,
        draws=draws,
        adapt=adapt,
        keep=keep,
        lora_rank=rank,
        lora_alpha=None if rank is None else float(rank),
    )
    embed = given(steps=steps_embed, draws=draws)
    return preset(name, {"": {"seed": seed}, "embed": embed, "finetune": finetune, "sample": sampling or {}})


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Prints what a command reports: the lines for a person, or everything as JSON."""
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for line in report["summary"]:
        typer.echo(line)
