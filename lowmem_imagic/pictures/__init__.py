"""Reads photo files of many formats as upright 8-bit sRGB pictures, and writes PNG files."""

from .formats import PHOTO_SUFFIXES, RAW_SUFFIXES, has_photo_suffix
from .own_pictures import is_apple_double, png_text
from .photo import Photo, PhotoFile, load_photo, photo_file
from .reading import MAX_FILE_BYTES, MAX_PACKED_BYTES

__all__ = [
    "MAX_FILE_BYTES",
    "MAX_PACKED_BYTES",
    "PHOTO_SUFFIXES",
    "RAW_SUFFIXES",
    "Photo",
    "PhotoFile",
    "has_photo_suffix",
    "is_apple_double",
    "load_photo",
    "photo_file",
    "png_text",
]
