"""Versions of what edits are computed with."""

import importlib.metadata
import platform

PACKAGES = (
    "lowmem_imagic",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "safetensors",
    "xformers",
)


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages it computes with, as far as they are installed."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed
