"""Logs in tables: CSV and its kin, with MovieLens's and RecBole's files, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
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
from depthprobe.data.readers.streams import BLOCK, FIELD, OTHERS, fits, head, open_lines, open_text
from depthprobe.errors import BadInput
from depthprobe.study import Columns

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
START = 2**18  # bytes at a file's start that tell its delimiter and header

# MovieLens, as GroupLens publishes it: ratings.csv, u.data, ratings.dat
_ML_HEADER = re.compile(r"\s*userId,movieId,rating,timestamp\s")
_ML_TABS = re.compile(r"\s*\d+\t\d+\t[1-5]\t\d{9,10}\r?(\n|$)")
_ML_COLONS = re.compile(r"\s*[^:\s]+::[^:\s]+::\d+(\.\d+)?::\d+\r?(\n|$)")

RECBOLE_TYPES = {"token", "float", "token_seq", "float_seq"}

Pick = Callable[[list[str]], dict[str, int]]  # of a header, the places by what they hold
Chosen = dict[str, Any]  # chunked Arrow columns by what they hold


def read_csv(
    path: Path, columns: Columns, *, delimiter: str | None = None, quoted: bool = True
) -> Log:
    """Read delimited text with a header, or without one and with columns given by number."""
    # Numbers name the columns of a text without a header, whatever its first row holds: numbers
    # there may be ids, and a row taken for a header would be lost. With a 0 among them they are
    # names, as pandas gives them.
    named = columns.given().values()
    numbered = bool(named) and all(name.isdecimal() and int(name) > 0 for name in named)

    def pick(first: list[str]) -> dict[str, int]:
        if numbered:
            if all(guess_column(first, what, source=path) is not None for what in REQUIRED):
                fault = f"its first line is a header ({listed(first)})"
                raise BadInput(FIELD, path, f"{fault}; name the columns as it does")
            first = [str(at) for at in range(1, len(first) + 1)]
        return find_columns(first, columns, source=path)

    chosen, where = csv_columns(path, pick, header=not numbered, delimiter=delimiter, quoted=quoted)
    return log_of(chosen, source=path, where=where)


def csv_columns(
    path: Path, pick: Pick, *, header: bool = True, delimiter: str | None = None, quoted: bool
) -> tuple[Chosen, Where]:
    """The columns that ``pick`` chooses by the first row, and what to call a row.

    The first lines tell the ``delimiter`` where it is None; without ``quoted``, quotes are text.
    Rows of different lengths and a quote that isn't closed are refused with their line.
    """
    with open_lines(path, newline="") as lines:
        start = lines.read(START)
    if not start.strip():
        raise BadInput(FIELD, path, "a table with a header and rows; it is empty")
    candidates = [delimiter] if delimiter else list(DELIMITERS)
    split = {one: split_rows(start, one, START, quoted=quoted) for one in candidates}
    delimiter = _best(split, source=path)
    skipped, first = next((at, row) for at, row in enumerate(split[delimiter], 1) if row)
    skipped = skipped if header else 0
    places = pick([cell.strip() for cell in first])
    # Arrow is fast, and names no lines: a slow pass over the records finds those of a fault
    rows = partial(records, path, delimiter, quoted=quoted, skip=header)
    ids = pa.dictionary(pa.int32(), pa.string())
    kinds = {str(at): ids if what in REQUIRED else pa.string() for what, at in places.items()}
    try:
        with open_text(path) as stream:
            table = pa.csv.read_csv(
                stream,
                pa.csv.ReadOptions(
                    column_names=[str(place) for place in range(len(first))],  # may be repeated
                    skip_rows_after_names=skipped,
                    block_size=BLOCK,
                ),
                pa.csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                ),
                pa.csv.ConvertOptions(include_columns=list(kinds), column_types=kinds),
            )
    except pa.ArrowInvalid as error:
        deque(rows(), maxlen=0)
        text = " ".join(str(error).split())
        raise BadInput(FIELD, path, f"it can't be read as a table ({text[:120]})") from error
    if quoted and len(table) + skipped < stream.lines:
        # some records are over several lines, and Arrow takes a quote never closed for another
        deque(rows(), maxlen=0)

    def where(row: int) -> str:
        record = next(islice(rows(), row, None), None)
        return f"line {record[0]}" if record else row_number(row)

    return {what: table[str(place)] for what, place in places.items()}, where


def records(
    path: Path, delimiter: str, *, quoted: bool, skip: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """The records that are not blank, each with the number of its first line, after a header.

    Refuses a record with another number of columns than the first one has, and a quote that isn't
    closed.
    """
    with open_lines(path, newline="") as text:
        rows = _csv_rows(text, delimiter, quoted=quoted, strict=True)
        line, width = 1, 0
        try:
            for row in rows:
                width = width or len(row)
                if row and len(row) != width:
                    expected = f"{width} columns, as the first line has"
                    raise BadInput(FIELD, path, f"line {line} has {len(row)}; expected {expected}")
                if row and not skip:
                    yield line, row
                skip = skip and not row
                line = rows.line_num + 1
        except csv.Error as error:
            allowed = f"in the row of line {line} a quote isn't closed, or not at a column's end"
            raise BadInput(FIELD, path, f"{allowed} ({error})") from error


def split_rows(start: str, delimiter: str, limit: int, *, quoted: bool = True) -> list[list[str]]:
    """The rows of a text's start, without the last one if it may be cut at ``limit``."""
    rows = []
    try:
        for row in _csv_rows(io.StringIO(start, newline=""), delimiter, quoted=quoted):
            rows.append(row)
    except csv.Error:  # a cell larger than any is: a quote that isn't closed
        limit = len(start) + 1
    return rows if len(start) < limit else rows[:-1]


