"""Three nodes: load an edit into a model, mix its embedding with a sentence's at any eta, and start from its photo."""

import logging
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.model_sampling
import comfy.sd
import comfy.utils
import folder_paths
import torch
from torch import Tensor

from .edit_file import LAYER, ImagicEdit, read_edit

CATEGORY = "imagic"
EDIT = "IMAGIC_EDIT"
"""The type of an edit between these nodes."""
BLOCKS = ("down", "mid", "up")
COARSE_SIDE = 4
"""Cells each way of the photo's low frequencies in sampling."""
VARIATION = 0.5
"""Share of a seed's noise in the photo's own noise, for seeds other than 0."""
TIMESTEPS = 1000
"""Steps of the noise schedule that edits are trained on."""
_DEPTHS = {"sdxl": [0, 0, 2, 2, 10, 10], "ssd-1b": [0, 0, 2, 2, 4, 4], "vega": [0, 0, 1, 1, 2, 2]}
"""Transformer blocks behind the layers of Stable Diffusion XL and of its descendants, which have some of its layers."""


def _factor(tooltip: str) -> tuple[str, dict[str, Any]]:
    return ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": tooltip})


class LoadImagicEdit:
    """Puts an edit's LoRA into a model, with a strength for each part of it, and gives the edit for the other nodes."""

    DESCRIPTION = __doc__
    CATEGORY = CATEGORY
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", EDIT)
    RETURN_NAMES = ("model", "edit")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs; edits are files in ``models/loras``."""
        blocks = {block: _factor(f"further factor on the {block} blocks") for block in BLOCKS}
        return {
            "required": {
                "model": ("MODEL",),
                "edit_name": (folder_paths.get_filename_list("loras"),),
                "strength": _factor("factor on the edit's LoRA; 0 is the base alone"),
                **blocks,
            }
        }

    def load(
        self, model: Any, edit_name: str, strength: float, down: float, mid: float, up: float
    ) -> tuple[Any, ImagicEdit]:
        """The model with the edit's LoRA, and the edit.

        Raises:
            ValueError: the file is no edit, or was made for another base.
        """
        path = folder_paths.get_full_path_or_raise("loras", edit_name)
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        edit = read_edit(metadata, edit_name)
        _check_fit(model, tensors, edit)
        for block, factor in zip(BLOCKS, (down, mid, up), strict=True):
            own = {name: tensor for name, tensor in tensors.items() if _block_of(name) == block}
            if own and strength * factor:
                model, _ = comfy.sd.load_lora_for_models(model, None, own, strength * factor, 0)
        return model, edit


class MixImagicEdit:
    """Mixes the photo's embedding with a sentence's: 0 is the photo, 1 the sentence, below and above too."""

    DESCRIPTION = __doc__
    CATEGORY = CATEGORY
    FUNCTION = "mix"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "FLOAT")
    RETURN_NAMES = ("positive", "negative", "cfg")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs."""
        eta = {"default": 0.8, "min": -2.0, "max": 4.0, "step": 0.05, "tooltip": "0 is the photo, 1 the sentence"}
        sentence = {"default": "", "multiline": True, "tooltip": "empty takes the edit's own sentence"}
        return {
            "required": {
                "edit": (EDIT,),
                "clip": ("CLIP",),
                "eta": ("FLOAT", eta),
                "sentence": ("STRING", sentence),
            }
        }

    def mix(self, edit: ImagicEdit, clip: Any, eta: float, sentence: str) -> tuple[Any, Any, float]:
        """Positive and negative conditioning at `eta`, and the guidance to use with them.

        Raises:
            ValueError: there is no sentence, it is too long, or the text encoder is not that of the edit's base.
        """
        asked = sentence.strip() or (_literal(edit.sentences[0]) if edit.sentences else "")
        if not asked and eta:
            raise ValueError("this edit has no sentence of its own; type one, or set eta to 0 for the photo")
        target, beside = _encoded(clip, asked)
        own = edit.text["embeds"][None].to(target)
        if own.shape != target.shape:
            longer = target.shape[1] > own.shape[1] and target.shape[2] == own.shape[2]
            raise ValueError(
                "the sentence is too long, shorten it"
                if longer
                else f"the edit's embedding is {tuple(own.shape[1:])}, the text encoder's {tuple(target.shape[1:])}: "
                f"use the text encoder of {edit.base}"
            )
        if edit.settings.get("source_prompt") and eta:
            logging.warning(
                "Imagic: the edit's own pictures have a source prompt; this node takes the path of embeddings"
            )
        path = _project if edit.settings.get("interpolation") == "projection" else _interpolate
        # Stable Diffusion XL takes the picture's size; ComfyUI would guess it from the latents.
        size = dict(zip(("width", "height"), edit.size, strict=True))
        positive, negative = {**beside, **size}, self._negative(edit, clip)
        if "pooled" in edit.text:
            positive["pooled_output"] = path(beside["pooled_output"], edit.text["pooled"][None].to(target), eta)
        full = edit.number("guidance_scale", 3.0)
        photo = edit.number("photo_guidance", full)
        guidance = photo + (full - photo) * min(max(eta, 0.0), 1.0)
        return [[path(target, own, eta), positive]], [[negative[0], {**negative[1], **size}]], guidance

    @staticmethod
    def _negative(edit: ImagicEdit, clip: Any) -> tuple[Tensor, dict[str, Any]]:
        """The conditioning that guidance goes away from; zeros for Stable Diffusion XL's empty sentence."""
        words = edit.settings.get("negative_prompt")
        text = words if isinstance(words, str) else ""
        tokens, beside = _encoded(clip, _literal(text))
        if not text and "pooled" in edit.text:
            return torch.zeros_like(tokens), {**beside, "pooled_output": torch.zeros_like(beside["pooled_output"])}
        return tokens, beside


