"""Facts about memory: predictions are right, a plan stays within its budget, and running out leads to a fallback.

Facts about time: a training's is estimated from the same passes.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import LATENT_SIDE
from diffusers.models import attention_processor
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowmem_imagic.actions.doctor import plans
from lowmem_imagic.errors import ConfigError, MemoryLimitError
from lowmem_imagic.families import load_architecture
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.frozen import weight_bytes
from lowmem_imagic.planning import plan as planning
from lowmem_imagic.planning.costs import Costs
from lowmem_imagic.planning.counting import Counts, cost_of, fused_attention, peak_of
from lowmem_imagic.planning.duration import Speed, speed_of, training_seconds
from lowmem_imagic.planning.plan import CUDA_CONTEXT_BYTES, RESERVE, Budget, Plan, plan, plan_for, planned
from lowmem_imagic.sampling.sample import Cell
from lowmem_imagic.settings.presets import preset
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig, SampleConfig
from lowmem_imagic.settings.text import parse_bytes
from lowmem_imagic.training import loop as training
from lowmem_imagic.training.pack import Pack, TrainingInput
from tests import calls

CONFIG = EditConfig(
    embed=EmbedConfig(steps=1, learning_rate=1e-2, draws=2),
    finetune=FinetuneConfig(steps=2, learning_rate=1e-3, draws=2, lora_rank=2, lora_alpha=2.0),
    sample=SampleConfig(num_inference_steps=2, batch_rows=8, start="noise"),
)
SENTENCES = ("a photo of a red cube on the grass", "a blue sphere", "two birds kissing")


def tasks(base: Any, count: int) -> list[TrainingInput]:
    """Edits to train."""
    draws = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 2, 4, LATENT_SIDE, LATENT_SIDE, generator=draws)
    text = calls.encode_text(base, SENTENCES[:count])
    return [
        calls.training_input(noise[n, 0], text[n], torch.Generator().manual_seed(n), noise[n, 1]) for n in range(count)
    ]


def costs_of(base: Any, config: EditConfig = CONFIG) -> Costs:
    """The predictions for a base."""
    return Costs(base.family, config, weights=base.weights, dtype=base.dtype, part_dtype=base.part_dtype)


# Predictions


@pytest.fixture
def peaks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collects the most live bytes of every step of a training."""
    seen: list[int] = []
    step = training.Trainer.step

    def counted(self: training.Trainer) -> Any:
        found: list[Any] = []
        seen.append(peak_of(lambda: found.append(step(self))))
        return found[0]

    monkeypatch.setattr(training.Trainer, "step", counted)
    return seen


