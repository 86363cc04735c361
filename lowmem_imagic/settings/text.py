"""Options to settings: reads the values of a command line, a batch or a form."""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from .options import Kind, options_of
from .presets import SMALL_KEEP, preset
from .stages import BLOCKS, MAX_PICTURES, EditConfig, SampleConfig, Strength, base_problems, idle_problems

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class BaseOptions:
    """Which base model to load, and how."""

    model: str | None = None
    """None takes the bundled model, or the one that an edit names."""
    revision: str | None = None
    device: str = "auto"
    weights: str | None = None
    """None takes the edit's training format, or int8."""
    attention: str = "auto"
    compute: str = "auto"
    checkpointing: bool = False
    config_folder: str | None = None
    vae: str | None = None
    text_from: str | None = None


class Words:
    """The options of one command as settings; the problems of all options are reported together.

    Args:
        command: a command of the table of options.
        values: values of its options, by name.
    """

    def __init__(self, command: str, values: Mapping[str, Any]) -> None:
        self._values = values
        self._settings: dict[str, dict[str, Any]] = {}
        filled = [option for option in options_of(command) if option.fills]
        base = {name: values.get(name) for name in ("device", "attention", "compute")}
        self._problems = base_problems(
            **{name: "auto" if value is None else value for name, value in base.items()},
            weights=values.get("base_weights"),
        )
        for option in filled:
            value = values.get(option.name)
            if value is None:
                continue
            try:
                value = read_value(option.name, option.kind, value)
            except ConfigError as error:
                self._problems += error.problems
                continue
            for place in option.fills:
                stage, _, name = place.rpartition(".")
                self._settings.setdefault(stage, {})[name] = value

    @property
    def base(self) -> BaseOptions:
        """Which base model, and how it is loaded."""
        return BaseOptions(**self._settings.get("base", {}))

    @property
    def axes(self) -> dict[str, Any]:
        """The values that vary over a sheet, by axis."""
        return self._settings.get("axes", {})

    def sampling(self) -> dict[str, Any]:
        """The fields of `SampleConfig` that the options set.

        Raises:
            ConfigError: with all problems of all options.
        """
        try:
            SampleConfig(**self._settings.get("sample", {}))
        except ConfigError as error:
            self._problems += error.problems
        self._check()
        return self._settings.get("sample", {})

    def edit(self) -> EditConfig:
        """The settings of the preset with the given options on top.

        Raises:
            ConfigError: with all problems of all options.
        """
        finetune = dict(self._settings.get("finetune", {}))
        rank = finetune.get("lora_rank")
        if self._values.get("small"):
            if "keep" in finetune:
                self._problems.append("`keep` and `small` both say how much of the adapter to keep, expected one")
            finetune["keep"] = SMALL_KEEP
        elif rank is not None or "adapt" in finetune:
            # The preset's share fits the preset's adapter only; for another adapter the default is to keep all.
            finetune.setdefault("keep", 1.0)
        if rank is not None:
            finetune["lora_alpha"] = float(rank)
        own = {stage: self._settings.get(stage, {}) for stage in ("", "embed", "sample")}
        try:
            config = preset(self._values["preset"], {**own, "finetune": finetune})
            self._problems += idle_problems(config.sample, own["sample"])
        except ConfigError as error:
            self._problems += error.problems
        self._check()
        return config

    def _check(self) -> None:
        """Reports the problems of all options.

        Raises:
            ConfigError: there are any.
        """
        if self._problems:
            raise ConfigError(self._problems)


def read_value(name: str, kind: Kind, value: Any) -> Any:
    """The value of an option; numbers in text become numbers.

    Raises:
        ConfigError: the text is not of this kind.
    """
    if kind is Kind.NUMBERS:
        return parse_numbers(name, value, float)
    if kind is Kind.WHOLE_NUMBERS:
        return parse_numbers(name, value, int)
    return parse_strength(value) if kind is Kind.STRENGTH else value


def parse_numbers(name: str, text: str, kind: Callable[[str], float]) -> tuple[float, ...]:
    """The numbers in a comma-separated text.

    Raises:
        ConfigError: an item is not a number.
    """
    try:
        return tuple(kind(part) for part in text.replace(" ", "").split(",") if part)
    except ValueError:
        expected = "expected comma-separated numbers such as 0,0.6,1"
        raise ConfigError(f"`{name}` is {reprlib.repr(text)}, {expected}") from None


def parse_strength(text: str) -> Strength:
    """The strength in a text: ``0.8``, or ``down=0.5,up=1.2`` with 1 for an omitted block.

    Raises:
        ConfigError: the text is neither, or names a block twice.
    """
    try:
        if "=" not in text:
            return float(text)
        pairs = [part.split("=") for part in text.replace(" ", "").split(",")]
        parts = dict(pairs)
        if len(parts) < len(pairs):
            raise ValueError("a block twice")
        factors = {block: float(parts.pop(block, "1")) for block in BLOCKS}
        if parts:
            raise ValueError(f"no block {', '.join(parts)}")
    except ValueError as error:
        raise ConfigError(f"`strength` is {text!r} ({error}), expected 0.8 or down=0.5,mid=1,up=1.2") from None
    return factors["down"], factors["mid"], factors["up"]


def parse_bytes(text: str) -> int:
    """The bytes in a text: ``8GB``, ``7.5GiB``, ``6000MB``; a bare number below 1024 is in GB.

    Raises:
        ConfigError: the text is no amount of memory.
    """
    words = text.strip().lower()
    number = words.rstrip("abcdefghijklmnopqrstuvwxyz ")
    unit = words[len(number) :].strip()
    try:
        value = float(number)
        if not math.isfinite(value) or value <= 0 or unit not in _UNITS:
            raise ValueError
    except ValueError:
        raise ConfigError(f"`vram` is {text!r}, expected an amount of memory such as 8GB or 7.5GiB") from None
    return round(value * (1e9 if not unit and value < 1024 else _UNITS[unit]))


def check_pictures(config: SampleConfig, sentences: int) -> None:
    """Checks that several sentences do not make more pictures than one may.

    Raises:
        ConfigError: they do.
    """
    count = sentences * len(config.etas) * len(config.seeds)
    if count > MAX_PICTURES:
        raise ConfigError(
            f"{sentences} sentences with {len(config.etas)} `etas` and {len(config.seeds)} `seeds` make {count} "
            f"pictures, expected at most {MAX_PICTURES}"
        )
