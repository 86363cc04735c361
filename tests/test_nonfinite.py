"""Facts about numbers that are not finite: errors name the faulty part, and hints at training appear if they help."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file

from lowmem_imagic import (
    BaseModel,
    Cell,
    Job,
    LowmemImagicError,
    apply_edits,
    load_photo,
    make_edits,
    preset,
    stream_edits,
)
from lowmem_imagic.actions.fit_hint import SCHEDULER_ERROR, Fit
from lowmem_imagic.edits.edit import Edit
from lowmem_imagic.errors import ConfigError, DivergenceError, NonFiniteEditError, NonFiniteModelError
from lowmem_imagic.families.rehearsal import rehearse
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.sampling import sample as sampling
from lowmem_imagic.training.pack import Pack
from tests import calls
from tests.reference_stages import embed, finetune

SHORT = {
    "embed": {"steps": 2},
    "finetune": {"steps": 2},
    "sample": {"num_inference_steps": 4, "etas": (0.0, 1.0), "batch_rows": 4},
}
SENTENCE = "a blue sphere"
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
}
PARTS = {
    "the UNet": ("unet", "mid_block.resnets.0.conv1.weight"),
    "the text encoder": ("text_encoder", "final_layer_norm.weight"),
    "the autoencoder's encoder": ("vae", "encoder.conv_in.weight"),
    "the autoencoder's decoder": ("vae", "decoder.conv_in.weight"),
}


def damage(folder: Path, part: str, ending: str, value: float) -> Path:
    """Puts one number into a tensor of a model folder."""
    path = folder / WEIGHTS[part]
    tensors = load_file(path)
    [name] = [name for name in tensors if name.endswith(ending)]
    tensors[name].view(-1)[1] = value
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def schedule(folder: Path, **changes: Any) -> Path:
    """Changes a model folder's scheduler configuration."""
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A photo of three grey bars."""
    path = tmp_path_factory.mktemp("photos") / "bars.png"
    Image.linear_gradient("L").resize((20, 16)).convert("RGB").save(path)
    return load_photo(path)


@pytest.fixture(scope="module")
def edit(base: BaseModel, photo: Any) -> Edit:
    """A finished edit of it."""
    [made] = make_edits(base, [Job(photo, SENTENCE)], preset("fast", SHORT))
    return made


def loaded(folder: Path, **options: Any) -> BaseModel:
    return BaseModel.load(str(folder), device="cpu", **options)


# A damaged base


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("part", PARTS)
def test_one_bad_number_is_put_down_to_its_part(part: str, value: float, folder_copy: Path, photo: Any) -> None:
    """NaN or infinity in one weight is told as a damaged model, naming the part, and not as a learning rate."""
    base, config = loaded(damage(folder_copy, *PARTS[part], value)), preset("fast", SHORT)
    with pytest.raises(NonFiniteModelError, match=rf"{part} of tiny-sd gives NaN or infinity.*download") as raised:
        edits = make_edits(base, [Job(photo, SENTENCE)], config)
        apply_edits(base, edits, [Cell(0, 1.0, 0)], config.sample)
    assert "learning rate" not in str(raised.value)


@pytest.mark.parametrize("weights", ["int8", "bnb-int8", "bf16", "fp32"])
def test_no_weight_format_hides_a_bad_number(weights: str, folder_copy: Path, photo: Any) -> None:
    """Quantising does not turn NaN into an ordinary number; from a seed's noise it is found in training."""
    base = loaded(damage(folder_copy, *PARTS["the UNet"], float("nan")), weights=weights)
    config = preset("fast", {**SHORT, "sample": {**SHORT["sample"], "start": "noise"}})
    with pytest.raises(NonFiniteModelError, match="the UNet"):
        make_edits(base, [Job(photo, SENTENCE)], config)


def test_stages_by_themselves_tell_base_and_learning_rate_apart(base: BaseModel, folder_copy: Path, text: Any) -> None:
    """A loss that is not finite is the learning rate's fault on a good base, and the base's on a damaged one."""
    damaged, latents = loaded(damage(folder_copy, *PARTS["the UNet"], float("nan"))), torch.randn(1, 4, 8, 8)
    config = preset("fast", SHORT)
    for stage, settings in ((embed, config.embed), (finetune, config.finetune)):
        with pytest.raises(NonFiniteModelError, match="the UNet"):
            stage(damaged, latents, text[:1], settings, [torch.Generator()])  # type: ignore[operator]
        with pytest.raises(DivergenceError, match="learning rate"):
            stage(base, latents * torch.nan, text[:1], settings, [torch.Generator()])  # type: ignore[operator]


