"""What a file is that was given in place of an edit file, by its first bytes.

Only the usual mistakes; `pictures/formats.py`, which stands above, says which pictures can be read.
"""

import re

START_BYTES = 12
"""The number of first bytes that tell the kinds apart."""
_KINDS = (
    ("a PNG picture", rb"\x89PNG\r\n\x1a\n"),
    ("a JPEG picture", rb"\xff\xd8\xff"),
    ("a WebP picture", rb"RIFF....WEBP"),
    ("a TIFF picture", rb"II[*+]\0|MM\0[*+]"),
    ("a GIF picture", rb"GIF8[79]a"),
    ("an AVIF picture", rb"....ftypavi[fs]"),
    ("a HEIC picture", rb"....ftyp(?:he[iv][cfmsx]|mif[123]|msf1|MiH[BE])"),
    ("a zip archive", rb"PK\x03\x04"),
)


def kind_of(start: bytes) -> str | None:
    """The kind of a file with these first bytes, as "a PNG picture"; None if it is none of the usual ones."""
    return next((kind for kind, pattern in _KINDS if re.match(pattern, start, re.DOTALL)), None)
