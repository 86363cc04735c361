"""Renders finished edits: opens an edit and its base, and renders cells into a folder or onto a sheet."""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from PIL import Image

from ..edits.edit import Edit
from ..engine.base import BaseModel
from ..engine.memory import Meter, measured_stage
from ..errors import ModelError, PromptError
from ..families import DEMO, SHORT_NAMES, cached_commit, model_name
from ..geometry import Letterbox
from ..pictures import Photo
from ..pictures.letterbox import from_canvas, into_canvas, psnr, to_images, to_tensor
from ..pictures.png import SHEET_CELL_PX
from ..pipeline.apply import NO_SENTENCE, check_base, decode_canvases, letterbox, render_latents
from ..pipeline.prepare import check_sentence
from ..pipeline.prepare import check_sentences as check_together
from ..pipeline.versions import versions
from ..plain_text import one_line
from ..sampling.sample import Cell
from ..settings.stages import DROPPED, SampleConfig, sourced, strength_text, strengths
from ..settings.text import BaseOptions, check_pictures
from .console import Console
from .fit_hint import Fit, embedding_distance
from .result_folder import ResultFolder

FEW_STEPS = 8
"""Most steps that a model distilled to few steps is rendered in without a warning; FLUX.2 klein is made for 4."""
MOST_WORDS = 8
"""Most unknown words that a warning names."""


def load_base(options: BaseOptions) -> BaseModel:
    """The base model of the options; by default the bundled one."""
    return BaseModel.load(
        DEMO if options.model is None else options.model,
        revision=options.revision,
        device=options.device,
        weights=options.weights or "int8",
        attention=options.attention,
        compute=options.compute,
        checkpointing=options.checkpointing,
        config_folder=options.config_folder,
        vae=options.vae,
        text_from=options.text_from,
    )


def open_edit(
    edit: Edit,
    options: BaseOptions,
    config: SampleConfig,
    prompts: Sequence[str],
    console: Console,
    *,
    load: Callable[[BaseOptions], BaseModel] = load_base,
) -> tuple[BaseModel, tuple[str, ...]]:
    """The base, from `load`, and the sentences to render an edit with: `prompts`, or the edit's own.

    Raises:
        ModelError: the options name no base, and the file's is no known one on this machine.
        BaseMismatchError: the base has another architecture than the edit's.
        PromptError: a prompt is empty, or there is none for an edit without a sentence.
    """
    sentences = tuple(prompts) or edit.sentences
    check_pictures(config, len(sentences))
    check_together(sentences)
    if not sentences and any(config.etas):
        raise PromptError(NO_SENTENCE)
    chosen = options
    if options.model is None:
        source, revision = edit.base.source, options.revision or edit.base.revision
        known = source in SHORT_NAMES.values()
        commit = cached_commit(source, revision) if known else None
        if source != DEMO and commit is None:
            absent = "which is not on this machine; a" if known else "a"
            raise ModelError(
                f"this edit was made for {source}{', ' if known else '; '}{absent} file is not trusted to name a "
                f"download, so say which base to use, as in `model={model_name(source, edit.base.revision)}`"
            )
        # By commit, so that nothing newer is downloaded.
        chosen = replace(chosen, model=source, revision=commit or revision)
    if options.weights is None:
        chosen = replace(chosen, weights=edit.base_weights)
    base = load(chosen)
    base.check_steps(config.scheduler, config.num_inference_steps)
    console.warn(check_base(edit, base))
    console.warn(_without(edit))
    console.warn(_unguided(base, config))
    check_sentences(base, sentences, config, console)
    if config.source_prompt:
        console.say(f"rendered with the source prompt {config.source_prompt!r}")
    if prompts:
        trained = "for" if edit.sentences == (edit.start_sentence,) else "from"
        console.say(f"trained {trained} {edit.start_sentence!r}, rendered under {', '.join(map(repr, prompts))}")
    return base, sentences


def _without(edit: Edit) -> str:
    """A warning about recorded settings that this version no longer has; "" if there are none."""
    recorded = edit.settings.get("sample")
    values = recorded if isinstance(recorded, dict) else {}
    numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
    dropped = ", ".join(
        f"{name} {numbers[name]:g}"
        for name, neutral in DROPPED["sample"].items()
        if numbers.get(name, neutral) != neutral
    )
    if not dropped:
        return ""
    return f"this edit was made to be rendered with {dropped}, which this version lacks; its pictures will differ"


