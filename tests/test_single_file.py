"""Facts about single checkpoints: they give what their folder gives, are refused clearly, and leave no copy behind."""

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from conftest import LATENT_SIDE, TEXT_WIDTH, away_from_start, new_tiny_unet
from ldm_layout import TEXT, UNET, VAE, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import IncompleteModelError, ModelError, UnknownModelError, WrongFamilyError
from lowmem_imagic.families import SHORT_NAMES, load_family
from lowmem_imagic.families.files import checkpoint as checkpoint_module
from lowmem_imagic.families.files.checkpoint import SingleFile
from lowmem_imagic.families.files.locate import locate
from lowmem_imagic.families.files.weights import Weights
from lowmem_imagic.layers.frozen import weight_bytes
from lowmem_imagic.planning.counting import Counts
from tests import calls

PROMPTS = ("a photo of a red cube on the grass", "two birds kissing", "")


@pytest.fixture(scope="session")
def checkpoint(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as one fp32 checkpoint."""
    return write_checkpoint(tiny_folder, tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors")


@pytest.fixture
def changed(checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """Writes a copy of the checkpoint with tensors left out (by prefix) and others put in."""

    def change(drop: tuple[str, ...] = (), put: dict[str, Tensor] | None = None) -> Path:
        kept = {name: tensor for name, tensor in load_file(checkpoint).items() if not name.startswith(drop)}
        save_file({**kept, **(put or {})}, tmp_path / "changed.safetensors")
        return tmp_path / "changed.safetensors"

    return change


def load(path: Path, config_folder: Path | str | None = None, **options: Any) -> BaseModel:
    """A base on the CPU."""
    return BaseModel.load(str(path), device="cpu", config_folder=config_folder, **options)


def everything(base: BaseModel) -> dict[str, Tensor]:
    """The outputs of each part of a base."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    noisy = torch.randn(3, 4, LATENT_SIDE, LATENT_SIDE, generator=generator)
    latents, text = base.encode_images(images), calls.encode_text(base, PROMPTS)
    with torch.no_grad():
        prediction = calls.predict(base, noisy, torch.tensor([1, 500, 990]), text)
    return {"prediction": prediction, "text": text, "latents": latents, "pictures": base.decode(latents)}


def one_line(error: pytest.ExceptionInfo[ModelError], *parts: str) -> None:
    """The message is one line that has all parts."""
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


# Outputs of a checkpoint


@pytest.mark.parametrize("weights", ["int8", "bnb-int8", "fp32"])
def test_fp32_checkpoint_gives_the_folders_bits(weights: str, checkpoint: Path, tiny_folder: Path) -> None:
    """Prediction, text, latents and pictures of an fp32 checkpoint are those of its folder, bit for bit."""
    ours = everything(load(checkpoint, tiny_folder, weights=weights))
    theirs = everything(load(tiny_folder, weights=weights))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoint_loses_only_its_own_rounding(
    dtype: torch.dtype, tiny_folder: Path, folder_copy: Path, tmp_path: Path
) -> None:
    """A checkpoint in half precision gives the bits of an fp32 folder whose weights were rounded as its own are."""
    path = write_checkpoint(tiny_folder, tmp_path / "half.safetensors", dtype=dtype)
    for file in folder_copy.rglob("*.safetensors"):
        rounded = {name: tensor.to(dtype).float() for name, tensor in load_file(file).items()}
        save_file(rounded, file, metadata={"format": "pt"})
    ours, theirs = everything(load(path, tiny_folder)), everything(load(folder_copy))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("layers", [1, 2])
def test_sd2_layout(layers: int, folder_copy: Path, tmp_path: Path) -> None:
    """Stable Diffusion 2's checkpoints, with OpenCLIP's names and linear projections, give their folder's bits."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = away_from_start(
            new_tiny_unet(
                use_linear_projection=True,
                layers_per_block=layers,
                block_out_channels=(32, 32, 64),
                attention_head_dim=(4, 4, 8),
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            )
        )
    unet.save_pretrained(folder_copy / "unet")
    path = write_checkpoint(folder_copy, tmp_path / "sd2.safetensors", open_clip=True)
    ours, theirs = everything(load(path, folder_copy)), everything(load(folder_copy))
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name


def test_configurations_alone_suffice(checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """The configuration folder needs no weights, and the weights it may have are not used."""
    bare = tmp_path / "configuration"
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(bare.rglob("*.safetensors"))
    ours, theirs = everything(load(checkpoint, bare)), everything(load(tiny_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_identity_is_the_checkpoint(checkpoint: Path, tiny_folder: Path) -> None:
    """A checkpoint is identified by its own name and bytes; its folder is another base of the same architecture."""
    identity = load(checkpoint, tiny_folder).identity
    assert (identity.source, identity.revision, set(identity.files)) == ("tiny", None, {"checkpoint"})
    assert identity.match(load(tiny_folder).identity) == "architecture"


@pytest.mark.parametrize("prefix", [UNET, ""])
def test_a_unet_alone(prefix: str, changed: Callable[..., Path], tiny_folder: Path, tmp_path: Path) -> None:
    """A file with only a UNet gives its folder's bits with autoencoder and text encoder from that folder."""
    path = tmp_path / "unet.safetensors"
    tensors = load_file(changed((VAE, TEXT, "betas")))
    save_file({name.replace(UNET, prefix): tensor for name, tensor in tensors.items()}, path)
    base = load(path, tiny_folder, vae=tiny_folder, text_from=tiny_folder)
    ours, theirs = everything(base), everything(load(tiny_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert set(base.identity.files) == {"checkpoint", "vae", "text_encoder", "tokenizer"}
    with pytest.raises(IncompleteModelError) as error:
        load(path, tiny_folder, text_from=tiny_folder)
    one_line(error, "unet.safetensors lacks the vae", "`vae`")


# Memory


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, "weakref.ref[Tensor]", torch.dtype]]:
    """Name, weak reference and type of each tensor that is read from a file, in order."""
    read: list[tuple[str, weakref.ref[Tensor], torch.dtype]] = []
    get = Weights.__getitem__

    def watched(weights: Weights, name: str) -> Tensor:
        tensor = get(weights, name)
        read.append((name, weakref.ref(tensor), tensor.dtype))
        return tensor

    monkeypatch.setattr(Weights, "__getitem__", watched)
    return read


def parts(reads: list[tuple[str, "weakref.ref[Tensor]", torch.dtype]]) -> list[str]:
    """The parts whose tensors were read, in order: each once for every time that it was read whole."""
    firsts = {"out.2.bias": "unet", "decoder.conv_out.bias": "vae"}
    ends = {name: "text_encoder" for name, _, _ in reads if name.endswith("final_layer_norm.bias")}
    return [part for name, _, _ in reads if (part := {**firsts, **ends}.get(name))]


def alive(reads: list[tuple[str, "weakref.ref[Tensor]", torch.dtype]]) -> list[str]:
    """The tensors from the file that are still referenced."""
    gc.collect()
    return [name for name, tensor, _ in reads if tensor() is not None]


def test_loading_converts_nothing(checkpoint: Path, tiny_folder: Path, reads: list[Any]) -> None:
    """Loading a base reads the checkpoint's header and the configurations; no part is converted."""
    base = load(checkpoint, tiny_folder)
    assert (base.sizes.own[0], base.family.cross_attention_dim) == (16, TEXT_WIDTH)
    assert base.family.check_prompt("a cube") == ""
    assert reads == []


@pytest.mark.parametrize("weights", ["int8", "bf16", "fp32"])
def test_no_copy_stays_beside_the_unet(weights: str, checkpoint: Path, tiny_folder: Path, reads: list[Any]) -> None:
    """Once the UNet is there, the converted one it was made from is gone, and its weights are its own."""
    base = load(checkpoint, tiny_folder, weights=weights)
    calls.unet(base).eval()
    assert parts(reads) == ["unet"]
    assert alive(reads) == []
    bytes_of = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in calls.unet(base).parameters()}
    assert sum(bytes_of.values()) <= sum(t.numel() * t.element_size() for t in calls.unet(base).parameters())


