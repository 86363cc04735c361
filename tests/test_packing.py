"""Facts about packs: an edit's result does not depend on the other edits, and no edit waits for another."""

import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem_imagic.errors import DivergenceError
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig
from lowmem_imagic.training import loop as training
from lowmem_imagic.training import pack as packing
from lowmem_imagic.training.adam import PackedAdam
from lowmem_imagic.training.loop import draw_rows
from lowmem_imagic.training.pack import Pack, TrainedEdit, TrainingInput
from tests import calls
from tests.held_bytes import HeldBytes
from tests.reference_stages import embed, finetune

PROMPTS = ("a photo of a red cube on the grass", "a blue sphere", "two birds kissing", "a cat", "a tall green tree")
CONFIG = EditConfig(
    embed=EmbedConfig(steps=3, learning_rate=1e-2, draws=2, anchor=0.5),
    finetune=FinetuneConfig(steps=4, learning_rate=1e-3, draws=2, lora_rank=2, lora_alpha=3.0, final_rate=0.0),
)
STEPS = CONFIG.embed.steps + CONFIG.finetune.steps


def tasks_of(base: Any, numbers: Sequence[int]) -> list[TrainingInput]:
    """The tasks of these numbers: each its own photo, sentence, generator and starting noise."""
    text = calls.encode_text(base, PROMPTS)
    noise = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    photos = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return [calls.training_input(photos[n], text[n], torch.Generator().manual_seed(10 + n), noise[n]) for n in numbers]


def train(
    base: Any, numbers: Sequence[int], config: EditConfig = CONFIG, *, slots: int, **options: Any
) -> dict[int, TrainedEdit]:
    """The trained edits by the number of their task."""
    groups = list(Pack(base, tasks_of(base, numbers), config, slots=slots, **options).run())
    return {numbers[made.number]: made for group in groups for made in group}


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Collects every gradient (N, P) passed to an optimiser."""
    seen: list[Tensor] = []

    class Recording(PackedAdam):
        def step(self, grads: Tensor, active: Tensor, share: Any = 1.0) -> None:
            seen.append(grads.clone())
            super().step(grads, active, share)

    monkeypatch.setattr(training, "PackedAdam", Recording)
    return seen


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[Tensor, ...]]]:
    """Collects the rows every edit draws, by the first seed of its generator."""
    seen: dict[int, list[tuple[Tensor, ...]]] = {}

    def recording(latents: Tensor, draws: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        rows = draw_rows(latents, draws, *rest)
        [generator] = rest[1]
        seen.setdefault(generator.initial_seed() - 10, []).append(rows)
        return rows

    monkeypatch.setattr(training, "draw_rows", recording)
    return seen


def same(one: TrainedEdit, other: TrainedEdit) -> bool:
    """Whether two edits agree bit for bit."""
    return torch.equal(one.conditioning["embeds"], other.conditioning["embeds"]) and all(
        torch.equal(a, b)
        for key in one.adapters["unet"]
        for a, b in zip(one.adapters["unet"][key][:2], other.adapters["unet"][key][:2], strict=True)
    )


def far(one: TrainedEdit, other: TrainedEdit, relative: Callable[..., float]) -> float:
    """The largest relative distance of the embeddings, the B factors and the losses of two edits."""
    ups = [torch.cat([up.flatten() for _, up, _ in made.adapters["unet"].values()]) for made in (one, other)]
    pairs = [(one.conditioning["embeds"], other.conditioning["embeds"]), (ups[0], ups[1])]
    pairs += [(torch.tensor(one.losses[s]), torch.tensor(other.losses[s])) for s in ("embed", "finetune")]
    return max(relative(a, b) for a, b in pairs)


def test_one_slot_is_the_stages_one_after_the_other(base: Any) -> None:
    """With one slot an edit has the very bits of stage 1, its embedding rounded to fp16, and stage 2 after it."""
    made = train(base, [3, 1], slots=1)
    for number in (3, 1):
        [task] = tasks_of(base, [number])
        photo, text, generators = task.latents["unet"][None], task.target["embeds"], [task.generator]
        optimized, first = embed(
            base, photo, text, CONFIG.embed, generators, start_noise=task.start_noise["unet"][None]
        )
        tuned = finetune(base, photo, optimized.half().float(), CONFIG.finetune, generators)
        assert torch.equal(made[number].conditioning["embeds"], optimized[0].half().float())
        adapter = tuned.adapters.export(0)
        assert made[number].adapters["unet"].keys() == adapter.keys()
        assert all(torch.equal(made[number].adapters["unet"][key][1], adapter[key][1]) for key in adapter)
        assert made[number].losses["embed"] == first.per_step[:, 0].tolist()
        assert made[number].losses["finetune"] == tuned.losses.per_step[:, 0].tolist()


def test_one_slot_gives_the_same_bits_again(base: Any) -> None:
    """Training in one slot is reproducible bit for bit, for any earlier contents of the slot."""
    first, again = train(base, [0, 1, 2], slots=1), train(base, [2, 0], slots=1)
    assert all(same(first[number], again[number]) for number in (0, 2))
    assert not same(first[0], first[1])


@pytest.mark.parametrize(
    ("numbers", "slots"), [([0, 1, 2, 3], 4), ([3, 1, 0, 2], 4), ([4, 0, 1, 2, 3], 2), ([0, 1, 2, 3, 4], 3)]
)
def test_an_edit_does_not_depend_on_its_pack(
    numbers: list[int],
    slots: int,
    base: Any,
    drawn: dict[int, list[tuple[Tensor, ...]]],
    relative: Callable[..., float],
) -> None:
    """In a pack of 4, in another order and in a refilled pack an edit draws the same bits and ends up the same."""
    alone = train(base, [0, 1, 2, 3], slots=1)
    rows = {number: list(drawn[number]) for number in range(4)}
    drawn.clear()
    packed = train(base, numbers, slots=slots)
    assert set(packed) == set(numbers)
    for number in range(4):
        assert len(drawn[number]) == len(rows[number]) == STEPS
        for one, other in zip(drawn[number], rows[number], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert far(packed[number], alone[number], relative) < 2e-3


def test_gradients_are_those_alone_while_stages_mix(
    base: Any, gradients: list[Tensor], relative: Callable[..., float]
) -> None:
    """From equal weights an edit's gradient beside edits in another stage is its own, to rounding."""
    # Without a rate nothing moves, so that weights are equal in every step.
    still = dataclasses.replace(
        CONFIG,
        embed=dataclasses.replace(CONFIG.embed, learning_rate=1e-30),
        finetune=dataclasses.replace(CONFIG.finetune, learning_rate=1e-30),
    )
    train(base, [0], still, slots=1)
    alone = list(gradients)
    gradients.clear()
    # The slot of an edit that breaks in its first step goes to edit 0, one step behind edit 1.
    tasks = tasks_of(base, [1, 2, 0])
    tasks[1] = dataclasses.replace(tasks[1], latents={"unet": torch.full((4, 8, 8), torch.nan)})
    assert len(list(Pack(base, tasks, still, slots=2).run())) == 3
    width = alone[0].shape[1]
    for stage, steps in ((lambda g: g.shape[1] == width, 3), (lambda g: g.shape[1] != width, 4)):
        own = [g[0] for g in alone if stage(g)]
        beside = [g[1] for g in gradients if stage(g)][-steps:]
        assert len(own) == steps
        assert all(relative(other, one) < 1e-5 for one, other in zip(own, beside, strict=True))


