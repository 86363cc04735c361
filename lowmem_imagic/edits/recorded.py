"""The settings that an edit records, as this version has them."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError, EditHeaderError
from ..settings.stages import NOT_RECORDED, SampleConfig, idle_problems
from .edit import Edit


def sampling_of(edit: Edit, overrides: Mapping[str, Any] = MappingProxyType({})) -> SampleConfig:
    """The recorded sampling settings of an edit that this version knows, changed by `overrides`.

    Strength and batch size are not taken from the record: they do not belong to the edit.

    Args:
        edit: the edit.
        overrides: values by the names of `SampleConfig`.

    Raises:
        EditHeaderError: the recorded settings are not valid.
        ConfigError: the overrides are out of range, or have no effect.
    """
    recorded = edit.settings.get("sample")
    names = set(SampleConfig.__dataclass_fields__) - set(NOT_RECORDED)
    values = recorded if isinstance(recorded, dict) else {}
    known: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names
    }
    try:
        settings = SampleConfig(**known)
    except (ConfigError, TypeError) as error:
        raise EditHeaderError(f"imagic.meta settings sample: {error}") from error
    changed = replace(settings, **overrides)
    if problems := idle_problems(changed, overrides):
        raise ConfigError(problems)
    return changed
