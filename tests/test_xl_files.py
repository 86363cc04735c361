"""Facts about the files of Stable Diffusion XL: components, marks, shipped configurations, and refusals by name."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from ldm_layout import UNET, VAE, XL_TEXT, XL_TEXT_2, text_to_ldm, unet_to_ldm, vae_to_ldm, xl_tensors
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lowmem_imagic.errors import IncompleteModelError, ModelError, UnknownModelError, WrongFamilyError
from lowmem_imagic.families import load_family
from lowmem_imagic.families.files.checkpoint import SingleFile
from lowmem_imagic.families.files.locate import locate
from lowmem_imagic.families.files.published import PUBLISHED, Published
from lowmem_imagic.families.files.source import Folder
from lowmem_imagic.families.loading import tensors_of
from lowmem_imagic.families.schedule import read_schedule
from tests.tiny_xl import write_tiny

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
EMPTY = torch.tensor([])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SDXL with random weights as a diffusers folder."""
    return write_tiny(tmp_path_factory.mktemp("models") / "tiny-xl")


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Tensor]:
    """Its tensors, named as in one checkpoint file."""
    return xl_tensors(folder)


@pytest.fixture
def write(plain: dict[str, Tensor], tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint with tensors left out (by prefix) and others put in."""

    def written(
        put: Mapping[str, Tensor] | None = None,
        drop: tuple[str, ...] = (),
        *,
        dtype: torch.dtype | None = None,
        metadata: dict[str, str] | None = None,
        strip: str = "",
    ) -> Path:
        tensors = {name: tensor for name, tensor in plain.items() if not drop or not name.startswith(drop)}
        tensors = {name.removeprefix(strip): tensor for name, tensor in {**tensors, **(put or {})}.items()}
        if dtype:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path, metadata=metadata)
        return path

    return written


def single(path: Path, **options: Any) -> SingleFile:
    """The checkpoint at `path`."""
    source = locate(str(path), **options)
    assert isinstance(source, SingleFile)
    return source


def state(source: Any, component: str) -> dict[str, Tensor]:
    """The tensors of a component, under diffusers' names."""
    values = source.configuration if isinstance(source, SingleFile) else source
    return dict(tensors_of(source, component, values.config(component)))


def same(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether two components have the same names and the same bits."""
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in theirs)


def one_line(error: pytest.ExceptionInfo[ModelError], *parts: str) -> None:
    """The message is one line that has all parts."""
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# Components


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_file_gives_the_folders_components(component: str, folder: Path, write: Callable[..., Path]) -> None:
    """Every component of an all-in-one file has the names and the bits of its diffusers folder."""
    mine = state(single(write(), config_folder=folder), component)
    assert same(mine, state(locate(str(folder)), component))


def test_a_file_gives_what_diffusers_reads(folder: Path, write: Callable[..., Path]) -> None:
    """Every component of an all-in-one file in half precision is the one that diffusers reads from it, bit for bit."""
    path = write(dtype=torch.float16)
    pipeline = StableDiffusionXLPipeline.from_single_file(
        str(path), config=str(folder), torch_dtype=torch.float16, local_files_only=True
    )
    source = single(path, config_folder=folder)
    for component in COMPONENTS:
        theirs = getattr(pipeline, component).state_dict()
        assert same(
            state(source, component), {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
        )


@pytest.mark.parametrize("prefixes", [("text_encoders.clip_l.", "text_encoders.clip_g."), ("te1.", "te2.")])
def test_other_programs_names(
    prefixes: tuple[str, str], folder: Path, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    """Text encoders under the names of ComfyUI and of trainers are read, too."""
    programs = {XL_TEXT: prefixes[0], XL_TEXT_2: prefixes[1]}
    renamed = {}
    for name, tensor in plain.items():
        old = next((old for old in programs if name.startswith(old)), None)
        renamed[name if old is None else programs[old] + name.removeprefix(old).removeprefix("model.")] = tensor
    path = tmp_path / "other.safetensors"
    save_file({name: tensor.clone() for name, tensor in renamed.items()}, path)
    source = single(path, config_folder=folder)
    for component in COMPONENTS:
        assert same(state(source, component), state(locate(str(folder)), component))


def real(name: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of each component of a well-known SDXL on the meta device, under diffusers' names."""
    values = PUBLISHED[name]
    with init_empty_weights(include_buffers=False):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel.from_config(values["unet"]),
            "vae": AutoencoderKL.from_config(values["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**values["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**values["text_encoder_2"])),
        }
    return {
        component: {name.removeprefix("text_model."): p for name, p in part.named_parameters()}
        for component, part in parts.items()
    }


def original(parts: Mapping[str, Mapping[str, Tensor]], name: str) -> dict[str, Tensor]:
    """The same in one file's names."""
    named = {
        UNET: unet_to_ldm(dict(parts["unet"]), PUBLISHED[name]["unet"]),
        VAE: vae_to_ldm(dict(parts["vae"]), PUBLISHED[name]["vae"]),
        XL_TEXT: text_to_ldm(dict(parts["text_encoder"])),
        XL_TEXT_2: text_to_ldm(dict(parts["text_encoder_2"]), open_clip=True),
    }
    return {prefix + name: tensor for prefix, part in named.items() for name, tensor in part.items()}


def write_sparse(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """A safetensors file in fp16 that is all hole: real names and shapes, and no bytes on the disk."""
    header, begin = {}, 0
    for name, tensor in tensors.items():
        end = begin + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + begin)
    return path


@pytest.mark.parametrize(
    ("name", "weights"), [("sdxl", 2_567_463_684), ("ssd-1b", 1_331_334_404), ("vega", 745_225_604)]
)
def test_files_of_real_size_are_recognised(name: str, weights: int, tmp_path: Path) -> None:
    """An all-in-one file of SDXL, SSD-1B or Vega needs no configuration and no network: every tensor has its place."""
    parts = real(name)
    assert sum(tensor.numel() for tensor in parts["unet"].values()) == weights
    source = single(write_sparse(tmp_path / "base.safetensors", original(parts, name)))
    assert source.configuration == Published.of(name)
    assert source.ignored == []
    for component, tensors in parts.items():
        shapes = tensors_of(source, component, source.configuration.config(component)).shapes()
        assert shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def test_an_unknown_number_of_layers_is_not_guessed(tmp_path: Path) -> None:
    """A file with other numbers of layers needs a configuration, and the error says so."""
    tensors = {
        name: t
        for name, t in original(real("vega"), "vega").items()
        if "input_blocks.8.1.transformer_blocks.1." not in name
    }
    source = single(write_sparse(tmp_path / "base.safetensors", tensors))
    with pytest.raises(IncompleteModelError) as error:
        _ = source.configuration
    one_line(error, "base.safetensors", "`model_config`")


# Configurations and vocabulary


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("merges.txt", "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"),
        ("vocab.json", "4845b0e575739dbabfda3b54f086884b37d73e94b067988d925a7e52bfdfb8e8"),
    ],
)
def test_the_vocabulary_is_clips(name: str, digest: str) -> None:
    """The shipped vocabulary has the bytes that were made from OpenAI's ``bpe_simple_vocab_16e6.txt.gz``."""
    path = Published.of("sdxl").vocabulary().with_name(name)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert path.with_name("LICENSE").read_text(encoding="utf-8").startswith("MIT License")


