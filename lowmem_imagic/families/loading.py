"""How parts of a model are read by diffusers and transformers: quietly, and with one named error for what is broken."""

import contextlib
import warnings
from collections.abc import Iterator

import diffusers
import torch
import transformers
from torch import nn

from ..errors import IncompleteModelError
from .source import COMPONENTS, Folder, SingleFile

_PIPELINE = (*COMPONENTS, "safety_checker", "feature_extractor", "image_encoder")
"""The parts of diffusers' pipeline."""


def converted(source: SingleFile, component: str) -> nn.Module:
    """One part of a single checkpoint, converted by diffusers in the file's own precision.

    **Memory**: only this part is read, and nothing but the caller holds it; asked for again, it is read again.
    """
    others = {name: None for name in _PIPELINE if name != component}
    try:
        with quiet():
            pipeline = diffusers.StableDiffusionPipeline.from_single_file(
                str(source.path),
                config=str(source.configuration.path),
                torch_dtype=source.dtype(component),
                local_files_only=True,
                **others,
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # diffusers raises a dozen kinds here, from KeyError to its own; all mean the same to a user.
        raise IncompleteModelError(
            f"{source.path.name}: {component} could not be converted ({first_line(error)}); "
            f"expected a checkpoint that fits the configuration of {source.configuration.label}"
        ) from error
    part: nn.Module = getattr(pipeline, component)
    missing = sorted(name for name, tensor in part.state_dict().items() if tensor.is_meta)
    if missing:
        raise IncompleteModelError(
            f"{source.path.name}: {component} lacks {len(missing)} tensors of the configuration of "
            f"{source.configuration.label}, such as {', '.join(missing[:3])}"
        )
    return part


@contextlib.contextmanager
def complete(source: Folder | SingleFile, component: str) -> Iterator[None]:
    """Turns what the libraries raise for a damaged folder into one named error."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Among them plain Exceptions, which is what tokenizers raises for a damaged vocabulary.
        raise IncompleteModelError(
            f"{source.label}: {component} cannot be loaded ({first_line(error)}); download it again"
        ) from error


def first_line(error: Exception) -> str:
    """The kind of an error and the first line of its text, if it has one."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:160]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own progress bars and advice; their settings are put back afterwards."""
    logs = (transformers.utils.logging, diffusers.utils.logging)
    levels = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for log in logs:
                log.set_verbosity_error()
                log.disable_progress_bar()
            yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
