"""A model whose autoencoder or text encoders are in other folders than the rest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UnknownModelError, WrongFamilyError
from .. import kinds, repairs
from .components import WEIGHTS_STEM, text_encoders_of
from .configuration import exists_here
from .source import Folder, label_of
from .weights import Weights

Elsewhere = Mapping[str, Folder]
"""Folder of each component that is not taken from the model itself."""


@dataclass(frozen=True)
class Others:
    """The folders that a user names for components of a model; None for the model's own."""

    vae: Folder | None = None
    """A model's folder, or the folder of an autoencoder alone."""
    text_from: Folder | None = None
    """The folder of a model whose text encoders and tokenizers are taken."""

    @staticmethod
    def at(vae: str | Path | None, text_from: str | Path | None) -> "Others":
        """The folders at these paths.

        Raises:
            UnknownModelError: there is no such folder.
        """
        return Others(
            None if vae is None else _folder(Path(vae), "vae", "vae"),
            None if text_from is None else _folder(Path(text_from), "text_encoder", "text_from"),
        )

    def __bool__(self) -> bool:
        return self.vae is not None or self.text_from is not None

    def elsewhere(self, components: Sequence[str]) -> Elsewhere:
        """The folder of each component that is not taken from the model itself.

        Args:
            components: the model's components.

        Raises:
            WrongFamilyError: a component is missing, or the model has no autoencoder.
        """
        if self.vae is not None and "vae" not in components:
            raise WrongFamilyError("the model has no autoencoder that another could replace; leave `vae` out")
        elsewhere = {} if self.vae is None else {"vae": self.vae}
        if self.text_from is None:
            return elsewhere
        names = text_encoders_of(components)
        for name in names:
            if name in WEIGHTS_STEM and not (self.text_from.path / name).is_dir():
                raise WrongFamilyError(
                    f"{self.text_from.label} has no {name}, which the model needs; give the folder of a model of the "
                    "same family (`text_from`)"
                )
        return {**elsewhere, **dict.fromkeys(names, self.text_from)}


@dataclass(frozen=True)
class _Alone(Folder):
    """The folder of one component."""

    def _place(self, component: str) -> Path:
        return self.path


def _folder(path: Path, component: str, setting: str) -> Folder:
    """The folder at `path`, of a whole model with this component or of the component alone."""
    label = label_of(path.name)
    if exists_here(str(path)):
        if (path / component).is_dir():
            return Folder(path, label)
        if setting == "vae" and (path / "config.json").is_file():
            return _Alone(path, label)
    raise UnknownModelError(
        f"{path.name} is no folder with a {component} (`{setting}`); expected a diffusers folder with a folder "
        f"{component} in it"
    )


@dataclass(frozen=True)
class Mixed(Folder):
    """A folder some of whose components are in other folders."""

    base: Folder = field(kw_only=True)
    elsewhere: Elsewhere = field(kw_only=True)

    @staticmethod
    def of(base: Folder, elsewhere: Elsewhere) -> Folder:
        """The folder `base` with components elsewhere; `base` itself if there are none.

        Raises:
            WrongFamilyError: the autoencoder is of another family.
        """
        if not elsewhere:
            return base
        if "vae" in elsewhere:
            own, other = (repairs.vae(folder.config("vae")) for folder in (base, elsewhere["vae"]))
            kinds.check_autoencoder(other, own, elsewhere["vae"].label, base.label)
        # No revision: it is not the model that has one.
        return Mixed(base.path, base.label, base=base, elsewhere=elsewhere)

    def _holder(self, component: str) -> Folder:
        return self.elsewhere.get(component, self.base)

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration, see `Folder.config`."""
        return self._holder(component).config(component, name)

    @property
    def components(self) -> Sequence[str]:
        """The components of the model, see `Folder.components`."""
        return self.base.components

    def owner(self, component: str) -> str:
        """The name of the model that a component is from, see `Folder.owner`."""
        return self._holder(component).owner(component)

    def weight_files(self, component: str) -> list[Path]:
        """A component's files, see `Folder.weight_files`."""
        return self._holder(component).weight_files(component)

    def weights(self, component: str) -> Weights:
        """A component's tensors, see `Folder.weights`."""
        return self._holder(component).weights(component)

    def vocabulary(self, component: str = "tokenizer") -> Path:
        """A tokenizer's vocabulary file, see `Folder.vocabulary`."""
        return self._holder(component).vocabulary(component)

    def tokenizer(self, component: str = "tokenizer") -> tuple[Path, dict[str, Any]]:
        """A tokenizer's folder and settings, see `Folder.tokenizer`."""
        return self._holder(component).tokenizer(component)

    def words(self) -> dict[str, Any] | None:
        """The words of a base that knows few, see `Folder.words`."""
        return self.base.words()
