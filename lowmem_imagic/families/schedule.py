"""A discrete noise schedule: its configuration, a checkpoint's corrections to it, and diffusers' samplers."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..diffusion.schedules import PREDICTION_TYPES, DiscreteNoise
from ..errors import ConfigError, IncompleteModelError, WrongFamilyError
from ..unexpected import first_line, without_advice
from . import limits, repairs
from .files.checkpoint import SingleFile
from .files.source import Folder
from .rehearsal import rehearse

log = logging.getLogger(__name__)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_PUBLISHED: tuple[dict[str, Any], ...] = (
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
)
"""The schedules of Stable Diffusion's bases and of DeepFloyd IF's."""
_ROUNDING = 0.01
"""Tolerance for a schedule's numbers, which may be stored in bfloat16."""


def read_schedule(
    source: Folder | SingleFile, folder: Folder, component: str = "scheduler", *, of_pixels: bool = False
) -> dict[str, Any]:
    """A noise schedule's configuration: complete, repaired (see `repairs`), with the checkpoint's marks applied.

    Args:
        source: the base.
        folder: the folder of its configurations.
        component: the schedule.
        of_pixels: whether pictures themselves are denoised, instead of latents.

    Raises:
        IncompleteModelError: a value is invalid, or the checkpoint contradicts the configuration.
        WrongFamilyError: the prediction type or the schedule is not supported.
    """
    label = folder.label
    values = repairs.scheduler(
        folder.config(component, "scheduler_config.json"),
        folder.config(".", "model_index.json"),
        label,
        of_pixels=of_pixels,
    )
    limits.check_schedule(values, label)
    if values["beta_schedule"] not in BETA_SCHEDULES:
        raise WrongFamilyError(
            f"{label} has the beta_schedule {values['beta_schedule'][:40]!r}, expected one of "
            f"{', '.join(BETA_SCHEDULES)}"
        )
    if isinstance(source, SingleFile):
        values = _marked(values, source, label)
    kind = str(values["prediction_type"])
    if kind not in PREDICTION_TYPES:
        raise WrongFamilyError(f"{source.label} predicts {kind[:40]!r}, expected one of {', '.join(PREDICTION_TYPES)}")
    scheduler = _ddim(values, label)
    betas, alpha_bar = scheduler.betas, scheduler.alphas_cumprod
    if not (betas.isfinite().all() and betas.min() >= 0 and betas.max() <= 1 and alpha_bar[0] > 0):
        raise IncompleteModelError(
            f"{label}: {component}/scheduler_config.json has betas that are not between 0 and 1; download it again"
        )
    if kind == "epsilon" and not alpha_bar[-1] > 0:
        raise WrongFamilyError(
            f"{source.label} predicts epsilon on a noise schedule that ends at pure noise (rescale_betas_zero_snr), "
            "where the noise says nothing about the picture; expected v_prediction with such a schedule, so correct "
            f"{component}/scheduler_config.json to the settings of the model's training"
        )
    return values


def unpublished(schedule: object) -> list[str]:
    """Numbers of a discrete noise schedule that is none of the published bases' two; empty for these, and for flows.

    They have few digits: the same schedule has the same ones on every machine.
    """
    alpha_bar = getattr(schedule, "alpha_bar", None)
    if alpha_bar is None:
        return []
    here = alpha_bar.double().cpu()
    if any(here.shape == one.shape and torch.allclose(here, one, rtol=1e-3, atol=1e-6) for one in _published()):
        return []
    some = here[torch.linspace(0, len(here) - 1, 9).long()]
    return [str(len(here)), *(f"{value:.2e}" for value in some.tolist())]


# A batch asks for each of its items.
@cache
def _published() -> list[Tensor]:
    """The cumulative products of alphas of `_PUBLISHED`, fp64."""
    return [diffusers.DDIMScheduler(**values).alphas_cumprod.double() for values in _PUBLISHED]


def alphas(values: Mapping[str, Any], label: str) -> Tensor:
    """Cumulative product of alphas (num_train_timesteps,), fp32, of a complete configuration.

    Raises:
        IncompleteModelError: diffusers cannot use the configuration.
    """
    alpha_bar: Tensor = _ddim(values, label).alphas_cumprod
    return alpha_bar


def _ddim(values: Mapping[str, Any], label: str) -> Any:
    try:
        return diffusers.DDIMScheduler.from_config(dict(values))
    except Exception as error:
        # diffusers and torch raise errors of many kinds for invalid values.
        raise IncompleteModelError(
            f"{label}: scheduler/scheduler_config.json cannot be used ({first_line(error)}); download it again"
        ) from error