@pytest.fixture(scope="module")
def loaded(load_base: Callable[..., Any]) -> Callable[[str], tuple[Any, Costs]]:
    """The tiny model with weights of a format, and what is predicted for it, for tests that leave it as it was."""

    def load(weights: str) -> tuple[Any, Costs]:
        base = load_base(weights=weights)
        return base, costs_of(base)

    return cache(load)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("weights", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize(("slots", "rows"), [(1, 1), (1, 2), (3, 6), (3, 3)])
def test_training_takes_what_is_predicted(
    loaded: Callable[[str], tuple[Any, Costs]],
    weights: str,
    checkpointing: bool,
    slots: int,
    rows: int,
    peaks: list[int],
) -> None:
    """Live bytes of both stages' steps, counted while they run on the CPU, are within 10 % of the prediction."""
    base, costs = loaded(weights)
    base.recompute(checkpointing)
    list(Pack(base, tasks(base, slots), CONFIG, slots=slots, max_rows=rows).run())
    for stage, measured in (("embed", peaks[0]), ("finetune", max(peaks[1:]))):
        predicted = costs.train(rows, slots, checkpointing=checkpointing, stage=stage)
        assert predicted == pytest.approx(measured, rel=0.1), stage


@pytest.mark.process
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_xformers_takes_what_is_predicted(
    load_base: Callable[..., Any], checkpointing: bool, peaks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers copies heads for xformers: live bytes of its own way to call it are predicted, and are more."""

    def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        heads = (part.unsqueeze(1) for part in (query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(*heads).squeeze(1)

    # Stands in for xformers, which has no CPU kernels.
    monkeypatch.setattr(
        attention_processor, "xformers", SimpleNamespace(ops=SimpleNamespace(memory_efficient_attention=attention))
    )
    base = load_base(weights="fp32", checkpointing=checkpointing)
    plain = plan_for(base, CONFIG, Budget.of(base.device, "20GB"))
    base.denoisers[0].use_xformers(calls.unet(base))
    monkeypatch.setattr(base, "attention", "xformers")
    list(Pack(base, tasks(base, 2), CONFIG, slots=2, max_rows=4).run())
    costs = Costs(base.family, CONFIG, weights="fp32", dtype=base.dtype, part_dtype=base.dtype, attention="xformers")
    for stage, measured in (("embed", peaks[0]), ("finetune", max(peaks[1:]))):
        predicted = costs.train(4, 2, checkpointing=checkpointing, stage=stage)
        assert predicted == pytest.approx(measured, rel=0.03), stage
    planned = plan_for(base, CONFIG, Budget.of(base.device, "20GB"))
    assert plain is not None and planned is not None
    assert planned.phases["finetune"].activations > plain.phases["finetune"].activations


@pytest.mark.parametrize("images", [1, 4])
def test_sampling_takes_what_is_predicted(load_base: Callable[..., Any], images: int) -> None:
    """Live bytes of a sampling batch, its adapters included, are within 10 % of the prediction."""
    base = load_base()
    pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="all", rank=2, alpha=2.0)
    text = calls.encode_text(base, [SENTENCES[0], ""])[:1]
    cells = [Cell(0, eta / 10, 0) for eta in range(images)]
    measured = peak_of(lambda: calls.sample(base, pack, text, text, cells, CONFIG.sample)) + pack.weights.nbytes
    assert costs_of(base).sample(2 * images) == pytest.approx(measured, rel=0.1)


def test_the_autoencoder_takes_what_is_predicted(load_base: Callable[..., Any]) -> None:
    """Live bytes of encoding and decoding a picture are within 10 % of the prediction."""
    base = load_base()
    vae = base.family.load_codec(device=base.device, dtype=torch.float32)
    picture, latents = (
        torch.zeros(1, 3, *base.sizes.own),
        torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE),
    )
    measured = [
        peak_of(lambda: base.family.encode(vae, picture)),
        peak_of(lambda: base.family.decode(vae, latents)),
    ]
    assert [costs_of(base).encode(), costs_of(base).decode()] == pytest.approx(measured, rel=0.1)


def test_training_state_is_what_is_predicted(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings, adapters, gradients and moments have the predicted bytes."""
    base, config = load_base(), CONFIG
    edits = tasks(base, 3)
    calls.unet(base).eval()
    count, seen = Counts(), []
    step = training.Trainer.step
    monkeypatch.setattr(training.Trainer, "step", lambda self: seen.append(count.live) or step(self))
    with count:
        list(Pack(base, edits, config, slots=3).run())
    assert costs_of(base, config).adapters(3) == pytest.approx(max(seen), rel=0.1)


def test_counting_sees_each_storage_once() -> None:
    """Views count with their storage, freed tensors no more; the peak stays."""
    count = Counts()
    with count:
        x = torch.zeros(1000)
        y = x.view(10, 100).T
        assert count.live == 4000
        z = y + 1
        assert count.live == 8000
        del x, y, z
        assert count.live == 0
        torch.zeros(10)
    assert count.peak == 8000


def test_counting_leaves_the_attention_of_other_threads_alone() -> None:
    """While one thread counts attention without a matrix of all pairs, another has torch's own."""
    heads = torch.empty(1, 1, 1024, 8, device="meta")

    def peak() -> int:
        return peak_of(lambda: torch.nn.functional.scaled_dot_product_attention(heads, heads, heads))

    own = peak()
    with fused_attention(), ThreadPoolExecutor(1) as other:
        counted, beside = peak(), other.submit(peak).result()
    assert counted < own == beside == peak()


@pytest.mark.parametrize(
    ("model", "unet", "text_encoder", "vae"),
    [
        ("sd15", 859_520_964, 123_060_480, 83_653_863),
        ("sd21-base", 865_910_724, 340_387_840, 83_653_863),
    ],
)
def test_published_architectures_are_the_models(model: str, unet: int, text_encoder: int, vae: int) -> None:
    """The architectures that are known without a download have the published numbers of weights."""
    family = load_architecture(model)
    meta = {"device": torch.device("meta"), "dtype": torch.float16}
    parts = [family.load_unet(weights="bf16", **meta), family.load_text_encoder(**meta), family.load_codec(**meta)]
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [unet, text_encoder, vae]


@pytest.mark.process
def test_stable_diffusion_keeps_less_than_the_floor_of_others() -> None:
    """A row of Stable Diffusion 1.5 at 512 px in bfloat16 takes 540 MiB, 165 with checkpointing; peft's takes 788."""
    attention = replace(preset("balanced"), finetune=FinetuneConfig(steps=1, learning_rate=1e-4, adapt="attn"))
    family = load_architecture("sd15")
    costs = Costs(family, attention, weights="int8", dtype=torch.bfloat16, part_dtype=torch.float16)
    assert costs.train(1, 1, checkpointing=False) <= 540 * 2**20
    assert costs.train(1, 1, checkpointing=True) <= 165 * 2**20


# Plans


@pytest.fixture(scope="module")
def predicted(load_base: Callable[..., Any]) -> Costs:
    """Costs of the tiny model."""
    return costs_of(load_base())


@pytest.mark.process
@given(
    budget=st.one_of(st.integers(1, 200_000_000), st.integers(1_000_000, 8_000_000)),
    jobs=st.sampled_from([1, 2, 3]),
    checkpointing=st.booleans(),
    beside=st.booleans(),
    on_cpu=st.booleans(),
)
def test_plans_stay_within_their_budget(
    predicted: Costs, budget: int, jobs: int, checkpointing: bool, beside: bool, on_cpu: bool
) -> None:
    """For any budget, a plan's phases fit into it with a tenth to spare, or there is one clear error."""
    words: dict[str, Any] = {"jobs": jobs, "checkpointing": checkpointing, "beside": beside, "on_cpu": on_cpu}
    try:
        made = plan(predicted, CONFIG, budget_bytes=budget, context_bytes=1000, **words)
    except MemoryLimitError as error:
        assert "hold no" in str(error) or "hold a training step but no" in str(error)
        return
    assert not (on_cpu and made.text_on_cpu)
    assert made.peak_bytes <= budget - 0.1 * (budget - 1000) + 1
    assert 1 <= made.slots <= min(jobs, planning.MAX_SLOTS) and 1 <= made.rows <= 2 * made.slots
    assert made.checkpointing or not checkpointing
    assert made.batch_rows <= CONFIG.sample.batch_rows


def test_more_memory_is_never_slower(predicted: Costs) -> None:
    """With more memory a plan has no fewer rows a pass, and checkpointing only below some budget.

    A GPU trains no fewer edits at once, and has checkpointing beyond that budget only to train more of them.
    """
    alone, several = list[Plan](), list[Plan]()
    for budget in (*range(2_000_000, 6_000_000, 100_000), 20_000_000):
        for made, on_cpu in ((alone, True), (several, False)):
            try:
                made.append(plan(predicted, CONFIG, budget_bytes=budget, jobs=3, on_cpu=on_cpu))
            except MemoryLimitError:
                assert not made
    without = [made for made in alone if not made.checkpointing]
    assert [made.checkpointing for made in alone] == sorted((made.checkpointing for made in alone), reverse=True)
    assert [made.rows for made in without] == sorted(made.rows for made in without)
    assert alone[0].checkpointing and alone[-1].rows == 6
    assert [made.slots for made in several] == sorted(made.slots for made in several)
    assert several[-1] == alone[-1]


def test_no_more_slots_than_fill_the_rows(predicted: Costs) -> None:
    """One photo takes one slot, for any memory, and all its draws go in one pass."""
    made = plan(predicted, CONFIG, budget_bytes=10**9)
    assert (made.slots, made.rows) == (1, 2)


@pytest.mark.process
def test_a_budget_is_kept_on_the_cpu(load_base: Callable[..., Any]) -> None:
    """A plan for a running process counts the memory in use."""
    base = load_base()
    with pytest.raises(MemoryLimitError, match="hold no training step"):
        plan_for(base, CONFIG, Budget.of(base.device, "50MB"))
    assert Budget.of(base.device, None) is None and plan_for(base, CONFIG, None) is None
    made = plan_for(base, CONFIG, Budget.of(base.device, "20GB"))
    assert isinstance(made, Plan) and made.phases["embed"].context > 10**8
    assert str(made).startswith("1 at once, 2 rows a pass, checkpointing off")


def test_budgets_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the budget is the free memory, or the requested amount if that is less; the allocator enforces a
    requested amount during the work."""
    told: list[tuple[float, Any]] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(6e9), int(8e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *words: told.append(words))
    gpu = torch.device("cuda")
    free = Budget.of(gpu, None)
    assert free == Budget(int(6e9))
    four, more = Budget.of(gpu, "4GB"), Budget.of(gpu, "24GB")
    assert four == Budget(int(4e9), CUDA_CONTEXT_BYTES, enforced=True)
    assert more == Budget(int(6e9) + CUDA_CONTEXT_BYTES, CUDA_CONTEXT_BYTES, enforced=True)
    with free.held(gpu):
        assert not told
    with pytest.raises(KeyboardInterrupt), four.held(gpu):
        assert told == [((4e9 - CUDA_CONTEXT_BYTES) / 8e9, 1)]
        raise KeyboardInterrupt
    assert told[1:] == [(1.0, 1)]
    # A base that stayed loaded is the run's own.
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(4e9), int(8e9)))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: int(2e9))
    assert (Budget.of(gpu, None), Budget.of(gpu, "4GB"), Budget.of(gpu, "24GB")) == (free, four, more)


def test_rendering_beside_training_is_counted(predicted: Costs) -> None:
    """Where edits are rendered while others train, sampling and decoding hold the training state as well."""
    alone, beside = (plan(predicted, CONFIG, budget_bytes=10**9, jobs=3, beside=b) for b in (False, True))
    training = predicted.adapters(beside.slots)
    for name in ("sample", "decode"):
        assert beside.phases[name].total - alone.phases[name].total == training
    assert beside.phases["encode"].weights - alone.phases["encode"].weights == predicted.networks


def test_odd_sampling_batches_shrink_to_one_image(predicted: Costs) -> None:
    """Of a batch of three rows that does not fit, the two of one image are left."""
    odd = replace(CONFIG, sample=replace(CONFIG.sample, batch_rows=3))
    most = max(predicted.networks + predicted.sample(2), predicted.networks + predicted.vae + predicted.decode())
    training = predicted.networks + predicted.adapters(1) + predicted.train(1, 1, checkpointing=True)
    least = next(b for b in range(most, 10**9, 20_000) if 0.9 * b >= max(most, training))
    assert plan(predicted, odd, budget_bytes=least).batch_rows in (2, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8e9), ("8", 8e9), ("7.5 GiB", 7.5 * 2**30), ("6000mb", 6e9), ("2048", 2048), ("512MiB", 2**29)],
)
def test_amounts_of_memory(text: str, expected: float) -> None:
    """Amounts are read with decimal and binary units; a small bare number is in GB."""
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8 cards", "nan", "inf GB", "8TB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    """Anything else is one clear error."""
    with pytest.raises(ConfigError, match="expected an amount of memory such as 8GB"):
        parse_bytes(text)


# Running out


class Card:
    """A base whose passes fail when they have more rows than fit, with and without checkpointing."""

    def __init__(self, base: Any, monkeypatch: pytest.MonkeyPatch, plain: int, checkpointed: int) -> None:
        self.rows: list[int] = []
        predict = calls.plain(base)

        def limited(latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
            self.rows.append(len(latents))
            if len(latents) > (checkpointed if base.checkpointing else plain):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            found: Tensor = predict(latents, timesteps, embeddings)
            return found

        monkeypatch.setattr(base, "predict", calls.in_place(limited))


def trained(base: Any) -> Iterator[Any]:
    """The edits of three tasks in one pack."""
    for group in Pack(base, tasks(base, 3), CONFIG, slots=3).run():
        yield from group


@pytest.fixture(scope="module")
def undisturbed(load_base: Callable[..., Any]) -> list[Any]:
    """The same edits, trained with memory enough."""
    return list(trained(load_base()))


@pytest.mark.parametrize(
    ("plain", "checkpointed", "rungs"),
    [
        (6, 6, []),
        (3, 6, ["3 rows a training pass"]),
        (1, 6, ["3 rows a training pass", "1 rows a training pass"]),
        (0, 1, ["3 rows a training pass", "1 rows a training pass", "checkpointing"]),
    ],
)
def test_training_goes_on_in_less_memory(
    load_base: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    relative: Callable[..., float],
    undisturbed: list[Any],
    plain: int,
    checkpointed: int,
    rungs: list[str],
) -> None:
    """Out of memory, a step is taken again in fewer rows, then with checkpointing; edits are the same to rounding."""
    base = load_base()
    Card(base, monkeypatch, plain, checkpointed)
    found = list(trained(base))
    assert base.fallbacks == rungs
    assert [made.number for made in found] == [made.number for made in undisturbed]
    for mine, theirs in zip(found, undisturbed, strict=True):
        assert relative(mine.conditioning["embeds"], theirs.conditioning["embeds"]) < 1e-4
        assert mine.losses["finetune"] == pytest.approx(theirs.losses["finetune"], rel=1e-4)


def test_a_step_broken_off_half_way_leaves_nothing_behind(
    load_base: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    relative: Callable[..., float],
    undisturbed: list[Any],
) -> None:
    """A step that fails in a later pass, when gradients are half filled, is the same step when it is taken again."""
    base = load_base()
    base.most_rows, seen = 3, list[int]()
    predict = calls.plain(base)

    def second_fails(latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        seen.append(len(latents))
        if len(seen) in (2, 9):
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")
        found: Tensor = predict(latents, timesteps, embeddings)
        return found

    monkeypatch.setattr(base, "predict", calls.in_place(second_fails))
    for mine, theirs in zip(trained(base), undisturbed, strict=True):
        assert relative(mine.conditioning["embeds"], theirs.conditioning["embeds"]) < 1e-4
        assert mine.losses["finetune"] == pytest.approx(theirs.losses["finetune"], rel=1e-4)
    assert base.fallbacks[0] == "1 rows a training pass"


def test_the_last_rung_is_one_clear_error(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one row with checkpointing does not fit, the error names the stage, and the base is left as it was."""
    base = load_base()
    names = [name for name, _ in calls.unet(base).named_modules()]
    Card(base, monkeypatch, 0, 0)
    with pytest.raises(MemoryLimitError, match="out of memory in stage embed"):
        list(trained(base))
    assert [name for name, _ in calls.unet(base).named_modules()] == names
    assert base.fallbacks[-1] == "checkpointing"


def test_other_errors_are_not_taken_for_memory(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of another kind goes through at once, with no rung taken."""
    base = load_base()

    def broken(*_: Any) -> Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(base, "predict", calls.in_place(broken))
    with pytest.raises(RuntimeError, match="shapes differ"):
        list(trained(base))
    assert not base.fallbacks


def test_sampling_goes_on_in_less_memory(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, a batch is sampled again in halves; the pictures are the same, and one image is the last rung."""
    text = calls.encode_text(load_base(), [SENTENCES[0], ""])[:1]
    cells = [Cell(0, eta / 10, 0) for eta in range(5)]

    def sampled(base: Any) -> Tensor:
        pack = AdapterPack(calls.unet(base), calls.NAMES, count=1, adapt="attn", rank=1, alpha=1.0)
        return calls.sample(base, pack, text, text, cells, CONFIG.sample)

    expected = sampled(load_base())
    base = load_base()
    card = Card(base, monkeypatch, 3, 3)
    assert torch.allclose(sampled(base), expected, atol=1e-5)
    assert base.fallbacks == ["2 images a sampling batch", "1 images a sampling batch"]
    assert card.rows == [8, 4, *[2] * 10]
    base = load_base()
    Card(base, monkeypatch, 1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        sampled(base)


class Other:
    """Costs that differ from those of the tiny model where a subclass says so."""

    def __init__(self, costs: Costs) -> None:
        self._costs = costs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._costs, name)


class Wide(Other):
    """Costs of a model whose text encoder is larger than all the rest."""

    text_encoder = 10**9


class Light(Other):
    """Costs in the proportions of a large model: small adapters, and a row is four times smaller when checkpointed."""

    def adapters(self, slots: int) -> int:
        """Bytes of `slots` edits in training."""
        return 1000 * slots

    def train(self, rows: int, edits: int, *, checkpointing: bool, **_: Any) -> int:
        """Bytes of a pass."""
        return rows * (10**6 if checkpointing else 4 * 10**6)

    def train_about(self, **words: Any) -> Callable[[int, int], int]:
        """The same."""
        return partial(self.train, **words)


class Two(Other):
    """Costs of a cascade of two networks that outweigh all the rest."""

    networks, largest_network, load, load_in_turn = 6 * 10**9, 4 * 10**9, 6 * 10**9, 4 * 10**9


def test_networks_that_do_not_fit_together_take_turns(predicted: Costs, load_base: Callable[..., Any]) -> None:
    """A GPU that holds one network of a cascade at a time trains one edit after the other; a CPU holds them all."""
    two: Any = Two(predicted)
    roomy = plan(two, CONFIG, budget_bytes=10**10, jobs=3)
    assert not roomy.in_turn and roomy.slots > 1 and roomy.phases["embed"].weights == 6 * 10**9
    narrow = plan(two, CONFIG, budget_bytes=5 * 10**9, jobs=3)
    assert narrow.in_turn and narrow.slots == 1 and narrow.phases["embed"].weights == 4 * 10**9
    assert "one network at a time" in str(narrow) and narrow.peak_bytes < 5 * 10**9
    with pytest.raises(MemoryLimitError, match="hold no training step"):
        plan(two, CONFIG, budget_bytes=5 * 10**9, on_cpu=True)
    base = load_base()
    with planned(base, narrow, None):
        assert base.in_turn
    assert not base.in_turn


def test_a_text_encoder_that_does_not_fit_goes_to_the_cpu(predicted: Costs) -> None:
    """Sentences are encoded on the CPU where the text encoder does not fit; on the CPU itself that is an error."""
    wide: Any = Wide(predicted)
    roomy = plan(wide, CONFIG, budget_bytes=2 * 10**9)
    assert not roomy.text_on_cpu and roomy.phases["encode"].weights == 10**9
    narrow = plan(wide, CONFIG, budget_bytes=10**9)
    assert narrow.text_on_cpu and narrow.phases["encode"].weights == predicted.vae
    assert "text encoder on the CPU" in str(narrow)
    with pytest.raises(MemoryLimitError, match="no text encoder: it takes"):
        plan(wide, CONFIG, budget_bytes=10**9, on_cpu=True)


def test_a_gpu_never_holds_a_text_encoder_beside_the_unet(
    predicted: Costs, load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where photos are encoded while others train, the CPU encodes their sentences; on a CPU itself both count."""
    wide: Any = Wide(predicted)
    alone = plan(wide, CONFIG, budget_bytes=2 * 10**9).phases["encode"]
    beside = plan(wide, CONFIG, budget_bytes=2 * 10**9, beside=True).phases["encode"]
    assert beside == alone
    on_cpu = plan(wide, CONFIG, budget_bytes=2 * 10**9, beside=True, on_cpu=True).phases["encode"]
    assert on_cpu.total - alone.total == predicted.networks + predicted.adapters(1)

    # The meta device stands for a GPU: nothing computed there has values.
    expected, base = calls.encode_text(load_base(), SENTENCES), load_base()
    base.device, base.text_on_cpu = torch.device("meta"), False
    base.network(base.denoisers[0])
    assert torch.equal(calls.encode_text(base, SENTENCES), expected)


def test_two_at_once_with_checkpointing_go_before_one_without(predicted: Costs) -> None:
    """A card that holds one edit without checkpointing and several with it trains several of a batch."""
    light: Any = Light(predicted)
    alone = light.networks + light.adapters(1) + light.train(1, 1, checkpointing=False)
    words: dict[str, Any] = {"budget_bytes": math.ceil(alone / (1 - RESERVE)) + 1000}
    assert not plan(light, CONFIG, **words).checkpointing
    several = plan(light, CONFIG, jobs=8, **words)
    assert several.checkpointing and several.slots > 1
    for faster_alone in ({"on_cpu": True}, {"replays": True}):
        made = plan(light, CONFIG, jobs=8, **words, **faster_alone)
        assert (made.slots, made.checkpointing) == (1, False)


def test_encoding_a_sentence_takes_what_is_predicted(load_base: Callable[..., Any]) -> None:
    """Live bytes of encoding a sentence are within 10 % of the prediction, or a kilobyte."""
    base = load_base()
    encoder = base.family.load_text_encoder(device=base.device, dtype=torch.float32)
    measured = peak_of(lambda: base.family.encode_text([SENTENCES[0]], lambda _: nullcontext(encoder)))
    assert costs_of(base).encode_text() == pytest.approx(measured, rel=0.1, abs=1024)


def test_the_text_encoder_goes_on_on_the_cpu(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory on a GPU, sentences are encoded on the CPU, those that remain; there the error goes on."""
    base, load = load_base(), load_base().family.load_text_encoder
    expected = calls.encode_text(base, SENTENCES)
    places: list[str] = []

    def full_gpu(name: str, *, device: torch.device, dtype: torch.dtype, **_: Any) -> Any:
        places.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return load(name, device=device, dtype=dtype)

    fresh = load_base()
    monkeypatch.setattr(fresh.family, "load_text_encoder", full_gpu)
    fresh.device, fresh.text_on_cpu = torch.device("cuda"), False
    assert torch.equal(calls.encode_text(fresh, SENTENCES), expected)
    assert (places, fresh.fallbacks) == (["cuda", "cpu"], ["the text encoder on the CPU"])
    monkeypatch.setattr(
        fresh.family, "load_text_encoder", lambda name, **_: full_gpu(name, device=torch.device("cuda"), dtype=None)
    )
    with pytest.raises(torch.OutOfMemoryError):
        calls.encode_text(fresh, ["another"])


def test_the_autoencoder_goes_on_in_tiles(load_base: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory, pictures are encoded and decoded in tiles; if that fails too, the error goes on."""
    base = load_base()
    load = base.family.load_codec

    def full(**_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def full_without_tiles(*, tiling: bool, **rest: Any) -> Any:
        return load(tiling=tiling, **rest) if tiling else full()

    monkeypatch.setattr(base.family, "load_codec", full_without_tiles)
    pictures = torch.zeros(1, 3, *base.sizes.own)
    assert base.decode(base.encode_images(pictures)).shape == pictures.shape
    assert base.fallbacks == ["the autoencoder in tiles"]
    monkeypatch.setattr(base.family, "load_codec", full)
    with pytest.raises(torch.OutOfMemoryError):
        base.decode(torch.zeros(1, 4, LATENT_SIDE, LATENT_SIDE))


def test_a_plan_for_stock_bitsandbytes_has_one_slot(predicted: Costs) -> None:
    """Photos on a base in bnb-int8 train one at a time, where the memory holds several at once."""
    slots = {
        weights: plan(predicted, CONFIG, budget_bytes=20_000_000, jobs=3, beside=True, weights=weights).slots
        for weights in ("int8", "bnb-int8")
    }
    assert slots == {"int8": 3, "bnb-int8": 1}


def test_a_plan_for_a_card_has_the_named_format(load_base: Callable[..., Any], tiny_folder: Path) -> None:
    """The plan of a base in bf16 or fp32 counts the bytes that its weights take when they are loaded."""
    for weights in ("bf16", "fp32"):
        [line] = plans(str(tiny_folder), ["8GB"], CONFIG, photos=(1,), weights=weights)
        base = load_base(weights=weights)
        assert line["plan"]["phases"]["finetune"]["weights"] == weight_bytes(calls.unet(base))


# Time


def test_the_arithmetic_of_a_pass_is_counted(load_base: Callable[..., Any]) -> None:
    """A pass's arithmetic is that of the real one, as torch counts it; attention and its gradient count, too."""
    base = load_base(weights="fp32")
    query = torch.randn(1, 2, 16, 8, requires_grad=True)
    cost = cost_of(lambda: torch.nn.functional.scaled_dot_product_attention(query, query, query).sum().backward())
    products = 2 * 2 * 16 * 16 * 8
    # Two products forward, and five backward: the scores are computed again.
    assert cost.flops == 7 * products
    rows, text = torch.zeros(3, 4, LATENT_SIDE, LATENT_SIDE), calls.encode_text(base, SENTENCES)
    at, _ = torch.full((3,), 500), calls.unet(base)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        calls.predict(base, rows, at, text)
    predicted = costs_of(base).sampling_pass(3, 1, 0).flops
    # The prediction has adapters, too.
    assert counter.get_total_flops() < predicted < 1.3 * counter.get_total_flops()


def test_the_time_of_a_training_follows_its_steps_and_passes(load_base: Callable[..., Any]) -> None:
    """Twice the speed takes half the time, more steps more, and rows that need two passes or checkpointing more."""
    base = load_base()
    slow, fast = Speed(1e9, 1e-6), Speed(2e9, 5e-7)
    costs = costs_of(base)
    seconds = training_seconds(costs, slow, rows=2, checkpointing=False)
    assert 2 * training_seconds(costs, fast, rows=2, checkpointing=False) == pytest.approx(seconds)
    longer = replace(CONFIG, finetune=replace(CONFIG.finetune, steps=20))
    assert training_seconds(costs_of(base, longer), slow, rows=2, checkpointing=False) > 5 * seconds
    assert training_seconds(costs, slow, rows=1, checkpointing=False) > seconds
    assert training_seconds(costs, slow, rows=2, checkpointing=True) > seconds


def test_the_speed_of_a_device_is_measured_once() -> None:
    """The speed of a device is a number of operations that it can do, the same for every plan of a process."""
    speed = speed_of(torch.device("cpu"), torch.float32)
    assert 1e7 < speed.flops < 1e16 and 0 < speed.start_s < 1
    assert speed_of(torch.device("cpu"), torch.float32) is speed
