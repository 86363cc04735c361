"""The parts of a FLUX.2 klein: their classes, their checked configurations, and networks built from these."""

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import Qwen3Config, Qwen3Model

from ..errors import BackendUnavailableError, IncompleteModelError, WrongFamilyError
from ..unexpected import without_advice
from . import kinds, limits
from .files.layout import Place, Tensors
from .files.source import Folder
from .loading import complete

TRANSFORMER, VAE, TEXT_ENCODER, TOKENIZER = "transformer", "vae", "text_encoder", "tokenizer"
LAYERS = (9, 18, 27)
"""The layers of the text encoder whose outputs are the text; those after the last one are not loaded."""
TOKENS = 512
"""Tokens of a sentence, padding included: the transformer attends to the padding."""
_CLASSES = {
    TRANSFORMER: ("Flux2Transformer2DModel",),
    VAE: ("AutoencoderKLFlux2",),
    TEXT_ENCODER: ("Qwen3ForCausalLM", "Qwen3Model"),
    TOKENIZER: ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
}
"""The classes that ``model_index.json`` may name for each part."""
_TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
)
"""Entries of a text encoder's configuration that determine its layers; others choose quantisers and kernels."""
_PLAIN_SCHEDULER = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
"""The settings of klein's noise schedule that other values would change."""


def check_pipeline(model_index: Mapping[str, Any], label: str) -> None:
    """Checks that a pipeline of FLUX.2 klein has the usual parts.

    Raises:
        WrongFamilyError: a part is of another class.
    """
    kinds.check_parts(model_index, _CLASSES, label)


def transformer(folder: Folder) -> dict[str, Any]:
    """The transformer's configuration, complete and checked.

    Raises:
        WrongFamilyError: it is another FLUX.2.
        IncompleteModelError: a value is of the wrong kind or beyond its bounds.
    """
    values = _complete(folder, TRANSFORMER)
    if values["guidance_embeds"]:
        raise WrongFamilyError(
            f"{folder.label} takes guidance as an input (guidance_embeds), as FLUX.2 dev does, which is distilled; "
            "take FLUX.2 klein 4B Base (`model=klein`)"
        )
    limits.check(TRANSFORMER, values, folder.label)
    heads, axes = values["attention_head_dim"], values["axes_dims_rope"]
    if sum(axes) != heads or len(axes) != 4 or any(axis % 2 for axis in axes):
        raise IncompleteModelError(
            f"{folder.label}: {TRANSFORMER}/config.json has axes_dims_rope {axes} for heads of {heads}; expected four "
            "even numbers of that sum; download it again"
        )
    return values


def vae(folder: Folder) -> dict[str, Any]:
    """The autoencoder's configuration, complete and checked.

    Raises:
        WrongFamilyError: it is of another class.
        IncompleteModelError: a value is of the wrong kind or beyond its bounds.
    """
    values = _complete(folder, VAE)
    if list(values["patch_size"]) != [2, 2]:
        raise IncompleteModelError(f"{folder.label}: {VAE}/config.json has another patch_size than 2, 2")
    limits.check(VAE, values, folder.label, kind="flux2_vae")
    return values


