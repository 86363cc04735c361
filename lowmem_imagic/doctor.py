"""What this machine offers: versions, devices, memory, and the paths that would be taken."""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .base_model import pick_device, pick_dtype, resolve_attention
from .pipeline import versions
from .quantize import FrozenLinear8bit, Int8Conv2d


def examine() -> dict[str, dict[str, Any]]:
    """Findings by topic, as plain values."""
    device = pick_device("auto")
    dtype = str(pick_dtype(device, "int8")).removeprefix("torch.")
    return {
        "versions": versions(),
        "device": {"used by default": str(device), "compute type": dtype, **_memory(device)},
        "8-bit": {
            "linear layers": _tried(_linear_error, device),
            "convolutions": _tried(_convolution_error, device),
            "optimiser": "Adam in fp32 over the adapters alone",
        },
        "attention": {
            "used by default": resolve_attention("auto", device),
            "xformers": versions().get("xformers", "not installed"),
        },
    }


def _tried(error_of: Callable[[torch.device], float], device: torch.device) -> str:
    """What comes of a small 8-bit layer on this device, forward and backward."""
    try:
        error = error_of(device)
    except Exception as reason:  # whatever a library or driver raises, this is where a user looks for it
        return f"int8 weights FAIL on {device}: {type(reason).__name__}: {str(reason).splitlines()[0][:160]}"
    return f"int8 weights work on {device} (tried: {100 * error:.1f} % from exact)"


def _linear_error(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 96, generator=generator), torch.randn(32, 96, generator=generator)
    layer = FrozenLinear8bit.from_weights(weight, None, device)
    return _error(layer, x.to(device), F.linear(x, weight))


def _convolution_error(device: torch.device) -> float:
    generator = torch.Generator().manual_seed(0)
    exact = nn.Conv2d(16, 24, 3, padding=1, bias=False)
    weight, x = torch.randn(exact.weight.shape, generator=generator), torch.randn(2, 16, 8, 8, generator=generator)
    layer = Int8Conv2d.from_weights(exact, weight, None, device)
    return _error(layer, x.to(device), F.conv2d(x, weight, padding=1))


def _error(layer: nn.Module, x: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error of a layer's output; its backward pass is run as well."""
    y = layer(x.requires_grad_())
    y.sum().backward()
    assert x.grad is not None
    return float((y.detach().cpu() - expected).norm() / expected.norm())


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
