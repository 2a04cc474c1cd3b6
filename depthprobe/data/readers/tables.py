"""How a delimited text is laid out, and where its records lie: what messages name lines with."""

from __future__ import annotations

import csv
import io
from codecs import getincrementaldecoder
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from depthprobe.data.log import Log
from depthprobe.data.readers.arrow import Where, log_of, row_number, type_name
from depthprobe.data.readers.columns import REQUIRED, find_columns, guess_column, listed
from depthprobe.data.readers.folders import is_other
from depthprobe.data.readers.streams import BLOCK, FIELD, head, open_bytes, open_text
from depthprobe.errors import BadInput, short
from depthprobe.study import Columns

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
LOOKED_AT = 2**18  # bytes at a file's start that tell its delimiter and header


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The form of a delimited text.

    Records have ``width`` columns; the first ``skipped``, blank ones and the header, hold no data.
    ``places`` are the wanted columns' places by what they hold.
    """

    delimiter: str
    quoted: bool
    width: int
    skipped: int
    places: dict[str, int]


def layout_of(path: Path, wanted: Columns, *, delimiter: str | None, quoted: bool) -> Layout:
    """Look at a text's first lines; ``delimiter`` None tells it by what splits them alike.

    Raises:
        BadInput: if the file is empty or no text, nothing splits it, or a column isn't found.
    """
    with open_text(path) as stream:
        raw = stream.read(LOOKED_AT)
    text = getincrementaldecoder("utf-8-sig")().decode(raw)
    if not text.strip():
        raise BadInput(FIELD, path, "a table with a header and rows; it is empty")
    split = {
        candidate: _split(text, candidate, quoted=quoted, complete=len(raw) < LOOKED_AT)
        for candidate in ([delimiter] if delimiter else DELIMITERS)
    }
    delimiter = _best(split, source=path)
    rows = split[delimiter]
    skipped = next(at for at, row in enumerate(rows, 1) if row)
    first = [cell.strip() for cell in rows[skipped - 1]]
    header = first
    if _by_number(wanted):
        if all(guess_column(first, what, source=path) is not None for what in REQUIRED):
            allowed = f"its first line is a header ({listed(first)}); name the columns as it does"
            raise BadInput(FIELD, path, allowed)
        header, skipped = [str(at) for at in range(1, len(first) + 1)], 0
    places = find_columns(header, wanted, source=path)
    return Layout(
        delimiter=delimiter, quoted=quoted, width=len(first), skipped=skipped, places=places
    )


def records(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """The records after the skipped ones, each with the number of its first line; slow.

    Raises:
        BadInput: if a record has another number of columns or a quote that isn't closed.
    """
    with open_bytes(path) as stream:
        text = io.TextIOWrapper(io.BufferedReader(stream, BLOCK), "utf-8-sig", newline="")
        rows = _reader(text, layout.delimiter, quoted=layout.quoted, strict=True)
        line = 1
        try:
            for at, row in enumerate(rows):
                if row and len(row) != layout.width:
                    expected = f"{layout.width} columns, as the first line has"
                    raise BadInput(FIELD, path, f"line {line} has {len(row)}; expected {expected}")
                if row and at >= layout.skipped:
                    yield line, row
                line = rows.line_num + 1
        except csv.Error as error:
            allowed = f"in the row of line {line} a quote isn't closed, or not at a column's end"
            raise BadInput(FIELD, path, f"{allowed} ({error})") from error


def _reader(text: Any, delimiter: str, *, quoted: bool, strict: bool) -> Any:
    return csv.reader(
        text,
        delimiter=delimiter,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=strict,
    )


def _split(text: str, delimiter: str, *, quoted: bool, complete: bool) -> list[list[str]]:
    rows = []
    try:
        for row in _reader(io.StringIO(text, newline=""), delimiter, quoted=quoted, strict=False):
            rows.append(row)
    except csv.Error:  # a cell larger than any is: a quote that isn't closed
        return rows
    return rows if complete else rows[:-1]


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


def _by_number(wanted: Columns) -> bool:
    """Whether columns are named by numbers from 1, so that there is no header.

    Never mind what the first row holds: numbers there may be ids, and a row taken for a header
    would be lost without a word. With a 0 among them they are names, as pandas gives them.
    """
    given = wanted.given().values()
    return bool(given) and all(name.isdecimal() and int(name) > 0 for name in given)


# Logs in tables: CSV and its kin, and Parquet, a file or a folder of part files.
#
# ``csv_columns(path, *, wanted, delimiter=None, quoted=True)`` reads the wanted columns of
# delimited
# text; with :func:`depthprobe.data.readers.arrow.log_of` it serves other delimited formats too::
#
# found, where = csv_columns(path, wanted=columns, delimiter="\t", quoted=False)
# return log_of(found, source=path, where=where)


def read_csv(path: Path, columns: Columns) -> Log:
    """Read delimited text with a header, or without one and with columns given by number.

    Raises:
        BadInput: if it is no such table, lacks a column, or a row can't be used; names the line.
    """
    found, where = csv_columns(path, wanted=columns)
    return log_of(found, source=path, where=where)


def csv_columns(
    path: Path, *, wanted: Columns, delimiter: str | None = None, quoted: bool = True
) -> tuple[dict[str, Any], Where]:
    """The wanted columns of delimited text by what they hold, and where a row lies (``line 7``).

    Users and items come as Arrow dictionaries, the other columns as texts; each is a chunked array.
    ``delimiter`` None is told by the first lines. Without ``quoted``, quotes are plain text.

    Raises:
        BadInput: if it is no text in UTF-8, has rows of different lengths or a quote that isn't
            closed, or lacks a column; names the line.
    """
    layout = layout_of(path, wanted, delimiter=delimiter, quoted=quoted)
    names = [str(place) for place in range(layout.width)]  # headers may repeat names
    kinds = {
        str(place): pa.dictionary(pa.int32(), pa.string()) if what in REQUIRED else pa.string()
        for what, place in layout.places.items()
    }
    try:
        with open_text(path) as stream:
            table = pa.csv.read_csv(
                stream,
                pa.csv.ReadOptions(
                    column_names=names, skip_rows_after_names=layout.skipped, block_size=BLOCK
                ),
                pa.csv.ParseOptions(
                    delimiter=layout.delimiter,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                ),
                pa.csv.ConvertOptions(include_columns=list(kinds), column_types=kinds),
            )
    except pa.ArrowInvalid as error:
        _read_through(path, layout)
        text = " ".join(str(error).split())
        raise BadInput(FIELD, path, f"it can't be read as a table ({text[:120]})") from error
    if quoted and layout.skipped + len(table) < stream.lines:
        # some records are over several lines, and Arrow takes a quote never closed for another
        _read_through(path, layout)

    def where(row: int) -> str:
        found = next(islice(records(path, layout), row, None), None)
        return f"line {found[0]}" if found else row_number(row)

    return {what: table[str(place)] for what, place in layout.places.items()}, where


def _read_through(path: Path, layout: Layout) -> None:
    """Read every record, for the faults that :func:`records` tells."""
    for _ in records(path, layout):
        pass


def read_parquet(path: Path, columns: Columns) -> Log:
    """Read a Parquet file, or a folder's part files in the order of their names as one table.

    Raises:
        BadInput: if one is no Parquet, lacks a column, or a row can't be used; names the row.
    """
    parts = _part_files(path) if path.is_dir() else [path]
    tables = [_parquet_columns(part, wanted=columns) for part in parts]
    try:
        table = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        kinds = sorted({" ".join(str(one.schema).split()) for one in tables})
        allowed = f"part files of the same columns; it has {short(' and '.join(kinds[:2]))}"
        raise BadInput(FIELD, path, allowed) from error
    ends = np.cumsum([len(one) for one in tables])

    def where(row: int) -> str:
        part = int(np.searchsorted(ends, row, side="right"))
        within = row_number(row - int(ends[part]) + len(tables[part]))
        return f"{within} of {parts[part].name}" if len(parts) > 1 else within

    found = dict(zip(table.column_names, table.columns, strict=True))
    return log_of(found, source=path, where=where)


def _part_files(folder: Path) -> list[Path]:
    """The Parquet files of a folder by name, without companions such as ``items.parquet``."""
    parts = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and not is_other(path) and _is_parquet(path)
    ]
    if not parts:
        raise BadInput(FIELD, folder, "a folder of Parquet part files; it has none")
    return parts


def _is_parquet(path: Path) -> bool:
    """Whether it is, or, damaged as it may be, is meant to be."""
    return path.suffix == ".parquet" or head(path, 4) == b"PAR1"


def _parquet_columns(path: Path, *, wanted: Columns) -> Any:
    """The wanted columns of one file, named by what they hold, as a table."""
    try:
        with pa.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            schema = file.schema_arrow
            places = find_columns(schema.names, wanted, source=path)
            for what, place in places.items():
                kind = schema.field(place).type
                if pa.types.is_nested(kind):
                    name = short(schema.names[place], 40)
                    allowed = f"the {what} column {name} has the type {type_name(kind)}"
                    raise BadInput(FIELD, path, f"{allowed}; expected one value a row")
            table = file.read(columns=[schema.names[place] for place in places.values()])
            table.validate(full=True)  # as that texts are UTF-8
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise BadInput(FIELD, path, f"a whole Parquet file ({text[:120]})") from error
    columns = {what: table[schema.names[place]] for what, place in places.items()}
    for what, column in columns.items():
        if pa.types.is_dictionary(column.type):  # one may hold values that no row has
            columns[what] = column.cast(column.type.value_type)
    return pa.table(columns)
