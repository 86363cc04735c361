"""The same facts about every family: what an edit is, where it is stored, how it is rendered, and what it takes.

The families are a tiny Stable Diffusion, a tiny SDXL, a tiny FLUX.2 klein, a tiny DeepFloyd IF, and one that nothing in
the package knows (`tests.other_family`).
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from lowmem_imagic import read_edit, write_edit
from lowmem_imagic.actions.console import Console
from lowmem_imagic.actions.render import render
from lowmem_imagic.actions.result_folder import ResultFolder
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits.edit import LoraFactors
from lowmem_imagic.edits.header import describe, summary
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.engine.memory import Meter
from lowmem_imagic.errors import BaseMismatchError, MemoryLimitError, NonFiniteEditError, PromptError
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.frozen import weight_bytes
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.apply import apply_edits, check_base
from lowmem_imagic.pipeline.make import make_edits, stream_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.counting import Counts, peak_of
from lowmem_imagic.planning.plan import Budget, plan, plan_for, planned
from lowmem_imagic.sampling.sample import Cell, sample
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.training import loop as training
from tests import tiny_if, tiny_klein
from tests.other_family import other_base
from tests.tiny_xl import write_tiny

SENTENCE, OTHER = "a blue sphere on the grass", "two birds kissing"


@dataclass(frozen=True)
class Kind:
    """A family as these tests use it."""

    name: str
    load: Callable[..., BaseModel]
    scheduler: str
    layout: int
    """Version of the edit format that its square edits have."""
    folder: Path | None
    """Its model's folder; None for a family that no command can name."""


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL in a folder."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="session")
def klein_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny FLUX.2 klein in a folder."""
    return tiny_klein.write_tiny(tmp_path_factory.mktemp("models") / "tiny-klein")


@pytest.fixture(scope="session")
def if_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage I of a tiny DeepFloyd IF in a folder, with stage II beside it."""
    return tiny_if.write_tiny(tmp_path_factory.mktemp("cascade"))


# The default tests run these facts for the smallest families; the others take most of a minute each, klein's 512 tokens
# several.
_SLOW = [pytest.param(name, marks=pytest.mark.process) for name in ("sdxl", "klein", "if")]


@pytest.fixture(scope="session", params=["sd", *_SLOW, "other"])
def kind(
    request: pytest.FixtureRequest, tiny_folder: Path, xl_folder: Path, klein_folder: Path, if_folder: Path
) -> Kind:
    """Each family in turn."""
    if request.param == "other":
        return Kind("other", other_base, "Euler", 2, None)
    folder, scheduler, layout = {
        "sd": (tiny_folder, "DDIM", 1),
        "sdxl": (xl_folder, "DDIM", 2),
        "klein": (klein_folder, "FireFlow", 2),
        "if": (if_folder, "DDIM", 2),
    }[request.param]
    return Kind(request.param, partial(BaseModel.load, str(folder), device="cpu"), scheduler, layout, folder)


@pytest.fixture(scope="module")
def base(kind: Kind) -> BaseModel:
    """The family's base in 8 bit, for tests that leave it as it was."""
    return kind.load()


def photo(shade: int = 90) -> Photo:
    """A photo with a gradient."""
    image = Image.linear_gradient("L").resize((40, 30)).point(lambda level: (level + shade) % 256).convert("RGB")
    return Photo(image=image, sha256=f"{shade:064x}", name="photo", notes=(), icc_profile=None)


def config(kind: Kind, **sampling: Any) -> EditConfig:
    """Settings of a short edit."""
    sample = {"etas": (0.0, 1.0), "num_inference_steps": 4, "scheduler": kind.scheduler, "start": "inverted"}
    return EditConfig(
        embed=EmbedConfig(steps=3, draws=2, learning_rate=1e-2),
        finetune=FinetuneConfig(steps=4, draws=2, learning_rate=1e-2, adapt="attn+ff", lora_rank=2, lora_alpha=3.0),
        sample=SampleConfig(**{**sample, "mask": 0.3, "guidance_scale": 2.0, "batch_rows": 8, **sampling}),
    )


