"""The memory plan of a run: slots, rows, checkpointing, batches and predicted bytes by phase within a budget."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..engine.base import BaseModel
from ..engine.memory import resident_bytes
from ..errors import MemoryLimitError
from ..settings.stages import ONE_AT_A_TIME, EditConfig
from ..settings.text import parse_bytes
from .costs import Costs

MAX_SLOTS = 16
"""Most slots; more do not use a GPU any better."""
CPU_SLOTS = 4
"""Slots without a memory limit; on two cores more gain nothing (``benchmarks/speed.py``)."""
CUDA_CONTEXT_BYTES = 500_000_000
"""Typical GPU memory of a process before any tensor."""
RESERVE = 0.1
"""Share of a budget left for the allocator's rounding and kernels' scratch memory."""


@dataclass(frozen=True)
class Phase:
    """Bytes of one phase at its peak."""

    weights: int
    """Frozen weights on the device in this phase: UNet, text encoder, autoencoder."""
    adapters: int = 0
    """Adapters and embeddings in training, their gradients and moments."""
    activations: int = 0
    """Activations and other temporary tensors."""
    context: int = 0

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.weights + self.adapters + self.activations + self.context


@dataclass(frozen=True)
class Plan:
    """The settings with which a run fits into its memory."""

    budget_bytes: int
    weights: str
    """Format of the frozen UNet."""
    checkpointing: bool
    slots: int
    """Edits that train at once."""
    rows: int
    """Most rows of a training pass."""
    batch_rows: int
    """Most network rows of a sampling batch."""
    vae_tiling: bool
    """Whether the autoencoder works in tiles."""
    text_on_cpu: bool
    """Whether sentences are encoded on the CPU."""
    phases: dict[str, Phase]
    """Predicted bytes by phase, in their order."""
    in_turn: bool = False
    """Whether one network of a cascade is on the device at a time, see `BaseModel`."""

    @property
    def peak_bytes(self) -> int:
        """Bytes of the largest phase."""
        return max(phase.total for phase in self.phases.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "phases": {name: {**asdict(p), "total": p.total} for name, p in self.phases.items()}}

    def __str__(self) -> str:
        peak, name = max((phase.total, name) for name, phase in self.phases.items())
        return (
            f"{self.slots} at once, {self.rows} rows a pass, checkpointing {'on' if self.checkpointing else 'off'}, "
            f"{self.batch_rows} rows a sampling batch{', autoencoder in tiles' if self.vae_tiling else ''}"
            f"{', text encoder on the CPU' if self.text_on_cpu else ''}"
            f"{', one network at a time' if self.in_turn else ''}; {peak / 1e9:.2f} GB at most ({name})"
        )


@dataclass(frozen=True)
class Budget:
    """The memory that a run may use on a device."""

    total: int
    """Bytes, `context` included."""
    context: int = 0
    """Bytes in use before any tensor."""
    enforced: bool = False
    """Whether the GPU's allocator enforces the budget."""

    @staticmethod
    def of(device: torch.device, vram: str | None) -> "Budget | None":
        """The budget of a run, weights included; None without a limit.

        The total is `vram`. Its `context` part is `CUDA_CONTEXT_BYTES` on a GPU, and this process's resident bytes on
        a CPU, where no weights of the run may be loaded yet. By default the total is the GPU's free memory, with what
        this process's torch holds of it already: a base that stayed loaded; on a CPU there is no limit.

        Raises:
            ConfigError: `vram` is no amount of memory.
        """
        asked = None if vram is None else parse_bytes(vram)
        if device.type != "cuda":
            return None if asked is None else Budget(asked, resident_bytes() or 0)
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device)
        if asked is None:
            return Budget(free)
        return Budget(min(asked, free + CUDA_CONTEXT_BYTES), CUDA_CONTEXT_BYTES, enforced=True)

    @contextmanager
    def held(self, device: torch.device) -> Iterator[None]:
        """Within the block the GPU's allocator is limited to an enforced budget; afterwards it has no limit."""
        if not self.enforced or device.type != "cuda":
            yield
            return
        # torch needs a device with a number here.
        index = torch.cuda.current_device() if device.index is None else device.index
        _, everything = torch.cuda.mem_get_info(device)
        share = min(1.0, max(0, self.total - self.context) / everything)
        torch.cuda.set_per_process_memory_fraction(share, index)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, index)


def _costs(base: BaseModel, config: EditConfig) -> Costs:
    """The costs of the phases on a base, cached in the base."""
    config = config.for_group(base.family.group)
    key = (Costs, config, base.weights, base.dtype, base.text_dtype, base.codec_dtype, base.attention)
    if key not in base.remembered:
        base.remembered[key] = Costs(
            base.family,
            config,
            weights=base.weights,
            dtype=base.dtype,
            part_dtype=base.text_dtype,
            codec_dtype=base.codec_dtype,
            attention=base.attention,
        )
    costs: Costs = base.remembered[key]
    return costs


