"""Facts about the layers that keep less for the backward pass: torch's own values and gradients, fewer bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import away_from_start, new_tiny_unet
from torch import Tensor, nn

from lowmem_imagic.families.lean_unet import make_lean
from lowmem_imagic.layers.lean import GroupNormSiLU, RMSNorm, geglu, swiglu
from lowmem_imagic.planning.counting import Counts

RESIZING = ("ResnetDownsampleBlock2D", "DownBlock2D")
"""Blocks of a UNet that halves pictures in residual blocks; only such heed some of the settings."""


def normalisation(dtype: torch.dtype) -> nn.GroupNorm:
    """A frozen normalisation of 32 channels in 8 groups."""
    norm: nn.GroupNorm = away_from_start(nn.GroupNorm(8, 32)).to(dtype).requires_grad_(False)
    return norm


def both(mine: Callable[[Tensor], Tensor], theirs: Callable[[Tensor], Tensor], x: Tensor) -> list[tuple[Tensor, ...]]:
    """Output and gradient with respect to `x` of each."""
    cotangent = torch.randn_like(theirs(x))
    found = []
    for function in (mine, theirs):
        own = x.clone().requires_grad_()
        y = function(own)
        y.backward(cotangent)
        assert own.grad is not None
        found.append((y.detach(), own.grad))
    return found


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalisation_with_silu_is_torchs(dtype: torch.dtype, layout: torch.memory_format) -> None:
    """GroupNorm with SiLU has the bits of torch's two layers, forward and backward, in either layout."""
    norm = normalisation(dtype)
    x = torch.randn(2, 32, 6, 5).to(dtype).contiguous(memory_format=layout)
    mine, theirs = both(GroupNormSiLU.of(norm), lambda x: F.silu(norm(x)), x)
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geglu_is_torchs(dtype: torch.dtype) -> None:
    """GEGLU has the value of torch's operations and their gradient to rounding."""

    def theirs(x: Tensor) -> Tensor:
        values, gate = x.chunk(2, dim=-1)
        return values * F.gelu(gate)

    [(y, grad), (expected, expected_grad)] = both(geglu, theirs, torch.randn(2, 7, 48).to(dtype))
    assert torch.equal(y, expected)
    assert torch.allclose(grad, expected_grad, rtol=1e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_and_rms_norm_are_torchs_to_rounding(dtype: torch.dtype, relative: Callable[..., float]) -> None:
    """SwiGLU and normalisation by the root mean square have the values and gradients of torch's operations."""

    def plain_swiglu(x: Tensor) -> Tensor:
        gate, values = x.chunk(2, dim=-1)
        return F.silu(gate) * values

    norm = away_from_start(nn.RMSNorm(48, eps=1e-6)).to(dtype).requires_grad_(False)
    x = torch.randn(2, 7, 48).to(dtype)
    for mine, theirs in ((swiglu, plain_swiglu), (RMSNorm.of(norm), norm)):
        for own, expected in zip(*both(mine, theirs, x), strict=True):
            assert own.dtype == dtype
            assert relative(own.float(), expected.float()) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_swiglu_and_rms_norm_keep_their_input_alone() -> None:
    """SwiGLU keeps nothing beside its input, the normalisation a number a row, where torch keeps a copy in fp32."""
    norm = nn.RMSNorm(64, eps=1e-6).bfloat16().requires_grad_(False)
    x = torch.randn(32, 64).bfloat16()
    assert kept(swiglu, x.clone()) == 0
    assert kept(RMSNorm.of(norm), x.clone()) == 32 * 4
    assert kept(norm, x.clone()) >= 2 * x.nbytes


def test_trained_normalisation_has_gradients() -> None:
    """A normalisation whose weights are trained has torch's gradients, as full fine-tuning needs."""
    norm = normalisation(torch.float32).requires_grad_(True)
    x, cotangent = torch.randn(2, 2, 32, 4, 4)
    GroupNormSiLU.of(norm)(x).backward(cotangent)
    found = [norm.weight.grad, norm.bias.grad]
    norm.weight.grad = norm.bias.grad = None
    F.silu(norm(x)).backward(cotangent)
    assert all(torch.equal(a, b) for a, b in zip(found, [norm.weight.grad, norm.bias.grad], strict=True))  # type: ignore[arg-type]


def kept(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes alive after a forward pass beyond its output."""
    count = Counts()
    with count:
        y = function(x.requires_grad_())
    return count.live - y.untyped_storage().nbytes()


def test_less_is_kept() -> None:
    """Beyond input and output GroupNorm with SiLU keeps a few numbers a group and GEGLU nothing."""
    norm = normalisation(torch.float32)
    x = torch.randn(2, 32, 16, 16)
    assert kept(GroupNormSiLU.of(norm), x) == 2 * 2 * 8 * 4
    assert kept(lambda x: F.silu(norm(x)), x.detach()) > x.nbytes
    assert kept(geglu, torch.randn(2, 9, 64)) == 0


@pytest.mark.parametrize(
    "unusual",
    [
        {},
        {"resnet_time_scale_shift": "scale_shift"},
        {"mid_block_scale_factor": 1.4},
        {"down_block_types": RESIZING},
        {"down_block_types": RESIZING, "resnet_out_scale_factor": 2.0},
        {"down_block_types": RESIZING, "resnet_skip_time_act": True},
        {"act_fn": "gelu"},
    ],
    ids=str,
)
def test_a_lean_unet_computes_the_same(unusual: dict[str, Any], relative: Callable[..., float]) -> None:
    """A UNet with these layers has the output and gradients of the one it was, and the same names of weights, also
    where its residual blocks are not all of the usual kind."""
    torch.manual_seed(0)
    unet: Any = away_from_start(new_tiny_unet(**unusual)).requires_grad_(False).eval()
    names = list(unet.state_dict())
    text = torch.randn(2, 7, 16)
    found = []
    for change in (lambda _: None, make_lean):
        change(unet)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = unet(x, torch.tensor([10, 900]), encoder_hidden_states=text).sample
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
    assert list(unet.state_dict()) == names
    assert torch.equal(found[0][0], found[1][0])
    assert relative(found[1][1], found[0][1]) < 1e-5
    if unusual:
        return
    kinds = [type(module).__name__ for module in unet.modules()]
    assert "GEGLU" not in kinds and kinds.count("GroupNormSiLU") == 1 + 2 * kinds.count("_LeanResnet")
    assert "ResnetBlock2D" not in kinds
