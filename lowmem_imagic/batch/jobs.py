"""Hashes of jobs, and ledger entries of items that cannot be run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ..edits.versions import version_of_base
from ..engine.base import BaseModel
from ..families.schedule import unpublished
from ..settings.stages import DROPPED, EditConfig
from .failures import INPUT
from .ledger.file import BAD, EARLIER, FAILED, Entry
from .manifest import BadItem


def job_id(
    name: str,
    photo_sha256: str,
    sentence: str,
    config: EditConfig,
    base: BaseModel,
    background: str,
) -> str:
    """Hash of the inputs of an item's folder: its name, photo, background colour, sentence, settings, base, and the
    format version of the base's square edits."""
    version, *common = _common_inputs(config, base)
    return _hash_of([name, version, photo_sha256, background, sentence, *common])


def pack_id(config: EditConfig, base: BaseModel) -> str:
    """Hash of the inputs of `job_id` that the items of a pack have in common: equal jobs have equal ones, whatever the
    base was called and however many rows a batch has."""
    return _hash_of(_common_inputs(config, base))


def _common_inputs(config: EditConfig, base: BaseModel) -> list[Any]:
    settings, identity = _hashed_settings(config.for_group(base.family.group)), base.identity
    # One checkpoint may be read with several configurations, which say what it predicts, and on which noise schedule.
    # Left out where it is noise on a published one: items finished by an earlier version keep their hash.
    predictions = {name: what for name, what in identity.interface.denoisers.items() if what != "epsilon"}
    schedules = {one.name: numbers for one in base.denoisers if (numbers := unpublished(one.schedule))}
    unusual = [values for values in (predictions, schedules) if values]
    return [version_of_base(identity), settings, identity.files, base.weights, *unusual]


def _hash_of(inputs: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


# Items with equal settings are many, and stand one after the other.
@lru_cache(maxsize=1)
def _hashed_settings(config: EditConfig) -> Mapping[str, Any]:
    """The settings that an item's hash has, of a config for one kind of network."""
    # Include dropped settings with their neutral values: items finished by an earlier version keep their hash.
    values = config.to_dict()
    settings = {name: {**DROPPED[name], **v} if name in DROPPED else v for name, v in values.items()}
    # The rows of a batch depend on the machine and change only rounding.
    del settings["sample"]["batch_rows"]
    return settings


def command_name(request: Mapping[str, Any]) -> str:
    """Name of a command's note in the ledger: equal options have equal ones."""
    return f"{EARLIER} {_hash_of([dict(request)])[:16]}"


def bad_entry(bad: BadItem, kind: str = INPUT) -> Entry:
    """The ledger's entry for an item that cannot be run."""
    word = hashlib.sha256(f"{bad.where}\0{bad.name}\0{bad.reason}".encode(errors="backslashreplace")).hexdigest()
    place, reason = plain(bad.where), plain(bad.reason)
    return Entry(f"{BAD}{word}", bad.position, place, bad.name, state=FAILED, kind=kind, error=reason)


def megabytes(size: float) -> str:
    """A size as text for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plain(text: str) -> str:
    """The text for a database: characters that are not valid Unicode, such as in file names, are escaped."""
    return text.encode(errors="backslashreplace").decode()
