"""Finds a model's files by its name: the bundled model, a diffusers folder, a Hub repository, a checkpoint file."""

import reprlib
from pathlib import Path

from ...errors import ConfigError, ModelError, UnknownModelError, WrongFamilyError
from .. import kinds
from . import hub
from .cascade import ALONE, JOINT, SECONDS, alone, beside, expects_second, second_in, with_second
from .checkpoint import SingleFile
from .configuration import DEMO_FOLDER, exists_here, mention_hidden, repository_of
from .mixed import Mixed, Others
from .source import DEMO, PICKLES, SHORT_NAMES, Folder, label_of
from .transformer_file import TransformerFile
from .weights import read_header

Source = Folder | SingleFile | TransformerFile
"""The files of a model."""

_OTHER_FORMATS = {".gguf": "a GGUF file, a format that is not supported", ".onnx": "an ONNX file"}


def locate(
    name: str,
    *,
    revision: str | None = None,
    config_folder: str | Path | None = None,
    vae: str | Path | None = None,
    text_from: str | Path | None = None,
) -> Source:
    """The files of the model called `name`; downloads a Hub model that is not in the cache.

    Args:
        name: "demo", a key of `SHORT_NAMES`, a diffusers folder, a ``.safetensors`` file or a Hub id. A cascade is
            named by its first stage; the second is in the folder beside it, the published one, or named after a plus
            (``FIRST+SECOND``, or ``FIRST+none`` for the first stage alone).
        revision: Hub commit, tag or branch; of a published cascade's first stage, or of both, see `cascade.second_in`.
        config_folder: for a single file, see `SingleFile`.
        vae: a folder whose autoencoder is taken.
        text_from: a folder whose text encoders and tokenizers are taken.

    Raises:
        UnknownModelError: there is no such model here, or it cannot be downloaded.
        WrongFamilyError: a component elsewhere is of another family.
        ConfigError: a revision was given for a model that is not on the Hub, or a configuration for one that is not a
            single file.
    """
    others = Others.at(vae, text_from)
    source = _locate(name, revision, None if config_folder is None else str(config_folder), others)
    if isinstance(source, Folder) and others:
        return Mixed.of(source, others.elsewhere(source.components))
    return source


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit of a Hub model that is wholly in the local cache; None if some of it would have to be downloaded.

    Of a cascade it tells both stages, see `cascade.second_in`; nothing is asked of the Hub.

    Also None if only the fp16 variant is there: `hub.fetch` asks the Hub for the other.
    """
    own, second, at = second_in(repository, revision)
    path = hub.cached(repository, own)
    if path is None:
        return None
    told = path.name
    if repository in SECONDS:
        other = second or SECONDS[repository]
        commit = other if other == ALONE else cached_commit(other, at) if repository_of(other) == other else None
        if commit is None:
            return None
        told += f"{JOINT}{commit}" if other in (ALONE, SECONDS[repository]) else f"{JOINT}{other}@{commit}"
    folder = Folder(path, repository, revision=path.name)
    try:
        folder.check_complete()
        plain = all(folder.variant(part) is None for part in hub.stems_of(path, repository))
    except ModelError:
        return None
    return told if plain else None


def _locate(name: str, revision: str | None, config_folder: str | None, others: Others) -> Source:
    joined = JOINT in name and not exists_here(name)
    first, _, named = name.rpartition(JOINT) if joined else (name, "", "")
    own, recorded, commit = second_in(repository_of(first), revision)
    source = _one(first, own, config_folder, others)
    named = named or recorded or ""
    if named == ALONE or (joined and not isinstance(source, Folder)):
        return _alone(source)
    if named and isinstance(source, Folder):
        other = _one(named, commit, None, Others())
        if not isinstance(other, Folder):
            raise UnknownModelError(f"{reprlib.repr(named)} is one file, expected a diffusers folder or a Hub id")
        return with_second(source, other)
    if not isinstance(source, Folder) or not expects_second(source):
        return source
    if source.label in SECONDS and source.revision is not None:
        repository = SECONDS[source.label]
        folder = hub.fetch(repository, commit)
        return with_second(source, Folder(folder, repository, revision=folder.name))
    return beside(source)


def _alone(source: Source) -> Folder:
    """The first stage of a cascade without the second.

    Raises:
        WrongFamilyError: it is no first stage.
    """
    if not isinstance(source, Folder) or not expects_second(source):
        raise WrongFamilyError(f"{source.label} has no second stage; leave the plus and what follows it out")
    return alone(source)


def _one(name: str, revision: str | None, config_folder: str | None, others: Others) -> Source:
    """The files of one model, or of one stage of a cascade."""
    exists, own = exists_here(name), name == DEMO or name in SHORT_NAMES
    path = Path(name)
    if revision is not None and name not in SHORT_NAMES and (name == DEMO or exists):
        raise ConfigError(f"revision is {revision!r}, but {path.name} is not on the Hub; leave the revision out")
    if exists and not own and not path.is_dir():
        return _file(path, config_folder, others)
    repository = repository_of(name)
    if config_folder is not None and (own or exists or repository):
        raise ConfigError(
            f"`model_config` is {reprlib.repr(config_folder)}, but {path.name} is not one .safetensors file and has a "
            "configuration of its own; leave `model_config` out"
        )
    if name == DEMO:
        return Folder(DEMO_FOLDER, DEMO)
    if name in SHORT_NAMES:
        mention_hidden(name, exists)
    elif exists:
        return Folder(path, label_of(path.resolve().name))
    if repository:
        folder = hub.fetch(repository, revision)
        return Folder(folder, repository, revision=folder.name)
    raise UnknownModelError(
        f"no model {reprlib.repr(name)}: expected demo, {', '.join(SHORT_NAMES)}, a diffusers folder, "
        "a .safetensors file or a Hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
    )


def _file(path: Path, config_folder: str | None, others: Others) -> SingleFile | TransformerFile:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UnknownModelError(
            f"{path.name} is a pickle, which is never loaded, as it can run code; "
            "expected a .safetensors checkpoint, so convert it"
        )
    if suffix in _OTHER_FORMATS:
        raise UnknownModelError(
            f"{path.name} is {_OTHER_FORMATS[suffix]}; expected a .safetensors checkpoint or a diffusers folder"
        )
    if suffix != ".safetensors":
        raise UnknownModelError(f"{path.name} is no model; expected a .safetensors checkpoint or a diffusers folder")
    prefix = kinds.transformer_prefix(path.name, read_header(path, path.name)[0])
    if prefix is not None:
        return TransformerFile(path, label_of(path.stem), prefix, config_folder, others)
    return SingleFile(path, label_of(path.stem), config_folder, others)
