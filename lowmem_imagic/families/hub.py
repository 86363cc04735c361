"""Downloads from the Hugging Face Hub: configurations and safetensors, never a pickle or a whole repository."""

from collections.abc import Mapping
from pathlib import Path

from ..errors import UnknownModelError

_CONFIGURATION = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]


def fetch_configuration(repository: str) -> Path:
    """A model's folder in the local cache with its configurations and tokenizer, without weights.

    Raises:
        UnknownModelError: it is neither in the cache nor can it be downloaded.
    """
    return _fetch(repository, None, _CONFIGURATION)


def fetch(repository: str, revision: str | None, stems: Mapping[str, str]) -> Path:
    """A model's folder in the local cache, named by its commit.

    Weights come in the repository's own precision; in the fp16 variant where a component has no other, or
    where only that is in the cache and the Hub cannot be reached.

    Args:
        repository: Hub id.
        revision: commit, tag or branch.
        stems: component to the stem of its weight files' names.

    Raises:
        UnknownModelError: it is neither in the cache nor can it be downloaded.
    """
    try:
        folder = _fetch(repository, revision, _CONFIGURATION + _weights(stems))
    except UnknownModelError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        try:
            return _fetch(repository, revision, _CONFIGURATION + _weights(stems, ".fp16"), local_files_only=True)
        except UnknownModelError:
            raise error from error.__cause__
    lacking = {
        component: stem
        for component, stem in stems.items()
        if not any((folder / component / name).exists() for name in (_plain(stem), f"{_plain(stem)}.index.json"))
    }
    if lacking:
        # By commit, so that all parts are of the same one.
        _fetch(repository, folder.name, _weights(lacking, ".fp16"))
    return folder


def _plain(stem: str) -> str:
    return f"{stem}.safetensors"


def _weights(stems: Mapping[str, str], variant: str = "") -> list[str]:
    """Patterns of the weight files: one file, or shards and their index."""
    return [
        f"{component}/{name}"
        for component, stem in stems.items()
        for name in (
            f"{stem}{variant}.safetensors",
            f"{stem}{variant}-*.safetensors",
            f"{_plain(stem)}.index{variant}.json",
        )
    ]


def _fetch(repository: str, revision: str | None, patterns: list[str], *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, revision=revision, allow_patterns=patterns, local_files_only=local_files_only
        )
    except Exception as error:
        # Besides its own errors the hub raises those of its HTTP library, which differs between its versions.
        reason = (isinstance(error, OSError) and error.strerror) or type(error).__name__
        at = "" if revision is None else f" at revision {revision}"
        raise UnknownModelError(
            f"model {repository}{at} is not in the local cache and could not be downloaded ({reason}); "
            "check its name and the network, or give a local folder"
        ) from error
    return Path(folder)
