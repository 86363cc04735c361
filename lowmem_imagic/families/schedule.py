"""The noise schedule of a base: its configuration, what a checkpoint says against it, and what no base can have."""

import logging
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from torch import Tensor

from ..diffusion.schedules import PREDICTION_TYPES
from ..errors import IncompleteModelError, WrongFamilyError
from ..unexpected import first_line
from . import limits, repairs
from .files.checkpoint import SingleFile
from .files.source import Folder

log = logging.getLogger(__name__)

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_ROUNDING = 0.01
"""Largest difference of a schedule's numbers that were stored in bfloat16."""


def read_schedule(source: Folder | SingleFile, folder: Folder) -> dict[str, Any]:
    """The noise schedule's configuration: complete, repaired (see `repairs`), and as the checkpoint's own marks say.

    Args:
        source: the base.
        folder: where its configurations are.

    Raises:
        IncompleteModelError: a value that no noise schedule has, or a checkpoint that contradicts it.
        WrongFamilyError: a prediction or a schedule that this version does not edit with.
    """
    label = folder.label
    values = repairs.scheduler(
        folder.config("scheduler", "scheduler_config.json"), folder.config(".", "model_index.json"), label
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
            f"{label}: scheduler/scheduler_config.json has betas that are not between 0 and 1; download it again"
        )
    if kind == "epsilon" and not alpha_bar[-1] > 0:
        raise WrongFamilyError(
            f"{source.label} predicts epsilon on a noise schedule that ends at pure noise (rescale_betas_zero_snr), "
            "where the noise says nothing about the picture; expected v_prediction with such a schedule, so set in "
            "scheduler/scheduler_config.json what the model was trained with"
        )
    return values


def alphas(values: Mapping[str, Any], label: str) -> Tensor:
    """Cumulative product of alphas (num_train_timesteps,), fp32, of a complete configuration.

    Raises:
        IncompleteModelError: diffusers cannot make a schedule of it.
    """
    found: Tensor = _ddim(values, label).alphas_cumprod
    return found


def _ddim(values: Mapping[str, Any], label: str) -> Any:
    try:
        return diffusers.DDIMScheduler.from_config(dict(values))
    except Exception as error:
        # diffusers and torch raise anything for values they cannot use.
        raise IncompleteModelError(
            f"{label}: scheduler/scheduler_config.json cannot be used ({first_line(error)}); download it again"
        ) from error


def _marked(values: dict[str, Any], source: SingleFile, label: str) -> dict[str, Any]:
    """The configuration as the checkpoint's marks say, which win over it: they belong to these weights."""
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
        # Only so do the timesteps begin at the one that is pure noise (Lin et al. 2023, arXiv 2305.08891, section 3.3).
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
    """The noise schedule that the checkpoint holds, if it is one."""
    recorded = source.beside("alphas_cumprod")
    return recorded.float() if isinstance(recorded, Tensor) and recorded.dim() == 1 and len(recorded) > 1 else None


def _same(recorded: Tensor, values: Mapping[str, Any], label: str) -> bool:
    computed = alphas(values, label)
    if recorded.shape != computed.shape or not bool(torch.isclose(recorded, computed, rtol=0, atol=_ROUNDING).all()):
        return False
    # Near the end, where the plain schedule has 0.0047, the tolerance above says nothing.
    return bool((recorded[-1] < 1e-4) == (computed[-1] < 1e-4))
