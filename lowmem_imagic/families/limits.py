"""Bounds of a model's configuration, checked before a network is built from it.

Building a network takes time and memory for every module, even without weights, and a configuration may ask for any
number of modules. Stable Diffusion 2 has 16 transformer blocks in its UNet, SDXL has 70.
"""

import math
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

from ..errors import IncompleteModelError

MAX_SIDE_PX = 4096
"""Largest side of the pictures of a model."""
MAX_TIMESTEPS = 10_000
_MOST_BLOCKS = 8
_MOST_UNITS = 400
"""Most residual and transformer blocks of a network; each is about twenty modules and takes a millisecond to build."""
_MOST_VALUES = 20_000
"""Most numbers and texts in one configuration."""
_WIDTH = (1, 2**14)
_COUNT = (1, 64)

_UNET = {
    "in_channels": _WIDTH,
    "out_channels": _WIDTH,
    "block_out_channels": _WIDTH,
    "layers_per_block": _COUNT,
    "transformer_layers_per_block": _COUNT,
    "reverse_transformer_layers_per_block": _COUNT,
    "attention_head_dim": _WIDTH,
    "num_attention_heads": _WIDTH,
    "cross_attention_dim": _WIDTH,
    "norm_num_groups": _WIDTH,
    "conv_in_kernel": (1, 15),
    "conv_out_kernel": (1, 15),
    "time_embedding_dim": _WIDTH,
    "addition_time_embed_dim": _WIDTH,
    "projection_class_embeddings_input_dim": (1, 2**17),
    "encoder_hid_dim": _WIDTH,
    "addition_embed_type_num_heads": _WIDTH,
}
_VAE = {
    "in_channels": (3, 3),
    "out_channels": (3, 3),
    "block_out_channels": _WIDTH,
    "layers_per_block": _COUNT,
    "latent_channels": (1, 64),
    "norm_num_groups": _WIDTH,
}
_TEXT = {
    "hidden_size": _WIDTH,
    "intermediate_size": (1, 2**16),
    "num_hidden_layers": _COUNT,
    "num_attention_heads": (1, 2**10),
    "max_position_embeddings": (3, 2**12),
    "vocab_size": (3, 2**20),
    "projection_dim": _WIDTH,
}
_TRANSFORMER = {
    "patch_size": (1, 1),
    "in_channels": _WIDTH,
    "num_layers": (0, 64),
    "num_single_layers": (1, 128),
    "attention_head_dim": (4, 2**10),
    "num_attention_heads": (1, 2**10),
    "joint_attention_dim": (1, 2**17),
    "timestep_guidance_channels": _WIDTH,
    "axes_dims_rope": (0, 2**10),
    "rope_theta": (1, 2**30),
}
_FLUX2_VAE = {**_VAE, "sample_size": (1, MAX_SIDE_PX), "decoder_block_out_channels": _WIDTH}
_QWEN3 = {
    **{key: value for key, value in _TEXT.items() if key != "projection_dim"},
    "max_position_embeddings": (3, 2**20),
    "num_key_value_heads": (1, 2**10),
    "head_dim": (2, 2**10),
}
_T5 = {
    "vocab_size": (3, 2**20),
    "d_model": _WIDTH,
    "d_kv": _WIDTH,
    "d_ff": (1, 2**16),
    "num_layers": _COUNT,
    "num_heads": (1, 2**10),
    "relative_attention_num_buckets": (2, 2**12),
    "relative_attention_max_distance": (2, 2**16),
}
_LISTS = (
    "axes_dims_rope",
    "decoder_block_out_channels",
    "block_out_channels",
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
)
"""Keys that may have one number for each block."""
_RANGES = {
    "unet": _UNET,
    "transformer": _TRANSFORMER,
    "vae": _VAE,
    "flux2_vae": _FLUX2_VAE,
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "qwen3": _QWEN3,
    "t5": _T5,
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "unet": (
        "num_attention_heads",
        "time_embedding_dim",
        "reverse_transformer_layers_per_block",
        "addition_time_embed_dim",
        "projection_class_embeddings_input_dim",
        "encoder_hid_dim",
    ),
    "vae": (),
    "flux2_vae": ("decoder_block_out_channels",),
    "text_encoder": ("projection_dim",),
    "text_encoder_2": (),
}
"""Keys that may be null; the class then sets the number."""


