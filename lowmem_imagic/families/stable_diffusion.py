"""Stable Diffusion 1.x and 2.x: CLIP text conditioning, latents of 4 channels (or more), epsilon or v prediction.

Outside of `families` and `demo`, no code uses the classes of diffusers or transformers.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor
from torch import Tensor, nn
from transformers import CLIPTokenizerFast

from ..edits.identity import BaseIdentity, Interface
from ..errors import IncompleteModelError, PromptError, WrongFamilyError
from ..geometry import Size, Sizes
from ..layers.adapter_pack import Factors
from ..layers.frozen import load_frozen
from ..unexpected import without_advice
from . import kinds, limits, repairs
from .adapter_names import KohyaNames
from .conditioning import Conditioning, Part
from .denoiser import DiffusersDenoiser
from .family import Denoiser, Loaded
from .files.checkpoint import SingleFile
from .files.source import Folder
from .lean_unet import make_lean
from .loading import build, check_fit, complete, fill, tensors_of, tokenizer_files, try_out
from .portable import portable
from .schedule import DiscreteSchedule, read_schedule
from .vocabulary import Vocabulary

log = logging.getLogger(__name__)

EMBEDS = "embeds"
"""Name of the only part of a sentence's conditioning."""
_FAMILIES = {768: "sd1", 1024: "sd2"}
"""Family by width of the text conditioning; other widths are models of the same architecture in another size."""
AT_LATENTS = ("conv_in", "conv_out")
"""The UNet's layers from and to the latents."""
LEAST_PX = 256
"""Shortest side of edited pictures, except for models trained on smaller pictures."""


