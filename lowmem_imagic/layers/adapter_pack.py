"""Packed LoRA: the adapters of N edits over one frozen network, trained or sampled in one pass.

A row of the batch belongs to one edit and uses only that edit's factors. LoRA (arXiv 2106.09685):
``y = base(x) + alpha / r * B A x``, here with ``A: (N, r, in)`` and ``B: (N, out, r)``; for a
convolution, A is a convolution of the layer's own geometry to r channels and B is 1x1. Settings are
named as in peft's ``LoraConfig``; a pack's outputs and gradients equal those of N peft runs.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, nn

from ..errors import ConfigError
from ..settings.stages import BLOCKS, peft_targets
from .flat_pack import FlatPack
from .lora import Rows, packed_kind

Factors = tuple[Tensor, Tensor, float]
"""One layer's adapter: down (r, in[, kh, kw]), up (out, r[, 1, 1]), alpha."""


class LayerNames(Protocol):
    """Names of a network's layers, and of their factors in files."""

    @property
    def targets(self) -> Mapping[str, Sequence[str]]:
        """Endings of the layers' names for each choice of `adapt`."""

    def key(self, layer: str) -> str:
        """The key of a layer's factors."""

    def block_of(self, layer: str) -> int:
        """The index in `BLOCKS` of a layer's part of the network."""


def target_modules(
    network: nn.Module, names: LayerNames, adapt: str, blocks: Sequence[str] = BLOCKS
) -> dict[str, nn.Module]:
    """The layers of `network` that `adapt` covers in `blocks`, by name, in the network's order.

    peft's own functions choose the layers.

    Args:
        network: the network; its layers may be on any device.
        names: names of its layers.
        adapt: a key of `LayerNames.targets`, or an expression (see `peft_targets`).
        blocks: parts of the network, some of `BLOCKS`.

    Raises:
        ConfigError: `adapt` covers no layer, or one that is neither linear nor a convolution.
    """
    config = LoraConfig(target_modules=list(names.targets.get(adapt, ())) or peft_targets(adapt))
    config = _maybe_include_all_linear_layers(config, network)
    modules = {
        name: module
        for name, module in network.named_modules()
        if name and BLOCKS[names.block_of(name)] in blocks and check_target_module_exists(config, name)
    }
    expected = f"expected linear layers or convolutions: {', '.join(_endings(network))}"
    if not modules:
        raise ConfigError(f"`adapt` is {adapt!r}, which covers no layer of the network; {expected}")
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            kind = type(module).__name__
            raise ConfigError(f"`adapt` is {adapt!r}, which covers {name} of the kind {kind}; {expected}")
    return modules


def check_endings(networks: Iterable[tuple[nn.Module, LayerNames]], adapt: str, blocks: Sequence[str] = BLOCKS) -> None:
    """Checks that each ending in `adapt` covers a layer of one of the networks of a base; see `target_modules`.

    Raises:
        ConfigError: an ending covers none.
    """
    covered, known = set[str](), dict[str, None]()
    endings = peft_targets(adapt)
    for network, names in networks:
        if adapt in names.targets or isinstance(endings, str):
            return
        for name in target_modules(network, names, adapt, blocks):
            covered.update(ending for ending in endings if f".{name}".endswith(f".{ending}"))
        known |= dict.fromkeys(_endings(network))
    if missing := [ending for ending in endings if ending not in covered]:
        raise ConfigError(
            f"`adapt` is {adapt!r}, but {', '.join(missing)} covers no layer of the network; expected endings of the "
            f"names of layers: {', '.join(known)}"
        )


