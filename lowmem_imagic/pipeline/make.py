"""The order of the stages for a pack: photos and sentences to edits, edits to pictures."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.schedules import coarse
from ..edits.edit import Edit, LoraFactors
from ..edits.identity import BaseIdentity
from ..engine.base import BaseModel
from ..engine.memory import Meter
from ..errors import (
    BaseMismatchError,
    ConfigError,
    DivergenceError,
    LowmemImagicError,
    NonFiniteEditError,
    NonFiniteTensorError,
    TensorShapeError,
    TensorValueError,
)
from ..families.conditioning import Conditioning
from ..families.portable import portable
from ..layers.adapter_pack import AdapterPack, Factors, target_modules
from ..layers.truncation import truncated
from ..pictures.letterbox import Letterbox, from_square, to_images
from ..sampling.sample import Cell, sample
from ..settings.stages import ADAPT_TARGETS, EditConfig, FinetuneConfig, SampleConfig
from ..training.pack import Pack, StageProgress, TrainedEdit
from ..training.run import tail
from .prepare import Job, Prepared, Taken, measured_stage, named

COARSE_SIDE = 4
"""Cells each way of the photo's low frequencies in an edit: 128 bytes for four channels."""


def make_edits(
    base: BaseModel,
    jobs: Sequence[Job],
    config: EditConfig,
    *,
    slots: int | None = None,
    max_rows: int | None = None,
    progress: StageProgress | None = None,
    meter: Meter | None = None,
) -> list[Edit]:
    """The edits of some jobs, in their order; see `stream_edits`.

    Raises:
        DivergenceError: a stage's loss is no longer finite.
        NonFiniteModelError: a part of the base gives NaN or infinity.
    """
    made: dict[int, Edit] = {}
    with base.restored():
        for group in stream_edits(base, jobs, config, slots=slots, max_rows=max_rows, progress=progress, meter=meter):
            for number, edit in group:
                if isinstance(edit, LowmemImagicError):
                    raise edit
                made[number] = edit
    return [made[number] for number in range(len(jobs))]


def stream_edits(
    base: BaseModel,
    jobs: Sequence[Job] | Iterator[Sequence[Job]],
    config: EditConfig,
    *,
    slots: int | None = None,
    max_rows: int | None = None,
    progress: StageProgress | None = None,
    meter: Meter | None = None,
    preparing: StageProgress | None = None,
    between: Callable[[Pack], None] | None = None,
) -> Iterator[list[tuple[int, Edit | LowmemImagicError]]]:
    """The edits of any number of jobs, or their failures, as they finish: groups of (number of the job, edit).

    Jobs train side by side over one frozen base, and a finished edit's slot goes to the next one; in between, the base
    is free to render what is there. Every edit is what it would have been alone, to rounding; one slot is
    reproducible bit for bit on a CPU.

    Args:
        base: the frozen base.
        jobs: photos and sentences; or an iterator of groups of them, of which the next is asked for when slots are
            free and the one before is used up, and encoded together.
        config: settings of all three stages (the third is recorded in the edits).
        slots: how many edits train at once; None for all of them, or one of an iterator's.
        max_rows: most rows of a pass, None for no limit; both are a `planning.Plan`'s to choose.
        progress: called after every step: of every stage for one job, of the whole for several ("train").
        meter: collects seconds and peak bytes of each stage.
        preparing: for several jobs, called after every step before one's training ("invert"); what it raises ends the
            run.
        between: called before every step with the pack, whose `states` may be kept; what it raises ends the run.

    Raises:
        ConfigError: the base has none of the layers that `config` adapts.
        PromptError: a sentence with nothing to encode, or one no edit file can hold.
        NonFiniteModelError: the base cannot encode or invert a photo, or its scheduler cannot sample.
        MemoryLimitError: a stage does not fit.

    **Memory**: text encoder and VAE are gone before the UNet trains; see `training.pack.Pack`. Of a job nothing is kept
    once its edit is handed over.
    """
    count = len(jobs) if isinstance(jobs, Sequence) else None
    groups = iter([jobs]) if isinstance(jobs, Sequence) else jobs
    meter = meter or Meter(base.device)
    # Whatever would make the finished edit unwritable is found before any time is spent on it.
    identity = base.identity
    _check_storable(base)
    base.check_steps(config.sample.scheduler, config.sample.num_inference_steps)
    _check_layers(base, config.finetune)
    # Encoding the first photo may lead to fallbacks, too.
    fallbacks_before = len(base.fallbacks)
    prepared = Prepared(base, config, meter, groups, progress if count == 1 else preparing)
    if (first := next(prepared, None)) is None:
        return
    pack = Pack(
        base,
        chain([first], prepared),
        config,
        slots=min(slots or count, count) if count else slots or 1,
        count=count,
        max_rows=max_rows,
        progress=progress,
        between=between,
    )
    for group in pack.run():
        finished: list[tuple[int, Edit | LowmemImagicError]] = []
        for made in group:
            meter.stages |= made.measured
            taken = prepared.taken.pop(made.number)
            if made.error is not None:
                finished.append((made.number, made.error))
                continue
            try:
                edit: Edit | LowmemImagicError = _edit(
                    base, config, identity, taken, made, base.fallbacks[fallbacks_before:]
                )
            except (NonFiniteTensorError, TensorValueError) as error:
                # Of one edit, whose loss was finite to the end; the others go on.
                edit = DivergenceError(
                    f"training led to numbers that no edit file holds ({error}); lower the learning rate"
                )
            finished.append((made.number, edit))
        yield finished


