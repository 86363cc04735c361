"""The networks of DeepFloyd IF: both stages' UNets and T5's encoder, built from checked configurations."""

import importlib.util
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5TokenizerFast

from ..errors import BackendUnavailableError, IncompleteModelError, WrongFamilyError
from ..unexpected import without_advice
from .files.source import Folder
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
TABLE = "encoder.embed_tokens"
"""The embedding with T5's vocabulary."""
_SHARED, _TABLE = "shared.weight", f"{TABLE}.weight"
"""The names of its tensor: in files, which share it with a decoder, and here."""
_FILES_OF_TOKENIZERS = ("vocab_file", "tokenizer_file", "added_tokens_file")
"""Entries of a tokenizer's settings that make it read another file."""


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
    """T5's encoder on the meta device, without the copy of its table for a decoder.

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
        if name == _TABLE and _SHARED in names:
            continue
        yield _TABLE if name == _SHARED else name, weights[name]


def load_tokenizer(folder: Folder, component: str, words: int) -> Any:
    """T5's tokenizer.

    Args:
        folder: the model's folder.
        component: its part.
        words: size of the text encoder's vocabulary.

    Raises:
        IncompleteModelError: it is damaged, or of another text encoder.
        BackendUnavailableError: it is in sentencepiece's own format, and that package is missing.
    """
    files, settings = folder.tokenizer(component)
    values = folder.config(component, "tokenizer_config.json")
    if elsewhere := [key for key in _FILES_OF_TOKENIZERS if key in values and "/" in str(values[key])]:
        raise IncompleteModelError(
            f"{folder.label}: {component}/tokenizer_config.json names a file elsewhere ({elsewhere[0]}); remove that "
            "entry"
        )
    if not (files / "tokenizer.json").exists() and importlib.util.find_spec("sentencepiece") is None:
        raise BackendUnavailableError(
            f"the tokenizer of {folder.label} is in the format of sentencepiece, which is not installed; install it "
            "(pip install '.[t5]')"
        )
    with without_advice(), complete(folder.label, component):
        tokenizer = T5TokenizerFast.from_pretrained(files, local_files_only=True, **settings)
        if max(tokenizer.get_vocab().values()) >= words:
            raise ValueError(f"it has words beyond the {words} of the text encoder")
        if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
            raise ValueError("it has no padding or no end token")
        return tokenizer


def _unet(values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        network: nn.Module = UNet2DConditionModel.from_config(dict(values))
        return network


def _text_encoder(values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        encoder: Any = T5EncoderModel(T5Config(**values, tie_word_embeddings=False))
    # The encoder's own place alone: the weights are then read, stored and counted once.
    encoder.set_input_embeddings(encoder.shared)
    del encoder.shared
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
        shape = encoder(ids)[0].shape
    _check(shape, (1, 2, values["d_model"]))


def _check(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(shape) != expected:
        raise ValueError(f"it computes the shape {list(shape)}, expected {list(expected)}")
