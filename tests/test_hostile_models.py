"""Facts about model folders that are broken or hostile: one line each, bounded in time and memory, and no code runs."""

import copy
import json
import os
import random
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import IncompleteModelError, LowmemImagicError, ModelError
from tests import calls

CONFIGURATIONS = (
    "model_index.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
)


def edit_json(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def use(folder: Path) -> None:
    """Loads a base and runs every part of it once."""
    base = BaseModel.load(str(folder), device="cpu")
    base.family.check_prompt("a cube")
    base.check_steps("DDIM", 5)
    with torch.no_grad():
        text = calls.encode_text(base, ["a cube"])
        base.decode(base.encode_images(torch.zeros(1, 3, 16, 16)))
        calls.predict(base, torch.ones(1, 4, 8, 8), torch.tensor([500]), text)


def refused(folder: Path, what: Callable[[Path], object] = use) -> str:
    """The one line that a folder is refused with."""
    with pytest.raises(ModelError) as error:
        what(folder)
    assert "\n" not in str(error.value)
    assert str(folder.parent) not in str(error.value)
    return str(error.value)


# Sizes


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet/config.json", {"layers_per_block": 10**6}),
        ("unet/config.json", {"layers_per_block": [10**6, 1]}),
        ("unet/config.json", {"layers_per_block": -1}),
        ("unet/config.json", {"block_out_channels": [32] * 10**4}),
        ("unet/config.json", {"block_out_channels": [10**9, 10**9]}),
        ("unet/config.json", {"block_out_channels": "32"}),
        ("unet/config.json", {"down_block_types": ["CrossAttnDownBlock2D"] * 10**4}),
        ("unet/config.json", {"transformer_layers_per_block": 10**6}),
        ("unet/config.json", {"transformer_layers_per_block": [[10**6], 1]}),
        ("unet/config.json", {"reverse_transformer_layers_per_block": [1, [10**6, 1]]}),
        ("unet/config.json", {"attention_head_dim": 0}),
        ("unet/config.json", {"attention_head_dim": [4, -4]}),
        ("unet/config.json", {"num_attention_heads": 10**9}),
        ("unet/config.json", {"cross_attention_dim": 10**9}),
        ("unet/config.json", {"sample_size": 10**6}),
        ("unet/config.json", {"sample_size": 10**30}),
        ("unet/config.json", {"sample_size": 8.5}),
        ("unet/config.json", {"norm_num_groups": 0}),
        ("unet/config.json", {"conv_in_kernel": 10**5}),
        ("unet/config.json", {"time_embedding_dim": 10**9}),
        ("unet/config.json", {"downsample_padding": 10**9}),
        ("unet/config.json", {"freq_shift": "0"}),
        ("unet/config.json", {"dropout": 2.0}),
        ("unet/config.json", {"act_fn": "silu" * 10**5}),
        ("vae/config.json", {"layers_per_block": 10**6}),
        ("vae/config.json", {"block_out_channels": [8] * 10**4}),
        ("vae/config.json", {"block_out_channels": []}),
        ("vae/config.json", {"latent_channels": 10**4}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"scaling_factor": "0.18"}),
        ("vae/config.json", {"norm_num_groups": None}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**6}),
        ("text_encoder/config.json", {"vocab_size": 10**9}),
        ("text_encoder/config.json", {"vocab_size": 10}),
        ("text_encoder/config.json", {"hidden_size": 10**9}),
        ("text_encoder/config.json", {"hidden_size": 32}),
        ("text_encoder/config.json", {"intermediate_size": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 10**9}),
        ("text_encoder/config.json", {"max_position_embeddings": 4}),
        ("text_encoder/config.json", {"num_attention_heads": 0}),
        ("text_encoder/config.json", {"hidden_act": "nothing"}),
        ("text_encoder/config.json", {"hidden_act": {"a": 1}}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": -1}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "1000"}),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.01] * 50_000}),
        ("scheduler/scheduler_config.json", {"trained_betas": [[0.01]] * 1000}),
        ("scheduler/scheduler_config.json", {"trained_betas": ["x"] * 1000}),
        ("scheduler/scheduler_config.json", {"beta_start": None}),
        ("scheduler/scheduler_config.json", {"beta_start": -0.1}),
        ("scheduler/scheduler_config.json", {"beta_end": 10**300}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "nowhere"}),
        ("scheduler/scheduler_config.json", {"timestep_spacing": 1}),
        ("scheduler/scheduler_config.json", {"rescale_betas_zero_snr": "no"}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": -1}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": "77"}),
        ("tokenizer/tokenizer_config.json", {"tokenizer_file": "/dev/zero"}),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "../../secret"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_absurd_values(name: str, changes: dict[str, Any], folder_copy: Path) -> None:
    """A value that no model has is refused in one line before anything of its size is built."""
    edit_json(folder_copy / name, **changes)
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(LowmemImagicError) as error:
            use(folder_copy)
        spent, peak = time.thread_time() - began, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    # Of this thread, under a tracer: without one it is a tenth.
    assert spent < 20
    assert peak < 50e6


# Texts


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 100,
        b"[]",
        b"1",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": 1' + b"9" * 10_000 + b"}",
        b'{"a": 1, "a": 2}',
        '{"a": 1}'.encode("utf-16"),
        b'{"a": "\xff"}',
        b'{"a": "' + b"x" * 2**21 + b'"}',
    ],
    ids=lambda content: repr(content[:10]),
)
def test_texts_that_are_no_configuration(name: str, content: bytes, folder_copy: Path) -> None:
    """A file that is no JSON object of a bounded size is refused by its name."""
    (folder_copy / name).write_bytes(content)
    assert name in refused(folder_copy)


