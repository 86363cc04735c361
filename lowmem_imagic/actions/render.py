"""Pictures of finished edits: opening an edit and its base, rendering cells into a folder or onto a sheet."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from PIL import Image

from ..edits.edit import Edit
from ..engine.base import BaseModel
from ..engine.memory import Meter, measured_stage
from ..errors import ConfigError, EditHeaderError, ModelError
from ..families import DEMO, SHORT_NAMES
from ..geometry import Letterbox
from ..pictures import Photo
from ..pictures.letterbox import from_canvas, into_canvas, psnr, to_images, to_tensor
from ..pictures.png import SHEET_CELL_PX
from ..pipeline.apply import Latents, check_base, decode_canvases, letterbox, render_latents
from ..pipeline.prepare import check_sentence
from ..pipeline.versions import versions
from ..sampling.sample import Cell
from ..sampling.suggestion import Suggestion, suggest_eta
from ..settings.stages import DROPPED, SampleConfig, strength_text
from ..settings.text import BaseOptions
from .console import Console
from .fit_hint import Fit, embedding_distance
from .result_folder import ResultFolder


def load_base(options: BaseOptions) -> BaseModel:
    """The base model that the options name, the bundled one if they name none."""
    return BaseModel.load(
        DEMO if options.model is None else options.model,
        revision=options.revision,
        device=options.device,
        weights=options.weights or "int8",
        attention=options.attention,
        compute=options.compute,
        checkpointing=options.checkpointing,
        config_folder=options.config_folder,
    )


def sampling_of(edit: Edit, overrides: Mapping[str, Any]) -> SampleConfig:
    """The sampling settings an edit was made with, as far as this version knows them, with `overrides` on top.

    Strength and batch size are choices of the moment, not of the edit.

    Raises:
        EditHeaderError: the recorded settings are none.
        ConfigError: the overrides are out of range.
    """
    recorded = edit.settings.get("sample")
    names = set(SampleConfig.__dataclass_fields__) - {"strength", "batch_rows"}
    values = recorded if isinstance(recorded, dict) else {}
    known: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names
    }
    try:
        settings = SampleConfig(**known)
    except (ConfigError, TypeError) as error:
        raise EditHeaderError(f"imagic.meta settings sample: {error}") from error
    return replace(settings, **overrides)


def open_edit(
    edit: Edit, options: BaseOptions, config: SampleConfig, prompt: str | None, console: Console
) -> tuple[BaseModel, str]:
    """The base to render an edit on, and the sentence to render it under: `prompt`, or the edit's own.

    Raises:
        ModelError: the base is not named and not one of those that may be taken from a file.
        BaseMismatchError: another architecture than the edit's.
        PromptError: an empty prompt.
    """
    chosen = options
    if options.model is None:
        if edit.base.source != DEMO and edit.base.source not in SHORT_NAMES.values():
            raise ModelError(
                f"this edit was made for {edit.base.source}; a file is not trusted to name a download, "
                f"so say which base to use, as in `model={edit.base.source}`"
            )
        chosen = replace(chosen, model=edit.base.source, revision=options.revision or edit.base.revision)
    if options.weights is None:
        chosen = replace(chosen, weights=edit.base_weights)
    base = load_base(chosen)
    base.check_steps(config.scheduler, config.num_inference_steps)
    console.warn(check_base(edit, base))
    console.warn(_without(edit))
    check_sentences(base, [edit.target_prompt if prompt is None else prompt, config.negative_prompt], console)
    if prompt is not None:
        console.say(f"trained for {edit.target_prompt!r}, rendered under {prompt!r}")
    return base, edit.target_prompt if prompt is None else prompt


def _without(edit: Edit) -> str:
    """A warning of settings that changed an edit's pictures and are no longer there; "" where it has none."""
    recorded = edit.settings.get("sample")
    values = recorded if isinstance(recorded, dict) else {}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    gone = [
        f"{name} {numbers[name]:g}"
        for name, neutral in DROPPED["sample"].items()
        if numbers.get(name, neutral) != neutral
    ]
    if not gone:
        return ""
    return (
        f"this edit was made to be rendered with {', '.join(gone)}, which this version lacks; its pictures will differ"
    )


