"""A `batch run` as a value: its options, kept in the ledger so that its folder can be run again. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings.options import REQUIRED, options_of
from ..settings.stages import EditConfig
from ..settings.text import BaseOptions, Words, check_suggestable
from .manifest import BadItem, Item, read_manifest
from .paths import Part

COMMAND = "batch run"
_SHOWN_ONLY = ("json", "quiet")
"""Options that say how a run is shown, and nothing about its result."""
DEFAULTS = {
    option.name: None if option.default is REQUIRED else option.default
    for option in options_of(COMMAND)
    if option.name not in _SHOWN_ONLY
}
"""The options of a request; None where nothing is asked for."""


@dataclass(frozen=True)
class Request:
    """The options of one `batch run`; `request["out"]` is the value of one.

    Args:
        values: options by name, as plain values.
    """

    values: Mapping[str, Any]

    @staticmethod
    def of(note: Any) -> "Request":
        """The request that a ledger has kept; options that its version did not have take their defaults.

        Raises:
            ConfigError: it has options that this version does not have.
        """
        if not isinstance(note, dict) or note.keys() - DEFAULTS.keys():
            raise ConfigError("the ledger is of another version; run `batch run` with its options again")
        return Request({**DEFAULTS, **note})

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
        """The folder that gets a folder for each item."""
        return Path(self["out"])

    @property
    def part(self) -> Part:
        """The part of the manifest that is run.

        Raises:
            ConfigError: there is no such part.
        """
        return Part.of(self["shard"])

    @property
    def base(self) -> BaseOptions:
        """The base model of items that name none."""
        return Words(COMMAND, self.values).base

    def settings(self, own: Mapping[str, Any]) -> EditConfig:
        """The settings of an item with these of its own.

        Raises:
            ConfigError: out of range.
        """
        config = Words(COMMAND, {**self.values, **{name: _as_option(value) for name, value in own.items()}}).edit()
        if self["suggest_eta"]:
            check_suggestable(config.sample)
        return config

    def items(self) -> tuple[list[Item], list[BadItem]]:
        """The items of this request's part of the manifest, and the entries that are none.

        Raises:
            ConfigError: no manifest, or no such part.
        """
        items, bad = read_manifest(Path(self["manifest"]), self["prompt"])
        mine = slice(self.part.number - 1, None, self.part.count)
        return items[mine], bad[mine]


def _as_option(value: Any) -> Any:
    """An item's own setting as an option has it: lists of numbers are text there."""
    return ",".join(map(str, value)) if isinstance(value, list) else value
