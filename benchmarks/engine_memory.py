"""Resident bytes of Stable Diffusion 1.5's UNet, and the peak of training one photo, per weight format.

Weights are random (`random_unet`), all code is the package's: `frozen.load_frozen` fills the network layer by layer,
`Pack` trains attention adapters of rank 4 on one row at 512 px with gradient checkpointing, in bfloat16 for every
format. Memory is the process's resident memory on a Linux CPU, less that of Python and the imports; figures on a GPU
differ by its kernels' workspaces.

On Linux the package makes glibc return freed blocks (`memory.return_freed_memory`), for every format; by default glibc
keeps them, and the peak of a row of int8 is 1.6 GiB.
"""

import ctypes
import gc
import json
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.engine.memory import peak_bytes, reset_peak, resident_bytes
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.frozen import weight_bytes
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig
from lowmem_imagic.training.pack import Pack, TrainingInput

from .edit_methods import embeds, unet_of
from .goals import Line, fresh, in_gib
from .random_unet import TOKENS, random_sd15

CPU = torch.device("cpu")
WEIGHTS_GOAL_GIB, PEAK_GOAL_GIB = 0.82, 1.2
"""Goals for ``int8``."""


@dataclass(frozen=True)
class Case:
    """A measurement in one process."""

    weights: str = "int8"
    compute: str = "bfloat16"
    latent_side: int = 64
    """64 is 512 px."""
    rows: int = 2
    """Training steps of one row each; the time is that of the last."""
    rank: int = 4
    adapt: str = "attn"

    @property
    def name(self) -> str:
        """Its name in the table."""
        compute = "" if self.compute == "bfloat16" else f", {self.compute} arithmetic"
        return self.weights + compute


CASES = [
    *(Case(weights) for weights in ("bf16", "bnb-int8", "int8")),
    Case("int8", compute="float32"),
]
QUICK_CASES = [Case(latent_side=16, rows=1)]


def measure(*, quick: bool) -> tuple[dict[str, Any], list[Line]]:
    """The result and its table; every case in its own process."""
    cases, found, lines = QUICK_CASES if quick else CASES, [], list[Line]()
    for case in cases:
        print(f"memory: {case.name}", file=sys.stderr)
        result = fresh("benchmarks.engine_memory", json.dumps(asdict(case)))
        found.append({"name": case.name, "case": asdict(case), "measured": result})
        lines += _lines(case, result or {}, judged=not quick)
    return {"cases": found}, lines


def _lines(case: Case, measured: dict[str, Any], *, judged: bool) -> list[Line]:
    """The lines of one case; goals hold for our format in the arithmetic of a GPU, at full size."""
    ours = judged and case.weights == "int8" and case.compute == "bfloat16"
    saved = measured.get("saved_for_backward_bytes") or {}
    return [
        Line(f"{case.name}: weights", in_gib(measured.get("weight_bytes")), "GiB", WEIGHTS_GOAL_GIB if ours else None),
        Line(f"{case.name}: loaded, over baseline", in_gib(measured.get("loaded_bytes")), "GiB"),
        Line(
            f"{case.name}: peak of a row, over baseline",
            in_gib(measured.get("peak_bytes")),
            "GiB",
            PEAK_GOAL_GIB if ours else None,
        ),
        Line(f"{case.name}: saved for backward", in_gib(saved.get("checkpointing")), "GiB"),
        Line(f"{case.name}: held by the graph", in_gib(measured.get("held_bytes")), "GiB"),
        Line(f"{case.name}: a row", measured.get("row_s"), "s"),
    ]


