"""The page of a batch's overview: opens from disk, runs no scripts, fetches nothing, and escapes all text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as _escape
from typing import Any
from urllib.parse import quote

from ..amounts import counted, duration
from ..pictures.png import Box
from ..plain_text import shown
from ..storage.file_names import SHEET
from .ledger.file import DONE, FAILED, RUNNING, WAITING

PAGE, PICTURE = "index.html", "overview.png"
GENERATOR = "lowmem-imagic batch sheet"
MARK = f'<meta name="generator" content="{GENERATOR}">'
"""Marks the page as written by this program."""
GONE = "gone"
"""State of a finished item whose files were removed."""


@dataclass(frozen=True)
class Shown:
    """An item on the page."""

    name: str
    sentence: str = ""
    pictures: tuple[tuple[str, str, tuple[int, int]], ...] = ()
    """Label, file name and size in pixels of each picture."""
    edit: str | None = None
    """Name of the edit file."""
    sheet: tuple[int, int] | None = None
    """Size of its contact sheet in pixels, if it has one."""
    photo: Box | None = None
    """Box of the photo on the sheet."""
    seconds: tuple[float, float] | None = None
    """Seconds of training and of rendering."""
    state: str = DONE
    remark: str = ""
    """Its error, or its place in the manifest."""


def escape(text: str) -> str:
    """The text for markup and attributes; marks of direction and invisible characters are made visible."""
    return _escape(shown(text))


_STYLE = """
:root { color-scheme: light dark; --paper: #fafaf8; --ink: #202024; --muted: #6c6c72; --rule: #dededa; --bad: #a3261c;
  --height: clamp(6.5rem, 26vw, 11rem); --gap: .75rem }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17171a; --ink: #ececea; --muted: #9a9aa0; --rule: #34343a; --bad: #ff8a7a } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 92rem; padding: 2rem clamp(1rem, 4vw, 3rem) 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; font-weight: 600; margin: 0 }
h2 { font-size: 1.05rem; font-weight: 600; margin: 0 }
p { margin: .2rem 0 } .quiet { color: var(--muted); font-size: .875rem } .bad { color: var(--bad) }
a { color: inherit; text-underline-offset: .15em }
main { display: grid; column-gap: 3rem; margin-top: 1.4rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--cells) * (var(--height) + var(--gap))), 1fr)) }
article { border-top: 1px solid var(--rule); padding: 1.4rem 0 1.6rem; min-width: 0 }
.row { display: flex; flex-wrap: wrap; gap: var(--gap); padding-top: .8rem }
figure { margin: 0; max-width: 100%; width: calc(var(--height) * var(--aspect)) }
figcaption { color: var(--muted); font-size: .8rem; margin-top: .3rem; overflow-wrap: normal }
figure img, .photo { display: block; width: 100%; height: auto; border-radius: .3rem; background: var(--rule) }
.photo { overflow: hidden; position: relative; aspect-ratio: var(--aspect) }
.photo img { position: absolute; border-radius: 0 }
"""
_MOST_CELLS = 7
"""Most pictures in a row; more continue in a second row."""


def counts_of(status: dict[str, Any]) -> str:
    """The number of items, in all and by state, from the result of `status`."""
    counts = ", ".join(f"{status[state]} {state}" for state in (DONE, RUNNING, WAITING, FAILED) if status[state])
    return f"{counted(status['total'], 'item')}: {counts}"


def page_of(name: str, items: Sequence[Shown], status: dict[str, Any], picture: bool) -> str:
    """The page as HTML.

    Args:
        name: name of the batch.
        items: the items, in order.
        status: the result of `status` for the batch.
        picture: whether there is a picture to link to.
    """
    seconds = sum(sum(item.seconds) for item in items if item.seconds)
    # Items trained side by side each count the same seconds.
    took = f"; {duration(seconds)} of training and rendering, summed over items" if seconds else ""
    also = f' The same at a glance: <a href="{PICTURE}">{PICTURE}</a>.' if picture else ""
    policy = "default-src 'none'; img-src 'self' file: data:; style-src 'unsafe-inline'"
    body = "\n".join(_article(item) for item in items)
    cells = min(_MOST_CELLS, 1 + max((len(item.pictures) for item in items), default=0))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
{MARK}
<title>{escape(name)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<p class="quiet">{counts_of(status)}{took}.{also}</p>
<main style="--cells: {cells}">
{body}
</main>
</body>
</html>
"""


def _article(item: Shown) -> str:
    if not item.pictures:
        style = "bad" if item.state == FAILED else "quiet"
        state = GONE if item.state == DONE else item.state
        remark = f'<p class="{style}">{escape(state)}: {escape(item.remark)}</p>'
        return f'<article><h2 dir="auto">{escape(item.name or item.remark)}</h2>{remark}</article>'
    links = [f'<a href="{_link(item.name)}/">folder</a>']
    links += [f'<a href="{_link(item.name, SHEET)}">sheet</a>'] if item.sheet else []
    links += [f'<a href="{_link(item.name, item.edit)}">edit file</a>'] if item.edit else []
    training, rendering = item.seconds or (0.0, 0.0)
    facts = f"<bdi>{escape(item.name)}</bdi> · {duration(training)} training, {duration(rendering)} rendering"
    figures = [_figure_of_photo(item.name, item.photo, item.sheet)] if item.photo and item.sheet else []
    figures += [_figure(item, *picture) for picture in item.pictures]
    return (
        f'<article><h2 dir="auto">{escape(item.sentence)}</h2><p class="quiet">{facts} · {" · ".join(links)}</p>'
        f'<div class="row">{"".join(figures)}</div></article>'
    )


def _link(*parts: str) -> str:
    """The address of a file beside the page."""
    # Like os.fsencode, which rejects half of a surrogate pair; no file has such a name.
    return "/".join(quote(part, safe="", errors="surrogateescape" if _on_disk(part) else "replace") for part in parts)


def _on_disk(name: str) -> bool:
    """Whether a file may have this name."""
    try:
        return bool(os.fsencode(name))
    except UnicodeEncodeError:
        return False


def _figure(item: Shown, label: str, name: str, size: tuple[int, int]) -> str:
    file, (width, height) = _link(item.name, name), size
    return (
        f'<figure style="--aspect: {width / height:.4f}"><a href="{file}"><img loading="lazy" src="{file}" '
        f'width="{width}" height="{height}" alt="{escape(f"{item.sentence}, {label}")}"></a>'
        f"<figcaption>{escape(label)}</figcaption></figure>"
    )


def _figure_of_photo(name: str, box: Box, size: tuple[int, int]) -> str:
    """The photo, cut out of the sheet by the browser."""
    left, top, right, bottom = box
    if min(right - left, bottom - top) > 8:
        # Leave out the edges: the browser's scaling would show the sheet's hairline.
        left, top, right, bottom = left + 1, top + 1, right - 1, bottom - 1
    width, height, file = right - left, bottom - top, _link(name, SHEET)
    # Scale and move the whole sheet so that its photo fills the frame.
    place = f"width: {size[0] / width:.4%}; left: {-left / width:.4%}; top: {-top / height:.4%}"
    return (
        f'<figure style="--aspect: {width / height:.4f}"><a class="photo" href="{file}"><img loading="lazy" '
        f'src="{file}" alt="the photo" style="{place}"></a><figcaption>photo</figcaption></figure>'
    )
