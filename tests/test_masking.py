"""Facts about masks: where they are, and that a masked picture is its photo's wherever they are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_imagic.demo.render import object_mask, render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.pictures.letterbox import to_tensor
from lowmem_imagic.sampling import sample as sampling
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.stages import SampleConfig
from tests import calls

SCHEDULERS = ("DDIM", "EulerDiscrete", "DPMSolverMultistep", "DDPM", "HeunDiscrete")


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Makes every mask the right half of the picture; collects the latents that masks were asked for."""
    asked: list[Tensor] = []

    def right_half(base: Any, denoiser: Any, latents: Tensor, *_: Any, **__: Any) -> Tensor:
        asked.append(latents)
        mask = torch.zeros(1, *latents.shape[1:])
        mask[..., latents.shape[-1] // 2 :] = 1
        return mask

    monkeypatch.setattr(sampling, "change_mask", right_half)
    return asked


def test_the_mask_is_where_the_predictions_differ(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 1 where two texts' predictions differ most, 0 where they agree, and reaches one cell further each way; a
    lesser difference is taken in by a lower threshold only."""
    one, other = torch.zeros(2, 3), torch.ones(2, 3)

    def predict(noisy: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        assert set(timesteps.tolist()) == {700}
        change = torch.zeros_like(noisy)
        change[..., 1:7, 1:7], change[..., 12:15, 12:15] = 1.0, 0.5
        return noisy + change * embeddings.mean((1, 2)).view(-1, 1, 1, 1)

    monkeypatch.setattr(base, "predict", calls.in_place(predict))
    latents = torch.randn(4, 16, 16)
    mask = calls.change_mask(base, latents, one, other, 0.8)
    assert mask.shape == (1, 16, 16) and mask[0, 1:7, 1:7].eq(1).all()
    assert mask[0, 8:].eq(0).all() and mask[0, :, 8:].eq(0).all() and mask[0, 2:6, :8].gt(0).all()
    assert calls.change_mask(base, latents, one, other, 0.3)[0, 12:15, 12:15].gt(0.5).all()
    torch.testing.assert_close(calls.change_mask(base, latents, one, other, 0.8, max_rows=5), mask)
    assert not any(calls.change_mask(base, latents, one, one, threshold).any() for threshold in (0.05, 0.5))


def test_the_bundled_base_finds_what_a_sentence_changes() -> None:
    """For another colour of an object, most of the object is in the mask and most of the rest is not."""
    base = BaseModel.load("demo", device="cpu")
    scene = Scene.from_sentence("a large red rubber cube on a wooden floor", seed=3)
    picture = to_tensor(render(scene, base.sizes.own[0]))
    words = [scene.caption(), scene.edit(color="blue").caption()]
    mask = calls.change_mask(base, base.encode_images(picture)[0], *calls.encode_text(base, words), 0.6)
    there = torch.as_tensor(object_mask(scene, 16)).bool()
    assert mask[0][there].mean() > 0.6 and mask[0][~there].mean() < 0.35


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_outside_the_mask_is_the_photo(
    scheduler: str, base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], halved: list[Tensor]
) -> None:
    """In places with mask 0 the latents equal those of eta 0 to the bit, elsewhere they differ; eta 0 itself is
    rendered without a mask, even if it is not requested, and the mask is made from it."""
    pack, optimized = edits

    def render(etas: Sequence[float], mask: float) -> Tensor:
        config = SampleConfig(num_inference_steps=3, scheduler=scheduler, mask=mask)
        return calls.sample(base, pack, text, optimized, [Cell(1, eta, 7) for eta in etas], config)

    [photo] = render([0.0], 0.0)
    assert torch.equal(render([0.0], 0.5)[0], photo) and not halved
    changed = render([1.0, 0.6], 0.5)
    assert torch.equal(halved[0], photo)
    for made in changed:
        assert torch.equal(made[..., :4], photo[..., :4])
        assert not torch.isclose(made[..., 4:], photo[..., 4:]).all(0).any()
    assert not torch.equal(changed[0], changed[1])


def test_a_mask_of_everything_is_none(
    base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a mask of ones a picture is the one without a mask."""
    pack, optimized = edits
    monkeypatch.setattr(
        sampling, "change_mask", lambda base, denoiser, latents, *_, **__: torch.ones(1, *latents.shape[1:])
    )
    masked, free = (
        calls.sample(base, pack, text, optimized, [Cell(0, 0.8, 1)], SampleConfig(num_inference_steps=3, mask=mask))
        for mask in (0.5, 0.0)
    )
    assert torch.equal(masked, free)


def test_the_base_alone_has_no_mask(
    base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], halved: list[Tensor]
) -> None:
    """At strength 0 there is no photo to keep to: the picture is the one without a mask."""
    pack, optimized = edits
    cells = [Cell(0, 1.0, 1, strength=0.0), Cell(0, 1.0, 1), Cell(0, 1.0, 1, strength=(0.0, 0.0, 0.0))]
    masked, free = (
        calls.sample(base, pack, text, optimized, cells, SampleConfig(num_inference_steps=2, mask=mask))
        for mask in (0.5, 0)
    )
    assert torch.equal(masked[0], free[0]) and not torch.equal(masked[1], free[1])
    assert torch.equal(masked[2], free[2])


def test_a_mask_goes_on_in_fewer_rows(
    load_base: Callable[..., Any], text: Tensor, edits: tuple[AdapterPack, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mask that runs out of memory takes fewer rows and says so; rows that were learnt before are kept to; with one
    row alone there is no mask to be had."""
    pack, optimized = edits
    base, most, widest = load_base(), 64, []
    predict = calls.plain(base)

    def limited(x: Tensor, t: Tensor, e: Tensor) -> Tensor:
        widest.append(len(x))
        if len(x) > most:
            raise torch.OutOfMemoryError
        return predict(x, t, e)

    monkeypatch.setattr(base, "predict", calls.in_place(limited))
    config = SampleConfig(num_inference_steps=2, guidance_scale=1.0, mask=0.5)

    def render() -> Tensor:
        widest.clear()
        return calls.sample(base, pack, text, optimized, [Cell(0, 1.0, 1)], config)

    whole = render()
    assert max(widest) == 24 and not base.fallbacks
    most = 5
    torch.testing.assert_close(render(), whole)
    assert base.fallbacks == [f"{images} images a sampling batch" for images in (8, 4, 2)]
    base.fallbacks.clear()
    torch.testing.assert_close(render(), whole)
    assert max(widest) == 4 and not base.fallbacks and base.most_images == 2
    most = 1
    with pytest.raises(torch.OutOfMemoryError):
        render()


def test_photos_are_rendered_in_batches(
    base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More photos than a batch holds give the pictures that all at once give."""
    pack, optimized = edits
    cells = [Cell(edit, eta, seed) for edit in range(3) for eta in (0.0, 0.7) for seed in (0, 1)]
    cells.append(Cell(1, 1.0, 0, strength=0.0))
    together, apart = (
        calls.sample(base, pack, text, optimized, cells, SampleConfig(num_inference_steps=2, mask=0.5, batch_rows=rows))
        for rows in (64, 2)
    )
    torch.testing.assert_close(apart, together, atol=1e-4, rtol=1e-4)


def test_each_image_has_the_mask_of_its_own_edit_and_photo(
    base: Any, text: Tensor, edits: tuple[AdapterPack, Tensor], halved: list[Tensor]
) -> None:
    """There is one mask per edit, seed and guidance of the photo, for any etas and strengths; progress counts photos,
    too."""
    pack, optimized = edits
    cells = [Cell(0, 0.5, 0), Cell(0, 1.0, 0, strength=0.5), Cell(0, 1.0, 1), Cell(2, 1.0, 0, guidance_scale=1.0)]
    told: list[tuple[int, int]] = []
    config = SampleConfig(num_inference_steps=2, mask=0.5)
    calls.sample(base, pack, text, optimized, cells, config, lambda step, steps, _: told.append((step, steps)))
    assert len(halved) == 3
    assert told[-1] == (14, 14) and told == sorted(told)
    halved.clear()
    cells = [Cell(0, 1.0, 0, guidance_scale=scale) for scale in (1.0, 3.0, 5.0)]
    calls.sample(base, pack, text, optimized, cells, SampleConfig(num_inference_steps=2, mask=0.5, photo_guidance=1.0))
    unguided = SampleConfig(num_inference_steps=2, guidance_scale=1.0)
    [photo] = calls.sample(base, pack, text, optimized, [Cell(0, 0.0, 0)], unguided)
    assert len(halved) == 1 and torch.equal(halved[0], photo)
