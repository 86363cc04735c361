"""Builds parts of a model and fills them with weights, quietly; a damaged part gives one named error.

Networks are built from checked and completed configurations (see `limits`, `repairs`), and filled with tensors that
fit them exactly. The libraries' own loaders are not used: they read the configuration again, with keys that choose
quantisers and foreign code, and they fill missing weights with random numbers.
"""

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ..errors import IncompleteModelError, LowmemImagicError
from ..layers.frozen import load_frozen
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
    # The class makes its position ids itself.
    "text_encoder_2": re.compile(r"(.*\.)?position_ids$|(logit_scale|logit_bias)$|(vision_model|visual_projection)\."),
}
"""Tensors in a folder that do not affect pictures."""
_TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def build(component: str, values: Mapping[str, Any], label: str) -> nn.Module:
    """A part of a model on the meta device, from a complete and checked configuration.

    Raises:
        IncompleteModelError: the libraries cannot build it.
    """
    with complete(label, component):
        return _build(component, values)


def _build(component: str, values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        if component in _TEXT_ENCODERS:
            part: nn.Module = _TEXT_ENCODERS[component](CLIPTextConfig(**values))
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
        if component in _TEXT_ENCODERS:
            ids = torch.empty(1, values["max_position_embeddings"], dtype=torch.int64, device="meta")
            states = part(ids, output_hidden_states=True)
            width = (*ids.shape, values["hidden_size"])
            shapes = [(states.hidden_states[-2].shape, width), (states.last_hidden_state.shape, width)]
            if component == "text_encoder_2":
                shapes.append((states.text_embeds.shape, (1, values["projection_dim"])))
        elif component == "unet":
            text = torch.empty(1, 2, values["cross_attention_dim"], device="meta")
            time = torch.empty(1, dtype=torch.int64, device="meta")
            beside = _beside(values)
            prediction = part(latents, time, encoder_hidden_states=text, added_cond_kwargs=beside).sample
            shapes = [(prediction.shape, latents.shape)]
        else:
            picture = part.decode(latents).sample
            factor = 2 ** (len(values["block_out_channels"]) - 1)
            shapes = [(picture.shape, (1, 3, factor * side, factor * side))]
            shapes.append((part.encode(picture).latent_dist.mean.shape, latents.shape))
    for shape, expected in shapes:
        if tuple(shape) != tuple(expected):
            raise ValueError(f"it computes the shape {list(shape)}, expected {list(expected)}")


def _beside(values: Mapping[str, Any]) -> dict[str, torch.Tensor] | None:
    """What a UNet with this configuration takes beside latents, time and tokens: a vector of text, and six sizes."""
    if values["addition_embed_type"] is None:
        return None
    width = values["projection_class_embeddings_input_dim"] - 6 * values["addition_time_embed_dim"]
    return {
        "text_embeds": torch.empty(1, width, device="meta"),
        "time_ids": torch.empty(1, 6, dtype=torch.int64, device="meta"),
    }


def tensors_of(source: Folder | SingleFile, component: str, values: Mapping[str, Any]) -> Tensors:
    """The tensors of a part under diffusers' names, without those that do not affect pictures.

    Raises:
        IncompleteModelError: files are missing or broken, or tensors are beyond the configuration.
        WrongFamilyError: the weights have an unsupported format.
    """
    if isinstance(source, SingleFile) and component not in source.elsewhere:
        with complete(source.path.name, component):
            return source.tensors(component, values)
    folder = source.elsewhere[component] if isinstance(source, SingleFile) else source
    weights = folder.weights(component)
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


def fill(
    part: nn.Module,
    tensors: Tensors,
    names: Mapping[str, str],
    device: torch.device,
    dtype: torch.dtype,
    *,
    in_fp32: tuple[str, ...] = (),
) -> None:
    """Gives a network on the meta device its weights, frozen, in one type; names that begin with `in_fp32` in fp32.

    **Memory**: the weights in that type, and one tensor in its stored type.
    """
    # A copy: a tensor from a file is a view of the file, which may be replaced while the network is in use.
    state = {
        names[name]: tensor.to(device, torch.float32 if name.startswith(in_fp32) else dtype, copy=True)
        for name, tensor in tensors
    }
    part.load_state_dict(state, assign=True)
    part.to(device)
    part.requires_grad_(False).eval()


_FILES_OF_TOKENIZERS = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file")
"""Entries of a tokenizer's settings that make it read another file."""


def tokenizer_files(folder: Folder, component: str) -> tuple[Path, dict[str, Any]]:
    """The folder with a tokenizer's files, and settings that go before those in its files.

    Raises:
        IncompleteModelError: files are missing, or its settings name a file elsewhere.
    """
    files, settings = folder.tokenizer(component)
    values = folder.config(component, "tokenizer_config.json")
    if elsewhere := [key for key in _FILES_OF_TOKENIZERS if key in values and "/" in str(values[key])]:
        raise IncompleteModelError(
            f"{folder.label}: {component}/tokenizer_config.json names a file elsewhere ({elsewhere[0]}); "
            "remove that entry"
        )
    return files, settings


def freeze_text_encoder(
    encoder: nn.Module,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    table: str,
    weights: str,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Gives a text encoder of several GB its weights, layer by layer, never as a copy in fp32 or fp16.

    Beside a base in 8 or 4 bits its linear layers are in int8, and compute in `dtype`. Beside any other base all of it
    is in bfloat16, and so is its arithmetic. The table of its vocabulary is in bfloat16 in any case.

    Args:
        encoder: the text encoder on the meta device.
        tensors: its tensors under the encoder's names; reading may be lazy.
        table: name of the embedding with its vocabulary.
        weights: format of the base's weights, one of `settings.stages.WEIGHT_FORMATS`.
        device: device of the weights.
        dtype: type of the arithmetic.

    Raises:
        ValueError: see `load_frozen`.
    """
    plain = weights in ("bf16", "fp32")
    kind, computed = ("bf16", torch.bfloat16) if plain else ("int8", dtype)
    load_frozen(encoder, tensors, weights=kind, device=device, dtype=computed, in_bf16=[table])
    parent, _, child = table.rpartition(".")
    setattr(encoder.get_submodule(parent), child, _Table(encoder.get_submodule(table), computed))


class _Table(nn.Module):
    """An embedding whose rows are computed with in another type than that of its weights."""

    def __init__(self, embedding: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding, self._dtype = embedding, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.embedding(ids)
        return rows.to(self._dtype)


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
