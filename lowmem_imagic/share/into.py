"""Edits in a pipeline of diffusers, through its own loader of LoRA files, which is peft's."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..diffusion.schedules import COARSE_SIDE, PATHS, coarse, guidance_at, refined, starting_noise, varied
from ..edits.edit import Edit, LoraFactors
from ..edits.layouts import KOHYA, PEFT
from ..edits.recorded import sampling_of
from ..errors import BaseMismatchError, ConfigError, PromptError
from ..families import pipelines
from ..families.adapter_names import TARGETS, KohyaNames
from ..families.conditioning import Conditioning
from ..families.portable import scaled_alike
from ..families.sdxl import DEPTHS
from ..layers.adapter_pack import Factors
from ..pictures.letterbox import from_canvas
from ..settings.stages import Strength, strengths

log = logging.getLogger(__name__)

_NAMES = KohyaNames()


class LoadedEdit:
    """An edit in a pipeline; made by `load_into`."""

    def __init__(self, pipeline: Any, edit: Edit, name: str) -> None:
        self.pipeline, self.edit, self.name = pipeline, edit, name
        [self._denoiser] = edit.adapters
        self._settings = sampling_of(edit)

    def at(self, eta: float, sentence: str | None = None, *, seed: int = 0, strength: Strength = 1.0) -> dict[str, Any]:
        """The arguments of the pipeline's call for a picture; makes this edit the pipeline's active adapter.

        They are the embeddings at `eta`, the recorded guidance and steps, the picture's size, and the starting latents.
        With the scheduler of :meth:`scheduler` the picture is that of this package with the mask off and no source
        prompt. Call the pipeline
        before another edit's `at`.

        Args:
            eta: 0 is the photo, 1 the sentence; below and above too.
            sentence: another sentence than the edit's first.
            seed: seed of the starting noise; 0 is the photo's own.
            strength: factor on the adapter: a number, or three for the blocks down, mid and up.

        Raises:
            PromptError: the edit has no sentence, and none is given.
            BaseMismatchError: the pipeline's text encoder is not that of the edit's base.
        """
        settings, pipeline = self._settings, self.pipeline
        asked = sentence if sentence is not None else self.edit.target_prompt
        if asked is None and eta:
            raise PromptError("this edit was trained without a sentence; give one")
        recorded = settings.scheduler.removesuffix("Scheduler")
        used = type(pipeline.scheduler).__name__.removesuffix("Scheduler")
        if used != recorded:
            log.warning("the edit was made for the scheduler %s, and the pipeline has %s", recorded, used)
        if settings.source_prompt and eta:
            log.warning(
                "the edit's own pictures have the source prompt %r, which a pipeline does not follow: it takes the "
                "path of embeddings",
                settings.source_prompt,
            )
        guidance = guidance_at(eta, settings.guidance_scale, settings.photo_guidance)
        if guidance < 1:
            log.warning("the edit's guidance there is %g, and pipelines have none below 1", guidance)
        self.activate(strength)
        start = self.edit.start_sentence
        target, negative = pipelines.encode(pipeline, asked if asked is not None else start, settings.negative_prompt)
        optimized = self._optimized(target)
        path = PATHS[settings.interpolation]
        mixed = {name: path(part.float(), optimized[name], eta).to(part) for name, part in target.items()}
        width, height = self.edit.source.size
        return {
            **pipelines.arguments(mixed, negative),
            "guidance_scale": guidance,
            "num_inference_steps": settings.num_inference_steps,
            "width": width,
            "height": height,
            "latents": self._start(seed).to(next(iter(target.values()))),
        }

    def activate(self, strength: Strength = 1.0) -> None:
        """Makes this edit the pipeline's only active adapter, at a strength."""
        self.pipeline.set_adapters(self.name)
        factors = strengths(strength)
        if set(factors) == {1.0}:
            return
        for module_name, module in self._network.named_modules():
            if hasattr(module, "set_scale"):
                module.set_scale(self.name, factors[_NAMES.block_of(module_name)])  # type: ignore[operator]

    def remove(self) -> None:
        """Takes the adapter out of the pipeline."""
        with warnings.catch_warnings():
            # peft warns that another adapter becomes active; `at` activates the one that it is called for.
            warnings.filterwarnings("ignore", "Adapter .* was active which is now deleted")
            self.pipeline.delete_adapters(self.name)

    def scheduler(self) -> Any:
        """The scheduler that the edit was made for, on the pipeline's noise schedule; the pipeline keeps its own.

        Raises:
            ModelError: the pipeline's noise schedule is not Stable Diffusion's.
        """
        return pipelines.scheduler(self.pipeline, self._settings.scheduler)

    def framed(self, picture: Image.Image) -> Image.Image:
        """The photo's part of a picture of the pipeline, at the photo's own size and aspect."""
        return from_canvas(picture, self.edit.source.letterbox)

    @property
    def _network(self) -> nn.Module:
        return pipelines.network(self.pipeline, self._denoiser)

    def _optimized(self, target: Conditioning) -> dict[str, Tensor]:
        """e_opt, one row, beside the sentence's embedding.

        Raises:
            BaseMismatchError: they have other shapes.
        """
        rows = {name: part.float()[None] for name, part in self.edit.conditioning.items()}
        shapes = [{name: tuple(part.shape) for name, part in parts.items()} for parts in (rows, target)]
        if shapes[0] != shapes[1]:
            raise BaseMismatchError(
                f"the edit's embedding has the shapes {shapes[0]}, the pipeline's text encoder gives {shapes[1]}; "
                f"use the edit's base, {self.edit.base.source}"
            )
        return {name: part.to(target[name].device) for name, part in rows.items()}

    def _start(self, seed: int) -> Tensor:
        """The starting latents (1, C, H, W) as the pipeline takes them, in fp32."""
        settings, edit = self._settings, self.edit
        shape = pipelines.latent_shape(self.pipeline, self._denoiser, edit.source.size)
        noise = starting_noise(shape, torch.Generator().manual_seed(seed))
        if settings.start == "inverted" and edit.noise:
            own = edit.noise[self._denoiser].float()
            if own.shape != noise.shape:
                raise BaseMismatchError(
                    f"the edit's own noise has the shape {tuple(own.shape)}, the pipeline's latents have {shape}; "
                    f"use the edit's base, {edit.base.source}"
                )
            noise = varied(own, noise, seed)
        below = None
        if settings.start != "noise":
            low = edit.coarse[self._denoiser].float()[None]
            below = refined(coarse(low, COARSE_SIDE), *shape[1:])
        sampler, factor = pipelines.sampler(self.pipeline, settings.num_inference_steps)
        return sampler.start(noise[None], below) / factor


