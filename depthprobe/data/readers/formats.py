"""MovieLens as GroupLens publishes it: ``u.data``, ``ratings.dat`` or ``ratings.csv``."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from depthprobe.data.log import Log
from depthprobe.data.readers.columns import KNOWN, REQUIRED, listed, simple
from depthprobe.data.readers.folders import join_parts, logs_in
from depthprobe.data.readers.sequence_files import is_sequences, read_sequences
from depthprobe.data.readers.streams import FIELD, head
from depthprobe.data.readers.tables import DELIMITERS
from depthprobe.data.readers.titles import with_titles
from depthprobe.errors import BadInput, nearest, short
from depthprobe.study import Columns

_HEADER = re.compile(r"\s*userId,movieId,rating,timestamp\s")
_TABS = re.compile(r"\s*\d+\t\d+\t[1-5]\t\d{9,10}\r?(\n|$)")
_COLONS = re.compile(r"\s*[^:\s]+::[^:\s]+::\d+(\.\d+)?::\d+\r?(\n|$)")
OF_TABS = Columns(user="1", item="2", rating="3", time="4")
OF_COLONS = Columns(user="1", item="3", rating="5", time="7")  # blank columns lie between colons


def is_movielens(head: str) -> bool:
    """Whether the first line is that of one of the three files."""
    return any(form.match(head) for form in (_HEADER, _TABS, _COLONS))


def read_movielens(path: Path, columns: Columns) -> Log:
    """Read users, films, ratings (1 to 5, some with halves) and times in seconds.

    Raises:
        BadInput: if it has columns by place and some are named, or a row can't be used; names the
            line.
    """
    from depthprobe.data.readers.arrow import log_of
    from depthprobe.data.readers.tables import csv_columns, read_csv

    start = head(path).decode("utf-8-sig", errors="replace")
    if not (_TABS.match(start) or _COLONS.match(start)):
        return read_csv(path, columns)
    for what, name in columns.given().items():
        allowed = f"none for {path}: this file has no header, its columns are known by their places"
        raise BadInput(f"data.columns.{what}", name, allowed)
    wanted, delimiter = (OF_TABS, "\t") if _TABS.match(start) else (OF_COLONS, ":")
    found, where = csv_columns(path, wanted=wanted, delimiter=delimiter, quoted=False)
    return log_of(found, source=path, where=where)


# RecBole's atomic files: tab-separated, not quoted, with a typed header (recbole.io/atomic_files).
#
# ``X.inter`` has the interactions, ``X.item`` beside it what is known of the items.

TYPES = {"token", "float", "token_seq", "float_seq"}


def is_recbole(head: str) -> bool:
    """Whether each column of the first line has a name and a type."""
    columns = [name.rpartition(":") for name in _header(head)]
    return all(name and kind in TYPES for name, _, kind in columns)


def read_recbole(path: Path, columns: Columns) -> Log:
    """Read a ``.inter`` file; columns may be named with their types or without them.

    Raises:
        BadInput: if it holds a list of items a row instead of an interaction, lacks a column, or
            has a row that can't be used; names the line.
    """
    from depthprobe.data.readers.arrow import log_of
    from depthprobe.data.readers.tables import csv_columns

    header = _header(head(path).decode("utf-8-sig", errors="replace"))
    lists = [name for name in header if name.endswith("_list:token_seq")]
    if lists:
        expected = "expected an interaction a row, with one item_id:token"
        raise BadInput(FIELD, path, f"a row of {listed(lists)} is a list of items; {expected}")
    found, where = csv_columns(path, wanted=columns, delimiter="\t", quoted=False)
    return log_of(found, source=path, where=where)


def _header(head: str) -> list[str]:
    return head.lstrip("\r\n").partition("\n")[0].rstrip("\r").split("\t")


# Readers of raw logs: one function a format, one entry in :data:`FORMATS`.

EMBEDDED = "embedded"
LOOKED_AT = 2**16  # bytes at a file's start that tell its format


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format that a log may have.

    ``fits`` tells it by a file's first characters, decompressed; where no format's does, a name
    that ends with one of ``endings`` decides whose error is told.
    """

    read: Callable[[Path, Columns], Log]
    fits: Callable[[str], bool]
    endings: tuple[str, ...]
    help: str


def read_log(
    source: str | Path,
    *,
    format: str | None = None,
    items: str | Path | None = None,
    columns: Columns | None = None,
) -> Log:
    """Read ``"embedded"``, a file, what a folder holds, or a public set by its name.

    Args:
        source: a path, if there is something at it, is never taken for a name.
        format: a name in :data:`FORMATS`; by default the content tells.
        items: a file with the items' titles; by default looked for beside the log.
        columns: which columns hold what, where the guesses are not meant.

    Raises:
        BadInput: if there is nothing, or it is no log; the message names the line.
    """
    columns = columns or Columns()
    if format is not None and format not in FORMATS:
        raise BadInput("data.format", format, nearest(format, FORMATS))
    if str(source) == EMBEDDED or format == EMBEDDED:
        log = read_embedded(Path(source), columns)
        return with_titles(log, Path(source), items=items, columns=columns)
    path = _located(source)
    paths = logs_in(path) if path.is_dir() else [path]
    logs = [FORMATS[format or recognise(one)].read(one, columns) for one in paths]
    log = logs[0] if len(logs) == 1 else join_parts(logs, folder=path)
    return with_titles(log, paths[0], items=items, columns=columns)