class _InMemory(Counts):
    """Counts only storages with memory behind them."""

    def _follow(self, storage: Any) -> None:
        if storage.device.type == "cpu":
            super()._follow(storage)


def test_loading_takes_one_layer_at_a_time(folder_copy: Path, tmp_path: Path) -> None:
    """At most the int8 network and its largest layer, in the file's precision, are in memory while the UNet loads."""
    new_tiny_unet(block_out_channels=(64, 384)).save_pretrained(folder_copy / "unet")
    path = write_checkpoint(folder_copy, tmp_path / "half.safetensors", dtype=torch.float16)
    denoiser = load_family(str(path), config_folder=folder_copy).denoisers[0]
    with _InMemory() as counted:
        unet = denoiser.load(weights="int8", device=torch.device("cpu"), dtype=torch.float32)
    layers = [sum(p.numel() for p in module.parameters(recurse=False)) for module in unet.modules()]
    assert counted.peak <= weight_bytes(unet) + 2 * max(layers) + 3 * 2**20
    # The file is twice as large as the result, and a copy of the largest layer in fp32 takes 10 MiB.
    assert path.stat().st_size > 1.6 * weight_bytes(unet)
    assert 4 * max(layers) > 10 * 2**20


def test_parts_are_read_when_needed(checkpoint: Path, tiny_folder: Path, reads: list[Any]) -> None:
    """Text encoder and autoencoder are converted alone, as often as they are asked for, and dropped each time."""
    base = load(checkpoint, tiny_folder)
    for sentence in ("a cube", "a sphere"):
        calls.encode_text(base, [sentence])
        assert alive(reads) == []
    for _ in range(2):
        base.decode(base.encode_images(torch.zeros(1, 3, 16, 16)))
        assert alive(reads) == []
    assert parts(reads) == ["text_encoder"] * 2 + ["vae"] * 4


