"""A model family unlike Stable Diffusion in every way that the seam allows for, small and untrained.

A cascade in the space of pixels: `small` makes pictures of half the size, `large` whole ones from those. Both predict
the velocity of a flow. A sentence is three tensors: tokens, one vector for all of it, and a mask that is neither
trained, mixed nor stored. Layers have peft's names. Nothing outside of this file knows any of that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem_imagic.edits.identity import BaseIdentity, Interface
from lowmem_imagic.engine.base import BaseModel
from lowmem_imagic.errors import ConfigError, PromptError
from lowmem_imagic.families.adapter_names import PeftNames
from lowmem_imagic.families.conditioning import Conditioning, Part
from lowmem_imagic.geometry import Size, Sizes
from lowmem_imagic.layers.adapter_pack import Factors
from lowmem_imagic.layers.frozen import load_frozen

SIDE, TOKENS, WIDTH, DEPTH = 16, 5, 12, 3
TEXT = {
    "tokens": Part((TOKENS, WIDTH), trained=True),
    "pooled": Part((WIDTH,), trained=True, stored=torch.bfloat16),
    "mask": Part((TOKENS,), mixed=False, stored=None),
}


class Flow:
    """The schedule of a rectified flow (arXiv 2209.03003): positions are floats, 0 the picture and 1 noise."""

    def positions(self, draws: int, generator: torch.Generator, span: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        """One in each of equal parts of `span`."""
        shares = (torch.arange(draws) + torch.rand(draws, generator=generator)) / draws
        return span[0] + (span[1] - span[0]) * shares

    def spread(self, count: int) -> Tensor:
        """All along the schedule, but for the picture itself."""
        return torch.linspace(0.05, 1, count)

    def position(self, share: float) -> Tensor:
        """The share itself."""
        return torch.tensor(share)

    def noised(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """On the straight line between the two."""
        t = at.view(-1, 1, 1, 1)
        return (1 - t) * x + t * noise

    def target(self, x: Tensor, noise: Tensor, at: Tensor) -> Tensor:
        """The line's direction, the same all along."""
        return noise - x

    def noise_in(self, noisy: Tensor, x: Tensor, at: Tensor) -> Tensor:
        """Solves `noised`."""
        t = at.view(-1, 1, 1, 1)
        return (noisy - (1 - t) * x) / t

    def sampler(
        self, name: str, steps: int, shape: Sequence[int], device: torch.device | str = "cpu", *, guided: bool = True
    ) -> "Euler":
        """Euler's method, the only one."""
        if name != "Euler":
            raise ConfigError(f"scheduler is {name!r}, expected Euler")
        return Euler(torch.linspace(1, 0, steps + 1, device=device))

    def inverter(self, steps: int, shape: Sequence[int]) -> "Euler":
        """The same backwards."""
        return Euler(torch.linspace(0, 1, steps + 1))

    def error_of(self, name: str, steps: int) -> float:
        """None: on a straight line Euler's method is exact."""
        self.sampler(name, steps, (1,))
        return 0.0


class Euler:
    """Steps along a flow."""

    def __init__(self, times: Tensor) -> None:
        self.times = times

    @property
    def at(self) -> list[Tensor]:
        """Where each step begins."""
        return list(self.times[:-1])

    @property
    def end(self) -> Tensor:
        """Where the last one ends."""
        return self.times[-1]

    def start(self, noise: Tensor, below: Tensor | None) -> Tensor:
        """The noise: a flow begins with nothing else."""
        return noise

    def scaled(self, x: Tensor, step: int) -> Tensor:
        """x."""
        return x

    def stepped(self, prediction: Tensor, step: int, x: Tensor, generators: Any = None) -> Tensor:
        """x a step further."""
        return x + (self.times[step + 1] - self.times[step]) * prediction