def _check_storable(base: BaseModel) -> None:
    """Makes sure that an edit file can hold all that will be trained: format 1 has one adapter and one text tensor.

    Raises:
        ConfigError: it cannot.
    """
    parts = [name for name, part in base.family.text.items() if part.stored]
    if len(base.denoisers) != 1 or len(parts) != 1:
        raise ConfigError(
            f"{base.name} has {len(base.denoisers)} networks to adapt and {len(parts)} tensors of text to store; edit "
            "files of this version hold one of each"
        )


def _check_layers(base: BaseModel, config: FinetuneConfig) -> None:
    """Makes sure that the base has the layers to adapt, before any weights are read.

    Raises:
        ConfigError: it has none, or they cannot be adapted.
    """
    if config.adapt in ADAPT_TARGETS:
        return
    for denoiser in base.denoisers:
        network = denoiser.load(weights=base.weights, device=torch.device("meta"), dtype=base.dtype)
        target_modules(network, denoiser.names, config.adapt, config.blocks)


def apply_edits(
    base: BaseModel,
    edits: Sequence[Edit],
    cells: Sequence[Cell],
    config: SampleConfig,
    *,
    prompts: Sequence[str] | None = None,
    progress: StageProgress | None = None,
    meter: Meter | None = None,
) -> list[Image.Image]:
    """The pictures of `cells`, each at its photo's own size and aspect.

    Args:
        base: the base the edits were made for (see `check_base`).
        edits: finished edits.
        cells: which edit, eta, seed and strength to render.
        config: steps, guidance, scheduler; its own etas and seeds are not read.
        prompts: a new sentence for each edit, instead of the one it was made for.
        progress: called after every step.
        meter: collects seconds and peak bytes.

    Raises:
        TensorShapeError: an adapter or embedding does not fit the base.
        NonFiniteModelError: the base gives NaN or infinity by itself.
        NonFiniteEditError: an edit makes it do so.
        MemoryLimitError: does not fit.
    """
    with base.restored():
        latents = render_latents(base, edits, cells, config, prompts=prompts, progress=progress, meter=meter)
        return decode_cells(base, edits, cells, latents, meter=meter)


