"""Imagic (arXiv 2210.09276) on 8-12 GB cards: edit a real photo with a sentence, keep the edit as a small file.

::

    from lowmem_imagic import BaseModel, Cell, Job, apply_edits, load_photo, make_edits, preset, sampling_of

    base = BaseModel.load("demo")
    [edit] = make_edits(base, [Job(load_photo("cube.png"), "a blue cube on a wooden floor")], preset("balanced"))
    [picture] = apply_edits(base, [edit], [Cell(edit=0, eta=1.0, seed=0)], sampling_of(edit))
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
    "load_into",
    "load_photo",
    "make_edits",
    "plan_for",
    "planned",
    "preset",
    "read_edit",
    "sampling_of",
    "stream_edits",
    "write_edit",
]

if TYPE_CHECKING:
    from .edits.edit import Edit
    from .edits.file import read as read_edit
    from .edits.file import write as write_edit
    from .edits.recorded import sampling_of
    from .engine.base import BaseModel
    from .engine.memory import Meter
    from .errors import LowmemImagicError
    from .layers.adapter_pack import AdapterPack
    from .pictures import Photo, load_photo
    from .pipeline.apply import apply_edits, check_base
    from .pipeline.make import make_edits, stream_edits
    from .pipeline.prepare import Job
    from .planning.plan import Budget, Plan, plan_for, planned
    from .sampling.sample import Cell
    from .settings.presets import preset
    from .settings.stages import EditConfig, SampleConfig
    from .share.into import load_into

_HOMES = {
    "AdapterPack": ("layers.adapter_pack", "AdapterPack"),
    "BaseModel": ("engine.base", "BaseModel"),
    "Budget": ("planning.plan", "Budget"),
    "Cell": ("sampling.sample", "Cell"),
    "Edit": ("edits.edit", "Edit"),
    "EditConfig": ("settings.stages", "EditConfig"),
    "Job": ("pipeline.prepare", "Job"),
    "LowmemImagicError": ("errors", "LowmemImagicError"),
    "Meter": ("engine.memory", "Meter"),
    "Photo": ("pictures", "Photo"),
    "Plan": ("planning.plan", "Plan"),
    "SampleConfig": ("settings.stages", "SampleConfig"),
    "apply_edits": ("pipeline.apply", "apply_edits"),
    "check_base": ("pipeline.apply", "check_base"),
    "load_into": ("share.into", "load_into"),
    "load_photo": ("pictures", "load_photo"),
    "make_edits": ("pipeline.make", "make_edits"),
    "plan_for": ("planning.plan", "plan_for"),
    "planned": ("planning.plan", "planned"),
    "preset": ("settings.presets", "preset"),
    "read_edit": ("edits.file", "read"),
    "sampling_of": ("edits.recorded", "sampling_of"),
    "stream_edits": ("pipeline.make", "stream_edits"),
    "write_edit": ("edits.file", "write"),
}


def __getattr__(name: str) -> Any:
    """The public name, imported from its module at the first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _HOMES[name]
    from .unexpected import without_advice

    # bitsandbytes logs while it is imported that its 4-bit kernels need another package; they are not used here.
    with without_advice():
        return getattr(importlib.import_module(f".{module}", __name__), attribute)


def __dir__() -> list[str]:
    return __all__
