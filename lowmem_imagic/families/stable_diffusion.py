"""Stable Diffusion 1.x and 2.x: CLIP text conditioning, 4-channel latents, epsilon or v prediction.

The only place that knows diffusers' and transformers' classes.
"""

import inspect
import logging
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizerFast

from ..errors import ConfigError, IncompleteModelError, NonFiniteModelError, PromptError
from ..layers.frozen import load_frozen
from ..unexpected import first_line
from . import kinds, limits, repairs
from .files.checkpoint import SingleFile
from .files.source import Folder
from .lean_unet import make_frugal
from .loading import build, check_fit, complete, fill, quiet, tensors_of, try_out
from .rehearsal import rehearse
from .schedule import alphas, read_schedule

log = logging.getLogger(__name__)

_FAMILIES = {768: "sd1", 1024: "sd2"}
"""Family by width of the text conditioning; others are of the same make but another size."""
_FILES_OF_TOKENIZERS = ("vocab_file", "merges_file", "tokenizer_file", "added_tokens_file")
"""Entries of a tokenizer's settings that would have it read another file."""


class StableDiffusion:
    """The parts of one Stable Diffusion model, each loaded when asked for and owned by the caller.

    Raises:
        WrongFamilyError: another kind of model (SDXL, inpainting, transformers).
        IncompleteModelError: parts are missing.
    """

    def __init__(self, source: Folder | SingleFile) -> None:
        self.source = source
        self._tried: set[str] = set()
        self._folder = source if isinstance(source, Folder) else source.configuration
        kinds.check_pipeline(self._folder.config(".", "model_index.json"), self._folder.label)
        limits.check_side(self.unet_config["sample_size"], self.vae_factor, self._folder.label)
        if isinstance(source, SingleFile):
            self._check_checkpoint(source)
        if (text_width := self.text_config["hidden_size"]) != self.cross_attention_dim:
            raise IncompleteModelError(
                f"{self._folder.label} has a text encoder of width {text_width} and a UNet for width "
                f"{self.cross_attention_dim}; download it again"
            )
        _ = self.scheduler_config

    def _check_checkpoint(self, source: SingleFile) -> None:
        """Makes sure that a single file is of the size and the scale that its configuration says.

        Raises:
            IncompleteModelError: it is not.
        """
        if source.width != self.cross_attention_dim:
            raise IncompleteModelError(
                f"{source.label} takes text of width {source.width}, but the configuration of {self._folder.label} "
                f"says {self.cross_attention_dim}; give a model or a diffusers folder of the same family "
                "(`model_config`)"
            )
        factor = source.beside("scale_factor")
        if factor is not None and factor.numel() == 1 and abs(float(factor) / self._scaling - 1) > 0.01:
            raise IncompleteModelError(
                f"{source.label} scales latents by {float(factor):.5g} (scale_factor), but the configuration of "
                f"{self._folder.label} says {self._scaling:.5g}; give the one it was trained with (`model_config`)"
            )
        # Stable Diffusion 2 is made without the last layer: its second from the end is the last that there is.
        made_without_last = self.cross_attention_dim == 1024 and source.marks.clip_skip.endswith(" 2")
        if source.marks.clip_skip and not made_without_last:
            log.warning(
                "%s asks for an earlier layer of its text encoder (%s), which is not applied: the last one is taken",
                source.path.name,
                source.marks.clip_skip,
            )
        if ignored := source.ignored:
            log.warning(
                "%s: %d tensors are no part of a Stable Diffusion and are not used, such as %s",
                source.path.name,
                len(ignored),
                ", ".join(name[:60] for name in ignored[:3]),
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        side = int(self.unet_config["sample_size"])
        return int(self.unet_config["in_channels"]), side, side

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's configuration, complete."""
        values = self._folder.config("unet")
        kinds.check_class(values, "unet", self.source.label)
        complete_values = repairs.unet(values, self._folder.label)
        kinds.check_unet(complete_values, self.source.label)
        limits.check("unet", complete_values, self._folder.label)
        return complete_values

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's configuration, complete."""
        values = self._folder.config("vae")
        kinds.check_class(values, "vae", self.source.label)
        complete_values = repairs.vae(values)
        limits.check("vae", complete_values, self._folder.label)
        return complete_values

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The text encoder's configuration, complete."""
        values = self._folder.config("text_encoder")
        kinds.check_text_encoder(values, self.source.label)
        complete_values = repairs.text_encoder(values)
        limits.check("text_encoder", complete_values, self._folder.label)
        return complete_values

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule's configuration, complete and as the model's marks say."""
        return read_schedule(self.source, self._folder)

    @cached_property
    def family(self) -> str:
        """``sd1``, ``sd2``, or ``sd-<width>`` for models of the same make and another size."""
        return _FAMILIES.get(self.cross_attention_dim, f"sd-{self.cross_attention_dim}")

    @property
    def cross_attention_dim(self) -> int:
        """Width D of the text conditioning."""
        return int(self.unet_config["cross_attention_dim"])

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts, one of `PREDICTION_TYPES`."""
        return str(self.scheduler_config["prediction_type"])

    @property
    def vae_factor(self) -> int:
        """Picture pixels per latent pixel, each way."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def size_px(self) -> int:
        """Side of the square pictures the model was made for."""
        return int(self.unet_config["sample_size"]) * self.vae_factor

    @property
    def num_train_timesteps(self) -> int:
        """Steps of the noise schedule."""
        return int(self.scheduler_config["num_train_timesteps"])

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Cumulative product of alphas (num_train_timesteps,), fp32."""
        return alphas(self.scheduler_config, self._folder.label)

    def inverse_scheduler(self) -> Any:
        """diffusers' `DDIMInverseScheduler`, on this model's noise schedule at evenly spaced ("leading") timesteps."""
        settings = {**self.scheduler_config, "timestep_spacing": "leading"}
        with quiet():
            return diffusers.DDIMInverseScheduler.from_config(settings)

    def scheduler(self, name: str) -> Any:
        """A diffusers scheduler by class name, with or without "Scheduler", on this model's noise schedule.

        Raises:
            ConfigError: there is no such scheduler for this kind of model.
        """
        kind = getattr(diffusers, name if name.endswith("Scheduler") else name + "Scheduler", None)
        # EDM's are for models that take log(sigma) for the time.
        compatible = {k.__name__ for k in diffusers.DDIMScheduler().compatibles if not k.__name__.startswith("EDM")}
        if not inspect.isclass(kind) or kind.__name__ not in compatible:
            names = ", ".join(sorted(n.removesuffix("Scheduler") for n in compatible))
            raise ConfigError(f"scheduler is {name!r}, expected one of {names}")
        try:
            with quiet():
                return kind.from_config(repairs.for_sampler(self.scheduler_config, kind.__name__))  # type: ignore[attr-defined]
        except ImportError as error:
            raise ConfigError(
                f"scheduler {name} needs a package that is missing: {str(error).strip()[:120]}"
            ) from error
        except Exception as error:
            # Whatever diffusers raises for values it does not know.
            raise IncompleteModelError(
                f"{self._folder.label}: scheduler/scheduler_config.json cannot be used ({first_line(error)}); "
                "download it again"
            ) from error

    def check_steps(self, name: str, steps: int) -> None:
        """Makes sure that a scheduler can take this many steps, by taking them without a model.

        Raises:
            ConfigError: it cannot.
            NonFiniteModelError: it makes NaN or infinity of right predictions.
        """
        if not math.isfinite(self.rehearsal(name, steps)):
            raise NonFiniteModelError(
                f"scheduler {name} makes NaN or infinity of the noise schedule of {self.source.label} in {steps} "
                "steps; the model's scheduler configuration is unsuitable: choose another scheduler, or another model"
            )

    def rehearsal(self, name: str, steps: int) -> float:
        """How far a scheduler ends from a picture when every prediction is right, see `rehearse`.

        Raises:
            ConfigError: it cannot take this many steps.
        """
        scheduler = self.scheduler(name)
        try:
            scheduler.set_timesteps(steps)
            furthest = float(scheduler.timesteps.max())
            if furthest >= self.num_train_timesteps:
                raise ValueError(f"it begins at timestep {furthest:.0f} of {self.num_train_timesteps}")
            return rehearse(scheduler, self.alpha_bar, self.prediction_type)
        except Exception as error:
            # From ValueError to IndexError; all mean the same to a user.
            raise ConfigError(
                f"num_inference_steps is {steps}, which scheduler {name} cannot take ({first_line(error)}); "
                "take more or fewer, or another scheduler"
            ) from error

    @cached_property
    def tokenizer(self) -> CLIPTokenizerFast:
        """The tokenizer."""
        self._folder.vocabulary()
        values = self._folder.config("tokenizer", "tokenizer_config.json")
        if elsewhere := [key for key in _FILES_OF_TOKENIZERS if key in values and "/" in str(values[key])]:
            raise IncompleteModelError(
                f"{self._folder.label}: tokenizer/tokenizer_config.json names a file elsewhere ({elsewhere[0]}); "
                "remove that entry"
            )
        with quiet(), complete(self._folder.label, "tokenizer"):
            # Before transformers 5 the other class reads no tokenizer.json, which is all that later versions write.
            tokenizer = CLIPTokenizerFast.from_pretrained(
                self._folder.path, subfolder="tokenizer", local_files_only=True
            )
            longest, words = self.text_config["max_position_embeddings"], self.text_config["vocab_size"]
            # transformers takes 1e30 where the configuration does not say.
            if not (isinstance(tokenizer.model_max_length, int) and 3 <= tokenizer.model_max_length <= longest):
                raise ValueError(f"model_max_length is {tokenizer.model_max_length}, expected 3 to {longest}")
            if max(tokenizer.get_vocab().values()) >= words:
                raise ValueError(f"it has words beyond the {words} of the text encoder")
            # Some settings are looked at only now.
            ids = _padded(tokenizer, ["a", ""])
            if ids.shape != (2, tokenizer.model_max_length):
                raise ValueError(f"it gives ids of the shape {list(ids.shape)}")
            tokenizer.decode(ids[0])
            return tokenizer

    def load_unet(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen UNet with weights in the given format (`config.WEIGHT_FORMATS`), in eval mode.

        On the meta device only its configuration is read, as for the other parts.
        """
        unet = self._build("unet", self.unet_config)
        tensors: Iterable[tuple[str, Tensor]]
        if device.type == "meta":
            tensors = list(unet.named_parameters())
        else:
            tensors = tensors_of(self.source, "unet", self.unet_config)
            check_fit(unet, tensors, f"{self._shown}: the UNet", self._folder.label)
        try:
            load_frozen(unet, tensors, weights=weights, device=device, dtype=dtype)
        except ValueError as error:
            raise IncompleteModelError(f"{self._shown}: the UNet's {error}") from error
        make_frugal(unet)
        return unet

    @staticmethod
    def use_xformers(unet: nn.Module) -> None:
        """Makes a UNet compute attention with xformers, which is known to run.

        Not diffusers' own switch: it tries xformers on the first GPU and in fp32, whatever the UNet is on and in.
        """
        for module in unet.modules():
            if isinstance(module, Attention):
                module.set_processor(XFormersAttnProcessor())

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen CLIP text encoder."""
        return self._frozen("text_encoder", self.text_config, device, dtype)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> nn.Module:
        """The frozen autoencoder; `tiling` makes it work in overlapping quarters: a fraction of the memory."""
        vae: Any = self._frozen("vae", self.vae_config, device, dtype)
        if device.type == "cuda":
            # cuDNN computes in this layout, and would keep a copy of every tensor in it.
            vae.to(memory_format=torch.channels_last)
        if tiling:
            vae.enable_tiling()
            # diffusers' own tiles are of the size that the model was made for.
            vae.tile_sample_min_size, vae.tile_latent_min_size = self.size_px // 2, self.latent_shape[1] // 2
        return vae  # type: ignore[no-any-return]

    def _build(self, component: str, values: dict[str, Any]) -> nn.Module:
        """A part on the meta device, which was tried once."""
        if component not in self._tried:
            try_out(component, values, self._folder.label, self.latent_shape[1])
            self._tried.add(component)
        return build(component, values, self._folder.label)

    @property
    def _shown(self) -> str:
        """The base, for messages about its weights."""
        return self.source.path.name if isinstance(self.source, SingleFile) else self.source.label

    def _frozen(self, component: str, values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
        part = self._build(component, values)
        if device.type == "meta":
            with quiet():
                return part.to(device, dtype).requires_grad_(False).eval()
        tensors = tensors_of(self.source, component, values)
        names = check_fit(part, tensors, f"{self._shown}: the {component}", self._folder.label)
        fill(part, tensors, names, device, dtype)
        return part

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, list[str]]:
        """Token ids (B, T), and for each prompt the words that no longer fit ("" when all do).

        Raises:
            PromptError: a prompt with no words.
        """
        limit = self.tokenizer.model_max_length
        cut = []
        for prompt in prompts:
            ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
            cut.append(self.tokenizer.decode(ids[limit - 1 : -1]).strip() if len(ids) > limit else "")
        return _padded(self.tokenizer, prompts), cut

    def check_prompt(self, prompt: str) -> str:
        """The words of `prompt` that do not fit into the text encoder ("" when all do).

        Raises:
            PromptError: nothing to encode.
        """
        if not prompt.strip():
            raise PromptError('the sentence is empty; say what the picture should show, such as "a blue cube"')
        return self.tokenize([prompt])[1][0]

    @torch.no_grad()
    def encode_text(self, text_encoder: nn.Module, prompts: Sequence[str]) -> Tensor:
        """Text embeddings (B, T, D), fp32 on the CPU."""
        ids, _ = self.tokenize(prompts)
        device = next(text_encoder.parameters()).device
        embeddings: Tensor = text_encoder(ids.to(device))[0]
        return embeddings.float().cpu()

    @torch.no_grad()
    def encode_images(self, vae: nn.Module, images: Tensor) -> Tensor:
        """Latents (B, 4, H/f, W/f), fp32 on the CPU: the posterior's mean, scaled; images (B, 3, H, W) in [-1, 1]."""
        first = next(vae.parameters())
        parts = [vae.encode(_laid_out(image[None], first)).latent_dist.mean for image in images]  # type: ignore[operator]
        return torch.cat(parts).float().cpu() * self._scaling

    @torch.no_grad()
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], fp32 on the CPU, decoded one by one to bound memory.

        Not finite where the autoencoder overflows in its type.
        """
        first = next(vae.parameters())
        parts = [vae.decode(_laid_out(z[None] / self._scaling, first)).sample for z in latents]  # type: ignore[operator]
        # Clamping would hide an overflow to infinity, not one to NaN.
        images = torch.cat(parts).float().cpu()
        return images.where(~images.isfinite(), images.clamp(-1, 1))

    @property
    def _scaling(self) -> float:
        return float(self.vae_config["scaling_factor"])


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A batch on the device of a part and in its type; on a GPU in the layout that cuDNN computes in."""
    if like.device.type == "cuda":
        return x.to(like.device, like.dtype, memory_format=torch.channels_last)
    return x.to(like)


def _padded(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, T) at the full length of the text encoder."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids
