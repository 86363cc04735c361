"""Facts about photos at their own aspect, in pictures of other sizes than the model's square."""

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from lowmem_imagic import Cell, Job, apply_edits, make_edits, read_edit, stream_edits, write_edit
from lowmem_imagic.batch.jobs import job_id, pack_id
from lowmem_imagic.edits import versions
from lowmem_imagic.edits.edit import MAX_NOISE_SIDE
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import ConfigError, EditTooLargeError
from lowmem_imagic.families import load_architecture
from lowmem_imagic.families.files.published import PUBLISHED
from lowmem_imagic.geometry import Sizes
from lowmem_imagic.pictures import Photo
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from tests.other_family import other_base

SENTENCE = "a photo of a red cube on the grass"


@pytest.fixture(scope="module")
def wide_base(load_base: Any) -> Iterator[Any]:
    """The tiny model with a grid that has other sizes than its square of 16 px."""
    base = load_base()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(base.family), "sizes", Sizes((16, 16), 4, 8))
        yield base


def photo(width: int, height: int) -> Photo:
    """A photo with a gradient."""
    image = Image.linear_gradient("L").resize((width, height)).convert("RGB")
    return Photo(image=image, sha256=f"{width:032x}{height:032x}", name="photo", notes=(), icc_profile=None)


def config(**sampling: Any) -> EditConfig:
    """Settings of a short edit."""
    return EditConfig(
        embed=EmbedConfig(steps=2, draws=2, learning_rate=1e-3),
        finetune=FinetuneConfig(steps=2, draws=2, learning_rate=1e-3, adapt="attn", lora_rank=2, lora_alpha=2.0),
        sample=SampleConfig(num_inference_steps=3, **{"start": "inverted", "mask": 0.3, **sampling}),
    )


@pytest.fixture(scope="module")
def wide(wide_base: Any) -> Any:
    """An edit of a photo of 3:2."""
    [edit] = make_edits(wide_base, [Job(photo(60, 40), SENTENCE)], config())
    return edit


def test_a_photo_of_three_to_two_is_not_padded(wide: Any) -> None:
    """The model's picture has the aspect of its grid nearest to the photo's, and training is at that size."""
    assert wide.source.size == (20, 12)
    assert wide.source.box == (1, 0, 19, 12)
    assert tuple(wide.noise["unet"].shape) == (4, 6, 10)


def test_its_file_is_of_version_2_and_a_square_ones_of_version_1(wide: Any, wide_base: Any, tmp_path: Path) -> None:
    """Version 1 has squares only; other programs see the same kohya tensors in both versions, and the size."""
    [square] = make_edits(wide_base, [Job(photo(40, 40), SENTENCE)], config())
    assert (square.version, wide.version) == (1, 2)
    for edit, size in ((square, "16x16"), (wide, "20x12")):
        path = tmp_path / f"{size}.safetensors"
        write_edit(edit, path)
        assert read_edit(path) == edit
        assert f'"modelspec.resolution":"{size}"'.encode() in path.read_bytes()
    names = [set(load_file(tmp_path / f"{size}.safetensors")) for size in ("16x16", "20x12")]
    assert names[0] == names[1] and all(name.startswith("lora_unet_") for name in names[1])


def test_pictures_have_the_photos_own_size(wide: Any, wide_base: Any) -> None:
    """Edits of several sizes are rendered in one call, each with the bits that it has alone and at its photo's size."""
    [tall] = make_edits(wide_base, [Job(photo(40, 70), SENTENCE)], config())
    cells = [Cell(1, 1.0, 0), Cell(0, 0.0, 0), Cell(0, 1.0, 0), Cell(1, 0.0, 0)]
    together = apply_edits(wide_base, [wide, tall], cells, config().sample)
    assert [picture.size for picture in together] == [(40, 70), (60, 40), (60, 40), (40, 70)]
    alone = apply_edits(wide_base, [wide], [Cell(0, 0.0, 0), Cell(0, 1.0, 0)], config().sample)
    assert [picture.tobytes() for picture in together[1:3]] == [picture.tobytes() for picture in alone]


def test_a_pack_of_several_sizes_gives_what_each_gets_alone(wide: Any, wide_base: Any, relative: Any) -> None:
    """Photos of several sizes train side by side, photos of one size in one pass; results have their jobs' numbers."""
    jobs = [Job(photo(*size), SENTENCE) for size in ((60, 40), (40, 70), (60, 40), (40, 40))]
    in_slots: list[set[Any]] = []

    def between(pack: Any) -> None:
        in_slots.append({number for number, _ in pack.states()})

    edits: dict[int, Any] = {}
    for group in stream_edits(wide_base, jobs, config(), slots=2, between=between):
        edits |= group
    assert [edits[number].source.size for number in range(4)] == [(20, 12), (12, 20), (20, 12), (16, 16)]
    assert in_slots[0] == {0, 2}, "photos of one size share the slots"
    assert relative(edits[0].conditioning["embeds"], wide.conditioning["embeds"]) < 1e-3
    for key, factors in wide.adapters["unet"].items():
        assert relative(edits[2].adapters["unet"][key].up, factors.up) < 0.05


def test_a_state_of_another_size_is_not_resumed(wide_base: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A training state of the photo in another size is not used: the edit begins anew and is complete."""
    states: list[Any] = []

    def keep(pack: Any) -> None:
        states.extend(state for _, state in pack.states())

    [[(_, whole)]] = stream_edits(wide_base, [Job(photo(60, 40), SENTENCE)], config(), between=keep)
    moved = dataclasses.replace(states[2], shapes={"unet": [4, 8, 8]})
    [anew] = make_edits(wide_base, [Job(photo(60, 40), SENTENCE, moved)], config())
    assert "another size" in caplog.text
    assert anew.adapters == whole.adapters
    caplog.clear()
    [resumed] = make_edits(wide_base, [Job(photo(60, 40), SENTENCE, states[2])], config())
    assert resumed.adapters == whole.adapters and not caplog.text


def test_a_base_for_squares_renders_it_in_its_square(wide: Any, load_base: Any, monkeypatch: Any) -> None:
    """The photo's place is scaled to the rendering base's size: nothing is cut off, and the aspect stays."""
    base = load_base()
    monkeypatch.setattr(type(base.family), "sizes", Sizes((16, 16), 4, 16))
    [picture] = apply_edits(base, [wide], [Cell(0, 1.0, 0)], config(start="photo").sample)
    assert picture.size == (60, 40)


def test_stock_diffusers_takes_such_sizes(wide_base: Any, relative: Any) -> None:
    """For latents that are not square, the base predicts the same as diffusers' own UNet."""
    unet = wide_base.family.load_unet(weights="fp32", device=torch.device("cpu"), dtype=torch.float32)
    stock = UNet2DConditionModel.from_config(unet.config)
    stock.load_state_dict(unet.state_dict())
    x, text = torch.randn(1, 4, 6, 10), torch.randn(1, 7, 16)
    at = torch.tensor([500])
    [denoiser] = wide_base.denoisers
    ours = denoiser.predict(unet, x, at, {"embeds": text})
    assert relative(ours, stock(x, at, encoder_hidden_states=text).sample) < 1e-6


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_holds_the_noise_of_any_photo(name: str) -> None:
    """The own noise of the widest and the tallest photo that a published base edits is within a file's limit."""
    family = load_architecture(name)
    for aspect in ((10_000, 1), (1, 10_000), (1, 1)):
        size = family.sizes.nearest(*aspect)
        sides = [side for denoiser in family.denoisers for side in denoiser.shape(size)[1:]]
        assert max(sides) <= MAX_NOISE_SIDE, (name, size)


def test_what_no_file_can_hold_is_refused_before_training(wide_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of too many numbers, and adapters of too many bytes, are errors before the first step."""

    def forbidden(*_: Any) -> None:
        raise AssertionError("a step was taken")

    with monkeypatch.context() as patch:
        patch.setattr("lowmem_imagic.pipeline.prepare.MAX_NOISE_SIDE", 2)
        with pytest.raises(ConfigError, match=r"the photo's own noise has \d+ x \d+ numbers.*`start=photo`"):
            make_edits(wide_base, [Job(photo(60, 40), SENTENCE)], config())
        make_edits(wide_base, [Job(photo(60, 40), SENTENCE)], config(start="photo"))
    monkeypatch.setattr("lowmem_imagic.training.pack.MAX_FILE_BYTES", 2**24 + 1000)
    with pytest.raises(EditTooLargeError, match=r"`rank` 2 with `keep` 1 would take .* take a lower `rank` or `keep`"):
        list(stream_edits(wide_base, [Job(photo(60, 40), SENTENCE)], config(), between=forbidden))


def test_another_prediction_is_another_batch(wide_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is read with another configuration, which predicts something else, has other items."""
    before = job_id("a", "0" * 64, SENTENCE, config(), wide_base, "white"), pack_id(config(), wide_base)
    identity = wide_base.identity
    other = replace(identity, interface=replace(identity.interface, denoisers={"unet": "v_prediction"}))
    monkeypatch.setattr(type(wide_base), "identity", other)
    after = job_id("a", "0" * 64, SENTENCE, config(), wide_base, "white"), pack_id(config(), wide_base)
    assert before[0] != after[0] and before[1] != after[1]


def test_another_noise_schedule_is_another_batch(tiny_folder: Path, tmp_path: Path) -> None:
    """A corrected schedule, which every step follows, has other items; a published one has the same, however told."""

    def job(**changes: Any) -> str:
        folder = Path(shutil.copytree(tiny_folder, tmp_path / str(len(list(tmp_path.iterdir())))))
        path = folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return job_id("a", "0" * 64, SENTENCE, config(), BaseModel.load(str(folder), device="cpu"), "white")

    usual = job()
    assert job(steps_offset=0) == job(beta_start=0.000850001) == usual
    others = [job(beta_end=0.02), job(beta_schedule="linear"), job(num_train_timesteps=500)]
    assert len({usual, *others}) == 4


def test_a_finished_batch_stays_finished(wide_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item's hash contains the oldest version for edits of its base with one sentence. So a newer format, which
    says more than that, changes no finished item."""

    def hashes() -> list[str]:
        return [job_id("a", "0" * 64, SENTENCE, config(), base, "white") for base in (wide_base, other_base())]

    before = hashes()
    monkeypatch.setattr(versions, "NEWEST", versions.NEWEST + 1)
    assert hashes() == before
