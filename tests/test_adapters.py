"""Facts about packed adapters: they are N peft runs in one pass, and leaving them leaves nothing behind."""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import TEXT_WIDTH
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lowmem_imagic.errors import ConfigError
from lowmem_imagic.families.adapter_names import TARGETS, kohya_key
from lowmem_imagic.layers import lora as adapter_layers
from lowmem_imagic.layers.adapter_pack import AdapterPack, Factors, check_endings, target_modules
from lowmem_imagic.planning.counting import Counts
from lowmem_imagic.settings.stages import ADAPT_TARGETS
from tests import calls

RANK, ALPHA = 3, 5.0
"""Unequal, so that a forgotten scale shows."""
UNIFORM = [0, 0, 1, 1, 2, 2]
MIXED = [2, 0, 1, 1, 0, 2, 2]


def inputs_of_unet(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, timesteps and text for the tiny UNet."""
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(rows, 4, 8, 8, generator=generator),
        torch.linspace(1, 990, rows).long(),
        torch.randn(rows, 6, TEXT_WIDTH, generator=generator),
    )


def generators(*seeds: int) -> list[torch.Generator]:
    """One generator for each seed."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def drawn(pack: AdapterPack, *seeds: int) -> AdapterPack:
    """The pack with the factors that each edit starts stage 2 from."""
    for edit, generator in enumerate(generators(*seeds)):
        pack.initialize_edit(edit, generator)
    return pack


def trained_pack(network: nn.Module, *, edits: int = 3, adapt: str = "all", rank: int = RANK) -> AdapterPack:
    """A pack whose factors are all away from zero."""
    pack = AdapterPack(network, calls.NAMES, count=edits, adapt=adapt, rank=rank, alpha=ALPHA)
    drawn(pack, *range(edits))
    pack.weights.add_(torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(9)), alpha=0.05)
    return pack


def predict(
    network: Any,
    rows: int,
    pack: AdapterPack | None = None,
    index: list[int] | None = None,
    strengths: Tensor | None = None,
) -> Tensor:
    """The network's output on fixed inputs, with a pack's adapters if one is given."""
    with torch.no_grad():
        if pack is None:
            return network(*inputs_of_unet(rows)).sample
        pack.set_rows(None if index is None else torch.tensor(index), strengths)
        with pack.attached(network):
            return network(*inputs_of_unet(rows)).sample


@pytest.fixture
def unet(load_base: Callable[..., Any]) -> Any:
    """The tiny UNet in 8 bit."""
    return calls.unet(load_base())


@pytest.fixture(scope="module")
def stable_diffusion() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)


