"""Facts about the linear code that the bundled autoencoder's encoder computes."""

import pytest
import torch

from lowmem_imagic.demo import architecture, codec
from lowmem_imagic.demo.pictures import packed, render_batch, to_tensor, training_scene_at
from lowmem_imagic.demo.procedural import procedural_batch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """Pictures (16, 3, 64, 64) in [-1, 1]."""
    return to_tensor(render_batch(packed([training_scene_at(3, n) for n in range(16)]), 64, supersampling=1), CPU)


@pytest.fixture(scope="module")
def code(scenes: torch.Tensor) -> codec.LinearCode:
    """A code of scenes and procedural pictures."""
    strange = to_tensor(procedural_batch(16, 64, torch.Generator().manual_seed(0)), CPU)
    return codec.fit(torch.cat([scenes, strange]), architecture.LATENT_CHANNELS, scaled_to=scenes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.float16, 4e-2)])
def test_the_encoder_computes_the_code(
    code: codec.LinearCode, scenes: torch.Tensor, dtype: torch.dtype, tolerance: float
) -> None:
    """An AutoencoderKL with the written weights encodes any picture, noise too, as the code does, all but without
    spread."""
    vae = architecture.new_vae().to(dtype)
    codec.write_linear_encoder(vae, code)
    noise = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for pictures in (scenes, noise, torch.ones(1, 3, 32, 32), -torch.ones(1, 3, 32, 32)):
        with torch.no_grad():
            posterior = vae.encode(pictures.to(dtype)).latent_dist
        assert (posterior.mean.float() - code.encode(pictures)).abs().max() < tolerance
        assert posterior.std.max() < 1e-4
    assert vae.config.scaling_factor == 1


def test_no_linear_code_loses_less(code: codec.LinearCode, scenes: torch.Tensor) -> None:
    """Blocks come back from the code's numbers as well as from the principal components of each plane of colour."""
    one = codec.fit(scenes, 12, scaled_to=scenes)
    blocks = scenes.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(-1, 192).double()
    basis = torch.linalg.qr(one.weight.flatten(1).T.double())[0]
    lost = (blocks - blocks @ basis @ basis.T).square().mean()
    values = torch.linalg.svdvals(blocks).square() / blocks.numel()
    # The planes are fixed, so mixtures of light and colour are not open to it.
    assert values[12:].sum() <= lost < 2 * values[12:].sum()


def test_latents_of_scenes_are_centred_and_in_order(code: codec.LinearCode, scenes: torch.Tensor) -> None:
    """Over scenes the first channel has deviation 1, none has more, and even channels have mean 0."""
    latents = code.encode(scenes)
    spread = latents.std((0, 2, 3))
    assert spread[0] == pytest.approx(1, abs=1e-3)
    assert spread.max() <= 1.001
    assert latents.mean((0, 2, 3))[code.parity == 1].abs().max() < 1e-3


def test_a_mirror_image_has_the_mirrored_code(code: codec.LinearCode, scenes: torch.Tensor) -> None:
    """`mirrored` gives the latents of the mirror images."""
    assert torch.allclose(code.encode(scenes.flip(-1)), code.mirrored(code.encode(scenes)), atol=1e-4)


def test_the_same_pictures_give_the_same_code(code: codec.LinearCode, scenes: torch.Tensor) -> None:
    """Neither the order of pictures nor the signs of a solver change the code."""
    strange = to_tensor(procedural_batch(16, 64, torch.Generator().manual_seed(0)), CPU)
    again = codec.fit(torch.cat([strange.flip(0), scenes]), architecture.LATENT_CHANNELS, scaled_to=scenes.flip(0))
    assert torch.allclose(again.weight, code.weight, atol=1e-4)
    assert torch.equal(again.parity, code.parity)
