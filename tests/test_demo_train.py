"""Facts about the script that trains the bundled model: it resumes, ends in time, goes on from a finished model."""

import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import nn

from lowmem_imagic.demo import architecture, train
from lowmem_imagic.demo.attributes import MATERIALS
from lowmem_imagic.demo.trainer import Trainer, exact_attention
from lowmem_imagic.demo.training_presets import PRESETS
from lowmem_imagic.demo.training_scenes import Scenes, tokenizer_at

STEPS = 600


class Clock:
    """A clock that goes on by a second a step."""

    now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


def run_trainer(path: Path, stop: int = STEPS, dtype: torch.dtype = torch.float32) -> Trainer:
    """A regression trained for 600 seconds, from its checkpoint if there is one, or up to step `stop`."""
    torch.manual_seed(0)
    layer, clock = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 3)).to(dtype), Clock()
    trainer = Trainer(
        {"layer": layer}, path=path, seconds=STEPS, learning_rate=1e-2, adam_rate=1e-2, clock=clock, save_every=250
    )
    for step in trainer:
        if step == stop:
            break
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        trainer.update((layer(x.to(dtype)).float() - x[:, :3]).square().mean())
        clock.now += 1
    return trainer


@pytest.mark.parametrize("stop", [100, 250, 599])
def test_a_stopped_training_resumes_as_if_it_had_not_stopped(stop: int, tmp_path: Path) -> None:
    """Stopped anywhere and started again, a training ends in the same bits, in the time that it had left."""
    whole = run_trainer(tmp_path / "whole.safetensors")
    run_trainer(tmp_path / "stopped.safetensors", stop)
    resumed = run_trainer(tmp_path / "stopped.safetensors")
    assert resumed.step == whole.step == STEPS
    for name in ("layer.0.weight", "layer.1.weight", "layer.1.bias"):
        assert torch.equal(resumed.exact[name], whole.exact[name])
        assert torch.equal(resumed.average[name], whole.average[name])


def test_a_stopped_training_loses_at_most_the_time_between_checkpoints(tmp_path: Path) -> None:
    """The checkpoint of a training stopped after 599 of 600 seconds, saved every 250, is that of 500."""
    run_trainer(tmp_path / "stopped.safetensors", 599)
    assert float(load_file(tmp_path / "stopped.safetensors")["spent"]) == 500


def test_the_rate_falls_to_zero_at_the_end_of_the_time(tmp_path: Path) -> None:
    """The learning rate warms up, is constant, and falls to next to nothing in the last second."""
    rates = {stop: run_trainer(tmp_path / f"{stop}.safetensors", stop).rate() for stop in (9, 300, STEPS - 1)}
    assert rates[9] == pytest.approx(10 / 100)
    assert rates[300] == 1
    assert rates[STEPS - 1] < 0.01


