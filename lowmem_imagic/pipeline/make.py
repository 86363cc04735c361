"""Photos and sentences to edits: the order of the stages for a pack."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ..diffusion.schedules import coarse
from ..edits.edit import Edit, LoraFactors
from ..edits.identity import BaseIdentity
from ..engine.base import BaseModel
from ..engine.memory import Meter
from ..errors import DivergenceError, LowmemImagicError, NonFiniteTensorError, TensorValueError
from ..families.family import Denoiser
from ..layers.adapter_pack import Factors, target_modules
from ..layers.truncation import truncated
from ..settings.stages import ADAPT_TARGETS, EditConfig, FinetuneConfig
from ..training.pack import Pack, StageProgress, TrainedEdit
from ..training.run import tail
from .prepare import COARSE_SIDE, EncodedPhoto, Job, Prepared
from .versions import versions


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
            photo = prepared.encoded.pop(made.number)
            if made.error is not None:
                finished.append((made.number, made.error))
                continue
            try:
                edit: Edit | LowmemImagicError = _edit(
                    base, config, identity, photo, made, base.fallbacks[fallbacks_before:]
                )
            except (NonFiniteTensorError, TensorValueError) as error:
                # Of one edit, whose loss was finite to the end; the others go on.
                edit = DivergenceError(
                    f"training led to numbers that no edit file holds ({error}); lower the learning rate"
                )
            finished.append((made.number, edit))
        yield finished


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


def _edit(
    base: BaseModel,
    config: EditConfig,
    identity: BaseIdentity,
    photo: EncodedPhoto,
    made: TrainedEdit,
    fallbacks: Sequence[str],
) -> Edit:
    """A trained edit as a value.

    Raises:
        NonFiniteTensorError, TensorValueError: training gave numbers that no file holds.
    """
    types = {name: part.stored for name, part in base.family.text.items() if part.stored is not None}
    return Edit(
        adapters={
            denoiser.name: _stored(made.adapters[denoiser.name], config.finetune.keep, base, denoiser)
            for denoiser in base.denoisers
        },
        conditioning={name: made.conditioning[name].to(dtype) for name, dtype in types.items()},
        coarse={name: coarse(latents[None], COARSE_SIDE)[0].half() for name, latents in photo.latents.items()},
        noise=photo.own_noise,
        target_prompt=photo.job.prompt,
        base=identity,
        settings=_settings(config, made),
        seed=config.seed,
        etas=config.sample.etas,
        eta_default=1.0,
        source=photo.source,
        base_weights=base.weights,
        versions=versions(),
        measured={
            "device": _device_name(base.device),
            "dtype": str(base.dtype),
            "stages": {**photo.measured, **made.measured},
            "rungs": list(fallbacks),
        },
        title=" ".join(photo.job.prompt.split())[:200],
    )


def _stored(adapter: Mapping[str, Factors], keep: float, base: BaseModel, denoiser: Denoiser) -> dict[str, LoraFactors]:
    """A trained adapter as its file holds it."""
    stored = denoiser.portable(truncated(adapter, keep), base.network(denoiser))
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