def is_table(start: str, limit: int) -> bool:
    """Whether some delimiter splits the lines alike.

    Users' sequences may lie between tabs too, and be of one length. A table has a header or, in
    its first column, an id again: a sequence file has each user once.
    """
    known = [{simple(one) for line in SPELLINGS[what] for one in line} for what in REQUIRED]
    for delimiter in DELIMITERS:
        rows = [row for row in split_rows(start, delimiter, limit) if row]
        if not rows or len(rows[0]) < 2:
            continue
        if all({simple(name) for name in rows[0]} & names for names in known):
            return True
        alike = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        if alike > 0.9 and (delimiter != "\t" or len({row[0] for row in rows}) < len(rows)):
            return True
    return False


def is_movielens(start: str) -> bool:
    """Whether the first line is that of one of the three files."""
    return any(form.match(start) for form in (_ML_HEADER, _ML_TABS, _ML_COLONS))


def read_movielens(path: Path, columns: Columns) -> Log:
    """Read users, films, ratings (1 to 5, some with halves) and times in seconds."""
    start = head(path)
    tabs = _ML_TABS.match(start)
    if not (tabs or _ML_COLONS.match(start)):
        return read_csv(path, columns)
    refuse_columns(columns, f"{path}: it has no header, its columns are known by their places")
    if tabs:
        places = Columns(user="1", item="2", rating="3", time="4")
        return read_csv(path, places, delimiter="\t", quoted=False)
    places = Columns(user="1", item="3", rating="5", time="7")  # blank ones lie between colons
    return read_csv(path, places, delimiter=":", quoted=False)


def is_recbole(start: str) -> bool:
    """Whether each column of the first line has a name and a type (recbole.io/atomic_files)."""
    columns = [name.rpartition(":") for name in start.lstrip().partition("\n")[0].split("\t")]
    return all(name and kind.rstrip("\r") in RECBOLE_TYPES for name, _, kind in columns)


def read_recbole(path: Path, columns: Columns) -> Log:
    """Read a ``.inter`` file: tab-separated, not quoted, with a typed header."""
    if "_list:token_seq" in head(path).lstrip().partition("\n")[0]:
        expected = "expected an interaction a row, with one item_id:token"
        raise BadInput(FIELD, path, f"each of its rows has a list of items; {expected}")
    return read_csv(path, columns, delimiter="\t", quoted=False)


def read_parquet(path: Path, columns: Columns) -> Log:
    """Read a Parquet file, or a folder's part files in the order of their names as one table."""
    parts = _part_files(path) if path.is_dir() else [path]
    picks = [partial(find_columns, columns=columns, source=part) for part in parts]
    tables = [
        pa.table(parquet_columns(part, pick)) for part, pick in zip(parts, picks, strict=True)
    ]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        allowed = f"part files of the same columns ({' '.join(str(error).split())[:120]})"
        raise BadInput(FIELD, path, allowed) from error
    ends = np.cumsum([len(one) for one in tables])

    def where(row: int) -> str:
        part = int(np.searchsorted(ends, row, side="right"))
        within = row_number(row - int(ends[part]) + len(tables[part]))
        return f"{within} of {parts[part].name}" if len(parts) > 1 else within

    chosen = dict(zip(table.column_names, table.columns, strict=True))
    return log_of(chosen, source=path, where=where)


def parquet_columns(path: Path, pick: Pick) -> Chosen:
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
    return chosen


def _csv_rows(text: Any, delimiter: str, *, quoted: bool, strict: bool = False) -> Any:
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    return csv.reader(text, delimiter=delimiter, quoting=quoting, strict=strict)


def _best(split: dict[str, list[list[str]]], *, source: Path) -> str:
    """The delimiter that splits the most lines as it does the first, and these the furthest."""
    scores = {}
    for delimiter, rows in split.items():
        widths = [len(row) for row in rows if row]
        if widths and widths[0] > 1:
            scores[delimiter] = (widths.count(widths[0]) / len(widths), widths[0])
    best = [delimiter for delimiter, score in scores.items() if score == max(scores.values())]
    if len(best) == 1:
        return best[0]
    names = " or ".join(DELIMITERS.get(one, repr(one)) for one in best or split)
    fault = "its lines split alike at each" if best else "its first line has none"
    raise BadInput(FIELD, source, f"a table with columns split by {names}; {fault}")


def _part_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder by name, without companions such as ``items.parquet``."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and not fits(path, OTHERS)]
    # a damaged file that is meant to be one counts
    parts = [path for path in files if path.suffix == ".parquet" or head(path, 4) == "PAR1"]
    if not parts:
        raise BadInput(FIELD, folder, "a folder of Parquet part files; it has none")
    return parts
