"""Facts about the base: which models load, how others are refused, and what its parts compute."""

import hashlib
import json
import logging
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LATENT_SIDE, TEXT_WIDTH, new_tiny_unet
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models import attention_processor
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextModel

from lowmem_imagic.engine import base as base_model
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.engine.device import pick_device, pick_dtype, resolve_attention
from lowmem_imagic.errors import (
    BackendUnavailableError,
    ConfigError,
    IncompleteModelError,
    PromptError,
    UnknownModelError,
    WrongFamilyError,
)
from lowmem_imagic.families.files.weights import Weights
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import WEIGHT_FORMATS
from tests import calls

PROMPTS = ("a photo of a red cube on the grass", "a blue sphere", "")
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def load(folder: Path, **options: Any) -> BaseModel:
    """The base in a folder, on the CPU."""
    return BaseModel.load(str(folder), device="cpu", **options)


def use(folder: Path) -> None:
    """Loads a base and every part of it."""
    base = load(folder)
    calls.encode_text(base, ["a cube"])
    base.encode_images(torch.zeros(1, 3, 16, 16))
    calls.unet(base).eval()


def rows(base: BaseModel) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text, three rows."""
    latents = torch.randn(3, 4, LATENT_SIDE, LATENT_SIDE, generator=torch.Generator().manual_seed(0))
    return latents, torch.tensor([1, 500, 990]), calls.encode_text(base, PROMPTS)


def predictions(base: BaseModel) -> Tensor:
    """The base's prediction for `rows`."""
    with torch.no_grad():
        return calls.predict(base, *rows(base))


