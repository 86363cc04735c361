"""Model families: what differs between them, behind one set of methods.

`load_family` is the only entry. Today: Stable Diffusion 1.x / 2.x and models of the same make.
"""

from pathlib import Path

from .source import DEMO, SHORT_NAMES, locate
from .stable_diffusion import StableDiffusion

__all__ = ["DEMO", "SHORT_NAMES", "StableDiffusion", "load_family"]


def load_family(name: str, *, revision: str | None = None, config_folder: Path | None = None) -> StableDiffusion:
    """The family object for a model name (see `locate`); reads configurations, no weights.

    Raises:
        ModelError: unknown, incomplete or of another kind.
    """
    return StableDiffusion(locate(name, revision=revision, config_folder=config_folder))
