"""Read raw logs: find the files, recognise the format, read.

A format is one function, ``read(path, columns, wanted) -> Log``, and one entry in :data:`FORMATS`.
A reader's ``BadInput`` names the file, the line or row, and what was expected.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

from depthprobe.data.log import Ids, Log, encode_ids, id_notes
from depthprobe.data.public import SETS, fetch, is_public
from depthprobe.data.readers.columns import WANTED, Wanted, listed, refuse_columns
from depthprobe.data.readers.lines import is_sequences, read_json, read_sequences
from depthprobe.data.readers.streams import FIELD, OTHERS, fits, head, plain_name
from depthprobe.data.readers.tables import (
    TYPE,
    is_movielens,
    is_table,
    read_csv,
    read_parquet,
)
from depthprobe.data.readers.titles import with_titles
from depthprobe.data.synthetic import embedded_log
from depthprobe.errors import BadInput, nearest, short
from depthprobe.study import Columns

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Format:
    """A format that a log may have; ``fits`` tells it by a file's first characters."""

    read: Callable[[Path, Columns, Wanted], Log]
    fits: Callable[[str], object]
    help: str


def read_embedded(source: Path, columns: Columns, wanted: Wanted = WANTED) -> Log:
    """Generate the embedded log."""
    if str(source) != EMBEDDED:
        raise BadInput("data.format", EMBEDDED, f"another one for {source} (this one has no file)")
    refuse_columns(columns, "the embedded log")
    return embedded_log()


# in the order in which they are tried
FORMATS: dict[str, Format] = {
    EMBEDDED: Format(
        read_embedded, lambda start: False, "a generated log of films, the source 'embedded'"
    ),
    "parquet": Format(
        read_parquet, lambda start: start.startswith("PAR1"),
        "Parquet, a file or a folder of part files, an interaction a row",
    ),
    "recbole": Format(
        read_csv, re.compile(rf"\s*([^\t\n]+:{TYPE}\t)*[^\t\n]+:{TYPE}\r?(\n|$)").match,
        "RecBole's X.inter with X.item",
    ),
    "movielens": Format(
        partial(read_csv, layouts=True), is_movielens,
        "MovieLens: u.data with u.item, ratings.dat or ratings.csv with movies",
    ),
    "json": Format(
        read_json, re.compile(r"\s*(\[\s*)?\{").match,
        "JSON lines, an interaction a line, such as Amazon's reviews with meta_X",
    ),
    "csv": Format(
        read_csv, is_table,
        "CSV and its kin (comma, tab, semicolon, pipe, blanks), an interaction a row",
    ),
    "sequences": Format(
        read_sequences, is_sequences, "user item item ..., a user a line, with items.tsv"
    ),
}  # fmt: skip


def read_log(
    source: str | Path,
    *,
    format: str | None = None,
    items: str | Path | None = None,
    columns: Columns | None = None,
    ratings: bool = True,
) -> Log:
    """Read ``"embedded"``, a file, what a folder holds, or a public set by its name.

    Args:
        source: an existing path is never taken for a name.
        format: a name in :data:`FORMATS`; by default recognised by the content.
        items: a file with the items' titles; by default looked for beside the log.
        columns: which columns hold what, in place of guesses.
        ratings: whether they are needed; otherwise they may be missing or invalid.
    """
    columns = columns or Columns()
    wanted = [what for what in WANTED if ratings or what != "rating"]
    if format is not None and format not in FORMATS:
        raise BadInput("data.format", format, nearest(format, FORMATS))
    if str(source) == EMBEDDED or format == EMBEDDED:
        log = read_embedded(Path(source), columns)
        return with_titles(log, Path(source), items=items, columns=columns)
    path = _located(source)
    paths = logs_in(path) if path.is_dir() else [path]
    logs = [FORMATS[format or recognise(one)].read(one, columns, wanted) for one in paths]
    log = logs[0] if len(logs) == 1 else join_parts(logs, folder=path)
    dates = log.columns.notes() if log.columns else []
    notes = [*log.notes, *dates, *id_notes(log.users, "user"), *id_notes(log.items, "item")]
    log = replace(log, notes=tuple(notes))
    return with_titles(log, paths[0], items=items, columns=columns)


def recognise(path: Path) -> str:
    """The name of the format of a file, or of a folder of part files."""
    if path.is_dir():
        return "parquet"
    start = head(path)
    name = next((name for name, one in FORMATS.items() if one.fits(start)), None)
    if name is None:
        first = start.strip().partition("\n")[0]
        fault = f"it starts with {short(first, 60)}" if first else "it is empty"
        allowed = f"its format isn't recognised, {fault}; say --format, one of "
        raise BadInput(FIELD, path, allowed + ", ".join(FORMATS), fault=True)
    return name


