"""Addresses of edits on the Hugging Face Hub."""

import re
import reprlib
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urlsplit

from ..errors import HubError

SCHEME = "hub:"
SUFFIX = ".safetensors"

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(f"{_NAME}/{_NAME}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,199}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ -]{0,199}(?:/[A-Za-z0-9_][A-Za-z0-9._ -]{0,199}){0,4}")
_HOSTS = ("huggingface.co", "hf.co")


@dataclass(frozen=True)
class Address:
    """An edit on the Hub, written ``hub:USER/REPO`` or ``hub:USER/REPO@REVISION``."""

    repository: str
    revision: str | None = None
    """Commit, tag or branch; None is the newest commit of the main branch."""
    file: str | None = None
    """The edit file in the repository; None if the repository has only one."""

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether a text is meant as an address, not as a path: it begins with ``hub:`` or ``https://``."""
        return text.startswith(SCHEME) or bool(re.match("https?:/", text))

    @staticmethod
    def of(text: str) -> "Address":
        """The address in ``USER/REPO``, ``hub:USER/REPO``, both with ``@REVISION``, or a link to the Hub.

        Raises:
            HubError: it is none of these.
        """
        if re.match("https?:/", text):
            return _of_link(text)
        repository, _, revision = text.removeprefix(SCHEME).partition("@")
        address = _checked(repository, revision or None, None)
        if address is None:
            raise HubError(
                f"{reprlib.repr(text)} is no repository of the Hub, expected USER/REPO, hub:USER/REPO@REVISION or "
                "a link to huggingface.co"
            )
        return address

    def at(self, revision: str | None) -> "Address":
        """The address at another revision; this one for None.

        Raises:
            HubError: the revision is no name of a commit, tag or branch.
        """
        if revision is None:
            return self
        if _checked(self.repository, revision, None) is None:
            raise HubError(f"revision is {reprlib.repr(revision)}, expected a commit, tag or branch")
        return replace(self, revision=revision)

    def __str__(self) -> str:
        if self.file is not None:
            from huggingface_hub import constants

            return f"{constants.ENDPOINT}/{self.repository}/blob/{self.revision or 'main'}/{quote(self.file)}"
        return f"{SCHEME}{self.repository}" + (f"@{self.revision}" if self.revision else "")


def _of_link(text: str) -> Address:
    """The address in a link: to a repository, a revision of it (``/tree/``), or a file (``/blob/``, ``/resolve/``).

    Raises:
        HubError: the link leads elsewhere.
    """
    from huggingface_hub import constants

    # A path turns // into /.
    parts = urlsplit(re.sub("^(https?):/+", r"\1://", text))
    own = urlsplit(constants.ENDPOINT)
    address = None
    if parts.netloc.lower() in (*_HOSTS, own.netloc.lower()):
        words = unquote(parts.path).strip("/").split("/")
        repository, rest = "/".join(words[:2]), words[2:]
        if not rest:
            address = _checked(repository, None, None)
        elif rest[0] == "tree" and len(rest) == 2:
            address = _checked(repository, rest[1], None)
        elif rest[0] in ("blob", "resolve") and len(rest) > 2:
            address = _checked(repository, rest[1], "/".join(rest[2:]))
    if address is None:
        raise HubError(
            f"{reprlib.repr(text)} is no link to a repository or a {SUFFIX} file of the Hub, expected "
            "https://huggingface.co/USER/REPO; fetch files from elsewhere with a browser"
        )
    return address


def is_edit_file(name: str) -> bool:
    """Whether a file of this name in a repository may be an edit."""
    return bool(_FILE.fullmatch(name)) and name.endswith(SUFFIX) and ".." not in name


def _checked(repository: str, revision: str | None, file: str | None) -> Address | None:
    """The address of these parts; None if one of them is invalid."""
    strange = ".." in f"{repository}{revision}{file}" or "--" in repository
    valid = (
        not strange
        and bool(_REPOSITORY.fullmatch(repository))
        and (revision is None or bool(_REVISION.fullmatch(revision)))
        and (file is None or is_edit_file(file))
    )
    return Address(repository, revision, file) if valid else None
