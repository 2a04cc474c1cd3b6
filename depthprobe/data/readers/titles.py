"""Titles of items, and other columns of users and items, from files beside a log.

The content decides the kind of file: a table with a header (CSV and similar, Parquet, RecBole's
``.item``) and, for titles, MovieLens's ``movies.dat`` and ``u.item``, or JSON lines such as
Amazon's metadata, which in 2014 were Python literals.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from depthprobe.data.log import Log
from depthprobe.data.readers.arrow import Column, row_number, to_ids
from depthprobe.data.readers.columns import guess_column, listed, missing, place_of, simple
from depthprobe.data.readers.streams import COMPRESSED, filled_lines, head, open_bytes
from depthprobe.data.readers.tables import csv_table, parquet_table
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

FIELD = "data.items"
# searched beside a log, in this order; * must be a part of the log's name
COMPANIONS = (
    *("items.tsv", "items.csv", "items.parquet", "items.jsonl", "items.json"),
    *("movies.dat", "movies.csv", "u.item", "*.item", "meta_*.jsonl", "meta_*.json"),
)
LONGEST_LABEL = 40  # characters of an attribute

_ASIN = re.compile(r"""['"](?:parent_)?asin['"]: ?['"](\w+)['"]""")
_HALF = re.compile("[\ud800-\udfff]")
_BARE = re.compile(r"\S+?(::)|\d+(\|)")  # movies.dat, u.item

What = Literal["user", "item"]
Pairs = Iterator[tuple[str, str]]  # an id and a value, as written
Pick = Callable[[tuple[str, ...]], tuple[int, int | None]]  # their indices in a header


def with_titles(log: Log, source: Path, *, items: str | Path | None, columns: Columns) -> Log:
    """The log with titles from the file ``items`` or a companion, if it has none itself.

    A companion that can't be used gives a note; a named file is refused.
    """
    if items is None and log.titles:
        return log
    path = companion(source) if items is None else Path(items).expanduser()
    if path is None:
        if columns.title is not None:
            allowed = "a column of the log, or of a file with the items' titles (neither has it)"
            raise BadInput("data.columns.title", columns.title, allowed)
        return log
    wanted = {name.strip() for name in log.items.names}
    try:
        titles = read_values(path, "item", wanted=wanted, key=columns.item, value=columns.title)
    except BadInput as error:
        if items is not None or columns.title is not None:
            raise BadInput(FIELD, path, error.allowed, fault=error.fault) from error
        return replace(log, notes=(*log.notes, f"no titles from {path.name}: {error.allowed}"))
    names = {name: name.strip() for name in log.items.names}
    return replace(log, titles={raw: titles[name] for raw, name in names.items() if name in titles})


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


def read_attribute(
    setting: str, what: What, *, field: str, wanted: AbstractSet[str]
) -> tuple[str, dict[str, str]]:
    """The column that a setting ``FILE:COLUMN`` names: its name, and its values by id.

    ``BadInput`` names the ``field``, where there is no such file or :func:`read_values` fails.
    """
    place, _, column = setting.rpartition(":")
    place = os.path.expanduser(place)
    if not (column and Path(place).is_file()):
        written = "FILE:COLUMN, such as items.csv:brand"
        raise BadInput(field, setting, f"{written} (there is no file {place or setting})")
    try:
        values = read_values(Path(place), what, wanted=wanted, value=column)
    except BadInput as error:
        raise BadInput(field, setting, error.allowed, fault=error.fault) from error
    return column, {key: value[:LONGEST_LABEL] for key, value in values.items()}


def read_values(
    path: Path,
    what: What,
    *,
    wanted: AbstractSet[str],
    key: str | None = None,
    value: str | None = None,
) -> dict[str, str]:
    """Values of the stripped ids that are ``wanted``, blanks collapsed, empty ones left out.

    The values are in the column ``value``, or are titles. The ids are in the column ``key`` if
    given, else in the column that would be guessed for a log, or in ``id``.

    Raises:
        BadInput: if the file can't be read, lacks a column, knows none of the wanted ids, or has
            two values for one.
    """

    @cache  # JSON lines have the same keys again and again
    def pick(names: tuple[str, ...]) -> tuple[int, int | None]:
        places = [_find(names, what, key, path), _find(names, "title", value, path)]
        if places[0] is None:
            fault = f"its columns are {listed(names)}, and none is known as the {what}'s"
            raise BadInput(
                FIELD, path, f"{fault}; expected {what}_id beside the values", fault=True
            )
        return places[0], places[1]

    start = head(path).lstrip()
    if not start:
        raise BadInput(FIELD, path, "it is empty; expected a header and rows", fault=True)
    if start[0] in "{[":
        pairs = _json_pairs(path, pick, wanted if key is None else frozenset())
    elif value is None and (bare := _BARE.match(start)):
        pairs = _bare_pairs(path, bare[1] or bare[2])
    else:
        pairs = _table_pairs(path, what, value, pick)
    values: dict[str, str] = {}
    for raw, text in pairs:
        # half a surrogate pair, which JSON may hold, is no valid text
        own, found = raw.strip(), " ".join(_HALF.sub("\ufffd", text).split())
        if found and own in wanted and (other := values.setdefault(own, found)) != found:
            fault = f"{what} {short(own, 40)} has both {short(other, 40)} and {short(found, 40)}"
            raise BadInput(FIELD, path, f"{fault}; expected one value", fault=True)
    if not values:
        example = short(min(wanted, default=""), 40)
        raise BadInput(
            FIELD, path, f"it knows none of the log's {what}s, such as {example}", fault=True
        )
    return values


def _find(names: Sequence[str], what: str, named: str | None, path: Path) -> int | None:
    """The index of a column; a named item column may exist only in the log.

    Guessed as in a log, and in addition by these names, with `title` even among a review's columns.
    """
    place = None if named is None else place_of(names, named)
    if place is not None or (named is not None and what == "title"):
        return place
    place = guess_column(names, what, source=path)
    known = [simple(name) for name in names]
    clear = ("title", "name") if what == "title" else ("id",)
    places = (known.index(name) for name in clear if name in known)
    return next(places, None) if place is None else place


def _bare_pairs(path: Path, delimiter: str) -> Pairs:
    """MovieLens: an id and a title come first; UTF-8 in ml-10m, ISO-8859-1 in older ones."""
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
            raise BadInput(
                FIELD, path, f"line {number} has no {delimiter!r}, as the first one has", fault=True
            )


def _table_pairs(path: Path, what: What, value: str | None, pick: Pick) -> Pairs:
    """Pairs from a table with a header."""

    def places(names: list[str]) -> dict[str, int]:
        key, found = pick(tuple(names))
        if found is None and value is not None:
            raise BadInput(FIELD, path, missing(names, value, path), fault=True)
        if found is None:
            fault = f"its columns are {listed(names)}, and none is known as the title's"
            raise BadInput(FIELD, path, f"{fault}; say --title-column", fault=True)
        return {what: key, "value": found}

    start, where = head(path), None
    if start.startswith("PAR1"):
        table = parquet_table(path, places)
    else:
        table, where = csv_table(path, places)
    ids = to_ids(Column(table[what], what, path, where or row_number))
    for code, text in zip(ids.codes.tolist(), table["value"].to_pylist(), strict=True):
        if text is not None:
            yield ids.names[code], str(text)


def _json_pairs(path: Path, pick: Pick, amazon: AbstractSet[str]) -> Pairs:
    """Pairs from JSON lines or Python literals; HTML entities in titles are decoded."""
    for number, line in filled_lines(path):
        # most of Amazon's lines are about other items, and parsing is slow
        ids = _ASIN.findall(line) if amazon else []
        if ids and amazon.isdisjoint(ids):
            continue
        record = _parsed(line, number, source=path)
        key, value = pick(tuple(record))
        own, title = (None if at is None else list(record.values())[at] for at in (key, value))
        if not isinstance(own, str | int) or isinstance(title, list | dict):
            fault = f"line {number} has no item id, or a title that is no text"
            raise BadInput(FIELD, path, f"{fault}; its keys are {listed(record)}", fault=True)
        if title is not None:
            yield str(own), html.unescape(str(title))


def _parsed(line: str, number: int, *, source: Path) -> dict[str, Any]:
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            if isinstance(record := parse(line), dict):
                return {str(key): value for key, value in record.items()}
    fault = f"line {number} is {short(line.strip(), 40)}"
    raise BadInput(FIELD, source, f"{fault}; expected a JSON object on each line", fault=True)
