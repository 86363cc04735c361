"""Pictures coming in: files of many formats to upright 8-bit sRGB pictures."""

from .formats import PHOTO_SUFFIXES, has_photo_suffix
from .photo import Photo, load_photo, photo_sha256
from .reading import MAX_FILE_BYTES, MAX_PACKED_BYTES

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PACKED_BYTES",
    "PHOTO_SUFFIXES",
    "Photo",
    "has_photo_suffix",
    "load_photo",
    "photo_sha256",
]
