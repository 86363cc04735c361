"""Recognises the kind of a model file or folder, with advice in errors about unsupported kinds."""

import re
from collections.abc import Mapping
from typing import Any

from ..errors import IncompleteModelError, WrongFamilyError

_WHOLE = "expected one file with UNet, autoencoder and text encoder in the original layout"
_PLAIN = "expected a plain text-to-image Stable Diffusion 1.x or 2.x (not inpainting, not SDXL)"
_PARTS = (
    (
        r"(lora_|lycoris_)|.*(\.lora_(down|up|A|B)\.|\.lora\.(down|up)\.|\.hada_w|\.lokr_w|\.oft_)",
        "a LoRA, which changes a base and is not a base itself; give its base",
    ),
    (
        r"control_model\.|controlnet_|(.*\.)?input_hint_block\.",
        "a ControlNet, which steers a base and is not a base itself; give the base",
    ),
    (
        r"(emb_params|string_to_param|clip_[lg])$",
        "a textual inversion, which adds a word to a base and is not a base itself; give the base",
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
"""Files that are not whole checkpoints, by patterns of their tensors' names; the first match counts."""


def check_checkpoint(name: str, shapes: Mapping[str, tuple[int, ...]], unet: str) -> None:
    """Checks that a file has a UNet of Stable Diffusion 1.x or 2.x with only latents, time and text as inputs.

    Args:
        name: the file, for messages.
        shapes: the shapes of its tensors.
        unet: prefix of the names of the UNet's tensors.

    Raises:
        IncompleteModelError: the file is of another kind.
        WrongFamilyError: the model is of another kind.
    """
    if not any(key.startswith(unet) for key in shapes):
        kind = next((text for pattern, text in _PARTS if any(re.match(pattern, key) for key in shapes)), "")
        raise IncompleteModelError(
            f"{name} could not be read as a Stable Diffusion checkpoint (it has no tensors {unet}*)"
            + (f": it looks like {kind}" if kind else f"; {_WHOLE}")
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
            "built-in guidance (time_embed.cond_proj, as in LCM's distilled models; take the model it was made from)"
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
    """The kind of model with this many input channels, in brackets."""
    return {9: " (inpainting)", 8: " (InstructPix2Pix)", 5: " (depth)", 7: " (an upscaler)"}.get(count, "")


def _second(shapes: Mapping[str, tuple[int, ...]]) -> str:
    if any(key.startswith("conditioner.embedders.1.") for key in shapes):
        return "SDXL"
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes):
        return "the refiner of SDXL"
    return "as SDXL's or unCLIP's"


def check_unet(values: Mapping[str, Any], label: str, *, latent_channels: int) -> None:
    """Checks that a UNet's configuration is one of a plain Stable Diffusion 1.x or 2.x.

    Args:
        values: the UNet's configuration.
        label: the model, for messages.
        latent_channels: channels of its autoencoder's latents.

    Raises:
        WrongFamilyError: the UNet has inputs besides latents, time and text.
    """
    if values.get("time_cond_proj_dim") is not None:
        raise WrongFamilyError(
            f"{label} has built-in guidance (time_cond_proj_dim, as in LCM's distilled models); take the model that it "
            "was made from"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if values.get(key) is not None:
            raise WrongFamilyError(f"{label} has a UNet with {key} {str(values[key])[:40]!r}; {_PLAIN}")
    channels, out, extra = values["in_channels"], values["out_channels"], values.get("addition_embed_type")
    if channels != latent_channels or out != latent_channels or extra or not values["cross_attention_dim"]:
        kind = _channels(channels) if isinstance(channels, int) else ""
        raise WrongFamilyError(
            f"{label} has a UNet with {str(channels)[:40]} input channels{kind}, {str(out)[:40]} output channels "
            f"(its latents have {latent_channels}), "
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
    """Checks that a folder is a Stable Diffusion pipeline of the usual parts.

    Raises:
        WrongFamilyError: the folder is another pipeline, or a part is of another class.
    """
    kind = model_index.get("_class_name")
    # diffusers also reads folders that its Flax classes saved.
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
    """Checks that a part's own configuration names the expected class, or none.

    Raises:
        WrongFamilyError: it names another class.
    """
    name = values.get("_class_name")
    if name is not None and str(name).removeprefix("Flax") not in _CLASSES[component]:
        raise WrongFamilyError(
            f"{label} has a {component} of the class {str(name)[:60]}; expected {_CLASSES[component][0]}"
        )


def check_text_encoder(values: Mapping[str, Any], label: str) -> None:
    """Checks that a text encoder's configuration is one of CLIP, used as in Stable Diffusion.

    Raises:
        WrongFamilyError: the text encoder is another model, or takes an attention mask.
    """
    kind = values.get("model_type")
    if kind not in (None, "clip_text_model", "clip"):
        raise WrongFamilyError(f"{label} has a text encoder of the kind {str(kind)[:60]}; expected one of CLIP")
    if values.get("use_attention_mask"):
        raise WrongFamilyError(
            f"{label} has a text encoder that takes an attention mask; expected Stable Diffusion's own"
        )
