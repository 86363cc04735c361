"""What is to be edited: a folder of photos, or a list of (photo, sentence) in JSONL, CSV or JSON.

Outputs are never named by a path of the manifest: every name goes through `names.safe_stem`.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..names import safe_stem

PHOTO_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".heic", ".avif")
"""What is taken for a photo in a folder; a manifest may name any file."""
MAX_MANIFEST_BYTES = 64 * 2**20
MAX_ITEMS = 100_000
_ALIASES = {"image": "photo", "img_name": "photo", "prompt": "sentence", "target_text": "sentence"}
"""Other names of fields; those of TEdBench's ``input_list.json`` among them."""
_KINDS: dict[str, tuple[type, ...]] = {
    "photo": (str,),
    "sentence": (str,),
    "name": (str,),
    "model": (str,),
    "preset": (str,),
    "seed": (int,),
    "etas": (list, str),
    "seeds": (list, str),
}
"""Fields of an item, and what they may be; from a CSV file all are text."""


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


def read_manifest(path: Path, sentence: str | None = None) -> tuple[list[Item], list[BadItem]]:
    """The items of a manifest, and those that are none.

    Args:
        path: a folder of photos, or a ``.jsonl``, ``.csv`` or ``.json`` file. Photos are relative to its folder.
        sentence: for items without one of their own; a folder needs it.

    Raises:
        ConfigError: no manifest, or nothing in it.
    """
    try:
        if path.is_dir():
            found = _of_folder(path, sentence)
        elif path.is_file():
            found = _of_file(path)
        else:
            raise ConfigError(
                f"manifest is {path}, which is not there; expected a folder or a .jsonl, .csv or .json file"
            )
        entries = list(found)
    except OSError as error:
        raise ConfigError(f"manifest {path} cannot be read ({error.strerror or error})") from error
    if not entries:
        raise ConfigError(f"manifest {path} has no items; expected photos, or lines with photo and sentence")
    if len(entries) > MAX_ITEMS:
        raise ConfigError(f"manifest {path} has {len(entries)} items, expected at most {MAX_ITEMS}")
    folder = path if path.is_dir() else path.parent
    items, bad = list[Item](), list[BadItem]()
    taken: dict[str, str] = {}
    for position, (where, entry) in enumerate(entries):
        try:
            item = replace(_item(where, entry, folder, sentence), position=position)
        except ConfigError as error:
            bad.append(BadItem(where, "", str(error), position))
            continue
        digest = _digest(item, folder)
        if taken.get(item.name, digest) != digest:
            item = replace(item, name=f"{item.name[:51]}-{digest[:8]}")
        if item.name in taken:
            bad.append(BadItem(where, item.name, "the same photo, sentence and settings stand above already", position))
            continue
        taken[item.name] = digest
        items.append(item)
    return items, bad


def _of_folder(path: Path, sentence: str | None) -> Iterator[tuple[str, Any]]:
    if sentence is None:
        raise ConfigError(f"{path} is a folder of photos; say with --prompt what the edited pictures show")
    for photo in sorted(path.iterdir()):
        if photo.suffix.lower() in PHOTO_SUFFIXES and photo.is_file():
            yield photo.name, {"photo": photo.name}


def _of_file(path: Path) -> Iterator[tuple[str, Any]]:
    if (size := path.stat().st_size) > MAX_MANIFEST_BYTES:
        raise ConfigError(f"manifest {path} has {size} bytes, expected at most {MAX_MANIFEST_BYTES}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise ConfigError(f"manifest {path} is not UTF-8 text; save it as UTF-8") from error
    match path.suffix.lower():
        case ".jsonl" | ".ndjson":
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield f"line {number}", _json(line)
        case ".json":
            values = _json(text)
            if not isinstance(values, list):
                raise ConfigError(f"manifest {path} is not a JSON list of objects with photo and sentence")
            for number, value in enumerate(values, start=1):
                yield f"entry {number}", value
        case ".csv":
            reader = csv.DictReader(io.StringIO(text), strict=True)
            try:
                for row in reader:
                    yield (
                        f"line {reader.line_num}",
                        {name: value for name, value in row.items() if value not in ("", None)},
                    )
            except csv.Error as error:
                raise ConfigError(f"manifest {path}, line {reader.line_num}: {error}") from error
        case other:
            raise ConfigError(f"manifest {path} ends in {other!r}, expected .jsonl, .csv, .json, or a folder")


def _json(text: str) -> Any:
    """The value, or the reason why there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ConfigError(f"not JSON ({error})")


def _item(where: str, entry: Any, folder: Path, sentence: str | None) -> Item:
    """The item that an entry describes."""
    if isinstance(entry, ConfigError):
        raise entry
    if not isinstance(entry, dict):
        raise ConfigError(f"found {type(entry).__name__}, expected an object with photo and sentence")
    values: dict[str, Any] = {}
    for key, value in entry.items():
        name = _ALIASES.get(key, key)
        if name not in _KINDS:
            raise ConfigError(f"{str(key)[:40]!r} is no field of an item, expected {', '.join(_KINDS)}")
        if name == "seed" and isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
            kinds = " or ".join(kind.__name__ for kind in _KINDS[name])
            raise ConfigError(f"{name} is {str(value)[:40]!r}, expected {kinds}")
        values[name] = value
    wanted = values.pop("sentence", sentence)
    if "photo" not in values or wanted is None:
        raise ConfigError(f"has no {'sentence' if 'photo' in values else 'photo'}")
    if "model" in values:
        from ..families import findable

        # A folder or file beside the manifest, as a photo is; any other word is a name.
        values["model"] = findable(values["model"], folder)
    photo = Path(values.pop("photo"))
    name = safe_stem(values.pop("name", None) or f"{photo.stem} {wanted}")
    return Item(where, name, _found(folder, photo), wanted, values)


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
