"""Facts about the photo's own noise, and its use in training and sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from lowmem_imagic.demo.render import render
from lowmem_imagic.demo.scene import Scene
from lowmem_imagic.diffusion.schedules import VARIATION, refined, training_target, varied
from lowmem_imagic.edits import file as edit_file
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import ConfigError, TensorShapeError
from lowmem_imagic.geometry import Sizes
from lowmem_imagic.pictures import Photo
from lowmem_imagic.pictures.letterbox import to_tensor
from lowmem_imagic.pipeline.apply import apply_edits
from lowmem_imagic.pipeline.make import make_edits
from lowmem_imagic.pipeline.prepare import Job
from lowmem_imagic.sampling.inversion import SOFTENING
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig, SampleConfig
from lowmem_imagic.training import loop
from tests import calls

SENTENCE = "a photo of a blue cube on a stone floor"


def quick(**sampling: Any) -> EditConfig:
    """A step of each stage, started from the photo's own noise unless told otherwise."""
    return preset(
        "balanced",
        {
            "embed": {"steps": 1},
            "finetune": {"steps": 1, "lora_rank": 2, "keep": 1.0},
            "sample": {"num_inference_steps": 2, "etas": (0.0, 1.0), "mask": 0.0, **sampling},
        },
    )


def photo(color: str = "red") -> Photo:
    """A plain picture as a photo."""
    image = Image.new("RGB", (32, 32), color)
    return Photo(image=image, sha256="0" * 64, name="photo", notes=(), icc_profile=None)