def decode_cells(
    base: BaseModel, edits: Sequence[Edit], cells: Sequence[Cell], latents: Tensor, *, meter: Meter | None = None
) -> list[Image.Image]:
    """The pictures of rendered latents (len(cells), C, H, W), each at its photo's own size and aspect."""
    squares = decode_squares(base, latents, meter=meter)
    # Scaled, because a base of the same architecture may have been made for another size than the edit's own.
    boxes = [letterbox(edits[cell.edit]).scaled(square.width) for cell, square in zip(cells, squares, strict=True)]
    return [from_square(square, box) for square, box in zip(squares, boxes, strict=True)]


def decode_squares(base: BaseModel, latents: Tensor, *, meter: Meter | None = None) -> list[Image.Image]:
    """The model's own square pictures of rendered latents (B, C, H, W).

    Raises:
        NonFiniteEditError: the latents are more than the autoencoder can take.
    """
    with measured_stage(meter or Meter(base.device), "decode", "`device=cpu`"):
        decoded = base.decode(latents)
    if not decoded.isfinite().all():
        raise NonFiniteEditError(
            "the edit's latents are too large for the autoencoder, which gives NaN or infinity; the edit's numbers are "
            "damaged or too large: get the file again, or try a lower strength"
        )
    return to_images(decoded)


def render_latents(
    base: BaseModel,
    edits: Sequence[Edit],
    cells: Sequence[Cell],
    config: SampleConfig,
    *,
    prompts: Sequence[str] | None = None,
    progress: StageProgress | None = None,
    meter: Meter | None = None,
) -> Tensor:
    """The latents (len(cells), C, H, W) of `cells`; see `apply_edits`."""
    meter = meter or Meter(base.device)
    with measured_stage(meter, "encode sentence", "`device=cpu`"):
        target = base.encode_text(prompts if prompts is not None else [edit.target_prompt for edit in edits])
    denoiser = base.denoisers[0]
    [part] = [name for name, part in base.family.text.items() if part.stored]
    for edit in edits:
        if edit.optimized_embedding.shape != target[part].shape[1:]:
            raise TensorShapeError(
                f"the edit's embedding has shape {tuple(edit.optimized_embedding.shape)}, "
                f"the base's text encoder gives {tuple(target[part].shape[1:])}; use the base the edit was made for"
            )
    optimized = Conditioning({part: torch.stack([edit.optimized_embedding.float() for edit in edits])})
    low = torch.cat([_coarse_latents(edit, base) for edit in edits])
    own = [_inverted_noise(edit, base) for edit in edits] if config.start == "inverted" else []
    with measured_stage(meter, "sample", "fewer rows a batch (`batch_rows`)"):
        adapters = [{key: (f.down.float(), f.up.float(), f.alpha) for key, f in edit.adapter.items()} for edit in edits]
        try:
            pack = AdapterPack.load(base.network(denoiser), denoiser.names, adapters, device=base.device)
        except ValueError as error:
            raise TensorShapeError(f"the edit does not fit {base.name}: {error}") from error
        return sample(
            base,
            {denoiser.name: pack},
            target,
            optimized,
            cells,
            config,
            named(progress, "sample"),
            coarse={denoiser.name: low},
            noise={denoiser.name: torch.stack(own)} if own else None,
        )


def _coarse_latents(edit: Edit, base: BaseModel) -> Tensor:
    """The photo's low frequencies (1, C, COARSE_SIDE, COARSE_SIDE), whatever their cells in the file."""
    channels, stored = base.denoisers[0].shape(base.size)[0], edit.coarse_latents.float()[None]
    if stored.shape[1] != channels:
        raise TensorShapeError(
            f"the edit's coarse latents have {stored.shape[1]} channels, the base's have {channels}; "
            "use the base the edit was made for"
        )
    return coarse(stored, COARSE_SIDE)


