"""A batch at a glance: one picture, and a page that opens from disk.

Both are made from the items' folders alone; the ledger adds what is not finished. A photo is shown as its item's sheet
has it, since no other file holds it. Nothing that a report says is taken for a path or for markup.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from ..atomic import write_bytes
from ..errors import OutputExistsError
from ..png import Box, contact_sheet, encode_png
from .ledger_file import DONE, FAILED
from .outputs import report_of
from .status import status

PAGE, PICTURE, SHEET = "index.html", "overview.png", "sheet.png"
MAX_ROWS = 60
"""Most items on the picture."""
_GENERATOR = "lowmem-imagic batch sheet"
_MARK = f'<meta name="generator" content="{_GENERATOR}">'
_CELL_PX = 144
_PATH = re.compile(r"(?<![\w.])([A-Za-z]:)?([\\/][^\\/\s'\"]+)+")
"""An absolute path in a message."""
_MAX_SHEET_SIDE_PX = 20_000


@dataclass(frozen=True)
class Shown:
    """An item as it is shown."""

    name: str
    sentence: str = ""
    pictures: tuple[tuple[str, str], ...] = ()
    """Label and file name of each picture."""
    edit: str | None = None
    """Name of the edit file."""
    sheet: tuple[int, int] | None = None
    """Size of its contact sheet in pixels, if it has one."""
    photo: Box | None = None
    """Where the photo is on the sheet."""
    seconds: tuple[float, float] | None = None
    """Of training and of rendering."""
    state: str = DONE
    remark: str = ""
    """What went wrong, or where it stands in the manifest."""


def write_overview(folder: Path, *, force: bool) -> dict[str, Any]:
    """Writes both into a batch's folder, and returns what is to be reported.

    Raises:
        ConfigError: no folder of a batch.
        OutputExistsError: something of that name is there that this did not make, and `force` is False.
    """
    found = status(folder)
    items = [_shown(folder, item) for item in found["items"]]
    page, picture = folder / PAGE, folder / PICTURE
    if not force:
        for path, ours in ((page, _is_our_page(page)), (picture, _is_our_picture(picture))):
            if path.exists() and not ours:
                raise OutputExistsError(f"{path} is none of `batch sheet`'s; --force replaces it")
    made = [item for item in items if item.pictures]
    files = [PAGE]
    if made:
        data = encode_png(_picture(folder, made, found["summary"][0]), text={"Software": _GENERATOR})
        write_bytes(picture, data, overwrite=True)
        files.append(PICTURE)
    write_bytes(page, _page(folder.absolute().name, items, found, bool(made)).encode(), overwrite=True)
    summary = [f"{page}: {len(made)} items with pictures, {len(items) - len(made)} without"]
    return {"out": str(folder), "files": files, "items": len(items), "with_pictures": len(made), "summary": summary}


def _shown(folder: Path, item: dict[str, Any]) -> Shown:
    """What can be shown of an item that the ledger, or a look at the files, has found."""
    name = str(item["name"])
    remark = f"{item['where']}: {_PATH.sub(_last, item['error'])}" if item["error"] else str(item["where"])
    report = report_of(folder / name) if _plain(name) and item["state"] == DONE else None
    if report is None:
        return Shown(name, state=str(item["state"]), remark=remark)
    there = {path.name for path in (folder / name).iterdir() if path.is_file()}
    names = [one for one in _list(report.get("pictures")) if one in there]
    edit = report.get("edit_file")
    sheet = _size(folder / name / SHEET) if SHEET in there else None
    stages = {key: value.get("seconds") or 0.0 for key, value in report.get("stages", {}).items()}
    return Shown(
        name,
        str(report.get("sentence", "")),
        tuple((_label(one), one) for one in names),
        edit if edit in there else None,
        sheet,
        _box(report.get("sheet_photo_box"), sheet) if sheet else None,
        (stages.get("embed", 0.0) + stages.get("finetune", 0.0), report.get("seconds", {}).get("render", 0.0)),
        DONE,
        remark,
    )


def _last(path: re.Match[str]) -> str:
    """The last part of a path: a page that is shared names no folders of this machine."""
    return re.split(r"[\\/]", path[0])[-1]


def _plain(name: str) -> bool:
    return bool(name) and Path(name).name == name


def _list(value: Any) -> list[str]:
    return [one for one in value if isinstance(one, str) and _plain(one)] if isinstance(value, list) else []


def _size(path: Path) -> tuple[int, int] | None:
    """Of a picture, from its first bytes."""
    try:
        with Image.open(path) as picture:
            return picture.size if max(picture.size) <= _MAX_SHEET_SIDE_PX else None
    except (OSError, ValueError, Image.DecompressionBombError):
        return None


def _box(value: Any, size: tuple[int, int]) -> Box | None:
    """A place on a sheet of that size, if it is one."""
    if not isinstance(value, list) or len(value) != 4 or not all(type(side) is int for side in value):
        return None
    left, top, right, bottom = value
    inside = 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]
    return (left, top, right, bottom) if inside else None


def _label(name: str) -> str:
    """``eta_0.60_seed_1.png`` as a person reads it."""
    return name.removesuffix(".png").replace("_seed_", ", seed ").replace("eta_", "eta ")


def _is_our_page(path: Path) -> bool:
    try:
        return _MARK in path.read_text(encoding="utf-8")[:2000]
    except (OSError, ValueError):
        return False


def _is_our_picture(path: Path) -> bool:
    try:
        with Image.open(path) as picture:
            return picture.info.get("Software") == _GENERATOR
    except (OSError, ValueError, Image.DecompressionBombError):
        return False


# The picture


def _picture(folder: Path, items: Sequence[Shown], title: str) -> Image.Image:
    """Rows of items: the photo, and its pictures by eta."""
    columns = 1 + max(len(item.pictures) for item in items)
    cells: list[tuple[str, Image.Image]] = []
    for item in items[:MAX_ROWS]:
        row = [(item.sentence, _photo(folder, item)), *_small(folder, item)]
        cells += row + [("", _blank())] * (columns - len(row))
    more = len(items) - MAX_ROWS
    footer = f"and {more} more, see {PAGE}" if more > 0 else ""
    return contact_sheet(cells, columns=columns, title=title.partition(": ")[2], footer=footer, cell_px=_CELL_PX)


def _photo(folder: Path, item: Shown) -> Image.Image:
    if item.photo is None:
        return _blank()
    try:
        with Image.open(folder / item.name / SHEET) as sheet:
            return sheet.crop(item.photo)
    except (OSError, ValueError, Image.DecompressionBombError):
        return _blank()


def _small(folder: Path, item: Shown) -> Iterator[tuple[str, Image.Image]]:
    """Pictures at the size of a cell, so that many are no burden."""
    for label, name in item.pictures:
        try:
            with Image.open(folder / item.name / name) as picture:
                picture.thumbnail((_CELL_PX, _CELL_PX))
                yield label, picture.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            yield label, _blank()


def _blank() -> Image.Image:
    return Image.new("RGB", (_CELL_PX, _CELL_PX), (238, 238, 234))


# The page

_STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --ink: #202024; --quiet: #6c6c72; --rule: #dededa; --bad: #a3261c }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17171a; --ink: #ececea; --quiet: #9a9aa0; --rule: #34343a; --bad: #ff8a7a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 92rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem; font-weight: 600; margin: 0 }
h2 { font-size: 1.05rem; font-weight: 600; margin: 0 }
p { margin: .2rem 0 } .quiet { color: var(--quiet); font-size: .875rem } .bad { color: var(--bad) }
a { color: inherit; text-underline-offset: .15em }
article { border-top: 1px solid var(--rule); padding: 1.4rem 0 1rem; margin-top: 1.4rem }
.row { display: flex; gap: .75rem; overflow-x: auto; padding: .8rem 0 .4rem }
figure { margin: 0; flex: none } figcaption { color: var(--quiet); font-size: .8rem; margin-top: .3rem }
figure img, .photo { display: block; height: 11rem; width: auto; border-radius: .3rem; background: var(--rule) }
.photo { overflow: hidden; position: relative }
.photo img { position: absolute; max-width: none; height: auto; border-radius: 0 }
"""
_HEIGHT_REM = 11.0


