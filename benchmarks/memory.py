"""Bytes of a training step of Stable Diffusion 1.5 and XL, of this package and of stock libraries: one table, one JSON.

    python -m benchmarks.memory              counted on the meta device, and measured on this device
    python -m benchmarks.memory --counted    only counted: no weights, no device, two minutes

Three ways to train LoRA of rank 4 on attention: this package (every weight matrix and convolution in int8), peft on a
base in bfloat16, and peft on stock bitsandbytes (linear layers in int8). peft trains one adapter at a time, so its rows
are draws of one edit; ours are N edits. *Counted*: bytes of live tensors while the real code runs on the meta device
(`lowmem_imagic.planning.counting`), with temporary tensors but without a device's context and kernels' scratch memory.
*Measured*: the peak of a GPU's allocator, or on a CPU the resident memory over the memory before the weights. Figures
of a GPU are ``null`` without one.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor

from lowmem_imagic.diffusion.schedules import loss_per_edit
from lowmem_imagic.engine.memory import loading_memory, peak_bytes, reset_peak, resident_bytes
from lowmem_imagic.families import load_architecture
from lowmem_imagic.families.adapter_names import TARGETS, KohyaNames
from lowmem_imagic.families.stable_diffusion import AT_LATENTS
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.frozen import load_frozen, weight_bytes
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.counting import cost_of, fused_attention, peak_of
from lowmem_imagic.settings.presets import preset

from .goals import Line, fresh, in_gib, table
from .random_unet import CONFIGURATIONS, TOKENS, frozen_meta, meta_unet, random_weights
from .results import RESULTS, provenance, write_result

RANK = 4
PACKS = (1, 2, 4, 8, 16)
WAYS = {"ours": ("int8", True), "bf16 + peft": ("bf16", False), "bnb-int8 + peft": ("bnb-int8", False)}
"""Format of the frozen weights, and whether adapters are packed, by way of training."""
MIB = 2**20
ROW_GOALS_MIB = {False: 540.0, True: 165.0}
"""Goals for a row of Stable Diffusion 1.5 at its own size, without and with checkpointing."""
PEAK_GOALS_GIB = {False: 1.6, True: 1.3}
"""Goals for the peak of a GPU's allocator with weights, adapter, gradients and moments."""
XL_GOALS_GIB = {"resident": 2.6, "row": 3.4}
"""Goals for SDXL's UNet in int8, and for a checkpointed training row at 1024 px with weights and adapter."""
WITHIN = 0.1
"""Most that a measured peak may differ from the counted bytes, as a share of them."""
META = torch.device("meta")


@dataclass(frozen=True)
class Case:
    """A case to count or to measure."""

    model: str
    way: str
    checkpointing: bool
    rows: int = 1
    size_px: int | None = None
    """None is the model's own."""

    @property
    def name(self) -> str:
        """Its name in the table."""
        size = self.size_px or CONFIGURATIONS[self.model]["sample_size"] * 8
        how = "checkpointing" if self.checkpointing else "plain"
        return f"{self.model} {size} px, {self.way}, {how}, {self.rows} row{'s' if self.rows > 1 else ''}"


CASES = [
    Case(model, way, checkpointing, rows)
    for model in CONFIGURATIONS
    for way in WAYS
    for checkpointing in (False, True)
    for rows in (PACKS if way == "ours" else (1, 2))
]
MEASURED_ON_CPU = [
    *(Case("sd15", way, checkpointing, 1, 256) for way in WAYS for checkpointing in (False, True)),
    Case("sdxl", "ours", True, 1, 512),
]
"""On two cores a step of Stable Diffusion takes a minute at its own size."""