class Small(nn.Module):
    """One linear layer and one convolution, named as a UNet names such layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q = nn.Linear(6, 5)
        self.conv1 = nn.Conv2d(6, 4, 3, padding=1, stride=2)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_q(x.movedim(1, -1)), self.conv1(x)


# Against peft


class PeftRun:
    """One edit's adapter in peft's own layers, over a network of its own."""

    def __init__(self, network: Any, adapt: str) -> None:
        self.names = list(target_modules(network, calls.NAMES, adapt))
        network.add_adapter(
            LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS[adapt]), init_lora_weights=False)
        )
        self.network = network

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A layer's A and B."""
        layer = self.network.get_submodule(name)
        return layer.lora_A["default"].weight, layer.lora_B["default"].weight

    def __call__(
        self, exported: dict[str, Factors], rows: Tensor, inputs: tuple[Tensor, ...], cotangent: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The output for the chosen rows and the gradients of all factors, A and B of each layer in turn."""
        with torch.no_grad():
            for name in self.names:
                for parameter, value in zip(self.factors(name), exported[kohya_key(name)][:2], strict=True):
                    parameter.copy_(value)
                    parameter.grad = None
        output = self.network(*[value[rows] for value in inputs]).sample
        (output * cotangent[rows]).sum().backward()
        return output.detach(), [p.grad for name in self.names for p in self.factors(name)]


PEFT_CASES = [
    *itertools.product(ADAPT_TARGETS, ("fp32", "int8"), (False,), ("double",)),
    *itertools.product(("all",), ("fp32", "int8"), (True,), ("double",)),
    *itertools.product(("all",), ("fp32", "int8"), (False,), ("single",)),
]


@pytest.mark.parametrize(("adapt", "weights", "checkpointing", "precision"), PEFT_CASES)
def test_a_pack_equals_separate_peft_runs(
    adapt: str,
    weights: str,
    checkpointing: bool,
    precision: str,
    load_base: Callable[..., Any],
    relative: Callable[..., float],
) -> None:
    """A pack of 3 has the outputs and gradients of 3 peft runs, for any order of its rows.

    In double precision every factor's gradient is peft's, to the rounding of its fp32 storage. In single
    precision an edit's whole gradient is; some layers have terms that nearly cancel.
    """
    dtype = {"double": torch.float64, "single": torch.float32}[precision]
    network = calls.unet(load_base(weights=weights, checkpointing=checkpointing)).to(dtype)
    peft_run = PeftRun(calls.unet(load_base(weights=weights, checkpointing=checkpointing)), adapt)
    peft_run.network.to(dtype)
    pack = trained_pack(network, adapt=adapt)
    flat = pack.enable_gradients()
    for order, index in ((UNIFORM, None), (MIXED, torch.tensor(MIXED))):
        latents, timesteps, text = inputs_of_unet(len(order))
        inputs = (latents.to(dtype), timesteps, text.to(dtype))
        cotangent = torch.randn(len(order), 4, 8, 8, generator=torch.Generator().manual_seed(1))
        flat.zero_()
        pack.set_rows(index)
        with pack.attached(network):
            output = network(*inputs).sample
            (output * cotangent).sum().backward()
        for edit in range(3):
            rows = (torch.tensor(order) == edit).nonzero().flatten()
            expected, expected_grads = peft_run(pack.export(edit), rows, inputs, cotangent)
            pairs = [
                (p.grad[edit].flatten(), q.flatten()) for p, q in zip(pack.parameters, expected_grads, strict=True)
            ]
            if precision == "double":
                assert relative(output[rows], expected) < 1e-7
                assert max(relative(ours, theirs) for ours, theirs in pairs) < 1e-6
            else:
                assert relative(output[rows], expected) < 1e-5
                assert relative(flat[edit], torch.cat([theirs for _, theirs in pairs])) < 1e-5


def test_first_factors_are_drawn_as_peft_draws_them() -> None:
    """A is uniform within 1 / sqrt(fan-in) as in peft's initialisation, and B is zero."""
    network = nn.ModuleDict({"to_q": nn.Linear(400, 300), "conv1": nn.Conv2d(40, 20, 3)})
    pack = AdapterPack(network, calls.NAMES, count=1, adapt="all", rank=64, alpha=64.0)
    drawn(pack, 0)
    for name, fan_in in (("to_q", 400), ("conv1", 360)):
        down, up, _ = pack.export(0)[kohya_key(name)]
        reference = nn.init.kaiming_uniform_(torch.empty_like(down), a=5**0.5)
        assert 0.98 < down.abs().max() * fan_in**0.5 <= 1
        assert down.std().item() == pytest.approx(reference.std().item(), rel=0.02)
        assert abs(down.mean()) * fan_in**0.5 < 0.02
        assert not up.any()


# Edits do not mix


def test_an_edit_starts_the_same_in_every_pack(unet: Any) -> None:
    """An edit's first factors depend on its own generator only, not on the pack it travels in."""
    together = AdapterPack(unet, calls.NAMES, count=3, adapt="all", rank=RANK, alpha=ALPHA)
    drawn(together, 7, 8, 9)
    for edit, seed in enumerate((7, 8, 9)):
        alone = AdapterPack(unet, calls.NAMES, count=1, adapt="all", rank=RANK, alpha=ALPHA)
        drawn(alone, seed)
        assert torch.equal(alone.weights[0], together.weights[edit])


def test_fresh_adapters_change_nothing(unet: Any) -> None:
    """Before training, a network with adapters gives the bits of the network without."""
    pack = AdapterPack(unet, calls.NAMES, count=3, adapt="all", rank=RANK, alpha=ALPHA)
    drawn(pack, 0, 1, 2)
    assert torch.equal(predict(unet, 6, pack), predict(unet, 6))


@pytest.mark.parametrize(("order", "index"), [(UNIFORM, None), (MIXED, MIXED)], ids=["uniform", "mixed"])
def test_gradients_of_one_edit_stay_in_its_row(unet: Any, order: list[int], index: list[int] | None) -> None:
    """The loss of one edit leaves exactly zero gradient in the rows of the others."""
    pack = trained_pack(unet)
    grads = pack.enable_gradients()
    pack.set_rows(None if index is None else torch.tensor(index))
    with pack.attached(unet):
        output = unet(*inputs_of_unet(len(order))).sample
        output[torch.tensor(order) == 1].square().sum().backward()
    assert grads[1].abs().min() >= 0 and grads[1].norm() > 0
    assert not grads[[0, 2]].any()


def test_a_row_does_not_depend_on_its_neighbours(unet: Any, relative: Callable[..., float]) -> None:
    """A row has the same output alone, in equal shares and among rows of other edits."""
    pack = trained_pack(unet)
    together = predict(unet, 6, pack)
    assert relative(predict(unet, 6, pack, UNIFORM), together) < 1e-5
    for row, edit in enumerate(UNIFORM):
        pack.set_rows(torch.tensor([edit]))
        with torch.no_grad(), pack.attached(unet):
            alone = unet(*[value[row : row + 1] for value in inputs_of_unet(6)]).sample
        assert relative(alone[0], together[row]) < 1e-5


# Attach and leave


class Snapshot:
    """The modules of a network and its output."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modules = list(network.named_modules())
        self.state = {name: t.clone() for name, t in network.state_dict().items()}
        self.output = predict(network, 2)

    def check(self) -> None:
        """Asserts that the network has not changed."""
        now = list(self.network.named_modules())
        assert [name for name, _ in now] == [name for name, _ in self.modules]
        assert all(a is b for (_, a), (_, b) in zip(now, self.modules, strict=True))
        state = self.network.state_dict()
        assert list(state) == list(self.state)
        assert all(torch.equal(state[name], tensor) for name, tensor in self.state.items())
        assert torch.equal(predict(self.network, 2), self.output)
        assert not any(p.requires_grad or p.grad is not None for p in self.network.parameters())


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_leaving_restores_the_network_exactly(weights: str, load_base: Callable[..., Any]) -> None:
    """After a pack was trained in it a network has its own modules, names, tensors and output bits back."""
    network = calls.unet(load_base(weights=weights))
    predict(network, 2)
    before = Snapshot(network)
    pack = trained_pack(network, edits=2)
    pack.enable_gradients()
    for _ in range(2):
        with pack.attached(network):
            output = network(*inputs_of_unet(2)).sample
            output.square().sum().backward()
            assert sum(isinstance(m, adapter_layers.PackedLoraLayer) for m in network.modules()) == 79
        before.check()
    assert not torch.equal(output.detach(), before.output)


def test_an_error_inside_restores_the_network(unet: Any) -> None:
    """An exception in the block leaves the network as it was."""
    predict(unet, 2)
    before = Snapshot(unet)
    pack = trained_pack(unet, edits=2)
    with pytest.raises(KeyboardInterrupt), pack.attached(unet):
        raise KeyboardInterrupt
    before.check()


@pytest.mark.parametrize("after", [0, 1, 40, 78])
def test_an_error_while_attaching_restores_the_network(unet: Any, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception half-way through attaching leaves the network as it was."""
    predict(unet, 2)
    before = Snapshot(unet)
    pack = trained_pack(unet, edits=2)
    made = itertools.count()
    original = adapter_layers.PackedLoraLayer.__init__

    def failing(self: Any, *args: Any) -> None:
        if next(made) == after:
            raise MemoryError
        original(self, *args)

    monkeypatch.setattr(adapter_layers.PackedLoraLayer, "__init__", failing)
    with pytest.raises(MemoryError), pack.attached(unet):
        raise AssertionError("the block must not run")
    before.check()


def test_making_a_pack_does_not_touch_the_network(unet: Any) -> None:
    """A pack can be made, drawn, loaded and freed without any change to the network."""
    predict(unet, 2)
    before = Snapshot(unet)
    pack = trained_pack(unet)
    pack.enable_gradients()
    AdapterPack.load(unet, calls.NAMES, [pack.export(0)])
    before.check()


# Which layers


@pytest.mark.parametrize(("adapt", "count"), [("attn", 128), ("attn+ff", 192), ("all", 278)])
def test_layers_of_stable_diffusion_1_5(stable_diffusion: nn.Module, adapt: str, count: int) -> None:
    """On Stable Diffusion 1.5 the three choices adapt 128, 192 and 278 layers, each choice the one before too."""
    chosen = target_modules(stable_diffusion, calls.NAMES, adapt)
    assert len(chosen) == count
    if adapt != "attn":
        fewer = ADAPT_TARGETS[ADAPT_TARGETS.index(adapt) - 1]
        assert target_modules(stable_diffusion, calls.NAMES, fewer).keys() < chosen.keys()


def test_all_covers_every_layer_but_the_outermost(stable_diffusion: nn.Module) -> None:
    """ "all" leaves out the convolutions on latents and the two layers of the time embedding, and nothing else."""
    layers = {name for name, m in stable_diffusion.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    left = layers - target_modules(stable_diffusion, calls.NAMES, "all").keys()
    assert left == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


def test_attn_is_attention_only(stable_diffusion: nn.Module) -> None:
    """ "attn" adapts the four projections of every attention; "attn+ff" adds no convolution but the 1x1 ones."""
    assert all(".attn" in name for name in target_modules(stable_diffusion, calls.NAMES, "attn"))
    for module in target_modules(stable_diffusion, calls.NAMES, "attn+ff").values():
        assert isinstance(module, nn.Linear) or module.kernel_size == (1, 1)


@pytest.mark.parametrize(
    ("adapt", "target_modules_of_peft"),
    [
        ("to_q,to_v", ["to_q", "to_v"]),
        ("to_out.0, ff.net.2", ["to_out.0", "ff.net.2"]),
        ("mid_block.resnets.0.conv1", ["mid_block.resnets.0.conv1"]),
        (r"(down|up)_blocks\.0\..*(conv1|to_k)", r"(down|up)_blocks\.0\..*(conv1|to_k)"),
        ("all-linear", "all-linear"),
        ("attn", list(TARGETS["attn"])),
    ],
)
def test_an_expression_covers_the_layers_that_peft_adapts(
    stable_diffusion: nn.Module, adapt: str, target_modules_of_peft: Any
) -> None:
    """`adapt` takes any `target_modules` of peft, and covers the layers that get an adapter from peft itself."""
    config, network = LoraConfig(r=1, target_modules=target_modules_of_peft), copy.deepcopy(stable_diffusion)
    adapted = inject_adapter_in_model(config, network, low_cpu_mem_usage=True)
    theirs = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    assert target_modules(stable_diffusion, calls.NAMES, adapt).keys() == theirs != set()


@pytest.mark.parametrize(
    ("adapt", "reason"), [("attnn", "covers no layer"), (".*attn1", "kind Attention"), ("norm1", "kind [A-Z]")]
)
def test_an_expression_that_covers_no_such_layers_is_refused(
    stable_diffusion: nn.Module, adapt: str, reason: str
) -> None:
    """Layers that cannot be adapted, or none at all, are an error that names the setting and the expression."""
    with pytest.raises(ConfigError, match=reason) as caught:
        target_modules(stable_diffusion, calls.NAMES, adapt)
    assert caught.value.settings == ("adapt",) and repr(adapt) in str(caught.value)


def test_every_ending_covers_a_layer_of_some_network(stable_diffusion: nn.Module) -> None:
    """An ending that covers no layer is refused by name, with the endings that there are, though others cover some; in
    a cascade it may be of one network alone."""
    other = nn.ModuleDict({"to_q": nn.Linear(2, 2), "only_here": nn.Linear(2, 2)})
    networks = [(stable_diffusion, calls.NAMES), (other, calls.NAMES)]
    check_endings(networks, "to_q,only_here,mid_block.resnets.0.conv1")
    with pytest.raises(ConfigError, match=r"but to_vv, o_q covers no layer.*to_out\.0.*net\.2.*only_here") as caught:
        check_endings(networks, "to_q,to_vv,o_q")
    assert caught.value.settings == ("adapt",)


def test_choices_are_those_of_the_settings() -> None:
    """The settings offer exactly the choices that adapters know."""
    assert tuple(TARGETS) == ADAPT_TARGETS


def test_kohya_keys_are_distinct(stable_diffusion: nn.Module) -> None:
    """No two layers of Stable Diffusion 1.5 share a kohya key, though dots become underscores."""
    names = target_modules(stable_diffusion, calls.NAMES, "all")
    assert len({kohya_key(name) for name in names}) == len(names)
    assert kohya_key("mid_block.resnets.0.conv1") == "lora_unet_mid_block_resnets_0_conv1"


def test_a_network_without_such_layers_is_refused() -> None:
    """A network that has none of the layers to adapt is refused, not adapted in nothing."""
    with pytest.raises(ConfigError, match="covers no layer"):
        AdapterPack(nn.Sequential(nn.Linear(3, 3)), calls.NAMES, count=1, adapt="all", rank=1, alpha=1.0)


# Storage


def test_all_factors_of_an_edit_lie_in_one_row(unet: Any) -> None:
    """Factors and gradients are views of two flat (N, P) tensors, each element used exactly once."""
    pack = trained_pack(unet)
    grads = pack.enable_gradients()
    assert grads.shape == pack.weights.shape
    for flat, parts in ((pack.weights, pack.parameters), (grads, [p.grad for p in pack.parameters])):
        assert sum(part.numel() for part in parts) == flat.numel()
        for part in parts:
            part.data.fill_(1)
        assert bool((flat == 1).all())


def test_factors_stay_fp32_over_a_bfloat16_base(load_base: Callable[..., Any]) -> None:
    """Over a bfloat16 base the factors and their gradients are fp32, and the output is bfloat16."""
    network = calls.unet(load_base(weights="bf16"))
    pack = trained_pack(network, edits=2)
    grads = pack.enable_gradients()
    latents, timesteps, text = inputs_of_unet(2)
    with pack.attached(network):
        output = network(latents.bfloat16(), timesteps, text.bfloat16()).sample
        output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert grads.dtype == pack.weights.dtype == torch.float32
    assert grads.isfinite().all() and all(p.grad.any() for p in pack.parameters)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("alpha", [4.0, 3.0])
def test_gradients_over_bfloat16_are_autograds_own(
    load_base: Callable[..., Any], alpha: float, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two passes over a bfloat16 base leave the bits that autograd's own casts leave, in fewer operations."""
    network = calls.unet(load_base(weights="bf16", checkpointing=checkpointing))
    latents, timesteps, text = inputs_of_unet(2)
    found, operations = [], []
    for _ in range(2):
        pack = AdapterPack(network, calls.NAMES, count=2, adapt="all", rank=4, alpha=alpha)
        pack.weights.copy_(0.1 * torch.randn(pack.weights.shape, generator=torch.Generator().manual_seed(0)))
        found.append(pack.enable_gradients())
        with pack.attached(network), Counts() as count:
            for part in (latents, -latents):
                network(part.bfloat16(), timesteps, text.bfloat16()).sample.float().square().sum().backward()
        operations.append(count.operations)
        monkeypatch.setattr(adapter_layers, "kept_gradient", lambda factors, dtype: factors.to(dtype))
    assert found[0].any() and torch.equal(*found)
    # A factor that is scaled on its way is cast as autograd does.
    direct = len(pack.parameters) if alpha == 4 else len(pack.parameters) // 2
    assert operations[1] - operations[0] == 2 * direct


# Finished adapters


def test_an_exported_adapter_loads_to_the_same_output(unet: Any) -> None:
    """Exported and loaded again, a pack gives the same bits, and exports the same bits."""
    pack = trained_pack(unet)
    exported = [pack.export(edit) for edit in range(3)]
    loaded = AdapterPack.load(unet, calls.NAMES, exported)
    assert torch.equal(predict(unet, 7, loaded, MIXED), predict(unet, 7, pack, MIXED))
    for edit, adapter in enumerate(exported):
        again = loaded.export(edit)
        assert list(again) == list(adapter)
        for key, (down, up, alpha) in adapter.items():
            assert torch.equal(again[key][0], down) and torch.equal(again[key][1], up)
            assert again[key][2] == alpha == ALPHA


def test_exported_factors_are_copies(unet: Any) -> None:
    """An exported adapter does not change when training continues."""
    pack = trained_pack(unet)
    factors = pack.export(1)
    before = {key: down.clone() for key, (down, _, _) in factors.items()}
    pack.weights.zero_()
    assert all(torch.equal(factors[key][0], tensor) for key, tensor in before.items())


def test_exported_shapes_are_kohyas(unet: Any) -> None:
    """A convolution's up factor is exported as a 1x1 kernel, a linear layer's as a matrix."""
    exported = trained_pack(unet).export(0)
    for name, module in target_modules(unet, calls.NAMES, "all").items():
        down, up, _ = exported[kohya_key(name)]
        assert down.shape[0] == up.shape[1] == RANK
        assert down.dim() == up.dim() == module.weight.dim()
        assert up.shape[2:] == ((1, 1) if up.dim() == 4 else ())


def test_edits_of_other_ranks_and_layers_load_together(unet: Any, relative: Callable[..., float]) -> None:
    """Edits of rank 1, 4 and 2 on different layers share a pack; each gives the same result as alone."""
    choices = (("all", 1), ("attn", 4), ("attn+ff", 2))
    exported = [trained_pack(unet, adapt=adapt, rank=rank).export(1) for adapt, rank in choices]
    together = AdapterPack.load(unet, calls.NAMES, exported)
    # A layer takes the room of the highest rank that an edit has there, not of the highest of all.
    attention, others = (sum(d.numel() + u.numel() for d, u, _ in adapter.values()) for adapter in exported[1::-1])
    assert together.weights.shape[1] < 4 * others < attention + 4 * others
    for edit, adapter in enumerate(exported):
        assert set(together.export(edit)) == set(adapter)
        alone = AdapterPack.load(unet, calls.NAMES, [adapter])
        index = [edit] * 3
        assert relative(predict(unet, 3, together, index), predict(unet, 3, alone)) < 1e-5
        again = AdapterPack.load(unet, calls.NAMES, [together.export(edit)])
        assert relative(predict(unet, 3, again), predict(unet, 3, alone)) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda down, up: (down[:, 1:], up),
        lambda down, up: (down, up[1:]),
        lambda down, up: (down[1:], up),
        lambda down, up: (down[..., None, None], up),
    ],
    ids=["inputs", "outputs", "rank", "kernel"],
)
def test_factors_that_do_not_fit_are_refused(unet: Any, change: Callable[..., Any]) -> None:
    """Factors whose sizes do not fit their layer are refused with that layer's name."""
    exported = trained_pack(unet).export(0)
    key = next(key for key, (down, _, _) in exported.items() if down.dim() == 2)
    down, up, alpha = exported[key]
    with pytest.raises(ValueError, match=f"{key} has factors"):
        AdapterPack.load(unet, calls.NAMES, [{**exported, key: (*change(down, up), alpha)}])


@pytest.mark.parametrize("edits", [[], [{}]])
def test_no_factors_are_refused(edits: list[Any], unet: Any) -> None:
    """An empty pack is refused with a clear message."""
    with pytest.raises(ValueError, match="no adapters"):
        AdapterPack.load(unet, calls.NAMES, edits)


def test_unknown_layers_are_refused(unet: Any) -> None:
    """An adapter for a layer the base lacks is refused, not loaded in part."""
    exported = trained_pack(unet).export(0)
    factors = next(iter(exported.values()))
    with pytest.raises(ValueError, match="no layer for lora_unet_nowhere"):
        AdapterPack.load(unet, calls.NAMES, [exported, {**exported, "lora_unet_nowhere": factors}])


# Strength


def test_strength_zero_is_the_base(unet: Any) -> None:
    """At strength 0 the output has the bits of the base, at 1 those of the adapter, row by row in one batch."""
    pack = trained_pack(unet)
    full, base = predict(unet, 6, pack), predict(unet, 6)
    assert torch.equal(predict(unet, 6, pack, strengths=torch.zeros(6, 3)), base)
    assert torch.equal(predict(unet, 6, pack, strengths=torch.ones(6, 3)), full)
    some = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])[:, None].expand(6, 3)
    mixed = predict(unet, 6, pack, strengths=some)
    for row in range(6):
        torch.testing.assert_close(mixed[row], (full if row in (0, 2, 3) else base)[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [None, [2, 0, 1, 1, 0, 2]], ids=["edit by edit", "mixed"])
def test_strength_is_linear_in_the_change(index: list[int] | None, relative: Callable[..., float]) -> None:
    """Each row of a layer's output moves away from the base by its strength times what the adapter moves it."""
    network = Small()
    pack = trained_pack(network)
    x = torch.randn(6, 6, 8, 8)
    base = network(x)
    rows = None if index is None else torch.tensor(index)
    strengths = torch.tensor([0.25, 2.0, 0.0, 1.0, 0.5, 1.5])
    with torch.no_grad(), pack.attached(network):
        pack.set_rows(rows)
        full = network(x)
        pack.set_rows(rows, strengths[:, None].expand(6, 3))
        scaled = network(x)
    for b, f, s in zip(base, full, scaled, strict=True):
        for row, strength in enumerate(strengths.tolist()):
            if strength:
                assert relative(s[row] - b[row], strength * (f[row] - b[row])) < 1e-5
            else:
                assert torch.equal(s[row], b[row])


def test_strengths_are_those_of_the_blocks(unet: Any) -> None:
    """Strength 0 in a block is the adapter without that block's layers; every layer of the UNet is in one block."""
    pack = trained_pack(unet)
    whole = [pack.export(edit) for edit in range(3)]
    for block, part in enumerate(("down_blocks", "mid_block", "up_blocks")):
        without = [{k: v for k, v in layers.items() if part not in k} for layers in whole]
        assert all(0 < len(some) < len(layers) for some, layers in zip(without, whole, strict=True))
        strengths = torch.ones(6, 3)
        strengths[:, block] = 0
        expected = predict(unet, 6, AdapterPack.load(unet, calls.NAMES, without))
        torch.testing.assert_close(predict(unet, 6, pack, strengths=strengths), expected, atol=1e-5, rtol=1e-5)


def test_the_scale_is_alpha_over_rank(relative: Callable[..., float]) -> None:
    """A layer's output is base(x) + alpha / r * B A x, for linear layers and convolutions (LoRA, section 4.1)."""
    network = Small()
    pack = trained_pack(network, edits=2)
    x = torch.randn(4, 6, 8, 8)
    with torch.no_grad(), pack.attached(network):
        linear, convolved = network(x)
    for row in range(4):
        exported = pack.export(row // 2)
        down, up, alpha = exported["lora_unet_to_q"]
        one = x[row].movedim(0, -1)
        assert relative(linear[row], network.to_q(one) + alpha / RANK * one @ down.T @ up.T) < 1e-6
        down, up, alpha = exported["lora_unet_conv1"]
        hidden = nn.functional.conv2d(x[row : row + 1], down, None, 2, 1)
        expected = network.conv1(x[row : row + 1]) + alpha / RANK * nn.functional.conv2d(hidden, up)
        assert relative(convolved[row], expected[0]) < 1e-6


@pytest.fixture(autouse=True)
def _own_randomness() -> Iterator[None]:
    """Each test starts from the same seed and leaves the global one alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
