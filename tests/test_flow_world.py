"""Facts about the script that trains a small FLUX.2 klein on the bundled world (`benchmarks.flow_world`)."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline
from safetensors.torch import load_file

from benchmarks import flow_world
from benchmarks.world_quality import drawn
from benchmarks.world_training import SEED, WORLDS, size_of, world_captions
from lowmem_imagic import BaseModel
from lowmem_imagic.demo.pictures import render_batch, scene_at, to_tensor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the script writes before any step; its statistics are those of a few scenes."""
    out = tmp_path_factory.mktemp("flow")
    tokenizer, vae = flow_world.new_tokenizer(SEED), flow_world.new_vae()
    torch.manual_seed(0)
    encoder = flow_world.new_text_encoder(len(tokenizer))
    flow_world.set_statistics(vae, flow_world.patches(vae, render_batch([scene_at(3, n) for n in range(4)], 128)))
    flow_world.publish(out / "none", out, tokenizer, encoder, vae)
    assert 0 < size_of(out / flow_world.FOLDER) <= flow_world.MOST_BYTES
    return out / flow_world.FOLDER


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    """The folder, loaded."""
    return BaseModel.load(str(folder), device="cpu")


def test_its_folder_is_a_klein_of_the_bundled_worlds_size(base: BaseModel) -> None:
    """The folder is taken as a FLUX.2 klein for pictures of 128 px, in 8 x 8 places of 80 numbers."""
    assert base.family.group == "flow" and base.sizes.own == (128, 128)
    assert base.denoisers[0].shape((128, 128)) == (80, 8, 8)
    assert base.encode_text(["a red cube"])["embeds"].shape == (1, flow_world.TOKENS, 3 * flow_world.WIDTH)


def test_a_stock_pipeline_draws_with_it(folder: Path) -> None:
    """diffusers' pipeline loads the folder with its default settings, all parts in one type, and makes a picture."""
    pipeline = Flux2KleinPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline(prompt="a red cube", height=128, width=128, num_inference_steps=1).images[0]
    assert picture.size == (128, 128)


def test_its_autoencoder_is_the_bundled_models(base: BaseModel) -> None:
    """A picture comes back as from the bundled model, and latents have mean 0 and deviation 1 in each channel."""
    pictures = render_batch([scene_at(3, number) for number in range(4)], 128)
    x = to_tensor(pictures, torch.device("cpu"))
    latents = base.encode_images(x)
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(80), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(80), atol=0.05, rtol=0)
    bundled = BaseModel.load("demo", device="cpu")
    torch.testing.assert_close(base.decode(latents), bundled.decode(bundled.encode_images(x)), atol=0.02, rtol=0)


def test_captions_fit_into_the_short_training(base: BaseModel) -> None:
    """Every caption has its end and padding within the tokens that most of the training sees, one token a word, and the
    family reads the same tokens."""
    tokenizer = flow_world.new_tokenizer(SEED)
    captions = world_captions(SEED)[:200]
    ids = flow_world.encoded(tokenizer, [*captions, "a photo of a red metal cube on a grass floor"])
    assert ids.shape[1] == flow_world.SHORT_TOKENS and bool((ids[:, -1] == tokenizer.pad_token_id).all())
    assert len(tokenizer.tokenize("a photo of a red metal cube on a grass floor")) == 11
    own = tokenizer(flow_world.chat(tokenizer, captions[0]), padding="max_length", max_length=flow_world.TOKENS)
    assert own.input_ids[: flow_world.SHORT_TOKENS] == ids[0].tolist()


def test_the_trained_model_draws_what_is_said() -> None:
    """diffusers' own pipeline draws named colours and floors with the committed model: 5 of 8 attributes and more."""
    assert 0 < size_of(WORLDS / flow_world.FOLDER) <= flow_world.MOST_BYTES
    with torch.no_grad():
        samples = drawn(WORLDS / flow_world.FOLDER, 4, steps=8)
    found = samples.summary(1)
    assert found is not None and sum(found["attributes"][name]["right"] for name in ("color", "floor")) >= 5


@pytest.mark.process
def test_it_trains_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script trains the transformer, with short sentences and with whole ones, and goes on from its checkpoint."""
    monkeypatch.setattr(sys, "argv", ["flow_world", "--out", str(tmp_path), "--preset", "tiny", "--device", "cpu"])
    steps = []
    for share in (1.0, 0.0):
        monkeypatch.setattr(flow_world, "WHOLE_FROM", share)
        flow_world.main()
        steps.append(int(load_file(tmp_path / "work" / "transformer.safetensors")["step"]))
    assert 0 < steps[0] <= steps[1]
    assert BaseModel.load(str(tmp_path / flow_world.FOLDER), device="cpu").family.group == "flow"
