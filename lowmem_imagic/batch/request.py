"""The options of a `batch run` as a value, stored in the ledger for `batch retry`. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings.options import REQUIRED, options_of
from ..settings.stages import EditConfig
from ..settings.text import BaseOptions, Words
from .manifest import BadItem, Item, read_manifest
from .paths import Part

COMMAND = "batch run"
_SHOWN_ONLY = ("json", "quiet")
"""Options that change only a run's output on the terminal, not its results."""
DEFAULTS = {
    option.name: None if option.default is REQUIRED else option.default
    for option in options_of(COMMAND)
    if option.name not in _SHOWN_ONLY
}
"""The options of a request with their defaults; None for an option without one."""
_DROPPED = ("suggest_eta",)
"""Options of earlier versions that changed no picture."""


@dataclass(frozen=True)
class Request:
    """The options of one `batch run`; `request["out"]` is the value of one.

    Args:
        values: options by name, as plain values.
    """

    values: Mapping[str, Any]

    @staticmethod
    def of(note: Any) -> "Request":
        """The request stored in a ledger, without dropped options; those that its version lacked take their defaults.

        Raises:
            ConfigError: the note has options that this version lacks.
        """
        if not isinstance(note, dict) or note.keys() - DEFAULTS.keys() - set(_DROPPED):
            raise ConfigError("the ledger is of another version; run `batch run` with its options again")
        return Request({**DEFAULTS, **{name: value for name, value in note.items() if name in DEFAULTS}})

    def but(self, **changes: Any) -> "Request":
        """The same request with other values for some options."""
        return Request({**self.values, **changes})

    def __getitem__(self, name: str) -> Any:
        """The value of an option."""
        return self.values[name]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(self.values)

    @property
    def out(self) -> Path:
        """The parent of the items' folders."""
        return Path(self["out"])

    @property
    def part(self) -> Part:
        """The part of the manifest to run.

        Raises:
            ConfigError: there is no such part.
        """
        return Part.of(self["shard"])

    @property
    def base(self) -> BaseOptions:
        """The base model for items without their own."""
        return Words(COMMAND, self.values).base

    def settings(self, own: Mapping[str, Any]) -> EditConfig:
        """The settings of an item; its own settings override the request's.

        Raises:
            ConfigError: a setting is out of range.
        """
        return Words(COMMAND, {**self.values, **{name: _as_option(value) for name, value in own.items()}}).edit()

    def items(self) -> tuple[list[Item], list[BadItem]]:
        """The items of this request's part of the manifest, and its invalid entries.

        Raises:
            ConfigError: there is no manifest, or no such part.
        """
        items, bad = read_manifest(Path(self["manifest"]), self["prompt"])
        mine = slice(self.part.number - 1, None, self.part.count)
        return items[mine], bad[mine]


def _as_option(value: Any) -> Any:
    """An item's own setting as an option's value: options have lists of numbers as text."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
