"""The origin of an edit as its file records it: the base model, and the photo.

Messages name a value as the file does (see `edits.header`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..geometry import Letterbox, Size
from ..settings.stages import MAX_MODEL_SIDE_PX, MAX_PHOTO_PIXELS, MAX_PHOTO_SIDE_PX
from . import checks

SHA256 = re.compile(r"[0-9a-f]{64}")
TOKEN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""A short lower-case word."""
PART = re.compile(r"[a-z0-9][a-z0-9_]{0,31}")
"""The name of a denoiser or of a tensor of text."""
LABELS = ("modelspec.architecture", "ss_base_model_version", "ss_v2")
"""Header entries of an edit file that tell other programs the kind of its base."""
MAX_LABEL = 100
"""Longest label, in characters."""
MAX_STORED = 12
"""Most tensors beside the adapters; programs that read LoRA files accept no more (`docs/edit_file.md`)."""
# A hub id, or a name as `families.files.source.label_of` makes it: letters and digits of any script. So it is no path,
# drive or scheme, and in a page neither HTML nor a link.
_SOURCE = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SOURCES = "a hub id or a name of letters, digits, _ . and -, not a path"


@dataclass(frozen=True, kw_only=True)
class Interface:
    """The tensors and networks of a base that an edit uses; it fits every base of the family that has the same."""

    text: Mapping[str, int]
    """Name of each stored tensor of a sentence's conditioning to its width, the last side."""
    denoisers: Mapping[str, str]
    """Name of each denoiser to its prediction in diffusers' words, as ``epsilon`` or ``v_prediction``."""

    def __post_init__(self) -> None:
        key = "imagic.base interface"
        text = dict(checks.mapping(self.text, f"{key} text"))
        denoisers = dict(checks.mapping(self.denoisers, f"{key} denoisers"))
        checks.require(text, f"{key} text", text, "at least one tensor")
        checks.require(denoisers, f"{key} denoisers", denoisers, "at least one denoiser")
        stored = len(text) + 2 * len(denoisers)
        checks.require(stored <= MAX_STORED, key, stored, f"at most {MAX_STORED} tensors beside the adapters")
        for name, width in text.items():
            checks.matches(name, PART, f"{key} text", "names of lower-case letters")
            checks.integer(width, f"{key} text.{name}", 1, 2**20)
        for name, prediction in denoisers.items():
            checks.matches(name, PART, f"{key} denoisers", "names of lower-case letters")
            checks.matches(prediction, TOKEN, f"{key} denoisers.{name}", "a short lower-case token")
        # Sorted by name, as in the file; the base knows the order of sampling.
        object.__setattr__(self, "text", dict(sorted(text.items())))
        object.__setattr__(self, "denoisers", dict(sorted(denoisers.items())))

    def __str__(self) -> str:
        widths = ", ".join(str(width) for width in self.text.values())
        return f"{', '.join(dict.fromkeys(self.denoisers.values()))}, width {widths}"


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """The base model of an edit, precisely enough to recognise it on another machine."""

    source: str
    """Hub id, ``demo``, or the own name of a local folder; never a path."""
    revision: str | None
    """Commit or tag at the source, if it has one."""
    family: str
    """Short token of the model family, as ``sd1``."""
    interface: Interface
    """The tensors and networks that edits use."""
    files: Mapping[str, str]
    """Component (``unet``, ``text_encoder``, ``vae``, ``tokenizer``) to the SHA-256 of its file, hex."""
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Header entries that tell other programs the kind of model, see `LABELS`; by default from the family's name."""

    def __post_init__(self) -> None:
        key = "imagic.base"
        source = checks.text(self.source, f"{key} source", 200)
        checks.require(_SOURCE.fullmatch(source), f"{key} source", source, _SOURCES)
        if self.revision is not None:
            checks.text(self.revision, f"{key} revision", 200)
        checks.matches(self.family, TOKEN, f"{key} family", "a short lower-case token")
        checks.require(isinstance(self.interface, Interface), f"{key} interface", self.interface, "an Interface")
        files = dict(checks.mapping(self.files, f"{key} files"))
        checks.require(files, f"{key} files", files, "at least one component")
        for component, digest in files.items():
            checks.matches(component, TOKEN, f"{key} files", "component names of lower-case letters")
            checks.matches(digest, SHA256, f"{key} files.{component}", "64 lower-case hex digits")
        usual = {
            "modelspec.architecture": f"lowmem-imagic-{self.family}/lora",
            "ss_base_model_version": f"lowmem_imagic_{self.family}",
            "ss_v2": "False",
        }
        labels = usual | dict(checks.mapping(self.labels, f"{key} labels"))
        for label, value in labels.items():
            checks.require(label in LABELS, f"{key} labels", label, f"some of {', '.join(LABELS)}")
            checks.text(value, label, MAX_LABEL)
        object.__setattr__(self, "files", files)
        object.__setattr__(self, "labels", labels)

    def match(self, other: "BaseIdentity") -> Literal["exact", "revision", "architecture", "none"]:
        """Returns how closely two bases agree.

        ``exact``: the same files, configured for the same prediction. ``revision``: the same source and known revision,
        but other files (another variant or precision). ``architecture``: adapters fit, results differ. ``none``:
        unusable.
        """
        # First, because one checkpoint file can be configured to predict noise or velocity.
        if (self.family, self.interface) != (other.family, other.interface):
            return "none"
        if self.files == other.files:
            return "exact"
        if self.revision is not None and (self.source, self.revision) == (other.source, other.revision):
            return "revision"
        return "architecture"


