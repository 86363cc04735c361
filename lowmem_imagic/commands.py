"""What the commands of the command line do, once their words are understood."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from . import edit_file
from .base_model import BaseModel
from .config import EditConfig, SampleConfig
from .edit import Edit
from .errors import ConfigError, ModelError, OutputError, OutputExistsError
from .families import DEMO, SHORT_NAMES
from .images import Photo, load_photo
from .letterbox import Letterbox, from_square, psnr, to_images, to_square, to_tensor
from .memory import Meter
from .names import safe_stem
from .pipeline import Job, apply_edits, check_base, letterbox, make_edits, versions
from .result_folder import ResultFolder, check_writable, rescue
from .sample import Cell

STAGES = {"embed": "1/3 embedding", "finetune": "2/3 adapter", "sample": "3/3 pictures"}


@dataclass(frozen=True)
class BaseOptions:
    """Which base model to load, and how."""

    model: str | None
    revision: str | None
    device: str
    weights: str | None
    attention: str
    checkpointing: bool
    config_folder: Path | None

    def load(self) -> BaseModel:
        """The base model."""
        return BaseModel.load(
            self.model or DEMO,
            revision=self.revision,
            device=self.device,
            weights=self.weights or "int8",
            attention=self.attention,
            checkpointing=self.checkpointing,
            config_folder=self.config_folder,
        )


class Console:
    """Standard error: remarks, and progress bars with the time left (on a terminal)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self._stage = ""
        self.warnings: list[str] = []

    def say(self, text: str) -> None:
        """A remark."""
        if not self._quiet:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        """A warning: shown even when quiet, and kept for the report."""
        if text:
            self.warnings.append(text)
            print(f"warning: {text}", file=sys.stderr)

    def progress(self, stage: str, step: int, steps: int, remark: str) -> None:
        """A step of a stage is done."""
        if self._quiet:
            return
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(total=steps, desc=STAGES.get(stage, stage), unit="step", disable=None, leave=True)
        self._bar.set_postfix_str(remark, refresh=False)
        self._bar.update(step - self._bar.n)
        if step >= steps:
            self.close()

    def close(self) -> None:
        """Ends the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def edit(
    photo: Path,
    sentence: str,
    config: EditConfig,
    options: BaseOptions,
    *,
    out: Path | None,
    background: str,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Trains and renders an edit into a folder, and returns the report."""
    started = time.perf_counter()
    source = load_photo(photo, background=background)
    folder = ResultFolder.prepare(out or Path(_default_name(source, sentence)), overwrite=force)
    base = _open_base(options, console, [sentence, config.sample.negative_prompt])
    loaded_s = time.perf_counter() - started
    meter = Meter(base.device)
    made = _train(base, source, sentence, config, meter, console)
    name = f"{_default_name(source, sentence)}.safetensors"
    edit_path = _write_edit(folder, name, made)
    cells, pictures, report = _render(base, made, config.sample, folder, meter, console, photo=source)
    fidelity = [p for cell, p in zip(cells, pictures, strict=True) if cell.eta == 0 and cell.seed == cells[0].seed]
    report |= {
        "edit_file": name,
        "edit_bytes": edit_path.stat().st_size,
        "psnr_eta_0_db": round(psnr(fidelity[0], source.image), 2) if fidelity else None,
        "seconds": {"load": round(loaded_s, 3), "total": round(time.perf_counter() - started, 3)},
        "photo_notes": list(source.notes),
        "settings": config.to_dict(),
        "result": made.settings["result"],
    }
    return _finish(folder, report, base, meter, console)


def train(
    photo: Path,
    sentence: str,
    config: EditConfig,
    options: BaseOptions,
    *,
    out: Path | None,
    background: str,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Trains an edit into a file, and returns the report."""
    started = time.perf_counter()
    source = load_photo(photo, background=background)
    path = out or Path(f"{_default_name(source, sentence)}.safetensors")
    if path.is_dir():
        path = path / f"{_default_name(source, sentence)}.safetensors"
    if path.suffix != ".safetensors":
        raise ConfigError(f"--out is {path}, expected a name ending in .safetensors")
    check_writable(path.parent)
    if not force:
        _must_not_exist(path)
    base = _open_base(options, console, [sentence])
    meter = Meter(base.device)
    made = _train(base, source, sentence, config, meter, console)
    _write_edit(ResultFolder(path.parent, overwrite=force), path.name, made)
    return {
        "edit_file": path.name,
        "edit_bytes": path.stat().st_size,
        "model": base.name,
        "stages": meter.stages,
        "seconds": {"total": round(time.perf_counter() - started, 3)},
        "warnings": console.warnings,
        "summary": [f"{path}: {path.stat().st_size / 1000:.0f} kB, {time.perf_counter() - started:.0f} s"],
    }


def sample(
    path: Path,
    overrides: Mapping[str, Any],
    options: BaseOptions,
    *,
    out: Path | None,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Renders an edit file into a folder, and returns the report."""
    started = time.perf_counter()
    opened = edit_file.read(path)
    config = SampleConfig(**{**_recorded_sampling(opened), **overrides})
    folder = ResultFolder.prepare(out or Path(safe_stem(path.stem) + "-samples"), overwrite=force)
    chosen = options
    if options.model is None:
        if opened.base.source != DEMO and opened.base.source not in SHORT_NAMES.values():
            raise ModelError(
                f"this edit was made for {opened.base.source}; a file is not trusted to name a download, "
                f"so say which base to use, as in --model {opened.base.source}"
            )
        chosen = replace(chosen, model=opened.base.source, revision=options.revision or opened.base.revision)
    if options.weights is None:
        chosen = replace(chosen, weights=opened.base_weights)
    base = chosen.load()
    base.family.scheduler(config.scheduler)
    console.warn(check_base(opened, base))
    meter = Meter(base.device)
    _, _, report = _render(base, opened, config, folder, meter, console, photo=None)
    report |= {
        "edit_file": path.name,
        "seconds": {"total": round(time.perf_counter() - started, 3)},
        "settings": {"sample": config.__dict__},
    }
    return _finish(folder, report, base, meter, console)


def _recorded_sampling(opened: Edit) -> dict[str, Any]:
    """The sampling settings an edit was made with, as far as this version knows them.

    Strength and batch size are choices of the moment, not of the edit.
    """
    recorded = opened.settings.get("sample")
    names = set(SampleConfig.__dataclass_fields__) - {"strength", "batch_rows"}
    values = recorded if isinstance(recorded, dict) else {}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names}


