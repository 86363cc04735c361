"""The transformer of a FLUX.2 klein in one ``.safetensors`` file, with text encoder and autoencoder from folders."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ...errors import IncompleteModelError, UnknownModelError, WrongFamilyError
from . import layout
from .components import components_of, pipeline_of
from .configuration import locate_configuration
from .mixed import Elsewhere, Mixed, Others
from .source import Folder, hash_files
from .weights import Entry, Weights, read_header

log = logging.getLogger(__name__)

_PIPELINE = {"_class_name": "Flux2KleinPipeline"}
TRANSFORMER = "transformer"
_WIDTHS = {7680: "klein"}
"""Short name of the model with a file's configuration, by the width of its text."""
_BASE, _NAMED = re.compile(r"(?i)base"), re.compile(r"(?i)klein")


@dataclass(frozen=True)
class TransformerFile:
    """A transformer alone, in Black Forest Labs' layout or in diffusers'.

    Raises:
        IncompleteModelError: text encoder or autoencoder are not given, or the configuration is unknown.
    """

    path: Path
    label: str
    prefix: str
    """Prefix of the names of all tensors."""
    config_folder: str | None = None
    """Source of the configurations: a short name, a Hub id or a diffusers folder. None chooses by the file's shapes."""
    others: Others = Others()  # noqa: RUF009 (immutable)
    """Folders with the other components."""
    revision: None = None

    def __post_init__(self) -> None:
        for component, setting in (("text_encoder", "text_from"), ("vae", "vae")):
            if component not in self._elsewhere:
                raise IncompleteModelError(
                    f"{self.path.name} is a transformer alone; give a diffusers folder with its {component} "
                    f"(`{setting}`)"
                )
        for component, folder in self._elsewhere.items():
            folder.files(component)

    @cached_property
    def _elsewhere(self) -> Elsewhere:
        """Folder of each component that is not in the file."""
        return self.others.elsewhere(components_of(_PIPELINE))

    @cached_property
    def _entries(self) -> Mapping[str, Entry]:
        """The tensors by their names without the prefix."""
        return {n.removeprefix(self.prefix): entry for n, entry in read_header(self.path, self.path.name)[0].items()}

    @cached_property
    def configuration(self) -> Folder:
        """The configurations, with the folders of the other components.

        Raises:
            IncompleteModelError: the configuration is unknown, or cannot be downloaded.
            WrongFamilyError: the configuration, or a component elsewhere, is of another family.
        """
        shapes = (self._entries[name].shape for name in layout.FLUX2_TEXT if name in self._entries)
        width = next((shape[-1] for shape in shapes if shape), 0)
        name = self.config_folder or _WIDTHS.get(width)
        if name is None:
            raise IncompleteModelError(
                f"{self.path.name} does not say how it is configured (text width {width}); name a model or give a "
                "diffusers folder of the same family, such as klein (`model_config`)"
            )
        try:
            folder = locate_configuration(name)
        except UnknownModelError as error:
            raise IncompleteModelError(f"{self.path.name} needs the configuration of {name}: {error}") from error
        if (theirs := pipeline_of(folder.config(".", "model_index.json"))) != pipeline_of(_PIPELINE):
            raise WrongFamilyError(
                f"{self.path.name} is a FLUX.2 klein, and the configuration of {folder.label} is that of a "
                f"{theirs[:60]}; leave it out, or give a model of the same family (`model_config`)"
            )
        return Mixed.of(folder, self._elsewhere)

    @property
    def distilled(self) -> str:
        """A sign in its name, or in a configuration given for it, that the model is made for few steps; "" without one.

        Base and distilled transformers differ in nothing but their weights.
        """
        if self.config_folder and self.configuration.config(".", "model_index.json").get("is_distilled"):
            return "is_distilled in the configuration given for it"
        if _BASE.search(self.path.stem):
            return ""
        if _NAMED.search(self.path.stem):
            return "its name says klein without base"
        log.warning(
            "%s does not say whether it is the base or the model of few steps, which training would damage",
            self.path.name,
        )
        return ""

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the file, and of the components elsewhere."""
        others = {component: hash_files(folder.files(component)) for component, folder in self._elsewhere.items()}
        return {"checkpoint": hash_files([self.path]), **others}

    def tensors(self) -> layout.Tensors:
        """The transformer's tensors under diffusers' names.

        Raises:
            IncompleteModelError: tensors are of no known layout.
            WrongFamilyError: the weights have an unsupported format.
        """
        weights = Weights(self._entries, f"{self.path.name}: the {TRANSFORMER}")
        places = layout.flux2(weights.names)
        if unknown := sorted(set(weights.names) - {place.name for place in places.values()}):
            raise IncompleteModelError(
                f"{self.path.name} has {len(unknown)} tensors that are no part of a FLUX.2 klein, such as "
                f"{', '.join(name[:100] for name in unknown[:3])}"
            )
        return layout.Tensors(weights, places)
