"""A column of a users' or items' file: what users are sliced by, beside what the log says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import BinaryIO, Literal, cast

from depthprobe.data.readers.columns import guess_column, listed
from depthprobe.data.readers.streams import head, open_text
from depthprobe.study import BadInput
from depthprobe.study.errors import nearest, short

LONGEST_LABEL = 40  # characters
WRITTEN = "FILE:COLUMN, such as items.csv:brand"

What = Literal["user", "item"]


def read_attribute(
    setting: str, what: What, *, field: str, wanted: AbstractSet[str]
) -> tuple[str, dict[str, str]]:
    """The column that a setting ``FILE:COLUMN`` names, by id.

    The file is a table with a header, delimited text (gzip and zstd are undone) or Parquet; its id
    column is guessed from common spellings as a log's is, or is called ``id``. RecBole's types
    in the header (``age:token``) are not part of a column's name.

    Args:
        setting: where the values stand.
        what: whose ids the file has.
        field: the setting's name, for errors.
        wanted: stripped ids whose values are kept.

    Returns:
        The column's name, and values by id, blanks collapsed, empty ones left out.

    Raises:
        BadInput: if there is no such file or column, it has no id column, it knows none of the
            wanted ids, or it says two things of one.
    """
    place, colon, column = setting.rpartition(":")
    if not (place and colon and column):
        raise BadInput(field, setting, WRITTEN)
    path = Path(place)
    if not path.is_file():
        raise BadInput(field, setting, f"{WRITTEN}; there is no file {path}")
    values: dict[str, str] = {}
    for raw, text in _pairs(path, column, what, field):
        key, value = raw.strip(), " ".join(text.split())[:LONGEST_LABEL]
        if not value or key not in wanted:
            continue
        other = values.setdefault(key, value)
        if other != value:
            fault = f"{what} {short(key, 40)} has two values, {short(other)} and {short(value)}"
            raise BadInput(field, setting, f"{fault}; expected one")
    if not values:
        example = short(min(wanted, default=""), 40)
        raise BadInput(field, setting, f"it knows none of the log's {what}s, such as {example}")
    return column, values


def _pairs(path: Path, column: str, what: What, field: str) -> Iterator[tuple[str, str]]:
    if head(path, 4, field=field).startswith(b"PAR1"):
        yield from _parquet_pairs(path, column, what, field)
        return
    start = head(path, field=field).decode("utf-8-sig", errors="replace").lstrip()
    first = start.partition("\n")[0]
    delimiter = max("\t,;|", key=first.count)
    with open_text(path, field=field) as stream:
        text = io.TextIOWrapper(cast(BinaryIO, stream), encoding="utf-8-sig", newline="")
        rows = csv.reader(
            text,
            delimiter=delimiter,
            quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            names = next((row for row in rows if any(row)), [])
            key, value = _places(names, column, what, field, path)
            for row in rows:
                if len(row) == len(names):
                    yield row[key], row[value]
                elif any(cell.strip() for cell in row):
                    fault = f"line {rows.line_num} has {len(row)} columns, the header {len(names)}"
                    raise BadInput(field, path, fault)
        except csv.Error as error:
            raise BadInput(field, path, f"line {rows.line_num} can't be read ({error})") from error


def _parquet_pairs(path: Path, column: str, what: What, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            places = _places(names, column, what, field, path)
            table = file.read(columns=[names[place] for place in places])
    except (pa.ArrowException, OSError) as error:
        text = " ".join(str(error).split())
        raise BadInput(field, path, f"a whole Parquet file ({text[:120]})") from error
    columns = (table[names[place]].to_pylist() for place in places)
    for key, value in zip(*columns, strict=True):
        if key is not None and value is not None:
            yield str(key), str(value)


def _places(
    names: Sequence[str], column: str, what: What, field: str, path: Path
) -> tuple[int, int]:
    """Where ids and values stand."""
    bare = [_bare(name) for name in names]
    value = next(
        (spelled.index(column) for spelled in (list(names), bare) if column in spelled), -1
    )
    if value < 0:
        raise BadInput(field, column, f"a column of {path}: {nearest(column, bare)}")
    key = guess_column(names, what, source=path)
    if key is None and "id" in [name.lower() for name in bare]:
        key = [name.lower() for name in bare].index("id")
    if key is None:
        allowed = f"its columns are {listed(names)}, and none is known as the {what}'s id"
        raise BadInput(field, path, f"{allowed}; call one {what}_id")
    return key, value


def _bare(name: str) -> str:
    """Without RecBole's type, as in ``age:token``."""
    return name.strip().rpartition(":")[0] or name.strip()
