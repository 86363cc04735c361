"""Facts about the frozen 8-bit layers: their results, their memory for backward, and the filling of a network."""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from conftest import TEXT_WIDTH, away_from_start, new_tiny_unet
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lowmem_imagic.families.lean_unet import make_lean
from lowmem_imagic.families.stable_diffusion import AT_LATENTS
from lowmem_imagic.layers.adapter_pack import AdapterPack
from lowmem_imagic.layers.frozen import FrozenLinear4bit, FrozenLinear8bit, Int8Conv2d, load_frozen, weight_bytes
from lowmem_imagic.settings.stages import WEIGHT_FORMATS
from tests import calls
from tests.held_bytes import HeldBytes

CPU = torch.device("cpu")
CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "downsampling": {"kernel_size": 3, "padding": 1, "stride": 2},
    "asymmetric": {"kernel_size": (3, 1), "padding": (1, 0), "stride": (2, 1)},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 4},
    "without bias": {"kernel_size": 3, "bias": False},
}


def frozen_linear(outputs: int = 48, inputs: int = 32, *, bias: bool = True) -> tuple[FrozenLinear8bit, nn.Linear]:
    """An 8-bit layer and the float layer it was made from."""
    layer = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    return FrozenLinear8bit.from_weights(layer.weight, layer.bias, CPU), layer


def frozen_conv(name: str = "3x3") -> tuple[Int8Conv2d, nn.Conv2d]:
    """An 8-bit convolution and the float one it was made from."""
    layer = nn.Conv2d(16, 24, **CONVOLUTIONS[name]).requires_grad_(False)
    return Int8Conv2d.from_weights(layer, layer.weight, layer.bias, CPU), layer


def dequantized(layer: Any, like: nn.Module) -> Any:
    """The float layer whose weights are `layer`'s, written out: int8 value times absmax / 127."""
    absmax = (
        layer.absmax if isinstance(layer, Int8Conv2d) else (layer.weight.SCB, layer.state.SCB)[layer.weight.SCB is None]
    )
    values = layer.weight.data.float()
    assert values.abs().max() == 127
    written = copy.deepcopy(like)
    written.weight.data = values * (absmax.float() / 127).view(-1, *[1] * (values.dim() - 1))
    return written


