"""Logs in tables: CSV and its kin, with MovieLens's and RecBole's files, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from depthprobe.data.log import Log
from depthprobe.data.readers.arrow import Where, log_of, row_number
from depthprobe.data.readers.columns import (
    REQUIRED,
    SPELLINGS,
    find_columns,
    guess_column,
    listed,
    refuse_columns,
    simple,
)
from depthprobe.data.readers.streams import (
    BLOCK,
    FIELD,
    OTHERS,
    filled_lines,
    fits,
    head,
    open_bytes,
    open_lines,
)
from depthprobe.errors import BadInput
from depthprobe.study import Columns

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}

Pick = Callable[[list[str]], dict[str, int]]  # of a header, the places by what they hold


@dataclass(frozen=True)
class Layout:
    """How a delimited text is written: what it starts with, its delimiter, quotes, columns.

    Without a ``delimiter`` the content tells it. Where not ``quoted``, quotes are text. ``columns``
    are numbers, of a text without a header.
    """

    start: str
    delimiter: str | None = None
    quoted: bool = True
    columns: Columns | None = None


ANY = Layout("")
TYPE = "(token|float)(_seq)?"  # of a column in RecBole's headers (recbole.io/atomic_files)
RECBOLE = (Layout(rf"([^\t\n]+:{TYPE}\t)*[^\t\n]+:{TYPE}\r?(\n|$)", "\t", quoted=False),)
MOVIELENS = (  # u.data, ratings.dat, ratings.csv; blank columns lie between the colons
    Layout(
        r"\d+\t\d+\t[1-5]\t\d{9,10}\r?(\n|$)", "\t", quoted=False,
        columns=Columns(user="1", item="2", rating="3", time="4"),
    ),
    Layout(
        r"[^:\s]+::[^:\s]+::\d+(\.\d+)?::\d+\r?(\n|$)", ":", quoted=False,
        columns=Columns(user="1", item="3", rating="5", time="7"),
    ),
    Layout(r"userId,movieId,rating,timestamp\s", ","),
)  # fmt: skip


def layout_of(start: str, layouts: tuple[Layout, ...]) -> Layout | None:
    """The one of the layouts that a text with this start has."""
    return next((one for one in layouts if re.match(one.start, start.lstrip())), None)


def read_csv(path: Path, columns: Columns, layouts: tuple[Layout, ...] = ()) -> Log:
    """Read delimited text with a header, or without one and with columns given by number."""
    start = head(path)
    layout = layout_of(start, layouts) or ANY
    if layout.columns is not None:
        refuse_columns(columns, f"{path}: it has no header, its columns are known by their places")
        columns = layout.columns
    if "_list:token_seq" in start.lstrip().partition("\n")[0]:
        expected = "expected an interaction a row, with one item_id:token"
        raise BadInput(FIELD, path, f"each of its rows has a list of items; {expected}", fault=True)
    # Numbers name the columns of a text without a header, whatever its first row holds: numbers
    # there may be ids, and a row taken for a header would be lost. With a 0 among them they are
    # names, as pandas gives them.
    named = columns.given().values()
    numbered = bool(named) and all(name.isdecimal() and int(name) > 0 for name in named)

    def pick(first: list[str]) -> dict[str, int]:
        if numbered:
            if all(guess_column(first, what, source=path) is not None for what in REQUIRED):
                fault = f"its first line is a header ({listed(first)})"
                raise BadInput(FIELD, path, f"{fault}; name the columns as it does", fault=True)
            first = [str(at) for at in range(1, len(first) + 1)]
        return find_columns(first, columns, source=path)

    table, where = csv_table(path, pick, layout, header=not numbered)
    return log_of(table, source=path, where=where)


def csv_table(
    path: Path, pick: Pick, layout: Layout = ANY, *, header: bool = True
) -> tuple[pa.Table, Where]:
    """The columns that ``pick`` chooses by the first row, and what to call a row.

    Rows of different lengths and a quote that isn't closed are refused with their line.
    """
    start = head(path)
    if not start.strip():
        raise BadInput(FIELD, path, "a table with a header and rows (it is empty)")
    if "\ufffd" in start:  # no UTF-8: refused with its line
        deque(filled_lines(path), maxlen=0)
    delimiter = layout.delimiter or _delimiter(start, source=path)
    first_rows = enumerate(_csv_rows(io.StringIO(start, newline=""), delimiter, layout.quoted), 1)
    skipped, first = next((at, row) for at, row in first_rows if row)
    places = pick([cell.strip() for cell in first])
    # Arrow is fast, and names no lines: a slow pass over the records finds those of a fault
    rows = partial(records, path, delimiter, quoted=layout.quoted, skip=header)
    ids = pa.dictionary(pa.int32(), pa.string())
    kinds = {str(at): ids if what in REQUIRED else pa.string() for what, at in places.items()}
    skipped = skipped if header else 0
    read = pa.csv.ReadOptions(
        column_names=[str(place) for place in range(len(first))],  # the header's may be repeated
        skip_rows_after_names=skipped,
        block_size=BLOCK,
    )
    parse = pa.csv.ParseOptions(
        delimiter=delimiter,
        quote_char='"' if layout.quoted else False,
        newlines_in_values=layout.quoted,
    )
    convert = pa.csv.ConvertOptions(include_columns=list(kinds), column_types=kinds)
    try:
        with open_bytes(path) as stream:
            table = pa.csv.read_csv(stream, read, parse, convert)
    except pa.ArrowInvalid as error:
        deque(rows(), maxlen=0)
        text = " ".join(str(error).split())
        raise BadInput(
            FIELD, path, f"it can't be read as a table ({text[:120]})", fault=True
        ) from error
    with open_bytes(path) as stream:
        ends = sum(block.count(b"\n") for block in iter(partial(stream.read, BLOCK), b""))
    if layout.quoted and len(table) + skipped < ends:
        # some records are over several lines, and Arrow takes a quote never closed for another
        deque(rows(), maxlen=0)

    def where(row: int) -> str:
        record = next(islice(rows(), row, None), None)
        return f"line {record[0]}" if record else row_number(row)

    return pa.table({what: table[str(place)] for what, place in places.items()}), where


def records(
    path: Path, delimiter: str, *, quoted: bool, skip: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the number of its first line, after a header.

    Refuses a record with another number of columns than the first one has, and a quote that isn't
    closed.
    """
    with open_lines(path, newline="") as text:
        rows = _csv_rows(text, delimiter, quoted, strict=True)
        line, width = 1, 0
        try:
            for row in rows:
                width = width or len(row)
                if row and len(row) != width:
                    expected = f"{width} columns, as the first line has"
                    raise BadInput(
                        FIELD, path, f"line {line} has {len(row)}; expected {expected}", fault=True
                    )
                if row and not skip:
                    yield line, row
                skip = skip and not row
                line = rows.line_num + 1
        except csv.Error as error:
            allowed = f"in the row of line {line} a quote isn't closed, or not at a column's end"
            raise BadInput(FIELD, path, f"{allowed} ({error})", fault=True) from error


