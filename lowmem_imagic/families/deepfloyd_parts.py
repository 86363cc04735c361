"""The networks of DeepFloyd IF: both stages' UNets and T5's encoder, built from checked configurations."""

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from ..errors import WrongFamilyError
from ..unexpected import without_advice
from .files.weights import Weights
from .loading import complete

TOKENS = 77
"""Tokens of a sentence, padding included: DeepFloyd IF was trained with this many."""
_PIXELS = 3
_T5_KEYS = (
    "vocab_size",
    "d_model",
    "d_kv",
    "d_ff",
    "num_layers",
    "num_heads",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "layer_norm_epsilon",
    "feed_forward_proj",
)
"""Entries that determine a T5 encoder's layers; others choose quantisers and attention kernels."""
_SHARED, _TIED = "shared.weight", "encoder.embed_tokens.weight"
"""The names of one tensor: T5's embedding, which its encoder shares with the decoder that is not here."""


def t5_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """A T5 encoder's configuration with the defaults of its class."""
    defaults = T5Config().to_dict()
    return {key: values.get(key, defaults[key]) for key in _T5_KEYS}


def check_unet(values: Mapping[str, Any], label: str, *, second: bool) -> None:
    """Checks that a UNet's configuration is one of a stage of DeepFloyd IF.

    Args:
        values: the UNet's configuration, complete.
        label: the model, for messages.
        second: whether it is to enlarge pictures.

    Raises:
        WrongFamilyError: it is another one, such as of inpainting or of the third stage.
    """
    expected: dict[str, Any] = {
        "in_channels": _PIXELS * (2 if second else 1),
        "out_channels": 2 * _PIXELS,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "class_embed_type": "timestep" if second else None,
        "time_cond_proj_dim": None,
        "num_class_embeds": None,
    }
    for key, value in expected.items():
        if values.get(key) != value:
            raise WrongFamilyError(
                f"{label} has a UNet with {key} {str(values.get(key))[:40]!r}, expected {value!r} as in stage "
                f"{'II' if second else 'I'} of DeepFloyd IF"
            )


def build_unet(values: Mapping[str, Any], label: str, side: int) -> nn.Module:
    """A stage's UNet on the meta device; its configuration is tried out once in a process.

    Raises:
        IncompleteModelError: the libraries cannot build it, or it computes another shape.
    """
    with complete(label, "unet"):
        _try_unet(json.dumps(dict(values)), side)
        return _unet(values)


def build_text_encoder(values: Mapping[str, Any], label: str) -> nn.Module:
    """T5's encoder on the meta device, its embedding shared.

    Raises:
        IncompleteModelError: the libraries cannot build it, or it computes another shape.
    """
    with complete(label, "text_encoder"):
        _try_text_encoder(json.dumps(dict(values)))
        return _text_encoder(values)


def named_tensors(weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """T5's tensors under the names of `build_text_encoder`'s; each is read on access."""
    names = set(weights.names)
    for name in weights.names:
        if name == _TIED and _SHARED in names:
            continue
        yield _SHARED if name == _TIED else name, weights[name]


def _unet(values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        network: nn.Module = UNet2DConditionModel.from_config(dict(values))
        return network


def _text_encoder(values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        encoder: Any = T5EncoderModel(T5Config(**values, tie_word_embeddings=False))
    # One module in both places: weights are then read, stored and counted once.
    encoder.set_input_embeddings(encoder.shared)
    return encoder  # type: ignore[no-any-return]


# A call that raises is not remembered.
@lru_cache(maxsize=16)
def _try_unet(values_as_json: str, side: int) -> None:
    values: dict[str, Any] = json.loads(values_as_json)
    network: Any = _unet(values).to("meta")
    x = torch.empty(1, values["in_channels"], side, side, device="meta")
    text = torch.empty(1, 2, values["encoder_hid_dim"], device="meta")
    time = torch.empty(1, dtype=torch.int64, device="meta")
    level = None if values["class_embed_type"] is None else time
    with torch.no_grad(), without_advice():
        shape = network(x, time, encoder_hidden_states=text, class_labels=level).sample.shape
    _check(shape, (1, values["out_channels"], side, side))


@lru_cache(maxsize=16)
def _try_text_encoder(values_as_json: str) -> None:
    values: dict[str, Any] = json.loads(values_as_json)
    encoder: Any = _text_encoder(values).to("meta")
    ids = torch.empty(1, 2, dtype=torch.int64, device="meta")
    with torch.no_grad(), without_advice():
        shape = encoder(ids, attention_mask=torch.empty_like(ids))[0].shape
    _check(shape, (1, 2, values["d_model"]))


def _check(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"it computes the shape {list(shape)}, expected {list(expected)}")
