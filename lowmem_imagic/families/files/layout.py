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
    turned: bool = False
    """Whether the file has the transposed matrix."""
    swapped: bool = False
    """Whether the file has the two halves of its rows in the other order."""


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
        return shape[::-1] if place.turned else shape

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, place in self._places.items():
            tensor, shape = self._weights[place.name], self._shape(place)
            if place.third is not None:
                tensor = tensor[place.third * shape[0] : (place.third + 1) * shape[0]]
            if place.swapped:
                tensor = tensor.roll(len(tensor) // 2, 0)
            yield name, tensor.T.contiguous() if place.turned else tensor.reshape(shape)
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
    r"((clip_[lgh]|transformer|model|text_encoder)\.)*(text_model\.)?"
    r"((embeddings|encoder|final_layer_norm)\..+|text_projection\.weight)"
)
_OPEN_CLIP = re.compile(r"(?:(?:clip_[lgh]|model)\.)*(?:transformer\.resblocks\.(\d+)\.)?(.+)")
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

    diffusers' converter knows one prefix for each layout, but programs write a dozen. OpenCLIP multiplies by its
    projection from the other side, so its matrix is transposed.
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
            elif last == "text_projection":
                places["text_projection.weight"] = Place(name, turned=True)
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
    "text_encoder_2": text_encoder,
}
"""Places in a checkpoint of the original layout, by part."""

_FLUX2_BLOCK = {
    "img_attn.proj.weight": "attn.to_out.0.weight",
    "txt_attn.proj.weight": "attn.to_add_out.weight",
    "img_mlp.0.weight": "ff.linear_in.weight",
    "img_mlp.2.weight": "ff.linear_out.weight",
    "txt_mlp.0.weight": "ff_context.linear_in.weight",
    "txt_mlp.2.weight": "ff_context.linear_out.weight",
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
    "linear1.weight": "attn.to_qkv_mlp_proj.weight",
    "linear2.weight": "attn.to_out.weight",
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}
_FLUX2_QKV = {
    "img_attn.qkv.weight": ("to_q", "to_k", "to_v"),
    "txt_attn.qkv.weight": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_FLUX2_ENDS = {
    "img_in.weight": "x_embedder.weight",
    "txt_in.weight": "context_embedder.weight",
    "time_in.in_layer.weight": "time_guidance_embed.timestep_embedder.linear_1.weight",
    "time_in.out_layer.weight": "time_guidance_embed.timestep_embedder.linear_2.weight",
    "double_stream_modulation_img.lin.weight": "double_stream_modulation_img.linear.weight",
    "double_stream_modulation_txt.lin.weight": "double_stream_modulation_txt.linear.weight",
    "single_stream_modulation.lin.weight": "single_stream_modulation.linear.weight",
    "final_layer.linear.weight": "proj_out.weight",
}
_FLUX2_MODULATION = "final_layer.adaLN_modulation.1.weight"
FLUX2_TEXT = ("txt_in.weight", "context_embedder.weight")
"""Names of the layer that takes the text, in both layouts."""
_FLUX2 = re.compile(r"(double|single)_blocks\.(\d{1,3})\.(.+)")
_FLUX2_DIFFUSERS = re.compile(
    r"((single_)?transformer_blocks\.\d{1,3}|time_guidance_embed|(double|single)_stream_modulation(_img|_txt)?"
    r"|x_embedder|context_embedder|norm_out|proj_out)\."
)


def flux2(names: Iterable[str]) -> dict[str, Place]:
    """Places of the tensors of a FLUX.2 transformer, in Black Forest Labs' layout or in diffusers'.

    Source: ``convert_flux2_transformer_checkpoint_to_diffusers`` of diffusers.
    """
    places: dict[str, Place] = {}
    for name in names:
        if _FLUX2_DIFFUSERS.match(name) and name not in _FLUX2_ENDS:
            places[name] = Place(name)
        elif name in _FLUX2_ENDS:
            places[_FLUX2_ENDS[name]] = Place(name)
        elif name == _FLUX2_MODULATION:
            # Shift and scale; diffusers has the scale first.
            places["norm_out.linear.weight"] = Place(name, swapped=True)
        elif match := _FLUX2.fullmatch(name):
            block = f"{'transformer_blocks' if match[1] == 'double' else 'single_transformer_blocks'}.{match[2]}"
            if match[3] in _FLUX2_QKV:
                for third, key in enumerate(_FLUX2_QKV[match[3]]):
                    places[f"{block}.attn.{key}.weight"] = Place(name, third=third)
            elif match[3] in _FLUX2_BLOCK:
                places[f"{block}.{_FLUX2_BLOCK[match[3]]}"] = Place(name)
    return places


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def of_folder(component: str, names: Iterable[str]) -> dict[str, Place]:
    """Places in a diffusers folder, under current and older names."""
    places = {}
    for name in names:
        new = name
        if component.startswith("text_encoder"):
            # transformers before version 5.6 writes this prefix.
            new = name.removeprefix("text_model.")
        elif component == "vae" and (
            match := re.fullmatch(r"(.+\.attentions\.\d+)\.(query|key|value|proj_attn)\.(.+)", name)
        ):
            # Names of diffusers before 0.18; Stable Diffusion 1.x is published with them.
            new = f"{match[1]}.{_OLD_ATTENTION[match[2]]}.{match[3]}"
        places[new] = Place(name, flat=component == "vae" and ".attentions." in name)
    return places
