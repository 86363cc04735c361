"""Edits of Stable Diffusion 1.5 on a GPU: whole edits, cards of 8 and 12 GB, kernels; one table, one JSON.

    python -m benchmarks.gpu                     everything
    python -m benchmarks.gpu edits cards         some parts

Weights are random, all code is the package's: `inversion`, `pack`, `truncation` and `sample` are called as by `edit`,
with the preset ``balanced``, but without text encoder and autoencoder. *edits*: seconds of whole edits, trained and
rendered at eight etas, one alone and sixteen in a pack. *cards*: the plan for a card of 8 and of 12 GB, with the
allocator limited to that (``set_per_process_memory_fraction``), and the measured bytes of its training and sampling.
*steps*: seconds of a training step with xformers and with torch's attention, plain and recorded as a CUDA graph, and
the difference of results between recorded and plain training, against the difference between two plain runs. The file
is written after every measurement. Without a GPU every figure is ``null``.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowmem_imagic.diffusion.schedules import COARSE_SIDE, coarse
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.engine.device import pick_dtype, resolve_attention
from lowmem_imagic.engine.memory import peak_bytes, reset_peak
from lowmem_imagic.families.conditioning import Conditioning
from lowmem_imagic.families.portable import portable
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.truncation import truncated
from lowmem_imagic.planning.plan import Budget, Plan, plan_for, planned
from lowmem_imagic.sampling.inversion import own_noise
from lowmem_imagic.sampling.sample import Cell, sample
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig
from lowmem_imagic.training.pack import Pack, TrainedEdit, TrainingInput

from .edit_methods import EMBEDS, embeds
from .goals import Line, fresh, in_gib, table
from .memory import Case
from .random_unet import random_sd15
from .results import RESULTS, provenance, write_result
from .speed import flops_of, matmul_rate

EDITS = 16
"""Number of edits in a pack."""
ETAS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CARDS = ("8GB", "12GB")
CARD_STEPS = 3
"""Steps of each stage; peaks do not depend on their number."""
ALONE_GOAL_S, PACKED_GOAL_S, RATIO_GOAL, SHARE_GOAL = 12.0, 3.0, 8.0, 0.4
PREDICTION_GOAL = 0.1
"""Largest difference of a phase from its prediction, as a share of it."""
ROUNDING_GOAL = 3.0
"""Largest distance of a recorded run from a plain run, in multiples of the distance of two plain runs."""
ATTENTION = ("sdpa", "xformers")
TIMED_STEPS, COMPARED_STEPS = 12, 4
TIMEOUT_S = 300.0
"""Time limit of a measurement."""


Measured = Iterator[tuple[Any, list[Line]]]
"""Yields a part of the result and of the table after every measurement."""


@dataclass(frozen=True)
class Made:
    """Results of some tasks."""

    edits: list[TrainedEdit]
    noise: list[Tensor]
    """Each photo's own noise, (C, H, W)."""
    photos: Tensor
    """(N, C, H, W)."""
    targets: Conditioning
    """N rows."""


def tasks_of(base: BaseModel, count: int, *, invert: bool) -> tuple[list[TrainingInput], Made]:
    """Tasks with photos of noise, each with its own sentence, and their data; `invert`: with the photos' own noise."""
    denoiser = base.denoisers[0]
    photos = torch.randn(count, *denoiser.shape(base.sizes.own), generator=torch.Generator().manual_seed(1))
    targets = base.encode_text([f"sentence {number}" for number in range(count)])
    generators = [torch.Generator().manual_seed(number) for number in range(count)]
    noise = [
        own_noise(base, base.denoisers[0], photo, draw).half().float()
        if invert
        else torch.randn(photo.shape, generator=draw)
        for photo, draw in zip(photos, generators, strict=True)
    ]
    tasks = [
        TrainingInput({"unet": photo}, targets.rows([number]), draw, {"unet": own})
        for number, (photo, draw, own) in enumerate(zip(photos, generators, noise, strict=True))
    ]
    return tasks, Made([], noise, photos, targets)


def train(
    base: BaseModel,
    config: EditConfig,
    count: int,
    *,
    slots: int,
    max_rows: int | None = None,
    progress: Callable[..., None] | None = None,
) -> Made:
    """Some edits, from inversion to the stored adapter; `progress` is the pack's."""
    tasks, made = tasks_of(base, count, invert=config.sample.start == "inverted")
    pack = Pack(base, tasks, config, slots=slots, count=count, max_rows=max_rows, progress=progress)
    for group in pack.run():
        for edit in group:
            if edit.error is not None:
                raise edit.error
            adapter = truncated(edit.adapters["unet"], config.finetune.keep)
            edit.adapters = {"unet": portable(adapter, base.network(base.denoisers[0]))}
            made.edits.append(edit)
    made.edits.sort(key=lambda edit: edit.number)
    return made


