"""Packed LoRA: the adapters of N edits over one frozen network, trained or sampled in one pass.

A row of the batch belongs to one edit and uses only that edit's factors. LoRA (arXiv 2106.09685):
``y = base(x) + alpha / r * B A x``, here with ``A: (N, r, in)`` and ``B: (N, out, r)``; for a
convolution, A is a convolution of the layer's own geometry to r channels and B is 1x1. peft's
``LoraConfig`` names the settings; a pack's outputs and gradients equal those of N peft runs.

All factors of an edit lie in one row of a flat fp32 buffer (N, P), so that an optimiser step, a gradient
norm or a stop mask for all edits is one operation whatever N is.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from ..errors import ConfigError
from ..settings.stages import BLOCKS, peft_targets
from ..unexpected import WARNINGS
from .lora import Rows, packed_kind

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_CONVOLUTION = (
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
)
TARGETS: dict[str, tuple[str, ...]] = {
    "attn": _ATTENTION,
    "attn+ff": _ATTENTION + _FEED_FORWARD,
    "all": _ATTENTION + _FEED_FORWARD + _CONVOLUTION,
}
"""Endings of the names of the layers each choice adapts."""

Factors = tuple[Tensor, Tensor, float]
"""One layer's adapter: down (r, in[, kh, kw]), up (out, r[, 1, 1]), alpha."""


def kohya_key(module_name: str) -> str:
    """The name of a UNet module in kohya's LoRA files, e.g. ``lora_unet_mid_block_resnets_0_conv1``."""
    return "lora_unet_" + module_name.replace(".", "_")


def block_of(module_name: str) -> int:
    """The number in `BLOCKS` of the part of the UNet a module belongs to; what stands before the middle is encoder."""
    if module_name.startswith("mid_block"):
        return BLOCKS.index("mid")
    return BLOCKS.index("up" if module_name.startswith(("up_blocks", "conv_out")) else "down")


def target_modules(network: nn.Module, adapt: str, blocks: Sequence[str] = BLOCKS) -> dict[str, nn.Module]:
    """The layers of `network` that `adapt` covers in `blocks`, by name, in the network's order.

    peft chooses them, as for its own adapters.

    Args:
        network: the network; its layers may be on any device.
        adapt: a key of `TARGETS`, or an expression (see `peft_targets`).
        blocks: parts of the UNet, some of `BLOCKS`.

    Raises:
        ConfigError: it covers no layer, or one that is neither linear nor a convolution.
    """
    config = LoraConfig(target_modules=TARGETS.get(adapt) or peft_targets(adapt))
    config = _maybe_include_all_linear_layers(config, network)
    modules = {
        name: module
        for name, module in network.named_modules()
        if name and BLOCKS[block_of(name)] in blocks and check_target_module_exists(config, name)
    }
    expected = "expected linear layers or convolutions, such as to_q,to_v"
    if not modules:
        raise ConfigError(f"`adapt` is {adapt!r}, which covers no layer of the network; {expected}")
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            kind = type(module).__name__
            raise ConfigError(f"`adapt` is {adapt!r}, which covers {name} of the kind {kind}; {expected}")
    return modules


