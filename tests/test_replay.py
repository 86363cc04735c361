"""Facts about replayed passes: they are the passes they replay, and recording them leaves nothing behind."""

import contextlib
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowmem_imagic.engine import cuda_graphs
from lowmem_imagic.engine.cuda_graphs import WARM_UPS, Replay
from lowmem_imagic.settings.stages import EditConfig, EmbedConfig, FinetuneConfig
from lowmem_imagic.training import loop as training
from lowmem_imagic.training.pack import Pack, TrainingInput
from tests import calls

CPU = torch.device("cpu")
CONFIG = EditConfig(
    embed=EmbedConfig(steps=3, learning_rate=1e-2, draws=2, anchor=0.5),
    finetune=FinetuneConfig(steps=4, learning_rate=1e-3, draws=3, lora_rank=2, lora_alpha=3.0),
)


class Graph(TorchDispatchMode):
    """A CUDA graph on a machine without a GPU: records operations with their tensors, and runs them again."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.operations.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for recorded, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(value, Tensor) and value is not recorded:
                    recorded.detach().copy_(value)

    def pool(self) -> "Graph":
        return self


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets passes be recorded on the CPU, as on a GPU."""

    class Stream:
        def wait_stream(self, _: "Stream") -> None:
            pass

    for name, value in {
        "device": lambda _: contextlib.nullcontext(),
        "Stream": Stream,
        "current_stream": Stream,
        "CUDAGraph": Graph,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": lambda graph, **_: graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(cuda_graphs, "can_record", lambda device: True)


@pytest.fixture
def replays(base: Any, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Replay]]:
    """Lets the base replay passes; collects the `Replay`s made."""
    references: list[weakref.ref[Replay]] = []

    class Counted(Replay):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            references.append(weakref.ref(self))

    monkeypatch.setattr(training, "Replay", Counted)
    monkeypatch.setattr(base, "replays", True)
    return references


def alive(references: list[weakref.ref[Replay]]) -> int:
    """The number of `Replay`s that still keep memory."""
    return sum(reference() is not None for reference in references)


def trained(base: Any, numbers: list[int], *, slots: int, **options: Any) -> dict[int, list[Tensor]]:
    """e_opt, factors and losses of the edits of these numbers."""
    text = calls.encode_text(base, ["a red cube", "a cat", "two birds kissing", "a blue sphere on a floor"])
    draw = torch.Generator().manual_seed(2)
    photos, noise = torch.randn(2, 4, 4, 8, 8, generator=draw)
    tasks = [calls.training_input(photos[n], text[n], torch.Generator().manual_seed(n), noise[n]) for n in numbers]
    made = [edit for group in Pack(base, tasks, CONFIG, slots=slots, **options).run() for edit in group]
    return {
        numbers[edit.number]: [
            edit.conditioning["embeds"],
            *(factor for down, up, _ in edit.adapters["unet"].values() for factor in (down, up)),
            *map(torch.tensor, edit.losses.values()),
        ]
        for edit in made
    }


@pytest.mark.parametrize("options", [{"slots": 1}, {"slots": 2}, {"slots": 3, "max_rows": 4}])
@pytest.mark.parametrize("recorded", [False, True])
def test_replayed_training_has_the_same_bits(
    options: dict[str, int], recorded: bool, base: Any, request: pytest.FixtureRequest
) -> None:
    """Alone, in refilled packs and in split passes an edit is the same with passes replayed, recorded or not."""
    expected = trained(base, [0, 1, 2, 3], **options)
    if recorded:
        request.getfixturevalue("recording")
    used = request.getfixturevalue("replays")
    replayed = trained(base, [0, 1, 2, 3], **options)
    # Fewer than there are passes: they are used again.
    assert 2 <= len(used) < 4 * (CONFIG.embed.steps + CONFIG.finetune.steps) / options["slots"]
    for number, values in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(replayed[number], values, strict=True))


