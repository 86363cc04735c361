"""Facts about DeepFloyd IF: it computes what diffusers' pipelines do, stage by stage, and they read its adapters."""

import fnmatch
import importlib.util
import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, IFPipeline, IFSuperResolutionPipeline, ModelMixin
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from lowmem_imagic import BaseModel, Cell, apply_edits, load_into, make_edits, read_edit, write_edit
from lowmem_imagic.actions import result_folder
from lowmem_imagic.cli.commands import app
from lowmem_imagic.edits.identity import Interface
from lowmem_imagic.engine import base as engine
from lowmem_imagic.errors import (
    BackendUnavailableError,
    BaseMismatchError,
    IncompleteModelError,
    UnknownModelError,
    WrongFamilyError,
)
from lowmem_imagic.families import cached_commit, load_architecture, model_name
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.geometry import Letterbox, Sizes
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.frozen import move_weights
from lowmem_imagic.layers.lora import PackedLoraLayer
from lowmem_imagic.pictures.letterbox import into_canvas, to_tensor
from lowmem_imagic.pipeline.apply import check_base
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.sampling import sample as sampling
from lowmem_imagic.sampling.sample import sample
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.share.export import files_for
from lowmem_imagic.share.programs import inspected
from lowmem_imagic.training import loop as training
from tests.test_families import photo
from tests.tiny_if import NAMES, SIDES, WIDTH, write_tiny

SENTENCE = "A photo of a red Cube on the grass "
SMALL, LARGE = SIDES
META = torch.device("meta")
OPTIONS: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "watermarker": None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage I in a folder, with stage II beside it."""
    return write_tiny(tmp_path_factory.mktemp("if"))


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    """Both stages in fp32, shared by tests that do not change it."""
    return load(folder)


@pytest.fixture(scope="module")
def pipelines(folder: Path) -> tuple[IFPipeline, IFSuperResolutionPipeline]:
    """diffusers' pipelines of both stages; the text encoder in bfloat16, as this package loads it beside fp32."""
    first = IFPipeline.from_pretrained(folder, **OPTIONS)
    second = IFSuperResolutionPipeline.from_pretrained(folder.parent / NAMES[1], **OPTIONS)
    for pipeline in (first, second):
        pipeline.set_progress_bar_config(disable=True)
        pipeline.text_encoder.to(torch.bfloat16)
    return first, second


def load(folder: Path | str, **options: Any) -> BaseModel:
    """The base in a folder, on the CPU."""
    return BaseModel.load(str(folder), device="cpu", **{"weights": "fp32", **options})


def config(**sampling: Any) -> EditConfig:
    """Settings of a short edit."""
    values = {"etas": (0.0, 1.0), "num_inference_steps": 4, "start": "inverted", "mask": 0.3, "guidance_scale": 2.0}
    return EditConfig(
        embed=EmbedConfig(steps=2, draws=2, learning_rate=1e-2),
        finetune=FinetuneConfig(steps=2, draws=2, learning_rate=1e-2, adapt="all", lora_rank=2, lora_alpha=3.0),
        sample=SampleConfig(**{**values, **sampling}),
    )


@pytest.fixture(scope="module")
def edit(base: BaseModel) -> Any:
    """An edit of one photo."""
    [trained] = make_edits(base, [Job(photo(), SENTENCE)], config())
    return trained


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The distance of a tensor from a reference, as a share of the reference's norm."""
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm())


def adapters(base: BaseModel, spread: float = 0.0) -> dict[str, AdapterPack]:
    """Adapters of one edit for both stages, of zeros or drawn."""
    packs = {}
    for denoiser in base.denoisers:
        pack = AdapterPack(base.network(denoiser), denoiser.names, count=1, adapt="all", rank=2, alpha=3.0)
        pack.weights.copy_(spread * torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(5)))
        packs[denoiser.name] = pack
    return packs


@pytest.mark.parametrize("sentence", [SENTENCE, "two birds kissing " * 60, ""])
def test_text_is_encoded_as_the_pipeline_does(base: BaseModel, pipelines: Any, sentence: str) -> None:
    """Lower-cased and stripped, padded to 77 tokens; the empty sentence is the pipeline's negative, not zeros."""
    ours = base.encode_text([sentence])["embeds"]
    tokens, negative = pipelines[0].encode_prompt(sentence or SENTENCE)
    assert ours.shape == (1, 77, WIDTH) and ours.abs().sum() > 0
    assert distance(ours, (tokens if sentence else negative).float()) <= 1e-6