def _unguided(base: BaseModel, config: SampleConfig) -> str:
    """A warning about settings that a model distilled to few steps cannot follow; "" if there are none."""
    if base.guided:
        return ""
    scale = config.photo_scale if config.source_prompt else config.guidance_scale
    far = [f"guidance {scale:g}"] if scale != 1 else []
    far += [f"{config.num_inference_steps} steps"] if config.num_inference_steps > FEW_STEPS else []
    far += [f"mask {config.mask:g}"] if config.mask else []
    if not far:
        return ""
    return (
        f"{base.name} is distilled to few steps, and has no guidance: it is rendered without; the edit's "
        f"{', '.join(far)} are for its base: take `guidance=1`, `steps_sample=4` and `mask=0`"
    )


def check_sentences(base: BaseModel, sentences: Sequence[str], config: SampleConfig, console: Console) -> None:
    """Warns about words that the text encoder cuts off, and about words that the base does not know.

    Raises:
        PromptError: a sentence is empty, stands there twice, or has unprintable characters.
    """
    check_together(sentences)
    others = [sentence for sentence in (config.negative_prompt, config.source_prompt) if sentence]
    check_sentence(config.negative_prompt, "the negative prompt")
    check_sentence(config.source_prompt, "the source prompt")
    if config.source_prompt and config.source_prompt in sentences:
        console.warn("the source prompt is the sentence itself, so nothing changes; say in it what the photo shows now")
    for sentence in [*sentences, *others]:
        cut = base.family.check_prompt(sentence)
        if cut:
            console.warn(f"the text encoder reads {base.family.sentence_tokens} tokens; cut from the sentence: {cut!r}")
    if unknown := _unknown_words(base, sentences):
        console.warn(
            f"{base.name} does not know {unknown}: it will not draw that; it can change {base.family.vocabulary}"
        )
    if unknown := _unknown_words(base, [config.source_prompt]):
        console.warn(f"{base.name} does not know {unknown} of the source prompt: they have no effect there")


def _unknown_words(base: BaseModel, sentences: Sequence[str]) -> str:
    """The words that the base does not know; "" where it knows all."""
    vocabulary = base.family.vocabulary
    unknown = [] if vocabulary is None else vocabulary.unknown(" ".join(sentences))
    return ", ".join(map(repr, unknown[:MOST_WORDS])) + (", ..." if len(unknown) > MOST_WORDS else "")