def test_rounded_weights_are_trained_exactly(tmp_path: Path) -> None:
    """Layers in bfloat16 learn what they learn in fp32: small steps add up."""
    whole, rounded = (
        run_trainer(tmp_path / str(dtype), dtype=dtype).average for dtype in (torch.float32, torch.bfloat16)
    )

    def learnt(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return weights["layer.2.weight"] @ weights["layer.1.weight"] @ weights["layer.0.weight"]

    assert learnt(rounded).dtype == torch.float32
    assert (learnt(whole) - torch.eye(3, 4)).abs().max() < 0.02
    assert (learnt(rounded) - torch.eye(3, 4)).abs().max() < 0.05


def test_matrices_take_steps_of_equal_size_in_all_directions(tmp_path: Path) -> None:
    """Matrices and kernels of convolutions are trained with Muon: a step's singular values are alike, and embeddings
    and biases with AdamW."""
    modules = {"conv": nn.Conv2d(8, 6, 3), "table": nn.ModuleDict({"token_embedding": nn.Embedding(9, 8)})}
    before = {name: p.detach().clone() for part in modules.values() for name, p in part.named_parameters()}
    trainer = Trainer(modules, path=tmp_path / "x", seconds=9, learning_rate=0.1, adam_rate=1e-3, clock=Clock())
    torch.manual_seed(0)
    x = torch.randn(4, 8, 5, 5)
    rows = modules["table"]["token_embedding"](torch.arange(4))
    trainer.update(modules["conv"](x).square().sum() + (rows * torch.randn(4, 8)).sum())
    step = (modules["conv"].weight.detach() - before["weight"]).flatten(1)
    singular = torch.linalg.svdvals(step)
    assert singular.max() / singular.min() < 3
    moved = (modules["table"]["token_embedding"].weight.detach() - before["token_embedding.weight"]).abs()
    assert moved[:4].max() == pytest.approx(1e-3 / 100, rel=0.1)
    assert moved[4:].max() < 1e-6


def test_a_loss_that_is_no_number_is_taken_back(tmp_path: Path) -> None:
    """A training whose loss is not finite is where it was at its last check, at half its rates."""
    layer = nn.Linear(2, 1)
    trainer = Trainer(
        {"layer": layer}, path=tmp_path / "x", seconds=9, learning_rate=1e-2, adam_rate=1e-3, clock=Clock()
    )
    before = layer.weight.detach().clone()
    assert trainer.check(1.0)
    trainer.update(layer(torch.full((1, 2), math.inf)).sum())
    assert not layer.weight.isfinite().all()
    assert not trainer.check(math.nan)
    assert torch.equal(layer.weight, before)
    assert trainer.highest_rates == [5e-4]


def test_weights_of_timesteps() -> None:
    """The weight is 1 + 1/SNR between its bounds, never above 10, and 5/SNR of that where the SNR is above 5."""
    scheduler = architecture.new_scheduler()
    weights = train.loss_weights(scheduler)
    snr = [float(a / (1 - a)) for a in scheduler.alphas_cumprod.double()]
    for t in range(0, 1000, 37):
        expected = min(10.0, 1 + 1 / snr[t]) * min(1.0, 5 / snr[t])
        assert weights[t].item() == pytest.approx(expected, rel=1e-4)
    assert weights[0] < 0.01 < 9.9 < weights[999]


class Ticks(Clock):
    """A clock that goes on whenever it is read, so that a training takes as many steps on every machine."""

    def __call__(self) -> float:
        """Seconds."""
        self.now += 0.1
        return self.now


def trained(folder: Path, *more: str) -> Path:
    """A folder written by the command line at its smallest, after a few steps."""

    def few_steps(modules: dict[str, nn.Module], **settings: Any) -> Trainer:
        return Trainer(modules, **{**settings, "seconds": 2.0, "save_every": 1.0, "clock": Ticks()})

    words = ["train", "--out", str(folder / "out"), "--preset", "tiny", "--device", "cpu", *more]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.setattr(train, "Trainer", few_steps)
        train.main()
    return folder / "out"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained for seconds."""
    return trained(tmp_path_factory.mktemp("train"))


def _weights(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return {name: t for path in (folder / part).glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.benchmark
def test_going_on_starts_from_the_weights_that_fit(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model trained on takes tokenizer and weights from the folder; what has another shape starts afresh."""
    start = tmp_path / "start"
    shutil.copytree(finished, start)
    name = "conv_in.weight"
    weights = _weights(start, "unet")
    weights[name] = weights[name][:, :4].contiguous()
    save_file(weights, next((start / "unet").glob("*.safetensors")))
    again = trained(tmp_path, "--start-from", str(start), "--seed", "9")
    assert f"unet: {len(weights) - 1} of {len(weights)} tensors" in capsys.readouterr().err
    for file in ("vocab.json", "merges.txt"):
        assert (again / "tokenizer" / file).read_bytes() == (finished / "tokenizer" / file).read_bytes()
    after = _weights(again, "unet")
    kept = "down_blocks.0.resnets.0.conv1.weight"
    assert (after[kept].float() - weights[kept].float()).abs().mean() < 0.01
    assert after[name].shape == (64, architecture.LATENT_CHANNELS, 3, 3)


@pytest.mark.benchmark
def test_each_part_can_be_trained_alone_into_the_same_folder(finished: Path, tmp_path: Path) -> None:
    """With ``--only`` a process trains the decoder or the UNet; the folder has the work of both."""
    decoder = trained(tmp_path, "--only", "decoder")
    first = _weights(decoder, "vae")
    unet = _weights(decoder, "unet")
    both = trained(tmp_path, "--only", "unet")
    assert all(torch.equal(first[name], tensor) for name, tensor in _weights(both, "vae").items())
    assert any(not torch.equal(unet[name], tensor) for name, tensor in _weights(both, "unet").items())


@pytest.mark.benchmark
def test_trained_weights_go_on_at_a_part_of_the_rates(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``--start-from`` all learning rates of both parts are the preset's share of those for new weights."""
    rates: list[list[float]] = []
    steps = Trainer.__iter__

    def noted(trainer: Trainer) -> Iterator[int]:
        rates.append(trainer.highest_rates)
        yield from steps(trainer)

    monkeypatch.setattr(Trainer, "__iter__", noted)
    trained(tmp_path / "new")
    trained(tmp_path / "on", "--start-from", str(finished))
    preset = PRESETS["tiny"]
    assert [muon for _, muon in rates[:2]] == [preset.decoder_rate, preset.unet_rate]
    assert preset.continued < 1
    assert rates[2:] == [pytest.approx([preset.continued * rate for rate in new]) for new in rates[:2]]


@pytest.mark.benchmark
def test_captions_that_name_a_material_are_taken_more_often(finished: Path) -> None:
    """A caption with the name of a material has three times the weight of one without, and is drawn as often."""
    work, preset = finished.with_name("out.work"), PRESETS["tiny"]
    tokenizer = work / "tokenizer"
    code = train.linear_code(work, preset, torch.device("cpu"))
    scenes = Scenes(work, tokenizer, code, preset, seed=train.SEED, device=torch.device("cpu"))
    captions = tokenizer_at(tokenizer).batch_decode(scenes.tokens[: scenes.count].flatten(0, 1))
    named = [any(word in caption.split() for word in MATERIALS) for caption in captions]
    assert scenes.weights[: scenes.count].flatten().tolist() == [3.0 if one else 1.0 for one in named]
    four = torch.tensor(named).view(-1, 4)
    scene = next(row for row, own in enumerate(four) if own.sum() == 1)
    drawn = scenes.captions(torch.full((4000,), scene), torch.Generator().manual_seed(0))
    taken = (drawn == scenes.tokens[scene][four[scene]]).all(-1).float().mean()
    assert taken == pytest.approx(3 / 6, abs=0.04)


def test_attention_is_not_rounded_to_bfloat16_on_cpus() -> None:
    """With weights in bfloat16 the training computes attention in fp32 on CPUs, and everything else in bfloat16."""
    query, key, value = torch.randn(3, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with exact_attention(torch.device("cpu")):
        assert torch.equal(F.scaled_dot_product_attention(query, key, value), wide.bfloat16())
        assert torch.equal(F.scaled_dot_product_attention(query=query, key=key, value=value), wide.bfloat16())
        assert (query @ key.mT).dtype == torch.bfloat16


@pytest.mark.benchmark
def test_a_trained_folder_is_a_plain_diffusers_folder(finished: Path) -> None:
    """The folder is a StableDiffusionPipeline in fp16, its text encoder named as every transformers reads it, no file
    above 16 MB and 30 MB in all, and says nothing of where it came from."""
    assert "_name_or_path" not in "".join(path.read_text() for path in finished.rglob("*config.json"))
    assert json.loads((finished / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    text_encoder = _weights(finished, "text_encoder")
    assert all(name.startswith("text_model.") and not name.startswith("text_model.text_") for name in text_encoder)
    assert {t.dtype for part in ("unet", "vae") for t in _weights(finished, part).values()} == {torch.float16}
    # transformers loads in the type that is written here, and the pipeline's other parts load in fp32.
    assert json.loads((finished / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".txt"}
    assert max(path.stat().st_size for path in files) <= 16e6
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


@pytest.mark.benchmark
def test_a_trained_folder_works_in_a_stock_pipeline(finished: Path) -> None:
    """diffusers' own pipeline makes a picture from the folder with default settings."""
    pipeline = StableDiffusionPipeline.from_pretrained(finished, local_files_only=True)
    assert isinstance(pipeline.vae, AutoencoderKL)
    [picture] = pipeline("a red cube", num_inference_steps=1, output_type="np").images
    assert picture.shape == (architecture.SIZE_PX, architecture.SIZE_PX, 3)
