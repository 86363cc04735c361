"""Manifests: a folder of photos, or a list of (photo, sentence) in JSONL, CSV or JSON.

Output folders never take a path from the manifest: every name goes through `storage.file_names.safe_stem`.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings.stages import MAX_VALUES
from ..storage.file_names import safe_stem
from .entries import ALIASES, KINDS, Entry, of_file, of_folder

_URL = re.compile(r"([a-z][a-z0-9+.-]{1,20})://", re.IGNORECASE)
_DIGEST_LENGTHS = (8, 16, 32, 58)
"""Digits of the digest that are appended to an item's name if another item has that name.

Eight digits are 32 bits: among 100,000 items of one name two agree with probability 1 - exp(-10^10 / 2^33) = 0.69. Such
items get sixteen (64 bits: 3 in 10^10), and so on; names that are unique with eight digits stay the same.
"""


@dataclass(frozen=True)
class Item:
    """One edit to make."""

    where: str
    """Its place in the manifest, for messages."""
    name: str
    """Name of its folder; unique in the manifest, and stable as long as the items before it stay the same."""
    photo: Path
    sentence: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The item's own settings: model, preset, seed, etas, seeds."""
    position: int = 0
    """Its index in the whole manifest, also if only a part of it is run."""


@dataclass(frozen=True)
class BadItem:
    """An item that cannot be run."""

    where: str
    name: str
    reason: str
    position: int = 0


@dataclass
class Summary:
    """The number of items of a run, and their results."""

    total: int
    done: list[str] = field(default_factory=list)
    """Names of the items made by this run."""
    before: list[str] = field(default_factory=list)
    """Names of the items that were finished before, or by another run meanwhile."""
    failed: list[BadItem] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Items that are still to be made."""
        return self.total - len(self.done) - len(self.before) - len(self.failed)

    def __add__(self, other: "Summary") -> "Summary":
        """The summary of both runs."""
        return Summary(
            self.total + other.total,
            self.done + other.done,
            self.before + other.before,
            self.failed + other.failed,
        )

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "total": self.total,
            "done": self.done,
            "done_before": self.before,
            "failed": [{"where": bad.where, "name": bad.name, "reason": bad.reason} for bad in self.failed],
            "left": self.left,
        }


def read_manifest(path: Path, sentence: str | None = None) -> tuple[list[Item], list[BadItem]]:
    """The items of a manifest, and its invalid entries.

    Args:
        path: a folder of photos, or a ``.jsonl``, ``.csv`` or ``.json`` file. Photos are relative to its folder.
        sentence: sentence for items without their own; a folder needs it.

    Raises:
        ConfigError: the path is no manifest, or the manifest is empty.
    """
    folder = path if path.is_dir() else path.parent
    items, bad = list[Item](), list[BadItem]()
    digests: dict[str, str] = {}
    try:
        # One entry at a time, so that memory holds only the fields of items.
        for position, (where, entry) in enumerate(_entries(path, sentence)):
            try:
                item = replace(_item(where, entry, folder, sentence), position=position)
            except ConfigError as error:
                bad.append(BadItem(where, "", str(error), position))
                continue
            digest = _digest(item, folder)
            item = replace(item, name=_free_name(item.name, digest, digests))
            if item.name in digests:
                reason = "the same photo, sentence and settings stand above already"
                bad.append(BadItem(where, item.name, reason, position))
                continue
            digests[item.name] = digest
            items.append(item)
    except (OSError, ValueError) as error:
        raise ConfigError(f"manifest {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not items and not bad:
        raise ConfigError(f"manifest {path} has no items; expected photos, or lines with photo and sentence")
    return items, bad


def _entries(path: Path, sentence: str | None) -> Iterator[Entry]:
    """The entries of the manifest.

    Raises:
        ConfigError: The path is no manifest.
    """
    if path.is_dir():
        if sentence is None:
            raise ConfigError(f"{path} is a folder of photos; describe the edited pictures with `prompt`")
        return of_folder(path)
    if not os.path.lexists(path):
        raise ConfigError(f"manifest is {path}, which is not there; expected a folder or a .jsonl, .csv or .json file")
    return of_file(path)


def _free_name(name: str, digest: str, digests: Mapping[str, str]) -> str:
    """The name, with as many digits of the digest as needed to differ from the names of other items."""
    names = [name, *(f"{name[: 59 - count]}-{digest[:count]}" for count in _DIGEST_LENGTHS)]
    return next((one for one in names if digests.get(one, digest) == digest), digest[:60])


def _item(where: str, entry: Any, folder: Path, sentence: str | None) -> Item:
    """The item of an entry.

    Raises:
        ConfigError: The entry is no item.
    """
    if isinstance(entry, ConfigError):
        raise entry
    if not isinstance(entry, dict):
        raise ConfigError(f"found {type(entry).__name__}, expected an object with photo and sentence")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        name = ALIASES.get(key, key)
        if name not in KINDS:
            raise ConfigError(f"{str(key)[:40]!r} is no field of an item, expected {', '.join(KINDS)}")
        if name == "seed" and isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, KINDS[name]):
            kinds = " or ".join(kind.__name__ for kind in KINDS[name])
            raise ConfigError(f"{name} is {str(value)[:40]!r}, expected {kinds}")
        values[name] = value
        if isinstance(value, list) and not (
            len(value) <= MAX_VALUES
            and all(isinstance(one, int | float) and not isinstance(one, bool) for one in value)
        ):
            raise ConfigError(f"{name} is {str(value)[:40]!r}, expected at most {MAX_VALUES} numbers")
        if isinstance(value, str) and name != "photo" and not _is_text(value):
            raise ConfigError(f"{name} holds half of a surrogate pair, expected text")
    wanted = values.pop("sentence", sentence)
    if not values.get("photo") or wanted is None:
        raise ConfigError(f"has no {'sentence' if values.get('photo') else 'photo'}")
    if "model" in values:
        from ..families import findable

        # A folder or file relative to the manifest, like a photo; anything else is a model's name.
        values["model"] = findable(values["model"], folder)
    _check_local(values["photo"], folder)
    photo = Path(values.pop("photo"))
    name = safe_stem(values.pop("name", None) or f"{photo.stem} {wanted}")
    return Item(where, name, _photo_path(folder, photo), wanted, values)


def _is_text(value: str) -> bool:
    """Whether the text can be encoded; JSON escapes can contain half of a surrogate pair."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in value) if not value.isascii() else True


