"""The versions of the edit format: the names of an edit's parts in each, and its limits.

Version 1 holds edits of one denoiser under one tensor of text, in squares: Stable Diffusion 1 and 2. Version 2 maps by
denoiser and by tensor of text. Both hold an edit with one sentence, which its training started from. Version 3 holds
any number of sentences, and the one that training started from. An edit is written in the first version that can say
everything, so that older programs read new files.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..settings.stages import MAX_MODEL_SIDE_PX
from . import checks
from .identity import LABELS, MAX_LABEL, TOKEN, BaseIdentity, Interface, SourcePicture
from .meta import MAX_PROMPT_CHARS

MAPPED = 2
"""Version for other bases than Stable Diffusion 1 and 2, and for other pictures than squares."""
NEWEST = 3
"""Version that this package writes where it must; any change that an older reader would misread or drop raises it."""
TEXT, DENOISER = "embeds", "unet"
"""Names of the tensor of text and of the denoiser in version 2; version 1 has only these two."""
NOISE = f"noise.{DENOISER}"
ENTRIES = {
    f"text.{TEXT}": "imagic.e_opt",
    f"coarse.{DENOISER}": "imagic.coarse_latents",
    NOISE: "imagic.inverted_noise",
}
"""Header entries of version 1 by their names in version 2; the last may be missing."""
SIDES = {f"text.{TEXT}": ("T", "D"), f"coarse.{DENOISER}": ("C", "h", "w"), NOISE: ("C", "H", "W")}
"""Sides of their tensors."""


def version_of_base(base: BaseIdentity) -> int:
    """Returns the version for square edits of a base."""
    interface = base.interface
    return 1 if list(interface.text) == [TEXT] and list(interface.denoisers) == [DENOISER] else MAPPED


def place(name: str, version: int) -> str:
    """Returns the place of a tensor in a file, for messages; `name` as ``text.<part>``, ``coarse.<denoiser>``."""
    return ENTRIES[name] if version == 1 else f"imagic.tensors {name}"


def stored_names(interface: Interface, *, noise: Iterable[str]) -> list[str]:
    """Returns the names of the tensors beside the adapters: text, coarse pictures, and the noise of some denoisers."""
    return [
        *(f"text.{part}" for part in interface.text),
        *(f"coarse.{denoiser}" for denoiser in interface.denoisers),
        *(f"noise.{denoiser}" for denoiser in noise),
    ]


BASE_MEMBERS = {
    1: frozenset(("source", "revision", "family", "prediction_type", "cross_attention_dim", "files")),
    2: frozenset(("source", "revision", "family", "interface", "files")),
    3: frozenset(("source", "revision", "family", "interface", "files")),
}
SOURCE_MEMBERS = {
    1: frozenset(("sha256", "width_px", "height_px", "size_px", "box")),
    2: frozenset(("sha256", "width_px", "height_px", "size", "box")),
    3: frozenset(("sha256", "width_px", "height_px", "size", "box")),
}
SENTENCE_MEMBERS = {
    1: frozenset(("target_prompt",)),
    2: frozenset(("target_prompt",)),
    3: frozenset(("sentences", "start_sentence")),
}
"""Members of ``imagic.meta`` with the sentences."""
INTERFACE_MEMBERS = frozenset(("text", "denoisers"))


def base_entry(base: BaseIdentity, version: int) -> dict[str, Any]:
    """Returns the members of ``imagic.base``."""
    interface = base.interface
    named = {"source": base.source, "revision": base.revision, "family": base.family, "files": dict(base.files)}
    if version == 1:
        kind = {"prediction_type": interface.denoisers[DENOISER], "cross_attention_dim": interface.text[TEXT]}
        return {**named, **kind}
    return {**named, "interface": {"text": dict(interface.text), "denoisers": dict(interface.denoisers)}}


def base_of(members: Mapping[str, Any], version: int, metadata: Mapping[str, str]) -> BaseIdentity:
    """Returns the base of `base_entry`'s members, with the labels of the file's header.

    Invalid labels are left out: another program may have changed them.

    Raises:
        EditHeaderError: a member of the wrong type or out of range.
    """
    values = dict(members)
    if version == 1:
        prediction, width = values.pop("prediction_type"), values.pop("cross_attention_dim")
        checks.matches(prediction, TOKEN, "imagic.base prediction_type", "a short lower-case token")
        checks.integer(width, "imagic.base cross_attention_dim", 1, 2**20)
        interface = Interface(text={TEXT: width}, denoisers={DENOISER: prediction})
    else:
        interface = Interface(**checks.exactly(values.pop("interface"), "imagic.base interface", INTERFACE_MEMBERS))
    labels = {label: metadata[label] for label in LABELS if checks.is_text(metadata.get(label), MAX_LABEL)}
    return BaseIdentity(**values, interface=interface, labels=labels)


def source_entry(source: SourcePicture, version: int) -> dict[str, Any]:
    """Returns the members of ``imagic.meta source``."""
    size: dict[str, Any] = {"size_px": source.size[0]} if version == 1 else {"size": list(source.size)}
    photo = {"sha256": source.sha256, "width_px": source.width_px, "height_px": source.height_px}
    return {**photo, **size, "box": list(source.box)}


def source_of(members: Mapping[str, Any], version: int) -> SourcePicture:
    """Returns the photo of `source_entry`'s members.

    Raises:
        EditHeaderError: a member of the wrong type or out of range.
    """
    values = dict(members)
    if version == 1:
        side = checks.integer(values.pop("size_px"), "imagic.meta source.size_px", 1, MAX_MODEL_SIDE_PX)
        values["size"] = (side, side)
    return SourcePicture(**values)


def sentences_entry(sentences: Sequence[str], start: str, version: int) -> dict[str, Any]:
    """Returns the members of ``imagic.meta`` with an edit's sentences."""
    if version < 3:
        return {"target_prompt": start}
    return {"sentences": list(sentences), "start_sentence": start}


def sentences_of(members: Mapping[str, Any], version: int) -> dict[str, Any]:
    """Returns the sentences, and the one that training started from, that `sentences_entry`'s members describe.

    Raises:
        EditHeaderError: the sentence of version 1 or 2 is of the wrong type or out of range.
    """
    if version < 3:
        sentence = checks.text(members["target_prompt"], "imagic.meta target_prompt", MAX_PROMPT_CHARS, lines=True)
        return {"sentences": [sentence], "start_sentence": sentence}
    return {name: members[name] for name in SENTENCE_MEMBERS[3]}
