"""Names of items' folders that a batch has already, from an earlier list or an earlier version.

`manifest` names items by their list alone: an item has its plain name, unless other items of the list have it, too.
That changes if one of them is added or removed, but an item keeps the folder that it has.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from . import outputs
from .manifest import Item
from .status import ledgers_of


def settled(items: Sequence[Item], out: Path, job: Callable[[Item], str | None]) -> list[Item]:
    """The items, each with the name of the folder that it has, or else with its name from the list.

    An item has a folder that holds its job, or whose name ends in its own digest; or a name under which a ledger has
    its job.

    Args:
        items: items of one list, or of a part of it.
        out: the parent of their folders.
        job: the job of an item by this name, see `jobs.job_id`; None for an item that cannot be made. Called only for
            items that may have another folder, as it reads the photo.
    """
    there = _names_in(out)
    begun = {(entry.name, entry.job) for ledger in ledgers_of(out) for entry in ledger.entries}
    known = there | {name for name, _ in begun}
    taken = {item.name for item in items}

    def name_of(item: Item) -> str:
        if item.name != item.stem and item.name in there:
            return item.name
        others = [name for name in item.names if name != item.name and name in known and name not in taken]
        jobs = {name: job(replace(item, name=name)) for name in (*others, item.name) if others}
        states = {name: outputs.item_state(out / name, one) for name, one in jobs.items() if one is not None}
        held = [name for wanted in (outputs.FINISHED, outputs.UNFINISHED) for name in states if states[name] == wanted]
        # Folders of the same item with other settings, or with another photo in the same file.
        held += [name for name, state in states.items() if name != item.stem and state == outputs.OTHER]
        held += [name for name, state in states.items() if state == outputs.EMPTY and (name, jobs[name]) in begun]
        return held[0] if held else item.name

    named = []
    for item in items:
        name = name_of(item)
        taken.add(name)
        named.append(item if name == item.name else replace(item, name=name))
    return named


def _names_in(folder: Path) -> set[str]:
    """Names of the files in a folder; none if it cannot be read."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