def _page(name: str, items: Sequence[Shown], found: dict[str, Any], picture: bool) -> str:
    seconds = sum(sum(item.seconds) for item in items if item.seconds)
    took = f"; {_minutes(seconds)} of training and rendering" if seconds else ""
    also = f' The same at a glance: <a href="{PICTURE}">{PICTURE}</a>.' if picture else ""
    policy = "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'"
    body = "\n".join(_article(item) for item in items)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{_MARK}
<title>{escape(name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<p class="quiet">{escape(found["summary"][0].partition(": ")[2])}{took}.{also}</p>
{body}
</body>
</html>
"""


def _article(item: Shown) -> str:
    if item.state != DONE or not item.pictures:
        style = "bad" if item.state == FAILED else "quiet"
        remark = f'<p class="{style}">{escape(item.state)}: {escape(item.remark)}</p>'
        return f"<article><h2>{escape(item.name or item.remark)}</h2>{remark}</article>"
    home = quote(item.name)
    links = [f'<a href="{home}/">folder</a>']
    links += [f'<a href="{home}/{SHEET}">sheet</a>'] if item.sheet else []
    links += [f'<a href="{home}/{quote(item.edit)}">edit file</a>'] if item.edit else []
    training, rendering = item.seconds or (0.0, 0.0)
    facts = f"{escape(item.name)} · {training:.0f} s training, {rendering:.0f} s rendering"
    figures = [_figure_of_photo(home, item.photo, item.sheet)] if item.photo and item.sheet else []
    figures += [
        f'<figure><a href="{home}/{quote(file)}"><img loading="lazy" src="{home}/{quote(file)}" '
        f'alt="{escape(f"{item.sentence}, {label}")}"></a><figcaption>{escape(label)}</figcaption></figure>'
        for label, file in item.pictures
    ]
    return (
        f'<article><h2>{escape(item.sentence)}</h2><p class="quiet">{facts} · {" · ".join(links)}</p>'
        f'<div class="row">{"".join(figures)}</div></article>'
    )


def _figure_of_photo(home: str, box: Box, size: tuple[int, int]) -> str:
    """The photo, cut out of the sheet by the browser."""
    left, top, right, bottom = box
    scale = _HEIGHT_REM / (bottom - top)
    # The whole sheet, so scaled that the photo in it has its height, and moved so that it lies in the frame.
    frame = f"width: {(right - left) * scale:.3f}rem"
    sheet = f"width: {size[0] * scale:.3f}rem; left: {-left * scale:.3f}rem; top: {-top * scale:.3f}rem"
    return (
        f'<figure><div class="photo" style="{frame}"><img loading="lazy" src="{home}/{SHEET}" alt="the photo" '
        f'style="{sheet}"></div><figcaption>photo</figcaption></figure>'
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{math.ceil(seconds / 60)} min"
