"""A checkout of ComfyUI, without packages that its models of pictures and sound need."""

import importlib.util
import sys
import types
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

_UNUSED = ("torchvision", "torchaudio", "spandrel")
"""Packages that ComfyUI imports at its start, and that Stable Diffusion and FLUX.2 do not need."""


class _StandIn(types.ModuleType):
    """A module in which every name is `object`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


class _StandIns(MetaPathFinder, Loader):
    """Makes empty modules for packages, whatever their modules are called in a version of ComfyUI."""

    def __init__(self, packages: Sequence[str]) -> None:
        self._packages = packages

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] in self._packages
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing is in it."""


def prepare(checkout: str, folder: Path, *options: str) -> None:
    """Makes ComfyUI's modules importable, for the CPU and with a folder for models, nodes and workflows of its own.

    Empty modules stand for unused packages that are not installed.
    """
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder), *options]
    sys.path.insert(0, checkout)
    sys.meta_path.append(_StandIns([name for name in _UNUSED if importlib.util.find_spec(name) is None]))
