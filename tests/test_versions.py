"""Facts about folders written by earlier and later versions of transformers: they load alike under each."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CAPTIONS
from ldm_layout import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizerFast

from lowmem_imagic.engine.base import BaseModel
from tests import calls

TEXTS = [*CAPTIONS, "", "A RED Cube!", "it's 123 ...  \n two", "Ünïcode 漢字 🙂"]


def load(folder: Path) -> BaseModel:
    """The base in a folder, on the CPU."""
    return BaseModel.load(str(folder), device="cpu")


def tokens(folder: Path) -> Tensor:
    """The ids of `TEXTS`."""
    ids: Tensor = load(folder).family.tokenize(TEXTS)[0]
    return ids


@pytest.fixture
def tokenizer(folder_copy: Path) -> Any:
    """The tiny model's tokenizer, whose folder is emptied of all but its settings."""
    folder = folder_copy / "tokenizer"
    tokenizer = CLIPTokenizerFast.from_pretrained(folder)
    for path in folder.iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    return tokenizer


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoder_names(prefix: str, folder_copy: Path, tiny_folder: Path) -> None:
    """A text encoder's tensors may be named with or without the wrapper that transformers dropped in 5.6."""
    path = folder_copy / "text_encoder" / "model.safetensors"
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    assert torch.equal(calls.encode_text(load(folder_copy), TEXTS), calls.encode_text(load(tiny_folder), TEXTS))


def test_vocabulary_and_merges(tokenizer: Any, folder_copy: Path, tiny_folder: Path) -> None:
    """vocab.json and merges.txt, as Stable Diffusion was published with, give the same tokens."""
    tokenizer.backend_tokenizer.model.save(str(folder_copy / "tokenizer"))
    assert not (folder_copy / "tokenizer" / "tokenizer.json").exists()
    assert torch.equal(tokens(folder_copy), tokens(tiny_folder))


def test_tokenizer_in_one_file(tokenizer: Any, folder_copy: Path, tiny_folder: Path) -> None:
    """tokenizer.json alone, as transformers 5 writes, gives the same tokens."""
    tokenizer.backend_tokenizer.save(str(folder_copy / "tokenizer" / "tokenizer.json"))
    assert not (folder_copy / "tokenizer" / "vocab.json").exists()
    assert torch.equal(tokens(folder_copy), tokens(tiny_folder))


def test_any_text_is_encoded(tiny_folder: Path) -> None:
    """Letters that no caption had are encoded by their bytes, none as unknown: ids differ where texts do."""
    end = load(tiny_folder).family.tokenizer.eos_token_id
    rows = [[int(i) for i in row] for row in tokens(tiny_folder)]
    assert all(len(rows[n]) == len(rows[0]) for n in range(len(TEXTS)))
    assert len({tuple(row) for row in rows}) == len(TEXTS)
    assert rows[TEXTS.index("")].count(end) == len(rows[0]) - 1


def test_single_file_with_either_tokenizer(
    tokenizer: Any, folder_copy: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """A single checkpoint takes its tokenizer from the configuration folder, in either form."""
    path = write_checkpoint(tiny_folder, tmp_path / "one.safetensors")
    tokenizer.backend_tokenizer.model.save(str(folder_copy / "tokenizer"))
    for weights in folder_copy.rglob("*.safetensors"):
        weights.unlink()
    base = BaseModel.load(str(path), device="cpu", config_folder=folder_copy)
    assert torch.equal(calls.encode_text(base, TEXTS), calls.encode_text(load(tiny_folder), TEXTS))
