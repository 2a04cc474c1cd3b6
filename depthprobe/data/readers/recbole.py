"""RecBole's atomic files: tab-separated, not quoted, with a typed header (recbole.io/atomic_files).

``X.inter`` has the interactions, ``X.item`` beside it what is known of the items.
"""

from __future__ import annotations

from pathlib import Path

from depthprobe.data.log import Log
from depthprobe.data.readers.columns import listed
from depthprobe.data.readers.streams import FIELD, head
from depthprobe.study import BadInput, Columns

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
