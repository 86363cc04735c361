"""The components of a model's folder: which a pipeline has, and how their files are called."""

from collections.abc import Mapping, Sequence
from typing import Any

WEIGHTS_STEM = {
    "unet": "diffusion_pytorch_model",
    "unet_2": "diffusion_pytorch_model",
    "transformer": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
"""Stems of the weight files' names, by component; no model has all of them."""
TOKENIZERS = ("tokenizer", "tokenizer_2")
_SD = ("unet", "vae", "text_encoder", "tokenizer")
_SDXL = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_COMPONENTS: Mapping[str, Sequence[str]] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "Flux2KleinPipeline": ("transformer", "vae", "text_encoder", "tokenizer"),
    "IFPipeline": ("unet", "text_encoder", "tokenizer"),
    # Read as the second stage of a cascade alone: its text encoder is the first stage's.
    "IFSuperResolutionPipeline": ("unet",),
}
"""Components with weights or a vocabulary, by the pipeline's class. `families` has a family for each."""


SECOND_STAGES: Mapping[str, str] = {"IFPipeline": "IFSuperResolutionPipeline"}
"""The class of a cascade's second pipeline, by that of its first (see `files.cascade`)."""


def pipeline_of(model_index: Mapping[str, Any]) -> str:
    """The class of a folder's pipeline by its ``model_index.json``, "" if it names none.

    diffusers also reads folders that its Flax classes saved.
    """
    name = model_index.get("_class_name")
    return name.removeprefix("Flax") if isinstance(name, str) else ""


def components_of(model_index: Mapping[str, Any]) -> Sequence[str]:
    """The components of a folder that are read, by its pipeline; none for a pipeline that is not supported."""
    return _COMPONENTS.get(pipeline_of(model_index), ())


def text_encoders_of(components: Sequence[str]) -> Sequence[str]:
    """The text encoders and their tokenizers."""
    return [name for name in components if name.startswith(("text_encoder", "tokenizer"))]