def render(
    base: BaseModel,
    edit: Edit,
    sentences: Sequence[str],
    config: SampleConfig,
    folder: ResultFolder,
    meter: Meter,
    console: Console,
    *,
    photo: Photo | None,
) -> dict[str, Any]:
    """Renders all cells and the sheet into the folder, and returns their part of the report.

    Each sentence has its row of pictures; at eta 0 there is one picture for all, of the photo. Without a sentence,
    that picture is all there is.
    """
    asked: list[str | None] = [*sentences] or [None]
    # A weaker adapter leaves something to the mask, which is the sentence's.
    shared = config.strength == 1 or not config.mask
    cells = {
        sentence: [
            Cell(0, eta, seed, config.strength, sentence=sentence if eta or not shared else None)
            for seed in config.seeds
            for eta in config.etas
        ]
        for sentence in asked
    }
    every = list(dict.fromkeys(cell for row in cells.values() for cell in row))
    alone = {sentence: Cell(0, 1.0, config.seeds[0], strength=0.0, sentence=sentence) for sentence in sentences}
    rendered = pictures_of(base, edit, asked[0], [*every, *alone.values()], config, meter, console)
    parameters = parameters_of(base, edit, sentences, config)
    names = folder.write_pictures(every, (rendered[cell].picture() for cell in every), parameters)
    name_of = dict(zip(every, names, strict=True))

    by_eta = {
        sentence: {cell.eta: rendered[cell] for cell in row if cell.seed == config.seeds[0]}
        for sentence, row in cells.items()
    }
    told: list[dict[str, Any]] = [
        {"sentence": sentence, "pictures": [name_of[cell] for cell in cells[sentence]]} for sentence in sentences
    ]
    # An edit with one sentence has the same at the top.
    report: dict[str, Any] = {"sentence": None, **(told[0] if len(told) == 1 else {})}
    report |= {"pictures": names, "sentences": told, "start_sentence": edit.start_sentence}

    first: list[tuple[str, Image.Image]] = []
    if photo is not None:
        round_trip, round_trip_db = _round_trip(base, photo, letterbox(edit, base), meter)
        # A model in pixels has no autoencoder: the photo comes back as it is, at the model's size.
        exact = math.isinf(round_trip_db)
        round_trip_label = "photo at the model's size" if exact else "autoencoder only (no training)"
        first += [("photo", photo.image), (round_trip_label, round_trip)]
        fit = _fit(base, edit, config, list(by_eta.values()), round_trip, round_trip_db)
        console.warn(fit.hint)
        report["fit"] = fit.as_json()
    many_seeds = len(config.seeds) > 1

    def labelled(cell: Cell) -> tuple[str, Image.Image]:
        label = f"eta {cell.eta:g}" + (" (reconstruction)" if cell.eta == 0 else "")
        return label + (f", seed {cell.seed}" if many_seeds else ""), rendered[cell].preview()

    rows = [
        # From the noise that the edit starts from, which may be the photo's own.
        [("no adapter", rendered[alone[sentence]].preview())] if sentence in alone else []
        for sentence in asked
    ]
    for row, own in zip(rows, cells.values(), strict=True):
        row += [labelled(cell) for cell in own if len(asked) == 1 or cell.sentence]
    footer = f"seed {', '.join(map(str, config.seeds))} | {footer_of(base, edit, config)}"
    if len(asked) == 1:
        title = sentences[0] if sentences else "the photo, without a sentence"
        if many_seeds:
            # The pictures with an adapter, a row for each seed.
            each = len(config.etas)
            start = len(rows[0]) - each * len(config.seeds)
            before, made = first + rows[0][:start], rows[0][start:]
            of = "" if before else f"{title}, "
            by_seed = [(f"{of}seed {seed}", made[n * each :][:each]) for n, seed in enumerate(config.seeds)]
            boxes = folder.write_rows([(title, before)] * bool(before) + by_seed, footer=footer)
        else:
            sheet = first + rows[0]
            boxes = folder.write_sheet(sheet, columns=min(len(sheet), 8), title=title, footer=footer)
    else:
        first += [labelled(cell) for cell in every if not cell.sentence]
        boxes = folder.write_rows([("", first)] * bool(first) + list(zip(sentences, rows, strict=True)), footer=footer)
    if photo is not None:
        # The only place in the folder that shows the photo.
        report["sheet_photo_box"] = list(boxes[0])
    return report


def _fit(
    base: BaseModel,
    edit: Edit,
    config: SampleConfig,
    rows: Sequence[Mapping[float, "Rendered"]],
    round_trip: Image.Image,
    round_trip_db: float,
) -> Fit:
    """Measures how well the edit is fitted, by its pictures of one seed: by eta, for each sentence."""
    result, furthest = edit.settings.get("result"), max(config.etas)
    # A weaker adapter gives no whole photo back, however well it is fitted.
    whole = set(strengths(config.strength)) == {1.0}
    reconstruction = rows[0][0.0].picture() if 0.0 in config.etas and whole else None
    changes = []
    # A source prompt's change is the base's own: a small one does not tell an over-fitted adapter.
    if reconstruction is not None and furthest >= 1 and not config.source_prompt:
        changes = [psnr(by_eta[furthest].picture(), reconstruction) for by_eta in rows]
    return Fit(
        reconstruction_db=None if reconstruction is None else psnr(reconstruction, round_trip),
        # An edit that one of its sentences changes is not over-fitted.
        change_db=min(changes, default=None),
        embedding_distance=_embedding_distance(edit, base),
        scheduler_error=base.sampler_error(config.scheduler, config.num_inference_steps),
        round_trip_db=round_trip_db,
        embed_loss=result.get("embed_loss") if isinstance(result, dict) else None,
        adapt=tuning.get("adapt", "") if isinstance(tuning := edit.settings.get("finetune"), dict) else "",
    )


