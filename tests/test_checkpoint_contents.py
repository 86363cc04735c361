"""Facts about further contents of checkpoints: marks are read, scales are applied, and no data are silently dropped."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_WIDTH
from ldm_layout import TEXT, UNET, VAE, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import IncompleteModelError, ModelError, UnknownModelError, WrongFamilyError
from tests import calls

EMPTY = torch.tensor([])
CLIP = f"{TEXT}transformer.text_model."


@pytest.fixture(scope="session")
def plain(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The tensors of the tiny model as one checkpoint."""
    return load_file(write_checkpoint(tiny_folder, tmp_path_factory.mktemp("plain") / "tiny.safetensors"))


@pytest.fixture
def write(plain: dict[str, Tensor], tiny_folder: Path, tmp_path: Path) -> Callable[..., BaseModel]:
    """Loads a new checkpoint of these tensors beside the plain ones, or instead of all, on the CPU."""

    def written(
        put: dict[str, Tensor] | None = None,
        *,
        metadata: dict[str, str] | None = None,
        instead: dict[str, Tensor] | None = None,
    ) -> BaseModel:
        tensors = {**(plain if instead is None else instead), **(put or {})}
        # Each is read when it is used, so none may take another's place.
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: t.contiguous().clone() for name, t in tensors.items()}, path, metadata=metadata)
        return BaseModel.load(str(path), device="cpu", weights="fp32", config_folder=tiny_folder)

    return written


def everything(base: BaseModel) -> list[Tensor]:
    """Every weight of a base."""
    parts = [calls.unet(base), *(load(device=torch.device("cpu"), dtype=torch.float32) for load in _loads(base))]
    return [parameter.detach() for part in parts for _, parameter in sorted(part.named_parameters())]


def _loads(base: BaseModel) -> list[Any]:
    return [base.family.load_text_encoder, base.family.load_codec]


def same(base: BaseModel, other: BaseModel) -> bool:
    """Whether two bases have the same weights, bit for bit."""
    return all(torch.equal(mine, theirs) for mine, theirs in zip(everything(base), everything(other), strict=True))


def linears(tensors: dict[str, Tensor]) -> list[str]:
    """The weights of the UNet's linear layers."""
    return [name for name, t in tensors.items() if name.startswith(UNET) and name.endswith(".weight") and t.dim() == 2]


def one_line(error: pytest.ExceptionInfo[ModelError]) -> str:
    """The message, which is one line."""
    assert "\n" not in str(error.value)
    return str(error.value)


# Marks


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (["v_pred"], {}),
        (["v_prediction"], {}),
        ([f"{UNET}v_pred"], {}),
        ([], {"modelspec.prediction_type": "v"}),
        ([], {"modelspec.prediction_type": "v-prediction"}),
        ([], {"modelspec.predict_key": "v"}),
        ([], {"prediction_type": "v_prediction"}),
        ([], {"modelspec.architecture": "stable-diffusion-v2-768-v"}),
        ([], {"ss_v_parameterization": "True"}),
        ([], {"ss_v_prediction": "true"}),
        ([], {"ss_base_model_version": "sd_v1_v"}),
        ([], {"v_pred": ""}),
        (["v_pred"], {"modelspec.prediction_type": "v", "ss_v_parameterization": "1"}),
    ],
    ids=str,
)
def test_marks_of_velocity(
    tensors: list[str], metadata: dict[str, str], write: Callable[..., BaseModel], caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that says it predicts v does, against a configuration that says epsilon, and one line says so."""
    with caplog.at_level(logging.WARNING):
        base = write(dict.fromkeys(tensors, EMPTY), metadata=metadata)
    assert base.family.prediction_type == base.identity.interface.denoisers["unet"] == "v_prediction"
    assert base.family.schedule.scheduler("EulerDiscrete").config.prediction_type == "v_prediction"
    assert "v_prediction instead of epsilon" in caplog.text
    assert len(everything(base)) > 100


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"modelspec.prediction_type": "epsilon"},
        {"modelspec.predict_key": "epsilon"},
        {"modelspec.architecture": "stable-diffusion-v1"},
        {"modelspec.architecture": "stable-diffusion-v2-512"},
        {"ss_v_parameterization": "False"},
        {"ss_v_parameterization": "None", "ss_zero_terminal_snr": "False"},
        {"ss_base_model_version": "sd_v1"},
        {"format": "pt", "modelspec.title": "v_pred"},
        {"modelspec.encoder_layer": "1", "ss_clip_skip": "None"},
    ],
    ids=str,
)
def test_marks_that_agree(
    metadata: dict[str, str], write: Callable[..., BaseModel], caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint without marks, or with marks that agree with its configuration, follows it without a warning."""
    with caplog.at_level(logging.WARNING):
        base = write(metadata=metadata)
    assert base.family.prediction_type == "epsilon"
    assert base.family.schedule.alpha_bar[-1] > 0
    assert not caplog.records


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (["v_pred", "ztsnr"], {}),
        (["v_pred"], {"ss_zero_terminal_snr": "True"}),
        (["v_pred", "zsnr"], {"ss_zero_terminal_snr": "true"}),
    ],
    ids=str,
)
def test_marks_of_zero_snr(tensors: list[str], metadata: dict[str, str], write: Callable[..., BaseModel]) -> None:
    """A checkpoint marked as trained to pure noise has such a schedule, and sampling begins at its end."""
    base = write(dict.fromkeys(tensors, EMPTY), metadata=metadata)
    scheduler = base.family.schedule.scheduler("DDIM")
    scheduler.set_timesteps(10)
    assert (base.family.schedule.alpha_bar[-1], scheduler.timesteps[0]) == (0, 999)


