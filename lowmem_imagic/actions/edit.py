"""The work of the commands `edit`, `train` and `sample`."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..amounts import counted
from ..edits import file as edit_file
from ..edits.edit import Edit
from ..edits.recorded import sampling_of
from ..engine.base import BaseModel
from ..engine.memory import Meter
from ..errors import LowmemImagicError, OutputError
from ..families import check_trainable
from ..pictures import Photo, load_photo
from ..pipeline.make import make_edits
from ..pipeline.prepare import Job
from ..pipeline.prepare import check_sentences as check_together
from ..pipeline.versions import versions
from ..planning.plan import Budget, Plan, plan_for, planned
from ..settings.stages import EditConfig, SampleConfig
from ..settings.text import BaseOptions, check_pictures
from ..storage.file_names import SHEET, safe_stem
from ..storage.writable import check_target
from .console import Console
from .hub import local_file
from .render import check_sentences, load_base, open_edit, render
from .result_folder import ResultFolder, rescue


def edit(
    photo: Path,
    sentences: Sequence[str],
    config: EditConfig,
    options: BaseOptions,
    *,
    out: Path | None,
    vram: str | None,
    background: str,
    cover: bool,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Trains an edit once, renders it under each sentence into a folder, and returns the report."""
    started = time.perf_counter()
    check_pictures(config.sample, len(sentences))
    source = load_photo(photo, background=background)
    folder = ResultFolder.prepare(out or Path(_default_name(source, sentences)), overwrite=force)
    base = open_base(options, console, sentences, config.sample)
    budget = Budget.of(base.device, vram)
    config, plan = fit_memory(base, config, budget, console)
    loaded_s = time.perf_counter() - started
    meter = Meter(base.device)
    with planned(base, plan, budget):
        trained = _train(base, source, sentences, config, plan, meter, console)
        name = f"{_default_name(source, sentences)}.safetensors"
        report = finished_edit(base, folder, name, trained, source, config, plan, meter, console)
    if cover:
        report["cover"] = folder.write_cover(Path(name).with_suffix(".png").name, _cover_of(report, config))
    report["seconds"] = {"load": round(loaded_s, 3), "total": round(time.perf_counter() - started, 3)}
    return _finish(folder, report)


def _cover_of(report: Mapping[str, Any], config: EditConfig) -> str:
    """The picture for the cover: of the first sentence and seed, at the largest eta up to 1."""
    etas = config.sample.etas
    best = max((eta for eta in etas if eta <= 1), default=min(etas))
    return str(report["sentences"][0]["pictures"][etas.index(best)])


def finished_edit(
    base: BaseModel,
    folder: ResultFolder,
    name: str,
    trained: Edit,
    photo: Photo,
    config: EditConfig,
    plan: Plan | None,
    meter: Meter,
    console: Console,
) -> dict[str, Any]:
    """Writes a finished edit as `name` and its pictures into a folder, and returns the report, still to be written."""
    edit_path = _write_edit(folder, name, trained)
    try:
        report = render(base, trained, trained.sentences, config.sample, folder, meter, console, photo=photo)
    except (KeyboardInterrupt, LowmemImagicError, MemoryError):
        console.say(f"the edit itself is finished; render it with: lowmem-imagic sample {edit_path}", always=True)
        raise
    return report | {
        "edit_file": name,
        "edit_bytes": edit_path.stat().st_size,
        "photo_notes": list(photo.notes),
        "settings": config.to_dict(),
        "result": trained.settings["result"],
        "plan": plan and plan.as_json(),
        **_facts(base, meter, console),
    }


