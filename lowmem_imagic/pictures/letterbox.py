"""A photo in the model's square and back, and pictures as tensors in [-1, 1]."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

_STRIP_ROWS = 256
"""Rows compared at once."""


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Where a photo of `width_px` x `height_px` lies inside the model's square; all integers.

    Attributes:
        width_px: The photo's own width.
        height_px: The photo's own height.
        size_px: Side of the square.
        left: First column of the photo in the square.
        top: First row.
        right: Column after the last.
        bottom: Row after the last.
    """

    width_px: int
    height_px: int
    size_px: int
    left: int
    top: int
    right: int
    bottom: int

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int:
                raise ValueError(f"letterbox {field.name} is {value!r}; expected an integer")
        if min(self.width_px, self.height_px, self.size_px) < 1:
            raise ValueError(
                f"letterbox of {self.width_px} x {self.height_px} in {self.size_px}; expected 1 or more each"
            )
        if not (0 <= self.left < self.right <= self.size_px and 0 <= self.top < self.bottom <= self.size_px):
            raise ValueError(
                f"letterbox box is {self.box}; expected left < right, top < bottom within 0..{self.size_px}"
            )

    @classmethod
    def fit(cls, width_px: int, height_px: int, size_px: int) -> Self:
        """The largest centred box of the photo's aspect, at least one pixel each way.

        Raises:
            ValueError: A size below 1.
        """
        longest = max(width_px, height_px, 1)
        # Integers throughout: halves round up, the same on every machine.
        across = max(1, (2 * width_px * size_px + longest) // (2 * longest))
        down = max(1, (2 * height_px * size_px + longest) // (2 * longest))
        left, top = (size_px - across) // 2, (size_px - down) // 2
        return cls(
            width_px=width_px,
            height_px=height_px,
            size_px=size_px,
            left=left,
            top=top,
            right=left + across,
            bottom=top + down,
        )

    def scaled(self, size_px: int) -> Self:
        """The same place in a square of another side, at least one pixel each way.

        Raises:
            ValueError: A side below 1.
        """
        left, top = (min(side * size_px // self.size_px, size_px - 1) for side in (self.left, self.top))
        right, bottom = (-(-side * size_px // self.size_px) for side in (self.right, self.bottom))
        return replace(self, size_px=size_px, left=left, top=top, right=right, bottom=bottom)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """`(left, top, right, bottom)`, as Pillow's `crop` takes it."""
        return self.left, self.top, self.right, self.bottom

    def to_dict(self) -> dict[str, int]:
        """The fields by name, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Self:
        """The letterbox that `to_dict` described.

        Raises:
            ValueError: Entries missing, unknown, not integers, or a box outside the square.
        """
        expected, found = {field.name for field in fields(cls)}, set(entries)
        if found != expected:
            raise ValueError(
                f"letterbox entries: missing {sorted(expected - found)}, "
                f"unknown {sorted(map(str, found - expected))}; expected exactly {sorted(expected)}"
            )
        return cls(**entries)


def to_square(image: Image.Image, letterbox: Letterbox) -> Image.Image:
    """The photo inside the model's square, the rest filled with its own edge, ever softer further out.

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
    size = letterbox.size_px
    inner = image.resize((right - left, bottom - top), Image.Resampling.LANCZOS, reducing_gap=3.0)
    if inner.size == (size, size):
        return inner
    margins = ((top, size - bottom), (left, size - right), (0, 0))
    replicated = Image.fromarray(np.pad(np.asarray(inner), margins, mode="edge"))
    blurred = replicated.filter(ImageFilter.GaussianBlur(size / 24))
    index = np.arange(size)
    outside_x = np.maximum(left - index, index - (right - 1)).clip(0)
    outside_y = np.maximum(top - index, index - (bottom - 1)).clip(0)
    distance = np.maximum(outside_x[None, :], outside_y[:, None])
    softness = (distance * (255 * 12 / size)).clip(0, 255).astype(np.uint8)  # full after a twelfth of the side
    return Image.composite(blurred, replicated, Image.fromarray(softness))


def from_square(square: Image.Image, letterbox: Letterbox, *, most_px: int | None = None) -> Image.Image:
    """The photo's part of the square at the photo's own size and aspect, or smaller: at most `most_px` on a side.

    Raises:
        ValueError: The picture is not a square of the letterbox's side.
    """
    if square.size != (letterbox.size_px, letterbox.size_px):
        raise ValueError(
            f"picture is {square.size[0]} x {square.size[1]}; "
            f"expected {letterbox.size_px} x {letterbox.size_px} as in its letterbox"
        )
    # Cropped first: the resampling filter would reach beyond a `box` and blend padding into the border.
    width, height = letterbox.width_px, letterbox.height_px
    if most_px is not None and (longest := max(width, height)) > most_px:
        width, height = (max(1, round(side * most_px / longest)) for side in (width, height))
    return square.crop(letterbox.box).resize((width, height), Image.Resampling.LANCZOS)


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