@pytest.mark.parametrize(
    ("name", "component", "padding"),
    [
        ("sd15", "tokenizer", 49407),
        ("sd21", "tokenizer", 0),
        ("sdxl", "tokenizer", 49407),
        ("sdxl", "tokenizer_2", 0),
    ],
)
def test_shipped_tokenizers(name: str, component: str, padding: int) -> None:
    """The shipped tokenizers give CLIP's ids, 77 of them, and each model's own padding."""
    from transformers import CLIPTokenizerFast

    files, settings = Published.of(name).tokenizer(component)
    tokenizer = CLIPTokenizerFast.from_pretrained(files, local_files_only=True, **settings)
    ids = tokenizer("A photo of a cat", padding="max_length").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + 70 * [padding]
    assert Published.of(name).config(component, "tokenizer_config.json")["model_max_length"] == 77


# Marks


@pytest.mark.parametrize(
    ("put", "metadata", "expected"),
    [
        ({}, None, ("epsilon", False, "leading")),
        ({"v_pred": EMPTY}, None, ("v_prediction", False, "leading")),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, None, ("v_prediction", True, "trailing")),
        ({f"{UNET}v_pred": EMPTY, f"{UNET}ztsnr": EMPTY}, None, ("v_prediction", True, "trailing")),
        (
            {},
            {"ss_base_model_version": "sdxl_base_v1-0_v", "ss_zero_terminal_snr": "True"},
            ("v_prediction", True, "trailing"),
        ),
    ],
    ids=["none", "v_pred", "v_pred and ztsnr", "with the UNet's prefix", "metadata"],
)
def test_marks(
    put: dict[str, Tensor], metadata: dict[str, str] | None, expected: Any, folder: Path, write: Callable[..., Path]
) -> None:
    """The marks that diffusers ignores set prediction type, zero terminal SNR and timesteps."""
    source = single(write(put, metadata=metadata), config_folder=folder)
    values = read_schedule(source, source.configuration)
    assert tuple(values[key] for key in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")) == expected
    assert source.ignored == []


# Refusals


@pytest.mark.parametrize(
    ("put", "drop", "words"),
    [
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(16, 9, 3, 3)}, (), "9 input channels (inpainting)"),
        ({f"{UNET}input_blocks.0.0.weight": torch.zeros(16, 8, 3, 3)}, (), "8 input channels (InstructPix2Pix)"),
        ({f"{UNET}time_embed.cond_proj.weight": torch.zeros(8, 8)}, (), "LCM"),
        ({"conditioner.embedders.0.model.ln_final.bias": torch.zeros(8)}, (XL_TEXT,), "refiner"),
        ({f"{VAE}decoder.conv_in.weight": torch.zeros(16, 16, 3, 3)}, (), "an autoencoder for 16"),
        ({"edm_mean": torch.zeros(4), "edm_std": torch.zeros(4)}, (), "Playground 2.5"),
        ({"edm_vpred.sigma_max": torch.zeros(()), "edm_vpred.sigma_min": torch.zeros(())}, (), "CosXL"),
        ({"embedder.model.visual.proj": torch.zeros(4)}, (), "unCLIP"),
    ],
    ids=["inpainting", "InstructPix2Pix", "LCM", "refiner", "16 channels", "EDM", "CosXL", "unCLIP"],
)
def test_other_models_are_refused_by_name(
    put: dict[str, Tensor], drop: tuple[str, ...], words: str, folder: Path, write: Callable[..., Path]
) -> None:
    """Models beside the text-to-image SDXL are refused in one line that names them."""
    with pytest.raises(WrongFamilyError) as error:
        single(write(put, drop), config_folder=folder)
    one_line(error, words)


