"""The work of the studio's processes: photos, plans, training, asking, batches, each an order with plain values.

Paths in orders come from the page's own process, never from a request.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..actions import hub
from ..actions.doctor import plans, speed_here
from ..actions.edit import fit_memory, open_base
from ..actions.render import Rendered, load_base, open_edit, parameters_of, pictures_of
from ..actions.result_folder import generation_parameters
from ..batch.overview import write_overview
from ..batch.request import Request
from ..batch.run import run as run_batch
from ..edits import file as edit_file
from ..edits.edit import Edit
from ..edits.header import describe, summary
from ..edits.recorded import sampling_of
from ..engine.base import BaseModel
from ..engine.memory import Meter
from ..errors import EditTooLargeError, LowmemImagicError
from ..families import findable, load_architecture
from ..pictures import load_photo
from ..pictures.letterbox import from_canvas
from ..pictures.png import SHEET_TITLE, contact_sheet, encode_png
from ..pipeline.make import stream_edits
from ..pipeline.prepare import Job
from ..planning.duration import Speed
from ..planning.plan import Budget, planned
from ..sampling.description import DRAWS, sentences_tried
from ..sampling.inversion import STEPS as INVERSION_STEPS
from ..sampling.sample import Cell
from ..settings.stages import EditConfig, SampleConfig
from ..settings.text import BaseOptions, Words
from ..storage.atomic import write_bytes
from ..training import state as training_state
from ..training.pack import Pack
from .limits import MAX_UPLOAD_PIXELS, VIEW_PX
from .names import EDIT, PHOTO_VIEW, STATE
from .told import Told


class Work:
    """Does orders one after another, and keeps the last base loaded between them."""

    def __init__(self) -> None:
        self._base: tuple[BaseOptions, BaseModel] | None = None

    def do(self, order: Mapping[str, Any], told: Told) -> Any:
        """The result of an order, as plain values.

        Raises:
            LowmemImagicError: the work failed.
            KeyboardInterrupt: a stop was asked for.
        """
        return getattr(self, f"_{order['work']}")(order, told)

    def _load(self, options: BaseOptions) -> BaseModel:
        """The base of the options; the base before it is freed."""
        # None is the default, which an edit's own options name.
        options = replace(options, weights=options.weights or "int8")
        if self._base is None or self._base[0] != options:
            self._free()
            self._base = (options, load_base(options))
        return self._base[1]

    def _free(self) -> None:
        if self._base is not None:
            self._base[1].release()
            self._base = None

    # Quick work

    def _photo(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Decodes a photo; writes a small picture of it."""
        photo = load_photo(order["photo"], max_pixels=MAX_UPLOAD_PIXELS)
        view = photo.image.copy()
        view.thumbnail((VIEW_PX, VIEW_PX))
        write_bytes(Path(order["folder"]) / PHOTO_VIEW, encode_png(view, provenance=None), overwrite=True)
        return {"size": list(photo.image.size), "notes": list(photo.notes)}

    def _plan(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """The plan for a photo on a card, and the size that a base edits it at."""
        words = Words("train", order["values"])
        speed = Speed(*order["speed"]) if order["speed"] else None
        [line] = plans(
            order["model"],
            [order["vram"]],
            words.edit(),
            photos=(1,),
            speed=speed,
            weights=words.base.weights or "int8",
            checkpointing=words.base.checkpointing,
        )
        size = load_architecture(order["model"]).sizes.nearest(*order["size"]) if order["size"] else None
        peak = None
        if line["plan"] is not None:
            peak = max(phase["total"] for phase in line["plan"]["phases"].values())
        return {"peak_bytes": peak, "seconds": line["seconds"], "reason": line["reason"], "edited_at": size}

    def _edit_file(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Reads an edit file strictly; returns what it says."""
        opened = edit_file.read(order["file"])
        sampling = sampling_of(opened)
        recorded = {"source": sampling.source_prompt, "negative": sampling.negative_prompt}
        # As a field of one line shows them.
        texts = {name: " ".join(text.split()) for name, text in recorded.items()}
        return {
            "start_sentence": opened.start_sentence,
            "texts": {name: text for name, text in texts.items() if text},
            "base": opened.base.source,
            "etas": list(opened.etas),
            "summary": summary(describe(order["file"])),
        }

    def _push(self, order: Mapping[str, Any], told: Told) -> str:
        """Uploads an edit to the Hub; returns its address."""
        report = hub.push(
            Path(order["file"]),
            order["repository"],
            agreed=order["agreed"],
            public=order["public"],
            pictures=(),
            thumbnail=False,
            force=False,
            console=told,
        )
        return "; ".join(report["summary"])

    def _pull(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Downloads an edit from the Hub, and reads it strictly."""
        hub.pull(order["address"], revision=None, out=Path(order["file"]), force=False, console=told)
        return self._edit_file(order, told)

    def _sheet(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Writes one labelled picture of pictures that were made before."""
        cells = []
        for label, path in order["cells"]:
            with Image.open(path, formats=("PNG",)) as picture:
                cells.append((label, picture.convert("RGB")))
        sheet = contact_sheet(cells, title=order["title"], footer=order["footer"])
        text = {"Software": "lowmem-imagic", "Title": SHEET_TITLE}
        write_bytes(Path(order["out"]), encode_png(sheet, text=text), overwrite=True)
        return {}

    def _overview(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Writes the overview of a batch."""
        return write_overview(Path(order["out"]), force=True)

    # Work on the card

    def _speed(self, order: Mapping[str, Any], told: Told) -> tuple[float, float]:
        """The card's speed: here and not beside plans, as a process that uses a GPU keeps memory of it."""
        return astuple(speed_here(order["device"]))

    def _train(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Trains an edit, or goes on from the state of an earlier stop; then renders the photo (eta 0)."""
        folder, sentences = Path(order["folder"]), tuple(order["sentences"])
        words = Words("train", order["values"])
        config = words.edit()
        photo = load_photo(order["photo"], max_pixels=MAX_UPLOAD_PIXELS)
        base = open_base(_options(words.base, order), told, sentences, load=self._load)
        # Of the settings as they were chosen: a plan changes them, and depends on the memory that is free now.
        key = _key([photo.sha256, sentences, config.to_dict(), base.identity.files, base.weights])
        # Without a graphics card there is no limit to stay within.
        budget = None if base.device.type == "cpu" else Budget.of(base.device, order["values"].get("vram"))
        config, plan = fit_memory(base, config, budget, told)
        saved = training_state.saved(folder / STATE, key)

        def between(pack: Pack) -> None:
            if told.stop.asked:
                for _, state in pack.states():
                    try:
                        write_bytes(folder / STATE, training_state.encode(state, key), overwrite=True)
                    except EditTooLargeError as error:
                        told.warn(f"the training is not saved and will begin anew: {error}")
                raise KeyboardInterrupt

        told.send("stages", stages=_stages(base, config, sentences))
        meter = Meter(base.device)
        with planned(base, plan, budget):
            groups = stream_edits(
                base,
                [Job(photo, sentences, saved)],
                config,
                max_rows=None if plan is None else plan.rows,
                progress=told.progress,
                meter=meter,
                between=between,
            )
            for group in groups:
                for _, result in group:
                    if isinstance(result, LowmemImagicError):
                        raise result
                    trained = result
            write_bytes(folder / EDIT, edit_file.encode(trained), overwrite=True)
            (folder / STATE).unlink(missing_ok=True)
            told.send("trained", etas=list(trained.etas), start_sentence=trained.start_sentence)
            told.picture = "the picture at eta 0"
            ask = _Ask(base, trained, None, sampling_of(trained), meter, told, folder)
            ask.render(Cell(0, 0.0, config.sample.seeds[0], sentence=None))
        return {"seconds": {name: stage["seconds"] for name, stage in meter.stages.items()}}

    def _ask(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Renders an edit under a sentence, one seed and eta after another."""
        folder = Path(order["folder"])
        opened = edit_file.read(folder / EDIT)
        words = Words("sample", order["values"])
        cells = [(seed, float(eta)) for seed, eta in order["cells"]]
        etas = tuple(dict.fromkeys(eta for _, eta in cells))
        config = sampling_of(opened, words.sampling() | {"etas": etas})
        options = _options(words.base, order)
        sentence = order["sentence"]
        base, _ = open_edit(opened, options, config, [sentence] if sentence else [], told, load=self._load)
        with base.restored():
            ask = _Ask(base, opened, sentence, config, Meter(base.device), told, folder)
            names = [f"picture {number} of {len(cells)}" for number in range(1, len(cells) + 1)]
            told.send("stages", stages=[(name, 1) for name in names])
            for told.picture, (seed, eta) in zip(names, cells, strict=True):
                # At eta 0 all sentences have one picture, except where a weaker adapter leaves it to the sentence.
                alone = not eta and (config.strength == 1 or not config.mask)
                own = config.seeds[0] if seed is None else seed
                ask.render(Cell(0, eta, own, config.strength, sentence=None if alone else sentence), seed)
        return {}

    def _pack(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Packs files into one archive, each under a name of its own."""
        with zipfile.ZipFile(order["out"], "w", zipfile.ZIP_STORED) as archive:
            for name, path in order["files"]:
                archive.write(path, name)
        return {}

    def _batch(self, order: Mapping[str, Any], told: Told) -> dict[str, Any]:
        """Runs a batch to its end, or until a stop is asked for; then writes its overview."""
        self._free()
        request = Request.of(order["request"])
        # `batch retry` may be run in another folder.
        request = request.but(model=findable(request["model"]))
        try:
            made = run_batch(request, told, told.stop, own={})
        finally:
            if request.out.is_dir() and any(request.out.glob("*/report.json")):
                write_overview(request.out, force=True)
        return made.as_json()


class _Ask:
    """Renders cells of an edit into a project's folder, and tells each picture."""

    def __init__(
        self,
        base: BaseModel,
        edit: Edit,
        sentence: str | None,
        config: SampleConfig,
        meter: Meter,
        told: Told,
        folder: Path,
    ) -> None:
        self._base, self._edit, self._sentence, self._config = base, edit, sentence, config
        self._meter, self._told, self._folder = meter, told, folder

    def render(self, cell: Cell, seed: int | None = None) -> None:
        """Renders a cell: a picture at the photo's own size, and a small one for the page.

        Args:
            cell: the cell.
            seed: the seed that was asked for, None for the edit's own; told with the picture.
        """
        [rendered] = pictures_of(
            self._base, self._edit, self._sentence, [cell], self._config, self._meter, self._told
        ).values()
        sentences = [self._sentence] if self._sentence else []
        parameters = parameters_of(self._base, self._edit, sentences, self._config)
        text = {"parameters": generation_parameters(cell, parameters), "Software": "lowmem-imagic"}
        data = encode_png(rendered.picture(), text=text)
        name = hashlib.sha256(data).hexdigest()[:20]
        write_bytes(self._folder / f"{name}.png", data, overwrite=True)
        write_bytes(self._folder / f"{name}-view.png", encode_png(_view(rendered), text=text), overwrite=True)
        self._told.send("picture", seed=seed, eta=cell.eta, name=name, size=list(rendered.picture().size))


def _view(rendered: Rendered) -> Image.Image:
    """A picture for the page."""
    return from_canvas(rendered.canvas, rendered.box, most_px=VIEW_PX)


def _stages(base: BaseModel, config: EditConfig, sentences: Sequence[str]) -> list[tuple[str, float]]:
    """The stages of a training with their shares of the work, in rows of training."""
    vocabulary = base.family.vocabulary
    described = DRAWS * sentences_tried(vocabulary) if vocabulary and len(sentences) != 1 else 0
    forward = {"describe": described, "invert": INVERSION_STEPS}
    trained = {name: one.steps * one.draws for name, one in (("embed", config.embed), ("finetune", config.finetune))}
    # A forward pass takes about a third of a training pass.
    return [*((name, rows / 3) for name, rows in forward.items() if rows), *trained.items()]


def _options(options: BaseOptions, order: Mapping[str, Any]) -> BaseOptions:
    """The base options of a form on the order's base and device, which a form does not choose freely."""
    return replace(options, model=order["model"], device=order["device"])


def _key(inputs: Any) -> str:
    """A hash of the inputs of a training."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