def filled(weights: str, source: nn.Module | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny UNet with weights in the given format, those of `source` or always the same random ones."""
    with init_empty_weights(include_buffers=False):
        unet = new_tiny_unet()
    state = (source or float_unet()).state_dict()
    load_frozen(unet, iter(state.items()), weights=weights, device=CPU, dtype=dtype, in_float=AT_LATENTS)
    return unet


def float_unet() -> Any:
    """The tiny UNet in fp32, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return away_from_start(new_tiny_unet())


def inputs_of_unet(rows: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text for the tiny UNet."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.linspace(1, 990, rows).long(),
        torch.randn(rows, 6, TEXT_WIDTH, generator=generator),
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# Results of a layer


def test_linear_equals_its_written_out_weights(relative: Callable[..., float]) -> None:
    """An 8-bit linear layer computes with its dequantised weights, within 1 % of the float layer."""
    layer, original = frozen_linear()
    x = torch.randn(3, 5, 32)
    assert relative(layer(x), dequantized(layer, original)(x)) < 1e-6
    assert relative(layer(x), original(x)) < 0.01


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_equals_its_written_out_weights(name: str, relative: Callable[..., float]) -> None:
    """An 8-bit convolution computes with its dequantised weights, within 1.5 % of the float one."""
    layer, original = frozen_conv(name)
    x = torch.randn(2, 16, 9, 7)
    assert layer(x).shape == original(x).shape
    assert relative(layer(x), dequantized(layer, original)(x)) < 1e-6
    assert relative(layer(x), original(x)) < 0.015


@pytest.mark.parametrize("shape", [(32,), (4, 32), (2, 3, 4, 32)])
def test_linear_takes_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    """An 8-bit linear layer takes inputs of 1 to 4 dimensions, which stock bitsandbytes does not."""
    layer, original = frozen_linear()
    assert layer(torch.randn(shape)).shape == original(torch.randn(shape)).shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", *CONVOLUTIONS])
def test_input_gradient_is_that_of_the_written_out_layer(
    name: str, dtype: torch.dtype, relative: Callable[..., float]
) -> None:
    """The gradient with respect to the input equals that of the dequantised float layer in the same type."""
    layer, original = frozen_linear() if name == "linear" else frozen_conv(name)
    written = dequantized(layer, original).to(dtype)
    x = torch.randn((4, 32) if name == "linear" else (2, 16, 9, 7)).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = layer(ours)
    cotangent = torch.randn_like(y)
    y.backward(cotangent)
    written(theirs).backward(cotangent)
    assert ours.grad.dtype == dtype
    # In bfloat16 ours rounds scale and cotangent, the other its weights, and both their sums, by a part in 512 at
    # most each; some processors also round on the way.
    assert relative(ours.grad, theirs.grad) < (1e-6 if dtype == torch.float32 else 5 / 512)


@pytest.mark.parametrize("make", [frozen_linear, frozen_conv])
def test_weights_get_no_gradient(make: Callable[[], Any]) -> None:
    """Nothing of an 8-bit layer requires a gradient, and a backward pass leaves none on it."""
    layer, _ = make()
    x = torch.randn((4, 32) if isinstance(layer, FrozenLinear8bit) else (2, 16, 8, 8), requires_grad=True)
    layer(x).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("make", [frozen_linear, frozen_conv])
def test_zero_rows_stay_zero(make: Callable[[], Any]) -> None:
    """Output channels whose weights are all zero come out as their bias, not as NaN."""
    _, original = make()
    original.weight.data[0] = 0
    if isinstance(original, nn.Linear):
        layer: Any = FrozenLinear8bit.from_weights(original.weight, original.bias, CPU)
        y = layer(torch.randn(4, 32))
    else:
        layer = Int8Conv2d.from_weights(original, original.weight, original.bias, CPU)
        y = layer(torch.randn(2, 16, 8, 8)).movedim(1, -1)
    assert y.isfinite().all()
    assert torch.equal(y[..., 0], original.bias[0].expand_as(y[..., 0]))


def test_rows_do_not_see_their_neighbours(relative: Callable[..., float]) -> None:
    """A row of an 8-bit UNet's output is the same with other neighbours, even with an outlier among them."""
    unet = filled("int8")
    latents, timesteps, text = inputs_of_unet(3)
    loud = latents.clone()
    loud[2] *= 100
    with torch.no_grad():
        quiet = unet(latents, timesteps, text).sample[:2]
        beside_outlier = unet(loud, timesteps, text).sample[:2]
        alone = unet(latents[:1], timesteps[:1], text[:1]).sample
    assert torch.equal(quiet, beside_outlier)
    assert relative(alone, quiet[:1]) < 1e-5


def test_results_may_be_added_to_in_place() -> None:
    """The output of an 8-bit layer is no view made inside a Function, so adding to it in place is legal."""
    for layer, shape in ((frozen_linear()[0], (2, 5, 32)), (frozen_conv()[0], (2, 16, 8, 8))):
        x = torch.randn(shape, requires_grad=True)
        y = layer(x)
        y += 1
        y[0].add_(1)
        y.sum().backward()
        assert x.grad is not None


# Memory for the backward pass


def saved_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors autograd saves in one forward pass."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return saved


def live_inputs(unet: nn.Module, layer_types: tuple[type, ...]) -> tuple[int, int]:
    """How many inputs of the layers outlive the forward pass while its graph is kept, out of how many.

    Counts inputs a gradient flows to, but not the text conditioning, which the caller holds.
    """
    latents, timesteps, text = inputs_of_unet()
    latents.requires_grad_()
    text.requires_grad_()
    seen: list[StorageWeakRef] = []

    def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad and args[0] is not text:
            seen.append(StorageWeakRef(args[0].untyped_storage()))

    hooks = [module.register_forward_pre_hook(watch) for module in unet.modules() if isinstance(module, layer_types)]
    result = unet(latents, timesteps, text).sample
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert result.requires_grad
    return sum(not ref.expired() for ref in seen), len(seen)


def held_for_backward(unet: Any, *, checkpointing: bool, adapted: bool) -> int:
    """Bytes one forward pass leaves allocated until its backward pass."""
    if checkpointing:
        unet.enable_gradient_checkpointing()
    latents, timesteps, text = inputs_of_unet()
    if not adapted:
        text.requires_grad_()
        return _held(unet, latents, timesteps, text)
    pack = AdapterPack(unet, calls.NAMES, count=2, adapt="all", rank=2, alpha=2.0)
    for edit in range(2):
        pack.initialize_edit(edit, torch.Generator().manual_seed(0))
    with pack.attached(unet):
        return _held(unet, latents, timesteps, text)


def _held(unet: Any, *inputs: Tensor) -> int:
    with torch.no_grad():
        # Lazy state of the layers, such as bitsandbytes', is not the graph's.
        unet(*inputs)
    counter = HeldBytes()
    with counter:
        result = unet(*inputs).sample
    assert result.requires_grad
    gc.collect()
    return counter.total()


@pytest.mark.parametrize("make", [frozen_linear, frozen_conv])
def test_a_layer_saves_nothing(make: Callable[[], Any]) -> None:
    """For backward a layer saves no tensor, and keeps alive none that it made but its output and its scale."""
    layer, _ = make()
    x = torch.randn((4, 32) if isinstance(layer, FrozenLinear8bit) else (2, 16, 8, 8), requires_grad=True)
    layer(x)
    assert saved_by(layer, x) == []
    counter = HeldBytes()
    with counter:
        y = layer(x)
    gc.collect()
    assert counter.total() == y.nbytes


def test_a_scale_follows_its_weights() -> None:
    """The cached scale of a layer is not used for another type, nor after its absmax has changed."""
    layer, _ = frozen_conv("3x3")
    x = torch.randn(1, 16, 5, 5)
    before = layer(x)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.absmax.mul_(2)
    assert torch.allclose(layer(x) - layer.bias[:, None, None], 2 * (before - layer.bias[:, None, None]), atol=1e-5)
    layer.absmax = 2 * layer.absmax
    layer(x)
    # The second of these may lie where the one of that pass lay.
    layer.absmax = 2 * layer.absmax
    layer.absmax = 2 * layer.absmax
    assert torch.allclose(layer(x) - layer.bias[:, None, None], 16 * (before - layer.bias[:, None, None]), atol=1e-4)


@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_8_bit_holds_no_more_than_float(checkpointing: bool, adapted: bool) -> None:
    """The bytes a UNet holds for backward do not grow when its frozen weights become 8-bit."""
    held = {
        weights: held_for_backward(filled(weights), checkpointing=checkpointing, adapted=adapted)
        for weights in ("fp32", "int8")
    }
    assert 0 < held["int8"] <= held["fp32"]


def test_checkpointing_frees_activations_of_8_bit_layers() -> None:
    """With checkpointing an 8-bit UNet holds less than half of what it holds without."""
    plain, checkpointed = (held_for_backward(filled("int8"), checkpointing=on, adapted=True) for on in (False, True))
    assert checkpointed < plain / 2


def test_checkpointed_inputs_die_with_our_layers_and_live_with_stock_ones() -> None:
    """After a checkpointed forward no input of our layers is alive; stock bitsandbytes keeps every one."""
    ours = filled("int8")
    ours.enable_gradient_checkpointing()
    stock = filled("bnb-int8")
    stock.enable_gradient_checkpointing()
    alive, total = live_inputs(ours, (FrozenLinear8bit,))
    assert alive == 0 and total > 20
    assert live_inputs(stock, (bnb.nn.Linear8bitLt,)) == (total, total)


@pytest.mark.parametrize(("adapt", "again"), [(None, {"conv1"}), ("all", {"conv1", "conv_shortcut", "ff.net.2"})])
def test_checkpointing_stops_before_a_blocks_last_product(adapt: str | None, again: set[str]) -> None:
    """The convolution that ends a residual block is computed once, adapted or not, as it saves nothing; and so are a
    shortcut and the product that ends a transformer block where they are not adapted."""
    unet = filled("int8")
    make_lean(unet)
    unet.enable_gradient_checkpointing()
    latents, timesteps, text = inputs_of_unet()
    passes = Counter[str]()
    endings = ("conv1", "conv2", "conv_shortcut", "ff.net.2")
    blocks = 0
    for name, module in unet.named_modules():
        for ending in endings:
            if name.endswith("." + ending) and "blocks" in name:
                module.register_forward_pre_hook(lambda *_, name=name: passes.update([name]))
                blocks += 1
    pack = adapt and AdapterPack(unet, calls.NAMES, count=2, adapt=adapt, rank=2, alpha=2.0)
    with pack.attached(unet) if pack else nullcontext():
        unet(latents, timesteps, text if pack else text.requires_grad_()).sample.sum().backward()
    assert len(passes) == blocks > 10
    twice = {ending for ending in endings for name, count in passes.items() if name.endswith(ending) and count == 2}
    assert twice == again and set(passes.values()) == {1, 2}


# 4 bits


@pytest.mark.parametrize("inputs", [32, 64, 160])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_in_4_bits(inputs: int, dtype: torch.dtype, relative: Callable[..., float]) -> None:
    """A layer in nf4 is within 10 % of the float one, also where blocks reach over the ends of rows; its gradient is
    that of the expanded weight, and a row does not depend on the others."""
    plain = nn.Linear(inputs, 96).requires_grad_(False)
    layer = FrozenLinear4bit.from_weights(plain.weight, plain.bias, CPU)
    assert relative(layer.expanded(torch.float32), plain.weight) < 0.1
    x = torch.randn(2, 5, inputs, dtype=dtype, requires_grad=True)
    y = layer(x)
    assert y.dtype == dtype and relative(y.float(), plain(x.float())) < 0.12
    y.backward(grad := torch.randn_like(y))
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative(x.grad.float(), grad.float() @ layer.expanded(torch.float32)) < limit
    assert relative(layer(x[:1]), y[:1]) < limit


def test_layers_in_4_bits_keep_nothing() -> None:
    """For the backward pass a layer in nf4 keeps no tensor."""
    layer = FrozenLinear4bit.from_weights(torch.randn(96, 64), torch.randn(96), CPU)
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True))
    assert not kept


