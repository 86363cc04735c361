"""Downloads from the Hugging Face Hub: configurations and safetensors, never a pickle or a whole repository."""

import importlib.util
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ...errors import UnknownModelError
from .components import TOKENIZERS, WEIGHTS_STEM, components_of
from .reading import read_json

log = logging.getLogger(__name__)

_SETTINGS = ("HF_ENDPOINT", "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
"""Environment variables for the address of the Hub."""
_CONFIGURATION = [
    "model_index.json",
    "*/config.json",
    "scheduler/*.json",
    "image_noising_scheduler/*.json",
    *(f"{tokenizer}/{name}" for tokenizer in TOKENIZERS for name in ("*.json", "*.txt", "*.jinja", "spiece.model")),
]


def fetch_configuration(repository: str) -> Path:
    """A model's folder in the local cache with its configurations and tokenizer, without weights.

    Raises:
        UnknownModelError: the model is not in the cache and cannot be downloaded.
    """
    return _fetch(repository, None, _CONFIGURATION)


def fetch(repository: str, revision: str | None) -> Path:
    """A model's folder in the local cache, named by its commit.

    The configurations come first: of a pipeline that is not supported no weights are downloaded. Weights come in the
    repository's own precision. They come in the fp16 variant if a component has no other, or if only that is in the
    cache and the Hub cannot be reached.

    Args:
        repository: Hub id.
        revision: commit, tag or branch.

    Raises:
        UnknownModelError: the model is not in the cache and cannot be downloaded.
        IncompleteModelError: the repository has no pipeline.
    """
    folder = _fetch(repository, revision, _CONFIGURATION)
    stems = stems_of(folder, repository)
    if not stems:
        return folder
    # By commit, so that all parts are of the same commit.
    commit = folder.name
    try:
        _fetch(repository, commit, _weights(stems))
    except UnknownModelError as error:
        try:
            return _fetch(repository, commit, _weights(stems, ".fp16"), local_files_only=True)
        except UnknownModelError:
            raise error from error.__cause__
    lacking = {
        component: stem
        for component, stem in stems.items()
        # Not every model has every component.
        if (folder / component).exists()
        and not any((folder / component / name).exists() for name in (_plain(stem), f"{_plain(stem)}.index.json"))
    }
    if lacking:
        _fetch(repository, commit, _weights(lacking, ".fp16"))
    return folder


def stems_of(folder: Path, label: str) -> dict[str, str]:
    """Stems of the weight files' names by component, of a model's folder; none for an unsupported pipeline.

    Raises:
        IncompleteModelError: the folder has no pipeline.
    """
    components = components_of(read_json(folder / "model_index.json", f"{label}: model_index.json"))
    return {component: WEIGHTS_STEM[component] for component in components if component in WEIGHTS_STEM}


def cached(repository: str, revision: str | None) -> Path | None:
    """A model's folder in the local cache, named by its commit, without asking the Hub; None if it is not there.

    Its files may be incomplete.
    """
    try:
        folder = _snapshot(repository, revision, _CONFIGURATION, local_files_only=True)
        return _snapshot(repository, folder.name, _weights(stems_of(folder, repository)), local_files_only=True)
    except Exception:
        # huggingface_hub raises errors of many kinds for a name, a revision or a cache that it cannot use.
        return None


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


def _snapshot(repository: str, revision: str | None, patterns: list[str], *, local_files_only: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(repository, revision=revision, allow_patterns=patterns, local_files_only=local_files_only)
    )


def _fetch(repository: str, revision: str | None, patterns: list[str], *, local_files_only: bool = False) -> Path:
    def download(local: bool) -> Path:
        return _snapshot(repository, revision, patterns, local_files_only=local)

    try:
        return download(local_files_only)
    except Exception as error:
        # huggingface_hub also raises the errors of its HTTP library, which differs between its versions.
        reason = reason_of(error)
        # huggingface_hub tries its cache if the network fails, but not if a proxy or an endpoint is invalid.
        if not local_files_only and not isinstance(error, FileNotFoundError):
            try:
                folder = download(True)
            except Exception:
                pass
            else:
                log.warning(
                    "the Hub cannot be reached for %s (%s); going on with the copy in the cache", repository, reason
                )
                return folder
        at = "" if revision is None else f" at revision {revision}"
        advice = "check its name and the network"
        if type(error).__name__ == "GatedRepoError":
            advice = "accept its licence on its page of the Hub, and log in there (`hf auth login`)"
        raise UnknownModelError(
            f"model {repository}{at} is not in the local cache and could not be downloaded ({reason}); {advice}, or "
            "give a local folder"
        ) from error


def reason_of(error: Exception) -> str:
    """The reason why the Hub could not be reached, in few words: an invalid setting, or else the kind of error."""
    if isinstance(error, FileNotFoundError) and os.environ.get("HF_HUB_OFFLINE", "").upper() in (
        "1",
        "ON",
        "YES",
        "TRUE",
    ):
        return "HF_HUB_OFFLINE is set"
    for name in _SETTINGS:
        for spelling in (name, name.lower()):
            value = os.environ.get(spelling, "")
            if value and (problem := _problem(value, proxy=name != "HF_ENDPOINT")):
                return f"{spelling} cannot be used: {problem}"
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__


def _problem(url: str, *, proxy: bool) -> str:
    """The problem of an address, without repeating it, as it may contain a password; "" if there is none."""
    schemes = ("http", "https", "socks5", "socks5h") if proxy else ("http", "https")
    try:
        # A proxy may be written without its scheme.
        parts = urlsplit(url if "://" in url or not proxy else f"http://{url}")
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"no address ({str(error)[:60]})"
    if parts.scheme not in schemes:
        return f"its scheme is {parts.scheme[:20]!r}, expected {', '.join(schemes)}"
    if not host:
        return "it names no host"
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        return "a SOCKS proxy needs the package socksio (pip install socksio)"
    return ""