class Step:
    """A training step of a case on a device: forward and backward; the gradients stay.

    Args:
        case: the case.
        device: "meta" computes nothing.
        dtype: type of the arithmetic.
    """

    def __init__(self, case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        weights, packed = WAYS[case.way]
        self.case, self.device, self.dtype = case, device, dtype
        config = CONFIGURATIONS[case.model]
        if device.type == "meta":
            self.unet: Any = frozen_meta(case.model, weights=weights, dtype=dtype, lean=packed)
        else:
            from lowmem_imagic.families.lean_unet import make_lean

            self.unet = meta_unet(case.model)
            drawn = random_weights(meta_unet(case.model))
            load_frozen(self.unet, drawn, weights=weights, device=device, dtype=dtype, in_float=AT_LATENTS)
            if packed:
                make_lean(self.unet)
        self.weights = weight_bytes(self.unet)
        if case.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.pack: AdapterPack | None = None
        if packed:
            self.pack = AdapterPack(
                self.unet, KohyaNames(), count=case.rows, adapt="attn", rank=RANK, alpha=RANK, device=device
            )
            self.pack.enable_gradients()
            trained = [self.pack.weights]
        else:
            self.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS["attn"])))
            factors = [p for p in self.unet.parameters() if p.requires_grad]
            for p in factors:
                p.data = p.data.to(dtype)
                p.grad = torch.zeros_like(p)
            trained = [p.data for p in factors]
        # Weights, gradients and Adam's two moments: in fp32 for ours, in bfloat16 for the others, which takes less.
        self.adapters = 4 * sum(weights.nbytes for weights in trained)
        self._moments = [torch.zeros_like(weights) for weights in trained for _ in range(2)]
        side = case.size_px // 8 if case.size_px else config["sample_size"]
        latents = torch.zeros(case.rows, 4, side, side, device=device, dtype=dtype)
        self._latents = latents.contiguous(memory_format=torch.channels_last) if packed else latents
        self._text = torch.zeros(case.rows, TOKENS, config["cross_attention_dim"], device=device, dtype=dtype)
        self._timesteps = torch.full((case.rows,), 500, device=device)
        self._more: dict[str, Any] = {}
        if config.get("addition_embed_type"):
            pooled = torch.zeros(case.rows, 1280, device=device, dtype=dtype)
            ids = torch.zeros(case.rows, 6, device=device, dtype=dtype)
            self._more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}

    def run(self) -> None:
        """Runs the pass."""
        with self.pack.attached(self.unet) if self.pack is not None else nullcontext():
            predicted: Tensor = self.unet(
                self._latents, self._timesteps, encoder_hidden_states=self._text, **self._more
            ).sample
            loss_per_edit(predicted, torch.zeros_like(predicted), self.case.rows).sum().backward()


def counted(case: Case) -> dict[str, int]:
    """Bytes of a case, counted on the meta device."""
    step = Step(case, META)
    with fused_attention():
        activations = peak_of(step.run)
    return {
        "weights": step.weights,
        "adapters": step.adapters,
        "activations": activations,
        "total": step.weights + step.adapters + activations,
    }


def flops_of(case: Case) -> int:
    """Floating-point operations of a step, counted on the meta device."""
    with fused_attention():
        return cost_of(Step(case, META).run).flops


def measured(case: Case, device: torch.device) -> dict[str, Any]:
    """Peak bytes of loading and of two steps on a device."""
    # As in the package, for all cases: freed blocks must not count.
    with loading_memory(large=case.model == "sdxl") if device.type == "cpu" else nullcontext():
        # As in the package, where the plan is made first: its passes load the rest of the libraries.
        counted(case)
        gc.collect()
        before = 0 if device.type == "cuda" else resident_bytes() or 0
        reset_peak(device)
        step = Step(case, device)
    loaded = peak_bytes(device)
    reset_peak(device)
    # A second step has the first one's caches; the large model's would take minutes more.
    for _ in range(1 if case.model == "sdxl" and device.type == "cpu" else 2):
        step.run()
    peak = peak_bytes(device)
    return {
        "load_peak": None if loaded is None else loaded - before,
        "peak": None if peak is None else peak - before,
    }


def lines_of(found: list[dict[str, Any]]) -> Iterator[Line]:
    """The table: activations of a row, with goals for ours, and the measured peaks."""
    for entry in found:
        case = Case(**entry["case"])
        if entry["counted"] is not None:
            row = entry["counted"]["activations"] / case.rows / MIB
            judged = case.model == "sd15" and case.way == "ours" and case.rows == 1 and case.size_px is None
            yield Line(
                f"{case.name}: a row", round(row, 1), "MiB", ROW_GOALS_MIB[case.checkpointing] if judged else None
            )
        if entry["measured"] is not None:
            on_gpu = entry["device"] == "cuda"
            judged = on_gpu and case.model == "sd15" and case.way == "ours" and case.rows == 1
            goal = PEAK_GOALS_GIB[case.checkpointing] if judged else None
            yield Line(f"{case.name}: peak on {entry['device']}", in_gib(entry["measured"]["peak"]), "GiB", goal)
    yield from totals_of(found)


