"""Model families: the differences between kinds of models, behind common protocols (see `family`).

`load_family` is the only entry. Supported: Stable Diffusion 1.x, 2.x and XL, FLUX.2 klein, DeepFloyd IF, and models of
the same architectures.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import kinds
from .deepfloyd import DeepFloyd
from .family import Family
from .files.cascade import ALONE, JOINT, SECONDS, model_name
from .files.components import pipeline_of
from .files.configuration import exists_here, findable, locate_configuration, repository_of
from .files.locate import Source, cached_commit, locate
from .files.published import PUBLISHED, Published
from .files.source import DEMO, LICENSES, SHORT_NAMES, Folder
from .flux2 import Flux2Klein
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion

__all__ = [
    "DEMO",
    "LICENSES",
    "SHORT_NAMES",
    "cached_commit",
    "check_trainable",
    "findable",
    "load_architecture",
    "load_family",
    "model_name",
]

_FAMILIES: Mapping[str, Callable[[Any], Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionImg2ImgPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusionXLImg2ImgPipeline": StableDiffusionXL,
    "Flux2KleinPipeline": Flux2Klein,
    "IFPipeline": DeepFloyd,
}
"""The family by the class of a model's pipeline, each for the kinds of files that it reads; `files.components` has the
components."""


def load_family(
    name: str,
    *,
    revision: str | None = None,
    config_folder: str | Path | None = None,
    vae: str | Path | None = None,
    text_from: str | Path | None = None,
) -> Family:
    """The family object for a model name (see `locate`); reads configurations and headers, no weights.

    Raises:
        ModelError: the model is unknown, incomplete or of another kind.
    """
    source = locate(name, revision=revision, config_folder=config_folder, vae=vae, text_from=text_from)
    family = _family_of(source)
    if isinstance(source, Folder):
        source.check_complete()
    return family


def load_architecture(name: str) -> Family:
    """The family object from configurations alone, for plans; downloads nothing for a short name, and no weights of any
    model but a cascade's.

    Raises:
        ModelError: see `load_family`.
    """
    if name in PUBLISHED:
        return _family_of(Published.of(name))
    first, joint, second = name.partition(JOINT)
    if joint and second == ALONE and "unet_2" in PUBLISHED.get(first, {}):
        return _family_of(Published.of(first, alone=True))
    if repository_of(name) and name not in SECONDS and not exists_here(name):
        return _family_of(locate_configuration(name))
    return load_family(name)


def check_trainable(name: str) -> None:
    """Checks that a published model can be trained, by its name: nothing is downloaded. Any other model passes.

    Raises:
        WrongFamilyError: the model is distilled to few steps, which training would undo.
    """
    known = [short for short, repository in SHORT_NAMES.items() if name in (short, repository) and short in PUBLISHED]
    if known and (name in SHORT_NAMES or not exists_here(name)):
        load_architecture(known[0]).check_trainable()


def _family_of(source: Source) -> Family:
    """The family that a model's list of parts names.

    Raises:
        WrongFamilyError: its pipeline is of no family.
    """
    folder = source if isinstance(source, Folder) else source.configuration
    model_index = folder.config(".", "model_index.json")
    family = _FAMILIES.get(pipeline_of(model_index))
    if family is None:
        raise kinds.unsupported(model_index, source.label)
    return family(source)