def is_table(start: str) -> bool:
    """Whether some delimiter splits the lines alike.

    Users' sequences may lie between tabs too, and be of one length. A table has a header or, in
    its first column, an id again: a sequence file has each user once.
    """
    known = [{simple(one) for line in SPELLINGS[what] for one in line} for what in REQUIRED]
    for delimiter, (alike, rows) in _splits(start).items():
        if all({simple(name) for name in rows[0]} & names for names in known):
            return True
        if alike > 0.9 and (delimiter != "\t" or len({row[0] for row in rows}) < len(rows)):
            return True
    return False


def read_parquet(path: Path, columns: Columns) -> Log:
    """Read a Parquet file, or a folder's part files in the order of their names as one table."""
    parts = _part_files(path) if path.is_dir() else [path]
    tables = [
        parquet_table(part, partial(find_columns, columns=columns, source=part)) for part in parts
    ]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        allowed = f"part files of the same columns ({' '.join(str(error).split())[:120]})"
        raise BadInput(FIELD, path, allowed) from error
    starts = np.cumsum([0, *map(len, tables)])

    def where(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        within = row_number(row - int(starts[part]))
        return f"{within} of {parts[part].name}" if len(parts) > 1 else within

    return log_of(table, source=path, where=where)


def parquet_table(path: Path, pick: Pick) -> pa.Table:
    """The columns that ``pick`` chooses by their names."""
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names
            places = pick(names)
            table = file.read(columns=[names[place] for place in places.values()])
            table.validate(full=True)  # as that texts are UTF-8
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise BadInput(FIELD, path, f"a whole Parquet file ({text[:120]})") from error
    chosen = {what: table[names[place]] for what, place in places.items()}
    for what, column in chosen.items():
        if pa.types.is_dictionary(column.type):  # one may hold values that no row has
            chosen[what] = column.cast(column.type.value_type)
    return pa.table(chosen)


def _csv_rows(text: Any, delimiter: str, quoted: bool = True, *, strict: bool = False) -> Any:
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(text, delimiter=delimiter, quoting=quoting, strict=strict)


def _splits(start: str) -> dict[str, tuple[float, list[list[str]]]]:
    """The rows by each delimiter that the first one has, and the share that are as long as it."""
    found = {}
    for delimiter in DELIMITERS:
        rows = [row for row in _csv_rows(io.StringIO(start, newline=""), delimiter) if row]
        if rows and len(rows[0]) > 1:
            found[delimiter] = (sum(len(row) == len(rows[0]) for row in rows) / len(rows), rows)
    return found


def _delimiter(start: str, *, source: Path) -> str:
    """The delimiter that splits the most lines as it does the first, and these the furthest."""
    scores = {one: (alike, len(rows[0])) for one, (alike, rows) in _splits(start).items()}
    best = [delimiter for delimiter, score in scores.items() if score == max(scores.values())]
    if len(best) == 1:
        return best[0]
    names = " or ".join(DELIMITERS[one] for one in best or DELIMITERS)
    fault = "its lines split alike at each" if best else "its first line has none"
    raise BadInput(FIELD, source, f"a table with columns split by {names} ({fault})")


def _part_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder by name, without companions such as ``items.parquet``."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not fits(path, OTHERS)]
    # a damaged file that is meant to be one counts
    parts = [path for path in files if path.suffix == ".parquet" or head(path).startswith("PAR1")]
    if not parts:
        raise BadInput(FIELD, folder, "a folder of Parquet part files (it has none)")
    return parts
