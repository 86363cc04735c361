"""Finds the configurations and the tokenizer of a model by its name."""

import logging
import os
import re
import reprlib
from pathlib import Path

from ...errors import UnknownModelError
from . import hub
from .published import PUBLISHED, Published
from .source import DEMO, SHORT_NAMES, Folder, label_of

log = logging.getLogger(__name__)

DEMO_FOLDER = Path(__file__).parent.parent.parent / "demo" / "model"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def locate_configuration(name: str) -> Folder:
    """The configurations and the tokenizers of the model called `name`, without weights.

    Those of a short name come with the package.

    Raises:
        UnknownModelError: there is no such model here, or it cannot be downloaded.
    """
    exists = exists_here(name)
    path = Path(name)
    if name == DEMO:
        return Folder(DEMO_FOLDER, DEMO)
    if name in PUBLISHED:
        mention_hidden(name, exists)
        return Published.of(name)
    if exists and path.is_dir():
        return Folder(path, label_of(path.resolve().name))
    if not exists and (repository := repository_of(name)):
        return Folder(hub.fetch_configuration(repository), repository)
    raise UnknownModelError(
        f"no configuration {reprlib.repr(name)}: expected {', '.join(SHORT_NAMES)}, a diffusers folder or a Hub id "
        "such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def findable(name: str, folder: Path | None = None) -> str:
    """A model's name that is valid in any working directory: an existing path is made absolute.

    Args:
        name: the name that the user typed.
        folder: base of a relative path; None for the working directory.
    """
    if name == DEMO or name in SHORT_NAMES:
        return name
    path = (folder or Path()) / name
    if name and os.path.exists(path):
        return str(path.absolute())
    # Both stages of a cascade, see `locate`.
    first, joint, second = name.rpartition("+")
    return f"{findable(first, folder)}{joint}{findable(second, folder)}" if joint else name


def exists_here(name: str) -> bool:
    """Whether there is a file or folder with this name.

    Raises:
        UnknownModelError: the path cannot be looked up.
    """
    try:
        return bool(name) and Path(name).exists()
    except (OSError, ValueError) as error:  # a name too long, an unreadable folder, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UnknownModelError(f"no model {reprlib.repr(name)}: it cannot be looked up ({reason})") from error


def mention_hidden(name: str, exists: bool) -> None:
    """Warns that a short name hides a folder, and tells how to name the folder."""
    if exists:
        log.warning("%s is the model %s; for the folder of that name say ./%s", name, SHORT_NAMES[name], name)


def repository_of(name: str) -> str | None:
    """The Hub repository for a name; None if the name is not a Hub id."""
    repository = SHORT_NAMES.get(name, name)
    return repository if _HUB_ID.fullmatch(repository) and not name.startswith((".", "/", "~")) else None
