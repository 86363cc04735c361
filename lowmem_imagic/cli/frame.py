"""What the command line's commands share: the application, errors to exit codes, words to settings.

Exit codes: 0 done, 1 failure, 2 usage (settings, sentence), 130 stopped by Ctrl-C. Results go to standard
output (with ``--json`` as one JSON object), everything else to standard error. An error that nobody raised on
purpose ends a command in one line, too, with its traceback in a file; with `DEBUG` set it is raised as it is.
"""

import contextlib
import functools
import json
import logging
import os
import reprlib
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import ConfigError, LowmemImagicError, OutputUnwritableError, PromptError
from ..plain_text import shown
from ..settings.presets import SMALL_KEEP, preset
from ..settings.stages import EditConfig, SampleConfig, base_problems, parse_strength
from ..unexpected import unexpected
from .streams import end_output

DEBUG = "LOWMEM_IMAGIC_DEBUG"
"""Environment variable: anything in it lets unexpected errors through, with their tracebacks."""


class _Group(TyperGroup):
    """The commands; what is wrong with words is said without obeying what they hold."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plain_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _plain_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _plain_usage() -> Iterator[None]:
    """Escapes what usage errors repeat of the words that were given."""
    try:
        yield
    except Exception as error:
        # Typer's, and of some versions click's; these two repeat no words, and have several lines.
        if hasattr(error, "format_message") and type(error).__name__ not in ("NoArgsIsHelpError", "MissingParameter"):
            text = shown(error.format_message())
            error.format_message = lambda: text
        raise


app = typer.Typer(
    cls=_Group,
    name="lowmem-imagic",
    help="Edit a real photo with a sentence (Imagic), on an 8-12 GB graphics card or a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

INTERRUPTED = 130


def quiet_libraries() -> None:
    """Libraries advise developers in their logs; a user of the command line can do nothing about it."""
    for library in ("bitsandbytes", "diffusers", "transformers", "huggingface_hub"):
        logging.getLogger(library).setLevel(logging.ERROR)


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the package's errors turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        try:
            command(*args, **kwargs)
        except LowmemImagicError as error:
            _fail(str(error), 2 if isinstance(error, (ConfigError, PromptError)) else 1)
        except KeyboardInterrupt:
            _fail("stopped; nothing half-written was left behind", INTERRUPTED)
        except Exception as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                _fail("out of memory; a smaller photo, or fewer etas and seeds, take less", 1)
            if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message") or DEBUG in os.environ:
                raise
            failure = unexpected(error)
            _fail(f"{failure}{_kept(failure.details)}", 1)

    return run


def _kept(details: str) -> str:
    """Puts a traceback into a file; says where, or how else to see it."""
    try:
        handle, path = tempfile.mkstemp(prefix="lowmem-imagic-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(details)
    except OSError:
        return f"; {DEBUG}=1 in the environment shows details"
    return f"; details are in {path}"


def _fail(message: str, code: int) -> NoReturn:
    print(shown(f"lowmem-imagic: {message}"), file=sys.stderr)
    raise typer.Exit(code)


def put(line: str) -> None:
    """Prints a line of ours on standard output: text that is not ours has been through `shown` or is JSON.

    Raises:
        OutputUnwritableError: it cannot be written.
        typer.Exit: its reader went away, as `head` does.
    """
    try:
        print(line, flush=True)
    except BrokenPipeError:
        end_output()
        raise typer.Exit(0) from None
    except OSError as error:
        end_output()
        raise OutputUnwritableError(f"standard output cannot be written ({error.strerror})") from error


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around imports of large libraries: Ctrl-C ends the process at once.

    Python's own handler raises KeyboardInterrupt in whatever code runs, which compiled modules abort on or swallow.
    """
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # only the main thread may
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Words:
    """Turns the words of a command into settings; what is wrong with any of them is reported together by `check`."""

    def __init__(self, *, device: str, weights: str | None, attention: str) -> None:
        self._problems = base_problems(device=device, weights=weights, attention=attention)

    def numbers(self, text: str | None, name: str, kind: type) -> tuple[Any, ...] | None:
        """The numbers of a comma-separated option; None where it was not given."""
        if text is None:
            return None
        try:
            return tuple(kind(part) for part in text.replace(" ", "").split(",") if part)
        except ValueError:
            self._problems.append(f"{name} is {reprlib.repr(text)}, expected comma-separated numbers such as 0,0.6,1")
            return None

    def sampling(
        self, *, etas: str | None = None, seeds: str | None = None, strength: str | None = None, **others: Any
    ) -> dict[str, Any]:
        """The fields of `config.SampleConfig` that were given; their ranges are not checked yet."""
        factor = None
        try:
            factor = None if strength is None else parse_strength(strength)
        except ConfigError as error:
            self._problems += error.problems
        numbers = {"etas": self.numbers(etas, "etas", float), "seeds": self.numbers(seeds, "seeds", int)}
        return given(**numbers, strength=factor, **others)

    def edit(
        self,
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
        small: bool,
        sampling: dict[str, Any] | None = None,
    ) -> EditConfig:
        """The settings of the preset `name` with the given options on top.

        Raises:
            ConfigError: with all that is wrong with any word so far.
        """
        if small and keep is not None:
            self._problems.append("--keep and --small both say how much of the adapter to keep, expected one of them")
        if small:
            keep = SMALL_KEEP
        elif keep is None and (rank is not None or adapt is not None):
            # The preset's share is of the preset's adapter; of another, all is kept unless something else is asked.
            keep = 1.0
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
        try:
            made = preset(name, {"": {"seed": seed}, "embed": embed, "finetune": finetune, "sample": sampling or {}})
        except ConfigError as error:
            self._problems += error.problems
        self.check()
        return made

    def check(self, sampling: dict[str, Any] | None = None) -> None:
        """Reports what is wrong with any word so far, and with the ranges of `sampling`.

        Raises:
            ConfigError: with all problems.
        """
        try:
            SampleConfig(**sampling or {})
        except ConfigError as error:
            self._problems += error.problems
        if self._problems:
            raise ConfigError(self._problems)


def given(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {name: value for name, value in values.items() if value is not None}


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Prints what a command reports: the lines for a person, or everything as JSON.

    Raises:
        OutputUnwritableError: standard output cannot be written; the files that were made are named.
    """
    lines = [json.dumps(report, indent=2)] if as_json else [shown(line) for line in report["summary"]]
    try:
        for line in lines:
            put(line)
    except OutputUnwritableError as error:
        raise OutputUnwritableError(f"{error}; the files are there: {' | '.join(report['summary'])}") from error
