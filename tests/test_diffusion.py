"""Facts about the mathematics of the stages, against diffusers and against their definitions."""

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from lowmem_imagic.diffusion.schedules import (
    EDIT_LIMIT,
    PREDICTION_TYPES,
    add_noise,
    coarse,
    draw_timesteps,
    edit_guided,
    guidance_at,
    guide,
    interpolate,
    loss_per_edit,
    project,
    refined,
    training_target,
)

SCHEDULE = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
"""Stable Diffusion's noise schedule."""
STEPS = 1000


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents and noise (R, C, H, W) and timesteps (R,) over the whole schedule."""
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.tensor([0, 1, 17, 250, 500, 777, 998, 999])
    shape = (len(timesteps), 4, 6, 5)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), timesteps


def test_noise_is_added_as_diffusers_does() -> None:
    """`add_noise` equals DDPMScheduler.add_noise at every noise level."""
    latents, noise, timesteps = rows()
    expected = SCHEDULE.add_noise(latents, noise, timesteps)
    torch.testing.assert_close(add_noise(latents, noise, timesteps, SCHEDULE.alphas_cumprod), expected)


def test_v_is_diffusers_velocity() -> None:
    """The target of v prediction equals DDPMScheduler.get_velocity at every noise level."""
    latents, noise, timesteps = rows()
    expected = SCHEDULE.get_velocity(latents, noise, timesteps)
    target = training_target(latents, noise, timesteps, SCHEDULE.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(target, expected)


def test_epsilon_is_the_noise() -> None:
    """The target of epsilon prediction is the noise itself."""
    latents, noise, timesteps = rows()
    assert training_target(latents, noise, timesteps, SCHEDULE.alphas_cumprod, "epsilon") is noise


def test_clean_latents_follow_from_both_targets() -> None:
    """Noisy latents and either target give the clean latents back: both say the same."""
    latents, noise, timesteps = rows()
    a = SCHEDULE.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = add_noise(latents, noise, timesteps, SCHEDULE.alphas_cumprod)
    v = training_target(latents, noise, timesteps, SCHEDULE.alphas_cumprod, "v_prediction")
    torch.testing.assert_close(a.sqrt() * noisy - (1 - a).sqrt() * v, latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((noisy - (1 - a).sqrt() * noise) / a.sqrt(), latents, atol=1e-4, rtol=1e-4)


def test_other_prediction_types_are_refused() -> None:
    """An unknown prediction type is refused with the names of the known ones."""
    latents, noise, timesteps = rows()
    with pytest.raises(ValueError, match=", ".join(PREDICTION_TYPES)):
        training_target(latents, noise, timesteps, SCHEDULE.alphas_cumprod, "sample")


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 2000), st.integers(0, 2**32))
def test_one_timestep_in_each_stratum(draws: int, steps: int, seed: int) -> None:
    """Of `draws` timesteps the i-th lies in the i-th of `draws` equal parts of the schedule."""
    timesteps = draw_timesteps(draws, steps, torch.Generator().manual_seed(seed))
    assert timesteps.shape == (draws,) and timesteps.dtype == torch.int64
    for part, timestep in enumerate(timesteps.tolist()):
        # A part may begin or end within a timestep, and the arithmetic is fp32.
        assert int(part * steps / draws - 1e-3) <= timestep <= min(steps - 1, (part + 1) * steps / draws + 1e-3)


@pytest.mark.parametrize("draws", [1, 3, 8])
def test_timesteps_are_uniform_overall(draws: int) -> None:
    """Over many steps every tenth of the schedule is drawn equally often, for any number of draws."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_timesteps(draws, STEPS, generator) for _ in range(12_000 // draws)])
    assert drawn.min() >= 0 and drawn.max() <= STEPS - 1
    counts = torch.histc(drawn.float(), bins=10, min=0, max=STEPS)
    # Five standard deviations of a count of 1200.
    assert (counts - 1200).abs().max() < 5 * 1200**0.5


def test_interpolation_ends() -> None:
    """eta 0 is the optimised embedding, 1 the target embedding, to the bit; beyond 1 the line goes on."""
    target, optimized = torch.randn(2, 5, 3)
    assert torch.equal(interpolate(target, optimized, 0.0), optimized)
    assert torch.equal(interpolate(target, optimized, 1.0), target)
    torch.testing.assert_close(interpolate(target, optimized, 1.5), optimized + 1.5 * (target - optimized))


def test_projection_adds_what_is_at_a_right_angle() -> None:
    """Projection at eta 0 is e_opt; the part that eta adds is orthogonal to e_opt token by token, and together with the
    part along e_opt it is e_tgt."""
    target, optimized = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    assert torch.equal(project(target, optimized, 0.0), optimized)
    added = project(target, optimized, 0.7) - optimized
    assert (added * optimized).sum(-1).abs().max() < 1e-12
    along = target - added / 0.7
    cosine = torch.nn.functional.cosine_similarity(along, optimized, dim=-1)
    torch.testing.assert_close(cosine.abs(), torch.ones_like(cosine))


