"""The card of a repository with an edit: its ``README.md`` on the Hub."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..edits.edit import Edit
from ..plain_text import shown
from .hub import EDIT_FILE

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")
_LINK = re.compile(r"https://[\w./%#-]{1,300}|LICENSE(\.md)?", re.ASCII)
_ARCHITECTURE = re.compile("stable-diffusion(-xl)?")


def base_of(edit: Edit) -> str | None:
    """The Hub id of the edit's base; None for a base that is not on the Hub."""
    return edit.base.source if _HUB_ID.fullmatch(edit.base.source) else None


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
    """The card's Markdown."""
    sentences = "\n".join(f"- {escaped(sentence)}" for sentence in edit.sentences)
    asked = f"It was made for:\n\n{sentences}\n" if sentences else "It has no sentence yet: ask it any.\n"
    ask = "" if edit.sentences else ' --prompt "..."'
    shelf = "<Gallery />\n\n" if gallery else ""
    return f"""# {escaped(edit.title)}

{shelf}An edit of one photo by sentences ([Imagic](https://arxiv.org/abs/2210.09276)), made with lowmem-imagic on
{escaped(edit.base.source)}. {asked}
The file has no picture in it, but it reproduces its photo (eta 0): anyone with the file and its base can render it.

## Use

```sh
lowmem-imagic sample hub:{repository} --etas 0,0.6,0.8,1{ask}
```

In diffusers, with the package lowmem-imagic beside it:

```python
from huggingface_hub import hf_hub_download
from lowmem_imagic import load_into, read_edit

edit = read_edit(hf_hub_download("{repository}", "{EDIT_FILE}"))
loaded = load_into(pipeline, edit)  # a pipeline of the base
pipeline.scheduler = loaded.scheduler()
pipeline(**loaded.at(0.8)).images[0].save("edited.png")
```

Other programs load `{EDIT_FILE}` as an ordinary LoRA. The LoRA alone gives neither the photo nor the edit.
"""


def escaped(text: str) -> str:
    """Text of an edit on one line of Markdown, in which it can be neither markup nor HTML."""
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+!|~:.-])", r"\\\1", shown(text)), quote=False)
