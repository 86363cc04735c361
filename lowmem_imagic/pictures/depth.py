"""Converts samples of any depth to 8 bits, and splits off opacity."""

import numpy as np
from PIL import Image

from .contents import Contents


def to_eight_bit(image: Image.Image, format_name: str, contents: Contents) -> Image.Image:
    """The picture with 8-bit samples; wide samples are scaled, while Pillow's own `convert` clips at 255.

    Adds a remark to the contents' notes.
    """
    bits, notes = contents.bits, contents.notes
    key = image.info.get("transparency")
    if image.mode[0] not in "IF":
        if bits > 8:
            notes.append(f"{bits}-bit values scaled to 8 bit")
        # A PNG's transparent colour is given at the file's depth; Pillow scales the pixels but not the key.
        if format_name == "PNG" and bits == 16 and image.mode == "RGB" and key is not None:
            image.info["transparency"] = tuple(value >> 8 for value in key)
        elif format_name == "PNG" and bits in (2, 4) and image.mode == "L" and key is not None:
            image.info["transparency"] = key * 255 // (2**bits - 1)
        return image
    if format_name == "JPEG2000":
        bits = 16  # Pillow widens samples of any depth above 8 to the full 16 bits
    elif format_name == "TIFF" and image.mode in ("I", "F"):
        bits = 8  # such values have no fixed maximum for white
    values = np.asarray(image).astype(np.float32)
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    if bits > 8:
        low, high = 0.0, float(2**bits - 1)
        notes.append(f"{bits}-bit values scaled to 8 bit")
        if contents.white_is_zero:
            values = high - values  # white is zero, which Pillow handles only up to 8 bit
    else:
        low, high = _range(values, scales=(1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0))
        values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
        notes.append(f"values from {low:g} to {high:g} scaled to 8 bit")
    scaled = np.rint((np.clip(values, low, high) - low) * (255.0 / (high - low))).astype(np.uint8)
    grey = Image.fromarray(scaled)
    return grey if alpha is None else Image.merge("LA", (grey, alpha))


def _range(values: np.ndarray, scales: tuple[float, ...]) -> tuple[float, float]:
    """The values for black and white in a picture without a fixed range.

    White is the first of `scales` that covers the values and is used to a sixteenth or more (the smallest always
    counts as used); otherwise the values' own range is taken.
    """
    finite = values[np.isfinite(values)]
    lowest, highest = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    lowest, highest = max(lowest, -1e37), min(highest, 1e37)  # their difference must fit into float32
    if lowest >= 0:
        for scale in scales:
            if highest <= scale and (scale == scales[0] or highest > scale / 16):
                return 0.0, scale
        return 0.0, highest
    return lowest, max(highest, lowest + max(1.0, abs(lowest) * 1e-6))  # more than float32 rounds away


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours in L, RGB, CMYK or LAB, and the opacity (mode L) or None."""
    if image.mode == "LA":
        return image.getchannel("L"), image.getchannel("A")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba.convert("RGB"), rgba.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None
