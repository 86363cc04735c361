"""Renders finished edits (stage 3); their photos may have different sizes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.schedules import COARSE_SIDE, coarse
from ..edits.edit import Edit
from ..engine.base import BaseModel
from ..engine.memory import Meter, measured_stage
from ..errors import BaseMismatchError, ConfigError, NonFiniteEditError, PromptError, TensorShapeError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser
from ..geometry import Letterbox, Size
from ..layers.adapter_pack import AdapterPack
from ..pictures.letterbox import from_canvas, to_images
from ..sampling.sample import Cell, sample
from ..settings.stages import SampleConfig
from ..training.pack import StageProgress
from .prepare import named

NO_SENTENCE = "this edit was trained without a sentence; ask one with `prompt`, or render its photo alone with `etas=0`"
Latents = Mapping[str, Tensor]
"""Latents (C, H, W) of one picture by denoiser, in the order of sampling."""


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
    """The pictures of `cells` in their order, in RGB, each at its photo's own size and aspect.

    Args:
        base: the base the edits were made for (see `check_base`).
        edits: finished edits.
        cells: which edit, eta, seed, strength and sentence to render.
        config: steps, guidance, scheduler; etas and seeds are those of the cells.
        prompts: a new sentence for each edit, instead of its own, for cells that name none.
        progress: called after every step.
        meter: collects seconds and peak bytes.

    Raises:
        PromptError: no sentence for a cell above eta 0.
        TensorShapeError: an adapter or embedding does not fit the base.
        NonFiniteModelError: the base gives NaN or infinity without the edit.
        NonFiniteEditError: the base gives NaN or infinity with the edit.
        MemoryLimitError: a stage does not fit.
    """
    with base.restored():
        latents = render_latents(base, edits, cells, config, prompts=prompts, progress=progress, meter=meter)
        return decode_cells(base, edits, cells, latents, meter=meter)


def decode_cells(
    base: BaseModel,
    edits: Sequence[Edit],
    cells: Sequence[Cell],
    latents: Sequence[Latents],
    *,
    meter: Meter | None = None,
) -> list[Image.Image]:
    """The pictures of rendered cells, each at its photo's own size and aspect."""
    canvases = decode_canvases(base, latents, meter=meter)
    boxes = [letterbox(edits[cell.edit], base) for cell in cells]
    return [from_canvas(canvas, box) for canvas, box in zip(canvases, boxes, strict=True)]


def decode_canvases(base: BaseModel, latents: Sequence[Latents], *, meter: Meter | None = None) -> list[Image.Image]:
    """The model's own pictures of rendered cells.

    Raises:
        NonFiniteEditError: the autoencoder gives NaN or infinity for these latents.
    """
    last = [list(picture.values())[-1] for picture in latents]
    canvases: dict[int, Image.Image] = {}
    with measured_stage(meter or Meter(base.device), "decode", "`device=cpu`"):
        for numbers in _alike(tuple(x.shape) for x in last):
            decoded = base.decode(torch.stack([last[number] for number in numbers]))
            if not decoded.isfinite().all():
                raise NonFiniteEditError(
                    "the edit's latents are too large for the autoencoder, which gives NaN or infinity; the edit's "
                    "numbers are damaged or too large: get the file again, or try a lower strength"
                )
            canvases |= zip(numbers, to_images(decoded), strict=True)
    return [canvases[number] for number in range(len(last))]


def render_latents(
    base: BaseModel,
    edits: Sequence[Edit],
    cells: Sequence[Cell],
    config: SampleConfig,
    *,
    prompts: Sequence[str] | None = None,
    progress: StageProgress | None = None,
    meter: Meter | None = None,
) -> list[Latents]:
    """The latents of `cells`; those whose photos have one size are rendered together. See `apply_edits`."""
    meter = meter or Meter(base.device)
    asked = [_sentence(cell, edits[cell.edit], None if prompts is None else prompts[cell.edit]) for cell in cells]
    sentences = list(dict.fromkeys(one for one in asked if one is not None))
    with measured_stage(meter, "encode sentence", "`device=cpu`"):
        start = base.encode_text([edit.start_sentence for edit in edits])
        target = base.encode_text(sentences) if sentences else start
        # Cached for sampling: the text encoder is loaded once.
        base.encode_text([config.negative_prompt, *filter(None, [config.source_prompt])])
    optimized = Conditioning.cat(
        [start.rows([row]).completed(edit.conditioning, base.family.text) for row, edit in enumerate(edits)]
    )
    sizes = [letterbox(edit, base).size for edit in edits]
    latents: dict[int, Latents] = {}
    with measured_stage(meter, "sample", "fewer rows a batch (`batch_rows`)"):
        for cell_numbers in _alike(sizes[cell.edit] for cell in cells):
            members = sorted({cells[number].edit for number in cell_numbers})
            own = [replace(cells[number], edit=members.index(cells[number].edit)) for number in cell_numbers]
            some, size = [edits[member] for member in members], sizes[members[0]]
            rendered = sample(
                base,
                {denoiser.name: _adapters(base, denoiser, some) for denoiser in base.denoisers},
                target,
                optimized.rows(members),
                own,
                config,
                named(progress, "sample"),
                rows=[None if one is None else sentences.index(one) for one in (asked[n] for n in cell_numbers)],
                size=size,
                start=start.rows(members),
                coarse={denoiser.name: _coarse(base, denoiser, some) for denoiser in base.denoisers},
                noise={d.name: _noise(base, d, some, size) for d in base.denoisers}
                if config.start == "inverted"
                else None,
            )
            for row, number in enumerate(cell_numbers):
                latents[number] = {name: x[row] for name, x in rendered.items()}
    return [latents[number] for number in range(len(cells))]


