"""The overview of a batch: one picture, and a page that opens from disk (`overview_page`).

Both show every item of `status`: those of all commands into the folder. Pictures, sentences and times are from the
items' folders, the states are from the ledger. A photo is cut out of its item's sheet,
since no other file contains it. Text from a report is never used as a path or as markup.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..amounts import counted
from ..errors import OutputExistsError
from ..pictures.png import Box, contact_sheet, encode_png
from ..storage.atomic import write_bytes
from ..storage.file_names import SHEET
from ..storage.regular_files import is_plain, open_regular
from .ledger.file import DONE
from .outputs import report_of, seconds_at, training_seconds
from .overview_page import GENERATOR, GONE, MARK, PAGE, PICTURE, Shown, counts_of, page_of
from .status import status

MAX_ROWS, MAX_PICTURES = 60, 11
"""Most items on the picture, and most pictures of each."""
_CELL_PX = 144
_PATH = re.compile(
    r"""(?<=')([A-Za-z]:)?[\\/][^']*|(?<=")([A-Za-z]:)?[\\/][^"]*|(?<![\w.])([A-Za-z]:)?([\\/][^\\/\s'"]+)+"""
)
"""An absolute path in a message; one in quotes may hold spaces."""
_MAX_SIDE_PX = 20_000
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""Pillow's errors for damaged pictures."""


def write_overview(folder: Path, *, force: bool) -> dict[str, Any]:
    """Writes page and picture into a batch's folder; returns the report.

    Raises:
        ConfigError: the folder is no batch's.
        OutputExistsError: another program's file has the name of one of them, and `force` is False.
    """
    state = status(folder)
    items = [_shown(folder, item) for item in state["items"]]
    page, picture = folder / PAGE, folder / PICTURE
    if not force:
        for path, ours in ((page, _is_our_page(page)), (picture, _is_our_picture(picture))):
            if os.path.lexists(path) and not ours:
                raise OutputExistsError(f"{path} was not written by `batch sheet`; `force` replaces it")
    with_pictures = [item for item in items if item.pictures]
    files = [PAGE]
    if with_pictures:
        data = encode_png(_picture(folder, with_pictures, counts_of(state)), text={"Software": GENERATOR})
        write_bytes(picture, data, overwrite=True)
        files.append(PICTURE)
    # JSON and file names may contain half a surrogate pair, which is escaped here.
    text = page_of(folder.absolute().name, items, state, bool(with_pictures)).encode(errors="backslashreplace")
    write_bytes(page, text, overwrite=True)
    count = len(with_pictures)
    summary = [f"{page}: {counted(count, 'item')} with pictures, {len(items) - count} without"]
    return {"out": str(folder), "files": files, "items": len(items), "with_pictures": count, "summary": summary}


def _shown(folder: Path, item: dict[str, Any]) -> Shown:
    """The row of an item of `status`."""
    name, state, where = str(item["name"]), str(item["state"]), str(item["where"])
    report = report_of(folder / name) if _plain(name) and state == DONE else None
    if report is None:
        why = "its files are gone; `batch run` makes them again" if state == DONE else item["error"]
        remark = f"{where}: {without_folders(str(why), folder)}" if why else where
        return Shown(name, state=GONE if state == DONE else state, remark=remark)
    there = {path.name for path in (folder / name).iterdir() if is_plain(path, stat.S_IFREG)}
    sizes = {one: _size(folder / name / one) for one in _names(report.get("pictures")) if one in there}
    edit = next((one for one in _names([report.get("edit_file")]) if one in there), None)
    sheet = _size(folder / name / SHEET) if SHEET in there else None
    sentence = report.get("sentence")
    return Shown(
        name,
        sentence if isinstance(sentence, str) else "",
        tuple((_label(one), one, size) for one, size in sizes.items() if size is not None),
        edit,
        sheet,
        _box(report.get("sheet_photo_box"), sheet) if sheet else None,
        (training_seconds(report.get("stages")), seconds_at(report, "seconds", "render")),
        DONE,
        f"{where}: its pictures are gone",
    )


def without_folders(message: str, folder: Path) -> str:
    """The message with only the last part of each path: a shared page must not name folders of this machine."""
    message = message.replace(f"{folder.absolute()}{os.sep}", "")
    return _PATH.sub(lambda path: re.split(r"[\\/]", path[0].rstrip("\\/"))[-1], message)


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name


def _names(value: Any) -> list[str]:
    """The plain file names in a list, each once."""
    names = value if isinstance(value, list) else []
    return list(dict.fromkeys(one for one in names if isinstance(one, str) and _plain(one)))


def _size(path: Path) -> tuple[int, int] | None:
    """The size of a PNG, from its first bytes; None for any other file."""
    try:
        with _opened(path) as picture:
            return picture.size if max(picture.size) <= _MAX_SIDE_PX else None
    except _UNREADABLE:
        return None


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    # PNG only: Pillow starts other programs for some formats.
    with open_regular(path, follow=False) as (file, _), Image.open(file, formats=("PNG",)) as picture:
        yield picture


def _box(value: Any, size: tuple[int, int]) -> Box | None:
    """The box in `value` if it lies on a sheet of this size, else None."""
    if not isinstance(value, list) or len(value) != 4 or not all(type(side) is int for side in value):
        return None
    left, top, right, bottom = value
    inside = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    return (left, top, right, bottom) if inside else None


def _label(name: str) -> str:
    """The label of a picture, from a name such as ``eta_0.60_seed_1.png``."""
    return name.removesuffix(".png").replace("_seed_", ", seed ").replace("eta_", "eta ")


def _is_our_page(path: Path) -> bool:
    try:
        with open_regular(path, follow=False) as (file, _):
            return MARK in file.read(8000).decode(errors="ignore")[:2000]
    except (OSError, ValueError):
        return False


def _is_our_picture(path: Path) -> bool:
    try:
        with _opened(path) as picture:
            return picture.info.get("Software") == GENERATOR
    except _UNREADABLE:
        return False


# The picture


def _picture(folder: Path, items: Sequence[Shown], title: str) -> Image.Image:
    """A contact sheet, one row per item: the photo, then its pictures by eta."""
    shown = items[:MAX_ROWS]
    columns = 1 + min(MAX_PICTURES, max(len(item.pictures) for item in shown))
    cells: list[tuple[str, Image.Image | None]] = []
    for item in shown:
        row = [(item.sentence, _photo(folder, item)), *_small(folder, item, columns - 1)]
        cells += row + [("", None)] * (columns - len(row))
    left = len(items) - len(shown)
    more = [f"{left} more item{'s' if left > 1 else ''}"] if left else []
    more += ["more pictures"] if any(len(item.pictures) > MAX_PICTURES for item in shown) else []
    footer = f"and {' and '.join(more)}, see {PAGE}" if more else ""
    return contact_sheet(cells, columns=columns, title=title, footer=footer, cell_px=_CELL_PX)


def _photo(folder: Path, item: Shown) -> Image.Image | None:
    if item.photo is None:
        return None
    try:
        with _opened(folder / item.name / SHEET) as sheet:
            return sheet.crop(item.photo)
    except _UNREADABLE:
        return None


def _small(folder: Path, item: Shown, most: int) -> Iterator[tuple[str, Image.Image | None]]:
    """Yields the pictures at the size of a cell, to save memory."""
    for label, name, _ in item.pictures[:most]:
        try:
            with _opened(folder / item.name / name) as picture:
                picture.thumbnail((_CELL_PX, _CELL_PX))
                yield label, picture.convert("RGB")
        except _UNREADABLE:
            yield label, None
