"""Facts about the script that trains the bundled model: it resumes, goes on from a finished model, and weighs."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from lowmem_imagic.demo import architecture, pictures, train
from lowmem_imagic.demo.render import render
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families.files.source import Folder

STEPS = 600


def run_trainer(path: Path, stop: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """A regression trained up to step `stop`, from its checkpoint if there is one: its weights and their average."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    trainer = train.Trainer({"layer": layer}, path=path, steps=STEPS, learning_rate=1e-2)
    for step in trainer:
        if step == stop:
            break
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        trainer.update((layer(x) - x[:, :3]).square().mean())
    return layer.weight.detach().clone(), trainer.average["layer.weight"]


@pytest.mark.parametrize("stop", [100, 250, 599])
def test_a_stopped_training_resumes_as_if_it_had_not_stopped(stop: int, tmp_path: Path) -> None:
    """Stopped anywhere and started again, a training ends in the same bits as an uninterrupted one."""
    whole = run_trainer(tmp_path / "whole.safetensors")
    run_trainer(tmp_path / "stopped.safetensors", stop)
    resumed = run_trainer(tmp_path / "stopped.safetensors")
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed, whole, strict=True))


def test_a_stopped_training_loses_at_most_250_steps(tmp_path: Path) -> None:
    """The checkpoint of a training stopped at step 599 holds step 500."""
    run_trainer(tmp_path / "stopped.safetensors", 599)
    assert int(load_file(tmp_path / "stopped.safetensors")["step"]) == 500


def test_weights_of_timesteps() -> None:
    """The weight is 1 + 1/SNR between its bounds, never above 10, and 5/SNR of that where the SNR is above 5."""
    scheduler = architecture.new_scheduler()
    weights = train.loss_weights(scheduler)
    snr = [float(a / (1 - a)) for a in scheduler.alphas_cumprod.double()]
    for t in range(0, 1000, 37):
        expected = min(10.0, 1 + 1 / snr[t]) * min(1.0, 5 / snr[t])
        assert weights[t].item() == pytest.approx(expected, rel=1e-4)
    assert weights[0] < 0.01 < 9.9 < weights[999]


def train_on(folder: Path, *more: str) -> Path:
    """A folder written by the command line: the bundled model trained on for two steps of its UNet."""
    source = BaseModel.load("demo", device="cpu").family.source
    assert isinstance(source, Folder)
    words = ["train", "--out", str(folder / "out"), "--start-from", str(source.path), "--scenes", "4", "--seed", "9"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, "--unet-steps", "2", "--unet-batch", "2", "--processes", "1", *more])
        train.main()
    return folder / "out"


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model trained on for two steps."""
    return train_on(tmp_path_factory.mktemp("train"))


def test_going_on_keeps_autoencoder_and_tokenizer(trained_on: Path) -> None:
    """A model trained on has the VAE and tokenizer it started with, and another UNet and text encoder."""
    before = BaseModel.load("demo", device="cpu").identity.files
    after = BaseModel.load(str(trained_on), device="cpu").identity.files
    same = {part for part in before if before[part] == after[part]}
    assert same == {"vae", "tokenizer"}


def test_training_the_decoder_keeps_the_encoder(tmp_path: Path) -> None:
    """A decoder trained on changes no weight of its encoder, so latents, and edits made of them, stay what they are."""
    out = train_on(tmp_path, "--decoder-steps", "2", "--vae-batch", "2", "--bfloat16")
    source = BaseModel.load("demo", device="cpu").family.source
    assert isinstance(source, Folder)
    files = [folder / "vae" / "diffusion_pytorch_model.safetensors" for folder in (source.path, out)]
    before, after = map(load_file, files)
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "post_quant_conv"}


def test_attention_is_not_rounded_to_bfloat16() -> None:
    """Inside of bfloat16 autocast the training computes attention in fp32, and everything else in bfloat16."""
    query, key, value = torch.randn(3, 2, 4, 64, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    wide = F.scaled_dot_product_attention(query.float(), key.float(), value.float())
    with torch.autocast("cpu", torch.bfloat16), train.Fp32Attention():
        assert torch.equal(F.scaled_dot_product_attention(query, key, value), wide.bfloat16())
        assert (query.float() @ key.float().mT).dtype == torch.bfloat16


def test_a_trained_folder_is_a_plain_diffusers_folder(trained_on: Path) -> None:
    """The folder is a StableDiffusionPipeline in fp16, its text encoder named as every transformers reads it, and says
    nothing of where it came from."""
    assert "_name_or_path" not in "".join(path.read_text() for path in trained_on.rglob("*.json"))
    assert json.loads((trained_on / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    text_encoder = load_file(trained_on / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") and not name.startswith("text_model.text_") for name in text_encoder)
    assert {t.dtype for t in text_encoder.values()} == {torch.float16}
    # transformers loads in the type that is written here, and the pipeline's other parts load in fp32.
    assert json.loads((trained_on / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    assert not [path for path in trained_on.rglob("*") if path.suffix in (".bin", ".pt", ".partial")]


def test_scenes_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendered pictures are those of their scenes; those in the file are not rendered again, others are added."""
    path = tmp_path / "pictures.npy"
    kept = pictures.rendered(path, seed=5, count=2, processes=1)
    kept[1] = 7
    np.save(path, kept)
    more = pictures.rendered(path, seed=5, count=3, processes=1)
    assert np.array_equal(more[:2], kept)
    assert np.array_equal(more[2], np.asarray(render(pictures.scene_at(5, 2), architecture.SIZE_PX)))
    monkeypatch.setattr(pictures.multiprocessing, "get_context", None)
    assert np.array_equal(pictures.rendered(path, seed=5, count=2, processes=1), kept)
