"""Stable Diffusion 1.x and 2.x: CLIP text conditioning, 4-channel latents, epsilon or v prediction.

The only place that knows diffusers' and transformers' classes.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast

from ..diffusion import PREDICTION_TYPES
from ..errors import ConfigError, IncompleteModelError, NonFiniteModelError, PromptError, WrongFamilyError
from ..quantize import load_frozen
from .frugal_unet import make_frugal
from .loading import complete, converted, first_line, quiet
from .rehearsal import rehearse
from .source import Folder, SingleFile

_FAMILIES = {768: "sd1", 1024: "sd2"}
"""Family by width of the text conditioning; others are of the same make but another size."""


class StableDiffusion:
    """The parts of one Stable Diffusion model, each loaded when asked for and owned by the caller.

    Raises:
        WrongFamilyError: another kind of model (SDXL, inpainting, transformers).
        IncompleteModelError: parts are missing.
    """

    def __init__(self, source: Folder | SingleFile) -> None:
        self.source = source
        self._folder = source if isinstance(source, Folder) else source.configuration
        kind = self._folder.config(".", "model_index.json").get("_class_name")
        if kind not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
            raise WrongFamilyError(
                f"{self._folder.label} is a {kind or 'model without a pipeline class'}; this version edits with "
                "StableDiffusionPipeline models (Stable Diffusion 1.x and 2.x)"
            )
        unet = self.unet_config
        self._check_configurations()
        if unet.get("in_channels") != 4 or unet.get("addition_embed_type") or not unet.get("cross_attention_dim"):
            raise WrongFamilyError(
                f"{source.label} has a UNet with {unet.get('in_channels')} input channels and "
                f"addition_embed_type {unet.get('addition_embed_type')}; expected a plain text-to-image "
                "Stable Diffusion 1.x or 2.x (not inpainting, not SDXL)"
            )
        if self.prediction_type not in PREDICTION_TYPES:
            raise WrongFamilyError(
                f"{source.label} predicts {self.prediction_type!r}, expected one of {', '.join(PREDICTION_TYPES)}"
            )
        if isinstance(source, SingleFile) and source.width != self.cross_attention_dim:
            raise IncompleteModelError(
                f"{source.label} takes text of width {source.width}, but the configuration of {self._folder.label} "
                f"says {self.cross_attention_dim}; give a diffusers folder of the same family (--model-config)"
            )

    def _check_configurations(self) -> None:
        """Makes sure of what is read off the configurations below.

        Raises:
            IncompleteModelError: a value is missing or of the wrong kind.
        """

        def positive(value: object) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and value > 0

        channels = self.vae_config.get("block_out_channels")
        width = self.unet_config.get("cross_attention_dim")
        wrong = {
            "unet/config.json: sample_size": not positive(self.unet_config.get("sample_size")),
            # None is left to the check of the family: that is a UNet that takes no text.
            "unet/config.json: cross_attention_dim": width is not None and not positive(width),
            "vae/config.json: block_out_channels": not isinstance(channels, list) or not channels,
        }
        if found := [name for name, is_wrong in wrong.items() if is_wrong]:
            raise IncompleteModelError(
                f"{self._folder.label} has no usable {', '.join(found)}; expected a Stable Diffusion folder as "
                "diffusers writes it, so download it again"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image's latents."""
        side = int(self.unet_config["sample_size"])
        return int(self.unet_config["in_channels"]), side, side

    @cached_property
    def unet_config(self) -> dict[str, Any]:
        """The UNet's configuration."""
        return self._folder.config("unet")

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's configuration."""
        return self._folder.config("vae")

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The text encoder's configuration."""
        return self._folder.config("text_encoder")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule's configuration."""
        return self._folder.config("scheduler", "scheduler_config.json")

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
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

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
        return int(self.scheduler_config.get("num_train_timesteps", 1000))

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Cumulative product of alphas (num_train_timesteps,), fp32."""
        alphas: Tensor = self.scheduler("DDIM").alphas_cumprod
        return alphas

    def inverse_scheduler(self) -> Any:
        """diffusers' `DDIMInverseScheduler`, on this model's noise schedule at evenly spaced ("leading") timesteps."""
        settings = {**self.scheduler_config, "timestep_spacing": "leading", "clip_sample": False}
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
            return kind.from_config(self.scheduler_config)  # type: ignore[attr-defined]
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
        self._folder.config("tokenizer", "tokenizer_config.json")
        with quiet(), complete(self._folder, "tokenizer"):
            # Before transformers 5 the other class reads no tokenizer.json, which is all that later versions write.
            tokenizer = CLIPTokenizerFast.from_pretrained(
                self._folder.path, subfolder="tokenizer", local_files_only=True
            )
            # transformers takes 1e30 where the configuration does not say.
            if not 3 <= tokenizer.model_max_length <= 10_000:
                raise ValueError(f"model_max_length is {tokenizer.model_max_length}")
            return tokenizer

    def load_unet(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen UNet with weights in the given format (`config.WEIGHT_FORMATS`), in eval mode.

        On the meta device only its configuration is read, as for the other parts.
        """
        with init_empty_weights(include_buffers=False), complete(self._folder, "unet"):
            unet: nn.Module = UNet2DConditionModel.from_config(self.unet_config)
        tensors: Iterable[tuple[str, Tensor]]
        if device.type == "meta":
            tensors = list(unet.named_parameters())
        elif isinstance(self.source, SingleFile):
            tensors = converted(self.source, "unet").state_dict().items()
        else:
            tensors = self.source.tensors("unet")
        try:
            load_frozen(unet, tensors, weights=weights, device=device, dtype=dtype)
        except ValueError as error:
            raise IncompleteModelError(f"{self.source.label}: the UNet's {error}") from error
        make_frugal(unet)
        return unet

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen CLIP text encoder."""
        # As transformers 5.6 and later write them the names lack a prefix that earlier versions need and all take.
        names = {r"^(?!text_model\.)": "text_model."}
        return self._frozen(CLIPTextModel, "text_encoder", device, dtype, key_mapping=names)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> nn.Module:
        """The frozen autoencoder; `tiling` makes it work in overlapping quarters: a fraction of the memory."""
        vae: Any = self._frozen(AutoencoderKL, "vae", device, dtype)
        if tiling:
            vae.enable_tiling()
            # diffusers' own tiles are of the size that the model was made for.
            vae.tile_sample_min_size, vae.tile_latent_min_size = self.size_px // 2, self.latent_shape[1] // 2
        return vae  # type: ignore[no-any-return]

    def _frozen(self, kind: Any, component: str, device: torch.device, dtype: torch.dtype, **options: Any) -> nn.Module:
        part: Any
        if device.type == "meta":
            values = self._folder.config(component)
            with init_empty_weights(), complete(self._folder, component):
                part = kind.from_config(values) if kind is AutoencoderKL else kind(CLIPTextConfig(**values))
        elif isinstance(self.source, SingleFile):
            part = converted(self.source, component)
        else:
            self.source.weight_files(component)
            with quiet(), complete(self.source, component):
                part, report = kind.from_pretrained(
                    self._folder.path,
                    subfolder=component,
                    use_safetensors=True,
                    local_files_only=True,
                    variant=self.source.variant(component),
                    output_loading_info=True,
                    **options,
                )
            if report["missing_keys"]:
                # The libraries fill these with random numbers, or leave them without any.
                some = ", ".join(sorted(report["missing_keys"])[:3])
                raise IncompleteModelError(
                    f"{self.source.label}: {component} lacks {len(report['missing_keys'])} tensors, such as {some}; "
                    "download it again"
                )
        with quiet():
            part.to(device, dtype)
        return part.requires_grad_(False).eval()  # type: ignore[no-any-return]

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
        encoded = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        )
        kept: Tensor = encoded.input_ids
        return kept, cut

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
        parts = [vae.encode(image[None].to(first)).latent_dist.mean for image in images]  # type: ignore[operator]
        return torch.cat(parts).float().cpu() * self._scaling

    @torch.no_grad()
    def decode(self, vae: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], fp32 on the CPU, decoded one by one to bound memory.

        Not finite where the autoencoder overflows in its type.
        """
        first = next(vae.parameters())
        parts = [vae.decode((z[None] / self._scaling).to(first)).sample for z in latents]  # type: ignore[operator]
        # Clamping would hide an overflow to infinity, not one to NaN.
        images = torch.cat(parts).float().cpu()
        return images.where(~images.isfinite(), images.clamp(-1, 1))

    @property
    def _scaling(self) -> float:
        # Old configurations leave it out; then diffusers' own default holds.
        default = inspect.signature(AutoencoderKL).parameters["scaling_factor"].default
        return float(self.vae_config.get("scaling_factor", default))