def _must_not_exist(path: Path) -> None:
    if path.exists():
        raise OutputExistsError(f"{path} exists already; name another with --out, or use --force")


def _default_name(photo: Photo, sentence: str) -> str:
    return safe_stem(f"{photo.name} {sentence}")


def _open_base(options: BaseOptions, console: Console, sentences: list[str]) -> BaseModel:
    """The base, with the sentences checked against its text encoder."""
    if options.model is None:
        console.say(
            "using the bundled model, which knows only its own little world of solids on floors; "
            "for real photos name one, e.g. --model sd15"
        )
    base = options.load()
    console.say(f"base {base.name} on {base.device}: {base.weights} weights, {base.attention} attention")
    for number, sentence in enumerate(sentences):
        if number and not sentence:
            continue  # an empty negative sentence is the usual one
        cut = base.family.check_prompt(sentence)
        if cut:
            limit = base.family.tokenizer.model_max_length - 2
            console.warn(f"the text encoder reads {limit} tokens; cut from the sentence: {cut!r}")
    return base


def _train(base: BaseModel, photo: Photo, sentence: str, config: EditConfig, meter: Meter, console: Console) -> Edit:
    for note in photo.notes:
        console.say(f"photo: {note}")
    try:
        return make_edits(base, [Job(photo, sentence)], config, progress=console.progress, meter=meter)[0]
    finally:
        console.close()


def _write_edit(folder: ResultFolder, name: str, made: Edit) -> Path:
    """Writes the edit first of all: it is what took the time."""
    data = edit_file.encode(made)
    try:
        return folder.write(name, data)
    except OutputError as error:
        raise rescue(name, data, error) from error


def _render(
    base: BaseModel,
    made: Edit,
    config: SampleConfig,
    folder: ResultFolder,
    meter: Meter,
    console: Console,
    *,
    photo: Photo | None,
) -> tuple[list[Cell], list[Image.Image], dict[str, Any]]:
    """Renders all cells and the sheet into the folder."""
    cells = [Cell(0, eta, seed, config.strength) for seed in config.seeds for eta in config.etas]
    alone = Cell(0, 1.0, config.seeds[0], strength=0.0)
    try:
        *pictures, untrained = apply_edits(
            base, [made], [*cells, alone], config, progress=console.progress, meter=meter
        )
    finally:
        console.close()
    parameters = {
        **config.__dict__,
        "prompt": made.target_prompt,
        "model": made.base.source,
        "version": versions().get("lowmem_imagic", "unknown"),
    }
    names = folder.write_pictures(cells, pictures, parameters)

    sheet: list[tuple[str, Image.Image]] = []
    if photo is not None:
        sheet += [
            ("photo", photo.image),
            ("autoencoder only (no training)", _round_trip(base, photo, letterbox(made))),
        ]
    sheet += [("sentence alone (no training)", untrained)]
    many_seeds = len(config.seeds) > 1
    for cell, picture in zip(cells, pictures, strict=True):
        label = f"eta {cell.eta:g}" + (" (reconstruction)" if cell.eta == 0 else "")
        sheet.append((label + (f", seed {cell.seed}" if many_seeds else ""), picture))
    footer = (
        f"{made.base.source} | seed {', '.join(map(str, config.seeds))} | {config.scheduler} "
        f"{config.num_inference_steps} steps | guidance {config.guidance_scale:g} | adapter of rank {made.rank} on "
        f"{len(made.adapter)} layers, strength {config.strength:g} | base in {base.weights}"
    )
    folder.write_sheet(
        sheet, columns=None if many_seeds else min(len(sheet), 8), title=made.target_prompt, footer=footer
    )
    return cells, pictures, {"pictures": names}


def _round_trip(base: BaseModel, photo: Photo, box: Letterbox) -> Image.Image:
    """The photo through the autoencoder: the best any reconstruction can be."""
    decoded = base.decode(base.encode_images(to_tensor(to_square(photo.image, box))))
    return from_square(to_images(decoded)[0], box)


def _finish(
    folder: ResultFolder, report: dict[str, Any], base: BaseModel, meter: Meter, console: Console
) -> dict[str, Any]:
    """Completes and writes the report."""
    report |= {
        "model": base.name,
        "device": str(base.device),
        "base_weights": base.weights,
        "attention": base.attention,
        "checkpointing": base.checkpointing,
        "stages": meter.stages,
        "versions": versions(),
        "warnings": console.warnings,
    }
    folder.write_json("report.json", report)
    seconds = report["seconds"]["total"]
    report["files"] = folder.files
    report["summary"] = [f"{folder.path}: {len(report['pictures'])} pictures, sheet.png, report.json ({seconds:.0f} s)"]
    if "edit_bytes" in report:
        report["summary"].append(f"edit file: {report['edit_file']} ({report['edit_bytes'] / 1000:.0f} kB)")
    return report