class Block(nn.Module):
    """Attention to the tokens, and a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """x (R, S, WIDTH) after the block."""
        bias = mask.log().clamp(min=-1e4)[:, None, None].to(x)
        # With one head.
        q, k, v = (part.unsqueeze(1) for part in (self.to_q(x), self.to_k(tokens), self.to_v(tokens)))
        x = x + F.scaled_dot_product_attention(q, k, v, attn_mask=bias).squeeze(1)
        return x + self.down(F.gelu(self.up(x)))


class Network(nn.Module):
    """A patch is a place; the time and the sentence's vector are added to all of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(channels, WIDTH, 2, 2), nn.ConvTranspose2d(WIDTH, 3, 2, 2)
        self.time, self.pooled = nn.Linear(2, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        """The velocity (R, 3, H, W)."""
        places = self.enter(x)
        time = torch.stack([t.cos(), t.sin()], 1).to(x)
        flat = places.flatten(2).mT + (self.time(time) + self.pooled(pooled))[:, None]
        for block in self.blocks:
            flat = block(flat, tokens, mask)
        return self.leave(flat.mT.unflatten(2, places.shape[2:]))


class Stage:
    """A denoiser of the cascade."""

    guided = True
    guidance_share = 1.0
    follows_eta = True

    def __init__(self, name: str, shrinks: int, extra: Mapping[str, Part]) -> None:
        self.name, self.title, self._shrinks, self.extra = name, f"{name} network", shrinks, extra
        self.schedule = Flow()
        attention = ("to_q", "to_k", "to_v")
        targets = {"attn": attention, "attn+ff": (*attention, "up", "down"), "all": (*attention, "up", "down", "enter")}
        self.names = PeftNames(name, targets, DEPTH)

    def shape(self, size: Size) -> tuple[int, int, int]:
        """Pictures themselves."""
        return 3, size[1] // self._shrinks, size[0] // self._shrinks

    def load(self, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Weights drawn from the name."""
        with torch.random.fork_rng():
            torch.manual_seed(len(self.name))
            network = Network(3 + sum(part.shape[0] for part in self.extra.values()))
        tensors = [(name, tensor.to(device)) for name, tensor in network.state_dict().items()]
        network.to("meta")
        load_frozen(network, tensors, weights=weights, device=device, dtype=dtype, in_float=["enter", "leave"])
        return network.requires_grad_(False).eval()

    def use_xformers(self, network: nn.Module) -> None:
        """Not written: it is never asked for on a CPU."""
        raise AssertionError("no GPU")

    def recompute(self, network: nn.Module, on: bool) -> None:
        """Nothing to save in a network this small."""

    def drawn(self, extra: Conditioning, generators: Sequence[torch.Generator], *, training: bool) -> Conditioning:
        """As it is: the lower picture gets no noise."""
        return extra

    def portable(self, adapter: Mapping[str, Factors], network: nn.Module) -> dict[str, Factors]:
        """With the scale in the factors, as peft's files have it."""
        baked = {}
        for key, (down, up, alpha) in adapter.items():
            rank = len(down)
            baked[key] = (down * (alpha / rank), up, float(rank))
        return baked

    def predict(self, network: nn.Module, x: Tensor, at: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """The velocity."""
        lower = [given[name].to(x) for name in self.extra]
        velocity: Tensor = network(torch.cat([x, *lower], 1), at, given["tokens"], given["pooled"], given["mask"])
        return velocity


class Codec(nn.Module):
    """Nothing to compute: pictures are denoised as they are."""


class TextEncoder(nn.Module):
    """A vector for each word by its letters."""

    def __init__(self) -> None:
        super().__init__()
        self.letters = nn.Embedding(128, WIDTH)


class Source:
    """The base's place."""

    label = "tests/other"
    revision = None


class OtherFamily:
    """See the module."""

    family = "other"
    source = Source()
    text = TEXT
    vocabulary = None
    group = ""
    text_in_fp16 = True
    sizes = Sizes((SIDE, SIDE), 4, SIDE)
    sentence_tokens = TOKENS
    codec_in_fp16 = True

    def __init__(self) -> None:
        whole = Part((3, SIDE, SIDE), mixed=False, stored=None)
        self.denoisers = (Stage("small", 2, {}), Stage("large", 1, {"low_resolution": whole}))

    def check_trainable(self) -> None:
        """Nothing to check."""

    @property
    def identity(self) -> BaseIdentity:
        """Which base this is."""
        return BaseIdentity(
            source=self.source.label,
            revision=None,
            family=self.family,
            interface=Interface(
                text={name: part.shape[-1] for name, part in TEXT.items() if part.stored is not None},
                denoisers={denoiser.name: "flow" for denoiser in self.denoisers},
            ),
            files={"small": "1" * 64, "large": "2" * 64},
        )

    def check_prompt(self, prompt: str) -> str:
        """The words beyond the last token."""
        if not prompt.strip():
            raise PromptError("the sentence is empty")
        return " ".join(prompt.split()[TOKENS:])

    def load_text_encoder(self, name: str, *, weights: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Weights drawn from a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return TextEncoder().to(device, dtype).requires_grad_(False)

    def encode_text(self, sentences: Sequence[str], loaded: Any) -> Conditioning:
        """Tokens, their mean, and where there are any; one at least."""
        with loaded("letters") as encoder:
            return self._encoded(encoder.letters.weight, sentences)

    def _encoded(self, letters: Tensor, sentences: Sequence[str]) -> Conditioning:
        tokens = torch.zeros(len(sentences), TOKENS, WIDTH, device=letters.device, dtype=letters.dtype)
        mask = torch.zeros(len(sentences), TOKENS, device=letters.device)
        for row, sentence in enumerate(sentences):
            for place, word in enumerate(sentence.split()[:TOKENS] or [" "]):
                tokens[row, place] = letters[[ord(letter) % 128 for letter in word]].mean(0)
                mask[row, place] = 1
        return Conditioning({"tokens": tokens, "pooled": tokens.mean(1), "mask": mask})

    def load_codec(self, *, device: torch.device, dtype: torch.dtype, tiling: bool = False) -> nn.Module:
        """Nothing."""
        return Codec()

    def encode(self, codec: nn.Module, pictures: Tensor) -> dict[str, Tensor]:
        """The pictures, and smaller."""
        return {"small": F.avg_pool2d(pictures, 2), "large": pictures}

    def decode(self, codec: nn.Module, latents: Tensor) -> Tensor:
        """The pictures."""
        return latents.where(~latents.isfinite(), latents.clamp(-1, 1))

    def make_extra(self, denoiser: Any, count: int, size: Size, lower: Tensor | None) -> Conditioning:
        """For `large` what `small` gave, at its own size."""
        if not denoiser.extra:
            return Conditioning({})
        assert lower is not None
        return Conditioning({"low_resolution": F.interpolate(lower.float(), (size[1], size[0]), mode="bilinear")})


def other_base(**options: Any) -> BaseModel:
    """The base on the CPU."""
    values = {"weights": "int8", "attention": "sdpa", "checkpointing": False}
    return BaseModel(OtherFamily(), device=torch.device("cpu"), **{**values, **options})