@pytest.mark.parametrize("metadata", [{"modelspec.encoder_layer": "2"}, {"ss_clip_skip": "2"}], ids=str)
def test_a_clip_skip_is_said_not_to_be_applied(
    metadata: dict[str, str], write: Callable[..., BaseModel], caplog: pytest.LogCaptureFixture
) -> None:
    """A checkpoint that asks for an earlier layer of its text encoder is loaded, and that mark is not passed over."""
    with caplog.at_level(logging.WARNING):
        write(metadata=metadata)
    assert "earlier layer of its text encoder" in caplog.text


def test_the_schedule_in_the_checkpoint(write: Callable[..., BaseModel], plain: dict[str, Tensor]) -> None:
    """A checkpoint's own schedule decides: rescaled to zero SNR it is that, and another is refused."""
    base = write({"alphas_cumprod": write().family.schedule.alpha_bar.half()})
    assert base.family.schedule.alpha_bar[-1] > 0
    rescaled = write({"v_pred": EMPTY, "ztsnr": EMPTY}).family.schedule.alpha_bar
    assert write({"v_pred": EMPTY, "alphas_cumprod": rescaled}).family.schedule.alpha_bar[-1] == 0
    with pytest.raises(IncompleteModelError) as error:
        write({"alphas_cumprod": torch.linspace(1, 0.1, 1000)})
    assert "alphas_cumprod" in one_line(error)


def test_zero_snr_with_epsilon(write: Callable[..., BaseModel]) -> None:
    """A mark of zero SNR without one of v is refused when the base is loaded: it would divide by zero."""
    with pytest.raises(WrongFamilyError) as error:
        write({"ztsnr": EMPTY})
    assert "epsilon" in one_line(error)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (["v_pred"], {"modelspec.prediction_type": "epsilon"}),
        (["v_pred"], {"ss_v_parameterization": "False"}),
        ([], {"modelspec.predict_key": "v", "modelspec.prediction_type": "epsilon"}),
        ([], {"modelspec.architecture": "stable-diffusion-v2-768-v", "prediction_type": "epsilon"}),
        (["v_pred", "ztsnr"], {"ss_zero_terminal_snr": "False"}),
    ],
    ids=str,
)
def test_marks_that_contradict_each_other(
    tensors: list[str], metadata: dict[str, str], write: Callable[..., BaseModel]
) -> None:
    """Marks that say both are refused with both of their names."""
    with pytest.raises(IncompleteModelError) as error:
        write(dict.fromkeys(tensors, EMPTY), metadata=metadata)
    message = one_line(error)
    assert "contradicts itself" in message
    assert all(key in message for key in metadata if key != "ss_base_model_version")


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (["edm_mean", "edm_std"], {}),
        (["edm_vpred.sigma_max"], {}),
        ([], {"modelspec.prediction_type": "sample"}),
        ([], {"modelspec.prediction_type": "rectified flow"}),
    ],
    ids=str,
)
def test_marks_of_other_models(tensors: list[str], metadata: dict[str, str], write: Callable[..., BaseModel]) -> None:
    """A checkpoint marked with an unsupported prediction type is refused."""
    with pytest.raises(WrongFamilyError) as error:
        write(dict.fromkeys(tensors, EMPTY), metadata=metadata)
    one_line(error)