def _located(source: str | Path) -> Path:
    if os.path.exists(source):  # unlike Path.exists, returns False for a name that is too long
        return Path(source)
    if is_public(str(source)):
        return fetch(str(source))
    families = dict.fromkeys(one.family for one in SETS.values())
    names = nearest(str(source), [EMBEDDED, *families])
    raise BadInput(FIELD, source, f"an existing path, or {names}")


# The content of a folder: one log, or its training, validation and test parts.

ENDINGS = (".csv", ".dat", ".data", ".inter", ".json", ".jsonl", ".parquet", ".tsv", ".txt")
# names of logs, whatever other files are there
LOGS = ("sequences.txt", "*.inter", "u.data", "ratings.dat", "ratings.csv")
# train.csv, X.train.inter, train-0-of-1.parquet
TRAINING = re.compile(r"(.*\.)?train(ing)?(-\d+-of-\d+)?\.\w+")
VALIDATION = re.compile(r"(.*\.)?(val|valid|validation|dev)(-\d+-of-\d+)?\.\w+")
TEST = re.compile(r"(.*\.)?test(-\d+-of-\d+)?\.\w+")
EXPECTED = (
    "expected one log (sequences.txt, X.inter, u.data, ratings.dat, ratings.csv, or one CSV, "
    "JSON-lines or Parquet file), or train, valid and test files, or Parquet part files"
)


def logs_in(folder: Path) -> list[Path]:
    """The log's file; the folder, if all its files are the log; or one file per part.

    Three paths are in the order of :data:`depthprobe.data.log.PARTS`.
    """
    if deeper := next(folder.glob("*=*/**/*.parquet"), None):  # partitions of one table
        fault = f"it has files in subfolders, such as {short(str(deeper.relative_to(folder)), 60)}"
        raise BadInput(FIELD, folder, f"{fault}; write them to one folder", fault=True)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    logs = [path for path in files if plain_name(path).endswith(ENDINGS) and not fits(path, OTHERS)]
    forms = (TRAINING, VALIDATION, TEST)
    parts = [[path for path in logs if form.fullmatch(plain_name(path))] for form in forms]
    named = [path for path in logs if fits(path, LOGS) and path not in chain(*parts)]
    if parts[0]:
        if any(len(paths) != 1 for paths in parts) or named:
            names = listed(path.name for path in [*chain(*parts), *named])
            allowed = "one file each for training, validation and test, and no other log"
            raise BadInput(FIELD, folder, f"{allowed} (it has {names})")
        return list(chain(*parts))
    logs = named or logs
    if len(logs) == 1:
        return logs
    if logs and all(plain_name(path).endswith(".parquet") for path in logs):
        return [folder]
    names = listed(path.name for path in logs or files)
    fault = f"it has several logs, {names}" if logs else f"it has {names or 'no file'}"
    raise BadInput(FIELD, folder, f"{fault}; {EXPECTED}", fault=True)


def join_parts(logs: Sequence[Log], *, folder: Path) -> Log:
    """Join a training, a validation and a test part into one log with common ids."""
    joined: dict[str, np.ndarray | None] = {}
    for what in ("times", "ratings"):
        given = [getattr(log, what) for log in logs if getattr(log, what) is not None]
        if len(given) not in (0, len(logs)):
            raise BadInput(FIELD, folder, f"{what} in all three parts, or in none")
        joined[what] = np.concatenate(given) if given else None
    users, items = _united([log.users for log in logs]), _united([log.items for log in logs])
    parts = np.repeat(np.arange(len(logs), dtype=np.int8), [len(log) for log in logs])
    pairs = users.codes.astype(np.int64) * len(items.names) + items.codes
    both = np.intersect1d(pairs[parts == 0], pairs[parts == len(logs) - 1])
    notes = list(chain.from_iterable(log.notes for log in logs))
    if len(both):
        notes.append(f"{len(both)} (user, item) pairs are in training and in test")
    return Log(
        users,
        items,
        joined["times"],
        joined["ratings"],
        parts=parts,
        titles={item: title for log in logs for item, title in log.titles.items()},
        name=folder.resolve().name,
        notes=tuple(dict.fromkeys(notes)),
        columns=logs[0].columns,
    )


def _united(columns: Sequence[Ids]) -> Ids:
    """The ids of several columns as one column, numbered by first appearance."""
    names = encode_ids(chain.from_iterable(ids.names for ids in columns))
    starts = np.cumsum([0, *(len(ids.names) for ids in columns)])
    codes = [names.codes[start + ids.codes] for start, ids in zip(starts, columns, strict=False)]
    return Ids(np.concatenate(codes), names.names)
