"""The work of the commands `push` and `pull`, and edit files that are named by their address on the Hub."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..amounts import counted
from ..edits import file as edit_file
from ..edits.edit import Edit
from ..edits.header import read_bytes
from ..errors import ConfigError, HubError, OutputExistsError
from ..families import DEMO, LICENSES
from ..pictures import load_photo
from ..pictures.png import EDITED, encode_png
from ..share import hub
from ..share.address import SUFFIX, Address
from ..share.card import base_of, card, checked_license
from ..storage.file_names import safe_stem
from ..storage.writable import check_target, write_target
from .console import Console

PICTURE_PX = 1024
"""Longest side of a picture on the Hub."""


@dataclass(frozen=True)
class _Change:
    """What a push does to the files that a repository has; other files stay."""

    replaced: Sequence[str] = ()
    removed: Sequence[str] = ()
    """Pictures of an earlier push that this one does not replace: they would show another photo."""

    @staticmethod
    def of(there: hub.Repository, names: Collection[str]) -> "_Change":
        """The change by an upload of files with these names."""
        present = sorted(filter(hub.is_uploaded, there.files))
        return _Change([name for name in present if name in names], [name for name in present if name not in names])

    def __bool__(self) -> bool:
        return bool(self.replaced or self.removed)

    def __str__(self) -> str:
        """The change as a sentence."""
        acts = {"replaces": self.replaced, "deletes": self.removed}
        told = " and ".join(f"{act} {', '.join(names)}" for act, names in acts.items() if names)
        return f"It {told}, which the repository has; other files there stay."


def question(
    path: Path, repository: str, *, public: bool = False, pictures: Sequence[Path] = (), force: bool = False
) -> str:
    """What a person has to agree to before `push` (its `agreed`), in plain sentences.

    With `force` the Hub is asked which files the push would replace and delete.

    Raises:
        EditFileError: the file is no edit.
        HubError: the repository's name is invalid; or with `force`, the Hub cannot be asked.
    """
    edit, address = edit_file.read(path), Address.of(repository)
    who = "anyone" if public else "you, and those to whom you give access,"
    are = "is" if len(pictures) == 1 else "are"
    beside = f" {counted(len(pictures), 'picture')} {are} uploaded beside it." if pictures else ""
    count = len(edit.sentences)
    told = f"the title {edit.title!r}" + (f" and {counted(count, 'sentence')}" if count else "")
    there = hub.find(address) if force else None
    change = _Change.of(there, [hub.EDIT_FILE, hub.CARD, *_gallery(pictures)]) if there is not None else _Change()
    return (
        f"An edit gives its photo back: {who} can render the photo (eta 0) from the file on {address.repository}. "
        f"The file also has {told}.{beside}{f' {change}' if change else ''}"
    )


def push(
    path: Path,
    repository: str,
    *,
    agreed: bool,
    public: bool = False,
    pictures: Sequence[Path] = (),
    thumbnail: bool = False,
    force: bool = False,
    console: Console,
) -> dict[str, Any]:
    """Uploads an edit with its card into a repository of the Hub, in one commit, and returns the report.

    The report's `address` is pinned to the commit: ``hub:USER/REPO@COMMIT``.

    Args:
        path: the edit file.
        repository: ``USER/REPO``; created if it is not there.
        agreed: whether a person has said yes to `question`.
        public: let anyone see it; otherwise a public repository is refused.
        pictures: pictures for the card's gallery; uploaded without their metadata.
        thumbnail: leave the file's thumbnail in it, if it has one.
        force: replace the edit, the card and the pictures of an earlier push; every other file stays.
        console: remarks.

    Raises:
        ConfigError: nobody has agreed.
        EditFileError: the file is no edit.
        HubError: the repository is public, has files already, or cannot be written.
    """
    edit, address = edit_file.read(path), Address.of(repository)
    if address.revision is not None or address.file is not None:
        raise HubError(f"{repository} names a revision or a file, expected USER/REPO")
    if not agreed:
        asked = question(path, repository, public=public, pictures=pictures, force=force)
        raise ConfigError(f"{asked} To go on, say `yes`")
    if not thumbnail:
        edit = replace(edit, thumbnail=None)
    files = {name: _picture(picture) for name, picture in _gallery(pictures).items()}
    license = _license(edit, console)
    target = _prepared(address, public=public, force=force, console=console)
    text = card(edit, address.repository, license=license, pictures=list(files))
    files |= {hub.EDIT_FILE: edit_file.encode(edit), hub.CARD: text.encode()}
    change = _Change.of(target, files)
    pinned = hub.publish(address, files, removed=list(change.removed), parent=target.commit, message="Upload an edit")
    if others := [name for name in target.edit_files if name not in files]:
        console.warn(
            f"{address.repository} still has {hub.listed(others)}, which this push left alone; if one is an old edit, "
            "delete it on the Hub"
        )
    return {
        "repository": address.repository,
        "address": str(pinned),
        "private": target.private,
        "files": sorted(files),
        "replaced": list(change.replaced),
        "removed": list(change.removed),
        "edit_bytes": len(files[hub.EDIT_FILE]),
        "base": base_of(edit),
        "license": license.get("license"),
        "warnings": console.warnings,
        "summary": [
            f"{pinned}: {', '.join(sorted(files))}",
            *([f"deleted from the repository: {', '.join(change.removed)}"] if change.removed else []),
        ],
    }


def _prepared(address: Address, *, public: bool, force: bool, console: Console) -> hub.Repository:
    """The repository for an upload, created if it is not there.

    Raises:
        OutputExistsError: it has a file that may be an edit, or a card or pictures, which `force` would replace.
        HubError: it is public, and that is not asked for; or it cannot be created.
    """
    there = hub.find(address)
    if there is None:
        hub.create(address, private=not public)
        there = hub.find(address)
    if there is None:
        raise HubError(f"{address.repository} was created but cannot be read; try again")
    # Also of a new one: an organisation may have its own rules.
    if not there.private and not public:
        raise HubError(
            f"{address.repository} is public: anyone could render the photo; name another repository, or say `public`"
        )
    if there.private and public:
        console.warn(f"{address.repository} is private and stays so; change that on the Hub")
    own = [name for name in sorted(there.files) if hub.is_uploaded(name) and name not in there.edit_files]
    present = [*there.edit_files, *own]
    if present and not force:
        raise OutputExistsError(
            f"{address.repository} has {', '.join(present[:3])} already; name another repository, or use `force`"
        )
    return there


def pull(
    address: str, *, revision: str | None = None, out: Path | None = None, force: bool = False, console: Console
) -> dict[str, Any]:
    """Downloads an edit of the Hub into a file, and returns the report; its base is named, not downloaded.

    Args:
        address: ``USER/REPO``, ``hub:USER/REPO@REVISION`` or a link to the Hub.
        revision: commit, tag or branch.
        out: the file to write; by default named after the repository, in the present folder.
        force: replace an existing file.
        console: remarks.

    Raises:
        HubError: there is no such edit, or the Hub cannot be reached.
        EditFileError: the file there is no edit.
        OutputExistsError: the file exists.
    """
    wanted = Address.of(address).at(revision)
    target = out or Path(safe_stem(wanted.repository.partition("/")[2]) + SUFFIX)
    check_target(target, overwrite=force)
    path, pinned = hub.download(wanted)
    data = read_bytes(path)
    edit = edit_file.decode(data)
    write_target(target, data, overwrite=force)
    if edit.base.source != DEMO:
        console.say(f"its base is {edit.base.source}, which is not downloaded")
    return {
        "edit_file": target.name,
        "edit_bytes": len(data),
        "address": str(pinned),
        "sentences": list(edit.sentences),
        "base": edit.base.source,
        "base_revision": edit.base.revision,
        "warnings": console.warnings,
        "summary": [f"{target}: {len(data) / 1000:.0f} kB, from {pinned}"],
    }


def local_file(path: Path, console: Console) -> Path:
    """The edit file that a user names: `path` itself, or for an address of the Hub its file in the Hub's cache.

    Raises:
        HubError: there is no such edit on the Hub.
    """
    text = path.as_posix()
    if not Address.is_one(text):
        return path
    local, pinned = hub.download(Address.of(text))
    console.say(f"edit {pinned}")
    return local


def _gallery(pictures: Sequence[Path]) -> dict[str, Path]:
    """The pictures for the card by their names in the repository."""
    return {hub.picture_name(number): picture for number, picture in enumerate(pictures)}


def _picture(path: Path) -> bytes:
    """The PNG of a picture for the card, without the file's metadata but for the mark of an edited picture."""
    image = load_photo(path).image
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    # A gallery may show the photo, too, which nothing has edited.
    if EDITED.encode() not in path.read_bytes():
        return encode_png(image, provenance=None)
    return encode_png(image, text={"Software": "lowmem-imagic"})


def _license(edit: Edit, console: Console) -> dict[str, str]:
    """The licence of the edit's base: of its card on the Hub, or as this package knows it."""
    base = base_of(edit)
    values = checked_license(hub.license_of(base)) if base is not None else {}
    known = LICENSES.get(base or "") or edit.license
    if "license" not in values and known:
        values = checked_license({"license": known})
    if "license" not in values and base is not None:
        console.warn(f"the licence of {base} is not known; add it to the card on the Hub")
    return values