def check_sentences(base: BaseModel, sentences: Sequence[str], console: Console) -> None:
    """Warns of what the text encoder cuts off; all but the first sentence may be empty.

    Raises:
        PromptError: the first is empty, or one has characters that are no text.
    """
    for sentence in sentences:
        check_sentence(sentence)
    for number, sentence in enumerate(sentences):
        if number and not sentence:
            continue  # an empty negative sentence is the usual one
        cut = base.family.check_prompt(sentence)
        if cut:
            console.warn(f"the text encoder reads {base.family.sentence_tokens} tokens; cut from the sentence: {cut!r}")


def render(
    base: BaseModel,
    edit: Edit,
    sentence: str,
    config: SampleConfig,
    folder: ResultFolder,
    meter: Meter,
    console: Console,
    *,
    photo: Photo | None,
    suggest: bool = False,
) -> dict[str, Any]:
    """Renders all cells and the sheet into the folder, and returns the report's part on them.

    With `suggest` the sheet marks and the report explains the suggested eta (see `lowmem_imagic.sampling.suggestion`).
    """
    cells = [Cell(0, eta, seed, config.strength) for seed in config.seeds for eta in config.etas]
    alone = Cell(0, 1.0, config.seeds[0], strength=0.0)
    rendered = pictures_of(base, edit, sentence, [*cells, alone], config, meter, console)
    names = folder.write_pictures(
        cells, (rendered[cell].picture() for cell in cells), parameters_of(edit, sentence, config)
    )

    sheet: list[tuple[str, Image.Image]] = []
    report: dict[str, Any] = {"sentence": sentence, "pictures": names}
    by_eta = {cell.eta: rendered[cell] for cell in cells if cell.seed == config.seeds[0]}
    suggested = None
    if suggest:
        suggested = _suggestion(base, edit, sentence, by_eta, config.batch_rows, meter)
        report["suggestion"] = suggested.as_json()
    if photo is not None:
        round_trip, round_trip_db = _round_trip(base, photo, letterbox(edit, base), meter)
        sheet += [("photo", photo.image), ("autoencoder only (no training)", round_trip)]
        fit = _fit(base, edit, config, by_eta, round_trip, round_trip_db)
        console.warn(fit.hint)
        report["fit"] = fit.as_json()
    sheet.append(("sentence alone (no training)", rendered[alone].preview()))
    many_seeds = len(config.seeds) > 1
    for cell in cells:
        label = f"eta {cell.eta:g}" + (" (reconstruction)" if cell.eta == 0 else "")
        label += " (suggested)" if suggested is not None and cell.eta == suggested.eta else ""
        sheet.append((label + (f", seed {cell.seed}" if many_seeds else ""), rendered[cell].preview()))
    footer = f"seed {', '.join(map(str, config.seeds))} | {footer_of(base, edit, config)}"
    columns = None if many_seeds else min(len(sheet), 8)
    boxes = folder.write_sheet(sheet, columns=columns, title=sentence, footer=footer)
    if photo is not None:
        # The only place in the folder that shows it.
        report["sheet_photo_box"] = list(boxes[0])
    return report


def _suggestion(
    base: BaseModel, edit: Edit, sentence: str, by_eta: Mapping[float, "Rendered"], max_rows: int, meter: Meter
) -> Suggestion:
    """The suggested eta among those rendered with one seed."""
    with measured_stage(meter, "suggest", "no suggestion (`suggest_eta`)"):
        first, target = base.denoisers[0], base.encode_text([sentence])
        optimized = {name: part.float()[None] for name, part in edit.conditioning.items()}
        extra = base.family.make_extra(first, 1, letterbox(edit, base).size, None)
        return suggest_eta(
            base,
            torch.stack([cell.latents[first.name] for cell in by_eta.values()]),
            list(by_eta),
            target | extra,
            target | optimized | extra,
            max_rows=max_rows,
        )