def test_bytes_in_4_bits_are_counted_on_the_meta_device() -> None:
    """Half a byte a weight, a byte for 64, four for 16384 and two tables: the same as counted without weights."""
    weight = torch.randn(512, 256)
    places = torch.device("cpu"), torch.device("meta")
    bytes_of = [weight_bytes(FrozenLinear4bit.from_weights(weight.to(place), None, place)) for place in places]
    assert bytes_of[0] == bytes_of[1] == 512 * 256 // 2 + 512 * 256 // 64 + 4 * 8 + 4 * (16 + 256 + 1)


# How a network is filled


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_every_format_fills_the_network(weights: str, relative: Callable[..., float]) -> None:
    """Each format gives a frozen network in eval mode, nothing on meta, within 3 % of the float one; 4 bits less so."""
    dtype = torch.bfloat16 if weights == "bf16" else torch.float32
    unet, reference = filled(weights, dtype=dtype), float_unet()
    assert not any(t.is_meta for t in [*unet.parameters(), *unet.buffers()])
    assert not any(p.requires_grad for p in unet.parameters())
    assert not any(module.training for module in unet.modules())
    latents, timesteps, text = inputs_of_unet()
    with torch.no_grad():
        y = unet(latents.to(dtype), timesteps, text.to(dtype)).sample
        assert y.dtype == dtype
        assert relative(y, reference(latents, timesteps, text).sample) < {"fp32": 1e-5, "nf4": 0.3}.get(weights, 0.03)


