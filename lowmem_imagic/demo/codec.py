"""The bundled autoencoder's encoder: a linear code of 8 x 8 px, written into the weights of an ``AutoencoderKL``.

The best linear code is known in closed form (principal components, Pearson 1901), so the encoder needs no training:
it is final from the start, UNet and decoder train side by side, and a better decoder never makes the UNet's latents
wrong. In 20 numbers for 8 x 8 px it gives 40 photographs back at 27.0 dB by itself, before the decoder, which knows
what pictures look like, adds to that.

An encoder of Stable Diffusion's layer types computes a linear map exactly, but for two of its layers: `linear_encoder`
says how it gets past them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

BLOCK = 8
"""Side in pixels of what one place of the latents stands for."""
_PLANES = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [-0.5, 1.0, -0.5]])
"""Light and two differences of colour: axes of RGB, orthogonal."""
_QUIET = -20.0
"""Log-variance of the posterior: none to speak of."""


@dataclass(frozen=True)
class LinearCode:
    """Numbers ``weight * block + bias`` of every 8 x 8 px.

    Attributes:
        weight: (C, 3, 8, 8).
        bias: (C,).
        parity: (C,) of 1 and -1: the code of a mirror image is the mirror image of the code, times this.
    """

    weight: Tensor
    bias: Tensor
    parity: Tensor

    def encode(self, x: Tensor) -> Tensor:
        """Latents (B, C, H / 8, W / 8) of pictures (B, 3, H, W) in [-1, 1]."""
        return F.conv2d(x, self.weight.to(x), self.bias.to(x), stride=BLOCK)

    def mirrored(self, latents: Tensor) -> Tensor:
        """The latents (B, C, H, W) of the mirror images."""
        return latents.flip(-1) * self.parity.to(latents)[:, None, None]


def fit(pictures: Tensor, channels: int, *, scaled_to: Tensor) -> LinearCode:
    """The linear code of so many channels that loses least of the pictures.

    A channel's variance over `scaled_to` is the square root of what it was, relative to the first: closer together
    than those of pixels, so that details are no smaller than the noise of a sampler, but in the same order, so that
    a sampler finds what is large first.

    Args:
        pictures: (B, 3, H, W) in [-1, 1], sides multiples of 8.
        channels: numbers for 8 x 8 px.
        scaled_to: pictures of the kind that the model draws.
    """
    planes = F.normalize(_PLANES, dim=1)
    blocks = torch.einsum("pc,bchw->pbhw", planes, pictures).unfold(2, BLOCK, BLOCK).unfold(3, BLOCK, BLOCK)
    blocks = blocks.reshape(3, -1, BLOCK, BLOCK).double()
    # The two differences of colour share their components, or these would be mixtures of the two by chance.
    light, color = blocks[0], torch.cat([blocks[1], blocks[2]])
    ramp = torch.linspace(1, 0, BLOCK**2, dtype=torch.float64) ** 2
    candidates: list[tuple[float, Tensor, int]] = []
    for part, rows in ((light, (0,)), (color, (1, 2))):
        for parity in (1, -1):
            half = (part + parity * part.flip(-1)).flatten(1) / 2
            values, vectors = torch.linalg.eigh(half.T @ half / len(half))
            for value, vector in zip(values.tolist(), vectors.T, strict=True):
                # Signs are the solver's choice.
                component = (vector * (vector @ ramp).sign()).float().view(BLOCK, BLOCK)
                candidates += [(value, torch.einsum("c,hw->chw", planes[row], component), parity) for row in rows]
    candidates = sorted(candidates, key=lambda candidate: -candidate[0])[:channels]
    basis = torch.stack([component for _, component, _ in candidates])
    parities = torch.tensor([float(parity) for _, _, parity in candidates])
    raw = F.conv2d(scaled_to, basis, stride=BLOCK)
    spread = raw.std((0, 2, 3))
    scale = (spread / spread[0]).sqrt() / spread
    mean = raw.mean((0, 2, 3)) * (parities + 1) / 2
    return LinearCode(basis * scale[:, None, None, None], -mean * scale, parities)


@torch.no_grad()
def write_linear_encoder(vae: AutoencoderKL, code: LinearCode) -> None:
    """Makes the autoencoder's encoder compute the code.

    Convolutions move a 2 x 2 of places into channels at each of three halvings, blocks of the residual kind add
    nothing, and the third halving forms the code's numbers. Two layers stand between these and the latents:

    - A group norm divides by a deviation that depends on the picture. In every group, channels at plus and minus a
      constant, far larger than the numbers, make it a constant; each number stands beside its negative, so that
      means are zero.
    - SiLU is no linear map, but ``silu(x) - silu(-x) = x``.
    """
    encoder, channels = vae.encoder, len(code.weight)
    for parameter in encoder.parameters():
        parameter.zero_()
    for module in encoder.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.weight.fill_(1)
    norm = encoder.conv_norm_out
    for index in range(3):
        encoder.conv_in.weight[index, index, 1, 1] = 1
    width = 3
    for level, block in enumerate(encoder.down_blocks):
        shortcut = block.resnets[0].conv_shortcut
        if shortcut is not None and level < 3:
            for index in range(width):
                shortcut.weight[index, index] = 1
        if level < 2:
            conv = block.downsamplers[0].conv
            for index in range(width):
                for y in (0, 1):
                    for x in (0, 1):
                        conv.weight[4 * index + 2 * y + x, index, y, x] = 1
            width *= 4
        elif level == 2:
            conv = block.downsamplers[0].conv
            # Channel c of 48 is colour c // 16 at an offset of 4 x 4 px, written in base 2 from coarse to fine.
            for color in range(3):
                for y in range(BLOCK):
                    for x in range(BLOCK):
                        first, second = (y >> 0) & 1, (y >> 1) & 1
                        third, fourth = (x >> 0) & 1, (x >> 1) & 1
                        channel = 16 * color + 4 * (2 * first + third) + 2 * second + fourth
                        conv.weight[:channels, channel, y >> 2, x >> 2] = code.weight[:, color, y, x]
            conv.bias[:channels] = code.bias
    last = encoder.down_blocks[3].resnets[0].conv_shortcut
    per_group = norm.num_channels // norm.num_groups
    constant = 128.0
    out = encoder.conv_out
    norm.weight.zero_()
    for group in range(norm.num_groups):
        members = range(group, channels, norm.num_groups)
        place = group * per_group
        for index in members:
            for sign in (1, -1):
                last.weight[place, index] = sign
                out.weight[index, place, 1, 1] = sign
                place += 1
        loud = range(place, (group + 1) * per_group)
        assert len(loud) % 2 == 0 and len(loud) >= 2
        for offset, channel in enumerate(loud):
            last.bias[channel] = constant * (-1) ** offset
        deviation = (len(loud) * constant**2 / per_group) ** 0.5
        norm.weight[group * per_group : place] = deviation
    vae.quant_conv.weight.zero_()
    vae.quant_conv.bias.zero_()
    vae.quant_conv.weight[:channels, :channels, 0, 0] = torch.eye(channels)
    vae.quant_conv.bias[channels:] = _QUIET
    vae.register_to_config(scaling_factor=1.0)
