"""Pictures of nothing in particular, for an autoencoder that is to hold any picture: drawn in batches on any device.

Dead leaves: shapes of all sizes that hide one another, in the way that things in photographs do (Lee, Mumford and
Huang 2001), each plain or with stripes, checks, dots, a gradient or noise whose spectrum falls as in photographs;
a background out of focus, uneven light, grain.
"""

import math

import torch
from torch import Tensor

_FINER = 2
"""Samples a pixel, along each side."""


def procedural_batch(count: int, size_px: int, generator: torch.Generator, *, leaves: int = 16) -> Tensor:
    """Pictures (count, size, size, 3) uint8 on the generator's device, of so many shapes each."""
    draw = _Draw(count, generator)
    side = size_px * _FINER
    steps = (torch.arange(side, device=generator.device) + 0.5) / side - 0.5
    x, y = steps[None, None, :], steps[None, :, None]
    # How far colours of one picture lie apart, and how grey they are.
    middle, spread = draw.uniform(0.1, 0.9, 3), draw.uniform(0.08, 0.9)[..., None]
    grey = draw.uniform(0, 1)[..., None]
    noise = _fractal_noise(draw, side)

    def color() -> Tensor:
        """Colours (B, 1, 1, 3)."""
        drawn = middle + spread * draw.uniform(-1, 1, 3)
        return torch.lerp(drawn, drawn.mean(-1, keepdim=True), grey).clamp(0, 1)

    picture = _texture(draw, x, y, noise, color(), color())
    for leaf in range(leaves):
        inside = _shape(draw, x, y)
        picture = torch.where(inside[..., None], _texture(draw, x, y, noise, color(), color()), picture)
        if leaf == leaves // 2:
            picture = _blurred(picture, draw.uniform(0, 5.0) * draw.chance(0.35))
    picture = _blurred(picture, draw.uniform(0, 2.0) * draw.chance(0.4))
    light = 1 + draw.uniform(-0.5, 0.5) * x + draw.uniform(-0.5, 0.5) * y
    picture = picture * torch.where(draw.chance(0.5), light, 1.0)[..., None]
    picture = picture.view(count, size_px, _FINER, size_px, _FINER, 3).mean((2, 4))
    grain = torch.randn(picture.shape, generator=generator, device=generator.device)
    picture = picture + grain * (0.03 * draw.uniform(0, 1) * draw.chance(0.3))[..., None]
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


class _Draw:
    """Draws one number, or several, for each picture of a batch."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.count, self.generator = count, generator

    def uniform(self, low: float, high: float, *channels: int) -> Tensor:
        """Numbers (B, 1, 1, *channels)."""
        drawn = torch.rand(self.count, 1, 1, *channels, generator=self.generator, device=self.generator.device)
        spread: Tensor = low + (high - low) * drawn
        return spread

    def chance(self, share: float) -> Tensor:
        """True (B, 1, 1) in this share of the pictures."""
        below: Tensor = self.uniform(0, 1) < share
        return below


def _fractal_noise(draw: _Draw, side: int) -> Tensor:
    """Noise (B, side, side) about 0.5 whose amplitude falls with frequency as in photographs, some of it stretched."""
    device = draw.generator.device
    fy, fx = torch.fft.fftfreq(side, device=device)[:, None], torch.fft.rfftfreq(side, device=device)[None]
    angle, stretch = draw.uniform(0, math.pi), 1 + 6 * draw.uniform(0, 1) ** 4
    along, across = fx * angle.cos() + fy * angle.sin(), fy * angle.cos() - fx * angle.sin()
    frequency = torch.hypot(along * stretch, across).clamp_min(1 / side)
    white = torch.randn(draw.count, side, side, generator=draw.generator, device=device)
    field = torch.fft.irfft2(torch.fft.rfft2(white) / frequency ** draw.uniform(0.5, 1.9), s=(side, side))
    noise: Tensor = (field - field.mean((1, 2), keepdim=True)) / field.std((1, 2), keepdim=True)
    return (0.5 + 0.25 * noise).clamp(0, 1)


def _texture(draw: _Draw, x: Tensor, y: Tensor, noise: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Colours (B, H, W, 3) between two."""
    angle, period = draw.uniform(0, math.pi), 0.02 * (0.5 / 0.02) ** draw.uniform(0, 1)
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    a, b = u / period + draw.uniform(0, 1), v / period
    wave = torch.sin(2 * math.pi * a)
    kind = draw.uniform(0, 10)
    share = torch.zeros_like(u)
    share = torch.where(kind > 3, noise, share)
    share = torch.where(kind > 6, (u * draw.uniform(0.5, 2.0) + 0.5).clamp(0, 1), share)
    share = torch.where(kind > 7, (wave > draw.uniform(-0.6, 0.6)).float(), share)
    share = torch.where(kind > 8, 0.5 + 0.5 * wave, share)
    share = torch.where(kind > 8.5, (wave * torch.sin(2 * math.pi * b) > 0).float(), share)
    dots = torch.hypot(a - a.floor() - 0.5, b - b.floor() - 0.5)
    share = torch.where(kind > 9.3, (dots < draw.uniform(0.2, 0.45)).float(), share)
    # Most things have a little of the noise on them.
    share = share + (noise - 0.5) * (0.5 * draw.uniform(0, 1) ** 2)
    return torch.lerp(first, second, share[..., None].clamp(0, 1))


