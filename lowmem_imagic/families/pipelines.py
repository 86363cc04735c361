"""Pipelines of diffusers: their networks, conditionings and sizes, in this package's words.

For `StableDiffusionPipeline` and `StableDiffusionXLPipeline`, and pipelines with the same arguments.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WrongFamilyError
from ..geometry import Size
from .conditioning import Conditioning
from .repairs import scheduler as repaired
from .schedule import DiffusersSampler, DiscreteSchedule
from .sdxl import POOLED
from .stable_diffusion import EMBEDS

_ARGUMENTS = {EMBEDS: "prompt_embeds", POOLED: "pooled_prompt_embeds"}
"""A pipeline's arguments by the names of parts; those of the negative begin with ``negative_``."""


def network(pipeline: Any, denoiser: str) -> nn.Module:
    """A network of a pipeline, by the name of the denoiser.

    Raises:
        WrongFamilyError: the pipeline is of another kind.
    """
    part = getattr(pipeline, denoiser, None)
    needed = ("encode_prompt", "load_lora_weights", "scheduler", "vae")
    missing = [name for name in needed if not hasattr(pipeline, name)]
    if not isinstance(part, nn.Module) or missing:
        raise WrongFamilyError(
            f"{type(pipeline).__name__} has no {missing[0] if missing else denoiser}, expected a pipeline such as "
            "StableDiffusionPipeline or StableDiffusionXLPipeline"
        )
    asked = inspect.signature(type(pipeline).__call__).parameters
    if lacking := [name for name in ("prompt_embeds", "latents", "width") if name not in asked]:
        raise WrongFamilyError(
            f"{type(pipeline).__name__} takes no {lacking[0]}, expected a pipeline that begins with noise, such as "
            "StableDiffusionPipeline or StableDiffusionXLPipeline"
        )
    if type(pipeline.scheduler).__name__.startswith("FlowMatch"):
        raise WrongFamilyError(
            f"{type(pipeline).__name__} samples a flow, whose edits are not loaded into pipelines yet; "
            "`load_lora_weights` of the pipeline takes the adapter from the edit file"
        )
    return part


def encode(pipeline: Any, sentence: str, negative: str) -> tuple[Conditioning, Conditioning]:
    """A sentence and a negative sentence as a pipeline encodes them, one row each.

    Raises:
        WrongFamilyError: the pipeline encodes otherwise than Stable Diffusion's.
    """
    with torch.no_grad():
        encoded = pipeline.encode_prompt(
            prompt=sentence,
            device=pipeline._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            # The empty sentence is None: pipelines that want zeros for it make them then.
            negative_prompt=negative or None,
        )
    names = {2: (EMBEDS,), 4: (EMBEDS, POOLED)}.get(len(encoded))
    if names is None:
        raise WrongFamilyError(
            f"{type(pipeline).__name__} encodes a sentence as {len(encoded)} tensors, expected 2 or 4"
        )
    pairs = dict(zip(names, zip(encoded[::2], encoded[1::2], strict=True), strict=True))
    return tuple(Conditioning({name: pair[side] for name, pair in pairs.items()}) for side in (0, 1))  # type: ignore[return-value]


def arguments(text: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two conditionings as arguments of a pipeline's call."""
    named = {_ARGUMENTS[name]: part for name, part in text.items()}
    return named | {f"negative_{_ARGUMENTS[name]}": part for name, part in negative.items()}


def latent_shape(pipeline: Any, denoiser: str, size: Size) -> tuple[int, int, int]:
    """(C, H, W) of a pipeline's latents for pictures of this size."""
    factor = int(pipeline.vae_scale_factor)
    return int(network(pipeline, denoiser).config["in_channels"]), size[1] // factor, size[0] // factor  # type: ignore[index]


def prediction_of(pipeline: Any) -> str:
    """What a pipeline's network predicts, by its scheduler."""
    return str(pipeline.scheduler.config.get("prediction_type", "epsilon"))


def scheduler(pipeline: Any, name: str) -> Any:
    """A scheduler by class name on a pipeline's noise schedule, as this package would use it.

    Raises:
        ConfigError, WrongFamilyError, IncompleteModelError: there is none of that name for this schedule.
    """
    own, label = pipeline.scheduler, type(pipeline).__name__
    values = repaired({**own.config, "_class_name": type(own).__name__}, {}, label)
    return DiscreteSchedule(values, label).scheduler(name)


def sampler(pipeline: Any, steps: int) -> tuple[DiffusersSampler, float]:
    """A pipeline's own scheduler as a sampler, and the factor by which the pipeline multiplies given latents."""
    own = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    own.set_timesteps(steps)
    return DiffusersSampler(own), float(own.init_noise_sigma)