def test_the_text_encoder_is_in_8_bits_beside_a_base_in_8_bits(folder: Path, base: BaseModel) -> None:
    """Its numbers differ by a few percent from those in bfloat16."""
    text = load(folder, weights="int8").encode_text([SENTENCE])["embeds"]
    assert 0 < distance(text, base.encode_text([SENTENCE])["embeds"]) < 0.05


def test_long_sentences_are_cut_with_a_word(base: BaseModel) -> None:
    """Words beyond the 77 tokens are named."""
    assert base.family.check_prompt("a red cube") == ""
    assert base.family.check_prompt(" ".join(["grass"] * 76 + ["sphere"])) == "sphere"


def in_double(network: Any) -> None:
    """Lets a network compute in float64 and give fp32, so that its rounding does not grow over a sampler's steps."""

    def cast(values: Any, dtype: torch.dtype) -> Any:
        if isinstance(values, dict):
            return type(values)({name: cast(value, dtype) for name, value in values.items()})
        if isinstance(values, tuple):
            return tuple(cast(value, dtype) for value in values)
        return values.to(dtype) if isinstance(values, Tensor) and values.is_floating_point() else values

    network.double()
    network.register_forward_pre_hook(
        lambda _, args, named: (cast(args, torch.float64), cast(named, torch.float64)), with_kwargs=True
    )
    network.register_forward_hook(lambda _, args, result: cast(result, torch.float32))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("negative", ["", "a blue sphere"])
def test_pictures_are_those_of_the_pipelines(
    folder: Path, scheduler: Any, negative: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same seed both stages give the pipelines' pictures: thresholding, the noised picture at level 250."""
    base = load(folder)
    pipelines: list[Any] = [IFPipeline.from_pretrained(folder, **OPTIONS)]
    pipelines.append(IFSuperResolutionPipeline.from_pretrained(folder.parent / NAMES[1], **OPTIONS))
    text = base.encode_text([SENTENCE, negative])["embeds"]
    call = {
        "prompt_embeds": text[:1],
        "negative_prompt_embeds": text[1:],
        "num_inference_steps": 6,
        "output_type": "pt",
    }
    # The pipelines would draw their noise in the networks' type.
    monkeypatch.setattr(ModelMixin, "dtype", torch.float32)
    for pipeline, denoiser in zip(pipelines, base.denoisers, strict=True):
        pipeline.set_progress_bar_config(disable=True)
        # The pipeline would round the embeddings to its text encoder's type.
        pipeline.text_encoder = None
        in_double(pipeline.unet)
        in_double(base.network(denoiser))
        # The learned variance is left out.
        pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, variance_type="fixed_small")
        # DDIM does not know the setting, which the pipelines read.
        pipeline.scheduler.register_to_config(variance_type="fixed_small")
    small = pipelines[0](
        generator=torch.Generator().manual_seed(3), height=SMALL, width=SMALL, guidance_scale=7.0, **call
    ).images
    large = pipelines[1](
        image=small.clamp(-1, 1),
        generator=torch.Generator().manual_seed(3),
        height=LARGE,
        width=LARGE,
        guidance_scale=4.0,
        noise_level=250,
        **call,
    ).images
    settings = SampleConfig(
        num_inference_steps=6, guidance_scale=7.0, negative_prompt=negative, scheduler=scheduler.__name__, mask=0.0
    )
    target = Conditioning({"embeds": text[:1]})
    ours = sample(base, adapters(base), target, target, [Cell(0, 1.0, 3)], settings)
    assert distance(ours["unet"], small) <= 1e-6 and distance(ours["unet_2"], large) <= 1e-6


def test_the_photo_is_not_thresholded(base: BaseModel) -> None:
    """Without guidance predictions are clipped alone, as inversion does; with guidance they are thresholded."""
    schedule: Any = base.denoisers[0].schedule
    assert schedule.scheduler("DDIM").config.thresholding
    plain = schedule.scheduler("DDIM", guided=False).config
    assert not plain.thresholding and plain.clip_sample
    assert schedule.inverter(4, (3, SMALL, SMALL))._scheduler.config.clip_sample