class StartImagicEdit:
    """The start of sampling from an edit's photo: noise, latents under it, and the steps; with the sampler ddim."""

    DESCRIPTION = __doc__
    CATEGORY = CATEGORY
    FUNCTION = "start"
    RETURN_TYPES = ("NOISE", "LATENT", "SIGMAS")
    RETURN_NAMES = ("noise", "latent", "sigmas")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs."""
        seed = {"default": 0, "min": 0, "max": 2**63 - 1, "tooltip": "0 is the photo's own noise, which others vary"}
        return {"required": {"edit": (EDIT,), "model": ("MODEL",), "seed": ("INT", seed)}}

    def start(self, edit: ImagicEdit, model: Any, seed: int) -> tuple[Any, dict[str, Tensor], Tensor]:
        """The photo's noise, its coarse latents, and the recorded steps of DDIM.

        Raises:
            ValueError: the model has another noise schedule, or other latents.
        """
        schedule = model.get_model_object("model_sampling")
        sigmas = getattr(schedule, "sigmas", None)
        if sigmas is None or len(sigmas) != TIMESTEPS:
            raise ValueError(f"the model has no noise schedule of {TIMESTEPS} steps: use {edit.base}")
        steps = max(1, min(int(edit.number("num_inference_steps", 30)), TIMESTEPS))
        # As diffusers' "leading" timesteps, from 1, or its "trailing" ones, which begin at pure noise, for a schedule
        # that ends there; the last step ends at the schedule's first noise.
        if getattr(schedule, "zsnr", False):
            times = [round(TIMESTEPS * (1 - step / steps)) - 1 for step in range(steps)]
        else:
            times = [min(step * (TIMESTEPS // steps) + 1, TIMESTEPS - 1) for step in range(steps)][::-1]
        path = torch.stack([*(sigmas[time] for time in times), sigmas[0]]).float().cpu()
        latents = model.get_model_object("latent_format")
        if latents.latent_channels != len(edit.coarse):
            raise ValueError(
                f"the edit's latents have {len(edit.coarse)} channels, the model's have {latents.latent_channels}: "
                f"use {edit.base}"
            )
        scheduler = str(edit.settings.get("scheduler", "DDIM"))
        if scheduler.removesuffix("Scheduler") != "DDIM":
            logging.warning(
                "Imagic: the edit's own pictures have the scheduler %s; this node is for DDIM", scheduler[:60]
            )
        noise = _Noise(edit, seed)
        shape = noise.values.shape[-2:]
        below = torch.zeros(1, len(edit.coarse), *shape)
        if edit.settings.get("start") != "noise":
            cells = torch.nn.functional.adaptive_avg_pool2d(edit.coarse[None], COARSE_SIDE)
            below = torch.nn.functional.interpolate(cells, size=shape, mode="bilinear")
        return noise, {"samples": latents.process_out(below)}, path


class _Noise:
    """The starting noise of a seed, as ComfyUI asks for it."""

    def __init__(self, edit: ImagicEdit, seed: int) -> None:
        self.seed = seed
        own = edit.noise
        factor = 8
        shape = own.shape if own is not None else (len(edit.coarse), edit.size[1] // factor, edit.size[0] // factor)
        drawn = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))
        if own is None or edit.settings.get("start") != "inverted":
            self.values = drawn
        else:
            self.values = own if seed == 0 else (1 - VARIATION**2) ** 0.5 * own + VARIATION * drawn

    def generate_noise(self, input_latent: Mapping[str, Any]) -> Tensor:
        """The noise for latents of its shape.

        Raises:
            ValueError: the latents have another shape.
        """
        samples: Tensor = input_latent["samples"]
        if samples.shape[1:] != self.values.shape:
            raise ValueError(
                f"the latents are {tuple(samples.shape[1:])}, the edit's noise {tuple(self.values.shape)}: "
                "connect latent and noise of the same node"
            )
        return self.values.expand(samples.shape).to(samples.dtype)


def _block_of(tensor: str) -> str:
    """The part of the network that a tensor of the adapter belongs to."""
    layer = tensor.removeprefix(LAYER)
    if layer.startswith("mid_block"):
        return "mid"
    return "up" if layer.startswith(("up_blocks", "conv_out")) else "down"


def _check_fit(model: Any, tensors: Mapping[str, Tensor], edit: ImagicEdit) -> None:
    """Checks that the model is of the edit's kind, and that every layer of the adapter is in it, in its size: ComfyUI
    itself leaves others out.

    Raises:
        ValueError: it is not.
    """
    velocity = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
    here = "v_prediction" if velocity else "epsilon"
    if edit.prediction != here:
        raise ValueError(
            f"the edit was made for {edit.base}, which predicts {edit.prediction[:20]}, and this model predicts "
            f"{here}: use {edit.base}, or set the model's prediction with ModelSamplingDiscrete before this node"
        )
    depths = getattr(getattr(model.model, "model_config", None), "unet_config", {}).get("transformer_depth")
    expected = _DEPTHS.get(edit.family)
    if expected and depths is not None and list(depths) != expected:
        raise ValueError(f"the edit was made for {edit.base}, and this model has other layers: use {edit.base}")
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.model.state_dict()
    for name, up in tensors.items():
        layer = name.removesuffix(".lora_up.weight")
        if layer == name:
            continue
        place = known.get(layer)
        weight = weights.get(place) if isinstance(place, str) else None
        down = tensors[f"{layer}.lora_down.weight"]
        if weight is None or (weight.shape[0], weight.shape[1]) != (up.shape[0], down.shape[1]):
            raise ValueError(f"the edit was made for {edit.base} and does not fit this model (layer {layer[:100]})")


def _encoded(clip: Any, text: str) -> tuple[Tensor, dict[str, Any]]:
    """A text's tokens (1, T, D), and the rest of its conditioning."""
    [[tokens, beside], *_] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return tokens, dict(beside)


def _literal(text: str) -> str:
    """A text without ComfyUI's weights: its brackets are brackets."""
    return text.replace("(", r"\(").replace(")", r"\)")


def _interpolate(target: Tensor, own: Tensor, eta: float) -> Tensor:
    return eta * target + (1 - eta) * own


def _project(target: Tensor, own: Tensor, eta: float) -> Tensor:
    direction = torch.nn.functional.normalize(own, dim=-1)
    return own + eta * (target - (target * direction).sum(-1, keepdim=True) * direction)


NODE_CLASS_MAPPINGS = {
    "LoadImagicEdit": LoadImagicEdit,
    "MixImagicEdit": MixImagicEdit,
    "StartImagicEdit": StartImagicEdit,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoadImagicEdit": "Load Imagic edit",
    "MixImagicEdit": "Mix Imagic edit (eta)",
    "StartImagicEdit": "Start from Imagic photo",
}
