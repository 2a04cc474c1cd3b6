"""Titles of a log's items, out of a file that is named or lies beside the log.

What kind of file it is, is told by its content: a table with a header (CSV and its kin, Parquet,
RecBole's ``.item``), MovieLens's ``movies.dat`` and ``u.item``, or JSON lines such as Amazon's
metadata, which in 2014 were Python literals. Only the titles that are wanted are kept.
"""

from __future__ import annotations

import ast
import csv
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from depthprobe.data.log import Log
from depthprobe.data.readers.columns import guess_column, listed, simple
from depthprobe.data.readers.streams import head, open_text, read_text
from depthprobe.errors import BadInput, nearest, short
from depthprobe.study import Columns

FIELD = "data.items"
# looked for beside a log, in this order; what * stands for is a part of the log's name
COMPANIONS = (
    *("items.tsv", "items.csv", "items.parquet", "items.jsonl", "items.json"),
    *("movies.dat", "movies.csv", "u.item", "*.item", "meta_*.jsonl", "meta_*.json"),
)
EXPECTED = "expected a header with an item and a title column, such as 'item_id<TAB>title'"
# said of items alone, these are clear; `title` is, even beside what a review has, such as a summary
_IN_ITEM_FILES = {"item": ("id",), "title": ("title", "name")}
_ASIN = re.compile(r"""['"](?:parent_)?asin['"]: ?['"](\w+)['"]""")
_COMPRESSED = re.compile(r"\.(gz|zst|zstd)$", re.IGNORECASE)


class _NoTitleColumn(BadInput):
    """A table of items that has other things than titles."""


def with_titles(log: Log, source: Path, *, items: str | Path | None, columns: Columns) -> Log:
    """The log with titles from the file ``items``, else from its companion, if it has none itself.

    Raises:
        BadInput: if ``items`` is no file with titles, or the file has none for any of the items.
    """
    if items is None and log.titles:
        return log
    path = companion(source) if items is None else Path(items)
    if path is None:
        return log
    if not path.is_file():
        raise BadInput(FIELD, path, "a file with the items' titles; there is none")
    try:
        titles = read_titles(path, columns, wanted={name.strip() for name in log.items.names})
    except _NoTitleColumn:
        if items is not None:
            raise
        return replace(log, notes=(*log.notes, f"{path.name} beside the log has no title column"))
    if not titles:
        example = short(log.items.names[0], 40)
        allowed = f"it has no title for any of the log's items, such as {example}"
        raise BadInput(FIELD, path, allowed)
    names = ((name, titles.get(name.strip())) for name in log.items.names)
    return replace(log, titles={name: title for name, title in names if title})


def companion(source: Path) -> Path | None:
    """The item file beside a log, or in the folder of its parts; see :data:`COMPANIONS`."""
    folder = source if source.is_dir() else source.parent
    files = sorted(path for path in folder.iterdir() if path.is_file() and path != source)
    for pattern in COMPANIONS:
        start, star, end = pattern.partition("*")
        form = re.compile(re.escape(start) + ("(.+)" if star else "()") + re.escape(end))
        found = [(form.fullmatch(_COMPRESSED.sub("", path.name)), path) for path in files]
        keys = {path: match[1] for match, path in found if match and match[1] in source.name}
        if keys:
            return max(keys, key=lambda path: len(keys[path]))
    return None


def read_titles(
    path: Path, columns: Columns, *, wanted: AbstractSet[str] | None = None
) -> dict[str, str]:
    """Titles by stripped item id, their blanks collapsed; None takes all items.

    Raises:
        BadInput: if the file can't be read, is no item file, or has two titles for an item.
    """
    titles: dict[str, str] = {}
    for raw, text in _pairs(path, columns, wanted):
        item, title = raw.strip(), " ".join(text.split())
        if not title or (wanted is not None and item not in wanted):
            continue
        other = titles.setdefault(item, title)
        if other != title:
            fault = f"item {short(item, 40)} has two titles, {short(other, 40)}, {short(title, 40)}"
            raise BadInput(FIELD, path, f"{fault}; expected one")
    return titles


def _pairs(
    path: Path, columns: Columns, wanted: AbstractSet[str] | None
) -> Iterator[tuple[str, str]]:
    start = head(path, field=FIELD).decode("utf-8-sig", errors="replace").lstrip()
    if not start:
        raise BadInput(FIELD, path, f"it is empty; {EXPECTED}")
    if start.startswith("PAR1"):
        return _parquet_pairs(path, columns)
    if start[0] in "{[":
        return _json_pairs(path, columns, wanted)
    if re.match(r"\S+?::", start):
        return _bare_pairs(path, "::")
    if re.match(r"\d+\|", start):
        return _bare_pairs(path, "|")
    header = start.partition("\n")[0]
    return _table_pairs(path, columns, max("\t,;|", key=header.count))