def totals_of(found: Sequence[Mapping[str, Any]]) -> Iterator[Line]:
    """Lines about SDXL: weights, whole rows against the stock libraries, the plan against the measured peak."""
    counts = {Case(**entry["case"]): entry["counted"] for entry in found if entry["device"] == "meta"}
    ours = Case("sdxl", "ours", True)
    yield Line("sdxl: the UNet in int8", in_gib(counts[ours]["weights"]), "GiB", XL_GOALS_GIB["resident"])
    for case in (Case(model, "ours", c, rows) for model in CONFIGURATIONS for c in (False, True) for rows in (1, 2)):
        # Two rows of ours are two edits with an adapter each, and of the others two draws of one edit.
        others = [counts[replace(case, way=way)]["total"] for way in WAYS if way != case.way]
        name = f"{case.name}: with weights and adapters, at most the least of the others"
        yield Line(name, in_gib(counts[case]["total"]), "GiB", in_gib(min(others)))
    config = preset("balanced")
    costs = Costs(load_architecture("sdxl"), config, weights="int8", dtype=torch.bfloat16, part_dtype=torch.bfloat16)
    row = costs.networks + costs.adapters(1) + costs.train(1, 1, checkpointing=True)
    yield Line("sdxl 1024 px, balanced, checkpointing, 1 row: in training", in_gib(row), "GiB", XL_GOALS_GIB["row"])
    for entry in found:
        if entry["measured"] is not None and entry["case"]["model"] == "sdxl" and entry["device"] == "cpu":
            ratio = round(entry["measured"]["peak"] / entry["counted"]["total"], 4)
            yield Line(f"{Case(**entry['case']).name}: measured peak to the plan", ratio, "times", 1 + WITHIN)


def arithmetic() -> tuple[list[dict[str, Any]], list[Line]]:
    """Floating-point operations of our steps and peft's, and lines with their ratios."""
    found, lines = list[dict[str, Any]](), list[Line]()
    for case in (Case(model, "ours", checkpointing) for model in CONFIGURATIONS for checkpointing in (False, True)):
        pair = [case, replace(case, way="bf16 + peft")]
        flops = [flops_of(each) for each in pair]
        found += [{"case": asdict(each), "flops": count} for each, count in zip(pair, flops, strict=True)]
        goal = 1.0 if case.checkpointing else None
        ratio = round(flops[0] / flops[1], 4)
        lines.append(Line(f"{case.name}: arithmetic of a step to bf16 + peft", ratio, "times", goal))
    return found, lines


def main() -> int:
    """Command line; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counted", action="store_true", help="only count; nothing is written without --out")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here [benchmarks/results]")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        # One process per measurement.
        words = json.loads(args.case)
        print(json.dumps(measured(Case(**words["case"]), torch.device(words["device"]))))
        return 0
    origin = provenance()
    found: list[dict[str, Any]] = []
    for case in CASES:
        print(f"counting {case.name}", file=sys.stderr)
        found.append({"case": asdict(case), "device": "meta", "counted": counted(case), "measured": None})
    if not args.counted:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for case in CASES if device == "cuda" else MEASURED_ON_CPU:
            print(f"measuring {case.name}", file=sys.stderr)
            words = {"case": asdict(case), "device": device}
            result = fresh("benchmarks.memory", "--case", json.dumps(words))
            entry = {"case": asdict(case), "device": device, "counted": counted(case), "measured": result}
            found.append(entry)
    operations, more = arithmetic()
    lines = [*lines_of(found), *more]
    if not torch.cuda.is_available():
        for checkpointing, goal in PEAK_GOALS_GIB.items():
            lines.append(Line(f"{Case('sd15', 'ours', checkpointing).name}: peak on cuda", None, "GiB", goal))
    print("\n".join(table(lines)))
    passed = all(line.passed is not False for line in lines)
    if args.out or not args.counted:
        result = {
            "partial": args.counted,
            "cases": found,
            "arithmetic": operations,
            "gpu": None if not torch.cuda.is_available() else torch.cuda.get_device_name(),
            "lines": [line.as_json() for line in lines],
            "passed": passed,
        }
        print(f"result: {write_result('memory', result, path=args.out or RESULTS / 'memory.json', origin=origin).name}")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
