"""A cascade of two models: the folder of the first stage, with parts of the second stage's folder under other names."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import ModelError, WrongFamilyError
from .components import SECOND_STAGES, pipeline_of
from .source import Folder, label_of
from .weights import Weights

log = logging.getLogger(__name__)

JOINT = "+"
"""Joins the names of both stages into one name of a model."""
ALONE = "none"
"""In place of the second stage's name: the first stage alone."""
SECOND_NAMES: Mapping[str, str] = {
    "unet_2": "unet",
    "scheduler_2": "scheduler",
    "image_noising_scheduler": "image_noising_scheduler",
}
"""The names of the second stage's parts in a cascade, and in the second stage's own folder."""
SECONDS: Mapping[str, str] = {
    "DeepFloyd/IF-I-M-v1.0": "DeepFloyd/IF-II-L-v1.0",
    "DeepFloyd/IF-I-L-v1.0": "DeepFloyd/IF-II-L-v1.0",
    "DeepFloyd/IF-I-XL-v1.0": "DeepFloyd/IF-II-L-v1.0",
}
"""Repositories of first stages, and of the second stage that is taken with each. Any second stage enlarges the pictures
of any first one; the authors' example has the large one beside the largest."""


def _revisions(first: Folder, second: Folder | None) -> str | None:
    """The revision of a cascade from the Hub, which tells both stages; see `second_in`."""
    if first.revision is None or (second is not None and second.revision is None):
        return first.revision
    if second is None:
        return f"{first.revision}{JOINT}{ALONE}"
    named = "" if SECONDS.get(first.label) == second.label else f"{second.label}@"
    return f"{first.revision}{JOINT}{named}{second.revision}"


def second_in(repository: str | None, revision: str | None) -> tuple[str | None, str | None, str | None]:
    """What a revision tells of a cascade: the first stage's revision, the second stage's name, and its revision.

    ``COMMIT+COMMIT`` has the usual second stage, which has no name here, ``COMMIT+REPOSITORY@COMMIT`` another one, and
    ``COMMIT+none`` none. The revision of another model is its own.
    """
    if repository not in SECONDS or revision is None:
        return revision, None, None
    own, _, other = revision.partition(JOINT)
    name, _, commit = other.rpartition("@")
    if other == ALONE:
        name, commit = ALONE, ""
    return own or None, name or None, commit or None


def model_name(source: str, revision: str | None) -> str:
    """The name that loads a model with the second stage that its revision tells."""
    _, second, _ = second_in(source, revision)
    return source if second is None else f"{source}{JOINT}{second}"


@dataclass(frozen=True)
class Cascade(Folder):
    """The folder of a first stage, with the parts of a second stage."""

    second: Folder = field(kw_only=True)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration, see `Folder.config`."""
        if component in SECOND_NAMES:
            return self.second.config(SECOND_NAMES[component], name)
        return super().config(component, name)

    def weight_files(self, component: str) -> list[Path]:
        """A component's files, see `Folder.weight_files`."""
        if component in SECOND_NAMES:
            return self.second.weight_files(SECOND_NAMES[component])
        return super().weight_files(component)

    def weights(self, component: str) -> Weights:
        """A component's tensors, see `Folder.weights`."""
        if component in SECOND_NAMES:
            return self.second.weights(SECOND_NAMES[component])
        return super().weights(component)

    def owner(self, component: str) -> str:
        """The name of the stage that a component is from."""
        return (self.second if component in SECOND_NAMES else self).label

    @property
    def components(self) -> Sequence[str]:
        """The components of the first stage, and the second stage's network."""
        return (*super().components, "unet_2")


def expects_second(folder: Folder) -> bool:
    """Whether a folder is the first stage of a cascade."""
    return pipeline_of(folder.config(".", "model_index.json")) in SECOND_STAGES


def with_second(first: Folder, second: Folder) -> Cascade:
    """Both stages as one model.

    Raises:
        WrongFamilyError: the stages are not those of one kind of cascade.
    """
    kinds = [pipeline_of(folder.config(".", "model_index.json")) for folder in (first, second)]
    expected = SECOND_STAGES.get(kinds[0])
    if expected is None:
        raise WrongFamilyError(
            f"{first.label} is a {kinds[0][:60] or 'model without a pipeline class'}, which has no second stage; leave "
            f"{JOINT}{second.label} out"
        )
    if kinds[1] != expected:
        raise WrongFamilyError(
            f"{second.label} is a {kinds[1][:60] or 'model without a pipeline class'}, expected the second stage of "
            f"{first.label}, a {expected}"
        )
    return Cascade(first.path, first.label, _revisions(first, second), second=second)


def alone(first: Folder) -> Folder:
    """A first stage without the second."""
    return replace(first, revision=_revisions(first, None))


def beside(first: Folder) -> Folder:
    """A first stage's folder on this machine with the second stage in the folder beside it; alone if there is none.

    Raises:
        WrongFamilyError: several folders beside it are second stages.
    """
    expected = SECOND_STAGES[pipeline_of(first.config(".", "model_index.json"))]
    seconds = [folder for folder in _neighbours(first) if _pipeline(folder) == expected]
    if len(seconds) > 1:
        names = ", ".join(folder.label for folder in seconds)
        raise WrongFamilyError(
            f"beside {first.label} are several second stages ({names}); say which to take, such as "
            f"`model={first.label}{JOINT}{seconds[0].label}`"
        )
    if seconds:
        return with_second(first, seconds[0])
    log.warning(
        "beside %s is no folder of its second stage (a %s), so edits have the small pictures of the first stage alone; "
        "put the folder there, or name it after a plus, such as FIRST%sSECOND",
        first.label,
        expected,
        JOINT,
    )
    return first


def _neighbours(first: Folder) -> list[Folder]:
    """The models in the folders beside one, in the order of their names."""
    own = first.path.resolve()
    try:
        paths = sorted(path for path in own.parent.iterdir() if (path / "model_index.json").is_file())
    except OSError:
        return []
    return [Folder(path, label_of(path.name)) for path in paths if path != own]


def _pipeline(folder: Folder) -> str:
    """The class of a neighbour's pipeline; "" for one that cannot be read."""
    try:
        return pipeline_of(folder.config(".", "model_index.json"))
    except ModelError:
        return ""