# Weights in eight bits


def scaled(
    plain: dict[str, Tensor], suffix: str, kind: torch.dtype, shape: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint with the UNet's linear weights in eight bits, and one with the numbers that they stand for."""
    stored, meant = dict(plain), dict(plain)
    for name in linears(plain):
        weight = plain[name]
        rows, columns = {"row": (1, weight.shape[1]), "block": (weight.shape[0] // 2, 8)}.get(
            shape, tuple(weight.shape)
        )
        cells = weight.reshape(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
        top = 127 if kind == torch.int8 else torch.finfo(kind).max
        scale = cells.abs().amax((1, 3)) / top
        numbers = (cells / scale[:, None, :, None]).clamp(-top, top)
        eight = (numbers.round() if kind == torch.int8 else numbers).to(kind)
        stored[name] = eight.reshape(weight.shape)
        written = scale * 127 if suffix == "SCB" else scale
        written = written if shape == "block" else written.flatten()
        written = written[0] if shape == "scalar" else written
        stored[name.removesuffix("weight") + suffix] = written
        read = written / 127 if suffix == "SCB" else written
        spread = read.reshape(scale.shape).repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        meant[name] = stored[name].float() * spread
    return stored, meant


@pytest.mark.parametrize(
    ("suffix", "kind", "shape"),
    [
        ("scale_weight", torch.float8_e4m3fn, "scalar"),
        ("scale_weight", torch.float8_e5m2, "one"),
        ("weight_scale", torch.float8_e4m3fn, "scalar"),
        ("weight_scale", torch.float8_e4m3fn, "row"),
        ("weight_scale", torch.int8, "row"),
        ("weight_scale", torch.int8, "block"),
        ("weight_scale_inv", torch.float8_e4m3fn, "block"),
        ("weight.scale", torch.int8, "scalar"),
        ("SCB", torch.int8, "row"),
    ],
    ids=str,
)
def test_scales_are_applied(
    suffix: str, kind: torch.dtype, shape: str, write: Callable[..., BaseModel], plain: dict[str, Tensor]
) -> None:
    """A weight of eight bits is its stored number times its scale, exactly, under every name that scales have."""
    stored, meant = scaled(plain, suffix, kind, shape)
    ours = everything(write(instead=stored))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, everything(write(instead=meant)), strict=True))


def test_what_belongs_to_scales(write: Callable[..., BaseModel], plain: dict[str, Tensor]) -> None:
    """Scales of activations and notes of the format beside the weights change nothing."""
    stored, meant = scaled(plain, "weight_scale", torch.float8_e4m3fn, "scalar")
    stem = linears(plain)[0].removesuffix("weight")
    note = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    beside = {f"{stem}input_scale": torch.tensor(0.5), f"{stem}comfy_quant": note}
    beside[f"{UNET}scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    ours = everything(write({**stored, **beside}))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, everything(write(instead=meant)), strict=True))


def test_plain_weights_of_eight_bits(write: Callable[..., BaseModel], plain: dict[str, Tensor]) -> None:
    """Weights that were merely rounded to fp8 are what they are, without a scale."""
    stored = {name: t.to(torch.float8_e4m3fn) if name in linears(plain) else t for name, t in plain.items()}
    meant = {name: t.float() for name, t in stored.items()}
    assert same(write(instead=stored), write(instead=meant))


@pytest.mark.parametrize(
    ("last", "tensor", "found"),
    [
        ("weight", torch.zeros(4, 4, dtype=torch.int8), "8-bit integers without a scale"),
        ("weight", torch.zeros(4, 4, dtype=torch.uint8), "U8"),
        ("weight", torch.zeros(4, 4, dtype=torch.int32), "I32"),
        ("weight", torch.zeros(4, 4, dtype=torch.bool), "BOOL"),
        ("qweight", torch.zeros(4, 4, dtype=torch.int32), "GPTQ"),
        ("weight.absmax", torch.zeros(4), "bitsandbytes 4-bit"),
        ("weight.quant_state.bitsandbytes__nf4", torch.zeros(4, dtype=torch.uint8), "bitsandbytes 4-bit"),
        ("weight._data", torch.zeros(4, dtype=torch.int8), "quanto"),
        ("weight_zero_point", torch.zeros(4), "zero point"),
        ("weight_scale_2", torch.zeros(4), "NVFP4"),
        ("weight_scale", torch.zeros(3), "of shape"),
        ("weight_scale", torch.zeros(32, dtype=torch.uint8), "U8"),
        ("comfy_quant", torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8), "nvfp4"),
    ],
    ids=str,
)
def test_formats_that_are_not_read(
    last: str, tensor: Tensor, found: str, write: Callable[..., BaseModel], plain: dict[str, Tensor]
) -> None:
    """Weights in another format are refused by its name and that of a tensor; none is read as if it were plain."""
    name = linears(plain)[3].removesuffix("weight") + last
    with pytest.raises(WrongFamilyError) as error:
        everything(write({name: tensor}))
    message = one_line(error)
    assert found in message
    assert name.removeprefix(UNET) in message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_folder_in_eight_bits(component: str, folder_copy: Path, tmp_path: Path) -> None:
    """The same holds in a diffusers folder: scaled weights are multiplied, integers without scales refused."""
    path = next((folder_copy / component).glob("*.safetensors"))
    tensors = load_file(path)
    name = next(name for name, t in tensors.items() if name.endswith(".weight") and t.dim() == 2)
    eight = (tensors[name] * 127 / tensors[name].abs().max()).round().to(torch.int8)
    save_file({**tensors, name: eight.float() * 0.25}, path, metadata={"format": "pt"})
    expected = everything(BaseModel.load(str(folder_copy), device="cpu", weights="fp32"))
    scale = {name.removesuffix("weight") + "weight_scale": torch.tensor(0.25)}
    save_file({**tensors, name: eight, **scale}, path, metadata={"format": "pt"})
    ours = everything(BaseModel.load(str(folder_copy), device="cpu", weights="fp32"))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ours, expected, strict=True))
    save_file({**tensors, name: eight}, path, metadata={"format": "pt"})
    with pytest.raises(WrongFamilyError, match="8-bit integers without a scale"):
        everything(BaseModel.load(str(folder_copy), device="cpu"))


