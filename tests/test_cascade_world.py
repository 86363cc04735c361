"""Facts about the script that trains a small DeepFloyd IF on the bundled world (`benchmarks.cascade_world`)."""

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import cascade_world
from benchmarks.edit_methods import passes_of, shortened, without_adapter
from benchmarks.world_quality import drawn
from benchmarks.world_training import SEED, WORLDS, size_of
from lowmem_imagic import BaseModel, make_edits
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.edits.edit import LoraFactors
from lowmem_imagic.pipeline.prepare import Job
from tests.test_deepfloyd import config
from tests.test_families import photo
from tests.tiny_if import write_tiny


def test_its_folders_are_a_base_of_two_stages(tmp_path: Path) -> None:
    """The folders that it writes are small, and are taken as a cascade of 32 and 128 px with a T5 of 77 tokens."""
    tokenizer = cascade_world.new_tokenizer(SEED)
    cascade_world.publish(tmp_path / "work", tmp_path, tokenizer)
    assert 0 < size_of(*cascade_world.folders_in(tmp_path)) <= cascade_world.MOST_BYTES
    base = BaseModel.load(str(tmp_path / "IF-I-world"), device="cpu")
    assert [denoiser.shape((128, 128))[1:] for denoiser in base.denoisers] == [(32, 32), (128, 128)]
    assert base.sizes.own == (128, 128) and base.family.group == "cascade"
    assert base.encode_text(["a red cube"])["embeds"].shape == (1, 77, cascade_world.WIDTH)
    # Words of captions are one token each, and any other word is spelled.
    assert base.family.check_prompt("a photo of a red metal cube " * 10) == ""
    assert tokenizer.tokenize("a red zebra")[:2] == ["▁a", "▁red"] and len(tokenizer.tokenize("zebra")) > 1


def test_stage_two_is_trained_on_parts_anywhere() -> None:
    """Parts are whole squares of their pictures, both of a row from one place, and reach every edge."""
    across = torch.arange(10).expand(8, 10)
    pictures = torch.stack([across, torch.arange(8)[:, None].expand(8, 10)]).expand(200, 2, 8, 10)
    parts = cascade_world.cropped(pictures, 6, torch.Generator().manual_seed(0))
    assert parts.shape == (200, 2, 6, 6)
    left, top = parts[:, 0, :1, :1], parts[:, 1, :1, :1]
    assert torch.equal(parts[:, 0], left + across[:6, :6]) and torch.equal(parts[:, 1], top + across[:6, :6].T)
    assert set(left.flatten().tolist()) == {0, 1, 2, 3, 4} and set(top.flatten().tolist()) == {0, 1, 2}


@pytest.mark.benchmark
def test_methods_keep_the_adapters_of_all_networks(tmp_path: Path) -> None:
    """Passes count the training of both networks; a shortened edit of a cascade has an adapter of both, and one can be
    left idle, the other as it was."""
    base = BaseModel.load(str(write_tiny(tmp_path)), device="cpu", weights="fp32")
    settings = config()
    [edit] = make_edits(base, [Job(photo(), "a red cube")], settings)
    assert passes_of(base, settings) == settings.embed.passes + 2 * settings.finetune.passes
    data = edit_file.encode(edit)
    short = edit_file.decode(shortened(base, data, 0.5))
    assert short.adapters.keys() == edit.adapters.keys() == {"unet", "unet_2"}

    def size(adapter: Mapping[str, LoraFactors]) -> int:
        return sum(factors.down.nbytes + factors.up.nbytes for factors in adapter.values())

    assert all(0 < size(short.adapters[name]) < size(edit.adapters[name]) for name in short.adapters)
    idle = without_adapter(edit, "unet_2")
    assert all(bool((factors.up == 0).all()) for factors in idle.adapters["unet_2"].values())
    assert any(bool((factors.up != 0).any()) for factors in edit.adapters["unet_2"].values())
    assert edit_file.encode(replace(idle, adapters=edit.adapters)) == data


@pytest.mark.benchmark
def test_the_trained_cascade_draws_what_is_said() -> None:
    """diffusers' own pipelines draw named colours and floors with the committed models: 5 of 8 attributes and more."""
    assert 0 < size_of(*cascade_world.folders_in(WORLDS)) <= cascade_world.MOST_BYTES
    with torch.no_grad():
        samples = drawn(WORLDS / "IF-I-world", 4, steps=10)
    found = samples.summary(1)
    assert found is not None and sum(found["attributes"][name]["right"] for name in ("color", "floor")) >= 5


@pytest.mark.process
def test_both_stages_train_and_go_on(tmp_path: Path) -> None:
    """The script trains both stages, one after the other, and goes on from its checkpoints."""
    words = [sys.executable, "-m", "benchmarks.cascade_world", "--out", str(tmp_path), "--preset", "tiny"]
    for _ in range(2):
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "work").glob("*.safetensors")} == {
        "first.safetensors",
        "second.safetensors",
    }
    assert len(BaseModel.load(str(tmp_path / "IF-I-world"), device="cpu").denoisers) == 2