@pytest.mark.parametrize("max_rows", [1, 2, 3, 5])
def test_splitting_a_step_changes_rounding_only(
    max_rows: int, base: Any, relative: Callable[..., float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass has at most `max_rows` rows but one of each edit at least; draws and results stay the same."""
    config = EditConfig(
        embed=dataclasses.replace(CONFIG.embed, draws=3), finetune=dataclasses.replace(CONFIG.finetune, draws=3)
    )
    whole = train(base, [0, 1], config, slots=2)
    seen: list[int] = []
    predict = calls.plain(base)
    monkeypatch.setattr(base, "predict", calls.in_place(lambda x, t, e: seen.append(len(x)) or predict(x, t, e)))
    split = train(base, [0, 1], config, slots=2, max_rows=max_rows)
    assert max(seen) == {1: 1, 2: 2, 3: 2, 5: 4}[max_rows] and sum(seen) == 2 * 3 * STEPS
    assert all(far(split[number], whole[number], relative) < 2e-3 for number in (0, 1))


def test_stages_of_different_draws_share_a_pack(base: Any, relative: Callable[..., float]) -> None:
    """Edits whose stages draw unequal numbers of rows still train beside each other as they would alone."""
    config = EditConfig(
        embed=dataclasses.replace(CONFIG.embed, draws=1, steps=2),
        finetune=dataclasses.replace(CONFIG.finetune, draws=3),
    )
    alone, packed = (train(base, [0, 1, 2], config, slots=slots) for slots in (1, 2))
    assert all(far(packed[number], alone[number], relative) < 2e-3 for number in range(3))


def test_a_broken_edit_leaves_the_others_alone(base: Any, relative: Callable[..., float]) -> None:
    """An edit with a NaN loss is returned with its error; its slot and its neighbours continue unharmed."""
    alone = train(base, [0, 2, 3], slots=1)
    tasks = tasks_of(base, [0, 1, 2, 3])
    tasks[1] = dataclasses.replace(tasks[1], latents={"unet": torch.full((4, 8, 8), torch.nan)})
    made = {edit.number: edit for group in Pack(base, tasks, CONFIG, slots=2).run() for edit in group}
    assert isinstance(made[1].error, DivergenceError) and "after 1 of 3 steps" in str(made[1].error)
    assert made[1].adapters == {}
    assert all(made[number].error is None for number in (0, 2, 3))
    assert all(far(made[number], alone[number], relative) < 2e-3 for number in (0, 2, 3))


def test_the_base_is_free_between_groups(base: Any) -> None:
    """While finished edits are handed over the UNet is the network it was, and after an abandoned run, too."""
    modules = list(calls.unet(base).modules())
    run = Pack(base, tasks_of(base, [0, 1, 2]), CONFIG, slots=1).run()
    for _ in range(2):
        next(run)
        assert all(a is b for a, b in zip(calls.unet(base).modules(), modules, strict=True))
    run.close()

    def interrupt(stage: str, step: int, *_: object) -> None:
        if step > CONFIG.embed.steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Pack(base, tasks_of(base, [0, 1]), CONFIG, slots=2, progress=interrupt).run())
    assert all(a is b for a, b in zip(calls.unet(base).modules(), modules, strict=True))


def test_a_packs_memory_goes_with_it(base: Any) -> None:
    """A pack's memory is freed together with the pack, without a garbage collection."""
    gc.collect()
    gc.disable()
    try:
        tasks = tasks_of(base, [0, 1])
        with HeldBytes() as memory:
            pack = Pack(base, tasks, CONFIG, slots=2)
            list(pack.run())
            assert memory.total() > 0
            del pack
        assert memory.total() == 0
    finally:
        gc.enable()


def test_progress_says_where_everybody_is(base: Any) -> None:
    """One edit reports its stages; several report steps of all, and how many are trained, in slots and waiting."""
    seen: list[tuple[str, int, int, str]] = []
    train(base, [0], slots=1, count=1, progress=lambda *report: seen.append(report))
    assert [report[:3] for report in seen] == [("embed", n, 3) for n in (1, 2, 3)] + [
        ("finetune", n, 4) for n in (1, 2, 3, 4)
    ]
    seen.clear()
    train(base, [0, 1, 2], slots=2, count=3, progress=lambda *report: seen.append(report))
    assert {report[0] for report in seen} == {"train"}
    steps = [report[1] for report in seen]
    assert steps == sorted(steps) and steps[-1] == seen[-1][2] == 3 * STEPS
    assert "0 of 3 edits trained, 2 in slots, 1 waiting" in seen[0][3]
    assert "3 of 3 edits trained, 0 in slots, 0 waiting" in seen[-1][3]


class Counting(TorchDispatchMode):
    """Counts the operations that are not views, those of drawing aside: about one GPU kernel each."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.drawing = 0, False

    def draw_rows(self, *args: Any) -> Any:
        """Draws, uncounted: the CPU draws edit by edit."""
        self.drawing = True
        rows = draw_rows(*args)
        self.drawing = False
        return rows

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or self.drawing)
        return function(*args, **(kwargs or {}))


def operations(base: Any, slots: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Operations of each step of a full pack, except for drawing."""
    step = training.Trainer.step
    counted: list[int] = []

    def counting(self: training.Trainer) -> Any:
        with monkeypatch.context() as patch, Counting() as mode:
            patch.setattr(training, "draw_rows", mode.draw_rows)
            ended = step(self)
        counted.append(mode.count)
        return ended

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", counting)
        train(base, range(slots), slots=slots)
    return counted


def test_operations_do_not_grow_with_the_pack(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes about as many operations for four edits as for two, and few more than for one, drawing aside."""
    # The layers' scales are computed once.
    train(base, [0], slots=1)
    one, two, four = (operations(base, slots, monkeypatch) for slots in (1, 2, 4))
    assert len(one) == len(four) == STEPS
    for single, pair, pack in zip(one, two, four, strict=True):
        assert 100 < single <= pair <= 1.25 * single
        # The remaining operations are arithmetic on a few numbers of each edit, on the CPU.
        assert pack <= 1.03 * pair


def test_no_steps_give_the_sentence_and_no_change(base: Any) -> None:
    """Without steps e_opt is e_tgt as fp16 holds it, and every B is zero."""
    config = EditConfig(
        embed=dataclasses.replace(CONFIG.embed, steps=0), finetune=dataclasses.replace(CONFIG.finetune, steps=0)
    )
    made = train(base, [0, 1], config, slots=1)
    for number, task in zip((0, 1), tasks_of(base, [0, 1]), strict=True):
        assert torch.equal(made[number].conditioning["embeds"], task.target["embeds"][0].half().float())
        assert not any(up.any() for _, up, _ in made[number].adapters["unet"].values())


def test_peaks_are_of_an_edits_own_steps(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's peak is the largest of the edit's own steps in it, each measured by itself, without other edits."""
    steps: list[int] = []
    monkeypatch.setattr(packing, "reset_peak", lambda _: steps.append(len(steps)))
    # The first step of all takes most, and each later one more than the one before it.
    monkeypatch.setattr(packing, "peak_bytes", lambda _: 1000 if len(steps) == 1 else len(steps))
    made = train(base, [0, 1], slots=1)
    peaks = [made[n].measured[stage]["peak_bytes"] for n in (0, 1) for stage in ("embed", "finetune")]
    embed = CONFIG.embed.steps
    assert peaks == [1000, STEPS, STEPS + embed, 2 * STEPS]
