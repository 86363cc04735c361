"""A photo in the model's picture and back, and pictures as tensors in [-1, 1]."""

import math

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ..geometry import Letterbox

_STRIP_ROWS = 256
"""Rows compared at once."""


def into_canvas(image: Image.Image, letterbox: Letterbox) -> Image.Image:
    """The photo inside the model's picture, the rest filled with its own edge, ever softer further out.

    Hard bars would cost the VAE detail at their border and give the diffusion model a frame to draw.

    Raises:
        ValueError: The picture is not RGB or not of the letterbox's photo size.
    """
    _require_rgb(image)
    if image.size != (letterbox.width_px, letterbox.height_px):
        raise ValueError(
            f"picture is {image.size[0]} x {image.size[1]}; "
            f"the letterbox is for {letterbox.width_px} x {letterbox.height_px}"
        )
    left, top, right, bottom = letterbox.box
    width, height = letterbox.size
    inner = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if inner.size == letterbox.size:
        return inner
    margins = ((top, height - bottom), (left, width - right), (0, 0))
    replicated = Image.fromarray(np.pad(np.asarray(inner), margins, mode="edge"))
    longest = max(width, height)
    blurred = replicated.filter(ImageFilter.GaussianBlur(longest / 24))
    across, down = np.arange(width), np.arange(height)
    outside_x = np.maximum(left - across, across - (right - 1)).clip(0)
    outside_y = np.maximum(top - down, down - (bottom - 1)).clip(0)
    distance = np.maximum(outside_x[None, :], outside_y[:, None])
    softness = (distance * (255 * 12 / longest)).clip(0, 255).astype(np.uint8)  # full after a twelfth of the side
    return Image.composite(blurred, replicated, Image.fromarray(softness))


def from_canvas(canvas: Image.Image, letterbox: Letterbox, *, most_px: int | None = None) -> Image.Image:
    """The photo's part of the model's picture at the photo's own size and aspect, or smaller: at most `most_px` a side.

    Raises:
        ValueError: The picture is not of the letterbox's size.
    """
    if canvas.size != letterbox.size:
        raise ValueError(
            f"picture is {canvas.size[0]} x {canvas.size[1]}; "
            f"expected {letterbox.size[0]} x {letterbox.size[1]} as in its letterbox"
        )
    # Cropped first: the resampling filter would reach beyond a `box` and blend padding into the border.
    width, height = letterbox.width_px, letterbox.height_px
    if most_px is not None and (longest := max(width, height)) > most_px:
        width, height = (max(1, round(side * most_px / longest)) for side in (width, height))
    return canvas.crop(letterbox.box).resize((width, height), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """The picture as (1, 3, H, W) float32 in [-1, 1]; `to_images` gives back the very same bytes.

    Raises:
        ValueError: The picture is not RGB.
    """
    _require_rgb(image)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    return pixels.to(torch.float32).div_(127.5).sub_(1.0).contiguous()


def to_images(tensor: Tensor) -> list[Image.Image]:
    """The pictures of a (B, 3, H, W) tensor in [-1, 1], clamped and rounded to 8-bit RGB.

    Raises:
        ValueError: Another shape, or NaN, which would otherwise become an arbitrary colour.
    """
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise ValueError(f"tensor has shape {tuple(tensor.shape)}; expected (B, 3, H, W)")
    values = tensor.detach().to("cpu", torch.float32)
    if values.isnan().any():
        raise ValueError("tensor holds NaN; expected numbers in [-1, 1]")
    pixels = values.clamp(-1.0, 1.0).add(1.0).mul_(127.5).round_().to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()) for picture in pixels]


def psnr(a: Image.Image, b: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB between two RGB pictures; `inf` when equal.

    Raises:
        ValueError: Sizes differ.

    **Memory**: strips of `_STRIP_ROWS` rows; a photo of 100 million pixels takes no more than a small one.
    """
    if a.size != b.size:
        raise ValueError(f"sizes {a.size} and {b.size} differ; expected equal ones")
    total = 0
    for top in range(0, a.height, _STRIP_ROWS):
        strip = (0, top, a.width, min(a.height, top + _STRIP_ROWS))
        first, second = (np.asarray(_require_rgb(picture).crop(strip), np.int64) for picture in (a, b))
        total += int(np.square(first - second).sum())
    return math.inf if total == 0 else 10.0 * math.log10(255**2 * 3 * a.width * a.height / total)


def _require_rgb(image: Image.Image) -> Image.Image:
    if image.mode != "RGB":
        raise ValueError(f"picture has mode {image.mode}; expected RGB, read it with load_photo")
    return image
