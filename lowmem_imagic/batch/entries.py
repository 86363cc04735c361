"""Entries of manifests, still unchecked: one mapping for each photo of a folder, line of a file, or object.

Limits on bytes, entries, lines, and the nesting and parts of JSON apply before memory is allocated.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError, EditHeaderError
from ..pictures import RAW_SUFFIXES, has_photo_suffix, is_apple_double, png_text
from ..pictures.png import SHEET_TITLE
from ..storage.file_names import REPORT
from ..storage.regular_files import NotRegularError, open_regular
from ..storage.strict_json import load_json, parse_json
from .overview_page import GENERATOR

MAX_MANIFEST_BYTES = 64 * 2**20
MAX_ITEMS = 100_000
ALIASES = {"image": "photo", "img_name": "photo", "prompt": "sentence", "target_text": "sentence"}
"""Other names of fields, including TEdBench's in ``input_list.json``."""
KINDS: dict[str, tuple[type, ...]] = {
    "photo": (str,),
    "sentence": (str,),
    "name": (str,),
    "model": (str,),
    "preset": (str,),
    "seed": (int,),
    "etas": (list, str),
    "seeds": (list, str),
}
"""Fields of an item and their types; in a CSV file all are text."""

_MAX_LINE, _MAX_LINES, _MAX_LINE_PARTS = 2**20, 1_000_000, 10_000
_MAX_LIST_PARTS = 4_000_000
_LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n|\Z)")
"""A line with the line end of any system; Unicode line separators, which JSON text may contain, end no line."""

Entry = tuple[str, Any]
"""Its place in the manifest, and its fields, or a `ConfigError` with the reason why it has none."""


def of_folder(path: Path) -> Iterator[Entry]:
    """Yields the photos of a folder in the order of their names.

    Skips hidden files, companion files of macOS (`._*`), this program's own results, and a camera raw file beside its
    picture in another format. A pipe, device or broken link with a photo's name gives an error entry.

    Raises:
        ConfigError: The folder has more photos than a manifest may have.
    """
    names = list[str]()
    for file in path.iterdir():
        if has_photo_suffix(file.name):
            names.append(file.name)
            if len(names) > MAX_ITEMS:
                raise _too_many(path)
    developed = {Path(name).stem for name in names if Path(name).suffix.lower() not in RAW_SUFFIXES}
    has_report = (path / REPORT).is_file()
    for name in sorted(names):
        photo = path / name
        if photo.is_dir() or is_apple_double(photo) or _is_own(photo, has_report):
            continue
        if photo.suffix.lower() in RAW_SUFFIXES and photo.stem in developed:
            continue
        if photo.is_file():
            yield name, {"photo": name}
        else:
            kind = "a link that leads nowhere" if photo.is_symlink() and not photo.exists() else "a pipe or device"
            yield name, ConfigError(f"{name!r} is {kind}; expected a picture file")


def _is_own(photo: Path, has_report: bool) -> bool:
    """Whether a picture is a result of this program: an overview, a sheet, or an edit's picture beside its report."""
    if photo.suffix.lower() != ".png":
        return False
    text = png_text(photo)
    software = text.get("Software")
    if software != "lowmem-imagic":
        return software == GENERATOR
    # A picture of an edit counts as a photo once it is copied away from its report.
    return has_report or text.get("Title") == SHEET_TITLE or photo.stem.lower().endswith("sheet")


