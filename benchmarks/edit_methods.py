"""Methods to edit a photo by a sentence, behind one protocol for a fair comparison.

A method takes photos and sentences and returns pictures for each point of its slider (eta, or its equivalent). Every
item starts from the same noise; a method's settings are the same for all items.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lowmem_imagic.diffusion.schedules import EDIT_LIMIT, starting_noise
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import Edit, LoraFactors
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.stable_diffusion import EMBEDS
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pictures.letterbox import to_tensor
from lowmem_imagic.pictures.png import encode_png
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.description import describe
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.stages import EditConfig
from lowmem_imagic.storage.atomic import write_bytes
from lowmem_imagic.training.pack import stages

SEED = 0
"""Seed of every item's training and starting noise."""
ETAS = (0.0, 0.6, 0.8, 1.0, 1.2)
"""Points of a method's slider."""


@dataclass(frozen=True)
class Outcome:
    """A method's results for some items."""

    pictures: dict[float, list[Image.Image]]
    """A picture of each item, by point of the slider."""
    passes: int
    """Rows forward and backward through the networks, per item."""
    train_s: float
    """Seconds of training, per item."""
    sample_s: float
    """Seconds of sampling, per picture."""
    edit_bytes: tuple[int, ...] = ()
    """Size of each item's edit file, if the method has edit files."""

    def of(self, number: int) -> "Outcome":
        """The part of one of the items."""
        return replace(
            self,
            pictures={eta: [made[number]] for eta, made in self.pictures.items()},
            edit_bytes=self.edit_bytes[number : number + 1],
        )


Apply = Callable[..., Outcome]


@dataclass(frozen=True)
class Method:
    """An editing method, called as ``method(base, photos, sentences, etas)``."""

    settings: Mapping[str, Any]
    """All its settings, as plain values: results with equal settings may be combined."""
    apply: Apply
    together: int = 1
    """Most items in one call."""
    etas: tuple[float, ...] = ETAS
    """Points of its slider to judge: the best of them must not be at an end for want of points."""
    in_full: bool = False
    """Whether it takes full sentences, see `benchmarks.scene_edits.SceneEdit.in_full`."""
    sourced: bool = False
    """Whether it is told what the photos show; `apply` then takes the source prompts as `sources`."""

    def __call__(
        self,
        base: BaseModel,
        photos: Sequence[Image.Image],
        sentences: Sequence[str],
        etas: Sequence[float],
        *,
        sources: Sequence[str] = (),
    ) -> Outcome:
        return self.apply(base, photos, sentences, etas, **({"sources": sources} if self.sourced else {}))


Within = Callable[[BaseModel, str, str], AbstractContextManager[Any]]
"""Changes the engine for as long as the context lasts, for an edit with this sentence and source prompt."""


@dataclass(frozen=True)
class Lever:
    """A change of the engine that is tried, see `benchmarks.levers`."""

    name: str
    within: Within
    trains: bool
    """Whether it changes training; otherwise it changes sampling."""
    sourced: bool = False
    """Whether pictures are rendered with a source prompt."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Its numbers, as plain values: edits and results with others are apart."""