def _shape(draw: _Draw, x: Tensor, y: Tensor) -> Tensor:
    """Inside (B, H, W) of an ellipse, polygon, rectangle, stroke or ring; small ones are frequent."""
    radius = (0.03 / draw.uniform(0.03, 1)).clamp_max(0.5)
    angle = draw.uniform(0, 2 * math.pi)
    dx, dy = x - draw.uniform(-0.55, 0.55), y - draw.uniform(-0.55, 0.55)
    u, v = (dx * angle.cos() + dy * angle.sin()) / radius, (dy * angle.cos() - dx * angle.sin()) / radius
    flat = draw.uniform(0.35, 1.0)
    r = torch.hypot(u, v / flat)
    kind = draw.uniform(0, 5)
    inside = r < 1
    # A regular polygon, its sides bent by a slow wave.
    theta, corners = torch.atan2(v, u), draw.uniform(3, 8).floor()
    sector = 2 * math.pi / corners
    edge = torch.cos(sector / 2) / torch.cos(theta % sector - sector / 2)
    inside = torch.where(kind > 1, r < edge * (1 + 0.3 * draw.uniform(0, 1) * torch.sin(2 * theta)), inside)
    inside = torch.where(kind > 2, (u.abs() < 1) & (v.abs() < flat), inside)
    stroke = torch.hypot((u.abs() - 1).clamp_min(0), v + 0.4 * draw.uniform(-1, 1) * u * u)
    inside = torch.where(kind > 3, stroke < 0.06 + 0.2 * flat * draw.uniform(0, 1), inside)
    return torch.where(kind > 4.4, (r < 1) & (r > draw.uniform(0.6, 0.9)), inside)


def _blurred(picture: Tensor, sigma: Tensor) -> Tensor:
    """The pictures, each smoothed by a Gaussian of its own width (B, 1, 1) in samples."""
    side = picture.shape[1]
    fy = torch.fft.fftfreq(side, device=picture.device)[:, None, None]
    fx = torch.fft.rfftfreq(side, device=picture.device)[None, :, None]
    pass_band = torch.exp(-2 * (math.pi * sigma[..., None]) ** 2 * (fx * fx + fy * fy))
    smooth = torch.fft.irfft2(torch.fft.rfft2(picture, dim=(1, 2)) * pass_band, s=(side, side), dim=(1, 2))
    return torch.where(sigma[..., None] > 0, smooth, picture)
