"""The two ways to name an adapter's tensors in an edit file; other programs read both.

=========  =======================================  =======================================================
layout     tensors of a layer                       everything else of the edit
=========  =======================================  =======================================================
`KOHYA`    ``lora_unet_*.lora_down.weight``,        in the header: an extra tensor beside kohya keys makes
           ``.lora_up.weight``, ``.alpha``          diffusers load nothing, without an error
`PEFT`     ``<denoiser>.*.lora_A.weight``,          tensors ``lora_imagic.*``, at most 12 of them
           ``.lora_B.weight``; alpha is the rank
=========  =======================================  =======================================================
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

EXTRA = "lora_imagic."
"""Prefix of the tensors that belong to no layer; other programs skip unknown names that contain ``lora``."""


@dataclass(frozen=True)
class Layout:
    """One way to name an adapter's tensors."""

    layer: re.Pattern[str]
    """Form of a layer's key."""
    form: str
    """The form in messages."""
    parts: tuple[str, ...]
    """Endings of a layer's tensors: down, up and, if it is stored, alpha."""
    in_header: bool
    """Whether the tensors that belong to no layer are in the header."""

    def split(self, tensor: str) -> tuple[str, str] | None:
        """Returns the layer's key and the ending of a tensor's name; None if it belongs to no layer."""
        for part in self.parts:
            layer = tensor.removesuffix(f".{part}")
            if layer != tensor and self.layer.fullmatch(layer):
                return layer, part
        return None

    def denoiser_of(self, layer: str, denoisers: Iterable[str]) -> str | None:
        """Returns the denoiser of a layer; None if it belongs to none of them.

        kohya's keys do not name the denoiser: they are for models with a single one.
        """
        if self is KOHYA:
            names = list(denoisers)
            return names[0] if len(names) == 1 else None
        prefix = layer.partition(".")[0]
        return prefix if prefix in denoisers else None


KOHYA = Layout(
    re.compile(r"lora_unet_[a-z0-9_]{1,200}"),
    "lora_unet_*",
    ("lora_down.weight", "lora_up.weight", "alpha"),
    in_header=True,
)
PEFT = Layout(
    re.compile(r"(?!lora_)[a-z0-9_]{1,32}(\.[A-Za-z0-9_]{1,64}){1,16}"),
    "<denoiser>.*",
    ("lora_A.weight", "lora_B.weight"),
    in_header=False,
)


def layout_of(tensors: Iterable[str]) -> Layout:
    """Returns the layout of a file with tensors of these names; `KOHYA` if they fit neither."""
    return PEFT if any(PEFT.split(name) for name in tensors) else KOHYA
