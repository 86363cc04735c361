"""Repositories of the Hugging Face Hub: uploads of an edit, and downloads pinned to a commit.

Only safetensors files are downloaded, and only `edits.header.read_bytes` reads them.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from http.client import TOO_MANY_REQUESTS
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..amounts import counted
from ..errors import EditTooLargeError, HubError
from ..families.files.hub import reason_of
from ..plain_text import shown
from ..storage.safetensors_reader import MAX_FILE_BYTES
from .address import SUFFIX, Address, is_edit_file

if TYPE_CHECKING:
    from huggingface_hub import HfApi

EDIT_FILE = "pytorch_lora_weights.safetensors"
"""The name that diffusers looks for."""
CARD = "README.md"
_PICTURE = re.compile(r"pictures/(0|[1-9][0-9]{0,5})\.png")
"""Names of the card's pictures. Only exact names tell this package's files from the user's own."""

_T = TypeVar("_T")


def picture_name(number: int) -> str:
    """The name in a repository of the card's picture of this number, from 0."""
    return f"pictures/{number}.png"


log = logging.getLogger(__name__)


def is_uploaded(name: str) -> bool:
    """Whether an upload of an edit writes a file of this name; any other file of a repository is its user's own."""
    return name in (EDIT_FILE, CARD) or bool(_PICTURE.fullmatch(name))


@dataclass(frozen=True)
class Repository:
    """A repository as it is on the Hub."""

    commit: str | None
    """Its newest commit; None if it has none."""
    private: bool
    files: Mapping[str, int | None]
    """Bytes of each file, as far as the Hub tells."""

    @property
    def edit_files(self) -> list[str]:
        """The files that may be edits; a name that leads out of the repository is none."""
        return sorted(filter(is_edit_file, self.files))


