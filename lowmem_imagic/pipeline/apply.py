"""Edits to pictures: stage 3 for finished edits, whatever the sizes of their photos."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ..diffusion.schedules import coarse
from ..edits.edit import Edit
from ..engine.base import BaseModel
from ..engine.memory import Meter, measured_stage
from ..errors import BaseMismatchError, ConfigError, NonFiniteEditError, TensorShapeError
from ..families.conditioning import Conditioning
from ..families.family import Denoiser
from ..geometry import Letterbox, Size
from ..layers.adapter_pack import AdapterPack
from ..pictures.letterbox import from_canvas, to_images
from ..sampling.sample import Cell, sample
from ..settings.stages import SampleConfig
from ..training.pack import StageProgress
from .prepare import COARSE_SIDE, named

Latents = Mapping[str, Tensor]
"""Of one picture, (C, H, W) by denoiser, in the order of sampling."""


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
        NonFiniteEditError: the latents are more than the autoencoder can take.
    """
    last = [list(of.values())[-1] for of in latents]
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
    """The latents of `cells`, rendered together where their photos have one size; see `apply_edits`."""
    meter = meter or Meter(base.device)
    with measured_stage(meter, "encode sentence", "`device=cpu`"):
        target = base.encode_text(prompts if prompts is not None else [edit.target_prompt for edit in edits])
    optimized = _optimized(edits, target)
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
                target.rows(members),
                optimized.rows(members),
                own,
                config,
                named(progress, "sample"),
                size=size,
                coarse={denoiser.name: _coarse(base, denoiser, some) for denoiser in base.denoisers},
                noise={d.name: _noise(base, d, some, size) for d in base.denoisers}
                if config.start == "inverted"
                else None,
            )
            for row, number in enumerate(cell_numbers):
                latents[number] = {name: x[row] for name, x in rendered.items()}
    return [latents[number] for number in range(len(cells))]


def _alike(kinds: Iterable[object]) -> list[list[int]]:
    """The numbers of those of one kind, kind by kind."""
    groups: dict[object, list[int]] = {}
    for number, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(number)
    return list(groups.values())


def _optimized(edits: Sequence[Edit], target: Conditioning) -> Conditioning:
    """e_opt of some edits, a row each.

    Raises:
        TensorShapeError: the base's text encoder gives another shape.
    """
    parts = {}
    for name in edits[0].conditioning:
        rows = [edit.conditioning[name].float() for edit in edits]
        for row in rows:
            expected = target[name].shape[1:] if name in target else ()
            if row.shape != expected:
                raise TensorShapeError(
                    f"the edit's embedding has shape {tuple(row.shape)}, the base's text encoder gives "
                    f"{tuple(expected)}; use the base the edit was made for"
                )
        parts[name] = torch.stack(rows)
    return Conditioning(parts)


def _adapters(base: BaseModel, denoiser: Denoiser, edits: Sequence[Edit]) -> AdapterPack:
    """The adapters of some edits for a denoiser.

    Raises:
        TensorShapeError: they do not fit.
    """
    adapters = [
        {key: (f.down.float(), f.up.float(), f.alpha) for key, f in edit.adapters[denoiser.name].items()}
        for edit in edits
    ]
    try:
        return AdapterPack.load(base.network(denoiser), denoiser.names, adapters, device=base.device)
    except ValueError as error:
        raise TensorShapeError(f"the edit does not fit {base.name}: {error}") from error


def _coarse(base: BaseModel, denoiser: Denoiser, edits: Sequence[Edit]) -> Tensor:
    """The photos' low frequencies (N, C, COARSE_SIDE, COARSE_SIDE), whatever their cells in the files.

    Raises:
        TensorShapeError: of another base's latents.
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
        TensorShapeError: of pictures of another size.
    """
    shape, rows = denoiser.shape(size), []
    for edit in edits:
        if not edit.noise:
            raise ConfigError(
                "start is inverted, and this edit was not made with it: it holds no noise of its photo's own; "
                "start from the photo's colours (`start=photo`)"
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
        f"this edit was made for {edit.base.source} ({edit.base.family}, {edit.base.interface}) and cannot be used on "
        f"{base.name} ({base.identity.family}, {base.identity.interface}); name its own base with `model`"
    )


def letterbox(edit: Edit, base: BaseModel) -> Letterbox:
    """Where the photo of an edit lies in the picture that a base makes of it.

    A base of the same architecture may have been made for another size than the edit's own.
    """
    trained = edit.source.letterbox
    return trained.scaled(base.sizes.nearest(*trained.size))
