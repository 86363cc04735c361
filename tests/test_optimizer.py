"""Facts about the packed optimiser: each row is an Adam of its own."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lowmem_imagic.training.adam import PackedAdam

ROWS, SIZE, STEPS = 3, 40, 20


def problem() -> tuple[Tensor, Tensor]:
    """First weights (N, P) and gradients (steps, N, P) of sizes that differ between rows."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([1e-3, 1.0, 30.0]).view(ROWS, 1)
    return (
        torch.randn(ROWS, SIZE, generator=generator),
        torch.randn(STEPS, ROWS, SIZE, generator=generator) * scales,
    )


def torch_adam(row: int, rate: float = 1e-2, *, taken: list[bool] | None = None) -> tuple[Tensor, Tensor]:
    """The result of torch's own Adam for one row after its steps: weights and first moment."""
    start, grads = problem()
    weights = start[row].clone().requires_grad_()
    optimizer = torch.optim.Adam([weights], lr=rate)
    for step in range(STEPS):
        if taken is None or taken[step]:
            weights.grad = grads[step, row].clone()
            optimizer.step()
    moment = optimizer.state[weights].get("exp_avg", torch.zeros(SIZE))
    return weights.detach(), moment


def check_row(optimizer: PackedAdam, row: int, expected: tuple[Tensor, Tensor]) -> None:
    """Asserts that a row has the weights and the first moment of its own optimiser."""
    torch.testing.assert_close(optimizer.weights[row], expected[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(optimizer.first[row], expected[1], atol=1e-6, rtol=1e-6)


def everyone() -> Tensor:
    """The mask of a step that all rows take."""
    return torch.ones(ROWS, dtype=torch.bool)


def test_every_row_is_torchs_adam() -> None:
    """After 20 steps every row equals a run of torch.optim.Adam of its own."""
    weights, grads = problem()
    optimizer = PackedAdam(weights, learning_rate=1e-2)
    for step in range(STEPS):
        optimizer.step(grads[step], everyone())
    for row in range(ROWS):
        check_row(optimizer, row, torch_adam(row))


def test_rows_may_have_rates_of_their_own() -> None:
    """Learning rates given per row are those of separate optimisers."""
    weights, grads = problem()
    rates = [1e-4, 1e-2, 0.1]
    optimizer = PackedAdam(weights, learning_rate=torch.tensor(rates))
    for step in range(STEPS):
        optimizer.step(grads[step], everyone())
    for row, rate in enumerate(rates):
        check_row(optimizer, row, torch_adam(row, rate))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), min_size=STEPS, max_size=STEPS))
def test_paused_rows_resume_as_if_never_paused(masks: list[list[bool]]) -> None:
    """A row ends where an optimiser ends that saw only the steps the row took part in."""
    weights, grads = problem()
    optimizer = PackedAdam(weights, learning_rate=1e-2)
    for step, mask in enumerate(masks):
        optimizer.step(grads[step], torch.tensor(mask))
    for row in range(ROWS):
        taken = [mask[row] for mask in masks]
        check_row(optimizer, row, torch_adam(row, taken=taken))
        assert optimizer.steps[row].item() == sum(taken)


def test_frozen_rows_keep_their_bits() -> None:
    """A row with mask 0 keeps weights, both moments and step count bit for bit, for any gradient."""
    weights, grads = problem()
    optimizer = PackedAdam(weights, learning_rate=1e-2)
    for step in range(5):
        optimizer.step(grads[step], everyone())
    state = (weights, optimizer.first, optimizer.second, optimizer.steps)
    before = [tensor.clone() for tensor in state]
    for step in range(5, STEPS):
        optimizer.step(grads[step] * 1e6, torch.tensor([True, False, True]))
    for now, then in zip(state, before, strict=True):
        assert torch.equal(now[1], then[1])
        assert not torch.equal(now[0], then[0]) and not torch.equal(now[2], then[2])


def test_weights_are_updated_in_place() -> None:
    """The tensor handed in is the tensor that moves; views of it, such as adapter factors, move along."""
    weights, grads = problem()
    view = weights[:, 3:7]
    before = view.clone()
    PackedAdam(weights, learning_rate=1e-2).step(grads[0], everyone())
    # The first step of Adam has the length of the learning rate in every coordinate.
    torch.testing.assert_close((view - before).abs(), torch.full_like(view, 1e-2), atol=1e-4, rtol=1e-3)


def test_a_broken_row_stays_alone() -> None:
    """A row whose gradient is not a number does not disturb the others."""
    weights, grads = problem()
    grads[3, 1, 0] = torch.nan
    optimizer = PackedAdam(weights, learning_rate=1e-2)
    for step in range(STEPS):
        optimizer.step(grads[step], everyone())
    for row in (0, 2):
        check_row(optimizer, row, torch_adam(row))


def test_state_is_two_moments_and_a_count() -> None:
    """The optimiser keeps 8 bytes a weight and 8 a row: moments, step count and rate."""
    weights, _ = problem()
    optimizer = PackedAdam(weights, learning_rate=1e-2)
    kept = [t for t in vars(optimizer).values() if isinstance(t, Tensor) and t is not weights]
    own = [t for t in kept if t.untyped_storage().nbytes() > 4]
    assert sum(t.untyped_storage().nbytes() for t in own) == 8 * weights.numel() + 8 * ROWS
