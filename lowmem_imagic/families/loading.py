"""Builds parts of a model and fills them with weights, quietly; a damaged part gives one named error.

Networks are built from checked and completed configurations (see `limits`, `repairs`), and filled with tensors that
fit them exactly. The libraries' own loaders are not used: they read the configuration again, with keys that choose
quantisers and foreign code, and they fill missing weights with random numbers.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import IncompleteModelError, LowmemImagicError
from ..unexpected import first_line, without_advice
from .files import layout
from .files.checkpoint import SingleFile
from .files.layout import Tensors
from .files.source import Folder

_EXTRAS = {
    "unet": re.compile(r"(?!)"),
    # The discriminator that the autoencoder was trained with, and an average of weights.
    "vae": re.compile(r"(loss|model_ema)\."),
    # Position ids, which the class makes itself; layers that compare text with pictures; CLIP's picture encoder.
    "text_encoder": re.compile(
        r"(.*\.)?position_ids$|(logit_scale|logit_bias|text_projection(\.weight)?)$|(vision_model|visual_projection)\."
    ),
}
"""Tensors in a folder that do not affect pictures."""


def build(component: str, values: Mapping[str, Any], label: str) -> nn.Module:
    """A part of a model on the meta device, from a complete and checked configuration.

    Raises:
        IncompleteModelError: the libraries cannot build it.
    """
    with complete(label, component):
        return _build(component, values)


def _build(component: str, values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        if component == "text_encoder":
            part: nn.Module = CLIPTextModel(CLIPTextConfig(**values))
            return part
        kind: Any = UNet2DConditionModel if component == "unet" else AutoencoderKL
        part = kind.from_config(dict(values))
        return part


def try_out(component: str, values: Mapping[str, Any], label: str, side: int) -> None:
    """Checks that a part with this configuration computes results of the right shapes, without weights.

    Some values are checked only when a network computes, not when it is built. So this runs a pass on the meta device,
    for one picture of `side` latent pixels, once in a process for each configuration.

    Raises:
        IncompleteModelError: the part cannot compute, or gives another shape.
    """
    with complete(label, component):
        _try_out(component, json.dumps(values), side)


# A call that raises is not remembered.
@lru_cache(maxsize=64)
def _try_out(component: str, values_as_json: str, side: int) -> None:
    values: dict[str, Any] = json.loads(values_as_json)
    part: Any = _build(component, values).to("meta")
    channels = values.get("in_channels" if component == "unet" else "latent_channels", 1)
    latents = torch.empty(1, channels, side, side, device="meta")
    with torch.no_grad(), without_advice():
        if component == "text_encoder":
            ids = torch.empty(1, values["max_position_embeddings"], dtype=torch.int64, device="meta")
            shapes = [(part(ids)[0].shape, (*ids.shape, values["hidden_size"]))]
        elif component == "unet":
            text = torch.empty(1, 2, values["cross_attention_dim"], device="meta")
            time = torch.empty(1, dtype=torch.int64, device="meta")
            shapes = [(part(latents, time, encoder_hidden_states=text).sample.shape, latents.shape)]
        else:
            picture = part.decode(latents).sample
            factor = 2 ** (len(values["block_out_channels"]) - 1)
            shapes = [(picture.shape, (1, 3, factor * side, factor * side))]
            shapes.append((part.encode(picture).latent_dist.mean.shape, latents.shape))
    for shape, expected in shapes:
        if tuple(shape) != tuple(expected):
            raise ValueError(f"it computes the shape {list(shape)}, expected {list(expected)}")


def tensors_of(source: Folder | SingleFile, component: str, values: Mapping[str, Any]) -> Tensors:
    """The tensors of a part under diffusers' names, without those that do not affect pictures.

    Raises:
        IncompleteModelError: files are missing or broken, or tensors are beyond the configuration.
        WrongFamilyError: the weights have an unsupported format.
    """
    if isinstance(source, SingleFile):
        with complete(source.path.name, component):
            return source.tensors(component, values)
    weights = source.weights(component)
    names = [name for name in weights.names if not _EXTRAS[component].match(name)]
    return Tensors(weights, layout.of_folder(component, names))


def check_fit(part: nn.Module, tensors: Tensors, label: str, configured: str) -> dict[str, str]:
    """Checks names and shapes of all tensors against a network, before any tensor is read.

    Args:
        part: the network.
        tensors: its tensors.
        label: the model and the part, for messages.
        configured: the model that the configuration is from.

    Returns:
        The network's name of each tensor; before version 5.6, transformers' names have a prefix.

    Raises:
        IncompleteModelError: tensors are missing, too many, or of another shape.
    """
    expected = {name.removeprefix("text_model."): (name, tuple(t.shape)) for name, t in part.state_dict().items()}
    shapes = tensors.shapes()
    problems = (
        ("lacks {} tensors", sorted(expected.keys() - shapes.keys())),
        ("has {} tensors beyond the configuration", sorted(shapes.keys() - expected.keys())),
        (
            "has {} tensors of another shape than in the configuration",
            sorted(name for name in shapes.keys() & expected.keys() if shapes[name] != expected[name][1]),
        ),
    )
    for words, names in problems:
        if names:
            some = ", ".join(tensors.in_file(name)[:100] for name in names[:3])
            raise IncompleteModelError(
                f"{label} {words.format(len(names))} of {configured}, such as {some}; download it again, or give the "
                "configuration that it was made with"
            )
    return {name: expected[name][0] for name in shapes}


def fill(part: nn.Module, tensors: Tensors, names: Mapping[str, str], device: torch.device, dtype: torch.dtype) -> None:
    """Gives a network on the meta device its weights, frozen, in one type.

    **Memory**: the weights in that type, and one tensor in its stored type.
    """
    # A copy: a tensor from a file is a view of the file, which may be replaced while the network is in use.
    state = {names[name]: tensor.to(device, dtype, copy=True) for name, tensor in tensors}
    part.load_state_dict(state, assign=True)
    part.to(device)
    part.requires_grad_(False).eval()


@contextlib.contextmanager
def complete(label: str, component: str) -> Iterator[None]:
    """Turns the libraries' errors about a damaged part into `IncompleteModelError`; this package's own errors pass."""
    try:
        yield
    except (LowmemImagicError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # The library tokenizers raises a plain Exception for a damaged vocabulary; panics of its Rust code are only
        # BaseExceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise IncompleteModelError(
            f"{label}: {component} cannot be loaded ({first_line(error)}); download it again"
        ) from error
