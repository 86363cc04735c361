"""Recognises the kind of a model file or folder, with advice in errors about unsupported kinds."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import IncompleteModelError, WrongFamilyError
from .files.components import pipeline_of

_WHOLE = "expected one file with UNet, autoencoder and text encoder in the original layout"
_PLAIN = "expected a plain text-to-image Stable Diffusion 1.x or 2.x (not inpainting, not SDXL)"
_PLAIN_XL = "expected a text-to-image SDXL, such as the base that it was made from"
_UNET_ALONE = f"a UNet alone; {_WHOLE}, or a diffusers folder"
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
        _UNET_ALONE,
    ),
    (r"(first_stage_model\.|vae\.)?(encoder|decoder|quant_conv)\.", "an autoencoder alone; " + _WHOLE),
    (
        r"(cond_stage_model\.|text_encoder|text_model\.|transformer\.(text_model|resblocks)|conditioner\.)",
        "a text encoder alone; " + _WHOLE,
    ),
)
"""Files that are not whole checkpoints, by patterns of their tensors' names; the first match counts."""


@dataclass(frozen=True)
class Kind:
    """The kind of a checkpoint file in the original layout."""

    is_xl: bool
    """Whether it is a Stable Diffusion XL; otherwise it is a Stable Diffusion 1 or 2."""
    unet: str
    """Prefix of the names of its UNet's tensors; "" in a file with nothing but a UNet."""

    @property
    def pipeline(self) -> str:
        """The class of pipeline that a folder of this kind of model has."""
        return "StableDiffusionXLPipeline" if self.is_xl else "StableDiffusionPipeline"


_REFINER_WIDTH = 1280
"""Width of the text conditioning of SDXL's refiner, which has only the larger text encoder."""


def read_kind(name: str, shapes: Mapping[str, tuple[int, ...]], prefix: str) -> Kind:
    """The kind of a file, which has a text-to-image UNet of Stable Diffusion 1, 2 or XL.

    Args:
        name: the file, for messages.
        shapes: the shapes of its tensors.
        prefix: usual prefix of the names of the UNet's tensors.

    Raises:
        IncompleteModelError: the file is no model.
        WrongFamilyError: the model is of another kind.
    """
    unet = prefix
    if not any(key.startswith(prefix) for key in shapes):
        kind = next((text for pattern, text in _PARTS if any(re.match(pattern, key) for key in shapes)), "")
        if kind != _UNET_ALONE or "input_blocks.0.0.weight" not in shapes:
            raise IncompleteModelError(
                f"{name} could not be read as a Stable Diffusion checkpoint (it has no tensors {prefix}*)"
                + (f": it looks like {kind}" if kind else f"; {_WHOLE}")
            )
        unet = ""
    is_xl = unet + "label_emb.0.0.weight" in shapes
    problems = []
    first = shapes.get(unet + "input_blocks.0.0.weight", ())
    channels = first[1] if len(first) == 4 else 0
    if not channels:
        problems.append("another first layer")
    elif channels != 4:
        problems.append(f"{channels} input channels{_channels(channels)}")
    if is_xl and (other := _other_than_xl(shapes, unet)):
        problems.append(f"a second conditioning of another kind than SDXL's ({other})")
    if not is_xl and any(key.startswith(unet + "label_emb.") for key in shapes):
        problems.append("a second conditioning (as an upscaler's)")
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
    if not any(key.startswith(unet) and key.endswith(".attn2.to_k.weight") and len(shapes[key]) for key in shapes):
        problems.append("no text conditioning")
    latents = next((shapes[key] for key in _FROM_LATENTS if len(shapes.get(key, ())) == 4), None)
    if channels == 4 and latents is not None and latents[1] != channels:
        problems.append(f"{channels} channels of latents and an autoencoder for {latents[1]}")
    if problems:
        raise WrongFamilyError(f"{name} has a network with {' and '.join(problems)}; {_PLAIN_XL if is_xl else _PLAIN}")
    return Kind(is_xl, unet)