def test_only_the_convolutions_on_latents_stay_float() -> None:
    """In the tiny UNet all linear layers and convolutions become 8-bit but conv_in and conv_out."""
    unet = filled("int8")
    assert float_layers(unet) == ["conv_in", "conv_out"]
    assert unet.conv_in.weight.dtype == unet.conv_out.weight.dtype == torch.float32
    assert all(m.weight.dtype == torch.int8 for m in unet.modules() if isinstance(m, (FrozenLinear8bit, Int8Conv2d)))


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_biases_are_in_the_type_of_the_arithmetic(weights: str) -> None:
    """Biases and unquantised weights have the requested type, so that no product begins with a cast."""
    unet = filled(weights, dtype=torch.bfloat16)
    assert {p.dtype for p in unet.parameters()} - {torch.int8, torch.uint8} == {torch.bfloat16}


def float_layers(network: nn.Module) -> list[str]:
    """Names of the linear layers and convolutions that are not 8-bit."""
    return [name for name, module in network.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]


def test_stock_format_leaves_convolutions_alone() -> None:
    """ "bnb-int8" is stock bitsandbytes: linear layers only, and none of ours."""
    unet = filled("bnb-int8")
    assert not any(isinstance(m, (FrozenLinear8bit, Int8Conv2d)) for m in unet.modules())
    assert not any(type(m) is nn.Linear for m in unet.modules())
    assert any(type(m) is nn.Conv2d and m.in_channels > 4 for m in unet.modules())


