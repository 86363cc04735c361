"""Settings of the three stages as frozen values, with their valid ranges.

All problems of a set of settings are reported at once (`ConfigError.problems`). Passes are counted as
forward-and-backward passes of one row through the UNet: ``steps * draws``.
"""

import re
import reprlib
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..errors import ConfigError

ADAPT_TARGETS = ("attn", "attn+ff", "all")
"""This package's names for the layers an adapter may cover: attention; plus feed-forward and projections; plus every
convolution."""
ALL_LINEAR = "all-linear"
"""peft's name for every linear layer."""
MAX_EXPRESSION = 1000
"""Characters of an expression that chooses layers."""
_ENDINGS = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*(, *[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*)*")
WEIGHT_FORMATS = ("int8", "nf4", "bnb-int8", "bf16", "fp32")
"""Formats of the frozen network. ``int8`` and ``nf4``: `layers.frozen`. ``bnb-int8``: stock bitsandbytes, linear layers
only. ``bf16`` and ``fp32``: every weight in the type of the arithmetic, which is then the named one."""
_UNQUANTISED = ("bf16", "fp32")
ONE_AT_A_TIME = ("bnb-int8",)
"""Formats whose edits train one after the other: stock bitsandbytes rounds the input of a layer to 8 bits, too, so that
last bits, which depend on the size of a batch, become whole steps."""
ATTENTION = ("auto", "xformers", "sdpa")
COMPUTE = ("auto", "bf16", "fp16", "fp32")
_DEVICE = re.compile("auto|cpu|cuda(:[0-9]{1,3})?")
MAX_RANK = 256
MAX_ALPHA = 10_000
MAX_VALUES = 256
"""Most etas, and most seeds, of one edit."""
MAX_PICTURES = 1024
"""Most pictures of one edit at once, etas times seeds; an edit file may ask for them."""
MAX_PHOTO_PIXELS = 100_000_000
MAX_PHOTO_SIDE_PX = 1_000_000
MAX_MODEL_SIDE_PX = 4096
"""Largest side of the pictures that a model is made for."""
MAX_SEED = 2**63 - 1
ETA_RANGE = (-1.0, 3.0)
STRENGTH_RANGE = (0.0, 2.0)
INTERPOLATIONS = ("linear", "projection")
"""Paths from e_opt to e_tgt; see `diffusion.schedules.PATHS`."""
BLOCKS = ("down", "mid", "up")
"""Parts of the UNet with a strength of their own: encoder, middle, decoder."""
STARTS = ("noise", "photo", "inverted")
"""Starting latents of sampling: pure noise, as in the paper; noise over the photo's low frequencies; or the photo's own
noise over them, from inverting the photo with the base (see `sampling.inversion`)."""

Strength = float | tuple[float, float, float]
"""Factor on an adapter: 1 as trained, 0 the base alone; one number, or one for each of `BLOCKS` (encoder: layout,
decoder: appearance; Forgedit's "forgetting", arXiv 2309.10556, as a scale)."""


def strengths(value: Strength) -> tuple[float, float, float]:
    """The factor for each of `BLOCKS`."""
    return value if isinstance(value, tuple) else (value, value, value)


def base_problems(*, device: str, weights: str | None, attention: str, compute: str = "auto") -> list[str]:
    """The problems of the options of a base; None for `weights` is valid."""
    problems = []
    if not _DEVICE.fullmatch(device):
        problems.append(f"`device` is {device!r}, expected one of auto, cuda, cpu or cuda:N")
    if weights is not None and weights not in WEIGHT_FORMATS:
        problems.append(f"`base_weights` is {weights!r}, expected one of {', '.join(WEIGHT_FORMATS)}")
    if attention not in ATTENTION:
        problems.append(f"`attention` is {attention!r}, expected one of {', '.join(ATTENTION)}")
    if compute not in COMPUTE:
        problems.append(f"`compute` is {compute!r}, expected one of {', '.join(COMPUTE)}")
    elif weights in _UNQUANTISED and compute not in ("auto", weights):
        # The weights would be rounded to the type of the arithmetic, or take more memory than their format.
        problems.append(
            f"`compute` is {compute!r} and `base_weights` is {weights!r}, expected the same type, as a base in "
            f"{' or '.join(_UNQUANTISED)} computes in it; leave `compute` out, or take `base_weights=int8`"
        )
    return problems


def peft_targets(adapt: str) -> str | tuple[str, ...]:
    """The ``target_modules`` of peft for an expression that is not in `ADAPT_TARGETS`.

    Names separated by commas, such as ``to_q,to_v``, are endings of layers' names. Anything else is a regular
    expression for the whole name of a layer, or `ALL_LINEAR`.
    """
    return tuple(adapt.replace(" ", "").split(",")) if _ENDINGS.fullmatch(adapt) else adapt


def strength_text(value: Strength) -> str:
    """The strength as text for people."""
    if not isinstance(value, tuple):
        return f"{value:g}"
    return " ".join(f"{block}={factor:g}" for block, factor in zip(BLOCKS, value, strict=True))


def _within(value: object, low: float, high: float, whole: bool) -> bool:
    """Whether `value` is a number of the right kind in the closed range; NaN never is."""
    return isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and low <= value <= high


_DROPPED_FROM_TRAINING = {"max_grad_norm": 0.0, "patience": 0, "min_improvement": 0.01, "average": 0.0}
DROPPED: dict[str, dict[str, float]] = {
    "embed": _DROPPED_FROM_TRAINING,
    "finetune": {**_DROPPED_FROM_TRAINING, "weight_decay": 0.0, "embedding_learning_rate": 0.0},
    "sample": {"ddim_eta": 0.0, "release": 0.0, "hold": 0.0},
}
"""Settings of earlier versions, by stage, each with its neutral value. Measurements showed no gain from them
(docs/scene_edits_1.md). Files with these settings are still read."""


class _Check:
    """Collects the problems of the fields of one settings value."""

    def __init__(self, owner: object) -> None:
        self._owner, self.problems = owner, list[str]()

    def number(self, name: str, low: float, high: float, *, whole: bool = False, above: bool = False) -> None:
        value = getattr(self._owner, name)
        kind = "a whole number" if whole else "a number"
        if not _within(value, low, high, whole) or (above and value == low):
            limits = f"above {low:g} and up to {high:g}" if above else f"from {low:g} to {high:g}"
            self.problems.append(f"`{name}` is {reprlib.repr(value)}, expected {kind} {limits}")

    def numbers(self, name: str, low: float, high: float, *, whole: bool = False) -> None:
        values = getattr(self._owner, name)
        if not isinstance(values, tuple) or not 1 <= len(values) <= MAX_VALUES:
            value = f"{len(values)} values" if isinstance(values, tuple) else reprlib.repr(values)
            self.problems.append(f"`{name}` has {value}, expected 1 to {MAX_VALUES} numbers")
            return
        for value in values:
            if not _within(value, low, high, whole):
                kind = "whole numbers" if whole else "numbers"
                self.problems.append(f"`{name}` has {reprlib.repr(value)}, expected {kind} from {low:g} to {high:g}")

    def choice(self, name: str, allowed: Iterable[str]) -> None:
        value = getattr(self._owner, name)
        if value not in tuple(allowed):
            self.problems.append(f"`{name}` is {reprlib.repr(value)}, expected one of {', '.join(allowed)}")

    def expression(self, name: str) -> None:
        value = getattr(self._owner, name)
        try:
            if not isinstance(value, str) or not 0 < len(value) <= MAX_EXPRESSION:
                raise re.error("no text of a usual length")
            re.compile(value)
        except re.error as error:
            expected = f"{', '.join(ADAPT_TARGETS)}, endings of layers' names, or a regular expression for a whole name"
            self.problems.append(f"`{name}` is {reprlib.repr(value)} ({error}), expected {expected}")

    def done(self) -> None:
        if self.problems:
            raise ConfigError(self.problems)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """The settings that both training stages share: Adam on the denoising loss, several draws a step."""

    steps: int
    """Optimiser steps."""
    learning_rate: float
    """Adam's step size."""
    draws: int = 8
    """(timestep, noise) draws per edit and step; timesteps are stratified over the schedule. Paper: 1."""
    timesteps: tuple[float, float] = (0.0, 1.0)
    """Part of the noise schedule that timesteps are drawn from: 0 is the clean end, 1 the noisy one. Paper: all."""
    anchor: float = 0.0
    """Share of a step's draws that use the starting noise of sampling (with the first seed), so that the path from that
    noise to the photo is learnt first. Paper: 0."""
    final_rate: float = 1.0
    """Learning rate of the last step as a share of the first's, falling evenly in between. Paper: 1."""

    def __post_init__(self) -> None:
        check = _Check(self)
        self._check(check)
        check.done()

    def _check(self, check: _Check) -> None:
        check.number("steps", 0, 100_000, whole=True)
        check.number("learning_rate", 0, 1, above=True)
        check.number("draws", 1, 1024, whole=True)
        check.number("anchor", 0, 1)
        check.number("final_rate", 0, 1)
        span = self.timesteps
        if not isinstance(span, tuple) or len(span) != 2:
            check.problems.append(f"`timesteps` is {reprlib.repr(span)}, expected two numbers such as 0,1")
        else:
            before = len(check.problems)
            check.numbers("timesteps", 0, 1)
            if len(check.problems) == before and not span[0] < span[1]:
                check.problems.append(f"`timesteps` is {reprlib.repr(span)}, expected the first below the second")

    @property
    def passes(self) -> int:
        """Rows that go forward and backward through the UNet for one edit."""
        return self.steps * self.draws


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(StageConfig):
    """Stage 1: the text embedding is optimised, everything else is frozen (paper section 3.2, eq. 2)."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Stage 2: the model is tuned on the photo with the embedding fixed; here, LoRA adapters only."""

    adapt: str = "all"
    """Layers that get an adapter: one of `ADAPT_TARGETS`, or an expression (see `peft_targets`). The paper tunes all
    weights."""
    lora_rank: int = 8
    lora_alpha: float = 8.0
    """The adapter's output is scaled by ``lora_alpha / lora_rank``."""
    blocks: tuple[str, ...] = BLOCKS
    """Parts of the UNet that get adapters."""
    keep: float = 1.0
    """Share of the trained adapter's bytes that the edit keeps (see `truncation`)."""

    def _check(self, check: _Check) -> None:
        super()._check(check)
        check.expression("adapt")
        check.number("lora_rank", 1, MAX_RANK, whole=True)
        check.number("lora_alpha", 0, MAX_ALPHA, above=True)
        check.number("keep", 0, 1, above=True)
        if not isinstance(self.blocks, tuple) or not self.blocks or not all(b in BLOCKS for b in self.blocks):
            check.problems.append(f"`blocks` is {reprlib.repr(self.blocks)}, expected some of {', '.join(BLOCKS)}")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Stage 3: images along ``eta * e_tgt + (1 - eta) * e_opt`` (paper eq. 3), or with a source prompt."""

    etas: tuple[float, ...] = (0.0, 0.4, 0.6, 0.8, 1.0)
    """Interpolation: 0 is the photo, 1 the target text, above 1 beyond it. Paper: useful from 0.6 to 0.8."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the starting noise; every eta is rendered with every seed."""
    num_inference_steps: int = 30
    guidance_scale: float = 3.0
    """Classifier-free guidance; 1 switches it off and halves the work. With a source prompt that of eta 0 counts."""
    photo_guidance: float | None = None
    """Guidance at eta 0; it rises evenly to `guidance_scale` at eta 1. Without guidance e_opt reproduces the photo;
    guidance loses some of it. None: the same guidance at every eta, as in the paper."""
    negative_prompt: str = ""
    source_prompt: str = ""
    """What the photo shows, in words as the sentence's. With it, a picture has the prediction of the photo (eta 0) and,
    times eta, the base's own difference between sentence and source prompt, as in semantic guidance (SEGA, Brack et al.
    2023, arXiv 2301.12247): only what the two say differently changes. "": the paper's path of embeddings."""
    edit_guidance_scale: float = 3.0
    """Scale of that difference at eta 1; `diffusion.schedules.edit_guided` limits what it does."""
    scheduler: str = "DDIM"
    """Name of a diffusers scheduler class, with or without "Scheduler"; of a flow, a name in `diffusion.flow.SAMPLERS`,
    which is a sampler of this package."""
    strength: Strength = 1.0
    """Factor on the adapter: 0 is the base model alone."""
    mask: float = 0.0
    """Threshold of the mask, as a share of the largest difference between the base's predictions for sentence and photo
    (see `sampling.masking`): places below it keep the photo's latents (eta 0) at every step. 0: no mask. Paper: 0."""
    interpolation: str = "linear"
    """Path from e_opt to e_tgt, one of `INTERPOLATIONS`; the paper's is linear."""
    start: str = "noise"
    """Starting latents, one of `STARTS`. A Stable Diffusion schedule never reaches pure noise in training, so a model
    started from pure noise gives every picture the same medium brightness; "photo" keeps the photo's brightness, and
    "inverted" its layout too. A flow begins with pure noise, so "photo" is the same as "noise" there. Training uses
    this setting as well: draws are anchored to the starting noise."""
    batch_rows: int = 32
    """Rows of a network in one batch at most, or those of one image, see `image_rows`."""

    def __post_init__(self) -> None:
        check = _Check(self)
        for name, low, high in (("etas", *ETA_RANGE), ("seeds", 0, MAX_SEED)):
            known = len(check.problems)
            check.numbers(name, low, high, whole=name == "seeds")
            values = getattr(self, name)
            if len(check.problems) == known and len(set(values)) < len(values):
                check.problems.append(f"`{name}` has a number twice, expected each once")
        if not check.problems and len(self.etas) * len(self.seeds) > MAX_PICTURES:
            check.problems.append(
                f"`etas` and `seeds` make pictures of {len(self.etas)} etas and {len(self.seeds)} seeds, "
                f"expected at most {MAX_PICTURES} pictures"
            )
        check.number("num_inference_steps", 1, 1000, whole=True)
        check.number("guidance_scale", 0, 100)
        if self.photo_guidance is not None:
            check.number("photo_guidance", 0, 100)
        if isinstance(self.strength, tuple):
            check.numbers("strength", *STRENGTH_RANGE)
            if len(self.strength) != 3:
                check.problems.append(f"`strength` has {len(self.strength)} numbers, expected one, or down, mid and up")
        else:
            check.number("strength", *STRENGTH_RANGE)
        check.number("mask", 0, 1)
        if not isinstance(self.negative_prompt, str):
            check.problems.append(f"`negative_prompt` is {reprlib.repr(self.negative_prompt)}, expected text")
        if not isinstance(self.source_prompt, str):
            check.problems.append(f"`source_prompt` is {reprlib.repr(self.source_prompt)}, expected text")
        check.number("edit_guidance_scale", 0, 100)
        check.choice("interpolation", INTERPOLATIONS)
        check.choice("start", STARTS)
        check.number("batch_rows", 1, 4096, whole=True)
        if not isinstance(self.scheduler, str) or not self.scheduler.isidentifier():
            check.problems.append(f"`scheduler` is {reprlib.repr(self.scheduler)}, expected a scheduler such as DDIM")
        check.done()

    @property
    def photo_scale(self) -> float:
        """Guidance scale at eta 0."""
        return self.guidance_scale if self.photo_guidance is None else self.photo_guidance

    @property
    def image_rows(self) -> int:
        """Most rows of a network for one image: a second one for guidance, two more for a source prompt."""
        scales = {self.photo_scale} if self.source_prompt else {self.photo_scale, self.guidance_scale}
        return 1 + bool(scales - {1}) + 2 * bool(self.source_prompt)


NOT_RECORDED = ("strength", "batch_rows")
"""Settings of `SampleConfig` that do not belong to an edit: each rendering has its own."""


def sourced(source_prompt: str, eta: float, strength: Strength) -> bool:
    """Whether a picture has the difference to a source prompt: the photo has none, and neither has the base alone."""
    return bool(source_prompt) and eta != 0 and any(strengths(strength))


def idle_problems(config: SampleConfig, chosen: Container[str]) -> list[str]:
    """The problems of chosen fields of `SampleConfig` that have no effect beside its others."""
    problems = []
    if "strength" in chosen and not any(strengths(config.strength)):
        # The base alone under the sentence.
        idle = {"mask": "mask", "source_prompt": "source", "edit_guidance_scale": "edit_guidance"}
        return [
            f"`{name}` has no effect with `strength` 0, which renders the base without the edit"
            for field_name, name in idle.items()
            if field_name in chosen and getattr(config, field_name)
        ]
    if not config.source_prompt:
        if "edit_guidance_scale" in chosen:
            problems.append("`edit_guidance` acts with a source prompt alone; say what the photo shows with `source`")
        if (
            "negative_prompt" in chosen
            and config.negative_prompt
            and {config.guidance_scale, config.photo_scale} == {1}
        ):
            problems.append("`negative` has no effect without guidance; take a `guidance` above 1")
        return problems
    if "guidance_scale" in chosen and config.guidance_scale != 1 and config.photo_guidance is not None:
        problems.append(f"`guidance` {_IDLE}, whose scale is `edit_guidance`; {_WITHOUT}")
    if "interpolation" in chosen:
        problems.append(f"`interpolation` {_IDLE}, which takes another path; {_WITHOUT}")
    if "negative_prompt" in chosen and config.negative_prompt and config.photo_scale == 1:
        problems.append(f"`negative` {_IDLE}, which leaves the photo without guidance; {_WITHOUT}")
    return problems


_IDLE = "has no effect with a source prompt"
_WITHOUT = "an edit's own source prompt is left out by an empty `source`"


@dataclass(frozen=True, kw_only=True)
class EditConfig:
    """All settings of one edit."""

    embed: EmbedConfig
    finetune: FinetuneConfig
    sample: SampleConfig = field(default_factory=SampleConfig)
    seed: int = 0
    """Seed of all random draws in training."""
    groups: Mapping[str, Mapping[str, tuple[Any, Any]]] = field(default_factory=dict, compare=False)
    """Settings that a preset has otherwise for a group of networks, as ``stage.field``: its usual value and the other
    one. Not stored."""

    def __post_init__(self) -> None:
        if problems := _seed_problems(self.seed):
            raise ConfigError(problems)

    def for_group(self, group: str) -> "EditConfig":
        """The settings for one group of networks (see `families.family.Family.group`).

        A setting that is no longer the preset's usual one was chosen, and stays.
        """
        changes: dict[str, dict[str, Any]] = {}
        for place, (usual, other) in self.groups.get(group, {}).items():
            stage, _, name = place.partition(".")
            if getattr(getattr(self, stage), name) == usual:
                changes.setdefault(stage, {})[name] = other
        stages = {stage: replace(getattr(self, stage), **values) for stage, values in changes.items()}
        return replace(self, **stages, groups={})

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, without `groups`; without a source prompt also without it and a default edit guidance.

        `from_dict` returns an equal config."""
        values = asdict(self)
        del values["groups"]
        sample = values["sample"]
        # Without a source prompt, files and batches of versions that had none have the same values.
        if not sample["source_prompt"]:
            del sample["source_prompt"]
            if sample["edit_guidance_scale"] == SampleConfig.edit_guidance_scale:
                del sample["edit_guidance_scale"]
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "EditConfig":
        """The config from nested plain values, written by `to_dict` of this or an earlier version.

        Dropped settings are ignored.

        Raises:
            ConfigError: unknown or missing names, values out of range; all problems at once.
        """

        def kept(stage: str) -> Mapping[str, Any]:
            return {name: v for name, v in values.get(stage, {}).items() if name not in DROPPED[stage]}

        return build(kept, values)


def build(stage_values: Callable[[str], Mapping[str, Any]], top: Mapping[str, Any]) -> EditConfig:
    """An `EditConfig` from per-stage values, collecting the problems of all stages."""
    problems, stages = [], {}
    kinds: dict[str, type[Any]] = {"embed": EmbedConfig, "finetune": FinetuneConfig, "sample": SampleConfig}
    for stage, kind in kinds.items():
        values = dict(stage_values(stage))
        known = {f.name for f in fields(kind)}
        problems += [f"`{stage}.{name}` is not a setting" for name in sorted(set(values) - known)]
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in known}
        try:
            stages[stage] = kind(**values)
        except ConfigError as error:
            problems += [re.sub("`(?=[a-z_]+`)", f"`{stage}.", problem) for problem in error.problems]
        except TypeError as error:
            problems.append(f"{stage}: {error}")
    problems += [f"`{name}` is not a setting" for name in sorted(set(top) - set(kinds) - {"seed"})]
    seed = top.get("seed", 0)
    problems += _seed_problems(seed)
    if problems:
        raise ConfigError(problems)
    return EditConfig(**stages, seed=seed)


def _seed_problems(seed: object) -> list[str]:
    if isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed <= MAX_SEED:
        return []
    return [f"`seed` is {seed!r}, expected a whole number from 0 to {MAX_SEED}"]
