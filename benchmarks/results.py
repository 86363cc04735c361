"""Writes one JSON file per benchmark, with the measurements, the code's commit and the kind of machine.

Equal content gives equal bytes: keys are sorted. The file never has a host name, a user name or a path of the machine;
payloads name models by their label.
"""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lowmem_imagic.storage.atomic import write_bytes

RESULTS = Path(__file__).parent / "results"
"""Folder of full runs."""

PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "xformers",
    "safetensors",
    "tokenizers",
    "numpy",
    "pillow",
)
"""Packages whose version can affect a measurement."""

_REPOSITORY = Path(__file__).parent.parent


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Origin of the numbers: date, commit, versions, processor, device; None for unknown entries.

    Call it at the start of a run, when the code is loaded: files may change during the measurement.
    """
    return {
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "git": _git_state(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "device": _describe(torch.device(device)),
    }


def write_result(
    name: str,
    payload: Mapping[str, Any],
    *,
    path: Path | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `payload` with its provenance atomically; returns the path.

    A result measured with uncommitted changes is written, too, and marked (``provenance.git.dirty``).

    Args:
        name: The benchmark; the file is ``results/NAME.json``.
        payload: Plain JSON values, None for a missing measurement.
        path: Another path for the file.
        origin: The run's `provenance`, taken at its start; by default taken now, for the CPU.

    Raises:
        ValueError: A number is NaN or infinite (use None for a failed measurement).
        OutputUnwritableError: The file cannot be written.
    """
    target = path or RESULTS / f"{name}.json"
    content = {**payload, "benchmark": name, "provenance": dict(origin or provenance())}
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(target, text.encode(), overwrite=True)
    return target


def _git_state() -> dict[str, Any]:
    """The commit, and whether files differ from it; None for both outside a checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ("git", *words), cwd=_REPOSITORY, capture_output=True, text=True, timeout=30, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # Otherwise an unpacked source archive inside another project's checkout would report that project.
    root = ask("rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != _REPOSITORY.resolve():
        return {"commit": None, "dirty": None}
    # Results do not influence a measurement, and a series of benchmarks writes them one after the other.
    changes = ask("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return {"commit": ask("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str | None:
    """The processor's name from the system."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or None


def _describe(device: torch.device) -> dict[str, Any]:
    """The device's kind, and a GPU's name, memory and CUDA version."""
    if device.type != "cuda":
        return {"type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
    }