def test_half_precision_overflow_is_repeated_in_fp32(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoder and both sides of the autoencoder are tried again in fp32 before the model is called damaged."""
    fresh, tried = loaded(Path(str(base.family.source.path))), list[torch.dtype]()  # type: ignore[union-attr]
    monkeypatch.setattr(BaseModel, "part_dtype", torch.bfloat16)

    def overflowing(work: Callable[..., Any]) -> Callable[..., Any]:
        def run(part: Any, x: Any) -> Any:
            tried.append(next(part.parameters()).dtype)
            return overflown(work(part, x))

        return run

    def overflown(made: Any) -> Any:
        if tried[-1] != torch.float32:
            for tensor in made.values() if isinstance(made, Mapping) else [made]:
                tensor.fill_(torch.inf)
        return made

    def reading(sentences: Any, loaded: Any) -> Any:
        @contextmanager
        def noted(name: str) -> Iterator[Any]:
            with loaded(name) as encoder:
                tried.append(next(encoder.parameters()).dtype)
                yield encoder

        return overflown(encode(sentences, noted))

    encode = fresh.family.encode_text
    monkeypatch.setattr(fresh.family, "encode_text", reading)
    for name in ("encode", "decode"):
        monkeypatch.setattr(fresh.family, name, overflowing(getattr(fresh.family, name)))
    fresh.text_on_cpu = False
    assert calls.encode_text(fresh, [SENTENCE]).isfinite().all()
    assert fresh.encode_images(torch.zeros(1, 3, 16, 16)).isfinite().all()
    assert fresh.decode(torch.zeros(1, 4, 8, 8)).isfinite().all()
    assert tried == [torch.bfloat16, torch.float32] * 3


# Schedules and schedulers


def test_a_scheduler_that_divides_by_zero_is_refused_before_training(
    folder_copy: Path, photo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction of noise says nothing at a last timestep without a trace of the picture."""
    base = loaded(folder_copy)
    dividing = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    monkeypatch.setattr(type(base.family.schedule), "scheduler", lambda schedule, name: deepcopy(dividing))
    with pytest.raises(NonFiniteModelError, match="scheduler DDIM makes NaN or infinity of the noise schedule"):
        next(stream_edits(base, [Job(photo, SENTENCE)], preset("fast", SHORT)))


@pytest.mark.parametrize("steps", [3, 17, 50])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    [
        *("DDIM", "DDPM", "PNDM", "LMSDiscrete", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
        *("UniPCMultistep", "KDPM2Discrete", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep"),
    ],
)
def test_right_predictions_lead_every_scheduler_to_the_picture(
    name: str, prediction_type: str, steps: int, folder_copy: Path
) -> None:
    """Without a model, each scheduler ends at the picture whose right predictions it is told."""
    family = loaded(schedule(folder_copy, prediction_type=prediction_type)).family
    # PNDM's first steps are of another kind, and it takes no fewer than these.
    steps = max(steps, 5) if name == "PNDM" else steps
    assert family.schedule.error_of(name, steps) < 0.1 < SCHEDULER_ERROR


@pytest.mark.parametrize(
    "changes",
    [{"clip_sample": True}, {"thresholding": True}, {"clip_sample": True, "clip_sample_range": 0.5}],
)
def test_a_scheduler_that_clips_latents_is_noticed(changes: dict[str, Any], base: BaseModel) -> None:
    """Settings for pixels in [-1, 1] are wrong for latents, and no training corrects that."""
    scheduler = DDIMScheduler(**{**base.family.scheduler_config, **changes})
    scheduler.set_timesteps(20)
    schedule = base.family.schedule
    assert rehearse(scheduler, schedule.alpha_bar, schedule.prediction_type) > SCHEDULER_ERROR


def test_inversion_says_what_it_cannot_use(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise that no edit file could hold is a fault of the base."""
    monkeypatch.setattr(BaseModel, "predict", lambda self, denoiser, x, at, given: x * 1e4)
    with pytest.raises(NonFiniteModelError, match=r"noise schedule|UNet"):
        calls.own_noise(base, torch.randn(4, 8, 8), torch.Generator())


# An edit's own fault


@pytest.mark.parametrize("mask", [0.0, 0.6])
@pytest.mark.parametrize("start", ["noise", "photo", "inverted"])
def test_huge_factors_are_the_edits_fault(base: BaseModel, text: Any, start: str, mask: float) -> None:
    """An edit of huge finite numbers is told apart from the base, which renders the same settings by itself."""
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="all", rank=2, alpha=2.0)
    config = replace(preset("fast", SHORT).sample, start=start, mask=mask)
    photo = {"coarse_latents": torch.zeros(1, 4, 4, 4), "inverted_noise": torch.randn(1, 4, 8, 8)}
    cells = [Cell(0, 1.0, 0), Cell(0, 0.0, 0)]
    assert calls.sample(base, pack, text[:1], text[1:2], cells, config, **photo).isfinite().all()
    pack.weights.fill_(1e30)
    with pytest.raises(NonFiniteEditError, match=r"eta .* tiny-sd alone does not"):
        calls.sample(base, pack, text[:1], text[1:2], cells, config, **photo)


def test_beside_a_source_prompt_the_base_alone_takes_the_difference_too(
    base: BaseModel, text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base that is rendered alone, to tell whose fault NaN is, makes the difference to the source prompt, too: its
    photo is the source prompt's, so that the limit leaves something of it."""
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="all", rank=2, alpha=2.0)
    config = replace(preset("fast", SHORT).sample, start="noise", mask=0.0, source_prompt="a red cube")
    moved: list[float] = []
    guided = sampling.edit_guided

    def listening(photo: Any, *others: Any) -> Any:
        result = guided(photo, *others)
        moved.append(float((result - photo).abs().max()))
        return result

    monkeypatch.setattr(sampling, "edit_guided", listening)
    pack.weights.fill_(1e30)
    with pytest.raises(NonFiniteEditError, match="tiny-sd alone does not"):
        calls.sample(base, pack, text[:1], text[1:2], [Cell(0, 1.0, 0)], config)
    assert moved[-1] > 0


def test_guidance_that_explodes_is_not_put_down_to_the_edit(base: BaseModel, text: Any) -> None:
    """Settings that make infinity of the base alone are named."""
    pack, config = (
        AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="all", rank=2, alpha=2.0),
        preset("fast", SHORT).sample,
    )
    exploding = [Cell(0, 1.0, 0, guidance_scale=3e38)]
    with pytest.raises(NonFiniteModelError, match="with and without the edit, with scheduler DDIM in 4 steps"):
        calls.sample(base, pack, text[:1], text[:1], exploding, replace(config, start="noise", mask=0.0))


def test_a_damaged_base_is_not_put_down_to_the_edit(edit: Edit, folder_copy: Path) -> None:
    """The same edit on a base with one NaN: the base is named."""
    damaged = loaded(damage(folder_copy, *PARTS["the UNet"], float("nan")))
    with pytest.raises(NonFiniteModelError, match="the UNet"):
        apply_edits(damaged, [edit], [Cell(0, 1.0, 0)], preset("fast", SHORT).sample)


def test_latents_beyond_the_autoencoder_are_no_damage(base: BaseModel) -> None:
    """Decoding latents that are huge or NaN does not report a damaged decoder."""
    assert not base.decode(torch.full((1, 4, 8, 8), torch.nan)).isfinite().all()


@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("number", [1e6, float("inf"), float("nan")])
def test_one_edit_with_impossible_numbers_leaves_the_others(
    number: float, keep: float, base: BaseModel, photo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter trained to numbers that no file holds fails by itself, with the learning rate to lower, whether it is
    stored whole or made smaller."""
    train = Pack.run

    def run(self: Pack) -> Any:
        for group in train(self):
            for edit in group:
                if edit.number == 0:
                    [(name, adapter)] = edit.adapters.items()
                    huge = {key: (down * 0 + number, up + 1, alpha) for key, (down, up, alpha) in adapter.items()}
                    edit.adapters = {name: huge}
            yield group

    monkeypatch.setattr(Pack, "run", run)
    config = preset("fast", {**SHORT, "finetune": {"steps": 2, "keep": keep}})
    made = dict(one for group in stream_edits(base, [Job(photo, SENTENCE)] * 2, config) for one in group)
    assert isinstance(made[0], DivergenceError) and "learning rate" in str(made[0])
    assert isinstance(made[1], Edit)


# Hints


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        ({"scheduler_error": SCHEDULER_ERROR + 0.1}, "scheduler"),
        ({"round_trip_db": 9.0}, "autoencoder"),
        ({"embed_loss": 1.3}, "UNet"),
    ],
)
def test_hints_at_training_need_a_base_that_works(facts: dict[str, float], word: str) -> None:
    """If the base alone cannot reproduce its picture, the hint names that, and no steps or rates."""
    lost = {"reconstruction_db": 12.0, "change_db": 50.0, "embedding_distance": 0.1}
    assert "under-fitted" in Fit(**lost).hint  # type: ignore[arg-type]
    hint = Fit(**lost, **facts).hint  # type: ignore[arg-type]
    assert word in hint and "fitted" not in hint and "--steps" not in hint and "learning-rate" not in hint


def test_every_reason_is_an_error_of_the_package() -> None:
    """Callers who catch the package's base error miss none of these."""
    assert issubclass(NonFiniteModelError, LowmemImagicError) and issubclass(NonFiniteEditError, LowmemImagicError)
    assert not issubclass(NonFiniteModelError, ConfigError)