def test_stage_two_is_trained_on_the_enlarged_photo_under_the_sentence(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows have the sentence's own embedding and the photo of stage I, enlarged and noised at random levels."""
    seen: dict[str, list[Conditioning]] = {}
    predict = base.predict

    def listening(denoiser: Any, x: Any, at: Any, given: Conditioning) -> Any:
        if torch.is_grad_enabled():
            seen.setdefault(denoiser.name, []).append(given)
        return predict(denoiser, x, at, given)

    monkeypatch.setattr(base, "predict", listening)
    settings = config(start="noise")
    settings = replace(settings, finetune=replace(settings.finetune, steps=6, draws=4))
    [trained] = make_edits(base, [Job(photo(), SENTENCE)], settings)
    sentence = base.encode_text([SENTENCE])["embeds"]
    rows = Conditioning.cat(seen["unet_2"])
    assert all(torch.equal(row, sentence[0]) for row in rows["embeds"])
    assert not torch.equal(seen["unet"][-1]["embeds"][:1], sentence)
    levels = rows["noise_level"]
    assert levels.dtype == torch.int64 and len(levels.unique()) > 12 and levels.min() < 300 and levels.max() > 700
    # At a low level the noised picture is nearly the clean one, enlarged from stage I's size.
    picture = to_tensor(into_canvas(photo().image, Letterbox.fit(40, 30, trained.source.size)))
    clean = base.family.make_extra(base.denoisers[1], 1, trained.source.size, base.encode(picture)["unet"])
    row = int(levels.argmin())
    a = base.denoisers[1]._noising.alpha_bar[levels[row]]  # type: ignore[attr-defined]
    noise = (rows["low_resolution"][row] - a.sqrt() * clean["low_resolution"][0]) / (1 - a).sqrt()
    assert 0.8 < float(noise.std()) < 1.2 and abs(float(noise.mean())) < 0.2
    assert "finetune_unet_2_loss" in trained.settings["result"]


def test_eta_moves_stage_one_alone(base: BaseModel, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage II sees the sentence's own embedding at every eta, and at eta 0 that of the start sentence."""
    seen: dict[str, list[Conditioning]] = {}
    predict = base.predict

    def listening(denoiser: Any, x: Any, at: Any, given: Conditioning) -> Any:
        seen.setdefault(denoiser.name, []).append(given)
        return predict(denoiser, x, at, given)

    monkeypatch.setattr(base, "predict", listening)
    settings = config(guidance_scale=1.0, mask=0.0, num_inference_steps=1).sample
    other = "a blue sphere"
    for eta, expected in ((0.5, other), (0.0, SENTENCE)):
        seen.clear()
        apply_edits(base, [edit], [Cell(0, eta, 0, sentence=other)], settings)
        text = base.encode_text([other, SENTENCE])["embeds"]
        mixed = eta * text[0] + (1 - eta) * edit.conditioning["embeds"].float()
        torch.testing.assert_close(seen["unet"][0]["embeds"][0], mixed)
        assert torch.equal(seen["unet_2"][0]["embeds"][0], text[0 if expected == other else 1])
        assert seen["unet_2"][0]["noise_level"].tolist() == [250]


def test_stage_two_takes_half_of_edit_guidance(base: BaseModel, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a source prompt, stage I makes the difference times edit guidance and eta, and stage II half of that."""
    scales: list[float] = []
    edit_guided = sampling.edit_guided

    def listening(photo: Tensor, sentence: Tensor, described: Tensor, scale: Tensor) -> Tensor:
        scales.append(float(scale))
        return edit_guided(photo, sentence, described, scale)

    monkeypatch.setattr(sampling, "edit_guided", listening)
    settings = config(mask=0.0, num_inference_steps=1, source_prompt="a red cube", edit_guidance_scale=4.0).sample
    apply_edits(base, [edit], [Cell(0, 0.5, 0)], settings)
    assert scales == [2.0, 1.0]


def test_stage_two_keeps_the_photo_where_stage_one_does(
    base: BaseModel, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mask of stage II is that of stage I, enlarged: both compare e_opt with the sentence."""
    sides = []
    change_mask = sampling.change_mask

    def listening(*args: Any, **options: Any) -> Tensor:
        mask = torch.zeros_like(change_mask(*args, **options))
        mask[:, :, : mask.shape[2] // 2] = 1
        sides.append(mask.shape[1:])
        return mask

    monkeypatch.setattr(sampling, "change_mask", listening)
    photo_picture, edited = apply_edits(
        base, [edit], [Cell(0, 0.0, 0), Cell(0, 1.0, 0)], config(num_inference_steps=8).sample
    )
    assert sides == [base.denoisers[0].shape(edit.source.size)[1:]]
    pixels = [torch.tensor(list(p.convert("L").tobytes())).view(30, 40).float() for p in (photo_picture, edited)]
    apart = (pixels[0] - pixels[1]).abs()
    assert apart[:, 28:].max() <= 1 < apart[:, :12].max()


@pytest.mark.parametrize(
    ("weights", "off", "steeper"), [("int8", 0.05, 0.2), ("nf4", 0.4, 0.7)], ids=lambda value: str(value)
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fewer_bits_with_checkpointing_have_the_same_gradients(
    folder: Path, checkpointing: bool, weights: str, off: float, steeper: float
) -> None:
    """In 8 bit a prediction differs by a few percent, in 4 bit by a fifth; checkpointing changes no gradient; outer
    convolutions stay in float."""
    base, plain = load(folder, weights=weights, checkpointing=checkpointing), load(folder)
    for denoiser in base.denoisers:
        network = base.network(denoiser)
        assert type(network.conv_in) is type(network.conv_out) is torch.nn.Conv2d  # type: ignore[union-attr]
        x, at = torch.randn(2, *denoiser.shape((LARGE, LARGE))), torch.tensor([10, 800])
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        extra = base.family.make_extra(denoiser, 2, (LARGE, LARGE), torch.rand(2, 3, SMALL, SMALL))
        given = plain.encode_text([SENTENCE, ""]) | denoiser.drawn(extra, generators, training=False)
        gradients = []
        for tried in (base, plain):
            pack = adapters(tried, 0.05)[denoiser.name]
            gradient = pack.enable_gradients()
            pack.set_rows(None)
            with pack.attached(tried.network(denoiser)):
                tried.predict(denoiser, x, at, given).square().mean().backward()
            gradients.append(gradient.clone())
        assert distance(gradients[0], gradients[1]) < steeper
        with torch.no_grad():
            both = [tried.predict(denoiser, x, at, given) for tried in (base, plain)]
        assert 0 < distance(*both) < off
        base.recompute(not checkpointing)
        pack = adapters(base, 0.05)[denoiser.name]
        gradient = pack.enable_gradients()
        with pack.attached(network):
            base.predict(denoiser, x, at, given).square().mean().backward()
        assert distance(gradient, gradients[0]) <= 1e-5
        base.recompute(checkpointing)


def test_a_pack_in_4_bits_gives_what_each_edit_gets_alone(folder: Path, relative: Any) -> None:
    """On a cascade in nf4 with checkpointing, edits trained side by side equal those trained alone, both adapters."""
    base = load(folder, weights="nf4", checkpointing=True)
    jobs = [Job(photo(), SENTENCE), Job(photo(), "a blue sphere")]
    for job, one in zip(jobs, make_edits(base, jobs, config(), slots=2), strict=True):
        [alone] = make_edits(base, [job], config())
        assert relative(one.conditioning["embeds"], alone.conditioning["embeds"]) < 5e-3
        assert one.base_weights == "nf4" and one.adapters.keys() == {"unet", "unet_2"}
        for name, adapter in alone.adapters.items():
            for key, factors in adapter.items():
                both = (one.adapters[name][key], factors)
                mine, theirs = (f.up.flatten(1).float() @ f.down.flatten(1).float() for f in both)
                assert torch.allclose(mine, theirs, atol=4e-3)


def test_diffusers_reads_both_adapters(base: BaseModel, edit: Any, pipelines: Any, tmp_path: Path) -> None:
    """One file has both adapters and e_opt under peft's keys; each UNet of diffusers computes the same with its own."""
    write_edit(edit, tmp_path / "edit.safetensors")
    tensors = load_file(tmp_path / "edit.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"unet", "unet_2", "lora_imagic"}
    assert "lora_imagic.text.embeds" in tensors and not any(name.endswith("alpha") for name in tensors)
    assert any("add_k_proj" in name for name in tensors) and any("conv1" in name for name in tensors)
    for denoiser, pipeline in zip(base.denoisers, pipelines, strict=True):
        x, at = torch.randn(1, *denoiser.shape((LARGE, LARGE))), torch.tensor([400])
        extra = base.family.make_extra(denoiser, 1, (LARGE, LARGE), torch.rand(1, 3, SMALL, SMALL))
        given = base.encode_text([SENTENCE]) | extra
        pack = AdapterPack.load(base.network(denoiser), denoiser.names, [edit.adapters[denoiser.name]])
        before = base.predict(denoiser, x, at, given)
        with pack.attached(base.network(denoiser)):
            ours = base.predict(denoiser, x, at, given)
        pipeline.unet.load_lora_adapter({k: v.float() for k, v in tensors.items()}, prefix=denoiser.name)
        theirs = denoiser.predict(pipeline.unet, x, at, given)
        assert distance(ours, theirs) <= 1e-5 < distance(ours, before)
        pipeline.unet.unload_lora()
    # The whole file into stage I's pipeline, by diffusers' own way for files.
    pipelines[0].load_lora_weights(str(tmp_path), weight_name="edit.safetensors", adapter_name="edit")
    pipelines[0].unload_lora_weights()


def test_stage_one_alone_edits_small_pictures(folder: Path, edit: Any, tmp_path: Path, caplog: Any) -> None:
    """`FIRST+none` asks for stage I alone; without a folder beside it that is what there is, and it is said."""
    alone = load(f"{folder}+none")
    assert [denoiser.name for denoiser in alone.denoisers] == ["unet"] and alone.sizes.own == (SMALL, SMALL)
    assert not caplog.records
    [small] = make_edits(alone, [Job(photo(), SENTENCE)], config())
    assert set(small.adapters) == {"unet"}
    assert apply_edits(alone, [small], [Cell(0, 1.0, 0)], config().sample)[0].size == (40, 30)
    with pytest.raises(BaseMismatchError):
        check_base(edit, alone)
    lonely = Path(shutil.copytree(folder, tmp_path / "IF-I"))
    assert len(load(lonely).denoisers) == 1
    assert "IF-I is no folder of its second stage" in caplog.text and "small pictures" in caplog.text


def test_stage_two_is_found_or_named(folder: Path, tmp_path: Path) -> None:
    """Of several second stages beside the first one has to be named; both names are those of folders or of the Hub."""
    first = Path(shutil.copytree(folder, tmp_path / "IF-I"))
    second = Path(shutil.copytree(folder.parent / NAMES[1], tmp_path / "IF-II-L"))
    assert len(load(first).denoisers) == 2
    shutil.copytree(second, tmp_path / "IF-II-M")
    with pytest.raises(WrongFamilyError, match="several second stages"):
        load(first)
    assert load(f"{first}+{tmp_path / 'IF-II-M'}").identity == load(f"{first}+{second}").identity
    with pytest.raises(UnknownModelError, match="nothing"):
        load(f"{first}+nothing")
    with pytest.raises(WrongFamilyError, match="IF-I is a IFPipeline, expected the second stage of IF-I"):
        load(f"{first}+{first}")


def test_what_looks_alike_is_refused_by_name(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Other pipelines of DeepFloyd IF, its stages alone, and other cascades are refused, with what to take."""
    cases = {
        "IFInpaintingPipeline": "another task",
        "IFImg2ImgPipeline": "IFPipeline",
        "IFImg2ImgSuperResolutionPipeline": "IFPipeline",
        "IFSuperResolutionPipeline": "stage II of DeepFloyd IF.*stage I",
        "StableDiffusionUpscalePipeline": "another task",
        "UnCLIPPipeline": "Karlo",
        "KandinskyV22Pipeline": "Kandinsky",
    }
    for name, words in cases.items():
        copied = Path(shutil.copytree(folder, tmp_path / name))
        index = (copied / "model_index.json").read_text().replace('"IFPipeline"', f'"{name}"')
        (copied / "model_index.json").write_text(index)
        with pytest.raises(WrongFamilyError, match=words):
            load(copied)
    with pytest.raises(WrongFamilyError, match="no second stage"):
        load(f"{tiny_folder}+{folder}")
    with pytest.raises(WrongFamilyError, match="no second stage"):
        load(f"{tiny_folder}+none")


@pytest.mark.parametrize(
    ("component", "change", "error"),
    [
        ("unet", {"in_channels": 9}, WrongFamilyError),
        ("unet", {"addition_embed_type": None}, WrongFamilyError),
        ("unet", {"encoder_hid_dim": 48}, IncompleteModelError),
        ("unet", {"encoder_hid_dim": 10**9}, IncompleteModelError),
        ("text_encoder", {"d_model": 10**9}, IncompleteModelError),
        ("text_encoder", {"num_layers": 10**6}, IncompleteModelError),
        ("text_encoder", {"model_type": "clip_text_model"}, IncompleteModelError),
    ],
)
def test_foreign_configurations_are_errors(
    folder: Path, tmp_path: Path, component: str, change: dict[str, Any], error: Any
) -> None:
    """A stage of another kind, and sizes without bounds, are refused before anything is built."""
    copied = Path(shutil.copytree(folder, tmp_path / "IF-I"))
    path = copied / component / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(error):
        load(copied)


def test_a_pack_of_both_stages_trains_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits of a pack may be in different stages: each pass has one network."""
    base = load(folder, weights="int8")
    seen = []
    run_pass = training.Trainer.run_pass

    def listening(self: Any, denoiser: Any, *args: Any) -> Tensor:
        seen.append(denoiser.name)
        return run_pass(self, denoiser, *args)

    monkeypatch.setattr(training.Trainer, "run_pass", listening)
    jobs = [Job(photo(shade), SENTENCE) for shade in (30, 60, 90)]
    edits = make_edits(base, jobs, config(start="noise"), slots=2)
    [alone] = make_edits(base, jobs[2:], config(start="noise"))
    assert {"unet", "unet_2"} == set(seen) and len(edits) == 3
    for name, adapter in alone.adapters.items():
        for key, factors in adapter.items():
            mine = edits[2].adapters[name][key]
            assert torch.allclose(
                mine.up.flatten(1).float() @ mine.down.flatten(1).float(),
                factors.up.flatten(1).float() @ factors.down.flatten(1).float(),
                atol=4e-3,
            )


def test_networks_take_turns_on_the_device(folder: Path, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `in_turn` the other network waits in main memory whenever one predicts, and edits have the same bits."""
    base = load(folder, weights="int8")
    [plain] = make_edits(base, [Job(photo(), SENTENCE)], config())
    names = {id(base.network(denoiser)): denoiser.name for denoiser in base.denoisers}
    # The device of these tests is main memory itself, so the moves are counted.
    waiting: set[str] = set()

    def moved(network: Any, _: Any) -> None:
        assert not any(isinstance(layer, PackedLoraLayer) for layer in network.modules())
        waiting.symmetric_difference_update({names[id(network)]})

    monkeypatch.setattr(engine, "move_weights", moved)
    predict, turns = base.predict, []

    def listening(denoiser: Any, *args: Any) -> Any:
        result = predict(denoiser, *args)
        assert waiting == set(names.values()) - {denoiser.name}
        turns.append(denoiser.name)
        return result

    monkeypatch.setattr(base, "predict", listening)
    cells = [Cell(0, 0.0, 0), Cell(0, 1.0, 0)]
    with base.restored():
        base.in_turn = True
        [trained] = make_edits(base, [Job(photo(), SENTENCE)], config())
        pictures = apply_edits(base, [trained], cells, config().sample)
    assert trained.adapters == plain.adapters and trained.noise.keys() == {"unet", "unet_2"}
    # Both are inverted, trained and sampled, one after the other.
    assert sum(one != other for one, other in pairwise(turns)) == 5
    monkeypatch.setattr(base, "predict", predict)
    again = apply_edits(base, [trained], cells, config().sample)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in again] and not waiting


@pytest.mark.parametrize("weights", ["int8", "nf4", "bf16"])
def test_moved_weights_compute_the_same(folder: Path, weights: str) -> None:
    """A network predicts the same bits after it was moved away and back, before its first pass and after it."""
    base = load(folder, weights=weights)
    denoiser = base.denoisers[0]
    x, at, given = torch.randn(1, *denoiser.shape((LARGE, LARGE))), torch.tensor([400]), base.encode_text([SENTENCE])
    predictions = []
    with torch.no_grad():
        for _ in range(3):
            # A copy has another address, as on another device.
            for weight in base.network(denoiser).parameters():
                weight.data = weight.data.clone()
            move_weights(base.network(denoiser), torch.device("cpu"))
            predictions.append(base.predict(denoiser, x, at, given))
    assert all(torch.equal(one, predictions[0]) for one in predictions)


def test_the_command_edits_with_a_cascade(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`edit` makes pictures of stage II's size and a file that `inspect` reads; its sheet speaks of no autoencoder."""
    sheets, drawn = list[list[str]](), result_folder.contact_sheet

    def watched(cells: Any, **how: Any) -> Any:
        sheets.append([label for label, _ in cells])
        return drawn(cells, **how)

    monkeypatch.setattr(result_folder, "contact_sheet", watched)
    photo().image.save(tmp_path / "photo.png")
    words = ["edit", str(tmp_path / "photo.png"), SENTENCE, "--model", str(folder), "--out", str(tmp_path / "made")]
    words += ["--steps-embed", "1", "--steps-finetune", "1", "--steps-sample", "2", "--etas", "0,1"]
    words += ["--device", "cpu", "--quiet"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    [labels] = sheets
    assert labels[:2] == ["photo", "photo at the model's size"] and len(labels) == 5
    [edited] = (tmp_path / "made").glob("eta_1*.png")
    with Image.open(edited) as picture:
        assert picture.size == photo().image.size
    [made] = (tmp_path / "made").glob("*.safetensors")
    told = CliRunner().invoke(app, ["inspect", str(made)])
    assert told.exit_code == 0 and SENTENCE in told.output


def test_both_stages_come_from_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A published stage I brings its stage II, of which the network and configurations alone are downloaded."""
    remote = {"DeepFloyd/IF-I-L-v1.0": folder}
    remote |= {f"DeepFloyd/IF-II-{size}-v1.0": folder.parent / NAMES[1] for size in "LM"}
    asked, wanted = list[str](), list[str | None]()

    def snapshot_download(
        repository: str, *, allow_patterns: list[str], local_files_only: bool, revision: str | None, **_: Any
    ) -> str:
        wanted.append(revision)
        local = tmp_path / repository / f"{len(repository):040x}"
        for path in sorted(remote[repository].rglob("*")):
            name = path.relative_to(remote[repository]).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                if local_files_only and not (local / name).exists():
                    raise FileNotFoundError(name)
                asked.append(f"{repository}/{name}")
                (local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, local / name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert cached_commit("DeepFloyd/IF-I-L-v1.0", None) is None
    base = load("if-l")
    assert base.name == "DeepFloyd/IF-I-L-v1.0" and len(base.denoisers) == 2
    second = [name for name in asked if "IF-II-L" in name and name.endswith(".safetensors")]
    assert second and all("/unet/" in name for name in second)
    assert base.identity.files == load(folder).identity.files
    both = base.identity.revision
    assert both is not None and "+" in both and cached_commit("DeepFloyd/IF-I-L-v1.0", None) == both
    # An edit is rendered with the commits of both stages that it was made with, and nothing newer is looked for.
    wanted.clear()
    assert load("DeepFloyd/IF-I-L-v1.0", revision=both).identity == base.identity
    assert sorted(set(wanted)) == sorted(both.split("+"))
    # So is one of the first stage alone, or with another second stage than the usual one.
    alone = load("if-l+none")
    assert len(alone.denoisers) == 1 and alone.identity.revision == f"{both.split('+')[0]}+none"
    again = load("DeepFloyd/IF-I-L-v1.0", revision=cached_commit("DeepFloyd/IF-I-L-v1.0", alone.identity.revision))
    assert again.identity == alone.identity
    other = load("if-l+DeepFloyd/IF-II-M-v1.0")
    told = other.identity.revision
    assert told is not None and "+DeepFloyd/IF-II-M-v1.0@" in told
    again = load("DeepFloyd/IF-I-L-v1.0", revision=cached_commit("DeepFloyd/IF-I-L-v1.0", told))
    assert again.identity == other.identity
    assert model_name("DeepFloyd/IF-I-L-v1.0", told) == "DeepFloyd/IF-I-L-v1.0+DeepFloyd/IF-II-M-v1.0"
    assert model_name("DeepFloyd/IF-I-L-v1.0", both) == "DeepFloyd/IF-I-L-v1.0"
    # Without the second stage on this machine an edit's file would lead to a download.
    shutil.rmtree(tmp_path / "DeepFloyd/IF-II-L-v1.0")
    assert cached_commit("DeepFloyd/IF-I-L-v1.0", None) is None
    assert len(load("if-l+none").denoisers) == 1


def test_a_gated_repository_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused download tells to accept the licence."""

    class GatedRepoError(OSError):
        """As the Hub's client raises it."""

    def refuse(*_: Any, **__: Any) -> None:
        raise GatedRepoError("403 Client Error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UnknownModelError, match="accept its licence on its page of the Hub"):
        load("if-xl")


@pytest.mark.parametrize(("name", "millions"), [("if-m", 371.6), ("if-l", 935.4)])
def test_published_configurations_have_the_published_sizes(name: str, millions: float) -> None:
    """Networks built from the package's configurations have as many weights as the published ones, both stages."""
    family: Any = load_architecture(name)
    sizes = [
        sum(weight.numel() for weight in d.load(weights="bf16", device=META, dtype=torch.bfloat16).parameters()) / 1e6
        for d in family.denoisers
    ]
    assert sizes == pytest.approx([millions, 1187.6], abs=0.1)
    encoder = family.load_text_encoder("text_encoder", weights="bf16", device=META, dtype=torch.bfloat16)
    assert sum(weight.numel() for weight in encoder.parameters()) / 1e6 == pytest.approx(4762.3, abs=0.1)
    assert family.family == name and family.sizes == Sizes((256, 256), 32, 128)
    assert family.text["embeds"].shape == (77, 4096)
    alone = load_architecture(f"{name}+none")
    assert len(alone.denoisers) == 1 and alone.sizes == Sizes((64, 64), 8, 32)


@pytest.mark.parametrize("photo", [(4000, 4000), (4000, 3000), (9000, 1000), (1000, 9000)])
def test_an_edit_of_the_real_shapes_fits_into_a_file(photo: tuple[int, int], edit: Any, tmp_path: Path) -> None:
    """The tensors of a real DeepFloyd IF, 77 x 4096 numbers of text and noise as large as the picture, are within a
    file's limits, for photos of any aspect."""
    width, height = load_architecture("if-l").sizes.nearest(*photo)
    interface = Interface(text={"embeds": 4096}, denoisers={"unet": "epsilon", "unet_2": "epsilon"})
    large = replace(
        edit,
        base=replace(edit.base, interface=interface),
        conditioning={"embeds": torch.randn(77, 4096).half()},
        noise={
            "unet": torch.randn(3, height // 4, width // 4).half(),
            "unet_2": torch.randn(3, height, width).half(),
        },
        source=replace(edit.source, size=(width, height), box=(0, 0, width, height)),
    )
    write_edit(large, tmp_path / "edit.safetensors")
    assert read_edit(tmp_path / "edit.safetensors") == large


def test_pipelines_of_diffusers_take_no_cascade(edit: Any, pipelines: Any, tmp_path: Path) -> None:
    """`load_into` refuses an edit of two networks, and a pipeline without an autoencoder; `inspect` says what works."""
    write_edit(edit, tmp_path / "edit.safetensors")
    [diffusers] = [use for use in inspected(tmp_path / "edit.safetensors")["programs"] if use["program"] == "diffusers"]
    assert "load_lora_adapter" in diffusers["does"] and "unless you mix" in diffusers["lacks"]
    note = files_for("diffusers", edit, "edit")["README.md"].decode()
    assert "`unet` and `unet_2`" in note and 'prefix="unet")' in note and "load_into" not in note
    with pytest.raises(BaseMismatchError, match=r"2 networks \(unet, unet_2\)"):
        load_into(pipelines[0], edit)
    alone = replace(
        edit,
        base=replace(edit.base, interface=Interface(text={"embeds": WIDTH}, denoisers={"unet": "epsilon"})),
        **{name: {"unet": getattr(edit, name)["unet"]} for name in ("adapters", "coarse", "noise")},
    )
    with pytest.raises(WrongFamilyError, match="IFPipeline has no vae"):
        load_into(pipelines[0], alone)


def test_plans_of_other_sizes_follow_the_size(base: BaseModel) -> None:
    """Costs are those of pictures of the asked size in both stages."""
    costs = [
        Costs(base.family, config(), weights="int8", dtype=torch.float32, part_dtype=torch.float32, size=size)
        for size in ((LARGE, LARGE), (LARGE // 2, LARGE // 2))
    ]
    own, small = ([one.train(2, 1, checkpointing=False, stage=stage) for stage in one.stages] for one in costs)
    assert all(2 * less < more for less, more in zip(small, own, strict=True))
    assert costs[1].sample(2) < costs[0].sample(2)


def test_the_text_encoder_may_come_from_elsewhere(folder: Path, base: BaseModel, tmp_path: Path) -> None:
    """Sizes of stage I share one T5: `text_from` takes it from another folder; there is no autoencoder to replace."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    first = Path(shutil.copytree(folder, tmp_path / "IF-I"))
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(first / part)
    shutil.copytree(folder.parent / NAMES[1], tmp_path / "IF-II")
    with pytest.raises(IncompleteModelError, match="text_encoder"):
        load(first)
    mixed = load(first, text_from=other)
    assert mixed.identity.files == base.identity.files and len(mixed.denoisers) == 2
    assert torch.equal(mixed.encode_text([SENTENCE])["embeds"], base.encode_text([SENTENCE])["embeds"])
    mixed.network(mixed.denoisers[1])
    with pytest.raises((WrongFamilyError, UnknownModelError), match="vae"):
        load(first, text_from=other, vae=other)


def test_damaged_files_are_named(folder: Path, tmp_path: Path) -> None:
    """Weights that do not fit, and files that are missing, give one line with the stage that they are of."""
    first = Path(shutil.copytree(folder, tmp_path / "IF-I"))
    second = Path(shutil.copytree(folder.parent / NAMES[1], tmp_path / "IF-II"))
    shutil.copy(first / "unet" / "diffusion_pytorch_model.safetensors", second / "unet")
    with pytest.raises(IncompleteModelError, match="the UNet of stage II"):
        base = load(first)
        base.network(base.denoisers[1])
    (second / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(IncompleteModelError, match="IF-II lacks unet/diffusion_pytorch_model"):
        load(first)
    tokenizer = first / "tokenizer" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "vocab_file": "/somewhere/else.model"}))
    with pytest.raises(IncompleteModelError, match="names a file elsewhere"):
        load(f"{first}+none").encode_text([SENTENCE])


def test_a_tokenizer_of_sentencepiece_needs_its_package(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package, the error says what to install."""
    first = Path(shutil.copytree(folder, tmp_path / "IF-I"))
    (first / "tokenizer" / "tokenizer.json").rename(first / "tokenizer" / "spiece.model")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(BackendUnavailableError, match=r"pip install '\.\[t5\]'"):
        load(f"{first}+none").encode_text([SENTENCE])
