"""FLUX.2 klein: a flow transformer, with Qwen3 as its text encoder and latents of 2 x 2 patches.

A sentence is one tensor: the outputs of three layers of the text encoder side by side, for the sentence in the chat's
form and padding behind it. The transformer attends to the padding, which depends on the sentence, too. Stage 1 trains
the sentence's own rows, and an edit file holds these alone.

The base predicts the velocity of a rectified flow. Its siblings of few steps are distilled from it: they render edits
of the base, and cannot be trained.

Source: ``Flux2KleinPipeline`` of diffusers (0.37 to 0.42).
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2TokenizerFast

from ..diffusion.flow import Flow
from ..edits.identity import BaseIdentity, Interface
from ..errors import IncompleteModelError, PromptError, WrongFamilyError
from ..geometry import Size, Sizes
from ..layers.adapter_pack import Factors
from ..layers.frozen import load_frozen
from ..settings.stages import BLOCKS
from ..unexpected import without_advice
from . import flux2_parts as parts
from .adapter_names import peft_key
from .conditioning import Conditioning, Part
from .denoiser import DiffusersDenoiser
from .family import Denoiser, Loaded
from .files.layout import Tensors
from .files.source import Folder
from .files.transformer_file import TransformerFile
from .flux2_parts import TEXT_ENCODER, TOKENIZER, TOKENS, TRANSFORMER, VAE
from .lean_flux2 import make_lean
from .loading import check_fit, complete, fill, freeze_text_encoder, tokenizer_files
from .portable import baked

EMBEDS, OWN = "embeds", "own"
"""Names of the parts of a sentence's conditioning: its rows, and the mark of those that are its own."""
_WIDTH = 7680
"""Width of the text of the model with 4 billion weights."""
OWN_PX = 512
"""Side of the square with as many pixels as an edited picture: 21 TFLOP a row in training, where 1024 px takes 80. The
model was trained on sizes up to 2048 px."""
LEAST_PX = 256
"""Shortest side of edited pictures, except for models trained on smaller pictures."""
PATCH = 2
"""Latent pixels of a patch, each way."""
AT_LATENTS = ("x_embedder", "proj_out")
"""The transformer's layers from and to the latents."""
_SINGLE = "single_transformer_blocks"
_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
_TURN = 4300
"""Places of a picture from which on the shift does not depend on the steps."""


def shift(places: int, steps: int) -> float:
    """The shift of sampling's positions: a line in the number of places, which moves with the number of steps.

    Source: ``compute_empirical_mu`` of diffusers and of Black Forest Labs.
    """
    many, few = 0.00016927 * places + 0.45666666, 8.73809524e-05 * places + 1.89833333
    return many if places > _TURN else many + (many - few) * (steps - 200) / 190