def test_a_configuration_of_the_other_family(folder: Path, tiny_folder: Path, write: Callable[..., Path]) -> None:
    """An SDXL with the configuration of a Stable Diffusion 1.5, and the reverse, is refused, and both are named."""
    for name in ("sd15", tiny_folder):
        with pytest.raises(WrongFamilyError) as error:
            load_family(str(write()), config_folder=name)
        one_line(error, "is an SDXL", "is that of a Stable Diffusion", "`model_config`")
    from ldm_layout import write_checkpoint

    other = write_checkpoint(tiny_folder, write().with_name("sd.safetensors"))
    with pytest.raises(WrongFamilyError) as error:
        load_family(str(other), config_folder=folder)
    one_line(error, "sd.safetensors is a Stable Diffusion", "is that of an SDXL")


@pytest.mark.parametrize(
    ("prefix", "component"), [(VAE, "vae"), (XL_TEXT, "text_encoder"), (XL_TEXT_2, "text_encoder_2")]
)
def test_a_missing_component(prefix: str, component: str, folder: Path, write: Callable[..., Path]) -> None:
    """A file without a component is refused, and the error says which folder to give."""
    with pytest.raises(IncompleteModelError) as error:
        single(write(drop=(prefix,)), config_folder=folder)
    one_line(error, f"lacks the {component}", "(`vae`)" if component == "vae" else "(`text_from`)")