def of_file(path: Path) -> Iterator[Entry]:
    """Yields the entries of a ``.jsonl``, ``.csv`` or ``.json`` file.

    Raises:
        ConfigError: The file is none of these, or too large.
        OSError: The file cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in (".jsonl", ".ndjson", ".csv", ".tsv", ".json"):
        raise ConfigError(f"manifest {path} ends in {kind!r}, expected .jsonl, .csv, .json, or a folder")
    text = _text(path)
    if kind == ".json":
        yield from _of_list(path, text)
        return
    for count, entry in enumerate(_of_lines(path, text) if kind in (".jsonl", ".ndjson") else _of_table(path, text)):
        if count >= MAX_ITEMS:
            raise _too_many(path)
        yield entry


def _too_many(path: Path) -> ConfigError:
    return ConfigError(f"manifest {path} has more than {MAX_ITEMS} items; split it")


def _text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark."""
    try:
        with open_regular(path) as (file, size):
            if size > MAX_MANIFEST_BYTES:
                raise ConfigError(f"manifest {path} has {size} bytes, expected at most {MAX_MANIFEST_BYTES}")
            data = file.read(MAX_MANIFEST_BYTES)
    except NotRegularError:
        raise ConfigError(f"manifest {path} is a pipe or device; expected a folder or a file") from None
    # UTF-16 without a byte order mark contains zero bytes.
    if b"\0" in data[:1000] and data[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        raise ConfigError(f"manifest {path} is not UTF-8 text; save it as UTF-8")
    coding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(coding)
    except ValueError as error:
        raise ConfigError(f"manifest {path} is not UTF-8 text; save it as UTF-8") from error


def _lines(path: Path, text: str) -> Iterator[str]:
    """Yields the lines with their ends; a list of them could take many times the text's memory.

    Raises:
        ConfigError: A line is too long, or there are too many.
    """
    for number, match in enumerate(_LINE.finditer(text), start=1):
        if number > _MAX_LINES:
            raise ConfigError(f"manifest {path} has more than {_MAX_LINES} lines; split it")
        if match.end() - match.start() > _MAX_LINE:
            raise ConfigError(
                f"manifest {path}, line {number}: has more than {_MAX_LINE} characters, expected one item a line"
            )
        if match[0]:
            yield match[0]


def _of_lines(path: Path, text: str) -> Iterator[Entry]:
    for number, line in enumerate(_lines(path, text), start=1):
        if line.strip():
            yield f"line {number}", _value(line)


def _value(line: str) -> Any:
    """The value of a line of JSON, or a `ConfigError` with the reason why there is none."""
    if sum(map(line.count, "[{,")) > _MAX_LINE_PARTS:
        return ConfigError(f"has more than {_MAX_LINE_PARTS} parts, expected an object with photo and sentence")
    try:
        return load_json(line, "not JSON as expected")
    except EditHeaderError as error:
        return ConfigError(str(error))


def _of_list(path: Path, text: str) -> Iterator[Entry]:
    # Counted before parsing: a list of empty lists takes thirty times its text's memory.
    if sum(map(text.count, "[{,:")) > _MAX_LIST_PARTS:
        raise ConfigError(f"manifest {path} has more than {_MAX_LIST_PARTS} parts; split it, or make it a .jsonl file")
    try:
        values = parse_json(text, "not JSON as expected")
    except EditHeaderError as error:
        raise ConfigError(f"manifest {path}: {error}") from error
    if not isinstance(values, list):
        raise ConfigError(f"manifest {path} is not a JSON list of objects with photo and sentence")
    if len(values) > MAX_ITEMS:
        raise _too_many(path)
    for number, value in enumerate(values, start=1):
        yield f"entry {number}", value


# Tables


def _of_table(path: Path, text: str) -> Iterator[Entry]:
    """Yields the rows of a table with a line of column names, separated by commas, semicolons or tabs.

    Raises:
        ConfigError: The columns are not an item's, or the quoting of a row is wrong.
    """
    mark = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)  # Excel writes this line and hides it
    lines = _lines(path, text)
    number, first = next(
        ((number, line) for number, line in enumerate(lines, start=1) if line.strip() and not (mark and number == 1)),
        (1, ""),
    )
    separator = mark[1] if mark else _separator(first)
    columns = _columns(path, first, separator, number)
    reader = csv.reader(lines, strict=True, skipinitialspace=True, delimiter=separator)
    start = number + 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ConfigError(
                f"manifest {path}, line {start}: {error}; put a sentence with quotes or line ends in quotes, "
                'and double every quote in it, as in "a ""red"" cube"'
            ) from error
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield f"line {number + reader.line_num}", _row(row, columns, separator)
        start = number + 1 + reader.line_num


def _separator(first: str) -> str:
    """The separator of the columns: comma, semicolon or tab, whichever gives the most known names."""
    return max(",;\t", key=lambda one: sum(_field(name) in KINDS for name in first[:10_000].split(one)))


def _field(name: str) -> str:
    plain = name.strip().strip('"').lower()
    return ALIASES.get(plain, plain)


def _columns(path: Path, first: str, separator: str, number: int) -> Sequence[str]:
    """The names of the columns; "" for a column without a name.

    Raises:
        ConfigError: A name is not an item's field, or occurs twice.
    """
    at = f"manifest {path}, line {number}"
    if len(first) > 10_000:
        raise ConfigError(f"{at}: has {len(first)} characters, expected the columns' names such as photo,sentence")
    names = [_field(name) for name in first.rstrip("\r\n").split(separator)]
    known = f"expected {', '.join(KINDS)}"
    if "photo" not in names:
        raise ConfigError(
            f"{at}: no column is called photo, found {first.strip()[:80]!r}; expected the columns' names in the first "
            "line, such as photo,sentence"
        )
    for name in names:
        if name and name not in KINDS:
            raise ConfigError(f"{at}: column {name[:40]!r} is no field of an item, {known}")
        if name and names.count(name) > 1:
            raise ConfigError(f"{at}: column {name!r} occurs twice")
    return names


def _row(row: Sequence[str], columns: Sequence[str], separator: str) -> Any:
    """The non-empty fields of a row, or a `ConfigError` with the reason why it has none."""
    if any(cell.strip() for cell in row[len(columns) :]):
        advice = "put a sentence with such in it in quotes"
        if columns[-1] == "sentence":
            between = separator if separator == "\t" else f"{separator} "
            sentence = " ".join(between.join(row[len(columns) - 1 :])[:200].replace('"', '""').split())
            sentence = "".join(letter if letter.isprintable() else "?" for letter in sentence)
            advice = f'put the sentence in quotes: "{sentence}"'
        called = {",": "a comma", ";": "a semicolon", "\t": "a tab"}.get(separator, repr(separator))
        return ConfigError(
            f"has {len(row)} fields where the first line has {len(columns)}: {called} separates fields; {advice}"
        )
    fields = {name: cell for name, cell in zip(columns, row, strict=False) if cell != ""}
    if stray := fields.pop("", ""):
        return ConfigError(f"{stray[:40]!r} stands in a column without a name")
    return fields