def load_into(pipeline: Any, edit: Edit, name: str = "edit", *, hotswap_rank: int | None = None) -> LoadedEdit:
    """The edit, loaded into a pipeline of diffusers under a name.

    Args:
        pipeline: a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` of the edit's base.
        edit: the edit.
        name: a name for the adapter; several edits may be in one pipeline under several names.
        hotswap_rank: makes an adapter that others can take the place of at once, without a new compilation: it covers
            all layers in this rank, which is that of the largest edit. If the pipeline has such an adapter of this
            name, the edit takes its place.

    Raises:
        ConfigError: the name is in use, or the edit does not fit into the adapter that it is to replace.
        BaseMismatchError: the pipeline is of another base.
        WrongFamilyError: the pipeline is of another kind.
    """
    if len(edit.adapters) != 1:
        raise BaseMismatchError(
            f"the edit has {len(edit.adapters)} networks ({', '.join(edit.adapters)}), expected one, as pipelines "
            "have; each network's own `load_lora_adapter` reads its part of the edit file, by this prefix"
        )
    [(denoiser, adapter)] = edit.adapters.items()
    network = pipelines.network(pipeline, denoiser)
    _check_base(pipeline, edit, denoiser)
    if not name or "." in name:
        raise ConfigError(f"the adapter's name is {name!r}, expected one or more characters other than a point")
    used = name in pipeline.get_list_adapters().get(denoiser, ())
    if used and hotswap_rank is None:
        raise ConfigError(f"the pipeline has an adapter {name!r} already; give another name, or remove that one")
    factors: Mapping[str, Factors] = {
        key: (one.down.float(), one.up.float(), one.alpha) for key, one in adapter.items()
    }
    _check_shapes(edit, denoiser, network, factors)
    if hotswap_rank is not None:
        uniform = _uniform(factors, network, hotswap_rank)
        if used:
            _check_slot(network, name, hotswap_rank, uniform)
        state = _state(uniform)
    else:
        state = _state(scaled_alike(factors)) if edit.layout is KOHYA else _peft_state(adapter)
    with warnings.catch_warnings():
        # peft warns of a second adapter, which is what the caller asks for.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        pipeline.load_lora_weights(state, adapter_name=name, hotswap=used)
    loaded = LoadedEdit(pipeline, edit, name)
    loaded.activate()
    return loaded


def _check_slot(network: nn.Module, name: str, rank: int, factors: Mapping[str, Factors]) -> None:
    """Checks that the adapter of this name, which others are to take the place of, was loaded for that, in this rank.

    Raises:
        ConfigError: it has other layers, or another rank.
    """
    ranks = {_NAMES.key(path): layer.r.get(name) for path, layer in network.named_modules() if hasattr(layer, "lora_A")}
    there = {key: one for key, one in ranks.items() if one is not None}
    if there != dict.fromkeys(factors, rank):
        found = f"has rank {max(there.values())}" if there.keys() == factors.keys() else "covers other layers"
        raise ConfigError(
            f"the pipeline's adapter {name!r} was not loaded with hotswap_rank={rank}: it {found}; load each edit of "
            "this name with the same hotswap_rank, or remove that adapter"
        )


