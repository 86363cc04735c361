"""The frame of all commands: the application, errors to exit codes, reports to lines.

Exit codes: 0 done, 1 failure, 2 usage (settings, sentence), 130 stopped by Ctrl-C. Results go to standard
output (with ``--json`` as one JSON object), everything else to standard error. An unexpected error also ends a command
with one line, and its traceback goes to a file; with `DEBUG` set the error itself is raised.
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
"""Environment variable: if it is set, unexpected errors are raised with their tracebacks."""


class _Group(TyperGroup):
    """The commands; usage errors show the words on the command line safely escaped."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _plain_usage():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _plain_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _plain_usage() -> Iterator[None]:
    """Escapes words of the command line in usage errors."""
    try:
        yield
    except Exception as error:
        # Usage errors of Typer, or of click in some versions. The two named ones repeat no words, and have several
        # lines.
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
    """The command, with errors turned into one line and an exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        quiet_libraries()
        try:
            command(*args, **kwargs)
        except LowmemImagicError as error:
            _fail(_told(error), 2 if isinstance(error, (ConfigError, PromptError)) else 1)
        except KeyboardInterrupt:
            _fail("stopped; no half-written files are left behind", INTERRUPTED)
        except Exception as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error):
                _fail("out of memory; a smaller photo, or fewer etas and seeds, take less", 1)
            if isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message") or DEBUG in os.environ:
                raise
            failure = unexpected(error)
            _fail(f"{failure}{_kept(failure.details)}", 1)

    return run


def _told(error: LowmemImagicError) -> str:
    """The text of an error with flags; problems of two settings filled by one option appear once."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    return "; ".join(dict.fromkeys(map(with_flags, problems)))


def _kept(details: str) -> str:
    """Writes a traceback to a file; returns a remark with its path, or about `DEBUG` if that fails."""
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
    """Prints a line on standard output; foreign text in it must be JSON or have been through `shown`.

    Raises:
        OutputUnwritableError: standard output cannot be written.
        typer.Exit: the reader closed the pipe, as `head` does.
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
    """Prints a line for a person: flags in place of settings' names, and escape codes made visible.

    Raises:
        OutputUnwritableError: standard output cannot be written.
    """
    put(shown(with_flags(text)))


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within the block, for imports of large libraries, Ctrl-C ends the process at once.

    Python's own handler raises KeyboardInterrupt in the running code, and compiled modules abort on it or swallow it.
    """
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    except ValueError:  # only the main thread may set handlers
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """Prints a command's report: its summary for a person, or all of it as JSON.

    Raises:
        OutputUnwritableError: standard output cannot be written; the message names the written files.
    """
    try:
        if as_json:
            put(json.dumps(report, indent=2))
        else:
            for line in report["summary"]:
                put_text(line)
    except OutputUnwritableError as error:
        raise OutputUnwritableError(f"{error}; the files were written: {' | '.join(report['summary'])}") from error
