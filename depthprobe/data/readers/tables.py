"""Logs in tables: CSV and similar text, including MovieLens's and RecBole's files, and Parquet."""

from __future__ import annotations

import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import date
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from depthprobe.data.log import Log
from depthprobe.data.readers.arrow import Where, log_of, row_number
from depthprobe.data.readers.columns import (
    DATED,
    REQUIRED,
    SPELLINGS,
    WANTED,
    Wanted,
    column_map,
    find_columns,
    guess_column,
    label_notes,
    listed,
    refuse_columns,
    simple,
)
from depthprobe.data.readers.streams import (
    BLOCK,
    FIELD,
    OTHERS,
    filled_lines,
    first_line,
    fits,
    head,
    open_bytes,
    open_lines,
)
from depthprobe.errors import BadInput
from depthprobe.study import Columns

DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}
BLANK = " "  # any number of blanks and tabs, if none of the others is a delimiter
csv.field_size_limit(BLOCK)  # characters of a cell; Python's limit is too short for a review

Pick = Callable[[list[str]], dict[str, int]]  # of a header, the columns' indices by content


TYPE = "(token|float)(_seq)?"  # of a column in RecBole's headers (recbole.io/atomic_files)
# how u.data and ratings.dat start, their delimiter and columns; "" between colons
MOVIELENS = {
    r"\s*\d+\t\d+\t[1-5]\t\d{9,10}\r?(\n|$)": ("\t", "1 2 4 3"),
    r"\s*[^:\s]+::[^:\s]+::\d+(\.\d+)?::\d+\r?(\n|$)": (":", "1 3 7 5"),
}
# a cell with a digit, as ids and numbers have but few column names; and one that is a time
_VALUE, _TIME = re.compile(r".*[0-9].*"), re.compile(r"[0-9]{8,}(\.[0-9]*)?|[0-9]{4}-[0-9]{2}-.*")
_NUMBER = re.compile(r"[0-9.:TZ+\- ]*[0-9][0-9.:TZ+\- ]*")  # or a date or a time
_QUOTED, _ANY_QUOTE = r'^"(?:[^"]|"")*"$', r'^"'


def layout_of(start: str) -> tuple[str, Columns] | None:
    """The delimiter and columns of a MovieLens file without a header, by its first line."""
    for form, (delimiter, numbers) in MOVIELENS.items():
        if re.match(form, start):
            return delimiter, Columns(**dict(zip(SPELLINGS, numbers.split(), strict=False)))
    return None


def is_movielens(start: str) -> bool:
    """Whether a text is a MovieLens file, with or without a header."""
    return start.lstrip().startswith("userId,movieId,rating,timestamp") or bool(layout_of(start))


def read_csv(
    path: Path, columns: Columns, wanted: Wanted = WANTED, *, layouts: bool = False
) -> Log:
    """Read delimited text with a header, or without one and with columns given by number.

    Without a header and without named columns, two columns are user and item, and a third one is
    the time if it can be nothing else.
    """
    start, notes = head(path), []
    if "_list:token_seq" in start.lstrip().partition("\n")[0]:
        expected = "expected an interaction a row, with one item_id:token"
        raise BadInput(FIELD, path, f"each of its rows has a list of items; {expected}", fault=True)
    layout = layout_of(start) if layouts else None
    delimiter, _, first = first_row(path, layout[0] if layout else None)
    known = [guess_column(first, what, source=path) is not None for what in REQUIRED]
    # Numbers name the columns of a text without a header. The first row is then data: numbers
    # there may be ids, and a row taken for a header would be lost. With a 0 among them they are
    # names, as pandas gives them.
    named = columns.given().values()
    numbered = bool(named) and all(re.fullmatch("[1-9][0-9]{0,5}", name) for name in named)
    if layout:
        refuse_columns(columns, f"{path}: it has no header, its columns are known by their places")
        columns, numbered = layout[1], True
    elif numbered and all(known):
        fault = f"its first line is a header ({listed(first)})"
        raise BadInput(FIELD, path, f"{fault}; name the columns as it does", fault=True)
    elif (
        not (named or any(known))
        and all(map(_VALUE.fullmatch, first))
        and (len(first) == 2 or (len(first) == 3 and _TIME.fullmatch(first[2])))
    ):
        numbered = True
        columns = Columns(user="1", item="2", time="3" if len(first) == 3 else None)
        notes = [f"no header: the columns are read as {', '.join(columns.given())}"]

    def pick(names: list[str]) -> dict[str, int]:
        names = [str(at) for at in range(1, len(names) + 1)] if numbered else names
        return find_columns(names, columns, source=path, wanted=wanted)

    table, where = csv_table(path, pick, delimiter, header=not numbered)
    log = log_of(table, source=path, where=where, time_format=columns.time_format)
    if layout:
        return log
    if not numbered:
        _refuse_header_again(log, first, pick(first), where, source=path)
        notes += label_notes(first, columns)
    rows = [row for row in _first_rows(start, delimiter) if len(row) == len(first)]
    names = [str(at) for at in range(1, len(first) + 1)] if numbered else first
    taken = column_map(names, pick(first), lambda at: (row[at] for row in rows[not numbered :]))
    return replace(log, notes=(*log.notes, *notes), columns=taken)


