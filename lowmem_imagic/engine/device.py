"""The device that a base runs on, the type of its arithmetic there, and its attention kernels."""

import logging

import torch

from ..errors import BackendUnavailableError
from ..unexpected import first_line

log = logging.getLogger(__name__)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if torch sees a GPU, else the CPU.

    Raises:
        BackendUnavailableError: a named device is missing.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendUnavailableError("device cuda was asked for, but torch sees no CUDA GPU; use `device=cpu`")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return device


COMPUTE_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_dtype(device: torch.device, weights: str, compute: str = "auto") -> torch.dtype:
    """The compute type.

    "auto" takes the type of the weights if they are bf16 or fp32. For 8-bit weights it takes bfloat16 on GPUs that
    support it, fp16 on older ones (RTX 20xx, GTX 16xx), and fp32 on CPUs, as most CPUs are slower in bfloat16.
    """
    if compute != "auto":
        return COMPUTE_TYPES[compute]
    if weights in COMPUTE_TYPES:
        return COMPUTE_TYPES[weights]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def resolve_attention(name: str, device: torch.device) -> str:
    """``"xformers"`` or ``"sdpa"``; "auto" takes xformers on CUDA if it is installed and runs.

    Raises:
        BackendUnavailableError: xformers was asked for by name and does not run.
    """
    if name == "sdpa":
        return name
    problem = _NOT_ON_CPU if device.type == "cpu" else _xformers_problem(device)
    if name == "xformers" and problem:
        raise BackendUnavailableError(
            f"attention xformers was asked for, but {problem}; use `attention=auto` or `attention=sdpa`"
        )
    if problem not in ("", _NOT_ON_CPU, _NOT_INSTALLED):
        log.warning("xformers is installed and not used: %s", problem)
    return "sdpa" if problem else "xformers"


_NOT_ON_CPU = "it has no CPU kernels"
_NOT_INSTALLED = "it is not installed (pip install xformers)"


def _xformers_problem(device: torch.device) -> str:
    """The reason why xformers does not run on a device, found by trying it; "" if it runs.

    An installation for another CUDA or torch version is imported without an error but has no kernels.
    """
    log_of_xformers = logging.getLogger("xformers")
    level = log_of_xformers.level
    try:
        log_of_xformers.setLevel(logging.ERROR)
        from xformers.ops import memory_efficient_attention

        # Tried on this device in fp16: diffusers' own probe always takes the first GPU and fp32.
        tried = torch.zeros(1, 8, 2, 40, device=device, dtype=torch.float16, requires_grad=True)
        memory_efficient_attention(tried, tried, tried).sum().backward()
        return ""
    except ImportError:
        return _NOT_INSTALLED
    except Exception as error:
        # NotImplementedError, RuntimeError or AttributeError, depending on how the installation is broken.
        return f"it does not run on {device} ({first_line(error)})"
    finally:
        log_of_xformers.setLevel(level)
