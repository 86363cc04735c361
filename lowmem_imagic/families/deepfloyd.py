"""DeepFloyd IF: the open Imagen, a cascade of two networks in the space of pixels.

Stage I makes a picture of 64 px from noise and the sentence; stage II makes one of 256 px from noise, the sentence and
the enlarged picture of stage I, itself with noise at a level that the network is told. Both predict the noise and a
variance, which is dropped. There is no autoencoder: a stage's latents are pictures.

Imagic was made for such a cascade (arXiv 2210.09276, section 3.3, "Imagen"). Stage I is trained and sampled as in all
families. Stage II has an adapter of its own, trained under the sentence's own conditioning e_tgt; so eta moves stage I
alone. Its training enlarges the photo of 64 px and noises it at random levels, as Imagen's was trained (Saharia et al.
2022, arXiv 2205.11487, section 2.4); diffusers' trainer enlarges nothing and noises the photo itself. The third stage,
an upscaler by four, is another model; it would see no more of the edit and is not run here.

Source: ``IFPipeline`` and ``IFSuperResolutionPipeline`` of diffusers (0.36 to 0.42).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, XFormersAttnAddedKVProcessor, XFormersAttnProcessor
from torch import Tensor, nn

from ..edits.identity import BaseIdentity, Interface
from ..errors import IncompleteModelError, PromptError
from ..geometry import Size, Sizes
from ..layers.adapter_pack import Factors
from ..layers.frozen import load_frozen
from . import deepfloyd_parts as parts
from . import limits, repairs
from .adapter_names import IF_TARGETS, PeftUNetNames
from .conditioning import Conditioning, Part
from .denoiser import DiffusersDenoiser
from .family import Denoiser, Loaded
from .files.source import Folder
from .loading import freeze_text_encoder
from .portable import baked
from .schedule import DiscreteSchedule, read_schedule
from .stable_diffusion import EMBEDS

FIRST, SECOND = "unet", "unet_2"
"""The names of both stages."""
LOWER, LEVEL = "low_resolution", "noise_level"
"""The conditioning of stage II beside the text: the picture to enlarge, and the level of its noise."""
SAMPLING_LEVEL = 250
"""The level in sampling, the one of diffusers' pipeline."""
_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"
_SIZES = {768: "m", 1280: "l", 2816: "xl"}
"""Names of the published sizes of stage I by the width of its attention to the text."""
_SECOND_WIDTH = 1280
"""The width of the published stage II, IF-II-L."""
AT_PIXELS = ("conv_in", "conv_out")
"""Layers from and to the pixels."""


