"""Imagic (arXiv 2210.09276) on 8-12 GB cards: edit a real photo with a sentence, keep the edit as a small file.

::

    from lowmem_imagic import BaseModel, Cell, Job, apply_edits, load_photo, make_edits, preset

    base, settings = BaseModel.load("demo"), preset("balanced")
    [edit] = make_edits(base, [Job(load_photo("cube.png"), "a blue cube on a wooden floor")], settings)
    [picture] = apply_edits(base, [edit], [Cell(edit=0, eta=1.0, seed=0)], settings.sample)
    picture.save("blue.png")

Shape letters, used in every docstring: N edits in a pack, R rows of a batch (one row is one edit, timestep and
noise), B pictures or sentences, C H W channels and size of latents, T tokens, D width of the text, r rank,
P weights of one edit's adapter.

Nothing heavy is imported until one of the names below is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__all__ = [
    "AdapterPack",
    "BaseModel",
    "Budget",
    "Cell",
    "Edit",
    "EditConfig",
    "Job",
    "LowmemImagicError",
    "Meter",
    "Photo",
    "Plan",
    "SampleConfig",
    "apply_edits",
    "check_base",
    "load_photo",
    "make_edits",
    "plan_for",
    "preset",
    "read_edit",
    "stream_edits",
    "write_edit",
]

if TYPE_CHECKING:
    from .adapters import AdapterPack
    from .base_model import BaseModel
    from .config import EditConfig, SampleConfig
    from .edit import Edit
    from .edit_file import read as read_edit
    from .edit_file import write as write_edit
    from .errors import LowmemImagicError
    from .images import Photo, load_photo
    from .memory import Meter
    from .pipeline import apply_edits, check_base, make_edits, stream_edits
    from .planning import Budget, Plan, plan_for
    from .preparation import Job
    from .presets import preset
    from .sample import Cell

_HOMES = {
    "AdapterPack": ("adapters", "AdapterPack"),
    "BaseModel": ("base_model", "BaseModel"),
    "Budget": ("planning", "Budget"),
    "Cell": ("sample", "Cell"),
    "Edit": ("edit", "Edit"),
    "EditConfig": ("config", "EditConfig"),
    "Job": ("preparation", "Job"),
    "LowmemImagicError": ("errors", "LowmemImagicError"),
    "Meter": ("memory", "Meter"),
    "Photo": ("images", "Photo"),
    "Plan": ("planning", "Plan"),
    "SampleConfig": ("config", "SampleConfig"),
    "apply_edits": ("pipeline", "apply_edits"),
    "check_base": ("pipeline", "check_base"),
    "load_photo": ("images", "load_photo"),
    "make_edits": ("pipeline", "make_edits"),
    "plan_for": ("planning", "plan_for"),
    "preset": ("presets", "preset"),
    "read_edit": ("edit_file", "read"),
    "stream_edits": ("pipeline", "stream_edits"),
    "write_edit": ("edit_file", "write"),
}


def __getattr__(name: str) -> Any:
    """The public name, imported from its module at the first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return __all__