@dataclass(frozen=True)
class _Shape:
    """Sizes of one layer's factors."""

    down: tuple[int, ...]
    """(r, in) or (r, in, kh, kw)."""
    up: tuple[int, int]
    """(out, r)."""

    @staticmethod
    def of(module: nn.Module, rank: int) -> "_Shape":
        if isinstance(module, nn.Conv2d):
            kh, kw = module.kernel_size
            return _Shape((rank, module.in_channels // module.groups, kh, kw), (module.out_channels, rank))
        assert isinstance(module, nn.Linear)
        return _Shape((rank, module.in_features), (module.out_features, rank))

    @property
    def down_size(self) -> int:
        return math.prod(self.down)

    @property
    def size(self) -> int:
        return self.down_size + math.prod(self.up)


@contextmanager
def strided_gradients() -> Iterator[None]:
    """Around a backward pass: without torch's warning that factors of several edits lie apart in one buffer, as they
    and their gradients do on purpose."""
    with WARNINGS, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "grad and param do not obey the gradient layout contract")
        yield


class AdapterPack:
    """The adapters of N edits for the chosen layers of one network.

    Args:
        network: a frozen network; it is not changed until `attach`.
        count: N, the number of edits.
        adapt: the layers, see `target_modules`.
        blocks: parts of the UNet to adapt, some of `BLOCKS`.
        rank: r.
        alpha: the output is scaled by ``alpha / r``.

    Attributes:
        weights: (N, P) fp32, all factors of an edit in one row.

    **Memory**: 4 bytes a weight, 4 more while gradients are enabled.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        count: int,
        adapt: str,
        rank: int,
        alpha: float,
        blocks: Sequence[str] = BLOCKS,
        device: torch.device | str = "cpu",
    ) -> None:
        modules = target_modules(network, adapt, blocks)
        self._create(modules, count, dict.fromkeys(modules, rank), device)
        self._set_alphas({name: [float(alpha)] * count for name in self._shapes})

    def _create(
        self, modules: Mapping[str, nn.Module], count: int, ranks: Mapping[str, int], device: torch.device | str
    ) -> None:
        self.count = count
        self.rows = Rows()
        self._shapes = {name: _Shape.of(module, ranks[name]) for name, module in modules.items()}
        size = sum(shape.size for shape in self._shapes.values())
        self.weights = torch.zeros(count, size, device=device)
        self._parameters = {name: (nn.Parameter(d), nn.Parameter(u)) for name, d, u in self._views(self.weights)}

    def _set_alphas(self, alphas: dict[str, list[float]]) -> None:
        """Of each layer, the alpha of every edit; 0 where an edit lacks the layer."""
        self.alphas = alphas
        self._scales: dict[str, Tensor | None] = {}
        for name, values in alphas.items():
            # An edit that lacks the layer has factors of zeros there, whatever their scale.
            scales = [alpha / self._shapes[name].down[0] or 1.0 for alpha in values]
            plain = all(scale == 1 for scale in scales)
            self._scales[name] = None if plain else torch.tensor(scales, device=self.weights.device)

    def _views(self, flat: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, down (N, r, in...), up (N, out, r)) views of a flat (N, P) tensor."""
        start = 0
        for name, shape in self._shapes.items():
            middle, end = start + shape.down_size, start + shape.size
            yield (
                name,
                flat[:, start:middle].view(self.count, *shape.down),
                flat[:, middle:end].view(self.count, *shape.up),
            )
            start = end

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The stacked factors, views of `weights`."""
        return [parameter for pair in self._parameters.values() for parameter in pair]

    @torch.no_grad()
    def initialize_edit(self, edit: int, generator: torch.Generator) -> None:
        """Draws an edit's A uniformly as peft does (Kaiming with a = sqrt 5); its B is zero."""
        for name, shape in self._shapes.items():
            bound = 1 / math.sqrt(math.prod(shape.down[1:]))
            drawn = torch.rand(shape.down, generator=generator).mul_(2 * bound).sub_(bound)
            down, up = self._parameters[name]
            down[edit].copy_(drawn)
            up[edit].zero_()

    def enable_gradients(self) -> Tensor:
        """The flat gradient (N, P); every factor's gradient is a view of it, which backward passes fill."""
        grads = torch.zeros_like(self.weights)
        for name, down, up in self._views(grads):
            parameters = self._parameters[name]
            parameters[0].grad, parameters[1].grad = down, up
        return grads

    def set_rows(self, index: Tensor | None, strengths: Tensor | None = None) -> None:
        """Says which edit each row of the following passes belongs to, and how strongly it is adapted.

        Args:
            index: (R,) int64 edit numbers, or None when rows lie edit by edit in equal shares.
            strengths: (R, 3) factors on the adapters of each row in each of `BLOCKS`: 1 as trained, 0 the base
                alone. None when all are 1.
        """
        device = self.weights.device
        self.rows.index = None if index is None or self.count == 1 else index.to(device)
        plain = strengths is None or bool((strengths == 1).all())
        self.rows.strengths = None if plain else strengths.to(device)  # type: ignore[union-attr]

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """The network with the adapters in place; on leaving, exactly the network there was."""
        originals: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for name, (down, up) in self._parameters.items():
                parent_name, _, child = name.rpartition(".")
                parent = network.get_submodule(parent_name)
                base = parent.get_submodule(child)
                kind = packed_kind(name, base)
                setattr(parent, child, kind(base, down, up, self._scales[name], self.rows, block_of(name)))
                originals.append((parent, child, base))
            yield
        finally:
            for parent, child, base in originals:
                setattr(parent, child, base)

    def export(self, edit: int) -> dict[str, Factors]:
        """One edit's adapter by kohya key, as fp32 copies on the CPU; without the layers that only other edits have."""
        factors = {}
        for name, (down, up) in self._parameters.items():
            if not self.alphas[name][edit]:
                continue
            d, u = down[edit].detach().cpu().clone(), up[edit].detach().cpu().clone()
            factors[kohya_key(name)] = (d, u if d.dim() == 2 else u[..., None, None], self.alphas[name][edit])
        return factors

    @staticmethod
    def load(
        network: nn.Module, adapters: Sequence[Mapping[str, Factors]], *, device: torch.device | str = "cpu"
    ) -> "AdapterPack":
        """The pack of finished adapters; layers and ranks may differ between edits (zeros fill the gaps).

        **Memory**: of each layer, N times the factors of the highest rank that an edit has there.

        Raises:
            ValueError: no factors at all, a key no layer of the network has, or factors that do not fit its layer.
        """
        if not any(adapters):
            raise ValueError("there are no adapters to load")
        names = {
            kohya_key(name): name
            for name, module in network.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }
        wanted = {key for adapter in adapters for key in adapter}
        unknown = sorted(wanted - set(names))
        if unknown:
            raise ValueError(f"the base has no layer for {unknown[0]} ({len(unknown)} such)")
        modules = {name: network.get_submodule(name) for key, name in names.items() if key in wanted}
        ranks = dict.fromkeys(modules, 1)
        for adapter in adapters:
            for key, (down, _, _) in adapter.items():
                ranks[names[key]] = max(ranks[names[key]], down.shape[0])
        pack = AdapterPack.__new__(AdapterPack)
        pack._create(modules, len(adapters), ranks, device)
        alphas = {name: [0.0] * len(adapters) for name in modules}
        with torch.no_grad():
            for edit, adapter in enumerate(adapters):
                for key, (down, up, alpha) in adapter.items():
                    name, r = names[key], down.shape[0]
                    fits = _Shape.of(modules[name], r)
                    if tuple(down.shape) != fits.down or tuple(up.shape[:2]) != fits.up:
                        raise ValueError(
                            f"{key} has factors {tuple(down.shape)} and {tuple(up.shape)}, "
                            f"its layer in the base takes {fits.down} and {fits.up}"
                        )
                    own_down, own_up = pack._parameters[name]
                    own_down[edit, :r].copy_(down)
                    own_up[edit, :, :r].copy_(up.reshape(fits.up))
                    alphas[name][edit] = alpha * ranks[name] / r
        pack._set_alphas(alphas)
        return pack
