"""Finds a model's files by its name: the bundled model, a diffusers folder, a Hub repository, a checkpoint file."""

import reprlib
from pathlib import Path

from ...errors import ConfigError, ModelError, UnknownModelError, WrongFamilyError
from .. import kinds
from . import hub
from .cascade import ALONE, JOINT, SECONDS, beside, expects_second, with_second
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
        revision: Hub commit, tag or branch; of a cascade's first stage.
        config_folder: for a single file, see `SingleFile`.
        vae: a folder whose autoencoder is taken.
        text_from: a folder whose text encoders and tokenizers are taken.

    Raises:
        UnknownModelError: there is no such model here, or it cannot be downloaded.
        WrongFamilyError: a component elsewhere is of another family.
        ConfigError: a revision was given for a model that is not on the Hub.
    """
    others = Others.at(vae, text_from)
    source = _locate(name, revision, None if config_folder is None else str(config_folder), others)
    if isinstance(source, Folder) and others:
        return Mixed.of(source, others.elsewhere(source.components))
    return source


def cached_commit(repository: str, revision: str | None) -> str | None:
    """The commit of a Hub model that is wholly in the local cache; None if some of it would have to be downloaded.

    Also None if only the fp16 variant is there: `hub.fetch` asks the Hub for the other.
    """
    path = hub.cached(repository, revision)
    if path is None or (repository in SECONDS and cached_commit(SECONDS[repository], None) is None):
        return None
    folder = Folder(path, repository, revision=path.name)
    try:
        folder.check_complete()
        plain = all(folder.variant(part) is None for part in hub.stems_of(path, repository))
    except ModelError:
        return None
    return path.name if plain else None


def _locate(name: str, revision: str | None, config_folder: str | None, others: Others) -> Source:
    exists = exists_here(name)
    if JOINT in name and not exists:
        first, _, second = name.rpartition(JOINT)
        source = _one(first, revision, config_folder, others)
        if second == ALONE or not isinstance(source, Folder):
            return _alone(source)
        other = _one(second, None, None, Others())
        if not isinstance(other, Folder):
            raise UnknownModelError(f"{reprlib.repr(second)} is one file, expected a diffusers folder or a Hub id")
        return with_second(source, other)
    source = _one(name, revision, config_folder, others)
    if not isinstance(source, Folder) or not expects_second(source):
        return source
    if source.label in SECONDS and source.revision is not None:
        repository = SECONDS[source.label]
        folder = hub.fetch(repository, None)
        return with_second(source, Folder(folder, repository, revision=folder.name))
    return beside(source)


def _alone(source: Source) -> Folder:
    """The first stage of a cascade without the second.

    Raises:
        WrongFamilyError: it is no first stage.
    """
    if not isinstance(source, Folder) or not expects_second(source):
        raise WrongFamilyError(f"{source.label} has no second stage; leave the plus and what follows it out")
    return source


def _one(name: str, revision: str | None, config_folder: str | None, others: Others) -> Source:
    """The files of one model, or of one stage of a cascade."""
    exists = exists_here(name)
    path = Path(name)
    if revision is not None and name not in SHORT_NAMES and (name == DEMO or exists):
        raise ConfigError(f"revision is {revision!r}, but {path.name} is not on the Hub; leave the revision out")
    if name == DEMO:
        return Folder(DEMO_FOLDER, DEMO)
    if name in SHORT_NAMES:
        mention_hidden(name, exists)
    elif exists and path.is_dir():
        return Folder(path, label_of(path.resolve().name))
    elif exists:
        return _file(path, config_folder, others)
    if repository := repository_of(name):
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