def ours(
    config: EditConfig,
    *,
    edits: Path | None = None,
    retarget_from: str | None = None,
    in_full: bool = False,
    asked_later: bool = False,
    without: str | None = None,
    sourced: bool = False,
    describes: bool = False,
    lever: Lever | None = None,
) -> Method:
    """This package, one item at a time; see `packed` for several.

    Args:
        config: settings of all stages, except for etas and seeds, which the protocol sets.
        edits: folder of edit files: existing edits are not trained again, so that sampling variants share edits.
        retarget_from: sentence to train for; pictures are rendered under the item's sentence.
        in_full: whether it takes full sentences.
        asked_later: whether it trains for no sentence: the base describes the photo, and the edit is asked afterwards.
        without: a network of the base whose adapter is trained and not applied.
        sourced: whether pictures are rendered with a source prompt.
        describes: whether the source prompt is the base's own description of the photo.
        lever: a change of the engine; it says itself whether pictures are rendered with a source prompt.
    """
    sourced = sourced or describes or (lever is not None and lever.sourced)

    def run(
        base: BaseModel,
        photos: Sequence[Image.Image],
        sentences: Sequence[str],
        etas: Sequence[float],
        sources: Sequence[str] = (),
    ) -> Outcome:
        pictures: dict[float, list[Image.Image]] = {eta: [] for eta in etas}
        sizes: list[int] = []
        train_s = sample_s = 0.0
        for number, (photo, sentence) in enumerate(zip(photos, sentences, strict=True)):
            # Read back, because later runs render the file.
            start = retarget_from or sentence
            if asked_later:
                started = time.perf_counter()
                start = described(base, photo)
                train_s += time.perf_counter() - started
            training = sampled = nullcontext()
            folder = edits
            if lever is not None:
                changed = lever.within(base, sentence, sources[number] if sources else "")
                training, sampled = (changed, sampled) if lever.trains else (training, changed)
                if edits and lever.trains:
                    folder = edits / f"{lever.name}-{digest(dict(lever.settings))}"
            with training:
                data, seconds = trained(base, Job(as_photo(photo), start), config, folder)
            train_s += seconds
            sizes.append(len(data))
            edit = edit_file.decode(data)
            edit = without_adapter(edit, without) if without else edit
            started = time.perf_counter()
            cells = [Cell(0, eta, SEED, config.sample.strength) for eta in etas]
            sampling = config.sample
            if sourced:
                source = described(base, photo) if describes else sources[number]
                sampling = replace(sampling, source_prompt=source)
            with sampled:
                made = apply_edits(base, [edit], cells, sampling, prompts=[sentence])
            sample_s += time.perf_counter() - started
            for eta, picture in zip(etas, made, strict=True):
                pictures[eta].append(picture)
        return Outcome(
            pictures, passes_of(base, config), train_s / len(photos), sample_s / (len(photos) * len(etas)), tuple(sizes)
        )

    settings: dict[str, Any] = {"edit": config.to_dict(), "retarget_from": retarget_from}
    settings |= {"in_full": True} if in_full else {}
    settings |= {"asked_later": True} if asked_later else {}
    settings |= {"without": without} if without else {}
    settings |= {"lever": lever.name, **lever.settings} if lever else {}
    settings |= {"describes": True} if describes else {}
    settings |= {"edit_guidance_scale": config.sample.edit_guidance_scale, "edit_limit": EDIT_LIMIT} if sourced else {}
    # A lever may need the source prompt for something else.
    return Method(settings, run, in_full=in_full, sourced=sourced or lever is not None)


def passes_of(base: BaseModel, config: EditConfig) -> int:
    """Rows forward and backward of one edit's training, over all networks of a cascade."""
    return sum(stage.config.passes for stage in stages(config.for_group(base.family.group), base.denoisers))


def described(base: BaseModel, photo: Image.Image) -> str:
    """The base's own description of a photo of its size."""
    latents = base.encode_images(to_tensor(photo))[0]
    return describe(base, latents, base.family.make_extra(base.denoisers[0], 1, base.sizes.own, None))


def packed(config: EditConfig, *, slots: int, together: int) -> Method:
    """This package with all items in one refilling pack, and their pictures in common batches.

    Args:
        config: see `ours`.
        slots: number of edits that train at once.
        together: number of items of the pack.
    """

    def run(base: BaseModel, photos: Sequence[Image.Image], sentences: Sequence[str], etas: Sequence[float]) -> Outcome:
        started = time.perf_counter()
        jobs = [Job(as_photo(photo), sentence) for photo, sentence in zip(photos, sentences, strict=True)]
        files = [edit_file.encode(edit) for edit in make_edits(base, jobs, config, slots=slots)]
        trained_s = time.perf_counter() - started
        started = time.perf_counter()
        cells = [Cell(number, eta, SEED, config.sample.strength) for eta in etas for number in range(len(jobs))]
        made = apply_edits(base, [edit_file.decode(data) for data in files], cells, config.sample)
        pictures = {eta: made[i * len(jobs) : (i + 1) * len(jobs)] for i, eta in enumerate(etas)}
        return Outcome(
            pictures,
            passes_of(base, config),
            trained_s / len(jobs),
            (time.perf_counter() - started) / len(cells),
            tuple(map(len, files)),
        )

    return Method({"edit": config.to_dict(), "slots": slots, "together": together}, run, together)