def test_stable_diffusion_1_5_is_converted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Stable Diffusion 1.5's 282 linear layers and convolutions 280 become 8-bit: 99.9 % of its weights."""
    monkeypatch.setattr(FrozenLinear8bit, "from_weights", lambda weight, bias, device: nn.Flatten())
    monkeypatch.setattr(Int8Conv2d, "from_weights", lambda like, weight, bias, device: nn.Unflatten(0, (1,)))
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    sizes = {name: p.numel() for name, p in unet.named_parameters()}
    assert sum(sizes.values()) == 859_520_964
    load_frozen(
        unet,
        list(unet.state_dict().items()),
        weights="int8",
        device=torch.device("meta"),
        dtype=torch.float32,
        in_float=AT_LATENTS,
    )
    assert sum(isinstance(m, nn.Flatten) for m in unet.modules()) == 184
    assert sum(isinstance(m, nn.Unflatten) for m in unet.modules()) == 96
    assert float_layers(unet) == ["conv_in", "conv_out"]
    left = sum(p.numel() for name, p in unet.named_parameters())
    assert left < 0.001 * sum(sizes.values())


class Tracked:
    """Yields tensors one by one, and checks at each request which earlier ones are still alive."""

    def __init__(self, state: dict[str, Tensor], *, big: int) -> None:
        self.shapes = {name: tensor.shape for name, tensor in state.items()}
        self.big = big
        self.refs: list[weakref.ref[Tensor]] = []
        self.most_alive = 0
        self.read: list[str] = []

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, shape in self.shapes.items():
            self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.refs))
            self.read.append(name)
            yield name, self._new(shape)

    def _new(self, shape: torch.Size) -> Tensor:
        tensor = torch.randn(shape)
        if tensor.numel() >= self.big:
            self.refs.append(weakref.ref(tensor))
        return tensor


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_weights_are_read_one_layer_at_a_time(weights: str) -> None:
    """No weight in full precision is alive when the next is read, so the peak is the model plus one layer."""
    with init_empty_weights(include_buffers=False):
        unet = new_tiny_unet()
    state = {name: tensor for name, tensor in sorted(unet.state_dict().items())}
    tracked = Tracked(state, big=1000)
    load_frozen(unet, tracked, weights=weights, device=CPU, dtype=torch.float32, in_float=AT_LATENTS)
    assert len(tracked.refs) > 50
    assert tracked.most_alive == 0
    gc.collect()
    assert not any(ref() is not None for ref in tracked.refs)


@pytest.mark.parametrize("weights", WEIGHT_FORMATS)
def test_nothing_aliases_the_source(weights: str) -> None:
    """The filled network shares no memory with the file, so a mapped file can be closed."""
    with init_empty_weights(include_buffers=False):
        unet = new_tiny_unet()
    state = float_unet().state_dict()
    load_frozen(unet, state.items(), weights=weights, device=CPU, dtype=torch.float32, in_float=AT_LATENTS)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    ours = {name for name, p in unet.named_parameters() if p.untyped_storage().data_ptr() in theirs}
    assert not ours


