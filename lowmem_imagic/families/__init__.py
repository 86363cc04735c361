"""Model families: the differences between kinds of models, behind common protocols (see `family`).

`load_family` is the only entry. Supported: Stable Diffusion 1.x, 2.x and XL, and models of the same architectures.
"""

from pathlib import Path

from . import kinds
from .files.checkpoint import SingleFile
from .files.configuration import findable
from .files.locate import cached_commit, locate
from .files.published import PUBLISHED, Published
from .files.source import DEMO, LICENSES, SHORT_NAMES, Folder
from .sdxl import StableDiffusionXL
from .stable_diffusion import StableDiffusion

__all__ = [
    "DEMO",
    "LICENSES",
    "SHORT_NAMES",
    "StableDiffusion",
    "cached_commit",
    "findable",
    "load_architecture",
    "load_family",
]


def load_family(
    name: str,
    *,
    revision: str | None = None,
    config_folder: str | Path | None = None,
    vae: str | Path | None = None,
    text_from: str | Path | None = None,
) -> StableDiffusion:
    """The family object for a model name (see `locate`); reads configurations and headers, no weights.

    Raises:
        ModelError: the model is unknown, incomplete or of another kind.
    """
    source = locate(name, revision=revision, config_folder=config_folder, vae=vae, text_from=text_from)
    family = _family_of(source)
    if isinstance(source, Folder):
        source.check_complete()
    return family


def load_architecture(name: str) -> StableDiffusion:
    """The family object from configurations alone, for plans; downloads nothing for a short name.

    Raises:
        ModelError: see `load_family`.
    """
    return _family_of(Published.of(name)) if name in PUBLISHED else load_family(name)


def _family_of(source: Folder | SingleFile) -> StableDiffusion:
    """The family that a model's list of parts names."""
    folder = source if isinstance(source, Folder) else source.configuration
    is_xl = kinds.is_xl(folder.config(".", "model_index.json"))
    return StableDiffusionXL(source) if is_xl else StableDiffusion(source)