def _first_rows(start: str, delimiter: str) -> list[list[str]]:
    with suppress(csv.Error):
        return list(
            islice(filter(None, _csv_rows(io.StringIO(start, newline=""), delimiter)), DATED)
        )
    return []


def _refuse_header_again(
    log: Log, first: list[str], places: dict[str, int], where: Where, *, source: Path
) -> None:
    """Refuse a row that repeats the columns' names, as in concatenated files."""
    again = np.ones(len(log), dtype=bool)
    for what, ids in (("user", log.users), ("item", log.items)):
        forms = {first[places[what]], "\ufeff" + first[places[what]]}
        again &= np.isin(ids.codes, [code for code, one in enumerate(ids.names) if one in forms])
    if again.any():
        fault = f"{where(int(again.argmax()))} is the header again; expected it once, at the start"
        raise BadInput(FIELD, source, fault, fault=True)


def first_row(path: Path, delimiter: str | None = None) -> tuple[str, int, list[str]]:
    """The delimiter, the number of lines of the first row, and its cells."""
    start = head(path)
    if not start.strip():
        raise BadInput(FIELD, path, "a table with a header and rows (it is empty)")
    delimiter = delimiter or _delimiter(start, source=path)
    rows = _csv_rows(io.StringIO(start, newline=""), delimiter)
    first = next(row for row in rows if row)
    return delimiter, rows.line_num, [cell.strip() for cell in first]


def csv_table(
    path: Path, pick: Pick, delimiter: str | None = None, *, header: bool = True
) -> tuple[pa.Table, Where]:
    """The columns that ``pick`` chooses from the first row, and a function that names rows.

    The meaning of quotes is decided once per file. If all lines have the same number of columns
    when quotes are ignored, each line is a row: quotes around a cell are removed, and other quotes
    are text in a tab-separated file, and refused elsewhere. Otherwise a quoted cell may hold
    delimiters and line breaks. Rows of different lengths and unclosed quotes are refused with their
    line.
    """
    delimiter, skipped, first = first_row(path, delimiter)
    skipped = skipped if header else 0
    places = pick(first)
    # Arrow is fast but names no lines, so a slow pass over the records finds the bad one
    rows = partial(records, path, delimiter, skip=header)
    read = partial(_arrow, path, delimiter, places, len(first), skipped)

    def where(row: int, *, quoted: bool) -> str:
        record = next(islice(rows(quoted=quoted), row, None), None)
        return f"line {record[0]}" if record else row_number(row)

    strict = False
    with suppress(pa.ArrowInvalid):
        table = read(quoted=False)
        clean = _without_quotes(table)
        if clean is not None or delimiter == "\t":
            return clean or table, partial(where, quoted=False)
        strict = True
    try:
        table = read(quoted=True)
    except pa.ArrowInvalid as error:
        deque(rows(quoted=True), maxlen=0)
        deque(filled_lines(path), maxlen=0)  # is it UTF-8?
        fault = f"it can't be read as a table ({' '.join(str(error).split())[:120]})"
        raise BadInput(FIELD, path, fault, fault=True) from error
    with open_bytes(path) as stream:
        ends = sum(block.count(b"\n") for block in iter(partial(stream.read, BLOCK), b""))
    if strict or len(table) + skipped < ends:
        # some records span several lines, and Arrow misreads a quote that is never closed
        deque(rows(quoted=True, alone=strict), maxlen=0)
    return table, partial(where, quoted=True)