def _bare_pairs(path: Path, delimiter: str) -> Iterator[tuple[str, str]]:
    """MovieLens's: an id and a title come first; UTF-8 in ml-10m, ISO-8859-1 in the older ones."""
    try:
        text = read_text(path, field=FIELD)
    except BadInput:  # if it isn't the encoding, it is raised again
        text = read_text(path, encoding="iso-8859-1", field=FIELD)
    for number, line in enumerate(text.split("\n"), 1):
        row = line.split(delimiter)
        if len(row) > 1:
            yield row[0], row[1]
        elif line.strip():
            raise BadInput(FIELD, path, f"line {number} has no {delimiter!r}, as the first one has")


def _table_pairs(path: Path, columns: Columns, delimiter: str) -> Iterator[tuple[str, str]]:
    """A delimited text's; split at tabs, it has plain quotes, and maybe tabs in its last column."""
    tabs = delimiter == "\t"
    with open_text(path, field=FIELD) as stream:
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline="")
        rows = csv.reader(
            text,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            names = next(row for row in rows if any(row))
            item, title = _places(names, columns, source=path)
            for row in rows:
                if tabs and title == len(names) - 1:
                    row[title:] = ["\t".join(row[title:])] if row[title:] else []
                if len(row) == len(names):
                    yield row[item], row[title]
                elif any(cell.strip() for cell in row):
                    fault = f"line {rows.line_num} has {len(row)} columns, the header {len(names)}"
                    raise BadInput(FIELD, path, f"{fault}; {EXPECTED}")
        except csv.Error as error:
            raise BadInput(FIELD, path, f"line {rows.line_num} can't be read ({error})") from error


def _parquet_pairs(path: Path, columns: Columns) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    from depthprobe.data.readers.arrow import to_ids

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            item, title = (names[place] for place in _places(names, columns, source=path))
            table = file.read(columns=[item, title])
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise BadInput(FIELD, path, f"a whole Parquet file ({text[:120]})") from error
    ids = to_ids(table[item], "item", source=path)
    for code, text in zip(ids.codes.tolist(), table[title].to_pylist(), strict=True):
        if text is not None:
            yield ids.names[code], str(text)


def _json_pairs(
    path: Path, columns: Columns, wanted: AbstractSet[str] | None
) -> Iterator[tuple[str, str]]:
    """JSON lines' or Python literals'; HTML's entities in a title become what they stand for."""
    names: dict[tuple[str, ...], list[str]] = {}  # of the item and the title, by a line's keys
    with open_text(path, field=FIELD) as stream:
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline="\n")
        for number, line in enumerate(text, 1):
            if not line.strip() or (columns.item is None and _is_unwanted(line, wanted)):
                continue
            record = _parsed(line, number, source=path)
            keys = tuple(record)
            if keys not in names:
                places = [_place(keys, what, columns, path) for what in ("item", "title")]
                names[keys] = ["" if place is None else keys[place] for place in places]
            item, title = (record.get(name) for name in names[keys])
            if not isinstance(item, str | int) or isinstance(title, list | dict):
                fault = f"line {number} has no item id, or a title that is no text"
                raise BadInput(FIELD, path, f"{fault}; its keys are {listed(keys)}")
            if title is not None:
                yield str(item), html.unescape(str(title))


def _is_unwanted(line: str, wanted: AbstractSet[str] | None) -> bool:
    """Whether a line is for other items alone: most of Amazon's are, and parsing them is slow."""
    found = _ASIN.findall(line) if wanted is not None else []
    return bool(found) and wanted is not None and wanted.isdisjoint(found)


