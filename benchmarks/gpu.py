"""What a GPU does with edits of Stable Diffusion 1.5: whole edits, cards of 8 and 12 GB, kernels; one table, one JSON.

    python -m benchmarks.gpu                     everything, a few minutes on an H200
    python -m benchmarks.gpu edits cards         some parts

Weights are random, everything else is the package: `packing`, `inversion` and `sample` as `edit` calls them, with the
preset ``balanced``, but for text encoder and autoencoder. *edits*: seconds of whole edits, trained and rendered at
eight etas, one alone and sixteen in a pack. *cards*: the plan for a card of 8 and of 12 GB, of which the allocator
gives no more (``set_per_process_memory_fraction``), and what its training and sampling then take. *steps*: seconds of
a training step with xformers and with torch's attention, as it is and recorded as a CUDA graph (`replay`), and how far
the weights of recorded training are from the others'. Without a GPU every figure is ``null``.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowmem_imagic.accounting import fused_attention
from lowmem_imagic.adapters import AdapterPack
from lowmem_imagic.base_model import BaseModel, pick_dtype, resolve_attention
from lowmem_imagic.config import EditConfig
from lowmem_imagic.diffusion import coarse
from lowmem_imagic.inversion import own_noise
from lowmem_imagic.memory import peak_bytes, reset_peak
from lowmem_imagic.packing import Pack, Task, TrainedEdit
from lowmem_imagic.pipeline import COARSE_SIDE
from lowmem_imagic.planning import Budget, plan_for
from lowmem_imagic.presets import preset
from lowmem_imagic.sample import Cell, sample

from .goals import Line, fresh, in_gib, table
from .memory import META, Case, Step
from .random_unet import random_sd15
from .results import RESULTS, provenance, write_result
from .speed import matmul_rate

EDITS = 16
"""In a pack."""
ETAS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CARDS = ("8GB", "12GB")
CARD_STEPS = 3
"""Of each stage: peaks do not depend on how many there are."""
ALONE_GOAL_S, PACKED_GOAL_S, RATIO_GOAL, SHARE_GOAL = 12.0, 3.0, 8.0, 0.4
PREDICTION_GOAL = 0.1
"""How far a phase may be from its prediction, as a share of it."""
ROUNDING_GOAL = 1e-2
"""How far, as a share of their norm, the weights of recorded training may be from those of any other, in bfloat16."""
WAYS = [(attention, replays) for attention in ("sdpa", "xformers") for replays in (False, True)]


@dataclass(frozen=True)
class Made:
    """What was made of some tasks."""

    edits: list[TrainedEdit]
    noise: list[Tensor]
    """The photo's own of each, (C, H, W)."""
    photos: Tensor
    """(N, C, H, W)."""
    targets: Tensor
    """(N, T, D)."""


def tasks_of(base: BaseModel, count: int) -> tuple[list[Task], Made]:
    """Tasks with photos of noise, each with its own sentence, and what is known of them."""
    photos = torch.randn(count, *base.family.latent_shape, generator=torch.Generator().manual_seed(1))
    targets = base.encode_text([f"sentence {number}" for number in range(count)])
    generators = [torch.Generator().manual_seed(number) for number in range(count)]
    noise = [own_noise(base, photo, draw).half().float() for photo, draw in zip(photos, generators, strict=True)]
    tasks = [Task(*parts) for parts in zip(photos, targets, generators, noise, strict=True)]
    return tasks, Made([], noise, photos, targets)


def train(
    base: BaseModel, config: EditConfig, count: int, *, slots: int, max_rows: int | None = None, steps: Any = None
) -> Made:
    """Some edits, from inversion to adapters; `steps` is called after each step as a pack's progress is."""
    tasks, made = tasks_of(base, count)
    pack = Pack(base, tasks, config, slots=slots, count=count, max_rows=max_rows, progress=steps)
    for group in pack.run():
        made.edits.extend(group)
    made.edits.sort(key=lambda edit: edit.number)
    return made


def render(base: BaseModel, config: EditConfig, made: Made, etas: Sequence[float]) -> Tensor:
    """Latents (N * etas, C, H, W) of every edit at every eta."""
    pack = AdapterPack.load(base.unet, [edit.adapter for edit in made.edits], device=base.device)
    return sample(
        base,
        pack,
        made.targets,
        torch.stack([edit.optimized_embedding for edit in made.edits]),
        [Cell(number, eta, 0) for number in range(len(made.edits)) for eta in etas],
        config.sample,
        coarse_latents=coarse(made.photos, COARSE_SIDE),
        inverted_noise=torch.stack(made.noise),
    )