def text_encoder(folder: Folder) -> dict[str, Any]:
    """The text encoder's configuration, complete and checked.

    Raises:
        WrongFamilyError: it is of another kind.
        IncompleteModelError: a value is of the wrong kind or beyond its bounds.
    """
    values = folder.config(TEXT_ENCODER)
    kind = values.get("model_type")
    if kind != "qwen3":
        raise WrongFamilyError(f"{folder.label} has a text encoder of the kind {str(kind)[:60]}; expected qwen3")
    defaults = Qwen3Config().to_dict()
    known = {key: values.get(key, defaults[key]) for key in _TEXT_KEYS}
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or values.get("rope_scaling"):
        raise WrongFamilyError(f"{folder.label} has a text encoder with scaled positions; expected Qwen3's own")
    if values.get("use_sliding_window"):
        raise WrongFamilyError(f"{folder.label} has a text encoder with a sliding window; expected Qwen3's own")
    known["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10000.0))
    limits.check(TEXT_ENCODER, known, folder.label, kind="qwen3")
    if known["num_hidden_layers"] < LAYERS[-1]:
        raise IncompleteModelError(
            f"{folder.label} has a text encoder of {known['num_hidden_layers']} layers, expected {LAYERS[-1]} or more"
        )
    return known


def check_schedule(folder: Folder) -> None:
    """Checks that the noise schedule is klein's: a flow whose positions are shifted by size and steps.

    Raises:
        WrongFamilyError: it is another.
    """
    values = folder.config("scheduler", "scheduler_config.json")
    kind = values.get("_class_name", "FlowMatchEulerDiscreteScheduler")
    other = [key for key, plain in _PLAIN_SCHEDULER.items() if values.get(key, plain) != plain]
    if kind != "FlowMatchEulerDiscreteScheduler" or other:
        found = f"{other[0]} {str(values[other[0]])[:40]}" if other else str(kind)[:60]
        raise WrongFamilyError(f"{folder.label} has another noise schedule than FLUX.2 klein ({found})")


def _complete(folder: Folder, component: str) -> dict[str, Any]:
    """A part's configuration with the defaults of its class."""
    values = folder.config(component)
    kind = values.get("_class_name")
    if kind is not None and kind not in _CLASSES[component]:
        raise WrongFamilyError(
            f"{folder.label} has a {component} of the class {str(kind)[:60]}; expected {_CLASSES[component][0]}"
        )
    parameters = inspect.signature(_class_of(component).__init__).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    own = {key: value for key, value in values.items() if key in defaults}
    plain: dict[str, Any] = json.loads(json.dumps({**defaults, **own}))
    return plain


def _class_of(component: str) -> Any:
    """diffusers' class of a part.

    Raises:
        BackendUnavailableError: the installed diffusers has none.
    """
    kind = getattr(diffusers, _CLASSES[component][0], None)
    if kind is None:
        raise BackendUnavailableError(
            f"FLUX.2 klein needs diffusers 0.37 or later, found {diffusers.__version__}; "
            "pip install --upgrade diffusers"
        )
    return kind


def build(component: str, values: Mapping[str, Any], label: str) -> nn.Module:
    """A part on the meta device, which computes results of the right shapes.

    Some values are checked only when a network computes, so a pass is run once in a process for each configuration.

    Raises:
        IncompleteModelError: the libraries cannot build it, or it cannot compute.
    """
    with complete(label, component):
        _try_out(component, json.dumps(values, sort_keys=True))
        return _build(component, values)


def _build(component: str, values: Mapping[str, Any]) -> nn.Module:
    with init_empty_weights(include_buffers=False), without_advice():
        if component != TEXT_ENCODER:
            part: nn.Module = _class_of(component).from_config(dict(values))
            return part
        encoder = Qwen3Model(Qwen3Config(**{**values, "num_hidden_layers": LAYERS[-1]}))
        # The outputs of single layers are taken, before the final normalisation.
        encoder.norm = nn.Identity()
        encoder.eval()
        return encoder  # type: ignore[no-any-return]


# A call that raises is not remembered.
@lru_cache(maxsize=64)
def _try_out(component: str, values_as_json: str) -> None:
    values: dict[str, Any] = json.loads(values_as_json)
    part: Any = _build(component, values).to("meta")
    with torch.no_grad(), without_advice():
        if component == TEXT_ENCODER:
            ids = torch.empty(1, 4, dtype=torch.int64, device="meta")
            mask = torch.empty(1, 1, 4, 4, dtype=torch.bool, device="meta")
            result = text_states(part, ids, mask)
            expected: tuple[int, ...] = (1, 4, len(LAYERS) * values["hidden_size"])
        elif component == TRANSFORMER:
            text = torch.empty(1, 2, values["joint_attention_dim"], device="meta")
            x = torch.empty(1, values["in_channels"], 2, 2, device="meta")
            result, expected = velocity(part, x, torch.empty(1, device="meta"), text), tuple(x.shape)
        else:
            latents = torch.empty(1, values["latent_channels"], 2, 2, device="meta")
            picture = part.decode(latents).sample
            result, expected = part.encode(picture).latent_dist.mean, tuple(latents.shape)
    if tuple(result.shape) != expected:
        raise ValueError(f"it computes the shape {list(result.shape)}, expected {list(expected)}")


def text_states(encoder: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The outputs (B, T, 3 D) of `LAYERS` side by side, for token ids (B, T) and a mask (B, 1, T, T) of attention."""
    if mask.is_meta:
        # Kernels make such a copy of a mask of truth values; the meta device has no kernel.
        mask = mask.to(encoder.layers[0].input_layernorm.weight.dtype)
    states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return torch.cat([states[layer] for layer in LAYERS], -1)


def velocity(network: Any, x: torch.Tensor, at: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The transformer's prediction (R, C, h, w) for x of the same shape at positions (R,), under text (R, T, D).

    The rows of a pass have equal positions in picture and text, so one row's ids serve all of them.
    """
    rows = len(x)
    axes = [torch.arange(side, device=x.device) for side in (1, *x.shape[2:], 1)]
    of_picture = torch.cartesian_prod(*axes)
    of_text = torch.zeros(text.shape[1], 4, dtype=torch.int64, device=x.device)
    of_text[:, 3] = torch.arange(text.shape[1], device=x.device)
    predicted: torch.Tensor = network(
        hidden_states=x.flatten(2).mT,
        timestep=at,
        guidance=None,
        encoder_hidden_states=text,
        img_ids=of_picture.expand(rows, -1, -1),
        txt_ids=of_text.expand(rows, -1, -1),
        return_dict=False,
    )[0]
    return predicted.mT.reshape(x.shape)


def tensors_of(folder: Folder, component: str) -> Tensors:
    """The tensors of a part under its class's names, without those that do not affect pictures.

    Raises:
        IncompleteModelError: files are missing or broken.
        WrongFamilyError: the weights have an unsupported format.
    """
    weights = folder.weights(component)
    if component == TEXT_ENCODER:
        return Tensors(weights, _of_text_encoder(weights.names))
    return Tensors(weights, {name: Place(name) for name in weights.names})


def _of_text_encoder(names: list[str]) -> dict[str, Place]:
    """Places of the text encoder's tensors up to the last layer that is used."""
    places = {}
    for name in names:
        own = name.removeprefix("model.")
        layer = own.split(".")[1] if own.startswith("layers.") else ""
        if own in ("lm_head.weight", "norm.weight") or (layer.isdigit() and int(layer) >= LAYERS[-1]):
            continue
        places[own] = Place(name)
    return places