class Flux2Klein:
    """The parts of one FLUX.2 klein, each loaded on request and owned by the caller.

    Raises:
        WrongFamilyError: another kind of model (FLUX.2 dev).
        IncompleteModelError: parts are missing.
    """

    group = "flow"
    vocabulary = None
    text_in_fp16 = False
    codec_in_fp16 = False

    def __init__(self, source: Folder | TransformerFile) -> None:
        self.source = source
        self._folder = source if isinstance(source, Folder) else source.configuration
        self._index = self._folder.config(".", "model_index.json")
        parts.check_pipeline(self._index, self._folder.label)
        parts.check_schedule(self._folder)
        self.transformer_config = parts.transformer(self._folder)
        self._vae_config = parts.vae(self._folder)
        self._text_config = parts.text_encoder(self._folder)
        width = len(parts.LAYERS) * self._text_config["hidden_size"]
        channels = self._vae_config["latent_channels"] * PATCH**2
        takes = self.transformer_config["joint_attention_dim"], self.transformer_config["in_channels"]
        if takes != (width, channels):
            raise IncompleteModelError(
                f"{self._folder.label} has a transformer for text of width {takes[0]} and latents of {takes[1]} "
                f"channels; its text encoder gives {width}, its autoencoder {channels}; download it again"
            )

    @property
    def family(self) -> str:
        """``flux2-klein``; ``flux2-klein-<width>`` for models of the same architecture in another size."""
        width = self.transformer_config["joint_attention_dim"]
        return "flux2-klein" if width == _WIDTH else f"flux2-klein-{width}"

    @cached_property
    def distilled(self) -> str:
        """A sign that the model is made for few steps without guidance; "" if there is none."""
        if isinstance(self.source, TransformerFile):
            return self.source.distilled
        return "is_distilled in its model_index.json" if self._index.get("is_distilled") else ""

    @property
    def factor(self) -> int:
        """Picture pixels per place of the transformer's input, each way."""
        return int(PATCH * 2 ** (len(self._vae_config["block_out_channels"]) - 1))

    @property
    def sizes(self) -> Sizes:
        """A square of `OWN_PX`, less for a model of smaller pictures, and sizes of at most as many pixels."""
        side = min(OWN_PX, int(self._vae_config["sample_size"]))
        return Sizes((side, side), self.factor, max(side // 2, min(side, LEAST_PX)))

    @cached_property
    def denoisers(self) -> Sequence[Denoiser]:
        """The transformer, the only denoiser."""
        return (Transformer(self),)

    @property
    def text(self) -> Mapping[str, Part]:
        """The conditioning of a sentence: its rows (T, D), padding included, and which are its own.

        In bfloat16: the states of language models have numbers beyond fp16.
        """
        width = int(self.transformer_config["joint_attention_dim"])
        return {
            EMBEDS: Part((TOKENS, width), trained=True, stored=torch.bfloat16, own_rows=OWN),
            OWN: Part((TOKENS,), mixed=False, stored=None, dtype=torch.bool),
        }

    def check_trainable(self) -> None:
        """Checks that the model is not distilled.

        Raises:
            WrongFamilyError: it is.
        """
        if sign := self.distilled:
            raise WrongFamilyError(
                f"{self.source.label} is made for few steps without guidance ({sign}), which training would "
                "undo: train on its base (`model=klein`), and render that edit with this model"
            )

    @property
    def identity(self) -> BaseIdentity:
        """Identity of this base, with the hashes of its files."""
        return BaseIdentity(
            source=self.source.label,
            revision=self.source.revision,
            family=self.family,
            interface=Interface(text={EMBEDS: self.text[EMBEDS].shape[-1]}, denoisers={TRANSFORMER: "flow"}),
            files=self.source.hashes,
        )

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, which knows the chat's form."""
        files, settings = tokenizer_files(self._folder, TOKENIZER)
        with without_advice(), complete(self._folder.label, TOKENIZER):
            tokenizer = Qwen2TokenizerFast.from_pretrained(files, local_files_only=True, **settings)
            if max(tokenizer.get_vocab().values()) >= self._text_config["vocab_size"]:
                raise ValueError(f"it has words beyond the {self._text_config['vocab_size']} of the text encoder")
            if "a cube" not in _chat(tokenizer, "a cube"):
                raise ValueError("its chat template leaves the sentence out")
            _, own = _padded(tokenizer, "a cube")
            if not own[0] or own[-1] or bool(own.diff().sum() > 1):
                raise ValueError("it does not pad behind the sentence")
        return tokenizer

    @property
    def sentence_tokens(self) -> int:
        """Most tokens of a sentence, without those of the chat's form."""
        return TOKENS - len(self.tokenizer(_chat(self.tokenizer, "")).input_ids)

    def check_prompt(self, prompt: str) -> str:
        """The words of `prompt` that do not fit into the text encoder ("" if all do).

        Raises:
            PromptError: there is nothing to encode.
        """
        if not prompt.strip():
            raise PromptError('the sentence is empty; say what the picture should show, such as "a blue cube"')
        ids = self.tokenizer(prompt, truncation=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[self.sentence_tokens :]).strip())

    def load_text_encoder(self, name: str, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The first layers of Qwen3, see `freeze_text_encoder`."""
        encoder = parts.build(TEXT_ENCODER, self._text_config, self._folder.label)
        tensors = self._tensors(TEXT_ENCODER, encoder, device)
        with self._fitting(TEXT_ENCODER):
            freeze_text_encoder(encoder, tensors, table="embed_tokens", weights=weights, device=device, dtype=dtype)
        return encoder

    @torch.no_grad()
    def encode_text(self, sentences: Sequence[str], loaded: Loaded) -> Conditioning:
        """The rows (B, T, D) of sentences, and the mark of their own; the empty sentence is encoded like any other."""
        rows, owns = list[Tensor](), list[Tensor]()
        with loaded(TEXT_ENCODER) as encoder:
            device = next(encoder.parameters()).device
            causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=device).tril()
            for sentence in sentences:
                ids, own = self._ids(sentence, device)
                rows.append(parts.text_states(encoder, ids[None], (causal & own)[None, None]))
                owns.append(own)
        return Conditioning({EMBEDS: torch.cat(rows), OWN: torch.stack(owns)})

    def _ids(self, sentence: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The token ids (T,) of a sentence and the mark of its own; on the meta device it is not read."""
        if device.type == "meta":
            return tuple(torch.empty(TOKENS, dtype=kind, device=device) for kind in (torch.int64, torch.bool))  # type: ignore[return-value]
        ids, own = _padded(self.tokenizer, sentence)
        return ids.to(device), own.to(device)

    def load_codec(self, *, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> nn.Module:
        """The frozen autoencoder; with `tiling` it works in overlapping quarters, in a fraction of the memory.

        The statistics of its latents stay in fp32.
        """
        vae: Any = parts.build(VAE, self._vae_config, self._folder.label)
        if device.type == "meta":
            with without_advice():
                vae.to(device, dtype).requires_grad_(False).eval()
        else:
            tensors, names = self._checked(VAE, vae)
            fill(vae, tensors, names, device, dtype, in_fp32=("bn.",))
        if device.type == "cuda":
            # cuDNN computes in this layout; from another one it would copy every tensor.
            vae.to(memory_format=torch.channels_last)
        if tiling:
            vae.enable_tiling()
            # diffusers' own tiles have the size of a whole picture.
            side = self.sizes.own[0] // 2
            vae.tile_sample_min_size, vae.tile_latent_min_size = side, side * PATCH // self.factor
        return vae  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, codec: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
        """Latents (B, 4 C, H/f, W/f) in fp32 of pictures (B, 3, H, W) in [-1, 1]: the posterior's means in patches, at
        mean 0 and variance 1 in each channel."""
        like, (mean, deviation) = next(codec.parameters()), self._statistics(codec)
        means = torch.cat([codec.encode(x[None].to(like)).latent_dist.mode() for x in pictures])  # type: ignore[operator]
        return {TRANSFORMER: (_patches(means.float()) - mean) / deviation}

    @torch.no_grad()
    def decode(self, codec: nn.Module, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], in fp32, decoded one by one to limit memory.

        Not finite if the autoencoder overflows in its type.
        """
        like, (mean, deviation) = next(codec.parameters()), self._statistics(codec)
        whole = _pixels(latents.to(like.device, torch.float32) * deviation + mean)
        images = torch.cat([codec.decode(z[None].to(like)).sample for z in whole]).float()  # type: ignore[operator]
        # Clamping would hide an overflow to infinity, so infinite values stay.
        return images.where(~images.isfinite(), images.clamp(-1, 1))

    def _statistics(self, codec: Any) -> tuple[Tensor, Tensor]:
        """Mean and deviation (1, C, 1, 1) of each channel of the patches, in fp32."""
        mean, variance = codec.bn.running_mean.float(), codec.bn.running_var.float()
        deviation = (variance + self._vae_config["batch_norm_eps"]).sqrt()
        return mean.view(1, -1, 1, 1), deviation.view(1, -1, 1, 1)

    def make_extra(self, denoiser: Denoiser, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """Empty: the transformer takes only the text."""
        return Conditioning({})

    def load_transformer(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen transformer with weights in a format of `settings.stages.WEIGHT_FORMATS`, in eval mode."""
        network = parts.build(TRANSFORMER, self.transformer_config, self._folder.label)
        tensors = self._tensors(TRANSFORMER, network, device)
        with self._fitting(TRANSFORMER):
            load_frozen(network, tensors, weights=weights, device=device, dtype=dtype, in_float=AT_LATENTS)
        make_lean(network)
        return network

    def _tensors(self, component: str, part: nn.Module, device: torch.device) -> Any:
        """The tensors of a part under its names, checked against it; its own on the meta device."""
        if device.type == "meta":
            return list(part.named_parameters())
        return self._checked(component, part)[0]

    def _checked(self, component: str, part: nn.Module) -> tuple[Tensors, dict[str, str]]:
        """The tensors of a part, and the part's name of each.

        Raises:
            IncompleteModelError: they do not fit the part.
        """
        alone = isinstance(self.source, TransformerFile) and component == TRANSFORMER
        tensors = self.source.tensors() if alone else parts.tensors_of(self._folder, component)  # type: ignore[union-attr]
        return tensors, check_fit(part, tensors, f"{self.source.label}: the {component}", self._folder.label)

    def _fitting(self, component: str) -> Any:
        """The context in which a part gets its weights."""
        return complete(self.source.label, component)


def _chat(tokenizer: Any, sentence: str) -> str:
    """A sentence in the chat's form, as the pipeline has it: without a thought before the answer."""
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": sentence}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def _padded(tokenizer: Any, sentence: str) -> tuple[Tensor, Tensor]:
    """Token ids (T,) of a sentence in the chat's form, padded to `TOKENS`, and the mark of its own."""
    encoded = tokenizer(
        _chat(tokenizer, sentence), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
    )
    return encoded.input_ids[0], encoded.attention_mask[0].bool()


def _patches(latents: Tensor) -> Tensor:
    """Latents (B, C, H, W) as patches of 2 x 2 pixels (B, 4 C, H/2, W/2)."""
    return nn.functional.pixel_unshuffle(latents, PATCH)


def _pixels(patches: Tensor) -> Tensor:
    """`_patches` undone."""
    return nn.functional.pixel_shuffle(patches, PATCH)


class Names:
    """Names of the transformer's layers, with peft's keys.

    Its blocks are no encoder and decoder: the double blocks count as the first of `BLOCKS`, and each half of the single
    blocks as one of the others. That is a choice, not a finding.

    Args:
        singles: number of single blocks.
    """

    def __init__(self, singles: int) -> None:
        self._singles = singles
        # In the double blocks `to_out` is a list with a dropout in it, so the single blocks' are named one by one.
        outs = tuple(f"{_SINGLE}.{number}.attn.to_out" for number in range(singles))
        attention = (*_ATTENTION, "to_qkv_mlp_proj", *outs)
        both = (*attention, *_FEED_FORWARD)
        self.targets: Mapping[str, Sequence[str]] = {"attn": attention, "attn+ff": both, "all": both}

    def key(self, layer: str) -> str:
        """The key of a layer in a file."""
        return peft_key(TRANSFORMER, layer)

    def block_of(self, layer: str) -> int:
        """The index in `BLOCKS` of a layer's part of the transformer; layers outside the blocks are in the first."""
        if not layer.startswith(f"{_SINGLE}."):
            return BLOCKS.index("down")
        return BLOCKS.index("mid" if 2 * int(layer.split(".")[1]) < self._singles else "up")


class Transformer(DiffusersDenoiser):
    """The transformer of a FLUX.2 klein, as a `Denoiser`."""

    name = TRANSFORMER
    title = "transformer"

    def __init__(self, family: Flux2Klein) -> None:
        self._family = family
        self.schedule = Flow(shift)
        self.names = Names(family.transformer_config["num_single_layers"])

    @property
    def guided(self) -> bool:
        """Whether a negative sentence has an effect: not for a distilled model."""
        return not self._family.distilled

    def shape(self, size: Size) -> tuple[int, int, int]:
        """(C, H, W) of the patches of a picture of this size."""
        factor = self._family.factor
        return int(self._family.transformer_config["in_channels"]), size[1] // factor, size[0] // factor

    def load(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The frozen transformer."""
        return self._family.load_transformer(weights=weights, device=device, dtype=dtype)

    def use_xformers(self, network: nn.Module) -> None:
        """Switches the transformer's attention to xformers; the caller has checked that it runs."""
        transformer: Any = network
        transformer.set_attention_backend("xformers")

    def portable(self, adapter: Mapping[str, Factors], network: nn.Module) -> dict[str, Factors]:
        """The adapter with its scale in the factors, as peft's files have it."""
        return baked(adapter)

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The velocity; a gradient reaches the sentence's own rows alone."""
        text = given[EMBEDS]
        if text.requires_grad:
            text = text.where(given[OWN][..., None], text.detach())
        return parts.velocity(network, x, at, text)