def whole_edits(base: BaseModel, config: EditConfig, count: int, etas: Sequence[float]) -> dict[str, float]:
    """Seconds of some edits, trained side by side and rendered, after a short one that warms up."""
    short = replace(config, embed=replace(config.embed, steps=1), finetune=replace(config.finetune, steps=1))
    render(base, short, train(base, short, count, slots=count), etas[:1])
    _wait(base)
    started = time.perf_counter()
    made = train(base, config, count, slots=count)
    _wait(base)
    trained = time.perf_counter()
    render(base, config, made, etas)
    _wait(base)
    return {"train_s": round(trained - started, 3), "sample_s": round(time.perf_counter() - trained, 3)}


def card(base: BaseModel, config: EditConfig, budget: Budget, jobs: int) -> dict[str, Any]:
    """The plan for a budget, and the peak bytes of what it plans."""
    plan = plan_for(base, config, budget, jobs=jobs)
    assert plan is not None
    few = replace(
        config,
        embed=replace(config.embed, steps=CARD_STEPS),
        finetune=replace(config.finetune, steps=CARD_STEPS),
        sample=replace(config.sample, batch_rows=plan.batch_rows),
    )
    made = train(base, few, plan.slots, slots=plan.slots, max_rows=plan.rows)
    peaks = {stage: made.edits[0].measured[stage]["peak_bytes"] for stage in ("embed", "finetune")}
    reset_peak(base.device)
    # As many images as fill a batch, guided ones taking two rows each.
    render(base, few, made, ETAS)
    peaks["sample"] = peak_bytes(base.device)
    # An allocator knows nothing of what was taken before any tensor.
    predicted = {name: plan.phases[name].total - plan.phases[name].context for name in peaks}
    return {
        "plan": plan.as_json(),
        "peaks": {name: {"predicted": predicted[name], "measured": peak} for name, peak in peaks.items()},
        "rungs": base.rungs,
    }


