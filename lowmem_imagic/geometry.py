"""Where a photo lies in the picture that a model edits, and which sizes such a picture may have; whole pixels only."""

from dataclasses import dataclass, fields, replace
from typing import Self

Size = tuple[int, int]
"""Width and height of a picture in pixels."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of the pictures that a model edits: none has more pixels than the model's own.

    A plan for the model's own size therefore holds for all of them.
    """

    own: Size
    """The size that the model was made for."""
    multiple: int
    """Divisor of both sides, in pixels."""
    least: int
    """Shortest side in pixels; the side of `own` for a model that was made for squares alone."""
    fewest: int = 0
    """Fewest pixels of a size, padding included, for a model that was trained on pictures of about equal area."""

    def nearest(self, width_px: int, height_px: int) -> Size:
        """The size in which a photo of this width and height has the most pixels.

        Among equals, the size with the least padding. A photo's nearest size is its own nearest size.

        Raises:
            ValueError: a side below 1.
        """
        longest = self.own[0] * self.own[1] // self.least
        sides = range(-(-self.least // self.multiple) * self.multiple, longest + 1, self.multiple)
        pixels = self.own[0] * self.own[1]
        sizes = [self.own, *((w, h) for w in sides for h in sides if self.fewest <= w * h <= pixels)]

        def worth(size: Size) -> tuple[int, int]:
            left, top, right, bottom = Letterbox.fit(width_px, height_px, size).box
            return (right - left) * (bottom - top), -size[0] * size[1]

        return max(sizes, key=worth)


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """Where a photo of `width_px` x `height_px` lies inside the model's picture."""

    width_px: int
    """The photo's own width."""
    height_px: int
    """The photo's own height."""
    size: Size
    """Width and height of the model's picture."""
    left: int
    """First column of the photo in the model's picture."""
    top: int
    """First row."""
    right: int
    """Column after the last."""
    bottom: int
    """Row after the last."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            numbers = value if field.name == "size" else (value,)
            whole = isinstance(numbers, tuple) and all(type(number) is int for number in numbers)
            if not whole or len(numbers) != 1 + (field.name == "size"):
                raise ValueError(f"letterbox {field.name} is {value!r}; expected whole numbers")
        width, height = self.size
        if min(self.width_px, self.height_px, width, height) < 1:
            raise ValueError(
                f"letterbox of {self.width_px} x {self.height_px} in {width} x {height}; expected 1 or more each"
            )
        if not (0 <= self.left < self.right <= width and 0 <= self.top < self.bottom <= height):
            raise ValueError(
                f"letterbox box is {self.box}; expected left < right within 0..{width}, top < bottom within 0..{height}"
            )

    @classmethod
    def fit(cls, width_px: int, height_px: int, size: Size) -> Self:
        """The largest centred box of the photo's aspect, at least one pixel each way.

        Raises:
            ValueError: A side below 1.
        """
        if min(width_px, height_px, *size) < 1:
            raise ValueError(f"letterbox of {width_px} x {height_px} in {size[0]} x {size[1]}; expected 1 or more each")
        # Integers throughout: halves round up, the same on every machine.
        if width_px * size[1] >= height_px * size[0]:
            across, down = size[0], max(1, (2 * height_px * size[0] + width_px) // (2 * width_px))
        else:
            across, down = max(1, (2 * width_px * size[1] + height_px) // (2 * height_px)), size[1]
        left, top = (size[0] - across) // 2, (size[1] - down) // 2
        return cls(
            width_px=width_px,
            height_px=height_px,
            size=size,
            left=left,
            top=top,
            right=left + across,
            bottom=top + down,
        )

    def scaled(self, size: Size) -> Self:
        """The same place in a picture of another size, at least one pixel each way.

        Raises:
            ValueError: A side below 1.
        """
        first, last = [], []
        for start, stop, before, after in zip(self.box[:2], self.box[2:], self.size, size, strict=True):
            first.append(min(start * after // before, after - 1))
            last.append(-(-stop * after // before))
        return replace(self, size=size, left=first[0], top=first[1], right=last[0], bottom=last[1])

    @property
    def box(self) -> tuple[int, int, int, int]:
        """`(left, top, right, bottom)`, as Pillow's `crop` takes it."""
        return self.left, self.top, self.right, self.bottom
