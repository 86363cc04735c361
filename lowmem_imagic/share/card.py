"""The card of a repository with an edit: its ``README.md`` on the Hub."""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from ..edits.edit import Edit
from ..edits.layouts import KOHYA
from ..families import DEMO, model_name
from ..plain_text import shown
from .hub import EDIT_FILE

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LOADABLE = re.compile(rf"{_HUB_ID.pattern}(\+(none|{_HUB_ID.pattern}))?", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LINK = re.compile(r"https://[\w./%#-]{1,300}|LICENSE(\.md)?", re.ASCII)
_ARCHITECTURE = re.compile("stable-diffusion(-xl)?")


def base_of(edit: Edit) -> str | None:
    """The Hub id of the edit's base; None for a base that is not on the Hub."""
    return edit.base.source if _HUB_ID.fullmatch(edit.base.source) else None


def _model(edit: Edit) -> str:
    """The name that loads the edit's base; "BASE" for one that the reader has to name."""
    name = model_name(edit.base.source, edit.base.revision)
    return name if name == DEMO or _LOADABLE.fullmatch(name) else "BASE"


def checked_license(values: Mapping[str, str]) -> dict[str, str]:
    """The valid ones of ``license``, ``license_name`` and ``license_link``."""
    forms = {"license": _LICENSE, "license_name": _LICENSE, "license_link": _LINK}
    return {name: values[name] for name, form in forms.items() if name in values and form.fullmatch(values[name])}


def card(edit: Edit, repository: str, *, license: Mapping[str, str], pictures: Sequence[str]) -> str:
    """The card's text; every text of the edit in it is escaped.

    Args:
        edit: the edit.
        repository: its repository.
        license: the base's licence, see `checked_license`.
        pictures: names of pictures in the repository, for the card's gallery.
    """
    from huggingface_hub import ModelCardData

    kind = _ARCHITECTURE.match(edit.base.labels.get("modelspec.architecture", ""))
    sentence = shown(edit.sentences[0]) if edit.sentences else None
    extra: dict[str, Any] = {}
    if base_of(edit):
        extra["base_model_relation"] = "adapter"
    if sentence:
        extra["instance_prompt"] = sentence
    if pictures:
        text = sentence or shown(edit.title)
        extra["widget"] = [{"text": text, "output": {"url": name}} for name in pictures]
    data = ModelCardData(
        base_model=base_of(edit),
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["imagic", "lora", *([kind[0]] if kind else []), "text-to-image", "diffusers", "template:sd-lora"],
        license=license.get("license"),
        license_name=license.get("license_name"),
        license_link=license.get("license_link"),
        **extra,
    )
    return f"---\n{data.to_yaml(line_break=chr(10))}\n---\n\n{_body(edit, repository, gallery=bool(pictures))}"


def _body(edit: Edit, repository: str, *, gallery: bool) -> str:
    """The card's Markdown, from ``card.md``, with ``card_python.md`` for edits that `load_into` takes, and
    ``card_prompt.md`` for those that have no sentence to render."""
    listed = "".join(f"\n- {escaped(sentence)}" for sentence in edit.sentences)
    template, python, prompt = (
        Template((Path(__file__).parent / name).read_text(encoding="utf-8"))
        for name in ("card.md", "card_python.md", "card_prompt.md")
    )
    asked = "" if listed else ', "..."'
    loads = python.substitute(repository=repository, file=EDIT_FILE, sentence=asked)
    return template.substitute(
        python=loads if edit.layout is KOHYA else "",
        title=escaped(edit.title),
        shelf="<Gallery />\n\n" if gallery else "",
        base=escaped(edit.base.source),
        sentences=f"It was made for:\n{listed}" if listed else "It has no sentence of its own: ask it any.",
        repository=repository,
        model=_model(edit),
        prompt="" if listed else prompt.template.rstrip(),
        file=EDIT_FILE,
    )


def escaped(text: str) -> str:
    """Text of an edit on one line of Markdown, in which it can be neither markup nor HTML."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+!|~:.-])", r"\\\1", shown(text)), quote=False)