def train(
    photo: Path,
    sentences: Sequence[str],
    config: EditConfig,
    options: BaseOptions,
    *,
    out: Path | None,
    vram: str | None,
    background: str,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Trains an edit into a file, for any number of sentences or none, and returns the report."""
    started = time.perf_counter()
    source = load_photo(photo, background=background)
    path = out or Path(f"{_default_name(source, sentences)}.safetensors")
    if os.path.isdir(path):
        path = path / f"{_default_name(source, sentences)}.safetensors"
    check_target(path, overwrite=force)
    base = open_base(options, console, sentences)
    budget = Budget.of(base.device, vram)
    config, plan = fit_memory(base, config, budget, console)
    meter = Meter(base.device)
    with planned(base, plan, budget):
        trained = _train(base, source, sentences, config, plan, meter, console)
    _write_edit(ResultFolder(path.parent, overwrite=force), path.name, trained)
    if not sentences:
        console.say(f'ask it any sentences with: lowmem-imagic sample {path} `prompt` "..." `prompt` "..."')
    return {
        "edit_file": path.name,
        "edit_bytes": path.stat().st_size,
        "sentences": list(trained.sentences),
        "start_sentence": trained.start_sentence,
        "model": base.name,
        "plan": plan and plan.as_json(),
        "rungs": base.fallbacks,
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
    prompts: Sequence[str],
    out: Path | None,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    """Renders an edit file into a folder, under its own sentences or `prompts`, and returns the report."""
    started = time.perf_counter()
    opened = edit_file.read(local_file(path, console))
    config = sampling_of(opened, overrides)
    folder = ResultFolder.prepare(out or Path(safe_stem(path.stem) + "-samples"), overwrite=force)
    base, sentences = open_edit(opened, options, config, prompts, console)
    meter = Meter(base.device)
    report = render(base, opened, sentences, config, folder, meter, console, photo=None)
    report |= {
        "edit_file": path.name,
        "seconds": {"total": round(time.perf_counter() - started, 3)},
        "settings": {"sample": config.__dict__},
        **_facts(base, meter, console),
    }
    return _finish(folder, report)


def _default_name(photo: Photo, sentences: Sequence[str]) -> str:
    """The name of an edit: its photo with its sentence, or with the number of several."""
    words = " ".join(sentences) if len(sentences) < 2 else f"{len(sentences)} sentences"
    return safe_stem(f"{photo.name} {words}")


def open_base(
    options: BaseOptions,
    console: Console,
    sentences: Sequence[str],
    sampling: SampleConfig | None = None,
    *,
    load: Callable[[BaseOptions], BaseModel] = load_base,
) -> BaseModel:
    """The base to train on, from `load`, after a check of the sentences by its text encoder, those of `sampling` too.

    Raises:
        WrongFamilyError: a published model is named that cannot be trained; it is not downloaded.
        PromptError: a sentence is empty or stands there twice.
    """
    if options.model is None:
        console.say(
            "using the bundled model, which knows only its own little world of solids on floors; "
            "for real photos name one, e.g. `model=sd15`"
        )
    else:
        check_trainable(options.model)
    # Before the base is loaded, which takes seconds.
    check_together(sentences)
    base = load(options)
    console.say(f"base {base.name} on {base.device}: {base.weights} weights, {base.attention} attention")
    check_sentences(base, sentences, sampling or SampleConfig(), console)
    return base


def fit_memory(
    base: BaseModel,
    config: EditConfig,
    budget: Budget | None,
    console: Console,
    *,
    jobs: int = 1,
    beside: bool = False,
) -> tuple[EditConfig, Plan | None]:
    """The base's settings within a budget, and the plan to follow (see `planning.plan`); None if no budget applies."""
    config = config.for_group(base.family.group)
    plan = plan_for(base, config, budget, jobs=jobs, beside=beside)
    if plan is None:
        return config, None
    console.say(f"plan for {plan.budget_bytes / 1e9:.2f} GB: {plan}")
    return replace(config, sample=replace(config.sample, batch_rows=plan.batch_rows)), plan


def _train(
    base: BaseModel,
    photo: Photo,
    sentences: Sequence[str],
    config: EditConfig,
    plan: Plan | None,
    meter: Meter,
    console: Console,
) -> Edit:
    max_rows = None if plan is None else plan.rows
    for note in photo.notes:
        console.say(f"photo: {note}")
    try:
        [trained] = make_edits(
            base, [Job(photo, sentences)], config, max_rows=max_rows, progress=console.progress, meter=meter
        )
    finally:
        console.close()
    if len(sentences) != 1:
        own = "" if base.family.vocabulary is None else ", the model's own description of the photo"
        console.say(f"trained from {trained.start_sentence!r}{own}")
    return trained


def _write_edit(folder: ResultFolder, name: str, trained: Edit) -> Path:
    """Writes the edit; on failure keeps it elsewhere, as it took the most time."""
    data = edit_file.encode(trained)
    try:
        return folder.write(name, data)
    except OutputError as error:
        raise rescue(name, data, error) from error


def _facts(base: BaseModel, meter: Meter, console: Console) -> dict[str, Any]:
    """The report's entries about the run."""
    return {
        "model": base.name,
        "device": str(base.device),
        "base_weights": base.weights,
        "attention": base.attention,
        "checkpointing": base.checkpointing,
        "rungs": base.fallbacks,
        "stages": meter.stages,
        "versions": versions(),
        "warnings": console.warnings,
    }


def _finish(folder: ResultFolder, report: dict[str, Any]) -> dict[str, Any]:
    """Writes the report, and adds the files and the summary for the caller."""
    folder.write_report(report)
    seconds = report["seconds"]["total"]
    report["files"] = list(folder.files)
    report["summary"] = [
        f"{folder.path}: {counted(len(report['pictures']), 'picture')}, {SHEET}, report.json ({seconds:.0f} s)"
    ]
    if "edit_bytes" in report:
        report["summary"].append(f"edit file: {report['edit_file']} ({report['edit_bytes'] / 1000:.0f} kB)")
    return report