def _arrow(
    path: Path, delimiter: str, places: dict[str, int], width: int, skipped: int, *, quoted: bool
) -> pa.Table:
    ids = pa.dictionary(pa.int32(), pa.string())
    kinds = {str(at): ids if what in REQUIRED else pa.string() for what, at in places.items()}
    read = pa.csv.ReadOptions(
        column_names=[str(place) for place in range(width)],  # names in a header may repeat
        skip_rows_after_names=skipped,
        block_size=BLOCK,
    )
    parse = pa.csv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted
    )
    convert = pa.csv.ConvertOptions(include_columns=list(kinds), column_types=kinds)
    with open_bytes(path) as stream:
        if delimiter == BLANK:
            lines = re.sub(rb"[ \t]+", b" ", stream.read())
            stream = pa.BufferReader(re.sub(rb"(?m)^ | (?=\r?$)", b"", lines))
        table = pa.csv.read_csv(stream, read, parse, convert)
    return pa.table({what: table[str(place)] for what, place in places.items()})


def _without_quotes(table: pa.Table) -> pa.Table | None:
    """The columns without quotes around cells; None if some cells have other quotes."""
    columns = {}
    for what in table.column_names:
        column = table[what]
        if is_dictionary := pa.types.is_dictionary(column.type):
            column = column.unify_dictionaries().combine_chunks()
        cells = column.dictionary if is_dictionary else column
        begins = pc.match_substring_regex(cells, _ANY_QUOTE)
        if pc.any(begins).as_py():
            if not pc.all(pc.equal(begins, pc.match_substring_regex(cells, _QUOTED))).as_py():
                return None
            inner = pc.replace_substring(pc.utf8_slice_codeunits(cells, 1, -1), '""', '"')
            cells = pc.if_else(begins, inner, cells)
            if is_dictionary:  # two cells may be equal without their quotes
                cells = cells.dictionary_encode()
                codes = cells.indices.take(column.indices)
                cells = pa.DictionaryArray.from_arrays(codes, cells.dictionary)
            column = cells
        columns[what] = column
    return pa.table(columns)


def records(
    path: Path, delimiter: str, *, quoted: bool, skip: bool = True, alone: bool = False
) -> Iterator[tuple[int, list[str]]]:
    """The non-blank records, each with the number of its first line.

    Refuses a record with a different number of columns than the first, an unclosed quote, and a
    quote closed on a later line if a line in between looks like a row, or always with ``alone``.
    """
    with open_lines(path, newline="", errors="replace") as text:
        seen: list[str] = []  # lines of the record
        lines = (seen.append(line) or line for line in text)  # type: ignore[func-returns-value]
        rows = _csv_rows(lines, delimiter, quoted, strict=True)
        at, width, like = first_line(path), 0, list[re.Pattern[str] | None]()
        try:
            for row in rows:
                width, fault = width or len(row), None
                if row and len(row) != width:
                    expected = f"{width} columns, as the first line has"
                    fault = f"line {at} has {len(row)}; expected {expected}"
                elif row and not skip:
                    kinds = (_NUMBER, _VALUE)
                    like = like or [next((k for k in kinds if k.fullmatch(c)), None) for c in row]
                    own = [
                        n for n, one in enumerate(seen, at) if alone or _alike(one, like, delimiter)
                    ]
                    if len(own) > 1 and own[0] == at:
                        fault = f"a quote of line {at} goes on in line {own[1]}, a row by itself"
                if fault:
                    raise BadInput(FIELD, path, fault, fault=True)
                if row and not skip:
                    yield at, row
                skip = skip and not row
                at += len(seen)
                seen.clear()
        except csv.Error as error:
            allowed = f"in the row of line {at} a quote isn't closed, or not at a column's end"
            raise BadInput(FIELD, path, f"{allowed} ({error})", fault=True) from error


