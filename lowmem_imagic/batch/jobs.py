"""What a job is: its hash, its entry in the ledger where it cannot be run, and its size on disk."""

import hashlib
import json

from ..base_model import BaseModel
from ..config import EditConfig
from ..edit_header import SPEC_VERSION
from ..planning import CPU_SLOTS, MAX_SLOTS, adapter_weights
from ..png import SHEET_CELL_PX
from .failures import INPUT
from .ledger_file import FAILED, Entry
from .manifest import BadItem


def job_id(name: str, photo_sha256: str, sentence: str, config: EditConfig, base: BaseModel, background: str) -> str:
    """Hash of all that makes an item's folder: its name, the photo and what is put under it, sentence, settings, base
    and the version of the edit format."""
    settings = config.to_dict()
    # How many rows go together is the machine's matter and changes nothing but rounding.
    del settings["sample"]["batch_rows"]
    made_of = [SPEC_VERSION, photo_sha256, background, sentence, settings, base.identity.files, base.weights]
    return hashlib.sha256(json.dumps([name, *made_of], sort_keys=True).encode()).hexdigest()


def bad_entry(bad: BadItem, kind: str = INPUT) -> Entry:
    """What the ledger says of an item that cannot be run."""
    word = hashlib.sha256(f"{bad.where}\0{bad.name}\0{bad.reason}".encode(errors="backslashreplace")).hexdigest()
    place, reason = plain(bad.where), plain(bad.reason)
    return Entry(f"bad {word}", bad.position, place, bad.name, state=FAILED, kind=kind, error=reason)


def bytes_of(base: BaseModel, config: EditConfig, count: int) -> tuple[int, int]:
    """Bytes of so many items at most, their pictures as if they did not compress; and of their training states."""
    if not count:
        return 0, 0
    weights = adapter_weights(base, config)
    pictures = len(config.sample.etas) * len(config.sample.seeds)
    sheet = 3 * SHEET_CELL_PX**2 * (pictures + 3) * 5 // 4
    each = 3 * base.size_px**2 * pictures + sheet + round(2 * weights * config.finetune.keep) + 2**18
    # Weights and two moments of whatever is in training, and one state's temporary.
    return count * each, 12 * weights * (min(count, CPU_SLOTS if base.device.type == "cpu" else MAX_SLOTS) + 1)


def megabytes(size: float) -> str:
    """A size as people read it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def plain(text: str) -> str:
    """The text with what no database takes, such as the bytes of a file name that is no text, escaped."""
    return text.encode(errors="backslashreplace").decode()