@pytest.fixture(scope="module")
def tiny(load_base: Callable[..., Any]) -> Any:
    """The tiny model in 8 bit."""
    return load_base()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_inversion_of_a_perfect_base_is_the_noise_it_sees(
    prediction_type: str, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a base that sees one noise in everything, that is the photo's own, to the softening noise on the photo."""
    latents, seen = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    drawn = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))[0]
    softened = latents + SOFTENING * drawn
    monkeypatch.setitem(tiny.family.scheduler_config, "prediction_type", prediction_type)

    def predict(noisy: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        assert torch.equal(text, calls.encode_text(tiny, [""]))
        return training_target(softened[None], seen[None], timesteps, tiny.family.schedule.alpha_bar, prediction_type)

    monkeypatch.setattr(tiny, "predict", calls.in_place(predict))
    steps: list[int] = []
    own = calls.own_noise(tiny, latents, torch.Generator().manual_seed(5), lambda step, *_: steps.append(step))
    assert own.dtype == torch.float32 and steps == list(range(1, 31))
    torch.testing.assert_close(own, seen, atol=0.1, rtol=0)


def test_own_noise_is_white_and_leads_back_to_the_photo() -> None:
    """Of the bundled model and scenes: near standard normal, neighbours unrelated, and DDIM without text comes back to
    the photo from under it, and to something else from under a seed's noise."""
    base = BaseModel.load("demo", device="cpu")
    scenes = ("a large red rubber cube on a wooden floor", "a small blue metal sphere on a tiled floor")
    pictures = torch.cat([to_tensor(render(Scene.from_sentence(words, seed=4), base.sizes.own[0])) for words in scenes])
    latents = base.encode_images(pictures)
    own = torch.stack([calls.own_noise(base, x, torch.Generator().manual_seed(0)) for x in latents])
    assert 0.85 < own.std() < 1.1 and own.mean().abs() < 0.1
    assert ((own[..., 1:] * own[..., :-1]).mean() / own.var()).abs() < 0.1

    def denoised(noise: Tensor) -> Tensor:
        scheduler = base.family.schedule.scheduler("DDIM")
        scheduler.set_timesteps(30)
        x = scheduler.add_noise(latents, noise, scheduler.timesteps[:1].expand(2))
        empty = calls.encode_text(base, [""]).expand(2, -1, -1)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(calls.predict(base, x, t.expand(2), empty), t, x).prev_sample
        return (x - latents).square().mean((1, 2, 3)).sqrt()

    seeds = torch.randn(own.shape, generator=torch.Generator().manual_seed(1))
    assert bool((denoised(own) < 0.3 * denoised(seeds)).all())


def test_edits_hold_the_noise_they_were_anchored_to(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started from their own noise, edits of a pack have each its own, in the file as in training's draws, varied by
    the first seed they will be sampled with; otherwise the file has none."""
    anchors: list[Tensor] = []
    draw = loop.draw_rows

    def recording(latents: Tensor, draws: int, schedule: Any, generators: Any, span: Any, anchor: Any, n: int) -> Any:
        anchors.append(anchor)
        return draw(latents, draws, schedule, generators, span, anchor, n)

    monkeypatch.setattr(loop, "draw_rows", recording)
    jobs = [Job(photo("red"), SENTENCE), Job(photo("green"), SENTENCE)]
    edits = make_edits(tiny, jobs, quick(), slots=1)
    stored = [edit_file.decode(edit_file.encode(edit)).noise["unet"] for edit in edits]
    assert all(noise is not None and noise.shape == tiny.family.latent_shape for noise in stored)
    assert torch.equal(torch.stack(anchors), torch.stack(stored).repeat_interleave(2, 0).float())  # type: ignore[arg-type]
    assert not torch.equal(stored[0], stored[1])  # type: ignore[arg-type]
    seconds = [edit.measured["stages"]["invert"]["seconds"] for edit in edits]
    assert min(seconds) > 0
    anchors.clear()
    [seeded] = make_edits(tiny, jobs[:1], quick(seeds=(5,)))
    drawn = torch.randn(anchors[0].shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(seeded.noise["unet"], stored[0])
    assert torch.equal(anchors[0], varied(stored[0].float(), drawn, 5))  # type: ignore[union-attr]
    [other] = make_edits(tiny, jobs[:1], quick(start="photo"))
    assert not other.noise and "invert" not in other.measured["stages"]


def test_nothing_is_encoded_once_the_unet_is_there(load_base: Callable[..., Any]) -> None:
    """The empty sentence that inversion needs is encoded with the others, also beside a negative sentence."""
    base = load_base()
    loaded: list[str] = []
    for part in ("text_encoder", "unet"):
        load = getattr(base.family, f"load_{part}")
        setattr(
            base.family, f"load_{part}", lambda *a, _part=part, _load=load, **k: loaded.append(_part) or _load(*a, **k)
        )
    make_edits(base, [Job(photo(), SENTENCE)], quick(negative_prompt="a red cube"))
    assert loaded == ["text_encoder", "unet"]


def test_seed_0_is_the_photos_own_noise_and_others_vary_it(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first latents the UNet sees are the photo's low frequencies under its own noise, with a share of the seed's
    for any seed but 0."""
    [edit] = make_edits(tiny, [Job(photo(), SENTENCE)], quick())
    seen: list[Tensor] = []
    predict = calls.plain(tiny)
    monkeypatch.setattr(tiny, "predict", calls.in_place(lambda x, t, e: seen.append(x.clone()) or predict(x, t, e)))
    config = SampleConfig(num_inference_steps=1, guidance_scale=1.0, start="inverted")
    apply_edits(tiny, [edit], [Cell(0, 1.0, seed) for seed in (0, 5)], config)
    steps = tiny.family.schedule.scheduler("DDIM")
    steps.set_timesteps(1)
    own = edit.noise["unet"].float()
    drawn = torch.randn(own.shape, generator=torch.Generator().manual_seed(5))
    noise = torch.stack([own, (1 - VARIATION**2) ** 0.5 * own + VARIATION * drawn])
    low = refined(edit.coarse["unet"].float()[None], *own.shape[1:]).expand_as(noise)
    torch.testing.assert_close(seen[0], steps.add_noise(low, noise, steps.timesteps[:1].expand(2)))


def test_what_has_no_fitting_noise_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit without its own noise, or for pictures of another size, cannot start from it; the error names the
    alternatives."""
    [edit] = make_edits(tiny, [Job(photo(), SENTENCE)], quick(start="photo"))
    with pytest.raises(ConfigError, match="`start=photo`"):
        apply_edits(tiny, [edit], [Cell(0, 1.0, 0)], quick().sample)
    [edit] = make_edits(tiny, [Job(photo(), SENTENCE)], quick())
    monkeypatch.setattr(type(tiny.family), "sizes", Sizes((32, 32), 4, 32))
    with pytest.raises(TensorShapeError, match="`start=photo`"):
        apply_edits(tiny, [edit], [Cell(0, 1.0, 0)], quick().sample)
