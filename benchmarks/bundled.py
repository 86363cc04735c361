"""Which bundled model a result was measured with."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.families import DEMO
from lowmem_imagic.families.files.locate import locate


def model_of(base: BaseModel) -> dict[str, Any]:
    """The model of a measurement as its result names it, see `outdated`."""
    return {"name": base.name, "sha256": base.identity.files}


def outdated(result: Mapping[str, Any]) -> bool:
    """Whether a result is of an earlier bundled model. Results that do not depend on a model's weights name none."""
    model = result.get("model")
    return isinstance(model, Mapping) and model["name"] == DEMO and model["sha256"] != _bundled()


def current(path: Path) -> dict[str, Any]:
    """The result at a path; empty without one, and if it is of an earlier bundled model."""
    result = read(path)
    return {} if outdated(result) else result


def read(path: Path) -> dict[str, Any]:
    """The result at a path, of any model; empty without one."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


@cache
def _bundled() -> dict[str, str]:
    """sha256 of the bundled model's components."""
    return locate(DEMO).hashes
