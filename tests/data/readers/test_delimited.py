from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.readers.tables import DELIMITERS, layout_of, records
from depthprobe.errors import BadInput
from depthprobe.study import Columns

WANTED = Columns(user="1", item="2")


def write(folder: Path, text: str) -> Path:
    path = folder / "log.csv"
    path.write_bytes(text.encode())
    return path


# a cell, and a number of lines that it is over
CELLS = st.sampled_from([("a", 1), ('"a, b;"', 1), ('"a\n\nb"', 3), ('"a ""|""\r\nb"', 2), ("", 1)])


@given(
    st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1),
    st.sampled_from(list(DELIMITERS)),
    st.integers(0, 3),
)
def test_records_lie_where_they_start(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[tuple[str, int], ...]],
    delimiter: str,
    blank: int,
) -> None:
    lines = [delimiter.join(["user", "item", "x"]), *[""] * blank]
    starts = []
    at = len(lines) + 1
    for row in rows:
        starts.append(at)
        lines.append(delimiter.join(cell for cell, _ in row))
        at += sum(over - 1 for _, over in row) + 1
    path = write(tmp_path_factory.mktemp("records"), "\n".join(lines) + "\n")
    layout = layout_of(path, Columns(), delimiter=None, quoted=True)
    assert (layout.delimiter, layout.width, layout.skipped) == (delimiter, 3, 1)
    assert [line for line, _ in records(path, layout)] == starts


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [
        ("user;item;x\na;b;1,5\nc;d;2,5\n", ";"),
        ("user,item,x\na,b,c|d\nc,d,e|f\n", ","),
        ("user\titem\tx\na\tb\tc, d\na\tb\tc\n", "\t"),
        ("1;2;1,5\n3;4;2,5\n", ";"),  # the commas split alike, and less
        ("1|2|3\n" * 9 + "4|5,6\n", "|"),  # a line that is wrong
    ],
)
def test_delimiter(tmp_path: Path, text: str, delimiter: str) -> None:
    wanted = Columns() if text.startswith("user") else WANTED
    assert layout_of(write(tmp_path, text), wanted, delimiter=None, quoted=True).delimiter == (
        delimiter
    )


def test_only_the_start_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "user,item,x\n" + 'a,b,"c\nd"\n' * 5
    for size in range(14, len(text) + 2):
        monkeypatch.setattr("depthprobe.data.readers.tables.LOOKED_AT", size)
        assert layout_of(write(tmp_path, text), Columns(), delimiter=None, quoted=True).width == 3


def test_a_delimiter_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, "user,item\na,b\n")
    with pytest.raises(BadInput, match="columns split by tab; its first line has none"):
        layout_of(path, Columns(), delimiter="\t", quoted=False)