class StableDiffusion:
    """The parts of one Stable Diffusion model, each loaded on request and owned by the caller.

    Raises:
        WrongFamilyError: another kind of model (SDXL, inpainting, transformers).
        IncompleteModelError: parts are missing.
    """

    encoders: Mapping[str, str] = {"text_encoder": "tokenizer"}
    """The text encoders, each with its tokenizer."""
    group = ""
    text_in_fp16 = True

    def __init__(self, source: Folder | SingleFile) -> None:
        self.source = source
        self._folder = source if isinstance(source, Folder) else source.configuration
        kinds.check_pipeline(self._model_index, self._folder.label)
        limits.check_side(self.unet_config["sample_size"], self.vae_factor, self._folder.label)
        if isinstance(source, SingleFile):
            self._check_checkpoint(source)
        self._check_text()
        _ = self.scheduler_config

    @cached_property
    def _model_index(self) -> dict[str, Any]:
        """The folder's list of its parts."""
        return self._folder.config(".", "model_index.json")

    def _check_text(self) -> None:
        """Checks that the UNet takes what the text encoder gives.

        Raises:
            IncompleteModelError: it does not.
        """
        if (text_width := self.text_configs["text_encoder"]["hidden_size"]) != self.cross_attention_dim:
            raise IncompleteModelError(
                f"{self._folder.label} has a text encoder of width {text_width} and a UNet for width "
                f"{self.cross_attention_dim}; download it again"
            )

    def _check_checkpoint(self, source: SingleFile) -> None:
        """Checks that a single file's width and latent scale are those of its configuration.

        Raises:
            IncompleteModelError: they are not.
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
        if source.marks.clip_skip and not (self.reads_before_last and source.marks.clip_skip.endswith(" 2")):
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
    def reads_before_last(self) -> bool:
        """Whether the text is the output of the second layer from the end.

        Stable Diffusion 2 lacks its text encoder's last layer.
        """
        return self.cross_attention_dim == 1024

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
        self._check_unet(complete_values)
        limits.check("unet", complete_values, self._folder.label)
        return complete_values

    def _check_unet(self, values: Mapping[str, Any]) -> None:
        """Checks that the UNet is one of this family.

        Raises:
            WrongFamilyError: it is not.
        """
        kinds.check_unet(values, self.source.label, latent_channels=self.vae_config["latent_channels"])

    @cached_property
    def vae_config(self) -> dict[str, Any]:
        """The autoencoder's configuration, complete."""
        values = self._folder.config("vae")
        kinds.check_class(values, "vae", self.source.label)
        complete_values = repairs.vae(values)
        limits.check("vae", complete_values, self._folder.label)
        return complete_values

    @cached_property
    def text_configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each text encoder, complete."""
        return {name: self._text_config(name) for name in self.encoders}

    def _text_config(self, component: str) -> dict[str, Any]:
        values = self._folder.config(component)
        kinds.check_text_encoder(values, self.source.label)
        complete_values = repairs.text_encoder(values)
        limits.check(component, complete_values, self._folder.label)
        return complete_values

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule's configuration, complete, with the model's marks applied."""
        return read_schedule(self.source, self._folder)

    @cached_property
    def family(self) -> str:
        """``sd1``, ``sd2``, or ``sd-<width>`` for models of the same architecture in another size."""
        return _FAMILIES.get(self.cross_attention_dim, f"sd-{self.cross_attention_dim}")

    @property
    def cross_attention_dim(self) -> int:
        """Width D of the text conditioning."""
        return int(self.unet_config["cross_attention_dim"])

    @property
    def prediction_type(self) -> str:
        """Prediction type of the UNet, one of `PREDICTION_TYPES`."""
        return str(self.scheduler_config["prediction_type"])

    @property
    def vae_factor(self) -> int:
        """Picture pixels per latent pixel, each way."""
        return int(2 ** (len(self.vae_config["block_out_channels"]) - 1))

    @property
    def sizes(self) -> Sizes:
        """The square of the model's training, and sizes of at most as many pixels whose latents its UNet halves evenly.

        A side has at least half of the square's, and at least `LEAST_PX`: a model for smaller pictures has its square.
        """
        side = int(self.unet_config["sample_size"]) * self.vae_factor
        halvings = len(self.unet_config["block_out_channels"]) - 1
        return Sizes((side, side), self.vae_factor * 2**halvings, max(side // 2, min(side, LEAST_PX)))

    @property
    def num_train_timesteps(self) -> int:
        """Steps of the noise schedule."""
        return int(self.scheduler_config["num_train_timesteps"])

    @cached_property
    def schedule(self) -> DiscreteSchedule:
        """The noise schedule of the UNet's training."""
        return DiscreteSchedule(self.scheduler_config, self._folder.label)

    @cached_property
    def denoisers(self) -> Sequence[Denoiser]:
        """The UNet, the only denoiser."""
        return (UNet(self),)

    @property
    def text(self) -> Mapping[str, Part]:
        """The conditioning of a sentence: one tensor (T, D)."""
        tokens = int(self.text_configs["text_encoder"]["max_position_embeddings"])
        return {EMBEDS: Part((tokens, self.cross_attention_dim), trained=True)}

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The words in the model folder's file of them; None for a folder without one, and for single files."""
        words = self.source.words() if isinstance(self.source, Folder) else None
        return None if words is None else Vocabulary.of(words)

    def check_trainable(self) -> None:
        """Checks that the model is none that is made for few steps without guidance.

        Raises:
            WrongFamilyError: it is, by its name or its scheduler.
        """
        if sign := kinds.distilled(self.source.label, self.scheduler_config["_class_name"]):
            raise WrongFamilyError(
                f"{self.source.label} is made for few steps without guidance ({sign}), which training would undo: "
                "train on the base that it was made from, and render that edit with this model; if the sign is wrong, "
                "rename the model"
            )

    @property
    def identity(self) -> BaseIdentity:
        """Identity of this base, with the hashes of its files."""
        return BaseIdentity(
            source=self.source.label,
            revision=self.source.revision,
            family=self.family,
            interface=Interface(
                text={name: part.shape[-1] for name, part in self.text.items()},
                denoisers={self.denoisers[0].name: self.prediction_type},
            ),
            files=self.source.hashes,
            labels=self.labels,
        )

    @property
    def labels(self) -> dict[str, str]:
        """See `labels`."""
        return labels(self.family, self.prediction_type)

    @cached_property
    def tokenizers(self) -> dict[str, CLIPTokenizerFast]:
        """The tokenizer of each text encoder."""
        return {
            encoder: self._tokenizer(component, self.text_configs[encoder])
            for encoder, component in self.encoders.items()
        }

    def _tokenizer(self, component: str, text_config: Mapping[str, Any]) -> CLIPTokenizerFast:
        """The tokenizer of the text encoder with this configuration."""
        files, settings = tokenizer_files(self._folder, component)
        with without_advice(), complete(self._folder.label, component):
            # The fast class: before transformers 5 the other one cannot read tokenizer.json, the only file that later
            # versions write.
            tokenizer = CLIPTokenizerFast.from_pretrained(files, local_files_only=True, **settings)
            longest, words = text_config["max_position_embeddings"], text_config["vocab_size"]
            # transformers sets 1e30 if the configuration has no value.
            if not (isinstance(tokenizer.model_max_length, int) and 3 <= tokenizer.model_max_length <= longest):
                raise ValueError(f"model_max_length is {tokenizer.model_max_length}, expected 3 to {longest}")
            if max(tokenizer.get_vocab().values()) >= words:
                raise ValueError(f"it has words beyond the {words} of the text encoder")
            # The library checks some settings only when it encodes.
            ids = _padded(tokenizer, ["a", ""])
            if ids.shape != (2, tokenizer.model_max_length):
                raise ValueError(f"it gives ids of the shape {list(ids.shape)}")
            tokenizer.decode(ids[0])
            return tokenizer

    def load_unet(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen UNet with weights in a format of `settings.stages.WEIGHT_FORMATS`, in eval mode.

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
            load_frozen(unet, tensors, weights=weights, device=device, dtype=dtype, in_float=AT_LATENTS)
        except ValueError as error:
            raise IncompleteModelError(f"{self._shown}: the UNet's {error}") from error
        make_lean(unet)
        return unet

    def load_text_encoder(
        self, name: str = "text_encoder", *, weights: str = "int8", device: torch.device, dtype: torch.dtype
    ) -> nn.Module:
        """A frozen CLIP text encoder, in `dtype` whatever the format of the weights."""
        return self._frozen(name, self.text_configs[name], device, dtype)

    @property
    def codec_in_fp16(self) -> bool:
        """Whether the autoencoder's numbers fit into fp16: those of Stable Diffusion 1 and 2 do."""
        return True

    def load_codec(self, *, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> nn.Module:
        """The frozen autoencoder; with `tiling` it works in overlapping quarters, in a fraction of the memory."""
        vae: Any = self._frozen("vae", self.vae_config, device, dtype)
        if device.type == "cuda":
            # cuDNN computes in this layout; from another one it would copy every tensor.
            vae.to(memory_format=torch.channels_last)
        if tiling:
            vae.enable_tiling()
            # diffusers' own tiles have the size of a whole picture.
            vae.tile_sample_min_size, vae.tile_latent_min_size = self.sizes.own[0] // 2, self.latent_shape[1] // 2
        return vae  # type: ignore[no-any-return]

    def _build(self, component: str, values: dict[str, Any]) -> nn.Module:
        """A part on the meta device; its configuration is tried out once."""
        try_out(component, values, self._folder.label, self.latent_shape[1])
        return build(component, values, self._folder.label)

    @property
    def _shown(self) -> str:
        """Name of the base in messages about its weights."""
        return self.source.path.name if isinstance(self.source, SingleFile) else self.source.label

    def _frozen(self, component: str, values: dict[str, Any], device: torch.device, dtype: torch.dtype) -> nn.Module:
        part = self._build(component, values)
        if device.type == "meta":
            with without_advice():
                return part.to(device, dtype).requires_grad_(False).eval()
        tensors = tensors_of(self.source, component, values)
        names = check_fit(part, tensors, f"{self._shown}: the {component}", self._folder.label)
        fill(part, tensors, names, device, dtype)
        return part

    @property
    def sentence_tokens(self) -> int:
        """Most tokens of a sentence that every text encoder reads, without the start and end tokens."""
        return min(int(tokenizer.model_max_length) for tokenizer in self.tokenizers.values()) - 2

    def check_prompt(self, prompt: str) -> str:
        """The words of `prompt` that do not fit into every text encoder ("" if all do).

        Raises:
            PromptError: there is nothing to encode.
        """
        if not prompt.strip():
            raise PromptError('the sentence is empty; say what the picture should show, such as "a blue cube"')
        return max((_words_beyond(tokenizer, prompt) for tokenizer in self.tokenizers.values()), key=len)

    @torch.no_grad()
    def encode_text(self, sentences: Sequence[str], loaded: Loaded) -> Conditioning:
        """Text embeddings (B, T, D), on the encoder's device and in its type."""
        with loaded("text_encoder") as encoder:
            rows = [encoder(ids)[0] for ids in self._ids("text_encoder", encoder, sentences)]
        return Conditioning({EMBEDS: torch.cat(rows)})

    def _ids(self, name: str, encoder: nn.Module, sentences: Sequence[str]) -> Iterator[Tensor]:
        """Yields the token ids (1, T) of each sentence for a text encoder, on its device.

        On the meta device the sentences are not read: each has the full length.
        """
        device = next(encoder.parameters()).device
        for sentence in sentences:
            if device.type == "meta":
                yield torch.empty(1, self.text[EMBEDS].shape[0], dtype=torch.int64, device=device)
            else:
                yield _padded(self.tokenizers[name], [sentence]).to(device)

    @torch.no_grad()
    def encode(self, codec: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
        """Latents (B, 4, H/f, W/f) in fp32: the posterior's mean, scaled; pictures (B, 3, H, W) in [-1, 1]."""
        first = next(codec.parameters())
        parts = [codec.encode(_laid_out(x[None], first)).latent_dist.mean for x in pictures]  # type: ignore[operator]
        return {self.denoisers[0].name: torch.cat(parts).float() * self._scaling}

    @torch.no_grad()
    def decode(self, codec: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], in fp32, decoded one by one to limit memory.

        Not finite if the autoencoder overflows in its type.
        """
        first = next(codec.parameters())
        parts = [codec.decode(_laid_out(z[None] / self._scaling, first)).sample for z in latents]  # type: ignore[operator]
        # Clamping would hide an overflow to infinity, so infinite values stay.
        images = torch.cat(parts).float()
        return images.where(~images.isfinite(), images.clamp(-1, 1))

    def make_extra(self, denoiser: Denoiser, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """Empty: the UNet takes only the text."""
        return Conditioning({})

    @property
    def _scaling(self) -> float:
        return float(self.vae_config["scaling_factor"])


def labels(family: str, prediction_type: str) -> dict[str, str]:
    """Header entries of edit files that tell ComfyUI, Forge and sd-scripts the kind of a base; see `LABELS`.

    Empty for families that none of them knows.
    """
    if family not in _FAMILIES.values():
        return {}
    is_v, is_sd2 = prediction_type == "v_prediction", family == _FAMILIES[1024]
    sd2 = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    return {
        "modelspec.architecture": f"{sd2 if is_sd2 else 'stable-diffusion-v1'}/lora",
        "ss_base_model_version": ("sd_v2" if is_sd2 else "sd_v1") + ("_v" if is_v else ""),
        "ss_v2": str(is_sd2),
    }


class UNet(DiffusersDenoiser):
    """The UNet of a Stable Diffusion 1 or 2, as a `Denoiser`."""

    name = "unet"
    title = "UNet"
    names = KohyaNames()
    guided = True

    def __init__(self, family: StableDiffusion) -> None:
        self._family = family

    @property
    def schedule(self) -> DiscreteSchedule:
        """The noise schedule of its training."""
        return self._family.schedule

    def shape(self, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of the latents of a picture of this size."""
        factor = self._family.vae_factor
        return self._family.latent_shape[0], size[1] // factor, size[0] // factor

    def load(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen UNet."""
        return self._family.load_unet(weights=weights, device=device, dtype=dtype)

    def use_xformers(self, network: nn.Module) -> None:
        """Switches the UNet's attention to xformers; the caller has checked that it runs.

        diffusers' own switch is not used: it always tries xformers on the first GPU and in fp32.
        """
        for module in network.modules():
            if isinstance(module, Attention):
                module.set_processor(XFormersAttnProcessor())

    def portable(self, adapter: Mapping[str, Factors], network: nn.Module) -> dict[str, Factors]:
        """The adapter in the form for other programs, see `families.portable`."""
        return portable(adapter, network)

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The UNet's prediction, computed in channels-last layout, as cuDNN prefers."""
        noisy = x.to(memory_format=torch.channels_last)
        prediction: Tensor = network(noisy, at, encoder_hidden_states=given[EMBEDS]).sample
        return prediction


def _laid_out(x: Tensor, like: Tensor) -> Tensor:
    """A batch on the device of a part and in its type; on a GPU in cuDNN's layout (channels-last)."""
    if like.device.type == "cuda":
        return x.to(like.device, like.dtype, memory_format=torch.channels_last)
    return x.to(like)


def _words_beyond(tokenizer: Any, prompt: str) -> str:
    """The words of a prompt that do not fit into a tokenizer's text encoder ("" if all do)."""
    limit = tokenizer.model_max_length
    ids = tokenizer(prompt, truncation=False, verbose=False).input_ids
    return str(tokenizer.decode(ids[limit - 1 : -1]).strip()) if len(ids) > limit else ""


def _padded(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """Token ids (B, T), padded to the full length of the text encoder."""
    encoded = tokenizer(
        list(prompts), padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    ids: Tensor = encoded.input_ids
    return ids
