"""Common fixtures: a tiny Stable Diffusion with random weights in diffusers' folder layout."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Before any library reads it: no test needs the network, and none may wait for it.
os.environ["HF_HUB_OFFLINE"] = "1"

# Unexpected errors reach the tests unchanged.
os.environ["LOWMEM_IMAGIC_DEBUG"] = "1"

# Before torch counts the cores: workers of pytest-xdist share them, and so do the processes that tests start.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

# A busy machine is no reason to fail: no test of behaviour depends on how long its examples take.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=50)
settings.register_profile("thorough", settings.get_profile("untimed"), max_examples=400)
settings.load_profile("untimed")

CAPTIONS = ("a photo of a red cube on the grass", "a blue sphere on a wooden floor", "two birds kissing")
PROMPTS = ("a photo of a red cube on the grass", "a blue sphere", "two birds kissing")
TEXT_WIDTH = 16
"""Width D of the tiny model's text conditioning."""
LATENT_SIDE = 8


def new_tiny_unet(**changes: Any) -> Any:
    """An untrained UNet for (4, 8, 8) latents with every layer type of Stable Diffusion 1.x; 0.8 M weights."""
    from diffusers import UNet2DConditionModel

    config: dict[str, Any] = {
        "sample_size": LATENT_SIDE,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_WIDTH,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**config, **changes})


def away_from_start(network: Any) -> Any:
    """The network with every vector that starts as zeros or ones moved off it, so that all of them matter."""
    import torch

    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete diffusers folder with random weights: 16 px pictures, (4, 8, 8) latents, width 16."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from lowmem_imagic.demo.architecture import TOKENS, new_scheduler, train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny-sd"
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=700)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = away_from_start(new_tiny_unet())
        vae = away_from_start(
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 16),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=4,
                sample_size=16,
            )
        )
        text_encoder = away_from_start(
            CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=TEXT_WIDTH,
                    intermediate_size=32,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    max_position_embeddings=TOKENS,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
        )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder_copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of `tiny_folder` that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny-sd"))


@pytest.fixture(scope="session")
def load_base(tiny_folder: Path) -> Callable[..., Any]:
    """Loads the tiny model on the CPU as a fresh `BaseModel`, with `BaseModel.load`'s options."""
    from lowmem_imagic.engine.base import BaseModel

    def load(**options: Any) -> BaseModel:
        return BaseModel.load(str(tiny_folder), device="cpu", **options)

    return load


@pytest.fixture(scope="module")
def base(load_base: Callable[..., Any]) -> Any:
    """The tiny model in 8 bit, shared by a file's tests, which do not change it."""
    return load_base()


@pytest.fixture(scope="module")
def text(base: Any) -> Any:
    """Target embeddings (3, T, D) of `PROMPTS`."""
    from tests import calls

    return calls.encode_text(base, PROMPTS)


@pytest.fixture(scope="module")
def edits(base: Any, text: Any) -> tuple[Any, Any]:
    """An `AdapterPack` of three edits and their e_opt, away from zero and from e_tgt."""
    import torch

    from lowmem_imagic.layers.adapter_pack import AdapterPack
    from tests import calls

    generator = torch.Generator().manual_seed(21)
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=3, adapt="all", rank=2, alpha=2.0)
    pack.weights.add_(torch.randn(pack.weights.shape, generator=generator), alpha=0.05)
    return pack, text + 0.3 * torch.randn(text.shape, generator=generator)


@pytest.fixture(scope="session")
def relative() -> Callable[[Any, Any], float]:
    """Measures the distance of a tensor from a reference, as a share of the reference's norm."""

    def distance(tensor: Any, reference: Any) -> float:
        tensor, reference = tensor.detach().double(), reference.detach().double()
        return float((tensor - reference).norm() / reference.norm())

    return distance


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts tests of the browser and of processes first, which take long and wait; skips tests that need a GPU where
    there is none."""
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("process", "ray"))))
    items.sort(key=lambda item: item.get_closest_marker("browser") is None)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
