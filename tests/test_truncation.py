"""Facts about smaller adapters: their accuracy, their size, and unchanged adapters."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowmem_imagic.families.portable import MIN_RANK
from lowmem_imagic.layers.adapter_pack import Factors
from lowmem_imagic.layers.truncation import truncated

SHAPES = {
    "lora_unet_a": ((4, 20), (12, 4)),
    "lora_unet_b": ((3, 6, 3, 3), (10, 3, 1, 1)),
    "lora_unet_c": ((4, 8), (30, 4)),
}


def adapter(seed: int = 0) -> dict[str, Factors]:
    """Factors of two linear layers and a convolution, with alphas that are not their ranks."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: (torch.randn(down, generator=generator), torch.randn(up, generator=generator), 2.0 + number)
        for number, (key, (down, up)) in enumerate(SHAPES.items())
    }


def update(factors: Factors) -> Tensor:
    """The matrix that is added to a layer's weight: alpha / r * up @ down."""
    down, up, alpha = factors
    return alpha / down.shape[0] * up.flatten(1).double() @ down.flatten(1).double()


def size(factors: Mapping[str, Factors]) -> int:
    """Numbers stored."""
    return sum(down.numel() + up.numel() for down, up, _ in factors.values())


def test_keeping_everything_changes_nothing() -> None:
    """At 1 the adapter comes back tensor for tensor."""
    whole = adapter()
    kept = truncated(whole, 1.0)
    assert all(kept[key] == factors for key, factors in whole.items())


@given(st.floats(0.01, 0.99), st.integers(0, 5))
def test_bytes_are_within_the_share(keep: float, seed: int) -> None:
    """No more than the share of bytes is kept (two directions at the least), in shapes a LoRA file may have."""
    whole = adapter(seed)
    small = truncated(whole, keep)
    smallest = MIN_RANK * min(down[0].numel() + len(up) for down, up, _ in whole.values())
    assert small and (size(small) <= keep * size(whole) or len(small) == 1)
    assert size(small) >= smallest
    for key, (down, up, alpha) in small.items():
        rank = down.shape[0]
        assert MIN_RANK <= rank <= whole[key][0].shape[0] and alpha == rank
        assert down.shape[1:] == whole[key][0].shape[1:] and up.shape == (*whole[key][1].shape[:1], rank, *up.shape[2:])
        assert up.dim() == down.dim()


@pytest.mark.parametrize("rank", [2, 3])
def test_each_layer_is_its_best_approximation(rank: int) -> None:
    """A truncated layer is the truncated SVD of its update: no matrix of that rank is closer."""
    [(key, factors)] = list(adapter().items())[:1]
    small = truncated({key: factors}, rank / factors[0].shape[0])
    assert small[key][0].shape[0] == rank
    left, sigmas, right = torch.linalg.svd(update(factors), full_matrices=False)
    best = left[:, :rank] * sigmas[:rank] @ right[:rank]
    torch.testing.assert_close(update(small[key]), best, atol=1e-5, rtol=1e-5)


def test_layers_that_move_more_keep_more() -> None:
    """A layer whose update is 100 times another's keeps all of its directions before the other keeps one."""
    whole = adapter()
    down, up, alpha = whole["lora_unet_b"]
    whole["lora_unet_b"] = (down * 100, up, alpha)
    share = size({"lora_unet_b": whole["lora_unet_b"]}) / size(whole)
    small = truncated(whole, share + 1e-9)
    assert set(small) == {"lora_unet_b"} and small["lora_unet_b"][0].shape[0] == 3
    torch.testing.assert_close(update(small["lora_unet_b"]), update(whole["lora_unet_b"]), atol=1e-3, rtol=1e-5)