def find(address: Address) -> Repository | None:
    """A repository at an address; None if there is none, or if this user may not see it.

    Raises:
        HubError: the Hub cannot be asked, or the repository has no such revision.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def ask() -> Repository | None:
        try:
            info = _api().model_info(address.repository, revision=address.revision, files_metadata=True)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
        files = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
        return Repository(info.sha, bool(info.private), files)

    return _asked(address, "read", ask)


def license_of(repository: str) -> dict[str, str]:
    """``license``, ``license_name`` and ``license_link`` of a model's card on the Hub; empty if it cannot be asked."""
    try:
        card = _api().model_info(repository).card_data
    except Exception:
        # An upload does not depend on it. huggingface_hub raises errors of many kinds.
        return {}
    values = {name: getattr(card, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in values.items() if isinstance(value, str)}


def create(address: Address, *, private: bool) -> None:
    """Creates a repository.

    Raises:
        HubError: this user may not, or is not logged in.
    """
    _asked(address, "create", lambda: _api().create_repo(address.repository, private=private))


def publish(
    address: Address, files: Mapping[str, bytes], *, removed: list[str], parent: str | None, message: str
) -> Address:
    """Writes files into a repository and removes others, in one commit; returns the address of that commit.

    Args:
        address: the repository.
        files: the files' bytes, by name.
        removed: files to remove.
        parent: the commit that the repository is expected to be at; None for a new one.
        message: the commit's first line.

    Raises:
        HubError: the repository has changed since `parent`, or this user may not write it.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations: list[Any] = [CommitOperationAdd(name, data) for name, data in files.items()]
    operations += [CommitOperationDelete(name) for name in removed]

    def commit() -> Address:
        done = _api().create_commit(
            address.repository, operations, commit_message=message, parent_commit=parent, num_threads=1
        )
        return replace(address, revision=done.oid)

    pinned = _asked(address, "write", commit)
    there = find(pinned)
    if there is None or files.keys() - there.files.keys():
        # The library leaves out files that the repository's .gitignore names.
        raise HubError(f"{pinned} lacks files that were uploaded; look for a .gitignore in the repository")
    return pinned


def download(address: Address) -> tuple[Path, Address]:
    """The path of an edit's file in the Hub's cache, and its address pinned to the commit.

    Without a network, and where the Hub itself is out of order, the file in the cache is taken, and the log says so.

    Raises:
        HubError: there is no such repository or file, several files may be meant, or the Hub cannot be reached.
        EditTooLargeError: the file is larger than any edit; it is not downloaded.
    """
    try:
        repository = find(address)
    except HubError as error:
        path = None if _refused(error) else _in_cache(address)
        if path is None:
            raise
        pinned = _pinned(address, path)
        log.warning("%s; the copy of %s on this machine is taken", error, pinned)
        return path, pinned
    if repository is None:
        raise HubError(
            f"{address.repository} is not on the Hub, or is private and this user may not read it; "
            "check the name, or log in with: hf auth login"
        )
    name = _chosen(address, repository)
    size = repository.files[name]
    if size is not None and size > MAX_FILE_BYTES:
        here = replace(address, file=None)
        raise EditTooLargeError(f"{here}: {name} has {size} bytes, expected at most {MAX_FILE_BYTES}")
    named = replace(address, file=name)
    path = _asked(address, "read", lambda: _fetched(named))
    # Named where the repository alone would lead to another file, or to none.
    alone = name == EDIT_FILE or len(repository.edit_files) == 1
    return path, _pinned(replace(named, file=None) if alone else named, path)


def _refused(error: HubError) -> bool:
    """Whether the Hub answered, and refused: a file that was withdrawn is not to come from the cache."""
    from huggingface_hub.errors import HfHubHTTPError

    answer = error.__cause__.response if isinstance(error.__cause__, HfHubHTTPError) else None
    return answer is not None and answer.status_code < 500 and answer.status_code != TOO_MANY_REQUESTS


def _pinned(address: Address, path: Path) -> Address:
    """The address at the commit of a file's path in the Hub's cache, ``models--USER--REPO/snapshots/COMMIT/...``."""
    parts = path.parts
    # Not by "snapshots" alone: a folder of the repository, or of this machine, may have that name.
    place = max(at for at in range(len(parts) - 2) if parts[at].startswith("models--") and parts[at + 1] == "snapshots")
    return replace(address, revision=parts[place + 2])


def _chosen(address: Address, repository: Repository) -> str:
    """The name of the edit's file."""
    names = repository.edit_files
    if address.file is not None:
        if address.file in names:
            return address.file
        raise HubError(f"{replace(address, file=None)} has no file {address.file}; it has {listed(names)}")
    if EDIT_FILE in names:
        return EDIT_FILE
    if len(names) == 1:
        return names[0]
    if not names:
        raise HubError(f"{address} has no {SUFFIX} file, so no edit")
    raise HubError(f"{address} has {listed(names)}; give the link to one of these files")


def listed(names: list[str]) -> str:
    """Some names for a message."""
    some = ", ".join(shown(name) for name in names[:5])
    return f"{counted(len(names), f'{SUFFIX} file')}{': ' if names else ''}{some}{', ...' if len(names) > 5 else ''}"


def _in_cache(address: Address) -> Path | None:
    """The edit's file in the Hub's cache, chosen among the files there as on the Hub; None if there is none.

    Raises:
        HubError: several files may be meant.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(address.repository, revision=address.revision, local_files_only=True))
        names = [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{SUFFIX}") if path.is_file()]
    except Exception:
        # As in `families.files.hub.cached`.
        return None
    cached = Repository(None, private=False, files=dict.fromkeys(names))
    if not cached.edit_files or address.file not in (None, *cached.edit_files):
        return None
    return folder / _chosen(address, cached)


def _fetched(address: Address) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(address.repository, str(address.file), revision=address.revision))


def _api() -> "HfApi":
    from huggingface_hub import HfApi

    return HfApi(library_name="lowmem-imagic")


def _asked(address: Address, act: str, ask: Callable[[], _T]) -> _T:
    """The Hub's answer.

    Raises:
        HubError: in place of any error of its library, with advice.
    """
    from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

    try:
        return ask()
    except HubError:
        raise
    except RevisionNotFoundError as error:
        raise HubError(f"{address.repository} has no revision {address.revision}") from error
    except Exception as error:
        # huggingface_hub also raises the errors of its HTTP library, which differs between its versions.
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        raise HubError(f"{address.repository} could not be {_PAST[act]}: {_REASONS.get(status) or _told(error)}") from (
            error
        )


_PAST = {"read": "read", "create": "created", "write": "written"}
_REASONS: dict[int | None, str] = {
    401: "the Hub does not know this user; log in with: hf auth login",
    403: "this user may not do that; check the name, and that the token may write",
    404: "it is not on the Hub, or is private",
    409: "it has changed meanwhile; try again",
    412: "it has changed meanwhile; try again",
    413: "the file is too large for the Hub",
    429: "the Hub takes no more requests for now; try again later",
}


def _told(error: Exception) -> str:
    """The reason why the Hub could not be reached."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{reason_of(error)}; check the network"
