"""Manifests: a folder of photos, or a list of (photo, sentence) in JSONL, CSV or JSON.

Outputs are never named by a path of the manifest: every name goes through `storage.file_names.safe_stem`.
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
"""Digits of the digest in the name of an item whose plain name another one has.

Eight are 32 bits: among 100,000 items of one name two agree with probability 1 - exp(-10^10 / 2^33) = 0.69. Those get
sixteen (64 bits: 3 in 10^10), and so on; names that have been unique with eight stay as they are.
"""


@dataclass(frozen=True)
class Item:
    """One edit to make."""

    where: str
    """Where it stands in the manifest, for messages."""
    name: str
    """Of its folder; unique in the manifest, and the same as long as the items before it are."""
    photo: Path
    sentence: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its own: model, preset, seed, etas, seeds."""
    position: int = 0
    """In the manifest, whatever part of it is run."""


@dataclass(frozen=True)
class BadItem:
    """An item that cannot be run."""

    where: str
    name: str
    reason: str
    position: int = 0


@dataclass
class Summary:
    """The number of items of a run, and what became of them."""

    total: int
    done: list[str] = field(default_factory=list)
    """Names of the items made by this run."""
    before: list[str] = field(default_factory=list)
    """Names of those that were there already, or that another run made meanwhile."""
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
    """The items of a manifest, and those that are none.

    Args:
        path: a folder of photos, or a ``.jsonl``, ``.csv`` or ``.json`` file. Photos are relative to its folder.
        sentence: for items without one of their own; a folder needs it.

    Raises:
        ConfigError: no manifest, or nothing in it.
    """
    folder = path if path.is_dir() else path.parent
    items, bad = list[Item](), list[BadItem]()
    taken: dict[str, str] = {}
    try:
        # One entry at a time, so that only the fields of items are kept.
        for position, (where, entry) in enumerate(_entries(path, sentence)):
            try:
                item = replace(_item(where, entry, folder, sentence), position=position)
            except ConfigError as error:
                bad.append(BadItem(where, "", str(error), position))
                continue
            digest = _digest(item, folder)
            item = replace(item, name=_free_name(item.name, digest, taken))
            if item.name in taken:
                reason = "the same photo, sentence and settings stand above already"
                bad.append(BadItem(where, item.name, reason, position))
                continue
            taken[item.name] = digest
            items.append(item)
    except (OSError, ValueError) as error:
        raise ConfigError(f"manifest {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not items and not bad:
        raise ConfigError(f"manifest {path} has no items; expected photos, or lines with photo and sentence")
    return items, bad


def _entries(path: Path, sentence: str | None) -> Iterator[Entry]:
    """The entries of the manifest.

    Raises:
        ConfigError: It is none.
    """
    if path.is_dir():
        if sentence is None:
            raise ConfigError(f"{path} is a folder of photos; say with `prompt` what the edited pictures show")
        return of_folder(path)
    if not os.path.lexists(path):
        raise ConfigError(f"manifest is {path}, which is not there; expected a folder or a .jsonl, .csv or .json file")
    return of_file(path)


def _free_name(name: str, digest: str, taken: Mapping[str, str]) -> str:
    """The name, with as many digits of the digest as tell it from those of other items."""
    names = [name, *(f"{name[: 59 - count]}-{digest[:count]}" for count in _DIGEST_LENGTHS)]
    return next((one for one in names if taken.get(one, digest) == digest), digest[:60])


def _item(where: str, entry: Any, folder: Path, sentence: str | None) -> Item:
    """The item that an entry describes."""
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

        # A folder or file beside the manifest, as a photo is; any other word is a name.
        values["model"] = findable(values["model"], folder)
    _check_local(values["photo"], folder)
    photo = Path(values.pop("photo"))
    name = safe_stem(values.pop("name", None) or f"{photo.stem} {wanted}")
    return Item(where, name, _found(folder, photo), wanted, values)


def _is_text(value: str) -> bool:
    """Whether it can be written; JSON's escapes can name halves of characters."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in value) if not value.isascii() else True


def _check_local(photo: str, folder: Path) -> None:
    """Makes sure that a photo's name is a path.

    Raises:
        ConfigError: It is a URL, or begins at a home folder.
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


def _found(folder: Path, photo: Path) -> Path:
    """Where a photo is: beside the manifest, or where TEdBench has them."""
    beside = folder / photo
    within = folder / "originals" / photo
    # Not Path.exists, which raises for a name that is too long.
    return within if not os.path.exists(beside) and os.path.exists(within) else beside


def _digest(item: Item, folder: Path) -> str:
    """Of what makes an item the same as another."""
    try:
        photo = item.photo.relative_to(folder).as_posix()
    except ValueError:
        photo = item.photo.as_posix()
    return hashlib.sha256(json.dumps([photo, item.sentence, dict(item.settings)], sort_keys=True).encode()).hexdigest()
