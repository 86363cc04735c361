"""Facts about the script that trains a small DeepFloyd IF on the bundled world (`benchmarks.cascade_world`)."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cascade_world
from benchmarks.world_training import SEED, size_of
from lowmem_imagic import BaseModel


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