# Components elsewhere


@pytest.mark.parametrize("strip", ["", UNET], ids=["with a prefix", "bare"])
def test_a_unet_alone(strip: str, folder: Path, write: Callable[..., Path]) -> None:
    """A file with only a UNet takes autoencoder, text encoders and tokenizers from folders; the base is all of them."""
    path = write({"v_pred": EMPTY}, (VAE, XL_TEXT, XL_TEXT_2), strip=strip)
    source = single(path, config_folder=folder, vae=folder, text_from=folder)
    for component in COMPONENTS:
        assert same(state(source, component), state(locate(str(folder)), component))
    assert source.configuration.tokenizer("tokenizer_2")[0] == folder / "tokenizer_2"
    assert source.marks.prediction_type == "v_prediction"
    whole = locate(str(folder)).hashes
    assert source.hashes == {name: whole[name] for name in whole if name != "unet"} | {
        "checkpoint": hashlib.sha256(path.read_bytes()).hexdigest()
    }


def test_another_autoencoder(folder: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """Another autoencoder stands in for the one in a file or folder: a model's, or a folder of its own."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    weights = {name: tensor + 1 for name, tensor in state(locate(str(folder)), "vae").items()}
    save_file(weights, other / "vae" / "diffusion_pytorch_model.safetensors")
    for place in (other, other / "vae"):
        for name, options in ((str(write()), {"config_folder": folder}), (str(folder), {})):
            source = locate(name, vae=place, **options)
            assert same(state(source, "vae"), weights)
            assert same(state(source, "unet"), state(locate(str(folder)), "unet"))
            assert source.hashes["vae"] != locate(str(folder)).hashes["vae"]


@pytest.mark.parametrize(("key", "value"), [("scaling_factor", 0.18215), ("latent_channels", 16)])
def test_an_autoencoder_of_another_family(
    key: str, value: float, folder: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    """An autoencoder with another scale or number of channels is refused for a file and for a folder."""
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    path = other / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    for name, options in ((str(write()), {"config_folder": folder}), (str(folder), {})):
        with pytest.raises(WrongFamilyError) as error:
            load_family(name, vae=other, **options)
        one_line(error, "another family", key, str(value), "`vae`")


def test_folders_that_have_nothing(folder: Path, tiny_folder: Path, write: Callable[..., Path], tmp_path: Path) -> None:
    """A folder that is missing, empty, or of a Stable Diffusion 1 instead of an SDXL, is refused by its setting."""
    for setting in ("vae", "text_from"):
        for place in (tmp_path, tmp_path / "nothing"):
            with pytest.raises(UnknownModelError) as unknown:
                locate(str(write()), config_folder=folder, **{setting: place})
            one_line(unknown, place.name, f"`{setting}`")
    with pytest.raises(WrongFamilyError) as error:
        locate(str(write()), config_folder=folder, text_from=tiny_folder)
    one_line(error, "has no text_encoder_2", "`text_from`")
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    (half / "text_encoder_2" / "model.safetensors").unlink()
    with pytest.raises(IncompleteModelError) as incomplete:
        locate(str(write()), config_folder=folder, text_from=half)
    one_line(incomplete, "half lacks text_encoder_2/model.safetensors")


# Damage


def test_damaged_files(folder: Path, plain: dict[str, Tensor], write: Callable[..., Path]) -> None:
    """Tensors that are missing, of another shape, renamed or added give one line, never a traceback or a wrong part."""
    draw = random.Random(0)
    names = sorted(plain)
    for _ in range(20):
        name = draw.choice(names)
        change = draw.choice(("drop", "reshape", "rename", "scalar"))
        put = {
            "drop": {},
            "reshape": {name: torch.zeros(3, 5)},
            "rename": {f"{name}.extra": plain[name]},
            "scalar": {name: torch.zeros(())},
        }[change]
        path = write(put, (name,))
        try:
            source = single(path, config_folder=folder)
            parts = {component: state(source, component) for component in COMPONENTS}
        except ModelError as error:
            assert "\n" not in str(error)
            continue
        fits = all(
            {n: t.shape for n, t in part.items()} == {n: t.shape for n, t in state(locate(str(folder)), c).items()}
            for c, part in parts.items()
        )
        # The rest is found when the networks are filled, see `check_fit`; these tensors no component needs.
        assert not fits or name.endswith(("position_ids", "logit_scale")), (name, change)


@pytest.mark.parametrize("keep", [0, 7, 0.001, 0.5, 0.999])
def test_a_file_that_was_cut(keep: float, write: Callable[..., Path], folder: Path) -> None:
    """A file that was cut short anywhere is refused in one line when it is opened."""
    path = write()
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    with pytest.raises(IncompleteModelError) as error:
        single(path, config_folder=folder)
    one_line(error, path.name)


def test_a_folder_that_was_downloaded_in_part(folder: Path, tmp_path: Path) -> None:
    """One line names all components without their files, and whether a download was not finished."""
    half = Path(shutil.copytree(folder, tmp_path / "half"))
    (half / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    weights = half / "text_encoder_2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    for name in ("vocab.json", "tokenizer.json"):
        (half / "tokenizer_2" / name).unlink(missing_ok=True)
    source = locate(str(half))
    assert isinstance(source, Folder)
    with pytest.raises(IncompleteModelError) as error:
        source.check_complete()
    one_line(error, "only in part", "unet, text_encoder_2, tokenizer_2", "unet/diffusion_pytorch_model.safetensors")
    begun = Path(shutil.copytree(folder, tmp_path / "begun"))
    (begun / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    unfinished = begun / ".cache" / "huggingface" / "download" / "vae" / "x.incomplete"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    with pytest.raises(IncompleteModelError) as error:
        locate(str(begun)).check_complete()  # type: ignore[union-attr]
    one_line(error, "begun was downloaded only in part", "vae")


def test_fp16_and_sharded_weights(folder: Path, tmp_path: Path) -> None:
    """A folder's weights may be in the fp16 variant and in several files; a missing one of them is named."""
    other = tmp_path / "other"
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float16)
    pipeline.save_pretrained(other, variant="fp16", max_shard_size="200KB")
    assert len(list((other / "unet").glob("*fp16-0*.safetensors"))) > 1
    source = locate(str(other))
    assert isinstance(source, Folder)
    source.check_complete()
    for component in COMPONENTS:
        half = {name: tensor.half() for name, tensor in state(locate(str(folder)), component).items()}
        assert same(state(source, component), half)
    shard = sorted((other / "unet").glob("*fp16-0*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(IncompleteModelError) as error:
        source.check_complete()
    one_line(error, f"unet/{shard.name} is missing")


# Distilled models


@pytest.mark.parametrize(
    ("name", "is_distilled"),
    [
        ("sdxl-turbo", True),
        ("sd_xl_turbo_1.0_fp16", True),
        ("DreamShaperXL_Lightning", True),
        ("dreamshaperXL_v21TurboDPMSDE", True),
        ("LCM-Dreamshaper", True),
        ("Hyper-SDXL-8steps", True),
        ("hyper-realistic-xl", False),
        ("lightningbolt", False),
        ("ponyDiffusionV6XL", False),
        ("juggernautXL_v9", False),
    ],
)
def test_distilled_models_render_but_do_not_train(
    name: str, is_distilled: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    """A base for few steps, told by its name, is loaded, and refused for training with what to do."""
    family = load_family(str(shutil.copytree(tiny_folder, tmp_path / name)))
    if not is_distilled:
        family.check_trainable()
        return
    with pytest.raises(WrongFamilyError) as error:
        family.check_trainable()
    one_line(error, name, "few steps", "train on the base", "render that edit with this model")
