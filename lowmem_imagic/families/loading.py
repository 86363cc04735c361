"""How parts of a model are built and filled: quietly, and with one named error for what is broken.

Networks are built from configurations that were bounded and completed before (see `limits`, `repairs`), and filled
with tensors that fit them exactly. The libraries' own loaders read the configuration again, with keys that choose
quantisers and code from elsewhere, and fill with random numbers what is missing.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ..errors import IncompleteModelError, LowmemImagicError
from ..unexpected import WARNINGS, first_line
from .files import layout
from .files.checkpoint import SingleFile
from .files.layout import Tensors
from .files.source import Folder

_EXTRAS = {
    "unet": re.compile(r"(?!)"),
    # The discriminator that the autoencoder was trained with, and an average of weights.
    "vae": re.compile(r"(loss|model_ema)\."),
    # Numbers of positions, which the class makes itself; what compares the text with pictures; CLIP's other half.
    "text_encoder": re.compile(
        r"(.*\.)?position_ids$|(logit_scale|logit_bias|text_projection(\.weight)?)$|(vision_model|visual_projection)\."
    ),
}
"""Tensors in a folder that take no part in making a picture."""


def build(component: str, values: Mapping[str, Any], label: str) -> nn.Module:
    """A part of a model on the meta device, for a configuration that is complete and bounded.

    Raises:
        IncompleteModelError: the libraries cannot build it.
    """
    with complete(label, component):
        return _build(component, values)


def _build(component: str, values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), quiet():
        if component == "text_encoder":
            part: nn.Module = CLIPTextModel(CLIPTextConfig(**values))
            return part
        kind: Any = UNet2DConditionModel if component == "unet" else AutoencoderKL
        part = kind.from_config(dict(values))
        return part


def try_out(component: str, values: Mapping[str, Any], label: str, side: int) -> None:
    """Makes sure that a part so configured computes what Stable Diffusion needs of it, without weights.

    Many values are looked at only when a network computes: some libraries take them all while they build it. This is
    the pass itself, on the meta device, of one picture of `side` latent pixels; a process makes it once for a
    configuration.

    Raises:
        IncompleteModelError: it cannot compute, or gives another shape.
    """
    with complete(label, component):
        _try_out(component, json.dumps(values), side)


# A call that raises is not remembered.
@lru_cache(maxsize=64)
def _try_out(component: str, values_as_json: str, side: int) -> None:
    values: dict[str, Any] = json.loads(values_as_json)
    part: Any = _build(component, values).to("meta")
    latents = torch.empty(1, 4, side, side, device="meta")
    with torch.no_grad(), quiet():
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
    for found, expected in shapes:
        if tuple(found) != tuple(expected):
            raise ValueError(f"it computes the shape {list(found)}, expected {list(expected)}")


def tensors_of(source: Folder | SingleFile, component: str, values: Mapping[str, Any]) -> Tensors:
    """The tensors of a part, under diffusers' names and without those that take no part in making a picture.

    Raises:
        IncompleteModelError: files are missing or broken, or tensors are beyond the configuration.
        WrongFamilyError: a format that is not read.
    """
    if isinstance(source, SingleFile):
        with complete(source.path.name, component):
            return source.tensors(component, values)
    weights = source.weights(component)
    names = [name for name in weights.names if not _EXTRAS[component].match(name)]
    return Tensors(weights, layout.of_folder(component, names))


def check_fit(part: nn.Module, tensors: Tensors, label: str, configured: str) -> dict[str, str]:
    """Makes sure that tensors are those of a network, in name and shape, before one is read.

    Args:
        part: the network.
        tensors: its tensors.
        label: the model and the part, for messages.
        configured: the model whose configuration it has.

    Returns:
        the network's name of each tensor: transformers' own have had a prefix, until version 5.6.

    Raises:
        IncompleteModelError: some are missing, too many, or of another shape.
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

    **Memory**: the weights in that type, and one tensor as it is stored.
    """
    # A copy: a tensor as it was read is a view of the file, which may be replaced while the network is in use.
    state = {names[name]: tensor.to(device, dtype, copy=True) for name, tensor in tensors}
    part.load_state_dict(state, assign=True)
    part.to(device)
    part.requires_grad_(False).eval()


@contextlib.contextmanager
def complete(label: str, component: str) -> Iterator[None]:
    """Turns what the libraries raise for a damaged part into one named error; this package's own pass."""
    try:
        yield
    except (LowmemImagicError, MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        # Among them plain Exceptions, which is what tokenizers raises for a damaged vocabulary, and panics of its Rust
        # code, which are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise IncompleteModelError(
            f"{label}: {component} cannot be loaded ({first_line(error)}); download it again"
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars and advice; their settings are put back afterwards."""
    logs = (transformers.utils.logging, diffusers.utils.logging)
    with WARNINGS:
        levels = [log.get_verbosity() for log in logs]
        bars = [log.is_progress_bar_enabled() for log in logs]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for log in logs:
                    log.set_verbosity_error()
                    log.disable_progress_bar()
                yield
        finally:
            for log, level, bar in zip(logs, levels, bars, strict=True):
                log.set_verbosity(level)
                if bar:
                    log.enable_progress_bar()