def test_released_unet_is_read_again(checkpoint: Path, tiny_folder: Path, reads: list[Any]) -> None:
    """After `release` the UNet is read from the file again and predicts the same."""
    base = load(checkpoint, tiny_folder)
    before = everything(base)["prediction"]
    base.release()
    assert torch.equal(everything(base)["prediction"], before)
    assert parts(reads).count("unet") == 2
    assert alive(reads) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_are_read_in_the_files_precision(
    dtype: torch.dtype, tiny_folder: Path, tmp_path: Path, reads: list[Any]
) -> None:
    """Parts are converted in their stored type, for any type of the noise schedule."""
    path = write_checkpoint(tiny_folder, tmp_path / "some.safetensors", dtype=dtype)
    everything(load(path, tiny_folder))
    assert {kind for name, _, kind in reads if name != "alphas_cumprod"} == {dtype}


def test_mixed_precision_loses_nothing(changed: Callable[..., Path], tiny_folder: Path, reads: list[Any]) -> None:
    """Tensors keep their own types: the one in fp32 among half-precision ones is not rounded with them."""
    half = {name: t.half() for name, t in load_file(changed()).items() if name != f"{UNET}out.2.bias"}
    half["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(32)[None]
    everything(load(changed(put=half), tiny_folder))
    assert {kind for name, _, kind in reads if name == "out.2.bias"} == {torch.float32}
    assert {kind for name, _, kind in reads if name != "out.2.bias"} == {torch.float16}


# Errors


def test_no_network_is_needed(changed: Callable[..., Path]) -> None:
    """The configuration and the vocabulary of Stable Diffusion 1.x come with the package."""
    text = torch.zeros(32, 768)
    source = locate(str(changed(put={f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": text})))
    assert isinstance(source, SingleFile)
    assert source.configuration.label == SHORT_NAMES["sd15"]
    assert source.configuration.vocabulary().is_file()


def test_a_configuration_that_cannot_be_had(checkpoint: Path) -> None:
    """Without the Hub, one line says both ways to a configuration that is neither here nor in the package."""
    with pytest.raises(IncompleteModelError) as error:
        load(checkpoint, "someone/plain")
    one_line(error, "tiny.safetensors", "someone/plain", "connect once", "`model_config`")


@pytest.mark.parametrize("width", [TEXT_WIDTH, 1024])
def test_configurations_are_not_guessed(width: int, changed: Callable[..., Path]) -> None:
    """Where the width does not decide the configuration, as in Stable Diffusion 2, it has to be given."""
    name = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(IncompleteModelError) as error:
        load(changed(put={name: torch.zeros(32, width)}))
    one_line(error, "changed.safetensors", f"text width {width}", "`model_config`")


def test_configuration_from_the_hub(
    changed: Callable[..., Path], tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a configuration folder the configurations are fetched from the Hub, and no weights with them."""
    asked: list[Any] = []

    def snapshot_download(repository: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append((repository, allow_patterns))
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(checkpoint_module, "CONFIGURATIONS", {TEXT_WIDTH: "someone/plain"})
    ours, theirs = everything(load(changed())), everything(load(tiny_folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    [(repository, patterns)] = asked
    assert repository == "someone/plain"
    assert all(pattern.endswith((".json", ".txt", ".jinja", "/spiece.model")) for pattern in patterns)


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\x80\x02}q\x00.", b"\xff" * 64], ids=repr)
def test_bytes_that_are_no_safetensors(content: bytes, tiny_folder: Path, tmp_path: Path) -> None:
    """A file that is no safetensors, such as a renamed pickle, is refused in one line when the base is loaded."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(IncompleteModelError) as error:
        load(path, tiny_folder)
    one_line(error, "bad.safetensors", "no safetensors")


@pytest.mark.parametrize("keep", [0.001, 0.5, 0.999])
def test_truncated_checkpoint(keep: float, checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint cut short anywhere is refused in one line when the base is loaded."""
    content = checkpoint.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(IncompleteModelError) as error:
        load(path, tiny_folder)
    one_line(error, "cut.safetensors", "cut short")


@pytest.mark.parametrize("names", [[], ["weight"], ["lora_unet_conv_in.lora_down.weight"], [f"{TEXT}x", f"{VAE}x"]])
def test_other_safetensors(names: list[str], tiny_folder: Path, tmp_path: Path) -> None:
    """A safetensors file without a UNet in the original layout, such as a LoRA or a VAE, is refused in one line."""
    path = tmp_path / "other.safetensors"
    save_file({name: torch.zeros(3) for name in names}, path)
    with pytest.raises(IncompleteModelError) as error:
        load(path, tiny_folder)
    one_line(error, "other.safetensors could not be read as a Stable Diffusion checkpoint", "model.diffusion_model.*")


@pytest.mark.parametrize(
    ("drop", "put", "found"),
    [
        ((), {f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "9 input channels"),
        ((), {f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4)}, "second conditioning"),
        (
            (UNET,),
            {f"{UNET}joint_blocks.0.weight": torch.zeros(4, 4)},
            "is Stable Diffusion 3, which is not supported yet",
        ),
    ],
    ids=["inpainting", "SDXL", "SD3"],
)
def test_checkpoints_of_another_kind(
    drop: tuple[str, ...], put: dict[str, Tensor], found: str, changed: Callable[..., Path], tiny_folder: Path
) -> None:
    """Checkpoints of inpainting models, SDXL and transformers are refused as such when the base is loaded."""
    with pytest.raises(WrongFamilyError) as error:
        load(changed(drop, put), tiny_folder)
    one_line(error, "changed.safetensors", found)


@pytest.mark.parametrize(("prefix", "component"), [(VAE, "vae"), (TEXT, "text_encoder")])
def test_checkpoint_without_a_part(
    prefix: str, component: str, changed: Callable[..., Path], tiny_folder: Path
) -> None:
    """A checkpoint without autoencoder or text encoder is refused when the base is loaded, naming the part."""
    with pytest.raises(IncompleteModelError) as error:
        load(changed((prefix,)), tiny_folder)
    one_line(error, "changed.safetensors", component, prefix)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("UNet", f"{UNET}middle_block.0.in_layers.2.weight"),
        ("vae", f"{VAE}decoder.mid.block_1.conv1.weight"),
        ("text_encoder", f"{TEXT}transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
    ],
)
@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_checkpoint_that_does_not_fit_its_configuration(
    component: str, name: str, change: str, changed: Callable[..., Path], tiny_folder: Path
) -> None:
    """A tensor that is missing or of another shape is refused by its part; nothing is left without weights."""
    path = changed((name,), {} if change == "drop" else {name: torch.zeros(5, 7)})
    with pytest.raises(IncompleteModelError) as error:
        everything(load(path, tiny_folder))
    one_line(error, "changed.safetensors", component, "tiny-sd")


def test_configuration_of_another_family(checkpoint: Path, folder_copy: Path) -> None:
    """A configuration folder for another text width is refused when the base is loaded, with both widths."""
    path = folder_copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cross_attention_dim": 1024}))
    with pytest.raises(IncompleteModelError) as error:
        load(checkpoint, folder_copy)
    one_line(error, f"width {TEXT_WIDTH}", "1024", "`model_config`")


def test_configuration_folder_that_is_none(checkpoint: Path, tmp_path: Path) -> None:
    """A configuration folder that is missing or no diffusers folder is refused by its name."""
    with pytest.raises(IncompleteModelError) as error:
        load(checkpoint, tmp_path)
    one_line(error, tmp_path.name, "model_index.json")
    with pytest.raises(UnknownModelError) as unknown:
        load(checkpoint, tmp_path / "nothing")
    one_line(unknown, "nothing", "a diffusers folder")


@pytest.mark.parametrize("suffix", [".ckpt", ".CKPT", ".pt", ".bin"])
def test_pickles_are_refused(suffix: str, checkpoint: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A checkpoint with a pickle's suffix is refused by its name, for any contents."""
    path = Path(shutil.copy(checkpoint, tmp_path / f"model{suffix}"))
    with pytest.raises(UnknownModelError) as error:
        load(path, tiny_folder)
    one_line(error, f"model{suffix} is a pickle", ".safetensors")


def test_other_files_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    """A file of any other kind is no model."""
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UnknownModelError) as error:
        load(tmp_path / "notes.txt", tiny_folder)
    one_line(error, "notes.txt is no model", ".safetensors")
