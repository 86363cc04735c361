"""Makes edits from photos and sentences: the order of the stages for a pack."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from ..diffusion.schedules import COARSE_SIDE, coarse
from ..edits.edit import Edit, LoraFactors
from ..edits.identity import BaseIdentity
from ..engine.base import BaseModel
from ..engine.memory import Meter
from ..errors import DivergenceError, LowmemImagicError, NonFiniteTensorError, TensorValueError
from ..families.family import Denoiser
from ..layers.adapter_pack import Factors, check_endings, target_modules
from ..layers.truncation import energy, truncated
from ..settings.stages import ADAPT_TARGETS, ONE_AT_A_TIME, EditConfig, FinetuneConfig
from ..training.pack import Pack, StageProgress, TrainedEdit
from ..training.run import tail
from .prepare import EncodedPhoto, Job, Prepared
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
        DivergenceError: a stage's loss is no longer finite, or all its steps overflowed in fp16.
        NonFiniteModelError: a part of the base gives NaN or infinity.
    """
    edits: dict[int, Edit] = {}
    with base.restored():
        for group in stream_edits(base, jobs, config, slots=slots, max_rows=max_rows, progress=progress, meter=meter):
            for number, edit in group:
                if isinstance(edit, LowmemImagicError):
                    raise edit
                edits[number] = edit
    return [edits[number] for number in range(len(jobs))]


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
    """Yields the edits of any number of jobs, or their errors, as they finish: groups of (number of the job, edit).

    Jobs train side by side over one frozen base, and a finished edit's slot goes to the next job. Between two groups
    the base is free, for example to render the finished edits. An edit does not depend on the others, to rounding; with
    one slot a CPU gives the same bits every time.

    Args:
        base: the frozen base.
        jobs: photos and sentences, or an iterator of groups of them. The next group is asked for when a slot is free
            and the group before is used up; a group is encoded together.
        config: settings of all three stages (the third is recorded in the edits).
        slots: most edits in training at once; None is all jobs of a sequence, and 1 for an iterator. A base in a
            format of `ONE_AT_A_TIME` trains one.
        max_rows: most rows of a pass, None for no limit; a `planning.Plan` chooses it and the slots.
        progress: called after every step: by stage for one job, else for all jobs together ("train").
        meter: collects seconds and peak bytes of each stage.
        preparing: for several jobs, called after every step before a job's training ("describe", "invert"). An
            exception from it ends the run.
        between: called with the pack before every step; it may save the pack's `states`. An exception from it ends the
            run.

    Raises:
        ConfigError: the base has none of the layers that `config` adapts, or no edit file can hold a photo's own noise.
        EditTooLargeError: no edit file can hold the adapters.
        WrongFamilyError: the base is distilled to few steps.
        PromptError: a sentence has nothing to encode, or cannot be in an edit file.
        NonFiniteModelError: the base cannot encode or invert a photo, or its scheduler cannot sample.
        MemoryLimitError: a stage does not fit.

    **Memory**: text encoder and VAE are freed before the UNet trains; see `training.pack.Pack`. Nothing of a job is
    kept after its edit is yielded.
    """
    config = config.for_group(base.family.group)
    count = len(jobs) if isinstance(jobs, Sequence) else None
    groups = iter([jobs]) if isinstance(jobs, Sequence) else jobs
    meter = meter or Meter(base.device)
    # Before any training: errors that would make the finished edit unwritable.
    base.family.check_trainable()
    identity = base.identity
    base.check_steps(config.sample.scheduler, config.sample.num_inference_steps)
    _check_layers(base, config.finetune)
    # Encoding the first photo may lead to fallbacks, too.
    fallbacks_before = len(base.fallbacks)
    prepared = Prepared(base, config, meter, groups, progress if count == 1 else preparing)
    if (first := next(prepared, None)) is None:
        return
    if base.weights in ONE_AT_A_TIME:
        slots = 1
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
        for trained in group:
            meter.stages |= trained.measured
            photo = prepared.encoded.pop(trained.number)
            if trained.error is not None:
                finished.append((trained.number, trained.error))
                continue
            try:
                edit: Edit | LowmemImagicError = _edit(
                    base, config, identity, photo, trained, base.fallbacks[fallbacks_before:]
                )
            except (NonFiniteTensorError, TensorValueError) as error:
                # Only this edit failed, although its loss was finite to the end; the others go on.
                edit = DivergenceError(
                    f"training gave numbers that no edit file can contain ({error}); lower the learning rate"
                )
            finished.append((trained.number, edit))
        yield finished


def _check_layers(base: BaseModel, config: FinetuneConfig) -> None:
    """Checks that the base has the layers to adapt, before any weights are read.

    Raises:
        ConfigError: it has none, or they cannot be adapted, or a part of `adapt` covers none.
    """
    if config.adapt in ADAPT_TARGETS:
        return
    meta = torch.device("meta")
    networks = [(one.load(weights=base.weights, device=meta, dtype=base.dtype), one.names) for one in base.denoisers]
    for network, names in networks:
        target_modules(network, names, config.adapt, config.blocks)
    check_endings(networks, config.adapt, config.blocks)


def _edit(
    base: BaseModel,
    config: EditConfig,
    identity: BaseIdentity,
    photo: EncodedPhoto,
    trained: TrainedEdit,
    fallbacks: Sequence[str],
) -> Edit:
    """A trained edit as a value.

    Raises:
        NonFiniteTensorError, TensorValueError: training gave numbers that no file can contain.
    """
    types = {name: part.stored for name, part in base.family.text.items() if part.stored is not None}
    kept = {name: truncated(adapter, config.finetune.keep) for name, adapter in trained.adapters.items()}
    return Edit(
        adapters={denoiser.name: _stored(kept[denoiser.name], base, denoiser) for denoiser in base.denoisers},
        conditioning={name: trained.conditioning[name].to(dtype) for name, dtype in types.items()},
        coarse={name: coarse(latents[None], COARSE_SIDE)[0].half() for name, latents in photo.latents.items()},
        noise=photo.own_noise,
        sentences=photo.job.sentences,
        start_sentence=photo.start_sentence,
        base=identity,
        settings=_settings(config, trained, kept),
        seed=config.seed,
        etas=config.sample.etas,
        eta_default=1.0,
        source=photo.source,
        base_weights=base.weights,
        versions=versions(),
        measured={
            "device": _device_name(base.device),
            "dtype": str(base.dtype),
            "stages": {**photo.measured, **trained.measured},
            "rungs": list(fallbacks),
        },
        title=" ".join("; ".join(photo.job.sentences or (photo.start_sentence,)).split())[:200],
    )


def _stored(adapter: Mapping[str, Factors], base: BaseModel, denoiser: Denoiser) -> dict[str, LoraFactors]:
    """An adapter in the form of its file, still in fp32."""
    stored = denoiser.portable(adapter, base.network(denoiser))
    return {key: LoraFactors(*factors) for key, factors in stored.items()}


def _settings(config: EditConfig, trained: TrainedEdit, kept: Mapping[str, Mapping[str, Factors]]) -> dict[str, Any]:
    """The settings of all stages; "result" has the steps and losses of this edit, and what its file keeps."""
    values = config.to_dict()
    del values["seed"]
    values["result"] = {}
    for stage, losses in trained.losses.items():
        values["result"] |= {f"{stage}_steps": len(losses), f"{stage}_loss": tail(losses)}
    if config.finetune.keep < 1:
        whole, rest = (sum(map(energy, adapters.values())) for adapters in (trained.adapters, kept))
        values["result"]["energy_kept"] = round(rest / whole, 4) if whole else 1.0
    return values


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