class DeepFloyd:
    """The parts of one DeepFloyd IF, each loaded on request and owned by the caller.

    Raises:
        WrongFamilyError: a stage is another kind of model.
        IncompleteModelError: parts are missing.
    """

    group = "cascade"
    vocabulary = None
    codec_in_fp16 = True
    text_in_fp16 = False

    def __init__(self, source: Folder) -> None:
        self.source = source
        self._has_second = SECOND in source.components
        first = self.unet_configs[FIRST]
        width = self.text_config["d_model"]
        for name, values in self.unet_configs.items():
            limits.check_side(values["sample_size"], 1, source.label)
            if values["encoder_hid_dim"] != width:
                raise IncompleteModelError(
                    f"{source.label} has a text encoder of width {width} and a {name} for width "
                    f"{values['encoder_hid_dim']}; download it again"
                )
        if self._side % first["sample_size"]:
            raise IncompleteModelError(
                f"{source.label} makes pictures of {first['sample_size']} px and enlarges them to {self._side} px, "
                "expected a multiple; take stages that belong together"
            )
        _ = [denoiser.schedule for denoiser in self.denoisers]

    @cached_property
    def unet_configs(self) -> dict[str, dict[str, Any]]:
        """The configuration of each stage's UNet, complete."""
        return {name: self._unet_config(name) for name in ((FIRST, SECOND) if self._has_second else (FIRST,))}

    def _unet_config(self, name: str) -> dict[str, Any]:
        label = self.source.owner(name)
        values = repairs.unet(self.source.config(name), label)
        parts.check_unet(values, label, second=name == SECOND)
        limits.check("unet", values, label)
        return values

    @cached_property
    def text_config(self) -> dict[str, Any]:
        """The text encoder's configuration, complete."""
        values = self.source.config(_ENCODER)
        if values.get("model_type") != "t5":
            raise IncompleteModelError(
                f"{self.source.label} has a text encoder of the kind {str(values.get('model_type'))[:60]}, expected t5"
            )
        complete_values = parts.t5_values(values)
        limits.check(_ENCODER, complete_values, self.source.label, kind="t5")
        return complete_values

    @cached_property
    def family(self) -> str:
        """``if-m``, ``if-l`` or ``if-xl``; with the width of a stage I or a stage II of another size."""
        width = self.unet_configs[FIRST]["cross_attention_dim"]
        name = f"if-{_SIZES.get(width, width)}"
        if not self._has_second:
            return name
        second = self.unet_configs[SECOND]["cross_attention_dim"]
        return name if second == _SECOND_WIDTH else f"{name}-{second}"

    @property
    def _side(self) -> int:
        """The side of a whole picture."""
        return int(list(self.unet_configs.values())[-1]["sample_size"])

    @property
    def sizes(self) -> Sizes:
        """The square of the last stage, and sizes of at most as many pixels that both stages' UNets halve evenly."""
        multiple = math.lcm(
            *(
                self._side // int(values["sample_size"]) * 2 ** (len(values["block_out_channels"]) - 1)
                for values in self.unet_configs.values()
            )
        )
        return Sizes((self._side, self._side), multiple, max(self._side // 2, multiple))

    @cached_property
    def denoisers(self) -> Sequence["FirstStage"]:
        """Stage I and, if it is there, stage II."""
        first = FirstStage(self)
        return (first, SecondStage(self)) if self._has_second else (first,)

    @property
    def text(self) -> Mapping[str, Part]:
        """The conditioning of a sentence: one tensor (77, D). Both UNets attend to the padding, too."""
        return {EMBEDS: Part((parts.TOKENS, self.text_config["d_model"]), trained=True)}

    def check_trainable(self) -> None:
        """Nothing to check: there is no distilled DeepFloyd IF."""

    @property
    def identity(self) -> BaseIdentity:
        """Identity of this base, with the hashes of its files."""
        return BaseIdentity(
            source=self.source.label,
            revision=self.source.revision,
            family=self.family,
            interface=Interface(
                text={name: part.shape[-1] for name, part in self.text.items()},
                denoisers={denoiser.name: denoiser.schedule.prediction_type for denoiser in self.denoisers},
            ),
            files=self.source.hashes,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """T5's tokenizer."""
        return parts.load_tokenizer(self.source, _TOKENIZER, self.text_config["vocab_size"])

    @property
    def sentence_tokens(self) -> int:
        """Most tokens of a sentence that the text encoder reads, without the end token."""
        return parts.TOKENS - 1

    def check_prompt(self, prompt: str) -> str:
        """The words of `prompt` that do not fit into the text encoder ("" if all do).

        Raises:
            PromptError: there is nothing to encode.
        """
        if not prompt.strip():
            raise PromptError('the sentence is empty; say what the picture should show, such as "a blue cube"')
        ids = self.tokenizer(_cleaned(prompt), truncation=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[parts.TOKENS - 1 : -1]).strip()) if len(ids) > parts.TOKENS else ""

    def load_text_encoder(self, name: str, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen encoder of T5, see `loading.freeze_text_encoder`.

        Never in fp16, which its feed-forward layers overflow (transformers issue 9295).
        """
        encoder = parts.build_text_encoder(self.text_config, self.source.owner(name))
        tensors: Any = list(encoder.named_parameters())
        if device.type != "meta":
            tensors = parts.named_tensors(self.source.weights(name))
        with self._fitting("the text encoder"):
            freeze_text_encoder(encoder, tensors, table=parts.TABLE, weights=weights, device=device, dtype=dtype)
        return encoder

    def load_unet(self, name: str, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A stage's frozen UNet; its layers from and to the pixels stay in float."""
        values = self.unet_configs[name]
        network = parts.build_unet(values, self.source.owner(name), int(values["sample_size"]))
        tensors: Any = list(network.named_parameters())
        if device.type != "meta":
            read = self.source.weights(name)
            tensors = ((tensor, read[tensor]) for tensor in read.names)
        with self._fitting(f"the UNet of stage {'II' if name == SECOND else 'I'}"):
            load_frozen(network, tensors, weights=weights, device=device, dtype=dtype, in_float=AT_PIXELS)
        return network

    @contextmanager
    def _fitting(self, words: str) -> Iterator[None]:
        """Turns an error about tensors that do not fit a network into `IncompleteModelError`."""
        try:
            yield
        except ValueError as error:
            raise IncompleteModelError(f"{self.source.label}: {words}: {error}; download it again") from error

    @torch.no_grad()
    def encode_text(self, sentences: Sequence[str], loaded: Loaded) -> Conditioning:
        """Tokens (B, 77, D) in the text encoder's type, of the empty sentence too; T5 does not see the padding."""
        with loaded(_ENCODER) as encoder:
            rows = [encoder(ids, attention_mask=mask)[0] for ids, mask in self._tokens(encoder, sentences)]
        return Conditioning({EMBEDS: torch.cat(rows)})

    def _tokens(self, encoder: nn.Module, sentences: Sequence[str]) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields the ids and the mask (1, 77) of each sentence on the encoder's device.

        On the meta device sentences are not read, and there is no mask: T5 would look into it.
        """
        device = next(encoder.parameters()).device
        for sentence in sentences:
            if device.type == "meta":
                yield torch.empty(1, parts.TOKENS, dtype=torch.int64, device=device), None
                continue
            tokens = self.tokenizer(
                [_cleaned(sentence)],
                padding="max_length",
                max_length=parts.TOKENS,
                truncation=True,
                return_tensors="pt",
            )
            yield tokens.input_ids.to(device), tokens.attention_mask.to(device)

    def load_codec(self, *, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> nn.Module:
        """A module without weights: pictures are denoised as they are."""
        return Pixels()

    def encode(self, codec: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
        """The pictures (B, 3, H, W) at each stage's size; a smaller picture has the means of squares of pixels."""
        size = pictures.shape[3], pictures.shape[2]
        return {
            denoiser.name: F.interpolate(pictures.float(), denoiser.shape(size)[1:], mode="area")
            for denoiser in self.denoisers
        }

    def decode(self, codec: nn.Module, latents: Tensor) -> Tensor:
        """The pictures, in [-1, 1]; not finite where the latents are not."""
        return latents.where(~latents.isfinite(), latents.clamp(-1, 1))

    def make_extra(self, denoiser: Denoiser, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """For stage II the pictures of stage I at its own size, without noise; see `SecondStage.drawn`."""
        if not denoiser.extra:
            return Conditioning({})
        assert lower is not None
        large = F.interpolate(lower.float(), size=(size[1], size[0]), mode="bilinear", align_corners=True)
        level = torch.zeros(len(large), dtype=torch.int64, device=large.device)
        return Conditioning({LOWER: large, LEVEL: level})

    def schedule_of(self, component: str) -> DiscreteSchedule:
        """A noise schedule in its stage's folder."""
        values = read_schedule(self.source, self.source, component, of_pixels=True)
        return DiscreteSchedule(values, self.source.owner(component))

    def shape(self, name: str, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of a stage's picture for a whole picture of this size."""
        shrinks = self._side // int(self.unet_configs[name]["sample_size"])
        return 3, size[1] // shrinks, size[0] // shrinks


class Pixels(nn.Module):
    """The codec: none."""


class FirstStage(DiffusersDenoiser):
    """Stage I, as a `Denoiser`.

    Of these UNets diffusers' gradient checkpointing recomputes the residual blocks alone.
    """

    name, title = FIRST, "UNet of stage I"
    names = PeftUNetNames(FIRST, IF_TARGETS)
    guided = True

    def __init__(self, family: DeepFloyd) -> None:
        self._family = family

    @cached_property
    def schedule(self) -> DiscreteSchedule:
        """The noise schedule of its training."""
        return self._family.schedule_of("scheduler")

    def shape(self, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of its picture for a whole picture of this size."""
        return self._family.shape(self.name, size)

    def load(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen UNet."""
        return self._family.load_unet(self.name, weights=weights, device=device, dtype=dtype)

    def use_xformers(self, network: nn.Module) -> None:
        """Switches the UNet's attention to xformers; the caller has checked that it runs."""
        for module in network.modules():
            if isinstance(module, Attention):
                both = module.added_kv_proj_dim is not None
                module.set_processor(XFormersAttnAddedKVProcessor() if both else XFormersAttnProcessor())

    def portable(self, adapter: Mapping[str, Factors], network: nn.Module) -> dict[str, Factors]:
        """The adapter with its scale in its factors, as peft's files have it."""
        return baked(adapter)

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The UNet's noise, without its variance, computed in channels-last layout, as cuDNN prefers."""
        noisy = x.to(memory_format=torch.channels_last)
        prediction: Tensor = network(noisy, at, encoder_hidden_states=given[EMBEDS]).sample
        return prediction[:, : x.shape[1]]


class SecondStage(FirstStage):
    """Stage II, as a `Denoiser`."""

    name, title = SECOND, "UNet of stage II"
    names = PeftUNetNames(SECOND, IF_TARGETS)
    guidance_share = 0.5
    """At the published pipelines' 7 for stage I it is their 4 for stage II."""
    follows_eta = False

    @cached_property
    def schedule(self) -> DiscreteSchedule:
        """The noise schedule of its training."""
        return self._family.schedule_of("scheduler_2")

    @cached_property
    def _noising(self) -> DiscreteSchedule:
        """The schedule of the noise over the picture to enlarge."""
        return self._family.schedule_of("image_noising_scheduler")

    @cached_property
    def extra(self) -> Mapping[str, Part]:  # type: ignore[override]
        """The picture to enlarge, at the whole picture's own size, and the level of its noise."""
        shape = self.shape(self._family.sizes.own)
        # Whole numbers: in bfloat16 most levels are not exact.
        return {
            LOWER: Part(shape, mixed=False, stored=None),
            LEVEL: Part((), mixed=False, stored=None, dtype=torch.int64),
        }

    def drawn(self, extra: Conditioning, generators: Sequence[torch.Generator], *, training: bool) -> Conditioning:
        """The picture to enlarge with noise, at a level drawn from the whole schedule in training."""
        levels, noise = [], []
        for generator in generators:
            levels.append(self._noising.positions(1, generator) if training else torch.tensor([SAMPLING_LEVEL]))
            noise.append(torch.randn(extra[LOWER].shape[1:], generator=generator))
        level = torch.cat(levels)
        return Conditioning({LOWER: self._noising.noised(extra[LOWER], torch.stack(noise), level), LEVEL: level})

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The UNet's noise, without its variance."""
        both = torch.cat([x, given[LOWER].to(x)], 1).to(memory_format=torch.channels_last)
        prediction: Tensor = network(both, at, encoder_hidden_states=given[EMBEDS], class_labels=given[LEVEL]).sample
        return prediction[:, : x.shape[1]]


def _cleaned(sentence: str) -> str:
    """A sentence as both pipelines clean it before they encode it.

    Their `clean_caption`, which needs two more packages, also takes out markup, addresses and file names.
    """
    return sentence.lower().strip()