# Names


def test_by_products_of_training_are_left_out(
    write: Callable[..., BaseModel], caplog: pytest.LogCaptureFixture
) -> None:
    """Averages, the schedule's numbers, CLIP's other half and the autoencoder's discriminator change nothing."""
    put = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "model_ema.decay": torch.tensor(0.99),
        "betas": torch.zeros(1000),
        "posterior_variance": torch.zeros(1000),
        "scale_factor": torch.tensor(0.18215),
        f"{VAE}loss.discriminator.main.0.weight": torch.zeros(3),
        f"{CLIP}embeddings.position_ids": torch.arange(77)[None],
        f"{TEXT}logit_scale": torch.tensor(4.6),
        f"{TEXT}text_projection": torch.zeros(TEXT_WIDTH, TEXT_WIDTH),
        f"{TEXT}transformer.vision_model.post_layernorm.weight": torch.zeros(3),
    }
    with caplog.at_level(logging.WARNING):
        assert same(write(put), write())
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    [
        f"{UNET}input_blocks.1.1.transformer_blocks.0.attn3.to_q.weight",
        f"{UNET}input_blocks.9.0.in_layers.0.weight",
        f"{UNET}extra_projection.weight",
        f"{UNET}out.3.weight",
        f"{UNET}time_embed.4.weight",
        f"{VAE}encoder.extra.weight",
        f"{VAE}decoder.mid.attn_2.q.weight",
        f"{VAE}temporal.weight",
        f"{CLIP}encoder.layers.7.mlp.fc1.weight",
        f"{TEXT}adapter.weight",
        f"{TEXT}transformer.text_model.encoder.layers.0.extra.weight",
        f"{UNET}middle_block.3.weight_scale",
    ],
)
def test_nothing_is_dropped_in_silence(name: str, write: Callable[..., BaseModel]) -> None:
    """A tensor of a part beyond its configuration is refused by its name, as in a folder."""
    with pytest.raises(ModelError) as error:
        everything(write({name: torch.zeros(5, 7)}))
    assert re.search(re.escape(name.split(".")[-2]), one_line(error))


def test_what_is_outside_of_the_parts_is_said(
    write: Callable[..., BaseModel], caplog: pytest.LogCaptureFixture
) -> None:
    """Tensors outside of the three parts are named in one warning."""
    with caplog.at_level(logging.WARNING):
        write({"hypernetwork.layer.weight": torch.zeros(3)})
    assert "hypernetwork.layer.weight" in caplog.text and "not used" in caplog.text


