"""Writes PNG bytes with generation parameters and provenance, and draws labelled contact sheets."""

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from io import BytesIO
from types import MappingProxyType
from xml.sax.saxutils import quoteattr

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from ..plain_text import shown

SHEET_CELL_PX = 256
"""Side of a contact sheet's cells."""
SHEET_TITLE = "contact sheet"
"""Title of sheets, by which batches recognise sheets among photos."""
EDITED = "compositeWithTrainedAlgorithmicMedia"
"""The term of IPTC's Digital Source Type for a photo that a model has edited."""
XMP_KEYWORD = "XML:com.adobe.xmp"
SOURCE_TYPE_BASE = "http://cv.iptc.org/newscodes/digitalsourcetype/"

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

_NO_TEXT: Mapping[str, str] = MappingProxyType({})

_PAPER, _INK, _QUIET, _RULE = (250, 250, 248), (32, 32, 36), (128, 128, 132), (222, 222, 218)

# Pillow's built-in font draws little more than ASCII; this table is for characters that Unicode decomposition keeps.
_DRAWN_BEYOND_ASCII = "·±°"
_SPELLED = str.maketrans(
    {"\N{EN DASH}": "-", "\N{EM DASH}": "-", "\N{MINUS SIGN}": "-", "\N{MULTIPLICATION SIGN}": "x"}
    | {
        "\N{LEFT SINGLE QUOTATION MARK}": "'",
        "\N{RIGHT SINGLE QUOTATION MARK}": "'",
        "“": '"',
        "”": '"',
        "„": '"',
    }
    | {"→": "->", "←": "<-", "≥": ">=", "≤": "<=", "η": "eta", "ß": "ss", "ø": "o", "ł": "l", "æ": "ae"}
)


def encode_png(
    image: Image.Image,
    *,
    text: Mapping[str, str] = _NO_TEXT,
    icc_profile: bytes | None = None,
    provenance: str | None = EDITED,
) -> bytes:
    """PNG bytes of a picture, with its text entries and a machine-readable provenance mark.

    Equal arguments give equal bytes: entries are sorted, and the file has no time, path or metadata of the source.
    Text outside Latin-1 becomes iTXt, as other programs expect.

    Args:
        image: A picture of mode L, RGB or RGBA.
        text: Texts by keyword, e.g. A1111's `parameters`.
        icc_profile: The profile to embed, if any.
        provenance: A term of IPTC's Digital Source Type vocabulary, written as XMP; None leaves the mark out.

    Raises:
        ValueError: The mode is another one, a keyword is invalid in PNG or reserved for XMP, or a text has a NUL.
    """
    if image.mode not in ("L", "RGB", "RGBA"):
        raise ValueError(f"picture has mode {image.mode}; expected L, RGB or RGBA")
    entries = PngImagePlugin.PngInfo()
    for keyword, value in sorted(text.items()):
        _check_entry(keyword, value)
        entries.add_text(keyword, value)
    if provenance is not None:
        entries.add_itxt(XMP_KEYWORD, _xmp_packet(provenance))
    bare = image
    if image.info:
        bare = image.copy()
        bare.info = {}  # Pillow would write a profile and transparency from here
    buffer = BytesIO()
    bare.save(buffer, "PNG", pnginfo=entries, icc_profile=icc_profile)
    return buffer.getvalue()


def _check_entry(keyword: str, value: str) -> None:
    """Checks that a text chunk is valid PNG (specification 11.3.3.2) and no second XMP packet.

    Raises:
        ValueError: It is not.
    """
    allowed = keyword.isprintable() and keyword == " ".join(keyword.split()) and 1 <= len(keyword) <= 79
    if not allowed or any(ord(letter) > 255 for letter in keyword):
        raise ValueError(f"PNG keyword is {keyword!r}; expected 1 to 79 printable Latin-1 characters")
    if keyword == XMP_KEYWORD:
        raise ValueError(f"PNG keyword {XMP_KEYWORD!r} is reserved; set it with `provenance`")
    if "\0" in value:
        raise ValueError(f"PNG text of {keyword!r} holds NUL; expected text without it")