@pytest.mark.usefixtures("recording")
def test_what_is_recorded_is_called_with_new_inputs() -> None:
    """A call sees its inputs; recording runs its warm-ups and restores the tensors that they changed."""
    calls: list[float] = []
    total = torch.full((2,), 5.0)

    def run(x: Tensor, y: Tensor) -> Tensor:
        calls.append(float(x[0]))
        total.add_(x)
        return x * y

    one, two = torch.ones(2), torch.full((2,), 2.0)
    replay = Replay(run, [one, two], device=CPU, changed=[total])
    assert len(calls) == WARM_UPS + 1 and torch.equal(total, torch.full((2,), 5.0))
    assert torch.equal(replay(two, two), torch.full((2,), 4.0))
    assert torch.equal(replay(one, two), two)
    assert torch.equal(total, torch.full((2,), 8.0))
    # Its buffers are its own.
    assert torch.equal(one, torch.ones(2))
    with pytest.raises(RuntimeError):
        replay(torch.ones(3), two)


def tasks_of_two(base: Any) -> list[TrainingInput]:
    """Two tasks, fresh."""
    text = calls.encode_text(base, ["a red cube", "a cat"])
    photos = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    return [calls.training_input(photos[n], text[n], torch.Generator().manual_seed(n), photos[n]) for n in range(2)]


def stop_after(steps: int) -> Any:
    """A callback for a pack before each step, which stops it after some."""
    calls: list[None] = []

    def between(_: Pack) -> None:
        calls.append(None)
        if len(calls) > steps:
            raise KeyboardInterrupt

    return between


def test_nothing_is_kept_while_others_have_the_memory(
    base: Any, replays: list[weakref.ref[Replay]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recordings are gone when finished edits are handed over, when a run is stopped, and when memory ran out."""
    pack = Pack(base, tasks_of_two(base), CONFIG, slots=1)
    for _ in pack.run():
        assert replays and not alive(replays)
    stopped = Pack(base, tasks_of_two(base), CONFIG, slots=1, between=stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        list(stopped.run())
    assert not alive(replays)
    predict = calls.plain(base)
    counts: list[int] = []

    def failing(*args: Any) -> Tensor:
        counts.append(alive(replays))
        if len(counts) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        result: Tensor = predict(*args)
        return result

    monkeypatch.setattr(base, "predict", calls.in_place(failing))
    monkeypatch.setattr(base, "fallbacks", [])
    list(Pack(base, tasks_of_two(base)[:1], CONFIG, slots=1).run())
    assert counts[1:4] == [1, 1, 0] and not any(counts[4:])
    assert base.fallbacks == ["passes that are not recorded"] and not base.replays


def test_recomputed_passes_are_not_recorded(load_base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With checkpointing passes are run as they are."""
    base = load_base(checkpointing=True)
    base.replays = True
    monkeypatch.setattr(training, "Replay", None)
    assert len(trained(base, [0], slots=1)) == 1


class Unrecordable(Replay):
    """Fails with a given error while it records, after it has changed tensors."""

    error: Exception = RuntimeError("operation not permitted when stream is capturing")

    def __init__(self, run: Any, inputs: Any, *, device: torch.device, changed: Any = (), beside: Any = None) -> None:
        try:
            raise self.error
        finally:
            # As on a GPU, where the end of a recording that broke off is an error of its own.
            if isinstance(self.error, torch.OutOfMemoryError):
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")


def test_passes_that_cannot_be_recorded_are_taken_as_they_are(
    base: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where recording fails, training goes on unrecorded with the same bits, and says so once."""
    expected = trained(base, [0, 1], slots=2)
    monkeypatch.setattr(training, "Replay", Unrecordable)
    monkeypatch.setattr(base, "replays", True)
    found = trained(base, [0, 1], slots=2)
    assert [r.message for r in caplog.records] == [
        "training passes are not recorded: RuntimeError: operation not permitted when stream is capturing"
    ]
    for number, values in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(found[number], values, strict=True))


def test_running_out_of_memory_while_recording_is_a_fallback(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error that ends a recording hides that memory ran out; passes are then not recorded, before anything else."""
    monkeypatch.setattr(Unrecordable, "error", torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(training, "Replay", Unrecordable)
    monkeypatch.setattr(base, "replays", True)
    monkeypatch.setattr(base, "fallbacks", [])
    trained(base, [0, 1], slots=2)
    assert base.fallbacks == ["passes that are not recorded"] and base.most_rows is None