@dataclass(frozen=True, kw_only=True)
class SourcePicture:
    """The edited photo by hash and geometry: enough to recognise it and to paste back, without its pixels."""

    sha256: str
    """SHA-256 of the picture file, hex."""
    width_px: int
    """Width of the upright picture."""
    height_px: int
    """Height of the upright picture."""
    size: Size
    """Width and height of the picture that the model was trained on."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the photo's place in it, in pixels."""

    def __post_init__(self) -> None:
        key = "imagic.meta source"
        checks.matches(self.sha256, SHA256, f"{key}.sha256", "64 lower-case hex digits")
        for name in ("width_px", "height_px"):
            checks.integer(getattr(self, name), f"{key}.{name}", 1, MAX_PHOTO_SIDE_PX)
        checks.require(isinstance(self.size, list | tuple) and len(self.size) == 2, f"{key}.size", self.size, "2 sides")
        width, height = (checks.integer(side, f"{key}.size", 1, MAX_MODEL_SIDE_PX) for side in self.size)
        pixels = self.width_px * self.height_px
        checks.require(pixels <= MAX_PHOTO_PIXELS, f"{key} pixels", pixels, f"at most {MAX_PHOTO_PIXELS}")
        checks.require(isinstance(self.box, list | tuple) and len(self.box) == 4, f"{key}.box", self.box, "4 integers")
        left, top, right, bottom = (
            checks.integer(at, f"{key}.box", 0, side)
            for at, side in zip(self.box, (width, height, width, height), strict=True)
        )
        checks.require(left < right and top < bottom, f"{key}.box", self.box, "left < right and top < bottom")
        object.__setattr__(self, "size", (width, height))
        object.__setattr__(self, "box", (left, top, right, bottom))

    @staticmethod
    def of(sha256: str, letterbox: Letterbox) -> "SourcePicture":
        """The record of a photo with this hash and letterbox."""
        return SourcePicture(
            sha256=sha256,
            width_px=letterbox.width_px,
            height_px=letterbox.height_px,
            size=letterbox.size,
            box=letterbox.box,
        )

    @property
    def letterbox(self) -> Letterbox:
        """Where the photo lies in the picture that the model was trained on."""
        left, top, right, bottom = self.box
        return Letterbox(
            width_px=self.width_px,
            height_px=self.height_px,
            size=self.size,
            left=left,
            top=top,
            right=right,
            bottom=bottom,
        )