def _parsed(line: str, number: int, *, source: Path) -> dict[str, Any]:
    for parse in (json.loads, ast.literal_eval):
        try:
            record = parse(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(record, dict):
            return {str(key): value for key, value in record.items()}
    text = short(line.strip(), 40)
    raise BadInput(FIELD, source, f"line {number} is {text}; expected a JSON object on each line")


def _places(names: Sequence[str], columns: Columns, *, source: Path) -> tuple[int, int]:
    item = _place(names, "item", columns, source)
    title = _place(names, "title", columns, source)
    if item is None:
        raise BadInput(FIELD, source, f"its first line has {listed(names)}; {EXPECTED}")
    if title is None and columns.title is not None:
        allowed = f"a column of {source}: {nearest(columns.title, names)}"
        raise BadInput("data.columns.title", columns.title, allowed)
    if title is None:
        allowed = f"its columns are {listed(names)}, and none is known as the title's"
        raise _NoTitleColumn(FIELD, source, f"{allowed}; say --title-column")
    return item, title


def _place(names: Sequence[str], what: str, columns: Columns, source: Path) -> int | None:
    """Where a column lies; an item column that was named may be the log's alone."""
    given = columns.given().get(what)
    bare = [name.rpartition(":")[0] or name for name in names]  # without RecBole's type
    for spelled in (list(names), bare):
        if given in spelled:
            return spelled.index(given)
    if given is not None and what == "title":
        return None
    guessed = guess_column(names, what, source=source)
    if guessed is None:
        known = [simple(name) for name in names]
        guessed = next((known.index(n) for n in _IN_ITEM_FILES[what] if n in known), None)
    return guessed


# A column of a users' or items' file: what users are sliced by, beside what the log says.

LONGEST_LABEL = 40  # characters
WRITTEN = "FILE:COLUMN, such as items.csv:brand"

What = Literal["user", "item"]


def read_attribute(
    setting: str, what: What, *, field: str, wanted: AbstractSet[str]
) -> tuple[str, dict[str, str]]:
    """The column that a setting ``FILE:COLUMN`` names, by id.

    The file is a table with a header, delimited text (gzip and zstd are undone) or Parquet; its id
    column is guessed from common spellings as a log's is, or is called ``id``. RecBole's types
    in the header (``age:token``) are not part of a column's name.

    Args:
        setting: where the values stand.
        what: whose ids the file has.
        field: the setting's name, for errors.
        wanted: stripped ids whose values are kept.

    Returns:
        The column's name, and values by id, blanks collapsed, empty ones left out.

    Raises:
        BadInput: if there is no such file or column, it has no id column, it knows none of the
            wanted ids, or it says two things of one.
    """
    place, colon, column = setting.rpartition(":")
    if not (place and colon and column):
        raise BadInput(field, setting, WRITTEN)
    path = Path(place)
    if not path.is_file():
        raise BadInput(field, setting, f"{WRITTEN}; there is no file {path}")
    values: dict[str, str] = {}
    for raw, text in _column_pairs(path, column, what, field):
        key, value = raw.strip(), " ".join(text.split())[:LONGEST_LABEL]
        if not value or key not in wanted:
            continue
        other = values.setdefault(key, value)
        if other != value:
            fault = f"{what} {short(key, 40)} has two values, {short(other)} and {short(value)}"
            raise BadInput(field, setting, f"{fault}; expected one")
    if not values:
        example = short(min(wanted, default=""), 40)
        raise BadInput(field, setting, f"it knows none of the log's {what}s, such as {example}")
    return column, values


def _column_pairs(path: Path, column: str, what: What, field: str) -> Iterator[tuple[str, str]]:
    if head(path, 4, field=field).startswith(b"PAR1"):
        yield from _parquet_column_pairs(path, column, what, field)
        return
    start = head(path, field=field).decode("utf-8-sig", errors="replace").lstrip()
    first = start.partition("\n")[0]
    delimiter = max("\t,;|", key=first.count)
    with open_text(path, field=field) as stream:
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline="")
        rows = csv.reader(
            text,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            names = next((row for row in rows if any(row)), [])
            key, value = _column_places(names, column, what, field, path)
            for row in rows:
                if len(row) == len(names):
                    yield row[key], row[value]
                elif any(cell.strip() for cell in row):
                    fault = f"line {rows.line_num} has {len(row)} columns, the header {len(names)}"
                    raise BadInput(field, path, fault)
        except csv.Error as error:
            raise BadInput(field, path, f"line {rows.line_num} can't be read ({error})") from error


def _parquet_column_pairs(
    path: Path, column: str, what: What, field: str
) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            places = _column_places(names, column, what, field, path)
            table = file.read(columns=[names[place] for place in places])
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise BadInput(field, path, f"a whole Parquet file ({text[:120]})") from error
    columns = (table[names[place]].to_pylist() for place in places)
    for key, value in zip(*columns, strict=True):
        if key is not None and value is not None:
            yield str(key), str(value)


def _column_places(
    names: Sequence[str], column: str, what: What, field: str, path: Path
) -> tuple[int, int]:
    """Where ids and values stand."""
    bare = [_bare(name) for name in names]
    value = next(
        (spelled.index(column) for spelled in (list(names), bare) if column in spelled), -1
    )
    if value < 0:
        raise BadInput(field, column, f"a column of {path}: {nearest(column, bare)}")
    key = guess_column(names, what, source=path)
    if key is None and "id" in [name.lower() for name in bare]:
        key = [name.lower() for name in bare].index("id")
    if key is None:
        allowed = f"its columns are {listed(names)}, and none is known as the {what}'s id"
        raise BadInput(field, path, f"{allowed}; call one {what}_id")
    return key, value


def _bare(name: str) -> str:
    """Without RecBole's type, as in ``age:token``."""
    return name.strip().rpartition(":")[0] or name.strip()
