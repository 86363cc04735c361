"""A checkout of ComfyUI, without packages that its models of pictures and sound need."""

import importlib
import sys
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

_UNUSED = {
    "torchvision": (),
    "torchvision.transforms": (),
    "torchvision.transforms.functional": (),
    "torchaudio": (),
    "spandrel": ("ModelLoader", "ImageModelDescriptor"),
}
"""Packages, and names that ComfyUI imports from them, that Stable Diffusion does not need. The page needs the node that
imports the last."""


def prepare(checkout: str, folder: Path, *options: str) -> None:
    """Makes ComfyUI's modules importable, for the CPU and with a folder for models, nodes and workflows of its own.

    Empty modules stand for unused packages that are not installed.
    """
    sys.argv = ["main.py", "--cpu", "--base-directory", str(folder), *options]
    sys.path.insert(0, checkout)
    for name, members in _UNUSED.items():
        try:
            importlib.import_module(name)
        except ImportError:
            module = types.ModuleType(name)
            module.__spec__ = ModuleSpec(name, None)
            module.__path__ = []
            module.__dict__.update(dict.fromkeys(members, object))
            sys.modules[name] = module