def edit_json(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Names that are no model


@pytest.mark.parametrize("name", ["no-such-model", "./nothing/here", "someone/nothing", "a/b/c", ""])
def test_unknown_names(name: str) -> None:
    """A name that is no model, folder, file or downloadable Hub id is refused by name."""
    with pytest.raises(UnknownModelError, match=r"no model|nothing is not"):
        BaseModel.load(name, device="cpu")


@pytest.mark.parametrize("kind", ["demo", "folder", "file"])
def test_a_revision_of_what_is_not_on_the_hub(kind: str, tiny_folder: Path) -> None:
    """A revision of the bundled model, a folder or a file is refused, not silently left out."""
    name = {"demo": "demo", "folder": str(tiny_folder), "file": str(tiny_folder / "model_index.json")}[kind]
    with pytest.raises(ConfigError, match=r"revision is 'main', but .* is not on the Hub"):
        BaseModel.load(name, revision="main", device="cpu")


@pytest.mark.parametrize("kind", ["demo", "folder", "short name", "Hub id"])
def test_a_configuration_for_what_is_not_one_file(kind: str, tiny_folder: Path) -> None:
    """A configuration for a model that has its own is refused before a download, not silently left out."""
    names = {"demo": "demo", "folder": str(tiny_folder), "short name": "sd21", "Hub id": "someone/nothing"}
    with pytest.raises(ConfigError, match=r"`model_config` is 'sd21', but .* is not one .safetensors file"):
        BaseModel.load(names[kind], config_folder="sd21", device="cpu")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin", ".pkl"])
def test_pickles_are_never_opened(suffix: str, tmp_path: Path) -> None:
    """A pickled checkpoint is refused by its name alone, with the reason; its bytes are not read."""
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    path.chmod(0)
    with pytest.raises(UnknownModelError, match=rf"model\{suffix} is a pickle.*safetensors"):
        BaseModel.load(str(path), device="cpu")


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    """A safetensors file that is no Stable Diffusion checkpoint is refused, for any error of the converter."""
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(IncompleteModelError, match=r"other\.safetensors could not be read"):
        BaseModel.load(str(path), device="cpu")


# Folders with parts missing


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_missing_components(component: str, folder_copy: Path) -> None:
    """A folder that lacks a component is refused with the component's name."""
    shutil.rmtree(folder_copy / component)
    with pytest.raises(IncompleteModelError, match=f"tiny-sd.*{component}"):
        use(folder_copy)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_emptied_components(component: str, folder_copy: Path) -> None:
    """A folder one of whose components has no files is refused with the component's name."""
    for path in (folder_copy / component).iterdir():
        path.unlink()
    with pytest.raises(IncompleteModelError, match=f"tiny-sd.*{component}"):
        use(folder_copy)


@pytest.mark.parametrize("content", [None, "", '{"sample_size": ', "[1, 2]", "\xff"], ids=repr)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
def test_unusable_configurations(name: str, content: str | None, folder_copy: Path) -> None:
    """A configuration that is missing, empty, cut short or no object is refused by its name when the base is loaded."""
    path = folder_copy / name
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(IncompleteModelError, match=f"{name}.*download it again"):
        load(folder_copy)


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
def test_truncated_weights(component: str, keep: float, folder_copy: Path) -> None:
    """Weights that were cut short anywhere, as by an interrupted download, are refused by their file's name."""
    path = folder_copy / component / WEIGHTS[component]
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(
        IncompleteModelError, match=f"{component}/{WEIGHTS[component]} is no safetensors file or cut short"
    ):
        use(folder_copy)


@pytest.mark.parametrize("component", WEIGHTS)
def test_pickled_weights_only(component: str, folder_copy: Path) -> None:
    """A component with pickled weights only is refused, and the pickle named; it is never loaded instead."""
    path = folder_copy / component / WEIGHTS[component]
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(IncompleteModelError, match=rf"only pickled weights \({path.stem}\.bin\)"):
        use(folder_copy)


@pytest.mark.parametrize("component", WEIGHTS)
@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_weights_that_do_not_fit_their_configuration(component: str, change: str, folder_copy: Path) -> None:
    """Weights that lack a tensor or have one of another shape are refused; nothing is filled with random numbers."""
    path = folder_copy / component / WEIGHTS[component]
    tensors = load_file(path)
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensor = tensors.pop(name)
    if change == "reshape":
        tensors[name] = tensor[: len(tensor) // 2].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(IncompleteModelError, match=f"tiny-sd.*{'UNet' if component == 'unet' else component}"):
        use(folder_copy)


def vocabulary(folder: Path) -> Path:
    """The file that holds the vocabulary, which is another before transformers 5."""
    return next(path for name in ("tokenizer.json", "vocab.json") if (path := folder / "tokenizer" / name).exists())


@pytest.mark.parametrize("part", ["vocabulary", "settings"])
@pytest.mark.parametrize("damage", ["missing", "cut short"])
def test_damaged_tokenizers(part: str, damage: str, folder_copy: Path) -> None:
    """A tokenizer without vocabulary or settings is refused; nothing is encoded with a made-up vocabulary."""
    settings = folder_copy / "tokenizer" / "tokenizer_config.json"
    path = settings if part == "settings" else vocabulary(folder_copy)
    content = path.read_bytes()
    path.unlink()
    if damage == "cut short":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(IncompleteModelError, match=r"tiny-sd.*tokenizer.*download it again"):
        use(folder_copy)


def test_a_missing_shard(folder_copy: Path) -> None:
    """A sharded component that lacks one of its files is refused by that file's name."""
    reshape_folder(folder_copy, "unet", max_shard_size="400KB")
    gone = sorted((folder_copy / "unet").glob("*-of-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(IncompleteModelError, match=f"{gone.name} is missing"):
        use(folder_copy)


def test_shards_outside_the_folder(folder_copy: Path) -> None:
    """An index that names a file outside its component's folder is refused."""
    reshape_folder(folder_copy, "unet", max_shard_size="400KB")
    index = folder_copy / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"})
    with pytest.raises(IncompleteModelError, match="outside its folder"):
        use(folder_copy)


# Models of another kind


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "has no text_encoder_2"),
        ("model_index.json", {"_class_name": "FluxPipeline"}, "FluxPipeline"),
        ("model_index.json", {"_class_name": None}, "without a pipeline class"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type text_time"),
        ("unet/config.json", {"in_channels": 9}, r"9 input channels \(inpainting\).*latents have 4"),
        ("vae/config.json", {"latent_channels": 8}, "4 input channels.*latents have 8"),
        ("unet/config.json", {"cross_attention_dim": None}, "expected a plain text-to-image"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "predicts 'sample'.*v_prediction"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "unheard-of"}, "beta_schedule 'unheard-of'"),
    ],
)
def test_models_of_another_kind(name: str, changes: dict[str, Any], found: str, folder_copy: Path) -> None:
    """SDXL, inpainting, transformers and other predictions are refused on loading, and the error names the kind."""
    edit_json(folder_copy / name, **changes)
    with pytest.raises(WrongFamilyError, match=found):
        load(folder_copy)


def test_latents_may_have_other_channels(folder_copy: Path) -> None:
    """A model of the same make whose latents have 8 channels is edited with like any other."""
    vae = AutoencoderKL.from_config({**AutoencoderKL.load_config(folder_copy, subfolder="vae"), "latent_channels": 8})
    vae.save_pretrained(folder_copy / "vae")
    new_tiny_unet(in_channels=8, out_channels=8).save_pretrained(folder_copy / "unet")
    base = load(folder_copy)
    photo = Photo(image=Image.new("RGB", (16, 16), "teal"), sha256="0" * 64, name="p", notes=(), icc_profile=None)
    short = {"embed": {"steps": 1}, "finetune": {"steps": 1}, "sample": {"num_inference_steps": 2, "etas": (0.0, 1.0)}}
    config = preset("fast", short)
    [edit] = make_edits(base, [Job(photo, PROMPTS[0])], config)
    assert edit.coarse["unet"].shape == (8, 4, 4) and edit.version == 1
    assert apply_edits(base, [edit], [Cell(0, 1.0, 0)], config.sample)[0].size == (16, 16)


# Options


def test_all_wrong_options_at_once(tiny_folder: Path) -> None:
    """Wrong weights and attention are reported together, each with its allowed values."""
    with pytest.raises(ConfigError) as caught:
        load(tiny_folder, weights="int4", attention="flash")
    assert len(caught.value.problems) == 2
    assert "'int4'" in caught.value.problems[0] and all(name in caught.value.problems[0] for name in WEIGHT_FORMATS)
    assert "'flash'" in caught.value.problems[1] and "xformers" in caught.value.problems[1]


@pytest.mark.parametrize("name", ["gpu", "mps", "cuda:x", ""])
def test_unknown_devices(name: str, tiny_folder: Path) -> None:
    """A device this version does not know is refused with the ones it does."""
    with pytest.raises(ConfigError, match="expected one of auto, cuda, cpu"):
        BaseModel.load(str(tiny_folder), device=name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_cuda_without_cuda(name: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA asked for by name where there is none is an error, never a silent fallback; "auto" takes the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendUnavailableError, match="`device=cpu`"):
        BaseModel.load(str(tiny_folder), device=name)
    assert pick_device("auto") == CPU


def test_auto_takes_cuda_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with two GPUs "auto" is CUDA, "cpu" still the CPU, and a third GPU is refused."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == CUDA and pick_device("cpu") == CPU
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(BackendUnavailableError, match="sees 2 GPUs"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("device", "capability", "weights", "dtype"),
    [
        (CPU, None, "int8", torch.float32),
        (CPU, None, "bf16", torch.bfloat16),
        (CUDA, (8, 6), "int8", torch.bfloat16),
        (CUDA, (8, 0), "bnb-int8", torch.bfloat16),
        (CUDA, (7, 5), "int8", torch.float16),
        (CUDA, (9, 0), "fp32", torch.float32),
    ],
)
def test_compute_type(
    device: torch.device,
    capability: tuple[int, int] | None,
    weights: str,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """8-bit weights compute in bfloat16 on GPUs that have it and in fp32 elsewhere; float weights as they say."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_dtype(device, weights) == dtype


# Attention


def fake_xformers(monkeypatch: pytest.MonkeyPatch, attention: Any) -> list[Any]:
    """Installs an xformers whose attention is `attention`; the shapes of queries that it was called with."""
    shapes = []

    def memory_efficient_attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shapes.append(query.shape)
        result: Tensor = attention(query, *args, **kwargs)
        return result

    module = types.ModuleType("xformers")
    module.ops = types.ModuleType("xformers.ops")  # type: ignore[attr-defined]
    module.ops.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", module)
    monkeypatch.setitem(sys.modules, "xformers.ops", module.ops)
    monkeypatch.setattr(attention_processor, "xformers", module, raising=False)
    return shapes


def torch_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, op: Any = None, scale: Any = None
) -> Tensor:
    """The result of xformers, for heads that are already in the batch; for others, any tensor with a gradient."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)


def test_xformers_on_the_cpu(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """xformers asked for by name on the CPU is an error, installed or not; "auto" takes torch's attention."""
    for _ in range(2):
        with pytest.raises(BackendUnavailableError, match="no CPU kernels"):
            load(tiny_folder, attention="xformers")
        assert load(tiny_folder).attention == "sdpa"
        fake_xformers(monkeypatch, torch_attention)


# Where "meta" stands below, any device does on which xformers could run.
def test_xformers_is_taken_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where xformers computes attention and its gradient, "auto" takes it."""
    fake_xformers(monkeypatch, torch_attention)
    assert (
        resolve_attention("auto", torch.device("meta"))
        == resolve_attention("xformers", torch.device("meta"))
        == "xformers"
    )
    assert resolve_attention("sdpa", torch.device("meta")) == "sdpa"


def test_xformers_that_is_not_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Without xformers "auto" takes torch's attention without a word; by name it is an error."""
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert resolve_attention("auto", torch.device("meta")) == "sdpa" and not caplog.records
    with pytest.raises(BackendUnavailableError, match="not installed"):
        resolve_attention("xformers", torch.device("meta"))


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, AttributeError, OSError])
def test_xformers_that_is_there_and_does_not_run(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An xformers made for another torch imports and has no kernels: "auto" says so and takes torch's attention, by
    name it is an error that says why."""

    def broken(*_: Any, **__: Any) -> Tensor:
        raise error("No operator found for `memory_efficient_attention_forward`")

    fake_xformers(monkeypatch, broken)
    assert resolve_attention("auto", torch.device("meta")) == "sdpa"
    assert "installed and not used: it does not run on meta" in caplog.text and "No operator found" in caplog.text
    with pytest.raises(BackendUnavailableError, match="does not run on meta"):
        resolve_attention("xformers", torch.device("meta"))


def test_xformers_is_what_computes_attention(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, relative: Callable[..., float]
) -> None:
    """Resolved to xformers, every attention of the UNet calls it, with results equal to torch's."""
    shapes = fake_xformers(monkeypatch, torch_attention)
    monkeypatch.setattr(base_model, "resolve_attention", lambda name, device: "xformers")
    base = load(tiny_folder, attention="xformers")
    assert relative(predictions(base), predictions(load_plain(tiny_folder))) < 1e-5
    assert base.attention == "xformers" and len(shapes) == 8


def load_plain(folder: Path) -> BaseModel:
    """The base with torch's attention, even if a test replaces `resolve_attention`."""
    base = load(folder)
    base.attention = "sdpa"
    return base


# Weights


@pytest.fixture(scope="module")
def reference(tiny_folder: Path) -> Tensor:
    """The predictions of diffusers' own fp32 UNet."""
    unet = UNet2DConditionModel.from_pretrained(tiny_folder, subfolder="unet")
    latents, timesteps, text = rows(load(tiny_folder))
    with torch.no_grad():
        return unet(latents, timesteps, encoder_hidden_states=text).sample


@pytest.mark.parametrize(("weights", "limit"), [("fp32", 1e-5), ("bf16", 0.03), ("int8", 0.03), ("bnb-int8", 0.03)])
def test_every_weight_format_predicts(
    weights: str, limit: float, tiny_folder: Path, reference: Tensor, relative: Callable[..., float]
) -> None:
    """Every weight format predicts within 3 % of diffusers' fp32 UNet, fp32 itself to rounding."""
    base = load(tiny_folder, weights=weights)
    error = relative(predictions(base), reference)
    assert error < limit
    assert weights == "fp32" or error > 1e-4


def reshape_folder(folder: Path, component: str, *, half: bool = False, **options: Any) -> None:
    """Saves a component's weights anew, in shards or as fp16 variant, instead of the one file."""
    path = folder / component
    model = CLASSES[component].from_pretrained(path)
    (path / WEIGHTS[component]).unlink()
    if half:
        model, options = model.half(), {"variant": "fp16", **options}
    model.save_pretrained(path, **options)
    assert not (path / WEIGHTS[component]).exists()


def everything(base: BaseModel) -> list[Tensor]:
    """The outputs of each part of a base."""
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = base.encode_images(images)
    return [predictions(base), calls.encode_text(base, PROMPTS), latents, base.decode(latents)]


@pytest.mark.parametrize("component", WEIGHTS)
def test_sharded_weights(component: str, folder_copy: Path, tiny_folder: Path) -> None:
    """A component in several files gives the same bits as in one."""
    reshape_folder(folder_copy, component, max_shard_size="20KB")
    assert len(list((folder_copy / component).glob("*-of-*.safetensors"))) > 1
    for ours, theirs in zip(everything(load(folder_copy)), everything(load(tiny_folder)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "20KB"}], ids=["one file", "sharded"])
def test_half_precision_only(
    shards: dict[str, str], folder_copy: Path, tiny_folder: Path, relative: Callable[..., float]
) -> None:
    """A folder that has only fp16 variants loads, in one file or several, and gives the same to fp16's rounding."""
    for component in WEIGHTS:
        reshape_folder(folder_copy, component, half=True, **shards)
    for ours, theirs in zip(everything(load(folder_copy)), everything(load(tiny_folder)), strict=True):
        assert ours.dtype == torch.float32
        assert relative(ours, theirs) < 0.01


def test_full_precision_is_preferred(folder_copy: Path, tiny_folder: Path) -> None:
    """Where both variants are there the full one is read: a broken fp16 file beside it does no harm."""
    for component, name in WEIGHTS.items():
        (folder_copy / component / name.replace(".safetensors", ".fp16.safetensors")).write_bytes(b"no")
    assert torch.equal(predictions(load(folder_copy)), predictions(load(tiny_folder)))


def test_names_of_older_checkpoints(folder_copy: Path, tiny_folder: Path) -> None:
    """An autoencoder with the tensor names Stable Diffusion 1.x was published with gives the same bits."""
    path = folder_copy / "vae" / WEIGHTS["vae"]
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, old in names.items():
            name = name.replace(new, old, 1)
        renamed[name] = tensor
    assert renamed.keys() != load_file(path).keys()
    save_file(renamed, path, metadata={"format": "pt"})
    for ours, theirs in zip(everything(load(folder_copy)), everything(load(tiny_folder)), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("weights", ["int8", "fp32"])
def test_checkpointing_does_not_change_gradients(
    weights: str, tiny_folder: Path, relative: Callable[..., float]
) -> None:
    """With and without checkpointing the gradients of text and adapters are the same."""

    def gradients(checkpointing: bool) -> tuple[Tensor, Tensor]:
        base = load(tiny_folder, weights=weights, checkpointing=checkpointing)
        latents, timesteps, text = rows(base)
        text.requires_grad_()
        pack = AdapterPack(calls.unet(base), calls.NAMES, count=3, adapt="all", rank=2, alpha=2.0)
        pack.weights.add_(torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
        grads = pack.enable_gradients()
        with pack.attached(calls.unet(base)):
            calls.predict(base, latents, timesteps, text).square().sum().backward()
        return text.grad, grads

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert relative(checkpointed, plain) < 1e-6


def test_loading_is_announced(tiny_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The first use of the UNet logs one line: weights, size, attention and checkpointing."""
    with caplog.at_level(logging.INFO, logger=base_model.__name__):
        base = load(tiny_folder)
        assert not caplog.records
        assert calls.unet(base) is calls.unet(base)
    (record,) = caplog.records
    for part in ("tiny-sd", "int8", "MB", "sdpa", "checkpointing off"):
        assert part in record.getMessage()


# Against diffusers' own pipeline


@pytest.fixture(scope="module")
def pipeline(tiny_folder: Path) -> StableDiffusionPipeline:
    """diffusers' pipeline over the same folder."""
    return StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)


def test_text_is_encoded_as_the_pipeline_does(tiny_folder: Path, pipeline: Any, relative: Callable[..., float]) -> None:
    """Embeddings are those of diffusers' pipeline, also for an empty and an overlong sentence."""
    sentences = [*PROMPTS, "two birds kissing " * 30]
    ours = calls.encode_text(load(tiny_folder), sentences)
    assert ours.dtype == torch.float32 and ours.shape[2] == TEXT_WIDTH
    for sentence, embedding in zip(sentences, ours, strict=True):
        theirs, _ = pipeline.encode_prompt(sentence, "cpu", 1, False)
        assert relative(embedding, theirs[0]) < 1e-5


def test_each_sentence_is_encoded_once(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence is encoded once and remembered, so the text encoder is loaded for new sentences only."""
    base, asked = load(tiny_folder), []
    encode = base.family.encode_text
    monkeypatch.setattr(
        base.family, "encode_text", lambda prompts, loaded: asked.append(prompts) or encode(prompts, loaded)
    )
    first = calls.encode_text(base, ["a", "b", "a"])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(calls.encode_text(base, ["b", "c"])[0], first[1])
    calls.encode_text(base, ["a", "c"])
    assert asked == [["a", "b"], ["c"]]


def test_pictures_are_encoded_as_the_vae_does(tiny_folder: Path, pipeline: Any, relative: Callable[..., float]) -> None:
    """Latents are the posterior's mean times the configuration's scaling factor, without randomness."""
    base = load(tiny_folder)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(images).latent_dist.mean * pipeline.vae.config.scaling_factor
        latents = base.encode_images(images)
        assert latents.shape == (2, 4, LATENT_SIDE, LATENT_SIDE) and latents.dtype == torch.float32
        assert relative(latents, expected) < 1e-5
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        assert relative(base.decode(latents), decoded.clamp(-1, 1)) < 1e-5
    assert torch.equal(base.encode_images(images), latents)


@pytest.mark.parametrize("factor", [0.5, None])
def test_the_scaling_factor_is_the_configurations(factor: float | None, folder_copy: Path, tiny_folder: Path) -> None:
    """The scaling factor is read from the configuration; where that leaves it out, diffusers' default holds."""
    path = folder_copy / "vae" / "config.json"
    config = json.loads(path.read_text())
    config.pop("scaling_factor")
    path.write_text(json.dumps(config if factor is None else {**config, "scaling_factor": factor}))
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    ratio = load(folder_copy).encode_images(images) / load(tiny_folder).encode_images(images)
    torch.testing.assert_close(ratio, torch.full_like(ratio, (factor or 0.18215) / 0.18215))


def test_overflow_in_the_vae_is_repeated_in_fp32(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a decoded picture is not finite it is decoded again in fp32."""
    base, dtypes = load(tiny_folder), []
    decode = base.family.decode

    def overflowing(vae: Any, latents: Tensor) -> Tensor:
        dtypes.append(next(vae.parameters()).dtype)
        images = decode(vae, latents)
        return images if dtypes[-1] == torch.float32 else images.fill_(torch.nan)

    monkeypatch.setattr(BaseModel, "part_dtype", torch.bfloat16)
    monkeypatch.setattr(base.family, "decode", overflowing)
    latents = torch.randn(1, 4, LATENT_SIDE, LATENT_SIDE)
    images = base.decode(latents)
    assert dtypes == [torch.bfloat16, torch.float32]
    assert torch.equal(images, load_and_decode(tiny_folder, latents))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_decoding_does_not_hide_overflow(value: float, tiny_folder: Path) -> None:
    """A picture in which the autoencoder overflowed is not finite, whichever way it overflowed."""
    family = load(tiny_folder).family
    vae = family.load_codec(device=CPU, dtype=torch.float32)
    vae.decoder.conv_out.bias.fill_(value)
    assert not family.decode(vae, torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE)).isfinite().any()


def load_and_decode(folder: Path, latents: Tensor) -> Tensor:
    """The pictures that a fresh base decodes in fp32."""
    family = load(folder).family
    return family.decode(family.load_codec(device=CPU, dtype=torch.float32), latents)


def test_sizes_come_from_the_configurations(tiny_folder: Path, pipeline: Any) -> None:
    """Picture size, noise schedule and prediction type are those of the folder."""
    base = load(tiny_folder)
    assert base.sizes.own[0] == 16 and base.family.vae_factor == 2
    assert base.family.cross_attention_dim == TEXT_WIDTH
    assert torch.equal(
        base.family.schedule.alpha_bar, DDIMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod
    )
    assert (base.family.prediction_type, base.family.family) == ("epsilon", "sd-16")


def test_v_prediction_is_read_from_the_folder(folder_copy: Path) -> None:
    """A folder that says v prediction gives a base, and schedulers, of v prediction."""
    edit_json(folder_copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    base = load(folder_copy)
    assert base.family.prediction_type == base.identity.interface.denoisers["unet"] == "v_prediction"
    assert base.family.schedule.scheduler("EulerDiscrete").config.prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["DDIM", "DDIMScheduler", "EulerDiscrete", "PNDM"])
def test_schedulers_by_name(name: str, tiny_folder: Path) -> None:
    """Schedulers go by diffusers' class names, with or without "Scheduler", on the model's own noise schedule."""
    base = load(tiny_folder)
    scheduler = base.family.schedule.scheduler(name)
    assert type(scheduler).__name__ == name.removesuffix("Scheduler") + "Scheduler"
    assert torch.equal(scheduler.alphas_cumprod, base.family.schedule.alpha_bar)


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2Discrete", "LMSDiscrete", "PNDM", "DEISMultistep"])
def test_a_scheduler_that_cannot_end_at_pure_noise(name: str, folder_copy: Path) -> None:
    """A base whose noise schedule ends at pure noise refuses schedulers that would follow another one in silence, and
    names those that follow its own."""
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    edit_json(folder_copy / "scheduler" / "scheduler_config.json", **zero)
    base = BaseModel.load(str(folder_copy), device="cpu")
    with pytest.raises(ConfigError, match=r"zero terminal SNR.*expected one of .*DDIM.*EulerDiscrete.*UniPC") as raised:
        base.check_steps(name, 20)
    for other in str(raised.value).split("expected one of ")[1].split(", "):
        followed = base.family.schedule.scheduler(other).alphas_cumprod
        # Euler keeps the last one a little above 0, which it divides by.
        torch.testing.assert_close(followed, base.family.schedule.alpha_bar, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "part"),
    [("DDIM", 1000, "it begins at timestep 1000 of 1000"), ("PNDM", 1, "cannot take")],
)
def test_steps_a_scheduler_cannot_take(name: str, steps: int, part: str, tiny_folder: Path) -> None:
    """A number of steps that would fail in the middle of sampling is refused beforehand, in words."""
    base = BaseModel.load(str(tiny_folder), device="cpu")
    with pytest.raises(ConfigError, match=f"num_inference_steps is {steps}.*{part}"):
        base.check_steps(name, steps)
    base.check_steps(name, 20)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("unet/config.json", {"sample_size": None}),
        ("unet/config.json", {"cross_attention_dim": [16, 16]}),
        ("unet/config.json", {"down_block_types": ["Nothing", "Nothing"]}),
        ("vae/config.json", {"block_out_channels": None}),
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 10**30}),
    ],
)
def test_configurations_that_make_no_sense(name: str, changes: dict[str, Any], folder_copy: Path) -> None:
    """A value no such model can have is reported as a damaged folder, whichever library would trip over it."""
    edit_json(folder_copy / name, **changes)
    with pytest.raises(IncompleteModelError, match=r"tiny-sd.*download it again"):
        base = BaseModel.load(str(folder_copy), device="cpu")
        base.family.check_prompt("a cube")
        base.check_steps("DDIM", 5)
        _ = calls.unet(base)


@pytest.mark.parametrize("name", ["x" * 300, "", "a\0b"])
def test_names_that_cannot_be_looked_up(name: str) -> None:
    """A name too long for the file system, an empty one and one with a NUL are unknown models, not crashes."""
    with pytest.raises(UnknownModelError, match="no model"):
        BaseModel.load(name, device="cpu")


@pytest.mark.parametrize("name", ["Nothing", "FlowMatchEulerDiscrete", "UNet2DConditionModel", "AutoencoderKL"])
def test_unknown_schedulers(name: str, tiny_folder: Path) -> None:
    """A name that is no scheduler for this kind of model is refused, with a list of valid names."""
    with pytest.raises(ConfigError, match=r"expected one of .*DDIM.*EulerDiscrete"):
        load(tiny_folder).family.schedule.scheduler(name)


# Sentences


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_empty_sentences(prompt: str, tiny_folder: Path) -> None:
    """An empty sentence is refused."""
    with pytest.raises(PromptError, match="empty"):
        load(tiny_folder).family.check_prompt(prompt)


@pytest.mark.parametrize("prompt", ["a red cube", "日本語 🙂 é", "A  RED\ncube"])
def test_sentences_that_fit(prompt: str, tiny_folder: Path) -> None:
    """A sentence that fits is not cut, in any alphabet."""
    assert load(tiny_folder).family.check_prompt(prompt) == ""


def test_overlong_sentences(tiny_folder: Path) -> None:
    """Of an overlong sentence exactly the words are named that do not reach the text encoder."""
    base = load(tiny_folder)
    kept, cut = "a " * 29 + "photo", "of a red cube"
    assert base.family.check_prompt(kept) == ""
    assert base.family.check_prompt(f"{kept} {cut}") == cut
    whole, with_tail = calls.encode_text(base, [kept, f"{kept} {cut}"])
    torch.testing.assert_close(whole, with_tail)


# Identity


def test_identity_is_the_files(tiny_folder: Path) -> None:
    """The identity names the folder, never its path, and has the SHA-256 of every component's weights."""
    identity = load(tiny_folder).identity
    assert (identity.source, identity.revision, identity.family) == ("tiny-sd", None, "sd-16")
    for component, name in WEIGHTS.items():
        content = (tiny_folder / component / name).read_bytes()
        assert identity.files[component] == hashlib.sha256(content).hexdigest()
    assert identity.files.keys() == {*WEIGHTS, "tokenizer"}


def test_a_copy_is_the_same_base(tiny_folder: Path, folder_copy: Path) -> None:
    """A copy elsewhere under another name is the same base."""
    renamed = folder_copy.rename(folder_copy.with_name("another name"))
    assert load(renamed).identity.match(load(tiny_folder).identity) == "exact"


@pytest.mark.parametrize("component", [*WEIGHTS, "tokenizer"])
def test_a_changed_file_is_another_base(component: str, tiny_folder: Path, folder_copy: Path) -> None:
    """When one bit of a weight file or of the vocabulary changes, that component's hash does, and no other."""
    path = vocabulary(folder_copy) if component == "tokenizer" else folder_copy / component / WEIGHTS[component]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before, after = load(tiny_folder).identity, load(folder_copy).identity
    assert {name for name in before.files if before.files[name] != after.files[name]} == {component}
    assert after.match(before) == "architecture"


def test_a_changed_shard_is_another_base(folder_copy: Path) -> None:
    """The hash of a sharded component covers all of its files."""
    reshape_folder(folder_copy, "unet", max_shard_size="400KB")
    hashes = [load(folder_copy).identity.files["unet"]]
    for path in sorted((folder_copy / "unet").glob("*-of-*.safetensors")):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        hashes.append(load(folder_copy).identity.files["unet"])
    assert len(set(hashes)) == len(hashes) > 2


@pytest.mark.parametrize("name", [".hidden", "-dash", "a b", "ends with.", "~tilde", "x" * 250])
def test_any_folder_name_has_an_identity(name: str, folder_copy: Path) -> None:
    """A base in a folder of any name has an identity that an edit file can hold."""
    renamed = folder_copy.rename(folder_copy.with_name(name))
    source = load(renamed).identity.source
    assert source and len(source) <= 200


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such names")
@pytest.mark.parametrize("name", ["with:colon", "with\\backslash", "...", " leading"])
def test_unusual_folder_names_have_an_identity(name: str, folder_copy: Path) -> None:
    """Names that only some systems allow are made to fit."""
    renamed = folder_copy.rename(folder_copy.with_name(name))
    assert load(renamed).identity.source


def test_loading_reads_no_weights(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a base reads configurations and the headers of files only, so a wrong option costs no time."""

    def read(weights: Weights, name: str) -> Any:
        raise AssertionError(name)

    monkeypatch.setattr(Weights, "__getitem__", read)
    assert load(tiny_folder).sizes.own[0] == 16