def _check_local(photo: str, folder: Path) -> None:
    """Checks that a photo is given by a path.

    Raises:
        ConfigError: It is a URL, or begins with ~.
    """
    url = _URL.match(photo)
    if url is None and not photo.startswith("data:") and not photo.startswith("~"):
        return
    if os.path.exists(folder / photo):
        return
    if photo.startswith("~"):
        raise ConfigError(f"photo is {photo[:80]!r}; expected a path, write the home folder out in place of ~")
    if url is not None and url[1].lower() == "file":
        raise ConfigError(f"photo is the URL {photo[:80]!r}; expected a path, leave out {url[0]!r}")
    raise ConfigError(f"photo is the URL {photo[:80]!r}; expected a file, download it first")


def _photo_path(folder: Path, photo: Path) -> Path:
    """Path of a photo: relative to the manifest, or in ``originals`` as in TEdBench."""
    beside = folder / photo
    within = folder / "originals" / photo
    # os.path.exists, as Path.exists raises for a name that is too long.
    return within if not os.path.exists(beside) and os.path.exists(within) else beside


def _digest(item: Item, folder: Path) -> str:
    """Hash of photo, sentence and settings; equal for duplicate items."""
    try:
        photo = item.photo.relative_to(folder).as_posix()
    except ValueError:
        photo = item.photo.as_posix()
    return hashlib.sha256(json.dumps([photo, item.sentence, dict(item.settings)], sort_keys=True).encode()).hexdigest()