def render(base: BaseModel, config: EditConfig, made: Made, etas: Sequence[float]) -> Tensor:
    """Latents (N * etas, C, H, W) of every edit at every eta."""
    denoiser, adapters = base.denoisers[0], [edit.adapters["unet"] for edit in made.edits]
    pack = AdapterPack.load(base.network(denoiser), denoiser.names, adapters, device=base.device)
    return sample(
        base,
        {"unet": pack},
        made.targets,
        embeds(torch.stack([edit.conditioning[EMBEDS] for edit in made.edits])),
        [Cell(number, eta, 0) for number in range(len(made.edits)) for eta in etas],
        config.sample,
        coarse={"unet": coarse(made.photos, COARSE_SIDE)},
        noise={"unet": torch.stack(made.noise)},
    )["unet"]


def whole_edits(base: BaseModel, config: EditConfig, count: int, etas: Sequence[float]) -> dict[str, float]:
    """Seconds of some edits, trained side by side and rendered, after a short warm-up."""
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
    """The plan for a budget, and its measured peak bytes."""
    plan = plan_for(base, config, budget, jobs=jobs)
    assert plan is not None
    few = replace(
        config,
        embed=replace(config.embed, steps=CARD_STEPS),
        finetune=replace(config.finetune, steps=CARD_STEPS),
        sample=replace(config.sample, batch_rows=plan.batch_rows),
    )
    with planned(base, plan, budget):
        peaks = _peaks(base, few, plan)
    # The allocator does not count the memory in use before any tensor.
    predicted = {name: plan.phases[name].total - plan.phases[name].context for name in peaks}
    return {
        "plan": plan.as_json(),
        "peaks": {name: {"predicted": predicted[name], "measured": peak} for name, peak in peaks.items()},
        "rungs": base.fallbacks,
    }


def _peaks(base: BaseModel, few: EditConfig, plan: Plan) -> dict[str, Any]:
    """Peak bytes of a plan's training and sampling."""
    made = train(base, few, plan.slots, slots=plan.slots, max_rows=plan.rows)
    peaks = {stage: made.edits[0].measured[stage]["peak_bytes"] for stage in ("embed", "finetune")}
    reset_peak(base.device)
    # One edit at a time, as on the command line, with enough pictures to fill a batch: a guided one takes two rows.
    first = replace(
        made, edits=made.edits[:1], noise=made.noise[:1], photos=made.photos[:1], targets=made.targets.rows([0])
    )
    render(base, few, first, [number / plan.batch_rows for number in range(plan.batch_rows)])
    peaks["sample"] = peak_bytes(base.device)
    return peaks


@dataclass(frozen=True)
class Paced:
    """A full pack in stage 2, one row per edit."""

    step_s: float
    """Median of the second half of its steps."""
    came_to: Tensor
    """Losses of all steps, and the factors that start at zero, of all edits."""


def paced(base: BaseModel, config: EditConfig, slots: int, steps: int) -> Paced:
    """Some steps of stage 2, all at the full learning rate, so that each changes the weights."""
    only = replace(
        config,
        embed=replace(config.embed, steps=0),
        finetune=replace(config.finetune, steps=steps, draws=1, keep=1.0, anchor=0.0, final_rate=1.0),
        sample=replace(config.sample, start="noise"),
    )
    ends: list[float] = []
    # A step ends with its losses on the CPU.
    made = train(base, only, slots, slots=slots, progress=lambda *_: ends.append(time.perf_counter()))
    half = steps // 2
    found = [torch.tensor(edit.losses["finetune"]) for edit in made.edits]
    found += [up.flatten() for edit in made.edits for _, up, _ in edit.adapters["unet"].values()]
    return Paced(statistics.median(b - a for a, b in pairwise(ends[half - 1 :])), torch.cat(found))


def compared(base: BaseModel, config: EditConfig, slots: int) -> dict[str, Any]:
    """Seconds of a plain and of a recorded step, and the distances between runs."""
    base.replays = False
    plain, again = (paced(base, config, slots, COMPARED_STEPS).came_to for _ in range(2))
    timed = paced(base, config, slots, TIMED_STEPS).step_s
    base.replays = True
    recorded = paced(base, config, slots, COMPARED_STEPS).came_to
    replayed = paced(base, config, slots, TIMED_STEPS).step_s
    base.replays = False
    return {
        "step_s": round(timed, 5),
        "recorded_step_s": round(replayed, 5),
        "apart": apart(again, plain),
        "recorded_apart": apart(recorded, plain),
    }


def apart(one: Tensor, other: Tensor) -> float:
    """Distance of two tensors, as a share of the second's norm."""
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
        base = _base(device)
        base.replays = words["replays"]
        return whole_edits(base, config, words["edits"], ETAS)
    if "card" in words:
        budget = Budget.of(device, words["card"])
        assert budget is not None
        return card(_base(device), config, budget, EDITS)
    base, slots = _base(device, words["attention"]), words["slots"]
    found = compared(base, config, slots)
    # Counted with adapters on attention only, slightly less than the real arithmetic.
    flops, rate = flops_of(Case("sd15", "ours", False, slots)), matmul_rate(device, base.dtype)
    shares = {f"{how}share": round(flops / found[f"{how}step_s"] / rate, 4) for how in ("", "recorded_")}
    return {**found, **shares, "flops": flops, "matmul_flops_per_s": round(rate)}


