"""Commands and their help, built from the table of options."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from ..settings.options import REQUIRED, Kind, Option, options_of
from .frame import guarded

_TYPES: dict[Kind, type] = {Kind.WHOLE: int, Kind.NUMBER: float, Kind.SWITCH: bool, Kind.PATH: Path}
"""Types of the kinds that Typer reads; the other kinds stay text."""


def command(group: typer.Typer, name: str, *, epilog: str) -> Callable[[Callable[[dict[str, Any]], None]], Any]:
    """Adds a function to `group` as the command `name`, with its options from the table.

    The function takes the values of its options by name; its docstring is the command's help.
    """

    def add(function: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
        def run(**values: Any) -> None:
            function(values)

        run.__doc__ = function.__doc__
        action = guarded(run)
        setattr(action, "__signature__", inspect.Signature([_parameter(option) for option in options_of(name)]))  # noqa: B010
        group.command(name.split()[-1], cls=_PanelledCommand, epilog=epilog)(action)
        return function

    return add


def _parameter(option: Option) -> inspect.Parameter:
    """An option as a parameter for Typer."""
    info = (
        typer.Argument(help=option.help, metavar=option.metavar)
        if option.positional
        else typer.Option(
            option.flag,
            *([option.short] if option.short else []),
            help=option.help,
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
