"""Facts about training states: resumed from its bytes, an edit goes on as if it had never stopped."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowmem_imagic.errors import EditFileError, EditTooLargeError
from lowmem_imagic.settings.stages import EditConfig
from lowmem_imagic.storage import safetensors_reader, safetensors_writer
from lowmem_imagic.training import state as training_state
from lowmem_imagic.training.pack import Pack, TrainedEdit, TrainingInput
from lowmem_imagic.training.state import TrainingState
from tests.test_packing import CONFIG, STEPS, far, same, tasks_of, train

KEY = "photo, sentence, settings"


class Stopped(Exception):
    """Ends a run between two steps."""


def states_after(base: Any, tasks: list[TrainingInput], steps: int, config: EditConfig, slots: int) -> dict[int, bytes]:
    """The training states, as bytes, of a run that is broken off after some steps."""
    kept: dict[int, bytes] = {}
    taken = iter(range(steps))

    def stop(pack: Pack) -> None:
        if next(taken, None) is None:
            kept.update({number: training_state.encode(state, KEY) for number, state in pack.states()})
            raise Stopped

    with pytest.raises(Stopped):
        list(Pack(base, tasks, config, slots=slots, between=stop).run())
    return kept


def resumed(
    base: Any, tasks: list[TrainingInput], states: dict[int, bytes], config: EditConfig
) -> dict[int, TrainedEdit]:
    """The trained edits, those that have a state from there on."""
    tasks = [
        dataclasses.replace(task, state=training_state.decode(states[n], KEY) if n in states else None)
        for n, task in enumerate(tasks)
    ]
    groups = list(Pack(base, tasks, config, slots=len(tasks)).run())
    return {made.number: made for group in groups for made in group}


@pytest.mark.parametrize("steps", range(STEPS))
def test_a_resumed_edit_has_the_bits_of_an_uninterrupted_one(base: Any, steps: int) -> None:
    """Alone on a CPU, wherever it was stopped: same embedding, adapter and losses, to the last bit."""
    whole = train(base, [0], slots=1)[0]
    states = states_after(base, tasks_of(base, [0]), steps, CONFIG, 1)
    again = resumed(base, tasks_of(base, [0]), states, CONFIG)[0]
    assert same(again, whole) and again.losses == whole.losses


def test_resumed_in_other_company(base: Any, relative: Callable[..., float]) -> None:
    """Edits of a stopped pack that go on beside others, in other slots, come to the same but for rounding."""
    whole = train(base, [0, 1, 2], slots=1)
    states = states_after(base, tasks_of(base, [2, 1]), 4, CONFIG, 2)
    made = resumed(base, tasks_of(base, [2, 1, 0]), states, CONFIG)
    for number, task in enumerate([2, 1, 0]):
        assert far(made[number], whole[task], relative) < 2e-3
        assert made[number].losses["embed"] == pytest.approx(whole[task].losses["embed"], rel=1e-4)


def test_seconds_add_up_over_a_stop(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage's seconds include the time before the stop, and not the pause."""
    [state] = states_after(base, tasks_of(base, [0]), 5, CONFIG, 1).values()
    found = training_state.decode(state, KEY)
    found.measured["finetune"]["seconds"] = 100.0
    states = {0: training_state.encode(found, KEY)}
    made = resumed(base, tasks_of(base, [0]), states, CONFIG)[0]
    assert 100 < made.measured["finetune"]["seconds"] < 110
    assert made.measured["embed"] == found.measured["embed"]


@pytest.fixture(scope="module")
def saved(base: Any) -> bytes:
    """A state in stage 2."""
    return states_after(base, tasks_of(base, [0]), 5, CONFIG, 1)[0]


def test_a_state_is_for_its_own_edit(base: Any, saved: bytes) -> None:
    """Under another key it is refused; for an adapter of another rank it is not used, and the edit begins anew."""
    with pytest.raises(EditFileError, match="not the training state of this"):
        training_state.decode(saved, "another")
    other = dataclasses.replace(CONFIG, finetune=dataclasses.replace(CONFIG.finetune, lora_rank=3))
    made = resumed(base, tasks_of(base, [0]), {0: saved}, other)[0]
    whole = train(base, [0], other, slots=1)[0]
    assert same(made, whole) and made.losses == whole.losses


@given(at=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_no_damage_goes_unseen(saved: bytes, at: float, change: int) -> None:
    """A state with any changed byte, or cut off at any place, is refused."""
    place = int(at * len(saved))
    damaged = bytearray(saved)
    damaged[place] ^= change
    for bad in (bytes(damaged), saved[:place]):
        with pytest.raises(EditFileError, match="damaged"):
            training_state.decode(bad, KEY)


def test_a_state_may_be_larger_than_an_edit_file(saved: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size limit of edit files, which come from anyone, is not that of training states, which have their own."""
    for module in (safetensors_reader, safetensors_writer):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", len(saved) // 2)
    assert training_state.encode(training_state.decode(saved, KEY), KEY) == saved
    monkeypatch.setattr(training_state, "MAX_BYTES", len(saved) - 1)
    with pytest.raises(EditTooLargeError, match="at most"):
        training_state.decode(saved, KEY)
    monkeypatch.undo()
    state = training_state.decode(saved, KEY)
    monkeypatch.setattr(training_state, "MAX_BYTES", len(saved) - 1)
    with pytest.raises(EditTooLargeError, match="at most"):
        training_state.encode(state, KEY)


def test_states_are_plain_values(saved: bytes) -> None:
    """The saved state is of stage 2 after one of its steps, with its losses."""
    state = training_state.decode(saved, KEY)
    assert isinstance(state, TrainingState) and state.stage == "finetune"
    assert {stage: len(losses) for stage, losses in state.losses.items()} == {"embed": 3, "finetune": 2}