def test_guidance_rises_from_the_photo_to_the_sentence() -> None:
    """It is the photo's up to eta 0, the whole from eta 1, in the middle halfway; without the photo's, the whole."""
    assert [guidance_at(eta, 4.0, 1.0) for eta in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [1.0, 1.0, 2.5, 4.0, 4.0]
    assert [guidance_at(eta, 4.0, None) for eta in (0.0, 0.5)] == [4.0, 4.0]


def test_coarse_latents_are_cell_means() -> None:
    """Coarse latents are the means of equal cells; refined again, a flat picture is itself and means are kept."""
    latents = torch.randn(2, 4, 8, 8)
    cells = coarse(latents, 4)
    torch.testing.assert_close(cells[1, 2, 0, 3], latents[1, 2, 0:2, 6:8].mean())
    flat = torch.full((1, 4, 8, 8), 0.7)
    torch.testing.assert_close(refined(coarse(flat, 4), 8, 8), flat)
    torch.testing.assert_close(refined(cells, 8, 8).mean((2, 3)), cells.mean((2, 3)), atol=1e-5, rtol=1e-5)


def test_guidance() -> None:
    """Scale 0 is the unconditional prediction, 1 the conditional one; higher goes further the same way."""
    unconditional, conditional = torch.randn(2, 3, 4, 5, 5)
    assert torch.equal(guide(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(guide(unconditional, conditional, 1.0), conditional)
    further = guide(unconditional, conditional, 7.5) - unconditional
    torch.testing.assert_close(further, 7.5 * (conditional - unconditional))
    scales = torch.tensor([0.0, 7.5, 2.0]).view(-1, 1, 1, 1)
    together = guide(unconditional, conditional, scales)
    for row, scale in enumerate(scales.flatten().tolist()):
        assert torch.equal(together[row], guide(unconditional[row], conditional[row], scale))


def test_edit_guidance_ends_beside_the_sentences_prediction() -> None:
    """The difference to a source prompt is whole where it is short, and moves nothing where the texts agree. No value
    goes further than `EDIT_LIMIT` times the way to the sentence's own, in either direction and at any scale."""
    photo, sentence = torch.tensor([0.0, 0.0, 0.0, 5.0, 2.0]), torch.tensor([1.0, 1.0, -1.0, 1.0, 0.0])
    described = torch.tensor([0.9, -9.0, -3.5, 1.0, 1.0])
    expected = torch.tensor([0.3, EDIT_LIMIT, EDIT_LIMIT, 5.0, 2.0 - 2 * EDIT_LIMIT])
    torch.testing.assert_close(edit_guided(photo, sentence, described, 3.0), expected)
    drawn = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    for scale in (-1.0, 0.5, 3.0, 300.0):
        moved = edit_guided(*drawn, scale) - drawn[0]
        assert (moved.abs() <= EDIT_LIMIT * (drawn[1] - drawn[0]).abs() + 1e-5).all()
        assert (moved * scale * (drawn[1] - drawn[2]) >= 0).all()


def test_edit_guidance_differs_between_rows() -> None:
    """Each row of a batch has its own scale, and 0 is the photo."""
    photo, sentence, described = torch.randn(3, 2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.0, 2.0]).view(-1, 1, 1, 1)
    together = edit_guided(photo, sentence, described, scales)
    assert torch.equal(together[0], photo[0])
    assert torch.equal(together[1], edit_guided(photo[1], sentence[1], described[1], 2.0))


def test_loss_of_each_edit_is_its_own_mean() -> None:
    """The loss of each edit is the mean squared error over its own rows."""
    prediction, target = torch.randn(2, 6, 4, 3, 3)
    losses = loss_per_edit(prediction, target, 3)
    expected = [torch.nn.functional.mse_loss(prediction[i : i + 2], target[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_edits_do_not_mix_in_the_loss() -> None:
    """The gradient of the summed losses is, row by row, that of each edit's loss alone."""
    prediction, target = torch.randn(2, 6, 4, 3, 3)
    together = prediction.clone().requires_grad_()
    loss_per_edit(together, target, 3).sum().backward()
    for edit in range(3):
        alone = prediction[2 * edit : 2 * edit + 2].clone().requires_grad_()
        loss_per_edit(alone, target[2 * edit : 2 * edit + 2], 1).sum().backward()
        assert torch.equal(alone.grad, together.grad[2 * edit : 2 * edit + 2])


def test_the_loss_is_computed_in_fp32() -> None:
    """Half-precision predictions are compared in fp32, so that small errors do not vanish."""
    prediction = torch.full((1, 4, 2, 2), 1e-3, dtype=torch.float16)
    losses = loss_per_edit(prediction, torch.zeros(1, 4, 2, 2), 1)
    assert losses.dtype == torch.float32
    assert losses.item() == pytest.approx(1e-6, rel=1e-2)
