"""What fits into a stated amount of memory, and how: slots, rows, checkpointing, batches, predicted bytes by phase."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..engine.base import BaseModel
from ..engine.memory import resident_bytes
from ..errors import MemoryLimitError
from ..settings.stages import EditConfig
from ..settings.text import parse_bytes
from .costs import Costs

MAX_SLOTS = 16
"""More edits side by side fill no card any better."""
CPU_SLOTS = 4
"""Edits side by side where nothing limits memory; on two cores more gain nothing (``benchmarks/speed.py``)."""
CUDA_CONTEXT_BYTES = 500_000_000
"""What a process takes on a GPU before any tensor: a usual figure."""
RESERVE = 0.1
"""Share of a budget left for the allocator's rounding and kernels' scratch memory."""


@dataclass(frozen=True)
class Phase:
    """Bytes of one phase at its peak."""

    weights: int
    """Frozen: UNet, text encoder, autoencoder, as far as they are there."""
    adapters: int = 0
    """Adapters and embeddings in training, their gradients and moments."""
    activations: int = 0
    """What passes hold, with everything transient."""
    context: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.activations + self.context


@dataclass(frozen=True)
class Plan:
    """How a run fits into its memory."""

    budget_bytes: int
    weights: str
    """Format of the frozen UNet."""
    checkpointing: bool
    slots: int
    """Edits that train at once."""
    rows: int
    """Most rows of a training pass."""
    batch_rows: int
    """Most UNet rows of a sampling batch."""
    vae_tiling: bool
    """Whether the autoencoder works in tiles."""
    text_on_cpu: bool
    """Whether sentences are encoded on the CPU."""
    phases: dict[str, Phase]
    """Predicted bytes by phase, in their order."""

    @property
    def peak_bytes(self) -> int:
        """The largest of the phases."""
        return max(phase.total for phase in self.phases.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "phases": {name: {**asdict(p), "total": p.total} for name, p in self.phases.items()}}

    def __str__(self) -> str:
        peak, name = max((phase.total, name) for name, phase in self.phases.items())
        return (
            f"{self.slots} at once, {self.rows} rows a pass, checkpointing {'on' if self.checkpointing else 'off'}, "
            f"{self.batch_rows} rows a sampling batch{', autoencoder in tiles' if self.vae_tiling else ''}"
            f"{', text encoder on the CPU' if self.text_on_cpu else ''}; {peak / 1e9:.2f} GB at most ({name})"
        )


@dataclass(frozen=True)
class Budget:
    """What a run may take of a device's memory."""

    total: int
    """Bytes, those included that are taken before any tensor."""
    context: int = 0
    """Bytes taken before any tensor."""
    enforced: bool = False
    """Whether a GPU's allocator is to be held to it."""

    @staticmethod
    def of(device: torch.device, vram: str | None) -> "Budget | None":
        """The budget before a run's weights are loaded; None where nothing limits it.

        It is `vram`, of which what is taken before any tensor is a part: on a GPU `CUDA_CONTEXT_BYTES`, else what this
        process holds now. By default it is what a GPU has free, and nothing on a CPU.

        Raises:
            ConfigError: `vram` is no amount of memory.
        """
        asked = None if vram is None else parse_bytes(vram)
        if device.type != "cuda":
            return None if asked is None else Budget(asked, resident_bytes() or 0)
        free, _ = torch.cuda.mem_get_info(device)
        if asked is None:
            return Budget(free)
        return Budget(min(asked, free + CUDA_CONTEXT_BYTES), CUDA_CONTEXT_BYTES, enforced=True)

    @contextmanager
    def held(self, device: torch.device) -> Iterator[None]:
        """Within the block a GPU's allocator gives no more than an enforced budget; afterwards all there is."""
        if not self.enforced or device.type != "cuda":
            yield
            return
        # torch takes no device without a number here.
        index = torch.cuda.current_device() if device.index is None else device.index
        _, everything = torch.cuda.mem_get_info(device)
        share = min(1.0, max(0, self.total - self.context) / everything)
        torch.cuda.set_per_process_memory_fraction(share, index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def _costs(base: BaseModel, config: EditConfig) -> Costs:
    """What the phases take on a base; remembered as long as the base is there."""
    key = (Costs, config, base.weights, base.dtype, base.part_dtype, base.attention)
    if key not in base.remembered:
        base.remembered[key] = Costs(
            base.family,
            config,
            weights=base.weights,
            dtype=base.dtype,
            part_dtype=base.part_dtype,
            attention=base.attention,
        )
    costs: Costs = base.remembered[key]
    return costs


def adapter_weights(base: BaseModel, config: EditConfig) -> int:
    """Numbers in an adapter as it is trained, counted without weights."""
    return _costs(base, config).adapter_weights


def plan_for(
    base: BaseModel, config: EditConfig, budget: Budget | None, *, jobs: int = 1, beside: bool = False
) -> Plan | None:
    """The plan for a base, to be followed within `planned`; None without a budget. See `plan`.

    Raises:
        MemoryLimitError: nothing fits.
    """
    if budget is None:
        return None
    return plan(
        _costs(base, config),
        config,
        budget_bytes=budget.total,
        jobs=jobs,
        beside=beside,
        on_cpu=base.device.type == "cpu",
        weights=base.weights,
        checkpointing=base.checkpointing,
        replays=base.replays,
        context_bytes=budget.context,
    )


@contextmanager
def planned(base: BaseModel, plan: Plan | None, budget: Budget | None) -> Iterator[None]:
    """Within the block a base works as planned and takes no more than the budget; afterwards as it did before.

    Without a plan or a budget there is nothing to follow; what the base learns of its memory is forgotten all the same.
    """
    with base.restored(), nullcontext() if budget is None else budget.held(base.device):
        if plan is not None:
            follow(base, plan)
        yield


def follow(base: BaseModel, plan: Plan) -> None:
    """Makes a base work as planned."""
    if plan.checkpointing:
        base.recompute()
    base.vae_tiling |= plan.vae_tiling
    base.text_on_cpu |= plan.text_on_cpu


class _Planner:
    """The search for a plan; see `plan`."""

    def __init__(self, costs: Costs, config: EditConfig, available: int, jobs: int, replays: bool) -> None:
        self._costs, self._config, self._available, self._jobs = costs, config, available, jobs
        self._replays = replays

    def recorded(self, checkpointing: bool) -> bool:
        """Whether training passes will be recorded."""
        return self._replays and not checkpointing

    def room(self, slots: int) -> int:
        """Bytes for activations beside `slots` edits in training."""
        return self._available - self._costs.networks - self._costs.adapters(slots)

    def training(self, checkpointing: bool) -> tuple[int, int] | None:
        """Slots and rows a pass: most rows, in the fewest slots that have them; None where not one fits."""
        recorded = self.recorded(checkpointing)
        about = self._costs.train_about(checkpointing=checkpointing, recorded=recorded)
        draws = max(self._config.embed.draws, self._config.finetune.draws)
        found = [
            (-slots * each, slots)
            for slots in range(1, min(self._jobs, MAX_SLOTS) + 1)
            for each in range(1, draws + 1)
            # A third over: what is likely is then looked at exactly.
            if about(slots * each, slots) <= 4 / 3 * self.room(slots)
        ]
        for negative, slots in sorted(found):
            exactly = self._costs.train(-negative, slots, checkpointing=checkpointing, recorded=recorded)
            if exactly <= self.room(slots):
                return slots, -negative
        return None

    def batch_rows(self, resident: int) -> int:
        """Most rows of a sampling batch; 0 where not one image's fit."""
        sampling = self._config.sample
        # A mask compares two predictions.
        alone = sampling.guidance_scale == 1 and sampling.photo_guidance in (None, 1) and not sampling.mask
        least = 1 if alone else 2
        rows = max(self._config.sample.batch_rows, least)
        while rows >= least and self._costs.sample(rows) > self._available - resident:
            rows = max(least, rows // 2) if rows > least else 0
        return rows if rows >= least else 0


def plan(
    costs: Costs,
    config: EditConfig,
    *,
    budget_bytes: int,
    jobs: int = 1,
    beside: bool = False,
    on_cpu: bool = False,
    weights: str = "int8",
    checkpointing: bool = False,
    replays: bool = False,
    context_bytes: int = 0,
) -> Plan:
    """The fastest way to make `jobs` edits within a budget.

    Without checkpointing where that fits, with as many rows a pass as fit, and in no more slots than have them.

    Args:
        costs: of the architecture, under `config`.
        config: settings of all stages.
        budget_bytes: what may be taken, the process's context included.
        jobs: how many edits there are.
        beside: whether finished edits are rendered, and further photos encoded, while others are in training.
        on_cpu: whether the budget is the CPU's own, so that nothing can be done there instead.
        weights: format of the UNet, for the record.
        checkpointing: in any case.
        replays: whether training passes without checkpointing are recorded, see `BaseModel`.
        context_bytes: taken before any tensor.

    Raises:
        MemoryLimitError: not even one row of one edit fits, in the cheapest way.
    """
    available = math.floor((budget_bytes - context_bytes) * (1 - RESERVE))
    planner = _Planner(costs, config, available, jobs, replays)
    for recompute in (True,) if checkpointing else (False, True):
        if (found := planner.training(recompute)) is not None:
            slots, rows = found
            break
    else:
        least = costs.networks + costs.adapters(1) + costs.train(1, 1, checkpointing=True)
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold no training step: one row with checkpointing takes "
            f"{least / 1e9:.2f} GB, {context_bytes / 1e9:.2f} GB more before any tensor, and {RESERVE:.0%} are kept "
            "free; take fewer weights to train (`adapt=attn`, a smaller `rank`), or a smaller model"
        )
    if costs.load > available:
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold a training step but not the loading of the UNet, which takes "
            f"{(costs.load + context_bytes) / 1e9:.2f} GB for a moment"
        )
    training = costs.adapters(slots)
    # Edits still in training keep their memory, and so does the UNet.
    held = training if beside else 0
    batch_rows = planner.batch_rows(costs.networks + held)
    room = available - costs.networks - held - costs.vae
    tiling = costs.decode() > room or costs.encode() > room
    if not batch_rows or max(costs.decode(tiling=tiling), costs.encode(tiling=tiling)) > room:
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold a training step but no picture: one takes "
            f"{(costs.networks + held + costs.sample(2)) / 1e9:.2f} GB to sample and "
            f"{(costs.networks + held + costs.vae + costs.decode(tiling=True)) / 1e9:.2f} GB to decode"
        )

    # Before anything trains, sentences and photos are encoded in an empty device.
    stays = costs.networks + held if beside else 0
    text_on_cpu = costs.encode_text() > available - stays - costs.text_encoder
    if text_on_cpu and on_cpu:
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold a training step but no text encoder: it takes "
            f"{(stays + costs.text_encoder + costs.encode_text()) / 1e9:.2f} GB"
        )

    def phase(weights_bytes: int, adapters: int, activations: int) -> Phase:
        return Phase(weights_bytes, adapters, activations, context_bytes)

    recorded = planner.recorded(recompute)
    first, second = (
        costs.train(rows, slots, checkpointing=recompute, stage=s, recorded=recorded) for s in ("embed", "finetune")
    )
    frozen = costs.networks if beside else 0
    photos = phase(frozen + costs.vae, held, costs.encode(tiling=tiling))
    sentences = phase(frozen + costs.text_encoder, held, costs.encode_text())
    phases = {
        "load": Phase(costs.load, held, 0, context_bytes),
        "encode": photos if text_on_cpu or photos.total >= sentences.total else sentences,
        # All but the first photo are inverted beside what is to be trained.
        **({"invert": phase(costs.networks, training, costs.sample(1))} if config.sample.start == "inverted" else {}),
        "embed": phase(costs.networks, training, first),
        "finetune": phase(costs.networks, training, second),
        "sample": phase(costs.networks, held, costs.sample(batch_rows)),
        "decode": phase(costs.networks + costs.vae, held, costs.decode(tiling=tiling)),
    }
    return Plan(budget_bytes, weights, recompute, slots, rows, batch_rows, tiling, text_on_cpu, phases)