def run(case: Case) -> dict[str, Any]:
    """Bytes of `case` over the resident memory at the start, and seconds; Linux only."""
    baseline = resident_bytes()
    base = random_sd15(weights=case.weights, device=CPU, dtype=getattr(torch, case.compute), checkpointing=True)
    with _peak() as load_peak:
        started = time.perf_counter()
        unet = unet_of(base)
        load_s = time.perf_counter() - started
    loaded = resident_bytes()

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, case.latent_side, case.latent_side, generator=generator)
    e_opt = torch.randn(1, TOKENS, base.family.text["embeds"].shape[-1], generator=generator)
    config = EditConfig(
        embed=EmbedConfig(steps=0, learning_rate=1e-2),
        finetune=FinetuneConfig(
            steps=case.rows, learning_rate=1e-4, draws=1, adapt=case.adapt, lora_rank=case.rank, lora_alpha=case.rank
        ),
    )
    ends = [time.perf_counter()]
    with _peak() as row_peak:
        photo = TrainingInput({"unet": latents[0]}, embeds(e_opt), generator, {"unet": latents[0]})
        training = Pack(base, [photo], config, slots=1, progress=lambda *_: ends.append(time.perf_counter()))
        [[edit]] = training.run()
        del training
    assert edit.error is None
    pack = AdapterPack.load(unet, base.denoisers[0].names, list(edit.adapters.values()))
    return {
        "baseline_bytes": baseline,
        "weight_bytes": weight_bytes(unet),
        "loaded_bytes": loaded - baseline,
        "load_peak_bytes": _over(load_peak, baseline),
        "load_s": round(load_s, 2),
        "peak_bytes": _over(row_peak, baseline),
        "row_s": round(ends[-1] - ends[-2], 2),
        "adapter_weights": pack.weights.numel(),
        "threads": torch.get_num_threads(),
        "libc": " ".join(platform.libc_ver()),
        **_graph(base, pack, latents, e_opt),
    }


def _graph(base: BaseModel, pack: AdapterPack, latents: Tensor, e_opt: Tensor) -> dict[str, Any]:
    """Bytes that a forward pass keeps for the backward pass: counted by autograd, and by the system."""
    for parameter in pack.parameters:
        parameter.requires_grad_(True)
    saved = {}
    with pack.attached(unet_of(base)):
        return_freed()
        before = resident_bytes()
        prediction = base.predict(base.denoisers[0], latents, torch.tensor([500]), embeds(e_opt))
        return_freed()
        held = resident_bytes() - before
        del prediction
        for name, checkpointing in (("checkpointing", True), ("plain", False)):
            if not checkpointing:
                unet_of(base).disable_gradient_checkpointing()
            with _saved_bytes(_storages(unet_of(base), pack)) as count:
                base.predict(base.denoisers[0], latents, torch.tensor([500]), embeds(e_opt))
            saved[name] = count[0]
    return {"held_bytes": held, "saved_for_backward_bytes": saved}


@contextmanager
def _saved_bytes(known: set[int]) -> Iterator[list[int]]:
    """Counts the bytes of the storages that autograd saves in the block, each once and without those `known`.

    Tensors that a layer keeps on its own context are not counted (stock bitsandbytes does so with every input).
    """
    count, kept = [0], list[Tensor]()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            known.add(storage.data_ptr())
            # Kept alive, so that no other storage gets its address while we count; detached, to avoid a cycle.
            kept.append(tensor.detach())
            count[0] += storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count
    kept.clear()


def _storages(network: nn.Module, pack: AdapterPack) -> set[int]:
    """Addresses of all storages that exist without a graph: weights, scales, adapters."""
    tensors = [*network.parameters(), *network.buffers(), pack.weights]
    for module in network.modules():
        state = getattr(module, "state", None)
        tensors += [t for t in (getattr(state, "CB", None), getattr(state, "SCB", None)) if t is not None]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@contextmanager
def _peak() -> Iterator[list[int | None]]:
    """Collects the peak of resident bytes in the block; None if the system does not report it."""
    found: list[int | None] = [None]
    reset_peak(CPU)
    start = peak_bytes(CPU)
    # Without a reset, the peak could be an older one.
    known = start is not None and start < resident_bytes() + 2**25
    yield found
    found[0] = peak_bytes(CPU) if known else None


def _over(found: list[int | None], baseline: int) -> int | None:
    return None if found[0] is None else found[0] - baseline


def return_freed() -> None:
    """Returns freed memory to the system, if possible, so that it does not count."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    print(json.dumps(run(Case(**json.loads(sys.argv[1])))))
