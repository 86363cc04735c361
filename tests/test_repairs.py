"""Facts about configurations: they mean here what they mean in diffusers' own pipeline, saved by any class."""

import json
import logging
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import new_tiny_unet

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import IncompleteModelError, WrongFamilyError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
"""The noise schedule of Stable Diffusion."""
FULL = ("EulerDiscrete", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "EulerAncestralDiscrete", "LMSDiscrete")
FULL += ("HeunDiscrete", "DEISMultistep", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DDPM")
SAVED = {
    "SD 1.4's, as first published": ("DDIM", {**SD, "_diffusers_version": "0.2.2"}),
    "SD 1.5's": ("PNDM", {**SD, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}),
    "its steps begin at 0": ("PNDM", {**SD, "steps_offset": 0}),
    "it clips": ("DDIM", {**SD, "clip_sample": True, "steps_offset": 1}),
    "all defaults of DDIM": ("DDIM", {}),
    "all defaults of PNDM": ("PNDM", {}),
    "all defaults of Heun": ("HeunDiscrete", {}),
    "all defaults of KDPM2": ("KDPM2Discrete", {}),
    "all defaults of LCM": ("LCM", {}),
    "all defaults of TCD": ("TCD", {}),
    "no prediction type": ("DPMSolverMultistep", SD),
    "velocity": ("EulerDiscrete", {**SD, "prediction_type": "v_prediction"}),
    "velocity, SD 2.1's": ("DDIM", {**SD, "prediction_type": "v_prediction", "clip_sample": False, "steps_offset": 1}),
    "velocity at zero SNR": ("DDIM", {**SD, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
    "cosine": ("DDIM", {"beta_schedule": "squaredcos_cap_v2"}),
    "betas of its own": ("PNDM", {"trained_betas": [0.001 + 0.00001 * i for i in range(1000)]}),
    "500 steps": ("UniPCMultistep", {**SD, "num_train_timesteps": 500}),
    "linear": ("EulerAncestralDiscrete", {"beta_start": 0.0015, "beta_end": 0.0195}),
    "evenly from end to end": ("DDIM", {**SD, "timestep_spacing": "linspace"}),
    "from the end": ("DDPM", {**SD, "timestep_spacing": "trailing"}),
    "its clipping is null": ("DDIM", {**SD, "clip_sample": None}),
    "keys of another class": ("LMSDiscrete", {**SD, "clip_sample": False, "skip_prk_steps": True}),
    **{f"{name}, every key": (name, SD) for name in FULL},
}
"""Schedules as programs have saved them: the class, and its entries; "every key" as that class saves them itself."""


def written(folder: Path, what: str) -> dict[str, Any]:
    """Writes a scheduler configuration into the folder, and returns it."""
    name, entries = SAVED[what]
    values: dict[str, Any] = {"_class_name": f"{name}Scheduler", "_diffusers_version": "0.42.1", **entries}
    if what.endswith("every key"):
        values |= dict(getattr(diffusers, f"{name}Scheduler")(**entries).config)
        values = {key: value for key, value in values.items() if key != "_use_default_values"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))
    edit_json(folder / "model_index.json", scheduler=["diffusers", f"{name}Scheduler"])
    return values


def edit_json(path: Path, **changes: Any) -> None:
    """Changes entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def pipeline(scheduler: Any, unet: Any = None) -> Any:
    """diffusers' pipeline around a scheduler, which its constructor repairs."""
    return diffusers.StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def family(folder: Path) -> Any:
    """The family of the model in a folder."""
    return BaseModel.load(str(folder), device="cpu").family


# Noise schedules


@pytest.mark.parametrize("what", SAVED)
def test_schedules_are_those_of_the_pipeline(what: str, folder_copy: Path) -> None:
    """The noise schedule and the start of sampling are as in diffusers' pipeline with the saved class."""
    values = written(folder_copy, what)
    kind = getattr(diffusers, values["_class_name"])
    theirs, ours = pipeline(kind.from_config(values)).scheduler, family(folder_copy)
    assert torch.equal(ours.schedule.alpha_bar, theirs.alphas_cumprod)
    for key in (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "prediction_type",
        "set_alpha_to_one",
    ):
        if key in theirs.config:
            assert ours.scheduler_config[key] == theirs.config[key], key
    own = (
        ours.schedule.scheduler(values["_class_name"]).config if values["_class_name"][:3] not in ("LCM", "TCD") else {}
    )
    for key, value in own.items():
        if not key.startswith("_") and key in theirs.config:
            assert value == theirs.config[key] or (not value and not theirs.config[key]), key


@pytest.mark.parametrize("what", SAVED)
def test_ddim_is_the_one_that_the_pipeline_would_have(what: str, folder_copy: Path) -> None:
    """DDIM over a schedule that any class saved neither clips nor begins too early, as if put into the pipeline."""
    values = written(folder_copy, what)
    theirs = pipeline(diffusers.DDIMScheduler.from_config(values)).scheduler.config
    ours = family(folder_copy).schedule.scheduler("DDIM").config
    assert (ours["clip_sample"] or False, ours["steps_offset"]) == (theirs["clip_sample"] or False, 1) == (False, 1)
    assert theirs["steps_offset"] == 1


@pytest.mark.parametrize("name", FULL)
def test_every_class_saves_the_same_schedule(name: str, folder_copy: Path, tiny_folder: Path) -> None:
    """A model saved with another scheduler gives DDIM's steps bit for bit, on latents that clipping would ruin."""
    written(folder_copy, f"{name}, every key")
    latents = 4 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for folder in (folder_copy, tiny_folder):
        scheduler, x = family(folder).schedule.scheduler("DDIM"), latents
        scheduler.set_timesteps(7)
        for timestep in scheduler.timesteps:
            x = scheduler.step(0.5 * x.sin(), timestep, x).prev_sample
        results.append(x)
    assert results[0].abs().max() > 1.5
    assert torch.equal(*results)


def test_inversion_does_not_clip(folder_copy: Path, tiny_folder: Path) -> None:
    """The photo's own noise is found on the same schedule, whichever class saved it."""
    written(folder_copy, "EulerDiscrete, every key")
    results = []
    for folder in (folder_copy, tiny_folder):
        inverter = family(folder).schedule.inverter(7, (4, 8, 8))
        x = 4 * torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for step in range(len(inverter.at)):
            x = inverter.stepped(0.5 * inverter.scaled(x, step).sin(), step, x)
        results += [x, inverter.end, torch.stack(list(inverter.at))]
    assert results[0].abs().max() > 1.5
    assert all(torch.equal(a, b) for a, b in zip(results[:3], results[3:], strict=True))


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_what_is_left_out_is_said(key: str, folder_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An entry that would spoil every picture is left out, and one line says so."""
    edit_json(folder_copy / "scheduler" / "scheduler_config.json", **{key: True})
    with caplog.at_level(logging.WARNING):
        assert not family(folder_copy).schedule.scheduler("DDIM").config[key]
    assert [record.getMessage() for record in caplog.records if key in record.getMessage()]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_epsilon_at_zero_snr(spacing: str, folder_copy: Path) -> None:
    """A model that predicts the noise of pure noise is refused by both names when it is loaded."""
    path = folder_copy / "scheduler" / "scheduler_config.json"
    edit_json(path, rescale_betas_zero_snr=True, timestep_spacing=spacing)
    with pytest.raises(WrongFamilyError, match=r"epsilon.*rescale_betas_zero_snr.*v_prediction"):
        family(folder_copy)
    edit_json(path, prediction_type="v_prediction")
    assert family(folder_copy).schedule.alpha_bar[-1] == 0


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler"),
        ({"_class_name": "CogVideoXDDIMScheduler", "snr_shift_scale": 3.0}, "CogVideoXDDIMScheduler"),
        ({"_class_name": "AutoencoderKL"}, "AutoencoderKL"),
        ({"_class_name": ["DDIMScheduler"]}, "noise schedule"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type continuous"),
        ({"predict_epsilon": False}, "predict_epsilon"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
    ],
)
def test_schedules_of_other_models(changes: dict[str, Any], found: str, folder_copy: Path) -> None:
    """A schedule that adds noise in another way is refused by name, never read as Stable Diffusion's."""
    edit_json(folder_copy / "scheduler" / "scheduler_config.json", **changes)
    with pytest.raises(WrongFamilyError, match=found):
        family(folder_copy)


# Networks


@pytest.mark.parametrize("version", ["0.2.2", "0.8.1", "0.9.0.dev0", "0.9.0", "0.10.2", "0.42.1", "none", None])
@pytest.mark.parametrize("size", [8, 32, 64, 96])
def test_old_sizes(version: str | None, size: int, folder_copy: Path) -> None:
    """The size of latents is that of diffusers' pipeline: before version 0.9 a wrong default was saved."""
    edit_json(folder_copy / "unet" / "config.json", _diffusers_version=version, sample_size=size)
    unet = new_tiny_unet(sample_size=size)
    if version not in ("none", None):
        unet.register_to_config(_diffusers_version=version)
    theirs = pipeline(diffusers.DDIMScheduler(), unet).unet.config.sample_size
    assert family(folder_copy).latent_shape == (4, theirs, theirs)


def test_a_square_may_be_written_as_a_pair(folder_copy: Path) -> None:
    """A size of two equal numbers is that of a square; another is refused."""
    edit_json(folder_copy / "unet" / "config.json", sample_size=[8, 8])
    assert family(folder_copy).latent_shape == (4, 8, 8)
    edit_json(folder_copy / "unet" / "config.json", sample_size=[8, 16])
    with pytest.raises(IncompleteModelError, match=r"sample_size \[8, 16\]"):
        family(folder_copy)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_what_a_file_leaves_out_is_its_class_default(component: str, folder_copy: Path, tiny_folder: Path) -> None:
    """A part whose configuration leaves out every entry that equals its class's default is the same part."""
    path = folder_copy / component / "config.json"
    values = json.loads(path.read_text())
    kind: Any = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}.get(component)
    if kind is None:
        from transformers import CLIPTextConfig

        defaults = CLIPTextConfig().to_dict()
    else:
        with torch.device("meta"):
            defaults = json.loads(json.dumps(dict(kind.from_config(kind().config).config)))
    kept = {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}
    assert len(kept) < len(values)
    path.write_text(json.dumps(kept))
    ours, plain = family(folder_copy), family(tiny_folder)
    name = {"unet": "unet_config", "vae": "vae_config", "text_encoder": "text_config"}[component]
    assert getattr(ours, name) == getattr(plain, name)