def _xmp_packet(provenance: str) -> str:
    """An XMP packet with Iptc4xmpExt:DigitalSourceType and nothing else."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        ' <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">\n'
        '  <rdf:Description rdf:about=""\n'
        '    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"\n'
        f"    Iptc4xmpExt:DigitalSourceType={quoteattr(SOURCE_TYPE_BASE + provenance)}/>\n"
        " </rdf:RDF>\n"
        "</x:xmpmeta>\n"
        '<?xpacket end="r"?>'
    )


def contact_sheet(
    cells: Sequence[tuple[str, Image.Image | None]],
    *,
    columns: int | None = None,
    title: str = "",
    footer: str = "",
    cell_px: int = SHEET_CELL_PX,
    row_titles: Sequence[str] = (),
    boxes: list[Box] | None = None,
) -> Image.Image:
    """The pictures side by side, each with its label, under a title and over a small grey footer.

    Pictures are scaled to fit `cell_px` x `cell_px` with their aspect; rows are as high as their highest picture. Text
    wraps, and ends in `...` after a few lines. Characters missing in the built-in font are spelled in ASCII; line ends
    and invisible characters are escaped (see `shown`).

    Args:
        cells: (label, picture) in reading order; None leaves the cell empty.
        columns: Pictures per row; by default one row up to five, then a balanced wide grid.
        title: Text on top.
        footer: Text at the bottom, such as settings.
        cell_px: Side of a cell.
        row_titles: Text over each row; "" and missing ones take no room.
        boxes: A list to which the box of every picture is added.

    Raises:
        ValueError: There are no cells, or the column count or cell size is below 1.
    """
    if not cells or cell_px < 1 or (columns is not None and columns < 1):
        raise ValueError(
            f"sheet of {len(cells)} cells, columns {columns}, cell_px {cell_px}; expected 1 or more of each"
        )
    columns = min(columns or _balanced_columns(len(cells)), len(cells))
    gap, margin = max(4, cell_px // 16), max(8, cell_px // 9)
    title_font, label_font, footer_font = (_font(cell_px, share) for share in (0.085, 0.064, 0.05))
    width = 2 * margin + columns * cell_px + (columns - 1) * gap
    title_lines = _wrap(shown(title), title_font, width - 2 * margin, 4)
    footer_lines = _wrap(shown(footer), footer_font, width - 2 * margin, 6)
    pictures = [None if picture is None else _scaled(picture, cell_px) for _, picture in cells]
    labels = [_wrap(shown(label), label_font, cell_px, 3) for label, _ in cells]
    starts = range(0, len(cells), columns)
    row_lines = [_wrap(shown(text), title_font, width - 2 * margin, 2) for text in row_titles[: len(starts)]]
    row_lines += [[]] * (len(starts) - len(row_lines))
    picture_heights = [max(p.height if p else 0 for p in pictures[s : s + columns]) for s in starts]
    label_heights = [max(len(lines) for lines in labels[s : s + columns]) * _pitch(label_font) for s in starts]

    height = 2 * margin + sum(picture_heights) + sum(label_heights) + (len(starts) - 1) * gap
    height += len(starts) * (gap // 2)
    height += sum(len(lines) * _pitch(title_font) + gap // 2 for lines in row_lines if lines)
    height += len(title_lines) * _pitch(title_font) + gap if title_lines else 0
    height += len(footer_lines) * _pitch(footer_font) + gap if footer_lines else 0
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)

    y = margin
    if title_lines:
        y = _write(draw, title_lines, title_font, _INK, margin, y) + gap
    rows = zip(starts, row_lines, picture_heights, label_heights, strict=True)
    for start, lines, picture_height, label_height in rows:
        if lines:
            y = _write(draw, lines, title_font, _INK, margin, y) + gap // 2
        for column, index in enumerate(range(start, min(start + columns, len(cells)))):
            picture, cell_left = pictures[index], margin + column * (cell_px + gap)
            if picture is not None:
                left = cell_left + (cell_px - picture.width) // 2
                top = y + (picture_height - picture.height) // 2
                sheet.paste(picture, (left, top))
                if boxes is not None:
                    boxes.append((left, top, left + picture.width, top + picture.height))
                # A hairline separates pictures with a white border from the paper.
                draw.rectangle((left - 1, top - 1, left + picture.width, top + picture.height), outline=_RULE)
            _write(
                draw,
                labels[index],
                label_font,
                _INK,
                cell_left,
                y + picture_height + gap // 2,
                centre_px=cell_px,
            )
        y += picture_height + gap // 2 + label_height + gap
    if footer_lines:
        _write(draw, footer_lines, footer_font, _QUIET, margin, y)
    return sheet


def _balanced_columns(count: int) -> int:
    """Number of columns of a grid that is somewhat wider than high, with the last row as full as possible."""
    if count <= 5:
        return count
    rows = math.ceil(count / math.ceil(math.sqrt(1.5 * count)))
    return math.ceil(count / rows)


def _scaled(picture: Image.Image, cell_px: int) -> Image.Image:
    """The picture as RGB, scaled so that its longer side is exactly `cell_px`."""
    factor = cell_px / max(picture.size)
    size = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
    smooth = Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, smooth, reducing_gap=3.0)


def _font(cell_px: int, share: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=max(10.0, cell_px * share))


def _pitch(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """Distance between two lines of text in pixels."""
    top, bottom = font.getbbox("Ag")[1::2]
    return math.ceil(1.35 * (bottom - top) + 1)


def _write(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: tuple[int, int, int],
    left: int,
    top: int,
    centre_px: int = 0,
) -> int:
    """Draws lines of text, centred in `centre_px` if given; returns the y below them."""
    for line in lines:
        indent = max(0, centre_px - math.ceil(font.getlength(line))) // 2
        draw.text((left + indent, top - font.getbbox("A")[1]), line, font=font, fill=colour)
        top += _pitch(font)
    return top


def _drawable(text: str) -> str:
    """The text in the font's characters: accents dropped, common signs spelled out, `?` for the rest."""
    letters = (c for c in unicodedata.normalize("NFKD", text.translate(_SPELLED)) if not unicodedata.combining(c))
    return "".join(
        c if c.isspace() or (c.isascii() and c.isprintable()) or c in _DRAWN_BEYOND_ASCII else "?" for c in letters
    )


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width_px: int, max_lines: int) -> list[str]:
    """Lines no wider than `width_px`, broken at spaces or inside long words; `...` ends a cut text."""
    lines: list[str] = []
    # No letter is narrower than a pixel, so letters beyond this count cannot fit and need no measuring.
    for paragraph in _drawable(text[: max_lines * width_px]).splitlines():
        line = ""
        for word in paragraph.split():
            joined = f"{line} {word}" if line else word
            if font.getlength(joined) <= width_px:
                line = joined
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width_px and len(word) > 1:
                lengths = range(1, len(word))
                fitting = bisect_right(lengths, width_px, key=lambda n: math.ceil(font.getlength(word[:n])))
                fitting = max(1, fitting)
                lines.append(word[:fitting])
                word = word[fitting:]
            line = word
        if line:
            lines.append(line)
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        while last and font.getlength(last + "...") > width_px:
            last = last[:-1]
        lines = [*lines[: max_lines - 1], last.rstrip() + "..."]
    return lines