def _marked(values: dict[str, Any], source: SingleFile, label: str) -> dict[str, Any]:
    """The configuration with the checkpoint's marks applied; marks take precedence, as they belong to these weights."""
    marks, marked = source.marks, dict(values)
    if marks.prediction_type is not None:
        marked["prediction_type"] = marks.prediction_type
    if marks.zero_snr is not None:
        marked["rescale_betas_zero_snr"] = marks.zero_snr
    recorded = _recorded(source)
    if recorded is not None and not _same(recorded, marked, label):
        rescaled = {**marked, "rescale_betas_zero_snr": True}
        if marks.zero_snr is not None or not _same(recorded, rescaled, label):
            raise IncompleteModelError(
                f"{source.path.name} has another noise schedule (alphas_cumprod) than the configuration of {label}; "
                "give the configuration that it was trained with (`model_config`)"
            )
        marked = rescaled
    if marked["rescale_betas_zero_snr"] and not values["rescale_betas_zero_snr"]:
        # Only "trailing" timesteps begin at pure noise (Lin et al. 2023, arXiv 2305.08891, section 3.3).
        marked["timestep_spacing"] = "trailing"
    keys = ("prediction_type", "rescale_betas_zero_snr")
    if changed := [f"{key} {marked[key]} instead of {values[key]}" for key in keys if marked[key] != values[key]]:
        log.warning(
            "%s is marked otherwise than the configuration of %s (%s): going by its marks, %s",
            source.path.name,
            label,
            marks.said_by or "alphas_cumprod",
            " and ".join(changed),
        )
    return marked


def _recorded(source: SingleFile) -> Tensor | None:
    """The noise schedule stored in the checkpoint, if there is one."""
    recorded = source.beside("alphas_cumprod")
    return recorded.float() if isinstance(recorded, Tensor) and recorded.dim() == 1 and len(recorded) > 1 else None


def _same(recorded: Tensor, values: Mapping[str, Any], label: str) -> bool:
    computed = alphas(values, label)
    if recorded.shape != computed.shape or not bool(torch.isclose(recorded, computed, rtol=0, atol=_ROUNDING).all()):
        return False
    # At its end the plain schedule is 0.0047, below the tolerance above, so compare the last value separately.
    return bool((recorded[-1] < 1e-4) == (computed[-1] < 1e-4))


_ZERO_SNR = "rescale_betas_zero_snr"
"""The parameter of diffusers' schedulers that rescales the noise schedule to end at pure noise (Lin et al. 2023, arXiv
2305.08891)."""


def _has(kind: Any, parameter: str) -> bool:
    """Whether a class's constructor has a parameter; diffusers ignores settings without one."""
    return parameter in inspect.signature(kind.__init__).parameters


class DiffusersSampler:
    """A diffusers scheduler with its timesteps set, as a `Sampler`."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._draws = "generator" in inspect.signature(scheduler.step).parameters

    @property
    def at(self) -> Sequence[Tensor]:
        """The timestep () of every step."""
        return list(self._scheduler.timesteps)

    def start(self, noise: Tensor, below: Tensor | None) -> Tensor:
        """The noise at the scale of the first step, or `below` with the first step's level of noise."""
        if below is None:
            pure: Tensor = noise * self._scheduler.init_noise_sigma
            return pure
        started: Tensor = self._scheduler.add_noise(below, noise, self._scheduler.timesteps[:1].expand(len(noise)))
        return started

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """The network's input for x."""
        network_input: Tensor = self._scheduler.scale_model_input(x, self._scheduler.timesteps[step])
        return network_input

    def stepped(
        self, prediction: Tensor, step: int, x: Tensor, generators: Sequence[torch.Generator] | None = None
    ) -> Tensor:
        """x after a step."""
        options = {"generator": list(generators)} if self._draws and generators is not None else {}
        after: Tensor = self._scheduler.step(prediction, self._scheduler.timesteps[step], x, **options).prev_sample
        return after


class _DiffusersInverter(DiffusersSampler):
    """`DDIMInverseScheduler`: each step takes the prediction at the cleaner end."""

    @property
    def at(self) -> Sequence[Tensor]:
        """The starting timestep of every step; the first step starts from the picture."""
        return [torch.zeros_like(self._scheduler.timesteps[0]), *self._scheduler.timesteps[:-1]]

    @property
    def end(self) -> Tensor:
        """The final timestep (), after the last step."""
        last: Tensor = self._scheduler.timesteps[-1]
        return last


