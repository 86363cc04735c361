"""Commands and their help, built from the table of options."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..settings.options import REQUIRED, Kind, Option, options_of
from ..settings.presets import preset
from ..settings.stages import NOT_RECORDED
from .frame import guarded

_TYPES: dict[Kind, type] = {Kind.WHOLE: int, Kind.NUMBER: float, Kind.SWITCH: bool, Kind.PATH: Path}
"""Types of the kinds that Typer reads; the other kinds stay text."""
_STAGES = ("embed", "finetune", "sample")
"""Stages whose settings a preset or an edit has."""


def command(group: typer.Typer, name: str, *, epilog: str) -> Callable[[Callable[[dict[str, Any]], None]], Any]:
    """Adds a function to `group` as the command `name`, with its options from the table.

    The function takes the values of its options by name; its docstring is the command's help.
    """

    def add(function: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        def run(**values: Any) -> None:
            function(values)

        run.__doc__ = function.__doc__
        action = guarded(run)
        setattr(action, "__signature__", inspect.Signature(_parameters(name)))  # noqa: B010
        group.command(name.split()[-1], cls=_PanelledCommand, epilog=epilog)(action)
        return function

    return add


def _parameters(name: str) -> list[inspect.Parameter]:
    """The options of a command as parameters for Typer."""
    options = options_of(name)
    trains = any(option.name == "preset" for option in options)
    return [_parameter(option, option.help + _usual(option, trains=trains)) for option in options]


def _usual(option: Option, *, trains: bool) -> str:
    """The value that a setting has without its option, for help: the usual preset's, or that which an edit records."""
    stage, _, name = option.fills[0].partition(".") if option.fills else ("", "", "")
    if stage not in _STAGES or option.default is not None or "[default" in option.help:
        return ""
    if not trains and option.name not in NOT_RECORDED:
        return " [default: the edit's own]"
    value = getattr(getattr(preset(), stage), name)
    if value in ("", None):
        return ""
    words = ",".join(f"{one:g}" for one in value) if isinstance(value, tuple) else value
    words = f"{words:g}" if isinstance(words, float) else words
    return f" [balanced: {words}]" if trains else f" [default: {words}]"


def _parameter(option: Option, help_text: str) -> inspect.Parameter:
    """An option as a parameter for Typer."""
    info = (
        typer.Argument(help=help_text, metavar=option.metavar)
        if option.positional
        else typer.Option(
            option.flag,
            *([option.short] if option.short else []),
            help=help_text,
            metavar=option.metavar or ("<str>" if option.many else None),
            min=option.least,
            max=option.most,
            rich_help_panel=option.panel,
        )
    )
    return inspect.Parameter(
        option.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if option.default is REQUIRED else option.default,
        annotation=Annotated[_annotation(option), info],
    )


def _annotation(option: Option) -> Any:
    """The type of an option's value for Typer."""
    kind: Any = _TYPES.get(option.kind, str)
    kind = list[kind] if option.many else kind
    return kind | None if option.default is None else kind


class _PanelledCommand(TyperCommand):
    """A command whose help shows its options panel by panel, as plain text."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for the arguments and one for each panel."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                argument = parameter.param_type_name == "argument"
                panel = "Arguments" if argument else getattr(parameter, "rich_help_panel", None) or list(panels)[-1]
                panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            with formatter.section(panel):
                formatter.write_dl(records)
