"""File names made from text."""

import re
import unicodedata

SHEET = "sheet.png"
"""Name of a result folder's contact sheet."""
REPORT = "report.json"
"""Name of a run's report, in the folder of its results."""
MAX_REPORT_BYTES = 16 * 2**20
"""Size limit for reading a report."""


def safe_stem(text: str) -> str:
    """Returns a file name without extension made from any text: ``[a-z0-9-]``, 1 to 60 characters, portable.

    Different texts may give the same stem; text without any Latin letter or digit gives ``edit``.
    """
    plain = unicodedata.normalize("NFKD", text[:1000]).encode("ascii", "ignore").decode().lower()
    stem = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:60].strip("-") or "edit"
    # Windows opens devices under these names, in any folder and with any extension.
    return f"edit-{stem}" if re.fullmatch(r"con|prn|aux|nul|(com|lpt)[0-9]", stem) else stem


def loses_letters(text: str) -> bool:
    """Whether `safe_stem` leaves out letters or digits of the text, those of other scripts than the Latin one."""
    plain = unicodedata.normalize("NFKD", text[:1000])
    return any(not one.isascii() and unicodedata.category(one)[0] in "LN" for one in plain)