def adapter_weights(base: BaseModel, config: EditConfig) -> int:
    """Number of weights of an adapter in training; no model weights are read."""
    return _costs(base, config).adapter_weights


def plan_for(
    base: BaseModel, config: EditConfig, budget: Budget | None, *, jobs: int = 1, beside: bool = False
) -> Plan | None:
    """The plan for a base, applied by `planned`; None without a budget. See `plan`.

    Args:
        base: the base; none of its weights are read.
        config: settings of all three stages.
        budget: the memory to stay within, None for no limit.
        jobs: number of edits to make.
        beside: whether finished edits are rendered while others train, as in a batch.

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
    """Within the block a base follows the plan and stays within the budget; afterwards it is restored.

    Without a plan or a budget, the base is still restored after the block.

    Args:
        base: the base.
        plan: its plan, see `plan_for`.
        budget: the budget of the plan; on a GPU, torch may then allocate no more.
    """
    with base.restored(), nullcontext() if budget is None else budget.held(base.device):
        if plan is not None:
            follow(base, plan)
        yield


def follow(base: BaseModel, plan: Plan) -> None:
    """Applies a plan to a base."""
    if plan.checkpointing:
        base.recompute()
    base.vae_tiling |= plan.vae_tiling
    base.text_on_cpu |= plan.text_on_cpu
    base.in_turn |= plan.in_turn


class _Planner:
    """The search for a plan; see `plan`."""

    def __init__(
        self, costs: Costs, config: EditConfig, networks: int, available: int, jobs: int, replays: bool
    ) -> None:
        self._costs, self._config, self._networks, self._available = costs, config, networks, available
        self._jobs, self._replays = jobs, replays

    def recorded(self, checkpointing: bool) -> bool:
        """Whether training passes will be recorded."""
        return self._replays and not checkpointing

    def room(self, slots: int) -> int:
        """Bytes for activations beside `slots` edits in training."""
        return self._available - self._networks - self._costs.adapters(slots)

    def training(self, checkpointing: bool) -> tuple[int, int] | None:
        """The most rows per pass that fit, in the fewest slots: (slots, rows); None if not even one row fits."""
        recorded = self.recorded(checkpointing)
        draws = max(self._config.embed.draws, self._config.finetune.draws)
        sizes = [
            (-slots * each, slots) for slots in range(1, min(self._jobs, MAX_SLOTS) + 1) for each in range(1, draws + 1)
        ]

        def fits(rows: int, slots: int) -> bool:
            taken = self._costs.train(rows, slots, checkpointing=checkpointing, recorded=recorded)
            return taken <= self.room(slots)

        # An estimate for all sizes takes as many passes as three of them.
        if len(sizes) > 3:
            if not fits(1, 1):
                return None
            about = self._costs.train_about(checkpointing=checkpointing, recorded=recorded)
            # Estimates may be off: sizes up to a third too large are computed exactly below.
            sizes = [(rows, slots) for rows, slots in sizes if about(-rows, slots) <= 4 / 3 * self.room(slots)]
        return next(((slots, -rows) for rows, slots in sorted(sizes) if fits(-rows, slots)), None)

    @property
    def least_rows(self) -> int:
        """Rows of the smallest sampling batch: those of an image, or the two predictions that a mask compares."""
        return max(self._config.sample.image_rows, 2 if self._config.sample.mask else 1)

    def batch_rows(self, resident: int) -> int:
        """Most rows of a sampling batch; 0 if not even one image fits."""
        least = self.least_rows
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
    """The fastest plan for `jobs` edits within a budget.

    Without checkpointing if that fits, with as many rows per pass as fit, in the fewest slots for these rows. On a GPU
    two edits at once with checkpointing go before one without, unless passes are recorded: starting its kernels took
    five sixths of the step of an edit alone (``benchmarks/results/gpu_first_run.json``). On a GPU that does not hold
    all networks of a cascade, they take turns, and edits train one after the other, as in a format of `ONE_AT_A_TIME`.

    Args:
        costs: costs of the architecture under `config`.
        config: settings of all stages.
        budget_bytes: the budget, the process's context included.
        jobs: number of edits.
        beside: whether finished edits are rendered, and further photos encoded, while others are in training.
        on_cpu: whether the budget is the CPU's own, so that no part can move to the CPU.
        weights: format of the UNet.
        checkpointing: whether checkpointing is required.
        replays: whether training passes without checkpointing are recorded, see `BaseModel`.
        context_bytes: bytes in use before any tensor.

    Raises:
        MemoryLimitError: not even one row of one edit fits in the cheapest plan.
    """
    whole = partial(
        _plan,
        costs,
        config,
        budget_bytes=budget_bytes,
        beside=beside,
        on_cpu=on_cpu,
        weights=weights,
        checkpointing=checkpointing,
        replays=replays,
        context_bytes=context_bytes,
    )
    try:
        return whole(jobs=1 if weights in ONE_AT_A_TIME else jobs, in_turn=False)
    except MemoryLimitError:
        if on_cpu or costs.largest_network == costs.networks:
            raise
    return whole(jobs=1, in_turn=True)


def _plan(
    costs: Costs,
    config: EditConfig,
    *,
    budget_bytes: int,
    jobs: int,
    beside: bool,
    on_cpu: bool,
    weights: str,
    checkpointing: bool,
    replays: bool,
    context_bytes: int,
    in_turn: bool,
) -> Plan:
    """The fastest plan with all networks on the device, or with one at a time; see `plan`."""
    networks, load = (costs.largest_network, costs.load_in_turn) if in_turn else (costs.networks, costs.load)
    available = math.floor((budget_bytes - context_bytes) * (1 - RESERVE))
    planner = _Planner(costs, config, networks, available, jobs, replays)
    recompute, fit = checkpointing, planner.training(checkpointing)
    if not checkpointing and (fit is None or (fit[0] == 1 < jobs and not on_cpu and not replays)):
        cheaper = planner.training(True)
        if cheaper is not None and (fit is None or cheaper[0] > 1):
            recompute, fit = True, cheaper
    if fit is None:
        fewer_bits = "" if weights == "nf4" else "fewer bits (`base_weights=nf4`), or "
        least = networks + costs.adapters(1) + costs.train(1, 1, checkpointing=True)
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold no training step: one row with checkpointing takes "
            f"{least / 1e9:.2f} GB, {context_bytes / 1e9:.2f} GB more before any tensor, and {RESERVE:.0%} are kept "
            f"free; train fewer weights (`adapt=attn`, a smaller `rank`), take {fewer_bits}a smaller model"
        )
    slots, rows = fit
    if load > available:
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold a training step but not the loading of the UNet, which takes "
            f"{(load + context_bytes) / 1e9:.2f} GB for a moment"
        )
    training = costs.adapters(slots)
    # Edits still in training keep their memory, and so does the UNet.
    in_training = training if beside else 0
    batch_rows = planner.batch_rows(networks + in_training)
    room = available - networks - in_training - costs.vae
    tiling = costs.decode() > room or costs.encode() > room
    if not batch_rows or max(costs.decode(tiling=tiling), costs.encode(tiling=tiling)) > room:
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold a training step but no picture: one takes "
            f"{(networks + in_training + costs.sample(planner.least_rows)) / 1e9:.2f} GB to sample and "
            f"{(networks + in_training + costs.vae + costs.decode(tiling=True)) / 1e9:.2f} GB to decode"
        )

    # A GPU encodes sentences before a UNet is there, and the CPU the later ones.
    stays = networks + in_training if beside and on_cpu else 0
    text_on_cpu = costs.encode_text() > available - stays - costs.text_encoder
    if text_on_cpu and on_cpu:
        raise MemoryLimitError(
            f"{budget_bytes / 1e9:.2f} GB hold a training step but no text encoder: it takes "
            f"{(stays + costs.text_encoder + costs.encode_text()) / 1e9:.2f} GB"
        )

    def phase(weights_bytes: int, adapters: int, activations: int) -> Phase:
        return Phase(weights_bytes, adapters, activations, context_bytes)

    recorded = planner.recorded(recompute)
    stages = {
        name: phase(
            networks, training, costs.train(rows, slots, checkpointing=recompute, stage=name, recorded=recorded)
        )
        for name in costs.stages
    }
    frozen = networks if beside else 0
    photos = phase(frozen + costs.vae, in_training, costs.encode(tiling=tiling))
    resident = (frozen, in_training) if on_cpu else (0, 0)
    sentences = phase(resident[0] + costs.text_encoder, resident[1], costs.encode_text())
    phases = {
        "load": Phase(load, in_training, 0, context_bytes),
        "encode": photos if text_on_cpu or photos.total >= sentences.total else sentences,
        # All photos but the first are inverted beside edits in training.
        **({"invert": phase(networks, training, costs.sample(1))} if config.sample.start == "inverted" else {}),
        **stages,
        "sample": phase(networks, in_training, costs.sample(batch_rows)),
        "decode": phase(networks + costs.vae, in_training, costs.decode(tiling=tiling)),
    }
    return Plan(budget_bytes, weights, recompute, slots, rows, batch_rows, tiling, text_on_cpu, phases, in_turn)
