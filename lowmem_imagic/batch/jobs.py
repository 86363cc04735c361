"""Jobs: their hashes, and their entries in the ledger where they cannot be run."""

import hashlib
import json

from ..edits.versions import version_of_base
from ..engine.base import BaseModel
from ..settings.stages import DROPPED, EditConfig
from .failures import INPUT
from .ledger.file import FAILED, Entry
from .manifest import BadItem


def job_id(
    name: str,
    photo_sha256: str,
    sentence: str,
    config: EditConfig,
    base: BaseModel,
    background: str,
    *,
    suggest: bool = False,
) -> str:
    """Hash of all that makes an item's folder: its name, the photo and what is put under it, sentence, settings, base,
    the version of the edit format that the base's edits are first written in, and whether an eta is suggested."""
    # With the settings that an earlier version had: what it finished stays finished.
    settings = {name: {**DROPPED[name], **v} if name in DROPPED else v for name, v in config.to_dict().items()}
    # How many rows go together is the machine's matter and changes nothing but rounding.
    del settings["sample"]["batch_rows"]
    version, files = version_of_base(base.identity), base.identity.files
    made_of = [version, photo_sha256, background, sentence, settings, files, base.weights]
    if suggest:
        # Without a suggestion the hash is the one of versions that had none.
        made_of.append("suggest")
    return hashlib.sha256(json.dumps([name, *made_of], sort_keys=True).encode()).hexdigest()


def bad_entry(bad: BadItem, kind: str = INPUT) -> Entry:
    """The ledger's entry for an item that cannot be run."""
    word = hashlib.sha256(f"{bad.where}\0{bad.name}\0{bad.reason}".encode(errors="backslashreplace")).hexdigest()
    place, reason = plain(bad.where), plain(bad.reason)
    return Entry(f"bad {word}", bad.position, place, bad.name, state=FAILED, kind=kind, error=reason)


def megabytes(size: float) -> str:
    """A size as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plain(text: str) -> str:
    """The text with what no database takes, such as the bytes of a file name that is no text, escaped."""
    return text.encode(errors="backslashreplace").decode()
