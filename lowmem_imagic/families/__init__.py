"""Model families: the differences between kinds of models, behind common protocols (see `family`).

`load_family` is the only entry. Supported: Stable Diffusion 1.x / 2.x and models of the same architecture.
"""

from pathlib import Path

from .files.configuration import findable
from .files.locate import locate
from .files.published import PUBLISHED, Published
from .files.source import DEMO, SHORT_NAMES
from .stable_diffusion import StableDiffusion

__all__ = ["DEMO", "SHORT_NAMES", "StableDiffusion", "findable", "load_architecture", "load_family"]


def load_family(name: str, *, revision: str | None = None, config_folder: str | Path | None = None) -> StableDiffusion:
    """The family object for a model name (see `locate`); reads configurations, no weights.

    Raises:
        ModelError: the model is unknown, incomplete or of another kind.
    """
    return StableDiffusion(locate(name, revision=revision, config_folder=config_folder))


def load_architecture(name: str) -> StableDiffusion:
    """The family object from configurations alone; downloads nothing for a short name.

    Raises:
        ModelError: see `load_family`.
    """
    return StableDiffusion(Published.of(name)) if name in PUBLISHED else load_family(name)
