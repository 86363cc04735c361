"""What this machine offers: versions, devices, memory, and the paths that would be taken."""

import os
import shutil
from typing import Any

import torch

from .base_model import pick_device, pick_dtype, resolve_attention
from .pipeline import versions


def examine() -> dict[str, dict[str, Any]]:
    """Findings by topic, as plain values."""
    device = pick_device("auto")
    dtype = str(pick_dtype(device, "int8")).removeprefix("torch.")
    return {
        "versions": versions(),
        "device": {"used by default": str(device), "compute type": dtype, **_memory(device)},
        "8-bit": {
            "linear layers": "int8 weights (bitsandbytes storage), expanded for each product",
            "convolutions": "int8 weights, expanded for each product",
            "optimiser": "Adam in fp32 over the adapters alone",
        },
        "attention": {
            "used by default": resolve_attention("auto", device),
            "xformers": versions().get("xformers", "not installed"),
        },
    }


def _memory(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"CPU cores": os.cpu_count(), "torch threads": torch.get_num_threads()}
    try:
        found["RAM"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        found["RAM"] = "unknown"
    found["disk free here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["GPU"] = torch.cuda.get_device_name(device)
        found["GPU memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        found["GPU"] = "none that torch can use"
    return found