def paced(base: BaseModel, config: EditConfig, slots: int, steps: int) -> tuple[float, Tensor]:
    """Seconds of a step of stage 2 of a full pack, one row an edit; and the factors that it trains (N, P)."""
    only = replace(
        config,
        embed=replace(config.embed, steps=0),
        finetune=replace(config.finetune, steps=steps, draws=1, keep=1.0, anchor=0.0),
    )
    ends: list[float] = []
    made = train(base, only, slots, slots=slots, steps=lambda *_: ends.append(time.perf_counter()))
    # A step ends with its losses on the CPU. The first half warms up.
    seconds = statistics.median(b - a for a, b in zip(ends[steps // 2 :], ends[steps // 2 + 1 :], strict=False))
    factors = [[f.flatten() for down, up, _ in edit.adapter.values() for f in (down, up)] for edit in made.edits]
    return seconds, torch.stack([torch.cat(parts) for parts in factors])


def apart(one: Tensor, other: Tensor) -> float:
    """How far two tensors are from each other, as a share of the second's norm."""
    return float((one - other).norm() / other.norm())


def _wait(base: BaseModel) -> None:
    if base.device.type == "cuda":
        torch.cuda.synchronize(base.device)


def _base(device: torch.device, attention: str = "auto") -> BaseModel:
    return random_sd15(
        weights="int8",
        device=device,
        dtype=pick_dtype(device, "int8"),
        checkpointing=False,
        attention=resolve_attention(attention, device),
    )


def _measure(words: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in this process."""
    device, config = torch.device("cuda"), preset("balanced")
    if "edits" in words:
        return whole_edits(_base(device), config, words["edits"], ETAS)
    if "card" in words:
        budget = Budget.of(device, words["card"])
        assert budget is not None
        return card(_base(device), config, budget, EDITS)
    base = _base(device, words["attention"])
    base.replays = words["replays"]
    seconds, _ = paced(base, config, words["slots"], 12)
    # Rounding grows with every step of Adam, and differs between any two runs.
    _, few = paced(base, config, words["slots"], 2)
    base.replays = False
    _, plain = paced(base, config, words["slots"], 2)
    _, again = paced(base, config, words["slots"], 2)
    # With attention's adapters alone: a little less than is done.
    counter = FlopCounterMode(display=False)
    with fused_attention(), counter:
        Step(Case("sd15", "ours", False, words["slots"]), META).run()
    flops, rate = counter.get_total_flops(), matmul_rate(device, base.dtype)
    return {
        "step_s": round(seconds, 5),
        "apart": apart(few, plain),
        "apart_unrecorded": apart(again, plain),
        "flops": flops,
        "matmul_flops_per_s": round(rate),
        "share": round(flops / seconds / rate, 4),
    }


def _fresh(words: dict[str, Any]) -> dict[str, Any] | None:
    return fresh("benchmarks.gpu", "--one", json.dumps(words)) if torch.cuda.is_available() else None


def edits() -> tuple[dict[str, Any], list[Line]]:
    """Seconds of whole edits, alone and in a pack."""
    alone, packed = (_fresh({"edits": count}) for count in (1, EDITS))
    seconds = [
        None if found is None else round((found["train_s"] + found["sample_s"]) / count, 3)
        for found, count in ((alone, 1), (packed, EDITS))
    ]
    one, each = seconds
    what = f"sd15 512 px, `balanced` and {len(ETAS)} etas"
    return {"alone": alone, "packed": packed, "count": EDITS}, [
        Line(f"{what}: an edit alone", one, "s", ALONE_GOAL_S),
        Line(f"{what}: an edit of {EDITS} packed", each, "s", PACKED_GOAL_S),
        Line(
            f"{what}: edits an hour, {EDITS} packed to alone",
            round(one / each, 3) if one and each else None,
            "times",
            RATIO_GOAL,
            at_least=True,
        ),
    ]


def cards() -> tuple[dict[str, Any], list[Line]]:
    """What small cards' plans take."""
    found, lines = {}, list[Line]()
    for size in CARDS:
        found[size] = result = _fresh({"card": size})
        peaks = (result or {}).get("peaks", {})
        off = [abs(p["measured"] / p["predicted"] - 1) for p in peaks.values()]
        lines.append(Line(f"sd15, a card of {size}: peak", in_gib(_largest(peaks)), "GiB"))
        name = f"sd15, a card of {size}: furthest of a phase from its prediction"
        lines.append(Line(name, round(max(off), 4) if off else None, "", PREDICTION_GOAL))
    return found, lines


def _largest(peaks: dict[str, Any]) -> float | None:
    return max((peak["measured"] for peak in peaks.values()), default=None)


def steps() -> tuple[dict[str, Any], list[Line]]:
    """Seconds of a step with each kind of attention, as it is and recorded."""
    found, lines = [], list[Line]()
    for slots in (1, EDITS):
        for attention, replays in WAYS:
            words = {"attention": attention, "replays": replays, "slots": slots}
            result = _fresh(words)
            found.append({**words, "measured": result})
            values = result or {}
            name = f"sd15 512 px, {slots} in a pack, {attention}{', recorded' if replays else ''}"
            lines.append(Line(f"{name}: a step", values.get("step_s"), "s"))
            goal = SHARE_GOAL if slots == EDITS else None
            lines.append(Line(f"{name}: share of matmul rate", values.get("share"), "", goal, at_least=True))
            if replays:
                lines.append(Line(f"{name}: weights from those unrecorded", values.get("apart"), "", ROUNDING_GOAL))
    return {"timed": found}, lines


PARTS: dict[str, Callable[[], tuple[dict[str, Any], list[Line]]]] = {"edits": edits, "cards": cards, "steps": steps}


def main() -> int:
    """Command line; 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here [benchmarks/results]")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        # A process of its own for each measurement.
        print(json.dumps(_measure(json.loads(args.one))))
        return 0
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}, expected {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin, found, lines = provenance(device), dict[str, Any](), list[Line]()
    for part in args.parts or PARTS:
        found[part], more = PARTS[part]()
        print("\n".join(table(more)), flush=True)
        lines += more
    passed = all(line.passed is not False for line in lines)
    if args.out or not args.parts:
        result = {"partial": bool(args.parts), **found, "lines": [line.as_json() for line in lines], "passed": passed}
        print(f"result: {write_result('gpu', result, path=args.out or RESULTS / 'gpu.json', origin=origin).name}")
    return int(not passed)


if __name__ == "__main__":
    raise SystemExit(main())