def _fit(
    base: BaseModel,
    edit: Edit,
    config: SampleConfig,
    by_eta: Mapping[float, "Rendered"],
    round_trip: Image.Image,
    round_trip_db: float,
) -> Fit:
    """How well the edit is fitted, from its pictures with one seed."""
    result = edit.settings.get("result")
    reconstruction, furthest = by_eta[0.0].picture() if 0.0 in by_eta else None, max(by_eta)
    change = None if reconstruction is None or furthest < 1 else psnr(by_eta[furthest].picture(), reconstruction)
    return Fit(
        reconstruction_db=None if reconstruction is None else psnr(reconstruction, round_trip),
        change_db=change,
        embedding_distance=_embedding_distance(edit, base),
        scheduler_error=base.sampler_error(config.scheduler, config.num_inference_steps),
        round_trip_db=round_trip_db,
        embed_loss=result.get("embed_loss") if isinstance(result, dict) else None,
    )


def _embedding_distance(edit: Edit, base: BaseModel) -> float:
    """How far e_opt is from e_tgt, as a share of e_tgt's size."""
    trained = [name for name, part in base.family.text.items() if part.trained and part.stored is not None]
    target = base.encode_text([edit.target_prompt])
    return embedding_distance([edit.conditioning[name] for name in trained], [target[name][0] for name in trained])


class Rendered(NamedTuple):
    """A cell's result.

    **Memory**: that of the model's picture; a photo's own size may be a hundred times that.
    """

    latents: Latents
    canvas: Image.Image
    """As the model makes it."""
    box: Letterbox
    """The photo's place in it."""

    def picture(self) -> Image.Image:
        """The picture at the photo's own size and aspect, made anew."""
        return from_canvas(self.canvas, self.box)

    def preview(self) -> Image.Image:
        """The picture no larger than a sheet shows it."""
        return from_canvas(self.canvas, self.box, most_px=SHEET_CELL_PX)


def pictures_of(
    base: BaseModel,
    edit: Edit,
    sentence: str,
    cells: Sequence[Cell],
    config: SampleConfig,
    meter: Meter,
    console: Console,
) -> dict[Cell, Rendered]:
    """The picture in each cell; equal cells are rendered once."""
    unique = list(dict.fromkeys(cells))
    try:
        latents = render_latents(
            base, [edit], unique, config, prompts=[sentence], progress=console.progress, meter=meter
        )
        canvases = decode_canvases(base, latents, meter=meter)
    finally:
        console.close()
    box = letterbox(edit, base)
    return {cell: Rendered(z, canvas, box) for cell, z, canvas in zip(unique, latents, canvases, strict=True)}


def parameters_of(edit: Edit, sentence: str, config: SampleConfig) -> dict[str, Any]:
    """The settings that a picture's metadata records."""
    version = versions().get("lowmem_imagic", "unknown")
    return {**config.__dict__, "prompt": sentence, "model": edit.base.source, "version": version}


def footer_of(base: BaseModel, edit: Edit, config: SampleConfig, but: Container[str] = ()) -> str:
    """The settings under a sheet that all its pictures share, `but` strength or guidance where it is said elsewhere."""
    guidance = "" if "guidance" in but else f"guidance {_guidance_text(config)} | "
    strength = "" if "strength" in but else f", strength {strength_text(config.strength)}"
    return (
        f"{edit.base.source} | {config.scheduler} {config.num_inference_steps} steps from {config.start} | "
        f"{guidance}{config.interpolation}, mask {config.mask:g} | "
        f"adapter of rank {edit.rank} on {sum(map(len, edit.adapters.values()))} layers{strength} | "
        f"base in {base.weights}"
    )


def _guidance_text(config: SampleConfig) -> str:
    """The guidance as a sheet's footer says it."""
    photo = "" if config.photo_guidance is None else f"{config.photo_guidance:g} at eta 0, "
    return f"{photo}{config.guidance_scale:g}" + (" from eta 1" if photo else "")


def _round_trip(base: BaseModel, photo: Photo, box: Letterbox, meter: Meter) -> tuple[Image.Image, float]:
    """The photo through the autoencoder, which is the best any reconstruction can be, and its PSNR at that size."""
    canvas = into_canvas(photo.image, box)
    with measured_stage(meter, "round trip", "`device=cpu`"):
        decoded = to_images(base.decode(base.encode_images(to_tensor(canvas))))[0]
    return from_canvas(decoded, box), psnr(decoded, canvas)
