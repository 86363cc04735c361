"""What an edit file says about where the edit comes from: the base model, and the photo.

Messages name a value as the file does (see `edits.header`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ..settings.stages import MAX_MODEL_SIDE_PX, MAX_PHOTO_PIXELS, MAX_PHOTO_SIDE_PX
from . import checks

SHA256 = re.compile(r"[0-9a-f]{64}")
TOKEN = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""A short lower-case word."""
# A hub id or a bare name: at most one slash, no part that a path could begin with, no drive or scheme.
_SOURCE = re.compile(r"[^/\\:~.\s-][^/\\:]*(/[^/\\:~.\s-][^/\\:]*)?")


@dataclass(frozen=True, kw_only=True)
class BaseIdentity:
    """Which base model an edit belongs to, precisely enough to recognise it elsewhere."""

    source: str
    """Hub id, ``demo``, or the own name of a local folder; never a path."""
    revision: str | None
    """Commit or tag at the source, if it has one."""
    family: str
    """Short token of the model family, as ``sd1``."""
    prediction_type: str
    """What the UNet predicts, in diffusers' words, as ``epsilon`` or ``v_prediction``."""
    cross_attention_dim: int
    """Width D of the text conditioning."""
    files: Mapping[str, str]
    """Component (``unet``, ``text_encoder``, ``vae``, ``tokenizer``) to the SHA-256 of its file, hex."""

    def __post_init__(self) -> None:
        key = "imagic.base"
        source = checks.text(self.source, f"{key} source", 200)
        checks.require(_SOURCE.fullmatch(source), f"{key} source", source, "a hub id or a name, not a path")
        if self.revision is not None:
            checks.text(self.revision, f"{key} revision", 200)
        checks.matches(self.family, TOKEN, f"{key} family", "a short lower-case token")
        checks.matches(self.prediction_type, TOKEN, f"{key} prediction_type", "a short lower-case token")
        checks.integer(self.cross_attention_dim, f"{key} cross_attention_dim", 1, 2**20)
        files = dict(checks.mapping(self.files, f"{key} files"))
        checks.require(files, f"{key} files", files, "at least one component")
        for component, digest in files.items():
            checks.matches(component, TOKEN, f"{key} files", "component names of lower-case letters")
            checks.matches(digest, SHA256, f"{key} files.{component}", "64 lower-case hex digits")
        object.__setattr__(self, "files", files)

    def match(self, other: "BaseIdentity") -> Literal["exact", "revision", "architecture", "none"]:
        """Returns how closely two bases agree.

        ``exact``: the same files, configured alike. ``revision``: the same source and known revision, though not
        the same files (another variant or precision). ``architecture``: adapters fit, results differ. ``none``:
        unusable.
        """
        # First, because one checkpoint file can be configured to predict noise or velocity.
        mine = (self.family, self.prediction_type, self.cross_attention_dim)
        if mine != (other.family, other.prediction_type, other.cross_attention_dim):
            return "none"
        if self.files == other.files:
            return "exact"
        if self.revision is not None and (self.source, self.revision) == (other.source, other.revision):
            return "revision"
        return "architecture"


@dataclass(frozen=True, kw_only=True)
class SourcePicture:
    """What is kept of the edited photo: enough to recognise it and to paste back, never the picture."""

    sha256: str
    """SHA-256 of the picture file, hex."""
    width_px: int
    """Width of the upright picture."""
    height_px: int
    """Height of the upright picture."""
    size_px: int
    """Side of the training square."""
    box: tuple[int, int, int, int]
    """Left, top, right, bottom of the picture's place in the training square, in pixels."""

    def __post_init__(self) -> None:
        key = "imagic.meta source"
        checks.matches(self.sha256, SHA256, f"{key}.sha256", "64 lower-case hex digits")
        for name in ("width_px", "height_px"):
            checks.integer(getattr(self, name), f"{key}.{name}", 1, MAX_PHOTO_SIDE_PX)
        checks.integer(self.size_px, f"{key}.size_px", 1, MAX_MODEL_SIDE_PX)
        pixels = self.width_px * self.height_px
        checks.require(pixels <= MAX_PHOTO_PIXELS, f"{key} pixels", pixels, f"at most {MAX_PHOTO_PIXELS}")
        checks.require(isinstance(self.box, list | tuple) and len(self.box) == 4, f"{key}.box", self.box, "4 integers")
        left, top, right, bottom = (checks.integer(side, f"{key}.box", 0, self.size_px) for side in self.box)
        checks.require(left < right and top < bottom, f"{key}.box", self.box, "left < right and top < bottom")
        object.__setattr__(self, "box", (left, top, right, bottom))