def _inverted_noise(edit: Edit, base: BaseModel) -> Tensor:
    """The photo's own noise (C, H, W).

    Raises:
        ConfigError: the edit has none.
        TensorShapeError: of pictures of another size.
    """
    if edit.inverted_noise is None:
        raise ConfigError(
            "start is inverted, and this edit was not made with it: it holds no noise of its photo's own; "
            "start from the photo's colours (`start=photo`)"
        )
    shape = base.denoisers[0].shape(base.size)
    if tuple(edit.inverted_noise.shape) != shape:
        raise TensorShapeError(
            f"the edit's own noise has shape {tuple(edit.inverted_noise.shape)}, the base's latents have "
            f"{shape}; use the base the edit was made for, or `start=photo`"
        )
    return edit.inverted_noise.float()


def check_base(edit: Edit, base: BaseModel) -> str:
    """A warning to show before `edit` is used on `base`, "" when they belong together exactly.

    Raises:
        BaseMismatchError: another architecture; nothing sensible could come out.
    """
    match edit.base.match(base.identity):
        case "exact":
            return ""
        case "revision":
            return f"{base.name} is the model of this edit in other files (precision or variant); small differences"
        case "architecture":
            return (
                f"this edit was made for {edit.base.source}, not {base.name}; "
                "they share an architecture, so it runs, but expect another picture"
            )
    raise BaseMismatchError(
        f"this edit was made for {edit.base.source} ({edit.base.family}, {edit.base.prediction_type}, "
        f"width {edit.base.cross_attention_dim}) and cannot be used on {base.name} ({base.identity.family}, "
        f"{base.identity.prediction_type}, width {base.identity.cross_attention_dim}); name its own base with `model`"
    )


def letterbox(edit: Edit) -> Letterbox:
    """Where the photo of an edit lies in the model's square."""
    left, top, right, bottom = edit.source.box
    return Letterbox(
        width_px=edit.source.width_px,
        height_px=edit.source.height_px,
        size_px=edit.source.size_px,
        left=left,
        top=top,
        right=right,
        bottom=bottom,
    )


def versions() -> dict[str, str]:
    """Versions of this package, of what it computes with, and of Python."""
    packages = ("lowmem_imagic", "torch", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes")
    found = {"python": platform.python_version()}
    for package in (*packages, "safetensors", "xformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _edit(
    base: BaseModel,
    config: EditConfig,
    identity: BaseIdentity,
    taken: Taken,
    made: TrainedEdit,
    fallbacks: Sequence[str],
) -> Edit:
    """A trained edit as a value.

    Raises:
        NonFiniteTensorError, TensorValueError: training gave numbers that no file holds.
    """
    first = base.denoisers[0].name
    return Edit(
        adapter=_stored(made.adapters[first], config.finetune.keep, base),
        optimized_embedding=next(iter(made.conditioning.values())).half(),
        coarse_latents=coarse(taken.latents[first][None], COARSE_SIDE)[0].half(),
        inverted_noise=taken.inverted_noise.get(first),
        target_prompt=taken.job.prompt,
        base=identity,
        settings=_settings(config, made),
        seed=config.seed,
        etas=config.sample.etas,
        eta_default=1.0,
        source=taken.source,
        base_weights=base.weights,
        versions=versions(),
        measured={
            "device": _device_name(base.device),
            "dtype": str(base.dtype),
            "stages": {**taken.measured, **made.measured},
            "rungs": list(fallbacks),
        },
        title=" ".join(taken.job.prompt.split())[:200],
    )


def _stored(adapter: Mapping[str, Factors], keep: float, base: BaseModel) -> dict[str, LoraFactors]:
    """A trained adapter as its file holds it."""
    stored = portable(truncated(adapter, keep), base.network(base.denoisers[0]))
    return {key: LoraFactors(down.half(), up.half(), alpha) for key, (down, up, alpha) in stored.items()}


def _settings(config: EditConfig, made: TrainedEdit) -> dict[str, Any]:
    """The settings of all stages, with what happened to this edit under "result"."""
    values = config.to_dict()
    del values["seed"]
    values["result"] = {}
    for stage, losses in made.losses.items():
        values["result"] |= {f"{stage}_steps": len(losses), f"{stage}_loss": tail(losses)}
    return values


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