def _check_base(pipeline: Any, edit: Edit, denoiser: str) -> None:
    """Checks that the pipeline's network predicts what the edit's base does, and is no other Stable Diffusion XL.

    Raises:
        BaseMismatchError: it does not.
    """
    trained, here = edit.base.interface.denoisers[denoiser], pipelines.prediction_of(pipeline)
    if trained != here:
        raise BaseMismatchError(
            f"the edit was made for {edit.base.source}, which predicts {trained}; the pipeline predicts {here}"
        )
    # SSD-1B and Segmind-Vega have some of Stable Diffusion XL's layers, in its sizes.
    layers = getattr(pipeline, denoiser).config.get("transformer_layers_per_block")
    kind = DEPTHS.get(str(list(layers)[1:])) if isinstance(layers, (list, tuple)) else None
    if kind is not None and edit.base.family in DEPTHS.values() and kind != edit.base.family:
        raise BaseMismatchError(
            f"the edit was made for {edit.base.source}, a {edit.base.family}; the pipeline is {kind}"
        )


def _check_shapes(edit: Edit, denoiser: str, network: nn.Module, factors: Mapping[str, Factors]) -> None:
    """Checks that every factor fits its layer in the pipeline.

    Raises:
        BaseMismatchError: a layer is missing, or of another size.
    """
    key_of = _NAMES.key if edit.layout is KOHYA else (lambda layer: f"{denoiser}.{layer}")
    layers = {key_of(name): _sides(layer) for name, layer in network.named_modules()}
    for key, (down, up, _) in factors.items():
        sides = (down.shape[1], up.shape[0])
        if layers.get(key) != sides:
            there = "no such layer" if layers.get(key) is None else f"one of {layers[key]}"
            raise BaseMismatchError(
                f"the edit was made for {edit.base.source} and does not fit this pipeline: {key} maps {sides[0]} to "
                f"{sides[1]} numbers, the pipeline has {there}"
            )


def _sides(layer: nn.Module) -> tuple[int, int] | None:
    """Numbers into and out of a layer, which may have adapters already; None for other modules."""
    layer = getattr(layer, "base_layer", layer)
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return (layer.in_channels, layer.out_channels) if isinstance(layer, nn.Conv2d) else None


def _uniform(factors: Mapping[str, Factors], network: nn.Module, rank: int) -> dict[str, Factors]:
    """The same update on all layers that edits adapt, each in this rank with alpha equal to it.

    Raises:
        ConfigError: a layer has a higher rank, or is none of these.
    """
    largest = max(down.shape[0] for down, _, _ in factors.values())
    if largest > rank:
        raise ConfigError(f"hotswap_rank is {rank}, and the edit has layers of rank {largest}; load with that rank")
    layers = {
        _NAMES.key(name): getattr(layer, "base_layer", layer)
        for name, layer in network.named_modules()
        if name.endswith(tuple(f".{ending}" for ending in TARGETS["all"])) and _sides(layer)
    }
    if beyond := sorted(factors.keys() - layers.keys()):
        raise ConfigError(f"the edit adapts {beyond[0]}, which is not among the layers for hot-swapping")
    return {key: _padded(factors.get(key), layer, rank) for key, layer in layers.items()}


def _padded(factors: Factors | None, layer: nn.Module, rank: int) -> Factors:
    """Factors of a rank with alpha equal to it, of the same update, or of none, on a layer."""
    into, out = _sides(layer) or (0, 0)
    kernel = layer.kernel_size if isinstance(layer, nn.Conv2d) else ()
    down, up = torch.zeros(rank, into, *kernel), torch.zeros(out, rank, *(1 for _ in kernel))
    if factors is not None:
        own = len(factors[0])
        root = (factors[2] / own) ** 0.5
        down[:own], up[:, :own] = (
            root * factors[0].view(own, into, *kernel),
            root * factors[1].view(out, own, *up.shape[2:]),
        )
    return down, up, float(rank)


def _state(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """Factors by kohya key as the tensors of a file."""
    state: dict[str, Tensor] = {}
    for key, (down, up, alpha) in factors.items():
        state |= {f"{key}.{part}": x for part, x in zip(KOHYA.parts, (down, up, torch.tensor(alpha)), strict=True)}
    return state


def _peft_state(adapter: Mapping[str, LoraFactors]) -> dict[str, Tensor]:
    """Factors by peft's key, whose alpha is their rank, as the tensors of a file."""
    state: dict[str, Tensor] = {}
    for key, factors in adapter.items():
        state |= {f"{key}.{part}": x.float() for part, x in zip(PEFT.parts, (factors.down, factors.up), strict=True)}
    return state