def _fresh(words: dict[str, Any]) -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    print(f"measuring {words}", file=sys.stderr)
    return fresh("benchmarks.gpu", "--one", json.dumps(words), timeout_s=TIMEOUT_S)


def edits() -> Measured:
    """Seconds of whole edits, alone and in a pack."""
    found: dict[str, Any] = {"count": EDITS, "runs": []}
    seconds: dict[tuple[int, bool], float | None] = {}
    for count, replays in ((1, False), (1, True), (EDITS, False), (EDITS, True)):
        words = {"edits": count, "replays": replays}
        result = _fresh(words)
        found["runs"].append({**words, "measured": result})
        whole = None if result is None else (result["train_s"] + result["sample_s"]) / count
        seconds[count, replays] = whole and round(whole, 3)
        what = f"sd15 512 px, `balanced` and {len(ETAS)} etas"
        one, recorded = (seconds.get((1, replays)) for replays in (False, True))
        plain, each = (seconds.get((EDITS, replays)) for replays in (False, True))
        ratio = round(recorded / each, 3) if recorded and each else None
        yield (
            found,
            [
                Line(f"{what}: an edit alone", recorded, "s", ALONE_GOAL_S),
                Line(f"{what}: the same, steps not recorded", one, "s"),
                Line(f"{what}: an edit of {EDITS} packed", each, "s", PACKED_GOAL_S),
                Line(f"{what}: the same, steps not recorded", plain, "s"),
                Line(f"{what}: edits an hour, {EDITS} packed to alone", ratio, "times", RATIO_GOAL, at_least=True),
            ],
        )


def cards() -> Measured:
    """Plans for small cards, and their measured peaks."""
    found, lines = {}, list[Line]()
    for size in CARDS:
        found[size] = result = _fresh({"card": size})
        peaks = (result or {}).get("peaks", {})
        off = [abs(p["measured"] / p["predicted"] - 1) for p in peaks.values()]
        largest = max((peak["measured"] for peak in peaks.values()), default=None)
        lines.append(Line(f"sd15, a card of {size}: peak", in_gib(largest), "GiB"))
        name = f"sd15, a card of {size}: furthest of a phase from its prediction"
        lines.append(Line(name, round(max(off), 4) if off else None, "", PREDICTION_GOAL))
        yield found, lines


def steps() -> Measured:
    """Seconds of a step with each kind of attention, plain and recorded."""
    found, lines = [], list[Line]()
    for slots in (1, EDITS):
        for attention in ATTENTION:
            words = {"attention": attention, "slots": slots}
            result = _fresh(words)
            found.append({**words, "measured": result})
            values = result or {}
            goal = SHARE_GOAL if slots == EDITS else None
            for how, says in (("", ""), ("recorded_", ", recorded")):
                name = f"sd15 512 px, {slots} in a pack, {attention}{says}"
                lines.append(Line(f"{name}: a step", values.get(f"{how}step_s"), "s"))
                share = values.get(f"{how}share")
                lines.append(Line(f"{name}: share of matmul rate", share, "", goal, at_least=True))
            off, floor = values.get("recorded_apart"), values.get("apart")
            # Runs that agree bit for bit have distance zero.
            ratio = None if off is None or floor is None else round(off / max(floor, 1e-6), 3)
            name = f"sd15 512 px, {slots} in a pack, {attention}: recorded from unrecorded, to two of those"
            lines.append(Line(name, ratio, "times", ROUNDING_GOAL))
            yield {"timed": found}, lines


PARTS: dict[str, Callable[[], Measured]] = {"edits": edits, "cards": cards, "steps": steps}


def main() -> int:
    """Command line; returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the result here [benchmarks/results]")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        # One process per measurement.
        print(json.dumps(_measure(json.loads(args.one))))
        return 0
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {sorted(unknown)[0]}, expected {', '.join(PARTS)}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin, found, lines = provenance(device), dict[str, Any](), dict[str, list[Line]]()
    path, wanted = args.out or RESULTS / "gpu.json", args.parts or list(PARTS)

    def written(*, partial: bool) -> bool:
        """Writes the results so far; returns whether no goal is missed."""
        every = [line for some in lines.values() for line in some]
        passed = all(line.passed is not False for line in every)
        result = {"partial": partial, **found, "lines": [line.as_json() for line in every], "passed": passed}
        if args.out or not args.parts:
            write_result("gpu", result, path=path, origin=origin)
        return passed

    for part in wanted:
        # A borrowed GPU may be taken away at any time.
        for values, rows in PARTS[part]():
            found[part], lines[part] = values, rows
            written(partial=True)
        print("\n".join(table(lines[part])), flush=True)
    return int(not written(partial=bool(args.parts)))


if __name__ == "__main__":
    raise SystemExit(main())
