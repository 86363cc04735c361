"""Which kind of model a file or a folder is, and what to do with one that this version does not edit."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import IncompleteModelError, WrongFamilyError

_WHOLE = "expected one file with UNet, autoencoder and text encoder in the original layout"
_PLAIN = "expected a plain text-to-image Stable Diffusion 1.x or 2.x (not inpainting, not SDXL)"
_PARTS = (
    (
        r"(lora_|lycoris_)|.*(\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.hada_w|\.lokr_w|\.oft_)",
        "a LoRA, which changes a base and is none; give the base it was made for",
    ),
    (
        r"control_model\.|controlnet_|(.*\.)?input_hint_block\.",
        "a ControlNet, which steers a base and is none; give the base itself",
    ),
    (
        r"(emb_params|string_to_param|clip_[lg])$",
        "a textual inversion, which is a word for a base and none itself; give the base",
    ),
    (r"motion_modules\.|(.*\.)?motion_modules\.", "an AnimateDiff module; give a base that makes single pictures"),
    (r"(double_blocks|single_blocks|joint_blocks|transformer_blocks|layers)\.\d", "a diffusion transformer; " + _PLAIN),
    (
        r"(input_blocks|output_blocks|middle_block|time_embed|diffusion_model|down_blocks|up_blocks|unet)\.",
        "a UNet alone; " + _WHOLE + ", or a diffusers folder",
    ),
    (r"(first_stage_model\.|vae\.)?(encoder|decoder|quant_conv)\.", "an autoencoder alone; " + _WHOLE),
    (
        r"(cond_stage_model\.|text_encoder|text_model\.|transformer\.(text_model|resblocks)|conditioner\.)",
        "a text encoder alone; " + _WHOLE,
    ),
)
"""Files that are no checkpoint, by the names of their tensors: the first that fits."""


def check_checkpoint(name: str, shapes: Mapping[str, tuple[int, ...]], unet: str) -> None:
    """Makes sure that a file has the UNet of a Stable Diffusion 1.x or 2.x that takes latents, time and text alone.

    Args:
        name: the file, for messages.
        shapes: the shapes of its tensors.
        unet: what the names of the UNet's tensors begin with.

    Raises:
        IncompleteModelError: another kind of file.
        WrongFamilyError: another kind of model.
    """
    if not any(key.startswith(unet) for key in shapes):
        found = next((what for pattern, what in _PARTS if any(re.match(pattern, key) for key in shapes)), "")
        raise IncompleteModelError(
            f"{name} could not be read as a Stable Diffusion checkpoint (it has no tensors {unet}*)"
            + (f": it looks like {found}" if found else f"; {_WHOLE}")
        )
    problems = []
    first = shapes.get(unet + "input_blocks.0.0.weight", ())
    channels = first[1] if len(first) == 4 else 0
    if not channels:
        problems.append("another first layer")
    elif channels != 4:
        problems.append(f"{channels} input channels{_channels(channels)}")
    if any(key.startswith(unet + "label_emb.") for key in shapes):
        problems.append(f"a second conditioning ({_second(shapes)})")
    if any(key.startswith(unet + "time_embed.cond_proj.") for key in shapes):
        problems.append(
            "the guidance built in (time_embed.cond_proj, as LCM's distilled models; take the model it was made from)"
        )
    if any(
        re.search(r"\.(motion_modules|temporal_transformer|time_stack|image_proj|ip_adapter)\.", key) for key in shapes
    ):
        problems.append("layers for films or for a second picture")
    if any(key.startswith("control_model.") for key in shapes):
        problems.append("a ControlNet inside (control_model.*; take the base without it)")
    if not any(key.endswith(".attn2.to_k.weight") and len(shape) for key, shape in shapes.items()):
        problems.append("no text conditioning")
    if problems:
        raise WrongFamilyError(f"{name} has a network with {' and '.join(problems)}; {_PLAIN}")


def _channels(count: int) -> str:
    """The kind of model whose UNet takes more than latents, in brackets."""
    return {9: " (inpainting)", 8: " (InstructPix2Pix)", 5: " (depth)", 7: " (an upscaler)"}.get(count, "")


def _second(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(key.startswith("conditioner.embedders.1.") for key in shapes):
        return "SDXL"
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        return "the refiner of SDXL"
    return "as SDXL's or unCLIP's"


def check_unet(values: Mapping[str, Any], label: str) -> None:
    """Makes sure that a UNet's configuration is one of a plain Stable Diffusion 1.x or 2.x.

    Raises:
        WrongFamilyError: it takes something besides latents, time and text.
    """
    if values.get("time_cond_proj_dim") is not None:
        raise WrongFamilyError(
            f"{label} has the guidance built in (time_cond_proj_dim, as LCM's distilled models); take the model that "
            "it was made from"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if values.get(key) is not None:
            raise WrongFamilyError(f"{label} has a UNet with {key} {str(values[key])[:40]!r}; {_PLAIN}")
    channels, out, extra = values["in_channels"], values["out_channels"], values.get("addition_embed_type")
    if channels != 4 or out != 4 or extra or not values["cross_attention_dim"]:
        kind = _channels(channels) if isinstance(channels, int) else ""
        raise WrongFamilyError(
            f"{label} has a UNet with {str(channels)[:40]} input channels{kind}, {str(out)[:40]} output channels, "
            f"addition_embed_type {str(extra)[:40]} and cross_attention_dim {str(values['cross_attention_dim'])[:40]}; "
            f"{_PLAIN}"
        )


_CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The classes that `model_index.json` may name for each part."""


def check_pipeline(model_index: Mapping[str, Any], label: str) -> None:
    """Makes sure that a folder is a Stable Diffusion pipeline of the usual parts.

    Raises:
        WrongFamilyError: another pipeline, or a part of another class.
    """
    kind = model_index.get("_class_name")
    # diffusers reads those that were saved by its Flax classes as its own.
    plain = kind.removeprefix("Flax") if isinstance(kind, str) else None
    if plain not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise WrongFamilyError(
            f"{label} is a {str(kind)[:60] if kind else 'model without a pipeline class'}; this version edits with "
            "StableDiffusionPipeline models (Stable Diffusion 1.x and 2.x)"
        )
    for part, classes in _CLASSES.items():
        named = model_index.get(part)
        name = named[1] if isinstance(named, list) and len(named) == 2 else None
        if isinstance(name, str) and name.removeprefix("Flax") not in classes:
            raise WrongFamilyError(f"{label} has a {part} of the class {name[:60]}; expected {classes[0]}")


def check_class(values: Mapping[str, Any], component: str, label: str) -> None:
    """Makes sure that a part's own configuration names the class that the part is built with, or none.

    Raises:
        WrongFamilyError: another class.
    """
    name = values.get("_class_name")
    if name is not None and str(name).removeprefix("Flax") not in _CLASSES[component]:
        raise WrongFamilyError(
            f"{label} has a {component} of the class {str(name)[:60]}; expected {_CLASSES[component][0]}"
        )


def check_text_encoder(values: Mapping[str, Any], label: str) -> None:
    """Makes sure that a text encoder's configuration is one of CLIP, used as Stable Diffusion does.

    Raises:
        WrongFamilyError: another model, or one that is told where a sentence ends.
    """
    kind = values.get("model_type")
    if kind not in (None, "clip_text_model", "clip"):
        raise WrongFamilyError(f"{label} has a text encoder of the kind {str(kind)[:60]}; expected one of CLIP")
    if values.get("use_attention_mask"):
        raise WrongFamilyError(
            f"{label} has a text encoder that takes an attention mask; expected Stable Diffusion's own"
        )
