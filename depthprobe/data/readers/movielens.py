"""MovieLens as GroupLens publishes it: ``u.data``, ``ratings.dat`` or ``ratings.csv``."""

from __future__ import annotations

import re
from pathlib import Path

from depthprobe.data.log import Log
from depthprobe.data.readers.streams import head
from depthprobe.study import BadInput, Columns

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