_UNUSABLE = ("EDM", "DPMSolverSDE")
"""Beginnings of the names of schedulers without use here: EDM's are for models with log(sigma) as their time input, and
DPMSolverSDE draws its noise from a seed of its own, one for a whole batch."""


class DiscreteSchedule(DiscreteNoise):
    """The discrete noise schedule of a base, with diffusers' samplers.

    Args:
        values: a complete configuration, see `read_schedule`.
        label: the base, for messages.
    """

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        super().__init__(alphas(values, label), str(values["prediction_type"]))
        self.values, self._label = values, label

    def scheduler(self, name: str, *, guided: bool = True) -> Any:
        """A diffusers scheduler by class name, with or without "Scheduler", on this noise schedule.

        Args:
            name: the class.
            guided: whether the predictions are guided. Dynamic thresholding undoes the saturation of guidance (Saharia
                et al. 2022, arXiv 2205.11487, section 2.3); without guidance it is left out, because it is no step that
                inversion could undo, and predictions are clipped.

        Raises:
            ConfigError: there is no such scheduler for this kind of model.
        """
        kind = getattr(diffusers, name if name.endswith("Scheduler") else name + "Scheduler", None)
        compatible = {k.__name__ for k in diffusers.DDIMScheduler().compatibles if not k.__name__.startswith(_UNUSABLE)}
        if not inspect.isclass(kind) or kind.__name__ not in compatible:
            names = ", ".join(sorted(n.removesuffix("Scheduler") for n in compatible))
            raise ConfigError(f"scheduler is {name!r}, expected one of {names}")
        if self.values.get(_ZERO_SNR) and not _has(kind, _ZERO_SNR):
            known = (n.removesuffix("Scheduler") for n in compatible if _has(getattr(diffusers, n), _ZERO_SNR))
            names = ", ".join(sorted(known))
            raise ConfigError(
                f"scheduler is {name!r}, which cannot follow this model's noise schedule: it ends at pure noise "
                f"(zero terminal SNR); expected one of {names}"
            )
        values = dict(self.values) if guided else {**self.values, "thresholding": False}
        try:
            with without_advice():
                return kind.from_config(repairs.for_sampler(values, kind.__name__))  # type: ignore[attr-defined]
        except ImportError as error:
            raise ConfigError(
                f"scheduler {name} needs a package that is missing: {str(error).strip()[:120]}"
            ) from error
        except Exception as error:
            # diffusers raises errors of many kinds for unknown values.
            raise IncompleteModelError(
                f"{self._label}: scheduler/scheduler_config.json cannot be used ({first_line(error)}); "
                "download it again"
            ) from error

    def sampler(
        self, name: str, steps: int, shape: Sequence[int], device: torch.device | str = "cpu", *, guided: bool = True
    ) -> DiffusersSampler:
        """A diffusers scheduler as a sampler; ignores the shape."""
        scheduler = self.scheduler(name, guided=guided)
        scheduler.set_timesteps(steps, device=device)
        return DiffusersSampler(scheduler)

    def inverter(self, steps: int, shape: Sequence[int]) -> _DiffusersInverter:
        """DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 4.3) at evenly spaced ("leading") timesteps."""
        with without_advice():
            scheduler = diffusers.DDIMInverseScheduler.from_config({**self.values, "timestep_spacing": "leading"})
        scheduler.set_timesteps(steps)
        return _DiffusersInverter(scheduler)

    def error_of(self, name: str, steps: int) -> float:
        """Error of a scheduler's result when every prediction is right, see `rehearse`.

        Raises:
            ConfigError: the scheduler cannot take this many steps.
        """
        scheduler = self.scheduler(name)
        try:
            scheduler.set_timesteps(steps)
            furthest = float(scheduler.timesteps.max())
            if furthest >= len(self.alpha_bar):
                raise ValueError(f"it begins at timestep {furthest:.0f} of {len(self.alpha_bar)}")
            return rehearse(
                scheduler, self.alpha_bar, self.prediction_type, of_pixels=bool(self.values.get("clip_sample"))
            )
        except Exception as error:
            # ValueError, IndexError and others; all mean the same to a user.
            raise ConfigError(
                f"num_inference_steps is {steps}, which scheduler {name} cannot take ({first_line(error)}); "
                "take more or fewer, or another scheduler"
            ) from error
