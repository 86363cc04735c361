"""The doctor: versions, devices, memory, the kernels that a run would use, and plans for graphics cards."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..amounts import duration
from ..engine.device import COMPUTE_TYPES, pick_device, pick_dtype, resolve_attention
from ..errors import ConfigError, MemoryLimitError
from ..families import load_architecture
from ..layers.frozen import FrozenLinear8bit, Int8Conv2d
from ..pipeline.versions import versions
from ..planning.costs import Costs
from ..planning.duration import Speed, speed_of, training_seconds
from ..planning.plan import CUDA_CONTEXT_BYTES, plan
from ..settings.stages import EditConfig, base_problems
from ..settings.text import parse_bytes

_MAX_SIZE_PX = 8192
MANY = 40
"""Number of photos in a plan for many, above the slots of any pack."""


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


def plans(
    model: str,
    amounts: Sequence[str],
    config: EditConfig,
    *,
    size_px: int | None = None,
    photos: Sequence[int] = (1, MANY),
    speed: Speed | None = None,
    weights: str = "int8",
    checkpointing: bool = False,
) -> list[dict[str, Any]]:
    """Plans for graphics cards of these amounts of memory, for one photo and for many, as plain values.

    Nothing is downloaded for a model with a short name, and no weight is read.

    Args:
        model: name of a base model.
        amounts: such as ``8GB``.
        config: settings of all stages.
        size_px: side of the pictures; None for the model's own.
        photos: numbers of photos.
        speed: speed of a device, for the estimated seconds of training one photo; None for no estimate.
        weights: format of the frozen base.
        checkpointing: whether checkpointing is asked for.

    Raises:
        ConfigError: an amount, the size or the format is not valid.
        ModelError: there is no such model, or it cannot be trained.
    """
    budgets = [parse_bytes(amount) for amount in amounts]
    if not budgets:
        raise ConfigError("`vram` names no amount of memory, expected some such as 6GB,8GB")
    if problems := base_problems(device="auto", weights=weights, attention="auto"):
        raise ConfigError(problems)
    family = load_architecture(model)
    family.check_trainable()
    multiple = family.sizes.multiple
    if size_px is not None and (not multiple <= size_px <= _MAX_SIZE_PX or size_px % multiple):
        raise ConfigError(f"`size` is {size_px}, expected a multiple of {multiple} up to {_MAX_SIZE_PX}")
    size = (size_px, size_px) if size_px else None
    text, codec = (torch.float16 if fits else torch.bfloat16 for fits in (family.text_in_fp16, family.codec_in_fp16))
    # As a card of the present computes, see `pick_dtype`.
    dtype = COMPUTE_TYPES.get(weights, torch.bfloat16)
    costs = Costs(family, config, weights=weights, dtype=dtype, part_dtype=text, codec_dtype=codec, size=size)
    lines = []
    for amount, budget in zip(amounts, budgets, strict=True):
        for count in photos:
            line: dict[str, Any] = {"vram": amount, "photos": count, "plan": None, "reason": "", "seconds": None}
            try:
                fitting = plan(
                    costs,
                    config,
                    budget_bytes=budget,
                    jobs=count,
                    beside=count > 1,
                    weights=weights,
                    checkpointing=checkpointing,
                    context_bytes=CUDA_CONTEXT_BYTES,
                )
            except MemoryLimitError as error:
                line["reason"] = str(error)
            else:
                line["plan"] = fitting.as_json()
                if count == 1 and speed is not None:
                    line["seconds"] = training_seconds(
                        costs, speed, rows=fitting.rows, checkpointing=fitting.checkpointing
                    )
            lines.append(line)
    return lines


def speed_here(device: str = "auto", weights: str = "int8") -> Speed:
    """The measured speed of a device of this machine, for a base in some format; on a GPU the process keeps its context
    there.

    Raises:
        BackendUnavailableError: a named device is missing.
    """
    place = pick_device(device)
    return speed_of(place, pick_dtype(place, weights))


def plan_table(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The lines of a table of `plans`; its last column is the time of training one photo on this machine."""
    phases = ("encode", "embed", "finetune", "sample", "decode")
    head = ("memory", "photos", "at once", "rows a pass", "checkpointing", "sampling rows", "tiles", "text encoder")
    cascade = any(line["plan"] is not None and line["plan"]["in_turn"] for line in lines)
    rows = [(*head, *(["networks"] if cascade else []), *(f"{name} GB" for name in phases), "training here")]
    for line in lines:
        fitting, photos = line["plan"], "1" if line["photos"] == 1 else "many"
        if fitting is None:
            yield f"{line['vram']}, {photos} photos: {line['reason']}"
            continue
        switches = (
            "on" if fitting["checkpointing"] else "off",
            str(fitting["batch_rows"]),
            "on" if fitting["vae_tiling"] else "off",
            "CPU" if fitting["text_on_cpu"] else "GPU",
            *(["one" if fitting["in_turn"] else "all"] if cascade else []),
        )
        # A cascade tunes each of its networks in a phase of its own; the one that takes the most is shown.
        sizes = {name: phase["total"] for name, phase in fitting["phases"].items()}
        totals = (f"{max(sizes[full] for full in sizes if full.startswith(name)) / 1e9:.2f}" for name in phases)
        here = "" if line["seconds"] is None else f"about {duration(line['seconds'])}"
        rows.append((line["vram"], photos, str(fitting["slots"]), str(fitting["rows"]), *switches, *totals, here))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows if len(rows) > 1 else ():
        yield "  ".join(word.rjust(width) for word, width in zip(row, widths, strict=True))


def _tried(error_of: Callable[[torch.device], float], device: torch.device) -> str:
    """Whether a small 8-bit layer works on this device, forward and backward, and its error."""
    try:
        error = error_of(device)
    except Exception as reason:  # any error of a library or a driver, which users look up here
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
    memory: dict[str, Any] = {"CPU cores": os.cpu_count(), "torch threads": torch.get_num_threads()}
    try:
        memory["RAM"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        memory["RAM"] = "unknown"
    memory["disk free here"] = f"{shutil.disk_usage('.').free / 2**30:.1f} GiB"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        memory["GPU"] = torch.cuda.get_device_name(device)
        memory["GPU memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    else:
        memory["GPU"] = "none that torch can use"
    return memory