def _embedding_distance(edit: Edit, base: BaseModel) -> float:
    """The distance between e_opt and the start sentence's embedding, relative to the norm of the latter."""
    trained = [name for name, part in base.family.text.items() if part.trained and part.stored is not None]
    target = base.encode_text([edit.start_sentence])
    optimized = target.completed(edit.conditioning, base.family.text)
    return embedding_distance([optimized[name][0] for name in trained], [target[name][0] for name in trained])


class Rendered(NamedTuple):
    """A cell's result.

    **Memory**: the model's picture; one at the photo's own size may take a hundred times as much.
    """

    canvas: Image.Image
    """The model's picture."""
    box: Letterbox
    """The photo's place in it."""

    def picture(self) -> Image.Image:
        """The picture at the photo's own size and aspect, a new one in each call."""
        return from_canvas(self.canvas, self.box)

    def preview(self) -> Image.Image:
        """The picture in a sheet's size."""
        return from_canvas(self.canvas, self.box, most_px=SHEET_CELL_PX)


def pictures_of(
    base: BaseModel,
    edit: Edit,
    sentence: str | None,
    cells: Sequence[Cell],
    config: SampleConfig,
    meter: Meter,
    console: Console,
) -> dict[Cell, Rendered]:
    """The picture of each cell, under `sentence` if it names none; equal cells are rendered once."""
    prompts = None if sentence is None else [sentence]
    unique = list(dict.fromkeys(cells))
    try:
        latents = render_latents(base, [edit], unique, config, prompts=prompts, progress=console.progress, meter=meter)
        canvases = decode_canvases(base, latents, meter=meter)
    finally:
        console.close()
    box = letterbox(edit, base)
    return {cell: Rendered(canvas, box) for cell, canvas in zip(unique, canvases, strict=True)}


def parameters_of(base: BaseModel, edit: Edit, sentences: Sequence[str], config: SampleConfig) -> dict[str, Any]:
    """The settings that a picture's metadata records, and the base that rendered it, which may be another than the
    edit's; the sentence is that of pictures without their own."""
    version = versions().get("lowmem_imagic", "unknown")
    sentence = sentences[0] if len(sentences) == 1 else edit.start_sentence
    told = {"prompt": sentence, "model": base.name, "guided": base.guided, "version": version}
    return {**config.__dict__, **told}


def footer_of(base: BaseModel, edit: Edit, config: SampleConfig, labelled: Container[str] = ()) -> str:
    """The footer of a sheet: the settings that all its pictures share, except those in `labelled`."""
    guidance, way = _guidance_text(config) if base.guided else "1", config.interpolation
    if sourced(config.source_prompt, 1.0, config.strength):
        guidance = f"{config.photo_scale:g}" if base.guided else "1"
        way = f"edit guidance {config.edit_guidance_scale:g} from {one_line(config.source_prompt)!r}"
    guidance = "" if "guidance" in labelled else f"guidance {guidance} | "
    strength = "" if "strength" in labelled else f", strength {strength_text(config.strength)}"
    return (
        f"{base.name} | {config.scheduler} {config.num_inference_steps} steps from {config.start} | "
        f"{guidance}{way}, mask {config.mask:g} | "
        f"adapter of rank {edit.rank} on {sum(map(len, edit.adapters.values()))} layers{strength} | "
        f"base in {base.weights}"
    )


def _guidance_text(config: SampleConfig) -> str:
    """The guidance in a sheet's footer."""
    photo = "" if config.photo_guidance is None else f"{config.photo_guidance:g} at eta 0, "
    return f"{photo}{config.guidance_scale:g}" + (" from eta 1" if photo else "")


def _round_trip(base: BaseModel, photo: Photo, box: Letterbox, meter: Meter) -> tuple[Image.Image, float]:
    """The photo's round trip through the autoencoder, the best possible reconstruction, and its PSNR at that size."""
    canvas = into_canvas(photo.image, box)
    with measured_stage(meter, "round trip", "`device=cpu`"):
        decoded = to_images(base.decode(base.encode_images(to_tensor(canvas))))[0]
    return from_canvas(decoded, box), psnr(decoded, canvas)