@pytest.fixture(scope="module")
def edit(kind: Kind, base: BaseModel) -> Any:
    """An edit of one photo."""
    [trained] = make_edits(base, [Job(photo(), SENTENCE)], config(kind))
    return trained


def test_an_edit_holds_every_network_and_every_tensor_of_text(base: BaseModel, edit: Any) -> None:
    """Every network is adapted, and every stored tensor of text is trained; each network has its own noise."""
    shapes = {denoiser.name: denoiser.shape(edit.source.size) for denoiser in base.denoisers}
    assert edit.adapters.keys() == shapes.keys()
    stored = {name: part for name, part in base.family.text.items() if part.stored is not None}
    assert {name: part.dtype for name, part in edit.conditioning.items()} == {n: p.stored for n, p in stored.items()}
    target = base.encode_text([SENTENCE])
    assert all(not torch.equal(part, target[name][0].to(part.dtype)) for name, part in edit.conditioning.items())
    assert all(f.up.abs().max() > 0 for adapter in edit.adapters.values() for f in adapter.values())
    assert {name: tuple(noise.shape) for name, noise in edit.noise.items()} == shapes
    assert {"embed_loss", "finetune_loss"} <= edit.settings["result"].keys()


def test_it_is_written_read_and_shown(kind: Kind, edit: Any, tmp_path: Path) -> None:
    """The file gives the same edit, with the same bytes each time, and is shown with its base and its text."""
    path = tmp_path / "edit.safetensors"
    write_edit(edit, path)
    assert read_edit(path) == edit
    write_edit(read_edit(path), tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    shown = describe(path)
    assert shown["format"] == kind.layout
    assert {name for name in shown["tensors"] if name.startswith("text.")} == {f"text.{n}" for n in edit.conditioning}
    assert edit.base.source in summary(shown) and SENTENCE in summary(shown)


def test_a_file_renders_as_the_edit_does(kind: Kind, base: BaseModel, edit: Any, tmp_path: Path) -> None:
    """Pictures from the file equal those from the edit bit for bit, and differ along eta and with the adapters."""
    path = tmp_path / "edit.safetensors"
    write_edit(edit, path)
    cells = [Cell(0, 0.0, 0), Cell(0, 1.0, 0), Cell(0, 1.0, 0, strength=0.0)]
    mine, read = (
        [picture.tobytes() for picture in apply_edits(base, [one], cells, config(kind).sample)]
        for one in (edit, read_edit(path))
    )
    assert mine == read and len(set(mine)) == 3
    assert apply_edits(base, [edit], cells, config(kind).sample)[0].size == (40, 30)


def test_eta_mixes_every_tensor_that_is_trained(
    kind: Kind, base: BaseModel, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At eta 0.5 the network sees the middle between e_opt and the sentence's, in each of its tensors."""
    seen: list[Conditioning] = []
    predict = base.predict

    def listening(denoiser: Any, x: Any, at: Any, given: Conditioning) -> Any:
        seen.append(given)
        return predict(denoiser, x, at, given)

    monkeypatch.setattr(base, "predict", listening)
    settings = replace(config(kind).sample, guidance_scale=1.0, mask=0.0, num_inference_steps=1)
    apply_edits(base, [edit], [Cell(0, 0.5, 0)], settings)
    target = base.encode_text([SENTENCE])
    optimized = target.completed(edit.conditioning, base.family.text)
    for name in edit.conditioning:
        torch.testing.assert_close(seen[0][name], 0.5 * (optimized[name] + target[name]))


def test_a_pack_gives_what_each_edit_gets_alone(kind: Kind, base: BaseModel, edit: Any, relative: Any) -> None:
    """An edit trained beside another equals the edit trained alone, to rounding."""
    jobs = [Job(photo(), SENTENCE), Job(photo(30), OTHER)]
    first, second = make_edits(base, jobs, config(kind), slots=2)
    assert second.sentences == (OTHER,)
    for name, part in edit.conditioning.items():
        assert relative(first.conditioning[name], part) < 5e-3
    for name, adapter in edit.adapters.items():
        for key, factors in adapter.items():
            mine = first.adapters[name][key]
            assert torch.allclose(
                mine.up.flatten(1).float() @ mine.down.flatten(1).float(),
                factors.up.flatten(1).float() @ factors.down.flatten(1).float(),
                atol=4e-3,
            )


def test_training_goes_on_where_it_was_saved(kind: Kind, base: BaseModel, edit: Any) -> None:
    """An edit that is stopped in any stage and resumed has the same bits."""
    states = []

    def keep(pack: Any) -> None:
        states.extend(state for _, state in pack.states())

    for _ in stream_edits(base, [Job(photo(), SENTENCE)], config(kind), between=keep):
        pass
    assert len({state.stage for state in states}) == 1 + len(base.denoisers)
    for state in states[1::3]:
        [resumed] = make_edits(base, [Job(photo(), SENTENCE, state)], config(kind))
        assert resumed.adapters == edit.adapters
        assert all(torch.equal(resumed.conditioning[name], part) for name, part in edit.conditioning.items())


@pytest.mark.parametrize("start", ["photo", "noise", "inverted"])
def test_its_pictures_are_rendered_with_a_sheet(
    kind: Kind, base: BaseModel, edit: Any, tmp_path: Path, start: str
) -> None:
    """The rendering of the commands works: sheet, mask, new sentences, a hint at the edit's fit."""
    settings = replace(config(kind).sample, start=start, etas=(0.0, 0.5, 1.0), negative_prompt="grey")
    folder = ResultFolder.prepare(tmp_path / "out", overwrite=False)
    report = render(
        base,
        edit,
        [SENTENCE, OTHER],
        settings,
        folder,
        Meter(base.device),
        Console(quiet=True),
        photo=photo(),
    )
    # Two sentences share the picture at eta 0.
    assert len(report["pictures"]) == 5
    assert report["fit"]["embedding_distance"] > 0
    assert (tmp_path / "out" / "sheet.png").exists()


def test_a_source_prompt_changes_what_it_says_otherwise(kind: Kind, base: BaseModel, edit: Any) -> None:
    """With a source prompt equal to the sentence every eta is the photo; another changes the picture with eta, as the
    path of embeddings does not; and a picture is the same alone and beside others."""
    etas = (0.0, 0.5, 1.0)
    cells = [Cell(0, eta, 0, sentence=SENTENCE) for eta in etas]

    def made(source: str, some: list[Cell] = cells) -> list[np.ndarray]:
        settings = replace(config(kind).sample, source_prompt=source)
        return [np.asarray(picture).astype(int) for picture in apply_edits(base, [edit], some, settings)]

    same, told, path = made(SENTENCE), made(OTHER), made("")
    assert all(abs(picture - same[0]).max() <= 1 for picture in same)
    assert abs(told[0] - same[0]).max() == 0 and abs(told[2] - path[2]).max() > 0
    assert 0 < abs(told[1] - told[0]).mean() < abs(told[2] - told[0]).mean()
    assert abs(made(OTHER, cells[2:])[0] - told[2]).max() <= 1


@pytest.mark.parametrize("sentences", [(), (SENTENCE, OTHER)])
def test_edits_are_asked_later(kind: Kind, base: BaseModel, sentences: tuple[str, ...], tmp_path: Path) -> None:
    """An edit trained for no sentence or for several is of version 3 and answers any sentence; alone it needs one."""
    [asked] = make_edits(base, [Job(photo(), sentences)], config(kind))
    write_edit(asked, tmp_path / "edit.safetensors")
    opened = read_edit(tmp_path / "edit.safetensors")
    assert opened.version == 3 and opened.sentences == sentences
    cells = [Cell(0, 1.0, 0, sentence=one) for one in (SENTENCE, OTHER)]
    pictures = apply_edits(base, [opened], cells, config(kind).sample)
    assert pictures[0].tobytes() != pictures[1].tobytes()
    if not sentences:
        with pytest.raises(PromptError, match="trained without a sentence"):
            apply_edits(base, [opened], [Cell(0, 1.0, 0)], replace(config(kind).sample, num_inference_steps=20))


def costs_of(base: BaseModel, settings: EditConfig) -> Costs:
    """What is predicted for a base."""
    return Costs(
        base.family,
        settings,
        weights=base.weights,
        dtype=base.dtype,
        part_dtype=base.text_dtype,
        codec_dtype=base.codec_dtype,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_takes_what_is_predicted(
    kind: Kind, base: BaseModel, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live bytes of every stage's steps, counted on the CPU for two photos at once, are within 10 % of the plan's."""
    peaks: dict[str, int] = {}
    step = training.Trainer.step

    def counted(self: training.Trainer) -> Any:
        [run] = {run.denoiser.name + str(len(self.runs)) for run in self.runs.values()}
        result: list[Any] = []
        name = "embed" if self.trains(0) else "finetune" + run.removesuffix("2").replace(first, "")
        peaks[name] = max(peaks.get(name, 0), peak_of(lambda: result.append(step(self))))
        return result[0]

    first, settings = base.denoisers[0].name, config(kind)
    monkeypatch.setattr(training.Trainer, "step", counted)
    jobs = [Job(photo(), SENTENCE), Job(photo(30), OTHER)]
    with base.restored():
        base.recompute(checkpointing)
        make_edits(base, jobs, settings, slots=2, max_rows=4)
    costs = costs_of(base, settings)
    for name in ("embed", "finetune"):
        predicted = costs.train(4, 2, checkpointing=checkpointing, stage=name)
        assert predicted == pytest.approx(peaks[name], rel=0.1), name


def test_other_phases_take_what_is_predicted(kind: Kind, base: BaseModel) -> None:
    """Live bytes of text encoders, both ways of the codec, and sampling are within 10 % of the plan's, or 4 kB.

    Decoding is counted with the latents that it begins with, which are most of it for a family without an autoencoder.
    """
    settings, family, cpu = config(kind), base.family, torch.device("cpu")
    costs = costs_of(base, settings)
    encoders = list[tuple[int, int]]()

    @contextmanager
    def loaded(name: str) -> Iterator[Any]:
        encoder = family.load_text_encoder(name, weights=base.weights, device=cpu, dtype=torch.float32)
        with Counts() as count:
            yield encoder
        encoders.append((weight_bytes(encoder), count.peak))

    family.encode_text([SENTENCE], loaded)
    assert (costs.text_encoder, costs.encode_text()) == pytest.approx(max(encoders, key=sum), rel=0.1, abs=4096)
    codec = family.load_codec(device=cpu, dtype=torch.float32, tiling=False)
    width, height = base.sizes.own
    picture = torch.zeros(1, 3, height, width)
    latents = torch.zeros(1, *base.denoisers[-1].shape(base.sizes.own))
    measured = [peak_of(lambda: family.encode(codec, picture)), peak_of(lambda: family.decode(codec, latents))]
    assert costs.encode() == pytest.approx(measured[0], rel=0.1, abs=4096)
    assert costs.decode() == pytest.approx(measured[1], rel=0.1, abs=max(4096, latents.nbytes))
    text = base.encode_text([SENTENCE, ""])
    tuned = settings.finetune
    packs = {
        d.name: AdapterPack(base.network(d), d.names, count=1, adapt=tuned.adapt, rank=tuned.lora_rank, alpha=1.0)
        for d in base.denoisers
    }
    cells = [Cell(0, eta / 10, 0) for eta in range(1, 5)]
    plain = replace(settings.sample, start="noise", mask=0.0)
    target = Conditioning({name: part[:1] for name, part in text.items()})
    measured_sample = peak_of(lambda: sample(base, packs, target, target, cells, plain))
    adapters = max(pack.weights.nbytes for pack in packs.values())
    assert costs.sample(8) == pytest.approx(measured_sample + adapters, rel=0.1, abs=4096)


def test_plans_are_counted_from_its_own_passes(kind: Kind, base: BaseModel) -> None:
    """A plan has every phase and can be followed; a budget below the least is an error."""
    settings = config(kind)
    costs = costs_of(base, settings)
    large = plan(costs, settings, budget_bytes=10**9, jobs=3)
    assert large.slots == 3 and not large.checkpointing
    tuned = ["finetune", *(f"finetune_{denoiser.name}" for denoiser in base.denoisers[1:])]
    assert ["load", "encode", "invert", "embed", *tuned, "sample", "decode"] == list(large.phases)
    with pytest.raises(MemoryLimitError):
        plan(costs, settings, budget_bytes=10**4)
    budget, settings = Budget(10**9), replace(settings, embed=replace(settings.embed, steps=1))
    with planned(base, plan_for(base, settings, budget), budget):
        [planned_edit] = make_edits(base, [Job(photo(), SENTENCE)], settings)
    assert planned_edit.base == base.identity


def test_it_is_no_other_base(
    base: BaseModel, edit: Any, tiny_folder: Path, xl_folder: Path, klein_folder: Path, if_folder: Path
) -> None:
    """An edit of one family is refused on all others, with both named; on its own base there is no warning."""
    assert check_base(edit, base) == ""
    others = [
        BaseModel.load(str(tiny_folder), device="cpu"),
        BaseModel.load(str(xl_folder), device="cpu"),
        BaseModel.load(str(klein_folder), device="cpu"),
        BaseModel.load(str(if_folder), device="cpu"),
        other_base(),
    ]
    for other in others:
        if other.identity.family != base.identity.family:
            with pytest.raises(BaseMismatchError, match=f"{base.identity.family}.*{other.identity.family}"):
                check_base(edit, other)


def test_damaged_numbers_are_told_from_a_damaged_base(kind: Kind, base: BaseModel, edit: Any) -> None:
    """An overflow in an edit's adapter is reported as the edit's fault."""
    if kind.name == "if":
        pytest.skip("predictions are clipped to the range of pixels, so finite factors cause no overflow")
    name = base.denoisers[-1].name
    huge = {
        key: LoraFactors(torch.full_like(f.down, 1000.0), torch.full_like(f.up, 1000.0), f.alpha)
        for key, f in edit.adapters[name].items()
    }
    damaged = replace(edit, adapters={**edit.adapters, name: huge})
    with pytest.raises(NonFiniteEditError):
        apply_edits(base, [damaged], [Cell(0, 1.0, 0)], replace(config(kind).sample, num_inference_steps=20))


def test_a_batch_edits_its_photos(kind: Kind, tmp_path: Path) -> None:
    """`batch run` makes a folder with edit, pictures and report for each photo; its edits render like any other."""
    if kind.folder is None:
        pytest.skip("no command names this family")
    (tmp_path / "photos").mkdir()
    for shade in (30, 90):
        photo(shade).image.save(tmp_path / "photos" / f"{shade}.png")
    quick = ["--steps-embed", "2", "--steps-finetune", "2", "--draws", "2", "--steps-sample", "2", "--quiet"]
    words = ["batch", "run", tmp_path / "photos", "--prompt", SENTENCE, "--out", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(app, [*map(str, [*words, "--model", kind.folder]), *quick])
    assert result.exit_code == 0, result.output
    files = sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == 2
    reports = [json.loads((path.parent / "report.json").read_text()) for path in files]
    assert all(len(report["pictures"]) == 5 for report in reports)
    base = kind.load()
    opened = [read_edit(path) for path in files]
    assert all(check_base(one, base) == "" for one in opened)
    assert apply_edits(base, opened, [Cell(0, 1.0, 0), Cell(1, 1.0, 0)], config(kind).sample)[1].size == (40, 30)
