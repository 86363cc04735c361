"""Stable Diffusion XL: two text encoders, a vector of the whole sentence, and the picture's size as conditioning.

A sentence is two tensors: the tokens of both text encoders side by side, each from the layer before its last and
without the final normalisation, and the second encoder's vector of the whole sentence. The UNet also takes six numbers:
the original height and width, the top and left side of the crop, and the height and width to make. They are those of
the edited picture, without a crop, in training and in sampling, as diffusers' pipeline has them by default.

Source: ``StableDiffusionXLPipeline`` of diffusers (0.36 to 0.42); Podell et al. 2023, arXiv 2307.01952, section 2.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import IncompleteModelError, WrongFamilyError
from ..geometry import Size, Sizes
from . import kinds
from .conditioning import Conditioning, Part
from .family import Denoiser, Loaded
from .stable_diffusion import EMBEDS, StableDiffusion, UNet

POOLED = "pooled"
"""Name of the vector of a whole sentence."""
SIZES = "time_ids"
"""Name of the six numbers about a picture's size."""
_FIRST, _SECOND = "text_encoder", "text_encoder_2"
_ENCODERS = {_FIRST: "tokenizer", _SECOND: "tokenizer_2"}
_WIDTH = 2048
"""Width of the tokens of SDXL and its descendants."""
DEPTHS = {"[2, 10]": "sdxl", "[[2, 2], [4, 4]]": "ssd-1b", "[[1, 1], [2, 2]]": "vega"}
"""Family by the transformer layers of the second and third block; the first block has none. The adapters of one family
do not fit another: SSD-1B and Segmind-Vega are SDXL with fewer layers."""
_BUCKETS = 16
"""Steps of a bucket's side in the side of the model's square: SDXL was trained on sides of multiples of 64 px."""


class StableDiffusionXL(StableDiffusion):
    """The parts of one Stable Diffusion XL, each loaded on request and owned by the caller.

    Raises:
        WrongFamilyError: another kind of model (the refiner, inpainting, editing by instructions).
        IncompleteModelError: parts are missing.
    """

    encoders = _ENCODERS
    group = "large"
    reads_before_last = True

    def _check_text(self) -> None:
        """Checks that both text encoders read sentences of one length.

        Raises:
            IncompleteModelError: they do not.
        """
        first, second = (values["max_position_embeddings"] for values in self.text_configs.values())
        if first != second:
            raise IncompleteModelError(
                f"{self._folder.label} has text encoders for {first} and {second} tokens, expected the same number; "
                "download it again"
            )

    def _check_unet(self, values: Mapping[str, Any]) -> None:
        """Checks that the UNet takes what both text encoders give, and the picture's size.

        Raises:
            WrongFamilyError: it does not.
        """
        first, second = self.text_configs.values()
        kinds.check_xl_unet(
            values,
            self.source.label,
            latent_channels=self.vae_config["latent_channels"],
            text=first["hidden_size"] + second["hidden_size"],
            pooled=second["projection_dim"],
        )
        if any(self.vae_config.get(key) is not None for key in ("latents_mean", "latents_std")):
            raise WrongFamilyError(
                f"{self.source.label} shifts and scales its latents by channel (latents_mean, as in Playground 2.5), "
                "which is not supported; take another SDXL"
            )

    @cached_property
    def family(self) -> str:
        """``sdxl``, ``ssd-1b`` or ``vega``; ``sdxl-<width>`` for models of the same architecture in another size."""
        layers = self.unet_config["transformer_layers_per_block"]
        name = DEPTHS.get(str(layers[1:])) if isinstance(layers, list) else None
        return name if name and self.cross_attention_dim == _WIDTH else f"sdxl-{self.cross_attention_dim}"

    @property
    def sizes(self) -> Sizes:
        """SDXL's buckets: sides of multiples of a sixteenth of its square's (64 px), and 0.9 to 1 times its pixels.

        Source: appendix I of arXiv 2307.01952, which lists all of these up to an aspect of 4 to 1, and no other.
        """
        plain = super().sizes
        multiple = max(1, plain.own[0] // _BUCKETS // plain.multiple) * plain.multiple
        return replace(plain, multiple=multiple, fewest=-(-9 * plain.own[0] * plain.own[1] // 10))

    @cached_property
    def denoisers(self) -> Sequence[Denoiser]:
        """The UNet, the only denoiser."""
        return (XLUNet(self),)

    @property
    def text(self) -> Mapping[str, Part]:
        """The conditioning of a sentence: tokens (T, D) and the vector of the whole sentence."""
        tokens, pooled = super().text, self.text_configs[_SECOND]["projection_dim"]
        return {**tokens, POOLED: Part((pooled,), trained=True)}

    @property
    def labels(self) -> dict[str, str]:
        """Header entries that tell other programs the kind of the base; none for models of another size."""
        if self.family not in DEPTHS.values():
            return {}
        return {
            "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_v2": "False",
        }

    @torch.no_grad()
    def encode_text(self, sentences: Sequence[str], loaded: Loaded) -> Conditioning:
        """Tokens (B, T, D) and vectors (B, P), in the text encoders' type; zeros for the empty sentence.

        SDXL learnt guidance against zeros (``force_zeros_for_empty_prompt``; as in diffusers, a base that does not say
        has it on). A base that has it off encodes the empty sentence.
        """
        with loaded(_FIRST) as encoder:
            first = [_before_last(states) for states in self._read(_FIRST, encoder, sentences)]
        with loaded(_SECOND) as encoder:
            rows = [(_before_last(s), s.text_embeds) for s in self._read(_SECOND, encoder, sentences)]
        second, pooled = (torch.cat(parts) for parts in zip(*rows, strict=True))
        text = Conditioning({EMBEDS: torch.cat([torch.cat(first), second], -1), POOLED: pooled})
        empty = [number for number, sentence in enumerate(sentences) if not sentence]
        if empty and self._model_index.get("force_zeros_for_empty_prompt", True):
            for part in text.values():
                part[empty] = 0
        return text

    def _read(self, name: str, encoder: nn.Module, sentences: Sequence[str]) -> Iterator[Any]:
        """Yields a text encoder's output for each sentence alone, with the states of all its layers."""
        for ids in self._ids(name, encoder, sentences):
            yield encoder(ids, output_hidden_states=True)

    @property
    def codec_in_fp16(self) -> bool:
        """Whether the autoencoder's numbers fit into fp16: not those of SDXL's own (``force_upcast``)."""
        return not self.vae_config["force_upcast"]

    def make_extra(self, denoiser: Denoiser, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """The picture's own height and width, no crop, and the same height and width to make."""
        width, height = size
        sizes = torch.tensor([height, width, 0, 0, height, width])
        return Conditioning({SIZES: sizes.expand(count, -1)})


class XLUNet(UNet):
    """The UNet of a Stable Diffusion XL, as a `Denoiser`."""

    # Whole numbers: in bfloat16 most sizes are not exact.
    extra: Mapping[str, Part] = {SIZES: Part((6,), mixed=False, stored=None, dtype=torch.int64)}

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The UNet's prediction, computed in channels-last layout, as cuDNN prefers."""
        noisy = x.to(memory_format=torch.channels_last)
        beside = {"text_embeds": given[POOLED], "time_ids": given[SIZES]}
        prediction: Tensor = network(noisy, at, encoder_hidden_states=given[EMBEDS], added_cond_kwargs=beside).sample
        return prediction


def _before_last(states: Any) -> Tensor:
    """The tokens (1, T, D) of the layer before the last; Stable Diffusion 1 and 2 take the last, normalised."""
    tokens: Tensor = states.hidden_states[-2]
    return tokens
