"""Completes a model's configurations: defaults of the named classes, and the corrections of diffusers' pipelines.

A configuration file describes a model only in part. A missing key has the default of the class that the file names, and
`StableDiffusionPipeline` changes some values in its constructor. This package builds no pipeline, and other classes
read the schedule than the one that saved it. So both steps are done once, here, and planning, training and sampling see
the same values.

Source: the constructors of ``StableDiffusionPipeline`` and ``StableDiffusionImg2ImgPipeline`` (diffusers 0.36 to 0.42).
"""

import inspect
import logging
import re
from collections.abc import Mapping
from typing import Any

import diffusers
from transformers import CLIPTextConfig

from ..errors import WrongFamilyError

log = logging.getLogger(__name__)

SCHEDULERS = (
    "DDIM",
    "DDIMInverse",
    "DDIMParallel",
    "DDPM",
    "DDPMParallel",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverMultistepInverse",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "HeunDiscrete",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LCM",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "TCD",
    "UniPCMultistep",
)
"""Scheduler classes with the same noise schedule as DDIM for the same betas; other classes add noise differently."""

_STEPS_EVENLY = ("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "LCM", "PNDM", "TCD")
"""Classes that always step down by a fixed number of timesteps."""


def scheduler(
    values: Mapping[str, Any], model_index: Mapping[str, Any], label: str, *, of_pixels: bool = False
) -> dict[str, Any]:
    """The noise schedule's configuration, complete for every scheduler class that reads it.

    Args:
        values: ``scheduler/scheduler_config.json``.
        model_index: ``model_index.json``; it names the class if the file does not.
        label: the model, for messages.
        of_pixels: whether pictures themselves are denoised. Then clipping and thresholding are as the file has them,
            and the steps end without any noise.

    Raises:
        WrongFamilyError: the scheduler adds noise differently from Stable Diffusion's training.
    """
    named = model_index.get("scheduler")
    # The class that wrote the values. A pipeline reads them with the class in model_index.json, which differs only if
    # a user has replaced the file.
    name = values.get("_class_name", named[1] if isinstance(named, list) and len(named) == 2 else None)
    short = name.removeprefix("Flax").removesuffix("Scheduler") if isinstance(name, str) else ""
    if name is not None and short not in SCHEDULERS:
        raise WrongFamilyError(
            f"{label} has the noise schedule of {str(name)[:60]!r}, which is not one of Stable Diffusion's; expected "
            "one such as DDIMScheduler or PNDMScheduler"
        )
    defaults = _defaults_of(short or "DDIM")
    complete = {**defaults, **{key: value for key, value in values.items() if not key.startswith("_")}}
    other = {
        "use_flow_sigmas": bool(complete.get("use_flow_sigmas")),
        "timestep_type": complete.get("timestep_type", "discrete") != "discrete",
        "predict_epsilon": complete.get("predict_epsilon") is False,
    }
    if keys := [key for key, is_other in other.items() if is_other]:
        raise WrongFamilyError(
            f"{label} has a noise schedule with {keys[0]} {str(complete[keys[0]])[:40]}; expected Stable Diffusion's"
        )
    # A class without this key uses the schedule unscaled.
    complete.setdefault("rescale_betas_zero_snr", False)
    complete["_class_name"] = f"{short or 'DDIM'}Scheduler"
    if of_pixels:
        complete.setdefault("clip_sample", True)
        complete.setdefault("set_alpha_to_one", True)
        # No denoiser gives a learned variance here: training would leave its part of the network behind.
        if str(complete.get("variance_type")).startswith("learned"):
            complete["variance_type"] = "fixed_small"
        return complete
    # Latents exceed [-1, 1], so clipping and thresholding must be off. The pipelines' constructors set clip_sample to
    # false; diffusers' documentation calls thresholding unsuitable for latents. Files saved by a class without these
    # keys lack them, and DDIM's own default is to clip, which gives a grey picture.
    for key in ("clip_sample", "thresholding"):
        if values.get(key):
            log.warning(
                "%s: %s in its noise schedule is not for models with an autoencoder, and is left out", label, key
            )
        complete[key] = False
    # The pipelines' constructors always set 1: Stable Diffusion's timesteps begin at 1.
    complete["steps_offset"] = 1
    # DDIM's own default ends without any noise. Stable Diffusion was published to end at the first step of its
    # schedule. That is also the default of PNDM, the class of most models' files. Other classes lack this key.
    if "set_alpha_to_one" not in complete:
        complete["set_alpha_to_one"] = False
    return complete


def for_sampler(complete: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A repaired configuration of a noise schedule, for the scheduler class `name`."""
    settings = dict(complete)
    saved, read = (text.removesuffix("Scheduler") for text in (complete["_class_name"], name))
    # The spacing of timesteps belongs to the sampler. Spread evenly from end to end, as for Euler and similar classes,
    # timesteps are further apart than the fixed step of these classes: a loss of 0.9 dB on the bundled model.
    if read in _STEPS_EVENLY and saved not in _STEPS_EVENLY and complete.get("timestep_spacing") == "linspace":
        settings["timestep_spacing"] = "leading"
    return settings


def _defaults_of(short: str) -> dict[str, Any]:
    """The defaults of a scheduler class."""
    defaults = _defaults(getattr(diffusers, f"{short}Scheduler", diffusers.DDIMScheduler))
    # Without torchsde, diffusers has only a placeholder for DPMSolverSDE; its real parameters equal those of KDPM2.
    return defaults if "beta_start" in defaults else _defaults(diffusers.KDPM2DiscreteScheduler)


def _defaults(kind: Any) -> dict[str, Any]:
    parameters = inspect.signature(kind.__init__).parameters.values()
    return {
        parameter.name: list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        for parameter in parameters
        if parameter.default is not inspect.Parameter.empty
    }


def unet(values: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A UNet's configuration with the defaults of its class."""
    complete = {**_defaults(diffusers.UNet2DConditionModel), **_own(values)}
    size = complete["sample_size"]
    # Square sizes may be written as a pair.
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        complete["sample_size"] = size = size[0]
    # As in the pipelines' constructors: before version 0.9, models of size 64 were saved with a wrong default.
    if isinstance(size, int) and size < 64 and _before_0_9(values.get("_diffusers_version")):
        log.warning("%s: sample_size %s of a configuration before diffusers 0.9 stands for 64", label, size)
        complete["sample_size"] = 64
    return complete


def vae(values: Mapping[str, Any]) -> dict[str, Any]:
    """An autoencoder's configuration with the defaults of its class: old files lack the scaling factor."""
    return {**_defaults(diffusers.AutoencoderKL), **_own(values)}


def text_encoder(values: Mapping[str, Any]) -> dict[str, Any]:
    """A CLIP text encoder's configuration with the defaults of its class.

    Only the keys that determine its layers are kept: further keys choose quantisers and attention kernels in
    transformers, which may be foreign code.
    """
    # As in `CLIPTextConfig.from_pretrained`: the configuration of a whole CLIP contains that of its text encoder.
    inner = values.get("text_config")
    own = inner if values.get("model_type") == "clip" and isinstance(inner, dict) else values
    defaults = CLIPTextConfig().to_dict()
    return {key: own.get(key, defaults[key]) for key in TEXT_KEYS if key in defaults or key in own}


TEXT_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "projection_dim",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
"""Entries that determine a text encoder's layers."""


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a configuration that describe the network; its class is checked elsewhere."""
    return {key: value for key, value in values.items() if not key.startswith("_") and key != "quantization_config"}


def _before_0_9(version: object) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < (0, 9)
