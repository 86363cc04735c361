"""Maps diffusers' names of a part's tensors to their names in original layouts and in older files."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.loaders import single_file_utils
from torch import Tensor

from .weights import Weights


@dataclass(frozen=True)
class Place:
    """The place of one of diffusers' tensors in a file."""

    name: str
    """The tensor's name in the file."""
    third: int | None = None
    """Index of a third of its rows, if the file has query, key and value in one tensor."""
    flat: bool = False
    """Whether the file may have it as a 1x1 convolution."""


class Tensors:
    """A part's tensors under diffusers' names; each is read on access."""

    def __init__(self, weights: Weights, places: Mapping[str, Place]) -> None:
        self._weights, self._places = weights, places

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor, without reading it."""
        return {name: self._shape(place) for name, place in self._places.items()}

    def in_file(self, name: str) -> str:
        """A tensor's name in the file; `name` itself if it is unknown."""
        return self._places[name].name if name in self._places else name

    def _shape(self, place: Place) -> tuple[int, ...]:
        shape = self._weights.shape(place.name)
        if place.third is not None and shape and shape[0] % 3 == 0:
            return (shape[0] // 3, *shape[1:])
        if place.flat and len(shape) > 2 and set(shape[2:]) == {1}:
            return shape[:2]
        return shape

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, place in self._places.items():
            tensor, shape = self._weights[place.name], self._shape(place)
            if place.third is not None:
                tensor = tensor[place.third * shape[0] : (place.third + 1) * shape[0]]
            yield name, tensor.reshape(shape)
            # Free this tensor before the next one is read.
            del tensor


class _Name(str):
    """A tensor's name in place of the tensor, for diffusers' converters: they pass it on, and flatten by its axes."""

    __slots__ = ()
    shape: tuple[int, ...] = ()
    ndim = 0


def unet(names: Iterable[str], configuration: Mapping[str, Any]) -> dict[str, Place]:
    """Places of a UNet's tensors in the original layout, by diffusers' converter."""
    named = {f"model.diffusion_model.{name}": _Name(name) for name in names}
    return {
        new: Place(str(old)) for new, old in single_file_utils.convert_ldm_unet_checkpoint(named, configuration).items()
    }


def vae(names: Iterable[str], configuration: Mapping[str, Any]) -> dict[str, Place]:
    """Places of an autoencoder's tensors in the original layout, by diffusers' converter."""
    named = {f"first_stage_model.{name}": _Name(name) for name in names}
    converted = single_file_utils.convert_ldm_vae_checkpoint(named, configuration)
    return {new: Place(str(old), flat=".attentions." in new) for new, old in converted.items()}


_CLIP = re.compile(
    r"((clip_[lh]|transformer|model|text_encoder)\.)*(text_model\.)?((embeddings|encoder|final_layer_norm)\..+)"
)
_OPEN_CLIP = re.compile(r"(?:(?:clip_[lh]|model)\.)*(?:transformer\.resblocks\.(\d+)\.)?(.+)")
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}


def text_encoder(names: Iterable[str], configuration: Mapping[str, Any]) -> dict[str, Place]:
    """Places of a CLIP text encoder's tensors, in CLIP's or OpenCLIP's layout, with or without ``text_model.``.

    diffusers' converter knows one prefix for each layout, but programs write a dozen.
    """
    places: dict[str, Place] = {}
    for name in names:
        if match := _CLIP.fullmatch(name):
            places[match[4]] = Place(name)
            continue
        if not (match := _OPEN_CLIP.fullmatch(name)):
            continue
        layer, last = match[1], match[2]
        if layer is None:
            if last in _OPEN_CLIP_ENDS:
                places[_OPEN_CLIP_ENDS[last]] = Place(name)
            continue
        own, _, leaf = last.rpartition(".")
        # Stable Diffusion 2 does not use the last layer of its text encoder, but its checkpoints have it.
        if int(layer) == configuration["num_hidden_layers"]:
            places[f"unused.{layer}.{last}"] = Place(name)
        elif last in ("attn.in_proj_weight", "attn.in_proj_bias"):
            for third, key in enumerate(("q_proj", "k_proj", "v_proj")):
                new = f"encoder.layers.{layer}.self_attn.{key}.{last.removeprefix('attn.in_proj_')}"
                places[new] = Place(name, third=third)
        elif own in _OPEN_CLIP_LAYER:
            places[f"encoder.layers.{layer}.{_OPEN_CLIP_LAYER[own]}.{leaf}"] = Place(name)
    return places


UNUSED = "unused."
"""Prefix of the names of tensors that a configuration leaves out on purpose."""
ORIGINAL: dict[str, Callable[[Iterable[str], Mapping[str, Any]], dict[str, Place]]] = {
    "unet": unet,
    "vae": vae,
    "text_encoder": text_encoder,
}
"""Places in a checkpoint of the original layout, by part."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def of_folder(component: str, names: Iterable[str]) -> dict[str, Place]:
    """Places in a diffusers folder, under current and older names."""
    places = {}
    for name in names:
        new = name
        if component == "text_encoder":
            # transformers before version 5.6 writes this prefix.
            new = name.removeprefix("text_model.")
        elif component == "vae" and (
            match := re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(.+)", name)
        ):
            # Names of diffusers before 0.18; Stable Diffusion 1.x is published with them.
            new = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
        places[new] = Place(name, flat=component == "vae" and ".attentions." in name)
    return places
