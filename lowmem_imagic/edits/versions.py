"""The two versions of the edit format: what each calls the parts of an edit, and what version 1 can say.

Version 1 holds edits of one denoiser under one tensor of text, in squares: Stable Diffusion 1 and 2. It is written
wherever it can say everything, so that older programs read new files. Version 2 maps by denoiser and by tensor of text.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from ..settings.stages import MAX_MODEL_SIDE_PX
from . import checks
from .identity import LABELS, MAX_LABEL, TOKEN, BaseIdentity, Interface, SourcePicture

NEWEST = 2
"""Version that this package writes where it must; any change that an older reader would misread or drop raises it."""
TEXT, DENOISER = "embeds", "unet"
"""Names of the tensor of text and of the denoiser in version 2; version 1 has exactly these two."""
NOISE = f"noise.{DENOISER}"
ENTRIES = {
    f"text.{TEXT}": "imagic.e_opt",
    f"coarse.{DENOISER}": "imagic.coarse_latents",
    NOISE: "imagic.inverted_noise",
}
"""Header entries of version 1 by the names that version 2 gives them; the last may be missing."""
SIDES = {f"text.{TEXT}": ("T", "D"), f"coarse.{DENOISER}": ("C", "h", "w"), NOISE: ("C", "H", "W")}
"""Sides of their tensors."""


def version_of_base(base: BaseIdentity) -> int:
    """Returns the version that edits of a base are written in, in squares."""
    interface = base.interface
    return 1 if list(interface.text) == [TEXT] and list(interface.denoisers) == [DENOISER] else NEWEST


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
}
SOURCE_MEMBERS = {
    1: frozenset(("sha256", "width_px", "height_px", "size_px", "box")),
    2: frozenset(("sha256", "width_px", "height_px", "size", "box")),
}
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
    """Returns the base that `base_entry`'s members describe, with the labels that stand in a file's header.

    A label that another program changed to what this one would not write is left out.

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
    """Returns the photo that `source_entry`'s members describe.

    Raises:
        EditHeaderError: a member of the wrong type or out of range.
    """
    values = dict(members)
    if version == 1:
        side = checks.integer(values.pop("size_px"), "imagic.meta source.size_px", 1, MAX_MODEL_SIDE_PX)
        values["size"] = (side, side)
    return SourcePicture(**values)