def _alike(line: str, like: list[re.Pattern[str] | None], delimiter: str) -> bool:
    """Whether a line alone has numbers and digits where a row has them, and enough of them."""
    cells = [cell.strip('"') for cell in line.rstrip("\r\n").split(delimiter)]
    if len(cells) != len(like) or len(like) - like.count(None) < 2:
        return False
    return all(one is None or one.fullmatch(cell) for one, cell in zip(like, cells, strict=True))


def names_columns(start: str) -> bool:
    """Whether the first line is a header with columns for users and items."""
    known = [{simple(one) for line in SPELLINGS[what] for one in line} for what in REQUIRED]
    headers = [{simple(name) for name in rows[0]} for _, rows in _splits(start).values()]
    return any(all(header & names for names in known) for header in headers)


def is_table(start: str) -> bool:
    """Whether some delimiter splits all lines equally.

    Users' sequences may also be separated by tabs or blanks, and have equal lengths. But a table
    has a header, or repeats an id in its first column; a sequence file has each user once.
    """
    if names_columns(start):
        return True
    for delimiter, (alike, rows) in _splits(start).items():
        sure = delimiter in DELIMITERS and delimiter != "\t"
        if alike > 0.9 and (sure or len({row[0] for row in rows}) < len(rows)):
            return True
    return False


def read_parquet(path: Path, columns: Columns, wanted: Wanted = WANTED) -> Log:
    """Read a Parquet file, or a folder's part files in the order of their names as one table."""
    parts = _part_files(path) if path.is_dir() else [path]
    pick = partial(find_columns, columns=columns, wanted=wanted)
    tables = [parquet_table(part, partial(pick, source=part)) for part in parts]
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

    log = log_of(table, source=path, where=where, time_format=columns.time_format)
    with pa.parquet.ParquetFile(parts[0]) as file:
        names = file.schema_arrow.names
        taken = column_map(names, pick(names, source=parts[0]), partial(_first_cells, file))
        return replace(log, notes=(*log.notes, *label_notes(names, columns)), columns=taken)


def _first_cells(file: pa.parquet.ParquetFile, place: int) -> list[Any]:
    """Some values of a column; a single date for a column of dates, none for one of lists."""
    field = file.schema_arrow.field(place)
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
        return [date.today()]
    if pa.types.is_nested(field.type) or str(field.type).endswith("binary"):
        return []
    batch = next(file.iter_batches(batch_size=DATED, columns=[field.name]), None)
    return [] if batch is None else batch.column(0).to_pylist()


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
        if pa.types.is_dictionary(column.type):  # a dictionary may hold values that no row has
            chosen[what] = column.cast(column.type.value_type)
    return pa.table(chosen)


def _csv_rows(text: Any, delimiter: str, quoted: bool = True, *, strict: bool = False) -> Any:
    quoting: Any = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    if delimiter == BLANK:
        text = (" ".join(line.split()) for line in text)
    return csv.reader(text, delimiter=delimiter, quoting=quoting, strict=strict)


def _splits(start: str) -> dict[str, tuple[float, list[list[str]]]]:
    """The rows by each delimiter of the first line, and the share that is as long as the first."""
    found: dict[str, tuple[float, list[list[str]]]] = {}
    for delimiter in (*DELIMITERS, BLANK):
        rows = [row for row in _csv_rows(io.StringIO(start, newline=""), delimiter) if row]
        if rows and len(rows[0]) > 1 and not (found and delimiter == BLANK):
            found[delimiter] = (sum(len(row) == len(rows[0]) for row in rows) / len(rows), rows)
    return found


def _delimiter(start: str, *, source: Path) -> str:
    """The delimiter that splits the most lines like the first; on ties, into the most columns."""
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
    # a damaged Parquet file counts too
    parts = [path for path in files if path.suffix == ".parquet" or head(path).startswith("PAR1")]
    if not parts:
        raise BadInput(FIELD, folder, "a folder of Parquet part files (it has none)")
    return parts