def trained(base: BaseModel, job: Job, config: EditConfig, folder: Path | None) -> tuple[bytes, float]:
    """Edit file of a job, and its seconds of training; taken from `folder` if it is there."""
    if folder is None:
        started = time.perf_counter()
        [edit] = make_edits(base, [job], config)
        return edit_file.encode(edit), time.perf_counter() - started
    keep = config.finetune.keep
    if keep < 1:
        # Truncation comes after training, so all values of `keep` share one training.
        whole, seconds = trained(base, job, replace(config, finetune=replace(config.finetune, keep=1.0)), folder)
        return shortened(base, whole, keep), seconds
    facts = {
        "embed": asdict(config.embed),
        "finetune": asdict(config.finetune),
        "seeds": [config.seed, config.sample.seeds[0]],
        # The starting noise that training is anchored to.
        "own_noise": config.sample.start == "inverted",
        "base": [base.identity.files, base.weights],
        "job": [job.photo.sha256, job.prompt],
    }
    path = folder / f"edit-{digest(facts)}.safetensors"
    clock = path.with_suffix(".json")
    if not clock.exists():
        folder.mkdir(parents=True, exist_ok=True)
        data, seconds = trained(base, job, config, None)
        write_bytes(path, data, overwrite=True)
        # Written last: it marks the other file as complete.
        write_bytes(clock, json.dumps(seconds).encode(), overwrite=True)
    return path.read_bytes(), json.loads(clock.read_text())


def shortened(base: BaseModel, data: bytes, keep: float) -> bytes:
    """An edit file with a share of its adapters, as with `FinetuneConfig.keep` (except for a second rounding)."""
    edit = edit_file.decode(data)
    adapters = {}
    for denoiser in base.denoisers:
        factors = edit.adapters[denoiser.name].items()
        parts = truncated({key: (f.down.float(), f.up.float(), f.alpha) for key, f in factors}, keep)
        stored = denoiser.portable(parts, base.network(denoiser)).items()
        adapters[denoiser.name] = {key: LoraFactors(down.half(), up.half(), alpha) for key, (down, up, alpha) in stored}
    return edit_file.encode(replace(edit, adapters=adapters))


def without_adapter(edit: Edit, network: str) -> Edit:
    """The edit with an adapter of `network` that changes nothing."""
    idle = {key: f._replace(up=torch.zeros_like(f.up)) for key, f in edit.adapters[network].items()}
    return replace(edit, adapters={**edit.adapters, network: idle})


def digest(facts: Mapping[str, Any]) -> str:
    """A short hash of facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def same_noise(base: BaseModel, rows: int) -> Tensor:
    """The same starting noise for every row (B, C, H, W), drawn as in `lowmem_imagic.sampling.sample`."""
    noise = starting_noise(base.denoisers[0].shape(base.sizes.own), torch.Generator().manual_seed(SEED))
    return noise.expand(rows, *noise.shape).contiguous()


def unet_of(base: BaseModel) -> Any:
    """The UNet of a base, which is Stable Diffusion in every benchmark."""
    return base.network(base.denoisers[0])


def embeds(text: Tensor) -> Conditioning:
    """Text (B, T, D) as a conditioning."""
    return Conditioning({EMBEDS: text})


def as_photo(picture: Image.Image) -> Photo:
    """A rendered picture as a `Photo`."""
    digest = hashlib.sha256(encode_png(picture, provenance=None)).hexdigest()
    return Photo(image=picture, sha256=digest, name="scene", notes=(), icc_profile=None)