def check(component: str, values: Mapping[str, Any], label: str, *, kind: str | None = None) -> None:
    """Checks that a part's configuration (complete, see `repairs`) describes a network of bounded size.

    Args:
        component: the part.
        values: its configuration.
        label: the model, for messages.
        kind: the kind of part, if it is another than Stable Diffusion's of the same name.

    Raises:
        IncompleteModelError: a value is of the wrong kind or beyond its bounds.
    """
    where = f"{label}: {component}/config.json"
    for count, number in enumerate(_numbers(dict(values))):
        if count >= _MOST_VALUES:
            raise IncompleteModelError(f"{where} has more than {_MOST_VALUES} values; download it again")
        if isinstance(number, int | float) and not abs(number) < 2**40:
            raise IncompleteModelError(f"{where} has a number that is too large; download it again")
    for key, (low, high) in _RANGES[kind or component].items():
        value = values.get(key)
        if value is None and key in _OPTIONAL.get(kind or component, ()):
            continue
        parts = list(_numbers(value)) if isinstance(value, list) and key in _LISTS else [value]
        if not parts or not all(_integer(part) and low <= part <= high for part in parts):
            expected = str(low) if low == high else f"integers from {low} to {high}"
            raise _wrong(where, key, value, expected)
    channels = values.get("block_out_channels")
    if channels is not None:
        if not isinstance(channels, list) or not 1 <= len(channels) <= _MOST_BLOCKS:
            raise _wrong(where, "block_out_channels", channels, f"a list of 1 to {_MOST_BLOCKS} integers")
        for key in ("down_block_types", "up_block_types"):
            types = values.get(key)
            if not isinstance(types, list) or len(types) != len(channels) or not all(isinstance(t, str) for t in types):
                raise _wrong(where, key, types, f"a list of {len(channels)} names")
        layers = values["layers_per_block"]
        residual = sum(_numbers(layers)) if isinstance(layers, list) else layers * len(channels)
        kept = (values.get("transformer_layers_per_block"), values.get("reverse_transformer_layers_per_block"))
        units = residual * (1 + max((number for part in kept for number in _numbers(part) if number), default=1))
        if units > _MOST_UNITS:
            raise IncompleteModelError(
                f"{where} describes about {units} blocks, expected at most {_MOST_UNITS}; download it again"
            )
    if (kind or component) == "vae":
        scaling = values.get("scaling_factor")
        if not isinstance(scaling, int | float) or isinstance(scaling, bool) or not 1e-4 <= scaling <= 1e4:
            raise _wrong(where, "scaling_factor", scaling, "a number from 0.0001 to 10000")


def check_side(sample_size: object, factor: int, label: str) -> None:
    """Checks that the side of a model's pictures is within bounds.

    Raises:
        IncompleteModelError: `sample_size` is no integer, or the side is above `MAX_SIDE_PX`.
    """
    most = MAX_SIDE_PX // factor
    if not (_integer(sample_size) and 1 <= sample_size <= most):
        raise _wrong(f"{label}: unet/config.json", "sample_size", sample_size, f"an integer from 1 to {most}")


def check_schedule(values: Mapping[str, Any], label: str) -> None:
    """Checks that a noise schedule has a bounded number of steps, and values of the right types.

    Raises:
        IncompleteModelError: a value is of the wrong type or beyond its bounds.
    """
    where = f"{label}: scheduler/scheduler_config.json"
    steps, betas = values["num_train_timesteps"], values.get("trained_betas")
    if not (_integer(steps) and 2 <= steps <= MAX_TIMESTEPS):
        raise _wrong(where, "num_train_timesteps", steps, f"an integer from 2 to {MAX_TIMESTEPS}")
    if betas is not None:
        if not isinstance(betas, list) or len(betas) != steps or not all(_number(beta) for beta in betas):
            raise _wrong(where, "trained_betas", betas, f"a list of {steps} numbers")
    elif not (_number(values["beta_start"]) and _number(values["beta_end"])):
        raise _wrong(
            where, "beta_start", [values["beta_start"], values["beta_end"]], "numbers for beta_start and beta_end"
        )
    for key in ("rescale_betas_zero_snr", "set_alpha_to_one"):
        if not isinstance(values.get(key, False), bool):
            raise _wrong(where, key, values[key], "true or false")
    for key in ("beta_schedule", "prediction_type", "timestep_spacing"):
        if not isinstance(values.get(key, ""), str):
            raise _wrong(where, key, values[key], "a name")


def _wrong(where: str, key: str, value: object, expected: str) -> IncompleteModelError:
    return IncompleteModelError(f"{where} has {key} {reprlib.repr(value)}, expected {expected}; download it again")


def _integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**40 and math.isfinite(value)
    )


def _numbers(value: object) -> Iterator[Any]:
    """The numbers and texts in nested lists and objects."""
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, dict):
            pending.extend(part.values())
        elif isinstance(part, list):
            pending.extend(part)
        else:
            yield part