def recognise(path: Path) -> str:
    """The name of the format of a file, or of a folder of part files.

    Raises:
        BadInput: if the file can't be read, or no format fits.
    """
    if path.is_dir():
        return "parquet"
    start = head(path, LOOKED_AT).decode("utf-8-sig", errors="replace")
    by_content = (name for name, one in FORMATS.items() if one.fits(start))
    by_ending = (name for name, one in FORMATS.items() if set(path.suffixes) & set(one.endings))
    found = next(by_content, None) or next(by_ending, None)
    if found is None:
        first = start.strip().partition("\n")[0]
        fault = f"it starts with {short(first, 60)}" if first else "it is empty"
        allowed = f"its format isn't recognised, {fault}; say --format, one of "
        raise BadInput(FIELD, path, allowed + ", ".join(FORMATS))
    return found


def read_embedded(source: Path, columns: Columns) -> Log:
    """Make the embedded log; there is nothing to read."""
    from depthprobe.data.synthetic import embedded_log

    if str(source) != EMBEDDED:
        raise BadInput("data.format", EMBEDDED, f"another one for {source}; this one has no file")
    for what, name in columns.given().items():
        raise BadInput(f"data.columns.{what}", name, "none for the embedded log")
    return embedded_log()


def _read_parquet(path: Path, columns: Columns) -> Log:
    from depthprobe.data.readers.tables import read_parquet

    return read_parquet(path, columns)


def _read_json(path: Path, columns: Columns) -> Log:
    from depthprobe.data.readers.json_lines import read_json

    return read_json(path, columns)


def _read_csv(path: Path, columns: Columns) -> Log:
    from depthprobe.data.readers.tables import read_csv

    return read_csv(path, columns)


def is_table(head: str) -> bool:
    """Whether some delimiter splits the lines alike.

    Users' sequences may lie between tabs too, and be of one length. A table has a header or, in
    its first column, an id again: a sequence file has each user once.
    """
    whole = head if len(head) < LOOKED_AT else head.rpartition("\n")[0]
    for delimiter in DELIMITERS:
        try:
            rows = [row for row in csv.reader(io.StringIO(whole), delimiter=delimiter) if row]
        except csv.Error:  # a cell larger than any is
            continue
        if not rows or len(rows[0]) < 2:
            continue
        alike = sum(len(row) == len(rows[0]) for row in rows) / len(rows)
        header = {simple(name) for name in rows[0]}
        if all(header & {simple(name) for name in KNOWN[what]} for what in REQUIRED):
            return True
        if alike > 0.9 and (delimiter != "\t" or len({row[0] for row in rows}) < len(rows)):
            return True
    return False


# in the order in which they are tried
FORMATS: dict[str, Format] = {
    EMBEDDED: Format(
        read=read_embedded,
        fits=lambda head: False,
        endings=(),
        help="a generated log of films, the source 'embedded'",
    ),
    "parquet": Format(
        read=_read_parquet,
        fits=lambda head: head.startswith("PAR1"),
        endings=(".parquet",),
        help="Parquet, a file or a folder of part files, an interaction a row",
    ),
    "recbole": Format(
        read=read_recbole,
        fits=is_recbole,
        endings=(".inter",),
        help="RecBole's X.inter with X.item",
    ),
    "movielens": Format(
        read=read_movielens,
        fits=is_movielens,
        endings=(".data", ".dat"),
        help="MovieLens: u.data with u.item, ratings.dat or ratings.csv with movies",
    ),
    "json": Format(
        read=_read_json,
        fits=lambda head: re.match(r"\s*(\[\s*)?\{", head) is not None,
        endings=(".json", ".jsonl"),
        help="JSON lines, an interaction a line, such as Amazon's reviews with meta_X",
    ),
    "csv": Format(
        read=_read_csv,
        fits=is_table,
        endings=(".csv", ".tsv"),
        help="CSV and its kin (comma, tab, semicolon, pipe), an interaction a row",
    ),
    "sequences": Format(
        read=read_sequences,
        fits=is_sequences,
        endings=(".txt",),
        help="user item item ..., a user a line, with items.tsv",
    ),
}


def _located(source: str | Path) -> Path:
    from depthprobe.data.public import fetch, is_public, public_sets

    path = Path(source)
    try:
        if path.exists():
            return path
    except OSError as error:
        raise BadInput(FIELD, source, f"a path to look at ({error.strerror})") from error
    if is_public(str(source)):
        return fetch(str(source))
    families = dict.fromkeys(one.family for one in public_sets())
    names = nearest(str(source), [EMBEDDED, *families])
    allowed = f"no such path; expected that of a log or of a prepared folder, or a name: {names}"
    raise BadInput(FIELD, source, allowed)
