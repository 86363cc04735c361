"""The frame of all commands: the application, errors to exit codes, reports to lines.

Exit codes: 0 done, 1 failure, 2 usage (settings, sentence), 130 stopped by Ctrl-C. Results go to standard
output (with ``--json`` as one JSON object), everything else to standard error. An error that nobody raised on
purpose ends a command in one line, too, with its traceback in a file; with `DEBUG` set it is raised as it is.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import ConfigError, LowmemImagicError, OutputUnwritableError, PromptError
from ..plain_text import shown
from ..unexpected import quiet_libraries, unexpected
from .flags import with_flags
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


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the package's errors turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        try:
            command(*args, **kwargs)
        except LowmemImagicError as error:
            _fail(_told(error), 2 if isinstance(error, (ConfigError, PromptError)) else 1)
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


def _told(error: LowmemImagicError) -> str:
    """The text of an error with flags; two settings that one option fills are one problem."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    return "; ".join(dict.fromkeys(map(with_flags, problems)))


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


def put_text(text: str) -> None:
    """Prints a line for a person: flags in place of settings' names, and nothing that a terminal would obey.

    Raises:
        OutputUnwritableError: it cannot be written.
    """
    put(shown(with_flags(text)))


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


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Prints what a command reports: the lines for a person, or everything as JSON.

    Raises:
        OutputUnwritableError: standard output cannot be written; the files that were made are named.
    """
    try:
        if as_json:
            put(json.dumps(report, indent=2))
        else:
            for line in report["summary"]:
                put_text(line)
    except OutputUnwritableError as error:
        raise OutputUnwritableError(f"{error}; the files are there: {' | '.join(report['summary'])}") from error