def test_order_of_tensors_does_not_matter() -> None:
    """A checkpoint whose tensors come in reverse order fills the same network."""
    state = float_unet().state_dict()
    with init_empty_weights(include_buffers=False):
        unet = new_tiny_unet()
    load_frozen(unet, reversed(state.items()), weights="int8", device=CPU, dtype=torch.float32, in_float=AT_LATENTS)
    expected = filled("int8").state_dict()
    assert unet.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda state: state.pop("mid_block.resnets.0.conv1.bias"),
            r"lack 1 .*mid_block\.resnets\.0\.conv1\.bias",
        ),
        (lambda state: state.update({"extra.weight": torch.zeros(3)}), r"extra\.weight"),
        (
            lambda state: state.update({"conv_out.bias": torch.zeros(9)}),
            r"conv_out\.bias has shape \(9,\).*\(4,\)",
        ),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_wrong_checkpoints_are_refused(change: Callable[[dict[str, Tensor]], Any], named: str) -> None:
    """A checkpoint with a missing, unexpected or misshapen tensor is refused by that tensor's name."""
    state = float_unet().state_dict()
    change(state)
    with init_empty_weights(include_buffers=False):
        unet = new_tiny_unet()
    with pytest.raises(ValueError, match=named):
        load_frozen(unet, state.items(), weights="int8", device=CPU, dtype=torch.float32, in_float=AT_LATENTS)


def test_unusual_convolutions_stay_float() -> None:
    """Convolutions our 8-bit layer does not cover (dilated, reflecting, "same") are left in float."""
    odd = (
        nn.Conv2d(8, 8, 3, dilation=2),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(8, 8, 3, padding="same"),
        nn.ConvTranspose2d(8, 8, 3),
    )
    network = nn.ModuleList(odd)
    state = network.state_dict()
    load_frozen(network.to("meta"), state.items(), weights="int8", device=CPU, dtype=torch.float32)
    assert [type(layer) for layer in network] == [type(layer) for layer in odd]


# Sizes


def test_weight_bytes_of_layers() -> None:
    """An 8-bit layer takes a byte a weight, 4 a scale and its float bias, before and after its first use."""
    linear, _ = frozen_linear(48, 32)
    conv, _ = frozen_conv("3x3")
    assert weight_bytes(linear) == 48 * 32 + 48 * 4 + 48 * 4
    assert weight_bytes(conv) == 24 * 16 * 9 + 24 * 4 + 24 * 4
    linear(torch.randn(2, 32))
    assert weight_bytes(linear) == 48 * 32 + 48 * 4 + 48 * 4


def test_weight_bytes_of_a_network() -> None:
    """Ours is the smallest: 8-bit everything, then 8-bit linear layers, then bfloat16, then fp32."""
    sizes = {
        weights: weight_bytes(filled(weights, dtype=torch.bfloat16 if weights == "bf16" else torch.float32))
        for weights in WEIGHT_FORMATS
    }
    parameters = sum(p.numel() for p in float_unet().parameters())
    assert sizes["fp32"] == 4 * parameters and sizes["bf16"] == 2 * parameters
    assert parameters < sizes["int8"] < 1.15 * parameters
    assert sizes["nf4"] < sizes["int8"] < sizes["bnb-int8"] < sizes["fp32"]


def test_convolutions_are_stored_channels_last() -> None:
    """8-bit kernels lie in memory channels-last, and quantising again what was float keeps the geometry."""
    layer, original = frozen_conv("downsampling")
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert (layer.stride, layer.padding, layer.kernel_size) == (original.stride, original.padding, (3, 3))


def test_an_int8_convolution_is_float_until_quantized() -> None:
    """Until it is quantised `Int8Conv2d` is a plain float convolution, as peft expects of it."""
    layer = Int8Conv2d(4, 6, 3)
    x = torch.randn(1, 4, 8, 8)
    expected = F.conv2d(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.allclose(layer.quantize_()(x), expected, atol=0.02)