NAMINGS: dict[str, Callable[[str], str]] = {
    "NovelAI's": lambda name: name.replace(CLIP, f"{TEXT}transformer."),
    "ComfyUI's old": lambda name: name.replace(CLIP, f"{TEXT}clip_l.transformer.text_model."),
    "ComfyUI's": lambda name: name.replace(CLIP, "text_encoders.clip_l.transformer.text_model."),
    "Stability's": lambda name: name.replace(CLIP, "conditioner.embedders.0.transformer.text_model."),
    "a trainer's": lambda name: name.replace(CLIP, "te.text_model."),
    "diffusers'": lambda name: name.replace(CLIP, "text_encoder."),
    "autoencoder": lambda name: name.replace(VAE, "vae."),
}


@pytest.mark.parametrize("naming", NAMINGS)
def test_other_namings(naming: str, write: Callable[..., BaseModel], plain: dict[str, Tensor]) -> None:
    """A text encoder or an autoencoder under another program's names gives the same bits."""
    renamed = {NAMINGS[naming](name): tensor for name, tensor in plain.items()}
    assert renamed.keys() != plain.keys()
    assert same(write(instead=renamed), write())


@pytest.mark.parametrize(
    "prefix", ["conditioner.embedders.0.model.", "text_encoders.clip_h.model.", f"{TEXT}clip_h.model."]
)
def test_other_namings_of_open_clip(
    prefix: str, write: Callable[..., BaseModel], tiny_folder: Path, tmp_path: Path
) -> None:
    """OpenCLIP's layout under other prefixes, with the last layer that Stable Diffusion 2 leaves out, is the same."""
    tensors = load_file(write_checkpoint(tiny_folder, tmp_path / "two.safetensors", open_clip=True))
    renamed = {name.replace(f"{TEXT}model.", prefix): tensor for name, tensor in tensors.items()}
    last = {name.replace("resblocks.1.", "resblocks.2."): t for name, t in renamed.items() if "resblocks.1." in name}
    assert last and renamed.keys() != tensors.keys()
    assert same(write(last, instead=renamed), write())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["lora_unet_mid_block.lora_down.weight"], "a LoRA"),
        (["unet.mid_block.attn.to_q.lora_A.weight"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight"], "a ControlNet"),
        (["emb_params"], "a textual inversion"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "an autoencoder alone"),
        (["text_model.embeddings.position_ids"], "a text encoder alone"),
        (["input_blocks.0.0.weight", "out.2.bias"], "a UNet alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet alone"),
        (["double_blocks.0.img_attn.qkv.weight"], "a diffusion transformer"),
    ],
    ids=str,
)
def test_files_of_parts(names: list[str], found: str, write: Callable[..., BaseModel]) -> None:
    """A file that is no checkpoint is refused, and the error names its kind."""
    with pytest.raises(IncompleteModelError) as error:
        write(instead={name: torch.zeros(3) for name in names})
    assert found in one_line(error)


@pytest.mark.parametrize(
    ("put", "found"),
    [
        ({f"{UNET}time_embed.cond_proj.weight": torch.zeros(8, 8)}, "LCM"),
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 8, 3, 3)}, "InstructPix2Pix"),
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 9, 3, 3)}, "inpainting"),
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(32, 5, 3, 3)}, "depth"),
        ({f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4), "conditioner.embedders.1.x": torch.zeros(1)}, "SDXL"),
        (
            {f"{UNET}label_emb.0.0.weight": torch.zeros(4, 4), "conditioner.embedders.0.model.x": torch.zeros(1)},
            "refiner",
        ),
        ({"control_model.input_blocks.0.0.weight": torch.zeros(3)}, "ControlNet"),
        ({"scale_factor": torch.tensor(0.13025)}, "scale_factor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_checkpoints_of_other_models(put: dict[str, Tensor], found: str, write: Callable[..., BaseModel]) -> None:
    """A checkpoint of a kind that is not edited is refused by its kind when it is loaded."""
    with pytest.raises(ModelError) as error:
        write(put)
    assert found in one_line(error)


def test_other_formats(tmp_path: Path) -> None:
    """A GGUF file is refused as one."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModelError, match="GGUF"):
        BaseModel.load(str(tmp_path / "model.gguf"), device="cpu")