_FROM_LATENTS = ("first_stage_model.decoder.conv_in.weight", "vae.decoder.conv_in.weight")
"""The autoencoder's first layer after the latents."""


def _channels(count: int) -> str:
    """The kind of model with this many input channels, in brackets."""
    return {9: " (inpainting)", 8: " (InstructPix2Pix)", 5: " (depth)", 7: " (an upscaler)"}.get(count, "")


def _other_than_xl(shapes: Mapping[str, tuple[int, ...]], unet: str) -> str:
    """The kind of a UNet with a second conditioning that is not SDXL's; "" for SDXL."""
    widths = {shape[-1] for key, shape in shapes.items() if key.endswith(".attn2.to_k.weight") and shape}
    if any(key.startswith("conditioner.embedders.0.model.") for key in shapes) or widths == {_REFINER_WIDTH}:
        return "the refiner, which only finishes pictures of the base; give the base"
    if any(key.startswith(("cond_stage_model.", "embedder.", "noise_augmentor.")) for key in shapes):
        return "unCLIP, which takes a picture"
    return ""


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


def check_xl_unet(values: Mapping[str, Any], label: str, *, latent_channels: int, text: int, pooled: int) -> None:
    """Checks that a UNet's configuration is one of Stable Diffusion XL's text-to-image models.

    Args:
        values: the UNet's configuration.
        label: the model, for messages.
        latent_channels: channels of its autoencoder's latents.
        text: width of the text encoders' tokens, side by side.
        pooled: width of the second text encoder's vector.

    Raises:
        WrongFamilyError: the UNet has other inputs.
    """
    if values.get("time_cond_proj_dim") is not None:
        raise WrongFamilyError(
            f"{label} has built-in guidance (time_cond_proj_dim, as in LCM's distilled models); take the model that it "
            "was made from"
        )
    channels, out = values["in_channels"], values["out_channels"]
    if channels != latent_channels or out != latent_channels:
        kind = _channels(channels) if isinstance(channels, int) else ""
        raise WrongFamilyError(
            f"{label} has a UNet with {str(channels)[:40]} input channels{kind} and {str(out)[:40]} output channels "
            f"(its latents have {latent_channels}); {_PLAIN_XL}"
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if values.get(key) is not None:
            raise WrongFamilyError(f"{label} has a UNet with {key} {str(values[key])[:40]!r}; {_PLAIN_XL}")
    if values["addition_embed_type"] != "text_time":
        raise WrongFamilyError(
            f"{label} has a UNet with addition_embed_type {str(values['addition_embed_type'])[:40]}; {_PLAIN_XL}"
        )
    width, sizes = values["cross_attention_dim"], values["addition_time_embed_dim"]
    beside = values["projection_class_embeddings_input_dim"]
    if width != text or not isinstance(sizes, int) or beside != pooled + 6 * sizes:
        raise WrongFamilyError(
            f"{label} has a UNet for text of width {str(width)[:40]} and {str(beside)[:40]} numbers beside it; its "
            f"text encoders give {text}, and {pooled} with six sizes of {str(sizes)[:40]} each; {_PLAIN_XL}"
        )


_CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
"""The classes that `model_index.json` may name for each part."""


_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_XL_PIPELINES = ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline")
_XL_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


_NOT_YET: Mapping[str, str] = {
    "Flux2Klein": "FLUX.2 klein with another pipeline",
    "Flux2": "FLUX.2 dev, or another large FLUX.2",
    r"Flux(?!\d)": "FLUX.1",
    "Flux": "another FLUX",
    "ZImage": "Z-Image",
    "StableDiffusion3": "Stable Diffusion 3",
    "QwenImage": "Qwen-Image",
    "ErnieImage": "ERNIE-Image",
    "Chroma": "Chroma",
    "Sana": "SANA",
    "Lumina": "Lumina",
    "PixArt": "PixArt",
    "AuraFlow": "AuraFlow",
    "Hunyuan": "Hunyuan",
    "HiDream": "HiDream",
    "Kandinsky": "Kandinsky",
    "UnCLIP": "Karlo",
    "StableCascade": "Stable Cascade",
    "Wuerstchen": "Wuerstchen",
}
"""Models that look alike and are not supported, by an expression for the beginning of their pipeline's class; the first
one counts."""


_GIVE_BOTH = "give stage I (an IFPipeline, such as `model=if-l`) with stage II in the folder beside it"
_OF_IF = {
    "IFSuperResolutionPipeline": f"stage II of DeepFloyd IF, which needs the pictures of stage I; {_GIVE_BOTH}",
    "IFImg2ImgPipeline": f"a pipeline of DeepFloyd IF for another task (IFImg2ImgPipeline); {_GIVE_BOTH}",
    "IFImg2ImgSuperResolutionPipeline": "a pipeline of DeepFloyd IF for another task "
    f"(IFImg2ImgSuperResolutionPipeline); {_GIVE_BOTH}",
    "IFPipeline": "DeepFloyd IF, which has no single file and no configuration for one; give the folder of stage I",
}
"""Pipelines of DeepFloyd IF that cannot be what they were given as."""
_INSTEAD = "FLUX.2 klein 4B Base (`model=klein`), SDXL (`model=sdxl`) or Stable Diffusion 1.x or 2.x (`model=sd15`)"
_FLUX2 = re.compile(r"(model\.diffusion_model\.|transformer\.)?double_stream_modulation_img\.lin(ear)?\.weight")
_TRANSFORMERS = (
    (
        r"(time_guidance_embed\.guidance_embedder|guidance_in)\.",
        "FLUX.2 dev or FLUX.1 dev, distilled to guidance",
    ),
    (r"(distilled_guidance_layer|vector_in)\.", "FLUX.1, or a model made from it"),
    (r"(cap_embedder|noise_refiner)\.", "Z-Image or Lumina"),
    (r"joint_blocks\.", "Stable Diffusion 3"),
    (r"transformer_blocks\.\d+\.(img_mod|txt_mod)\.", "Qwen-Image"),
    # In diffusers' layout.
    (r"pos_embed\.proj\.", "Stable Diffusion 3, or another model of transformers"),
    (r"single_transformer_blocks\.\d+\.proj_mlp\.|time_text_embed\.", "FLUX.1, or a model made from it"),
)
"""Transformers that look alike, by their tensors' names; the first one counts."""


def transformer_prefix(name: str, names: Collection[str]) -> str | None:
    """The prefix of the names in a file with the transformer of a FLUX.2 klein; None if it is no transformer.

    Raises:
        WrongFamilyError: it is the transformer of another kind of model.
    """
    cores = {key: re.sub(r"^(model\.diffusion_model\.|transformer\.)", "", key) for key in names}
    for pattern, title in _TRANSFORMERS:
        if any(re.match(pattern, core) for core in cores.values()):
            raise WrongFamilyError(f"{name} is {title}, which is not supported yet; take {_INSTEAD}")
    found = next((match for key in names if (match := _FLUX2.fullmatch(key))), None)
    return (found[1] or "") if found else None


def unsupported(model_index: Mapping[str, Any], label: str) -> WrongFamilyError:
    """The error for a folder of a pipeline that no family reads, with models that work instead."""
    name = pipeline_of(model_index)
    title = next((title for start, title in _NOT_YET.items() if re.match(start, name)), "")
    if "Inpaint" in name or "Pix2Pix" in name or "ControlNet" in name or "Upscale" in name:
        return WrongFamilyError(
            f"{label} is a {name[:60]}, made for another task than pictures from text; give the text-to-image model "
            "that it was made from"
        )
    if name in _OF_IF:
        return WrongFamilyError(f"{label} is {_OF_IF[name]}")
    if title:
        return WrongFamilyError(f"{label} is {title} ({name[:60]}), which is not supported yet; take {_INSTEAD}")
    return WrongFamilyError(
        f"{label} is a {name[:60] if name else 'model without a pipeline class'}; this version edits with {_INSTEAD}, "
        "and with models of the same pipelines"
    )


def is_xl(model_index: Mapping[str, Any]) -> bool:
    """Whether a folder is a pipeline of Stable Diffusion XL, by its ``model_index.json``."""
    return pipeline_of(model_index) in _XL_PIPELINES


_DISTILLED = re.compile(
    r"((?<![A-Za-z])(?i:turbo|lightning|lcm|tcd|pcm|dmd2?|hyper[-_ ]?sd(xl|15)?|sdxs)|(?<=sdxl)(?i:turbo|lightning|lcm)"
    r"|Turbo|Lightning|LCM)(?![a-z])"
)
"""Words in the names of models that are made for few steps without guidance."""


def distilled(name: str, scheduler: str) -> str:
    """A sign that a model is made for few steps without guidance, for messages; "" if there is none.

    Their networks are those of the bases that they were made from, so only names can tell.

    Args:
        name: the model's name.
        scheduler: class of its noise schedule.
    """
    if match := _DISTILLED.search(name):
        return f"its name says {match[0]}"
    return f"its schedule is {scheduler}" if scheduler in ("LCMScheduler", "TCDScheduler") else ""


def check_configuration(model_index: Mapping[str, Any], file: str, label: str, *, is_xl: bool) -> None:
    """Checks that the configurations for a file are of its kind: SDXL's for an SDXL.

    Raises:
        WrongFamilyError: they are of another kind.
    """
    pipeline = pipeline_of(model_index)
    if pipeline not in (_XL_PIPELINES if is_xl else _PIPELINES):
        names = "an SDXL", "a Stable Diffusion 1.x or 2.x"
        theirs = names[pipeline in _PIPELINES] if pipeline in (*_PIPELINES, *_XL_PIPELINES) else f"a {pipeline[:60]}"
        raise WrongFamilyError(
            f"{file} is {names[not is_xl]}, and the configuration of {label} is that of {theirs}; leave it out, or "
            "give a model of the same family (`model_config`)"
        )


def check_autoencoder(values: Mapping[str, Any], own: Mapping[str, Any], label: str, base: str) -> None:
    """Checks that an autoencoder makes the latents that a model was trained on, as far as its configuration says.

    Args:
        values: its configuration.
        own: configuration of the model's own autoencoder.
        label: the autoencoder, for messages.
        base: the model, for messages.

    Raises:
        WrongFamilyError: it makes others.
    """
    for key in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if values.get(key) != own.get(key):
            raise WrongFamilyError(
                f"{label} has an autoencoder of another family than {base}: its {key} is {str(values.get(key))[:40]}, "
                f"expected {str(own.get(key))[:40]}; give one of the same family (`vae`)"
            )


def check_pipeline(model_index: Mapping[str, Any], label: str) -> None:
    """Checks that a Stable Diffusion pipeline has the usual parts.

    Raises:
        WrongFamilyError: a part is missing, or of another class.
    """
    if is_xl(model_index):
        missing = [part for part in _XL_PARTS if model_index.get(part, [None]) in (None, [None], [None, None])]
        if "text_encoder" in missing or model_index.get("requires_aesthetics_score"):
            raise WrongFamilyError(
                f"{label} is the refiner of SDXL, which only finishes pictures of another model; {_PLAIN_XL}"
            )
        if missing:
            raise WrongFamilyError(f"{label} has no {missing[0]} in its model_index.json; {_PLAIN_XL}")
    check_parts(model_index, _CLASSES, label)


def check_parts(model_index: Mapping[str, Any], classes: Mapping[str, Sequence[str]], label: str) -> None:
    """Checks that a folder's list of parts names the expected classes, or none.

    Raises:
        WrongFamilyError: it names another class.
    """
    for part, expected in classes.items():
        named = model_index.get(part)
        name = named[1] if isinstance(named, list) and len(named) == 2 else None
        if isinstance(name, str) and name.removeprefix("Flax") not in expected:
            raise WrongFamilyError(f"{label} has a {part} of the class {name[:60]}; expected {expected[0]}")


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
