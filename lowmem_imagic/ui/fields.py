"""Fields of the page's forms, made from the table of options, and messages with the fields' labels."""

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import gradio as gr

from ..errors import SETTING, ConfigError
from ..settings.options import BASE, OPTIONS, PICTURES, TRAINING, Kind, Option, options_of
from ..settings.presets import PRESETS
from ..settings.stages import ADAPT_TARGETS, ATTENTION, COMPUTE, INTERPOLATIONS, STARTS, WEIGHT_FORMATS

_CHOICES = {
    "preset": PRESETS,
    "adapt": ADAPT_TARGETS,
    "start": STARTS,
    "interpolation": INTERPOLATIONS,
    "base_weights": WEIGHT_FORMATS,
    "attention": ATTENTION,
    "compute": COMPUTE,
}
"""The values of options that have few."""
_NAMES_OF_FILES = {"model_config", "vae", "text_from", "revision", "photo"}
"""Options whose values are paths, or name a download: not for a page."""
_THE_SERVERS = {"device", "batch_rows"}
"""Options that the server decides."""
_NUMBERS: dict[Kind, Callable[[str], Any]] = {Kind.WHOLE: int, Kind.NUMBER: float}

LABELS = {option.name: option.name.replace("_", " ").capitalize() for option in OPTIONS} | {
    "preset": "Quality",
    "vram": "Card memory",
    "model": "Base model",
    "steps_embed": "Steps of stage 1",
    "steps_finetune": "Steps of stage 2",
    "steps_sample": "Denoising steps",
    "rank": "LoRA rank",
    "negative": "Steer away from",
    "source": "What the photo shows",
    "prompt": "Sentence",
}
"""A field's label for each option's name."""
_PLACES = {place.rpartition(".")[2]: option.name for option in OPTIONS for place in option.fills}
_PLACES |= {place: option.name for option in OPTIONS for place in option.fills}


def with_labels(text: str) -> str:
    """A message with the labels of fields in place of the names of settings."""

    def label(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        name = name if name in LABELS else _PLACES.get(name, name)
        shown = f"“{LABELS.get(name, name)}”"
        return shown if value is None else f"{shown} {value}"

    return SETTING.sub(label, text)


def offered(command: str, panels: Sequence[str]) -> list[Option]:
    """The options of a command in these panels that a page offers."""
    hidden = _NAMES_OF_FILES | _THE_SERVERS
    return [one for one in options_of(command) if one.panel in panels and one.name not in hidden and not one.positional]


def more_training() -> list[Option]:
    """Options of training beside the most used ones."""
    return offered("train", (TRAINING, BASE))


def more_pictures() -> list[Option]:
    """Options of asking beside the most used ones."""
    return [one for one in options_of("sample") if one.name == "seeds"] + offered("sample", (PICTURES,))


def field(option: Option, **other: Any) -> Any:
    """The field of an option; left empty it leaves the setting as the preset or the edit has it."""
    label, info = LABELS[option.name], option.help
    common: dict[str, Any] = {
        "label": label,
        "info": info,
        "elem_id": f"field-{option.name.replace('_', '-')}",
        **other,
    }
    if option.name in _CHOICES:
        choices = list(_CHOICES[option.name])
        if option.name == "preset":
            return gr.Radio(choices, value=option.default, **common)
        return gr.Dropdown(["", *choices], value=option.default or "", **common)
    if option.kind is Kind.SWITCH:
        return gr.Checkbox(value=bool(option.default), **common)
    # Numbers, too: an empty field for numbers turns into 0 as soon as it is shown.
    return gr.Textbox(value="" if option.default is None else str(option.default), max_length=1000, **common)


def values_of(
    options: Sequence[Option], values: Sequence[Any], texts: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any]:
    """The values of fields by the names of their options; empty ones and defaults are left out.

    Args:
        options: the options.
        values: the values of their fields.
        texts: texts that the fields of some options began with, which an edit records. Left so, a field is left out;
            emptied, it is an empty text.

    Raises:
        ConfigError: some are not of their options' kinds.
    """
    chosen, problems = dict[str, Any](), list[str]()
    for option, value in zip(options, values, strict=True):
        if option.name in texts:
            text = " ".join((value or "").split())
            if text != texts[option.name]:
                chosen[option.name] = text
            continue
        if isinstance(value, str) and option.kind in _NUMBERS:
            value = value.strip()
            try:
                value = _NUMBERS[option.kind](value) if value else None
            except ValueError:
                problems.append(f"`{option.name}` is {reprlib.repr(value)}, expected {option.kind.value}")
                continue
        if value not in (None, "", option.default):
            chosen[option.name] = value
    if problems:
        raise ConfigError(problems)
    return chosen