def _endings(network: nn.Module) -> list[str]:
    """The last words of the names of a network's linear layers and convolutions, such as ``to_out.0``, each once."""
    layers = [name for name, module in network.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    endings = (re.search(r"[^.]*[^.0-9][^.]*(\.[0-9]+)*$", name) for name in layers)
    return list(dict.fromkeys(ending[0] for ending in endings if ending))


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


class AdapterPack:
    """The adapters of N edits for the chosen layers of one network.

    Args:
        network: a frozen network; it is not changed until `attached`.
        names: names of its layers.
        count: N, the number of edits.
        adapt: the layers, see `target_modules`.
        blocks: parts of the network to adapt, some of `BLOCKS`.
        rank: r.
        alpha: the output is scaled by ``alpha / r``.

    Attributes:
        weights: (N, P) fp32, all factors of an edit in one row.

    **Memory**: 4 bytes a weight, 4 more while gradients are enabled.
    """

    def __init__(
        self,
        network: nn.Module,
        names: LayerNames,
        *,
        count: int,
        adapt: str,
        rank: int,
        alpha: float,
        blocks: Sequence[str] = BLOCKS,
        device: torch.device | str = "cpu",
    ) -> None:
        modules = target_modules(network, names, adapt, blocks)
        self._create(modules, names, count, dict.fromkeys(modules, rank), device)
        self._set_alphas({name: [float(alpha)] * count for name in self._shapes})

    def _create(
        self,
        modules: Mapping[str, nn.Module],
        names: LayerNames,
        count: int,
        ranks: Mapping[str, int],
        device: torch.device | str,
    ) -> None:
        self.count, self.names = count, names
        self.rows = Rows()
        self._shapes = {name: _Shape.of(module, ranks[name]) for name, module in modules.items()}
        shapes = {f"{name}.{end}": getattr(s, end) for name, s in self._shapes.items() for end in ("down", "up")}
        self._flat = FlatPack(count, shapes, device=device)
        self.weights = self._flat.weights
        factors = self._flat.parameters
        self._parameters = {name: (factors[f"{name}.down"], factors[f"{name}.up"]) for name in self._shapes}

    def _set_alphas(self, alphas: dict[str, list[float]]) -> None:
        """Sets every edit's alpha by layer; 0 if the edit lacks the layer."""
        self.alphas = alphas
        self._scales: dict[str, Tensor | None] = {}
        for name, values in alphas.items():
            # An edit that lacks the layer has factors of zeros there, so any scale will do.
            scales = [alpha / self._shapes[name].down[0] or 1.0 for alpha in values]
            plain = all(scale == 1 for scale in scales)
            self._scales[name] = None if plain else torch.tensor(scales, device=self.weights.device)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The stacked factors, views of `weights`."""
        return list(self._flat.parameters.values())

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
        """The flat gradient (N, P), filled by backward passes; every factor's gradient is a view of it."""
        return self._flat.enable_gradients()

    def set_rows(self, index: Tensor | None, strengths: Tensor | None = None) -> None:
        """Sets the edit and the strength of each row of the following passes.

        Args:
            index: (R,) int64 edit numbers; None if rows lie edit by edit in equal shares.
            strengths: (R, 3) factors on the adapters of each row in each of `BLOCKS`: 1 as trained, 0 the base
                alone. None if all are 1.
        """
        device = self.weights.device
        self.rows.index = None if index is None or self.count == 1 else index.to(device)
        plain = strengths is None or bool((strengths == 1).all())
        self.rows.strengths = None if plain else strengths.to(device)  # type: ignore[union-attr]

    @contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """Attaches the adapters to the network within the block; afterwards the network has its original layers."""
        originals: list[tuple[nn.Module, str, nn.Module]] = []
        try:
            for name, (down, up) in self._parameters.items():
                parent_name, _, child = name.rpartition(".")
                parent = network.get_submodule(parent_name)
                base = parent.get_submodule(child)
                kind = packed_kind(name, base)
                setattr(parent, child, kind(base, down, up, self._scales[name], self.rows, self.names.block_of(name)))
                originals.append((parent, child, base))
            yield
        finally:
            for parent, child, base in originals:
                setattr(parent, child, base)

    def export(self, edit: int) -> dict[str, Factors]:
        """One edit's adapter by key, as fp32 copies on the CPU; layers that the edit lacks are left out."""
        factors = {}
        for name, (down, up) in self._parameters.items():
            if not self.alphas[name][edit]:
                continue
            d, u = down[edit].detach().cpu().clone(), up[edit].detach().cpu().clone()
            factors[self.names.key(name)] = (d, u if d.dim() == 2 else u[..., None, None], self.alphas[name][edit])
        return factors

    @staticmethod
    def load(
        network: nn.Module,
        layers: LayerNames,
        adapters: Sequence[Mapping[str, Factors]],
        *,
        device: torch.device | str = "cpu",
    ) -> "AdapterPack":
        """The pack of finished adapters; layers and ranks may differ between edits (zeros fill the gaps).

        **Memory**: for each layer, N times the factors of its highest rank.

        Raises:
            ValueError: no factors at all, a key without a layer in the network, or factors that do not fit the layer.
        """
        if not any(adapters):
            raise ValueError("there are no adapters to load")
        names = {
            layers.key(name): name
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
        pack._create(modules, layers, len(adapters), ranks, device)
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
