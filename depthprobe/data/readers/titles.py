"""Titles of items and other columns of users and items, out of files that lie beside a log.

What kind of file it is, is told by its content: a table with a header (CSV and its kin, Parquet,
RecBole's ``.item``) and, for titles, MovieLens's ``movies.dat`` and ``u.item``, or JSON lines such
as Amazon's metadata, which in 2014 were Python literals.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from depthprobe.data.log import Log
from depthprobe.data.readers.arrow import Column, to_ids
from depthprobe.data.readers.columns import guess_column, listed, missing, place_of, simple
from depthprobe.data.readers.streams import COMPRESSED, head, open_bytes, open_lines
from depthprobe.data.readers.tables import csv_columns, parquet_columns
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

FIELD = "data.items"
# looked for beside a log, in this order; what * stands for is a part of the log's name
COMPANIONS = (
    *("items.tsv", "items.csv", "items.parquet", "items.jsonl", "items.json"),
    *("movies.dat", "movies.csv", "u.item", "*.item", "meta_*.jsonl", "meta_*.json"),
)
EXPECTED = "expected a header with an item and a title column, such as 'item_id<TAB>title'"
LONGEST_LABEL = 40  # characters of an attribute
WRITTEN = "FILE:COLUMN, such as items.csv:brand"

_ASIN = re.compile(r"""['"](?:parent_)?asin['"]: ?['"](\w+)['"]""")

What = Literal["user", "item"]
Pairs = Iterator[tuple[str, str]]  # an id and a value, as they are written
Pick = Callable[[list[str]], tuple[int, int]]  # their places in a header


def with_titles(log: Log, source: Path, *, items: str | Path | None, columns: Columns) -> Log:
    """The log with titles from the file ``items``, or its companion, if it has none itself.

    A companion that can't be used is noted; a file that was named is refused.
    """
    if items is None and log.titles:
        return log
    path = companion(source) if items is None else Path(items)
    if path is None and columns.title is not None:
        allowed = "a column of the log, or of a file with the items' titles; neither has it"
        raise BadInput("data.columns.title", columns.title, allowed)
    if path is None:
        return log
    try:
        titles = read_titles(path, columns, wanted={name.strip() for name in log.items.names})
    except BadInput as error:
        if items is not None or columns.title is not None:
            raise BadInput(FIELD, path, error.allowed) from error
        return replace(log, notes=(*log.notes, f"no titles from {path.name}: {error.allowed}"))
    names = ((name, titles.get(name.strip())) for name in log.items.names)
    return replace(log, titles={name: title for name, title in names if title})


def companion(source: Path) -> Path | None:
    """The item file beside a log, or in the folder of its parts; see :data:`COMPANIONS`."""
    folder = source if source.is_dir() else source.parent
    files = sorted(path for path in folder.iterdir() if path.is_file() and path != source)
    for pattern in COMPANIONS:
        start, star, end = pattern.partition("*")
        form = re.compile(re.escape(start) + ("(.+)" if star else "()") + re.escape(end))
        matches = [(form.fullmatch(COMPRESSED.sub("", path.name)), path) for path in files]
        keys = {path: match[1] for match, path in matches if match and match[1] in source.name}
        if keys:
            return max(keys, key=lambda path: len(keys[path]))
    return None


def read_titles(path: Path, columns: Columns, *, wanted: AbstractSet[str]) -> dict[str, str]:
    """Titles of the stripped item ids that are ``wanted``, their blanks collapsed."""

    def pick(names: Sequence[str]) -> tuple[int, int]:
        item = _place(names, "item", path, columns.item)
        title = _place(names, "title", path, columns.title)
        if item is None:
            raise BadInput(FIELD, path, f"its first line has {listed(names)}; {EXPECTED}")
        if title is None:
            fault = f"its columns are {listed(names)}, and none is known as the title's"
            if columns.title is not None:
                fault = missing(names, columns.title, path)
            raise BadInput(FIELD, path, f"{fault}; say --title-column")
        return item, title

    start = head(path).lstrip()
    if not start:
        raise BadInput(FIELD, path, f"it is empty; {EXPECTED}")
    if start[0] in "{[":
        pairs = _json_pairs(path, columns, wanted)
    elif bare := re.match(r"\S+?(::)|\d+(\|)", start):
        pairs = _bare_pairs(path, bare[1] or bare[2])
    else:
        pairs = _table_pairs(path, pick, "item")
    return _by_id(pairs, wanted, "item")


def read_attribute(
    setting: str, what: What, *, field: str, wanted: AbstractSet[str]
) -> tuple[str, dict[str, str]]:
    """The column that a setting ``FILE:COLUMN`` names: its name, and its values by id.

    The file is a table with a header, delimited text or Parquet. Its id column, of a ``what``, is
    guessed as a log's is, or is called ``id``. Values of the stripped ids that are ``wanted`` are
    kept, blanks collapsed, empty ones left out.

    Raises:
        BadInput: naming the ``field``, if there is no such file or column, it has no id column, it
            knows none of the wanted ids, or it has two values for one.
    """
    place, _, column = setting.rpartition(":")
    path = Path(place)
    if not (column and path.is_file()):
        raise BadInput(field, setting, f"{WRITTEN}; there is no file {place or setting}")

    def pick(names: Sequence[str]) -> tuple[int, int]:
        value, key = place_of(names, column), _place(names, what, path)
        if value is None:
            raise BadInput(field, setting, missing(names, column, path))
        if key is None:
            fault = f"its columns are {listed(names)}, and none is known as the {what}'s id"
            raise BadInput(field, setting, f"{fault}; call one {what}_id")
        return key, value

    try:
        values = _by_id(_table_pairs(path, pick, what), wanted, what)
    except BadInput as error:
        raise BadInput(field, setting, error.allowed) from error
    return column, {key: value[:LONGEST_LABEL] for key, value in values.items()}


def _by_id(pairs: Pairs, wanted: AbstractSet[str], what: What) -> dict[str, str]:
    """Values by stripped id, blanks collapsed, empty ones left out; one for each wanted id."""
    values: dict[str, str] = {}
    for raw, text in pairs:
        key, value = raw.strip(), " ".join(text.split())
        if value and key in wanted and (other := values.setdefault(key, value)) != value:
            fault = f"{what} {short(key, 40)} has both {short(other, 40)} and {short(value, 40)}"
            raise BadInput(FIELD, key, f"{fault}; expected one value")
    if not values:
        example = short(min(wanted, default=""), 40)
        raise BadInput(FIELD, example, f"it knows none of the log's {what}s, such as {example}")
    return values


def _bare_pairs(path: Path, delimiter: str) -> Pairs:
    """MovieLens's: an id and a title come first; UTF-8 in ml-10m, ISO-8859-1 in the older ones."""
    with open_bytes(path) as stream:
        raw: bytes = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("iso-8859-1")
    for number, line in enumerate(text.split("\n"), 1):
        row = line.split(delimiter)
        if len(row) > 1:
            yield row[0], row[1]
        elif line.strip():
            raise BadInput(FIELD, path, f"line {number} has no {delimiter!r}, as the first one has")


def _table_pairs(path: Path, pick: Pick, what: What) -> Pairs:
    """A table's with a header; where it is split at tabs, its quotes are plain text."""

    def places(names: list[str]) -> dict[str, int]:
        return dict(zip((what, "value"), pick(names), strict=True))

    start = head(path)
    if start.startswith("PAR1"):
        chosen = parquet_columns(path, places)
        ids = to_ids(Column(chosen[what], what, path))
    else:
        quoted = "\t" not in start.lstrip("\n").partition("\n")[0]
        chosen, where = csv_columns(path, places, quoted=quoted)
        ids = to_ids(Column(chosen[what], what, path, where))
    for code, value in zip(ids.codes.tolist(), chosen["value"].to_pylist(), strict=True):
        if value is not None:
            yield ids.names[code], str(value)


def _json_pairs(path: Path, columns: Columns, wanted: AbstractSet[str]) -> Pairs:
    """JSON lines' or Python literals'; HTML's entities in a title become what they stand for."""

    @cache
    def places(keys: tuple[str, ...]) -> list[int | None]:
        named = {"item": columns.item, "title": columns.title}
        return [_place(keys, what, path, name) for what, name in named.items()]

    with open_lines(path) as lines:
        for number, line in enumerate(lines, 1):
            # most of Amazon's are of other items, and parsing them is slow
            ids = _ASIN.findall(line) if columns.item is None else []
            if not line.strip() or (ids and wanted.isdisjoint(ids)):
                continue
            record = _parsed(line, number, source=path)
            keys = tuple(record)
            item, title = (None if at is None else record[keys[at]] for at in places(keys))
            if not isinstance(item, str | int) or isinstance(title, list | dict):
                fault = f"line {number} has no item id, or a title that is no text"
                raise BadInput(FIELD, path, f"{fault}; its keys are {listed(keys)}")
            if title is not None:
                yield str(item), html.unescape(str(title))


def _parsed(line: str, number: int, *, source: Path) -> dict[str, Any]:
    for parse in (json.loads, ast.literal_eval):
        try:
            record = parse(line)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(record, dict):
            return {str(key): value for key, value in record.items()}
    fault = f"line {number} is {short(line.strip(), 40)}"
    raise BadInput(FIELD, source, f"{fault}; expected a JSON object on each line")


def _place(names: Sequence[str], what: str, path: Path, named: str | None = None) -> int | None:
    """Where a column lies; an item column that was named may be the log's alone.

    Guessed as in a log; beyond that these names are clear, `title` even beside what a review has.
    """
    place = None if named is None else place_of(names, named)
    if place is not None or (named is not None and what == "title"):
        return place
    place = guess_column(names, what, source=path)
    known = [simple(name) for name in names]
    clear = ("title", "name") if what == "title" else ("id",)
    places = (known.index(name) for name in clear if name in known)
    return next(places, None) if place is None else place
