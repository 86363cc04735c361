"""Manifests: a folder of photos, or a list of (photo, sentence) in JSONL, CSV or JSON.

Output folders never take a path from the manifest: every name goes through `storage.file_names.safe_stem`.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings.stages import MAX_VALUES
from ..storage.file_names import loses_letters, safe_stem
from .entries import ALIASES, KINDS, Entry, of_file, of_folder

_URL = re.compile(r"([a-z][a-z0-9+.-]{1,20})://", re.IGNORECASE)
_DIGEST_LENGTHS = (8, 16, 32, 58)
"""Digits of the digest that are appended to an item's name if other items have, or may have, that name.

Eight digits are 32 bits: among 100,000 items of one name two agree with probability 1 - exp(-10^10 / 2^33) = 0.69. Such
items get sixteen (64 bits: 3 in 10^10), and so on; names that are unique with eight digits stay the same.
"""


@dataclass(frozen=True)
class Item:
    """One edit to make."""

    where: str
    """Its place in the manifest, for messages."""
    name: str
    """Name of its folder; unique in the manifest, and the same in any order of its items."""
    photo: Path
    sentence: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The item's own settings: model, preset, seed, etas, seeds."""
    position: int = 0
    """Its index in the whole manifest, also if only a part of it is run."""
    stem: str = ""
    """Its plain name, from its texts alone."""
    is_vague: bool = False
    """Whether the plain name lacks letters of these texts, so that other items may well have the same."""
    digest: str = ""
    """Hash of photo, sentence and settings."""

    @property
    def names(self) -> list[str]:
        """All names that its folder may have: the plain one, and that with more and more digits of its digest."""
        ends = (f"{self.stem[: 59 - count]}-{self.digest[:count]}" for count in _DIGEST_LENGTHS)
        return [self.stem, *ends, self.digest[:60]]


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
    seen = set[tuple[str, str]]()
    try:
        # One entry at a time, so that memory holds only the fields of items.
        for position, (where, entry) in enumerate(_entries(path, sentence)):
            try:
                item = replace(_item(where, entry, folder, sentence), position=position)
            except ConfigError as error:
                bad.append(BadItem(where, "", str(error), position))
                continue
            item = replace(item, digest=_digest(item, folder))
            if (item.stem, item.digest) in seen:
                bad.append(_repeated(item))
                continue
            seen.add((item.stem, item.digest))
            items.append(item)
    except (OSError, ValueError) as error:
        raise ConfigError(f"manifest {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not items and not bad:
        raise ConfigError(f"manifest {path} has no items; expected photos, or lines with photo and sentence")
    named = _named(items)
    bad += [_repeated(item) for item in items if item.position not in named]
    return [replace(item, name=named[item.position]) for item in items if item.position in named], bad


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


def _repeated(item: Item) -> BadItem:
    return BadItem(item.where, item.stem, "the same photo, sentence and settings stand above already", item.position)


def _named(items: Sequence[Item]) -> dict[int, str]:
    """Names of the items' folders, by position.

    Several items of one plain name all get digits, so that no name depends on the order of the items. An item whose
    plain name lacks letters gets digits at once: a name of a few letters left is soon that of another item.
    """
    counts = Counter(item.stem for item in items)
    taken = set(counts)
    named = {item.position: item.stem for item in items if counts[item.stem] == 1 and not item.is_vague}
    left = [item for item in items if item.position not in named]
    for level in range(1, len(_DIGEST_LENGTHS) + 2):
        names = {item.position: item.names[level] for item in left}
        counts = Counter(names.values())
        unique = {place: name for place, name in names.items() if counts[name] == 1 and name not in taken}
        named |= unique
        taken.update(unique.values())
        left = [item for item in left if item.position not in unique]
    return named


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
    text = values.pop("name", None) or f"{photo.stem} {wanted}"
    stem = safe_stem(text)
    return Item(where, stem, _photo_path(folder, photo), wanted, values, stem=stem, is_vague=loses_letters(text))


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