def test_byte_order_marks(folder_copy: Path) -> None:
    """A configuration that an editor began with a byte order mark is read."""
    for name in CONFIGURATIONS[:5]:
        path = folder_copy / name
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    use(folder_copy)


# Files


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device", "dangling link"])
@pytest.mark.parametrize(
    "name",
    [
        *CONFIGURATIONS,
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
    ],
)
def test_only_regular_files_are_opened(kind: str, name: str, folder_copy: Path) -> None:
    """A pipe, a device or a folder in a file's place is refused without waiting, and so is a link to one."""
    path = folder_copy / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link to a device": "/dev/tty"}.get(kind, "/nowhere"))
    message = refused(folder_copy)
    assert "tiny-sd" in message


@pytest.mark.parametrize(
    "name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json"]
)
def test_files_with_holes(name: str, folder_copy: Path) -> None:
    """A file of a gigabyte of nothing is refused by its size or its first bytes, and is not read."""
    with (folder_copy / name).open("wb") as file:
        file.truncate(2**30)
    tracemalloc.start()
    try:
        refused(folder_copy)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_weights_with_holes(folder_copy: Path) -> None:
    """Weights that are larger than their configuration says are refused by their shape and not read."""
    path = folder_copy / "unet" / "diffusion_pytorch_model.safetensors"
    size = 2**30
    header = json.dumps({"conv_in.weight": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert "UNet" in refused(folder_copy)


def test_links_to_files_are_followed(folder_copy: Path, tmp_path: Path) -> None:
    """A model whose files are links, as in the Hub's cache, is read."""
    for path in [path for path in folder_copy.rglob("*") if path.is_file()]:
        blob = tmp_path / f"blob-{len(list(tmp_path.iterdir()))}"
        path.rename(blob)
        path.symlink_to(blob)
    use(folder_copy)


@pytest.mark.parametrize(
    "names",
    [
        ["../vae/diffusion_pytorch_model.safetensors"],
        ["/etc/passwd"],
        ["..\\vae\\diffusion_pytorch_model.safetensors"],
        ["C:x.safetensors"],
        [""],
        ["."],
        [".."],
        [f"{n}.safetensors" for n in range(10_000)],
        [1],
    ],
    ids=lambda names: str(names)[:30],
)
def test_lists_of_weight_files(names: list[Any], folder_copy: Path) -> None:
    """A list of weight files that names one outside of its folder, none, or ten thousand is refused."""
    (folder_copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    index = {"weight_map": {f"tensor {n}": name for n, name in enumerate(names)}}
    (folder_copy / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert "unet" in refused(folder_copy)


# Code


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_no_configuration_runs_code(name: str, folder_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entries that name code or kernels from elsewhere are not followed, and a quantiser is not started."""
    marker = folder_copy / "ran"
    for folder in {folder_copy, (folder_copy / name).parent}:
        (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(str(folder_copy))
    edit_json(
        folder_copy / name,
        auto_map={part: "evil.Evil" for part in ("AutoConfig", "AutoModel", "AutoTokenizer")},
        trust_remote_code=True,
        custom_pipeline="evil",
        _attn_implementation="someone/kernels",
        attn_implementation="someone/kernels",
        quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        pipeline_class="evil.Evil",
        processor_class="Evil",
        _module="evil",
    )
    try:
        use(folder_copy)
    except ModelError:
        pass
    assert not marker.exists()


# Mutations

VALUES = (
    0,
    1,
    -1,
    7,
    10**6,
    10**18,
    10**30,
    0.5,
    1e300,
    "",
    "x",
    None,
    True,
    [],
    [0],
    [1] * 1000,
    [[1], [2]],
    {},
    {"a": 1},
)


def mutated(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The object with one to three entries changed, dropped or nested otherwise."""
    values = copy.deepcopy(values)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if not values:
            break
        key = rng.choice(sorted(values))
        old = values[key]
        if rng.random() < 0.15:
            del values[key]
        elif isinstance(old, int) and rng.random() < 0.5:
            values[key] = rng.choice((old + 1, old - 1, 2 * old, -old, 1000 * old, float(old), str(old), [old]))
        elif isinstance(old, list) and rng.random() < 0.5:
            values[key] = rng.choice((old + old, old[::-1], old[:-1], [old], old * 100))
        else:
            values[key] = copy.deepcopy(rng.choice(VALUES))
    return values


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_mutated_configurations(name: str, folder_copy: Path) -> None:
    """A configuration with changed entries gives a base that works, or one line of this package's own errors."""
    rng = random.Random(name)
    path = folder_copy / name
    original = json.loads(path.read_text())
    for _ in range(4):
        path.write_text(json.dumps(mutated(original, rng)))
        try:
            use(folder_copy)
        except LowmemImagicError as error:
            assert "\n" not in str(error) and str(folder_copy.parent) not in str(error)


def test_the_unchanged_folder_is_usable(folder_copy: Path) -> None:
    """The models of the tests above are refused only because of their change."""
    use(folder_copy)
    edit_json(folder_copy / "unet" / "config.json", sample_size=None)
    with pytest.raises(IncompleteModelError, match="sample_size None"):
        use(folder_copy)