def _sentence(cell: Cell, edit: Edit, prompt: str | None) -> str | None:
    """The sentence to render a cell under; None for the photo of an edit without any.

    Raises:
        PromptError: the edit has none, and the cell is not its photo.
    """
    sentence = cell.sentence if cell.sentence is not None else prompt if prompt is not None else edit.target_prompt
    if sentence is None and cell.eta:
        raise PromptError(NO_SENTENCE)
    return sentence


def _alike(kinds: Iterable[object]) -> list[list[int]]:
    """The positions of equal values, value by value."""
    groups: dict[object, list[int]] = {}
    for number, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(number)
    return list(groups.values())


def _adapters(base: BaseModel, denoiser: Denoiser, edits: Sequence[Edit]) -> AdapterPack:
    """The adapters of some edits for a denoiser.

    Raises:
        TensorShapeError: they do not fit.
    """
    adapters = [edit.adapters[denoiser.name] for edit in edits]
    try:
        return AdapterPack.load(base.network(denoiser), denoiser.names, adapters, device=base.device)
    except ValueError as error:
        raise TensorShapeError(f"the edit does not fit {base.name}: {error}") from error


def _coarse(base: BaseModel, denoiser: Denoiser, edits: Sequence[Edit]) -> Tensor:
    """The photos' low frequencies, averaged to (N, C, COARSE_SIDE, COARSE_SIDE).

    Raises:
        TensorShapeError: they are of another base's latents.
    """
    channels, rows = denoiser.shape(base.sizes.own)[0], []
    for edit in edits:
        stored = edit.coarse[denoiser.name].float()[None]
        if stored.shape[1] != channels:
            raise TensorShapeError(
                f"the edit's coarse latents have {stored.shape[1]} channels, the base's have {channels}; "
                "use the base the edit was made for"
            )
        rows.append(coarse(stored, COARSE_SIDE))
    return torch.cat(rows)


def _noise(base: BaseModel, denoiser: Denoiser, edits: Sequence[Edit], size: Size) -> Tensor:
    """The photos' own noise (N, C, H, W).

    Raises:
        ConfigError: an edit has none.
        TensorShapeError: it is of pictures of another size.
    """
    shape, rows = denoiser.shape(size), []
    for edit in edits:
        if not edit.noise:
            raise ConfigError(
                "start is inverted, but this edit was made without it and has no noise of its photo; "
                "start from the photo's colours (`start=photo`), or from noise alone (`start=noise`)"
            )
        own = edit.noise[denoiser.name]
        if tuple(own.shape) != tuple(shape):
            raise TensorShapeError(
                f"the edit's own noise has shape {tuple(own.shape)}, the base's latents have "
                f"{tuple(shape)}; use the base the edit was made for, or `start=photo`"
            )
        rows.append(own.float())
    return torch.stack(rows)


def check_base(edit: Edit, base: BaseModel) -> str:
    """A warning about the use of `edit` on `base`; "" if it was made for exactly this base.

    Raises:
        BaseMismatchError: the base has another architecture, on which the edit cannot work.
    """
    match edit.base.match(base.identity):
        case "exact":
            return ""
        case "revision":
            return f"{base.name} is the model of this edit in other files (precision or variant); small differences"
        case "architecture":
            same = edit.base.source == base.identity.source
            made_for = f"another version of {base.name}" if same else f"{edit.base.source}, not {base.name}"
            return (
                f"this edit was made for {made_for}; they share an architecture, so it runs, but expect another picture"
            )
    raise BaseMismatchError(
        f"this edit was made for {edit.base.source} ({edit.base.family}, {edit.base.interface}) and cannot be used on "
        f"{base.name} ({base.identity.family}, {base.identity.interface}); name its own base with `model`"
    )


def letterbox(edit: Edit, base: BaseModel) -> Letterbox:
    """Where the photo of an edit lies in the picture that a base makes of it.

    A base of the same architecture may have been made for another size than the edit's own.
    """
    trained = edit.source.letterbox
    return trained.scaled(base.sizes.nearest(*trained.size))
