"""CSV and its kin, MovieLens, RecBole and Parquet."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.log import Ids, Log
from depthprobe.data.readers.formats import read_log, recognise
from depthprobe.data.readers.tables import DELIMITERS, read_csv, read_parquet, records
from depthprobe.errors import BadInput
from depthprobe.study import Columns

HEADER = "user_id,item_id,rating,timestamp\n"


def write(folder: Path, text: str | bytes, name: str = "log.csv") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def raw(ids: Ids) -> list[str]:
    return [ids.names[code] for code in ids.codes]


def rows_of(log: Log) -> list[tuple[Any, ...]]:
    columns = [column.tolist() for column in (log.ratings, log.times) if column is not None]
    return list(zip(raw(log.users), raw(log.items), *columns, strict=True))


def read(folder: Path, text: str | bytes, **named: str) -> list[tuple[Any, ...]]:
    return rows_of(read_csv(write(folder, text), Columns(**named)))


def refusal(folder: Path, text: str | bytes, **named: str) -> str:
    with pytest.raises(BadInput) as caught:
        read(folder, text, **named)
    message = str(caught.value).replace(str(folder), "")
    assert "\n" not in message
    assert len(message) < 400
    return message


# ids with what CSV must quote, and what some readers would take for a number or a missing value
IDS = st.text("ab01\"',;|\té .#", min_size=1, max_size=4).filter(str.strip) | st.sampled_from(
    ["007", "1.0", "NA", "null", "NaN", "true", "1e5", "2024-01-01"]
)
ROWS = st.lists(
    st.tuples(IDS, IDS, st.sampled_from([1.0, 2.5, 5.0]), st.integers(0, 2 * 10**9)), min_size=1
)


@given(
    ROWS,
    st.sampled_from(",;|\t"),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff", "\n\n"]),
    st.booleans(),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[Any, ...]],
    delimiter: str,
    quoting: Any,
    end: str,
    start: str,
    packed: bool,
) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)
    # the review's line breaks and quotes lie in a column that nobody wants
    writer.writerow(["review", "userId", "rating", "Item_ID", "timestamp"])
    writer.writerows(['two\nlines, "or"\r\nthree', u, r, i, t] for u, i, r, t in rows)
    content = (start + text.getvalue()).encode()
    path = write(tmp_path_factory.mktemp("csv"), gzip.compress(content) if packed else content)
    log = read_csv(path, Columns())
    assert rows_of(log) == rows
    assert len(set(log.users.names)) == len(log.users.names)
    assert set(log.users.codes.tolist()) == set(range(len(log.users.names)))


def test_a_csv_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.data.readers.tables.BLOCK", 1000)
    rows = [(f"u{n % 97}", f"i{n * n % 89}", 1.0, n) for n in range(3000)]
    text = HEADER + "".join(f"{u},{i},{r},{t}\n" for u, i, r, t in rows)
    assert read(tmp_path, text) == rows
    assert "line 3002 has no item" in refusal(tmp_path, text + "u1,,1.0,7\n" + text)


def test_minimal_tables(tmp_path: Path) -> None:
    assert read(tmp_path, "user,item\na,b") == [("a", "b")]
    assert read(tmp_path, "user\titem\r\na\tb,c\r\n\r\n") == [("a", "b,c")]
    assert read(tmp_path, "user;item;rating\na;b;1\nc;d;2.5\n") == [("a", "b", 1), ("c", "d", 2.5)]
    assert read(tmp_path, "x,user,x,item\n1,a,2,b\n") == [("a", "b")]  # a name twice, unwanted
    assert read(tmp_path, "user,item,date\na,b,1970-01-02\n") == [("a", "b", 86400)]


def test_decimal_commas_do_not_split(tmp_path: Path) -> None:
    text = "user;item;rating,\na;b;1,5\nc;d;2,5\n"
    assert "line 2 has the rating '1,5'" in refusal(tmp_path, text, rating="rating,")


def test_columns_by_number(tmp_path: Path) -> None:
    text = "1\t2\t5\t9\n3\t4\t1\t8\n"
    named = {"user": "1", "item": "2", "time": "4"}
    assert read(tmp_path, text, **named) == [("1", "2", 9), ("3", "4", 8)]
    assert read(tmp_path, text, user="2", item="1") == [("2", "1"), ("4", "3")]
    assert "data.columns.time: '5'" in refusal(tmp_path, text, user="1", item="2", time="5")
    assert "name the columns as it does" in refusal(tmp_path, HEADER + "a,b,1,1\n", **named)
    # a first row that counts is a row: user 1 took item 2
    assert read(tmp_path, "1,2\na,b\n", user="1", item="2") == [("1", "2"), ("a", "b")]
    # more digits than a table has columns, and those of other scripts, are a name
    for name in ("9" * 5000, "１"):
        assert "data.columns.item" in refusal(tmp_path, HEADER + "a,b,1,1\n", item=name)
    # with a 0 they are names, of a header as pandas writes it
    assert read(tmp_path, "0,1,2\na,b,c\n", user="0", item="2") == [("a", "c")]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "it is empty"),
        (HEADER, "it has none"),
        ("user\na\n", "its first line has none"),
        ("user,item;time\na,b;1\n", "split alike at each"),
        ("Benutzer,Artikel\na,b\n", "Benutzer, Artikel"),
        (HEADER + "a,b,1,1\na,b,1\n", "line 3 has 3; expected 4 columns"),
        (HEADER + "a,b,1,1\n" * 3 + "a;b;1;1\n", "line 5 has 1; expected 4 columns"),
        (HEADER + "a,b,1,1\n\n\na,,1,1\n", "line 5 has no item"),
        (HEADER + "a,b,,1\n", "line 2 has no rating"),
        (HEADER + "a,b,good,1\n", "line 2 has the rating 'good'"),
        (HEADER + "a,b,1,1\na,b,1,soon\n", "line 3 has the time 'soon'"),
        (HEADER + "a,b\x00,1,1\n", "line 2 has the item 'b"),
        (HEADER.encode() + b"a,b\xff,1,1\n", "line 2 is not UTF-8"),
        ('user,item,x\na,b,"c\n\nd"\na,,e\n', "line 5 has no item"),
        ('user,item,title\na,b,"c\na,b,d\n', "in the row of line 2 a quote isn't closed"),
        ('user,item,x\na,b,"c, d"\na,b,"c\na,b,d\n', "in the row of line 3 a quote isn't closed"),
        ('user,item,x\na,"b"c,d\n', "in the row of line 2 a quote isn't closed, or not at"),
        ('user,item,x\na,"b\nc",d\n', "line 2 has the item 'b\\nc'; expected"),
    ],
)
def test_refused_csv(tmp_path: Path, text: str | bytes, fault: str) -> None:
    assert fault in refusal(tmp_path, text)


def test_a_quote_that_swallows_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.data.readers.tables.BLOCK", 1000)
    text = 'user,item,x\na,b,"c\n' + "a,b,d\n" * 30000
    assert len(read(tmp_path, text)) == 30001
    text += 'a,b,"c, d"\n'
    assert "in the row of line 2 a quote isn't closed" in refusal(tmp_path, text)


STRAY = ["Plain", '"Opening only', "No quotes", 'Closing only"', '"Both"', 'In "the" middle', '"']


@given(st.lists(st.sampled_from(STRAY), min_size=1), st.sampled_from(list(DELIMITERS)))
def test_stray_quotes_cost_no_row(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str], delimiter: str
) -> None:
    rows = [(f"u{n % 3}", f"i{n}", 10**9 + n) for n in range(len(titles))]
    lines = [["user", "item", "time", "x"]]
    lines += [[u, i, str(t), x] for (u, i, t), x in zip(rows, titles, strict=True)]
    path = write(
        tmp_path_factory.mktemp("quotes"), "".join(delimiter.join(row) + "\n" for row in lines)
    )
    assert rows_of(read_csv(path, Columns())) == rows


@pytest.mark.parametrize("delimiter", ",;|\t")
@pytest.mark.parametrize("quoted", ["user", "item"])
def test_a_quote_that_swallows_rows_is_named(tmp_path: Path, delimiter: str, quoted: str) -> None:
    def line(*cells: str) -> str:
        return delimiter.join(cells) + "\n"

    text = line("user", "item", "time", "x")
    text += line("u1", "i1", "1600000000", f'"Lion{delimiter} The"')
    text += line("u2", "i2", "1600000001", "'fine'")
    text += line("u1", "i3", "1600000002", '"Opening only')
    text += line("u2", "i4", "1600000003", "None")
    text += line("u1", "i5", "1600000004", 'Closing only"')
    assert "a quote of line 4 goes on in line 5, a row by itself" in refusal(tmp_path, text)
    # prose in quotes may be over several lines, with delimiters and numbers in it
    prose = f'"good{delimiter} 5 of 5{delimiter} all 3{delimiter} fine\nand 2{delimiter} or 3"'
    text = line("x", "user", "item", "time") + line("-", "u1", "i1", "1600000000")
    text += line(prose, "u2", "i2", "1600000001") * 3
    assert len(read(tmp_path, text)) == 4


@pytest.mark.parametrize("break_", ["", "\n"])
def test_a_cell_of_any_length(tmp_path: Path, break_: str) -> None:
    long = "word, " * 40_000
    text = "user,item,x\n" + f'a,b,"fine{break_}"\n' * 3 + f'a,c,"{long}"\n'
    assert read(tmp_path, text) == [("a", "b")] * 3 + [("a", "c")]


def test_quotes_around_ids(tmp_path: Path) -> None:
    text = 'user,item\n"a",b\na,"b"\n"a","b ""c"""\n"","b"\n'
    assert refusal(tmp_path, text).endswith("line 5 has no user; expected one in every row")
    assert read(tmp_path, text[: text.rindex('""')]) == [("a", "b"), ("a", "b"), ("a", 'b "c"')]


PAIRS = [("u1", "i1"), ("u1", "i2"), ("u2", "i1"), ("u2", "i3")]


@pytest.mark.parametrize("between", [" ", "   ", "\t", " \t ", ",", ";"])
@pytest.mark.parametrize("around", ["", "  "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_pairs_without_a_header(tmp_path: Path, between: str, around: str, end: str) -> None:
    if around and not between.isspace():
        around = ""
    for time in (None, 1_600_000_000):
        rows = PAIRS if time is None else [(*pair, time + n) for n, pair in enumerate(PAIRS)]
        text = "".join(around + between.join(map(str, row)) + around + end for row in rows)
        log = read_log(write(tmp_path, text, "pairs.txt"))
        read = [tuple(v.strip() if isinstance(v, str) else v for v in r) for r in rows_of(log)]
        assert read == rows
        assert "no header: the columns are read as user, item" in log.notes[0]


@pytest.mark.parametrize(
    ("row", "fault"),
    [("1 2 5", "its columns are 1, 2, 5"), ("1 2 5 1600000000", "say --user-column and --item")],
)
def test_columns_that_may_be_anything_are_to_be_named(tmp_path: Path, row: str, fault: str) -> None:
    path = write(tmp_path, f"{row}\n{row}\n")
    with pytest.raises(BadInput, match=fault):
        read_log(path)
    assert len(read_log(path, columns=Columns(user="1", item="2", rating="3"))) == 2


def test_pairs_of_different_lengths_are_refused_with_their_line(tmp_path: Path) -> None:
    path = write(tmp_path, "1 2\n" * 40 + "1 2 3\n1 2\n")
    with pytest.raises(BadInput, match="line 41 has 3; expected 2 columns"):
        read_log(path)
    header = write(tmp_path, "user  item   time\nann bob 1600000000\nann cy 1600000001\n")
    assert rows_of(read_log(header)) == [("ann", "bob", 1600000000), ("ann", "cy", 1600000001)]


@pytest.mark.parametrize("comments", ["# made 2024-05-01\n", "#\n# a, b\r\n", "% sym\n% 1 2\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_comments_before_the_first_line(tmp_path: Path, comments: str, start: str) -> None:
    lines = comments.count("\n")
    for text in (HEADER + "a1,b1,1,1\na1,b2,1,1\n", "1 2\n1 3\n", "u1 i1 i2\nu2 i1 i3\n"):
        path = write(tmp_path, start + comments + text)
        log = read_log(path)
        assert len(log) == (4 if text.startswith("u1") else 2)
    text = start + comments + HEADER + "a1,b1,1,1\na1,,1,1\n"
    assert f"line {lines + 3} has no item" in refusal(tmp_path, text)
    text = start + comments + HEADER + "a1,b1,1,1\na1,1\n"
    assert f"line {lines + 3} has 2; expected 4 columns" in refusal(tmp_path, text)


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
@pytest.mark.parametrize("line", ["sep={}\n", '"SEP={}"\r\n', "\ufeffsep={}\n"])
def test_the_line_that_tells_excel_of_the_delimiter(
    tmp_path: Path, line: str, delimiter: str
) -> None:
    text = line.format(delimiter) + "user,item\na,b\na,c\n".replace(",", delimiter)
    assert rows_of(read_log(write(tmp_path, text))) == [("a", "b"), ("a", "c")]
    assert "line 5 has no item" in refusal(tmp_path, f"{text}a{delimiter}\n")


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize(
    "header", ["user_id,item_id\n", "item,user,x\n", "user:token\titem:token\n"]
)
def test_a_header_that_stands_again_is_no_row(tmp_path: Path, header: str, start: str) -> None:
    row = header.replace("user", "a").replace("item", "b")
    text = start + header + row + start + header + row
    with pytest.raises(BadInput, match="line 3 is the header again"):
        read_log(write(tmp_path, text))
    # a user or an item alone may be called so
    rows = header.replace("user", "a") + header.replace("item", "b")
    assert len(read_log(write(tmp_path, header + rows))) == 2


@pytest.mark.parametrize("name", ["label", "is_click", "label:float"])
@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_labels_that_are_not_read_are_told(tmp_path: Path, name: str, form: str) -> None:
    rows = [{"user": "a", "item": item, name: float(label)} for item, label in ("b1", "c0", "d1")]
    if form == "parquet":
        path = tmp_path / "log.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "json":
        path = write(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        cells = [list(rows[0]), *(map(str, row.values()) for row in rows)]
        path = write(tmp_path, "".join(",".join(row) + "\n" for row in cells))
    plain = name.partition(":")[0]
    note = f"the column {plain} is not read: if its 0 marks what is no interaction"
    assert note in read_log(path).notes[-1]
    log = read_log(path, columns=Columns(rating=plain))
    assert log.notes == ()
    assert log.ratings is not None
    assert log.ratings.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "lists",
    [
        ["[1, 2]", "[3]"],
        ["(1, 2)", "(3, 4)"],
        ["['x' 'y']", "[]"],
        ["1 2 3", "4 5"],
        ["1|2", "1|2|3"],
    ],
)
def test_items_that_are_lists_are_refused(tmp_path: Path, lists: list[str]) -> None:
    text = "user\titem\n" + "".join(f"u{n}\t{one}\n" for n, one in enumerate(lists))
    assert f"most of its items are lists, such as {lists[0]!r}" in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "ids",
    [
        ["[REC]", "Alien", "Up"],
        ["12 34", "12 35"],
        ["The Beatles", "U2"],
        ["40.7,-73.9"],
        ["a b", "c"],
    ],
)
def test_items_that_only_look_like_lists(tmp_path: Path, ids: list[str]) -> None:
    text = "user\titem\n" + "".join(f"u\t{one}\n" for one in ids)
    assert [row[1] for row in rows_of(read_csv(write(tmp_path, text), Columns()))] == ids


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    text = "user,item,title\né,日本,Café\né,😀,x\n"
    log = read_csv(write(tmp_path, text.encode(encoding)), Columns())
    assert rows_of(log) == [("é", "日本"), ("é", "😀")]
    assert log.titles["日本"] == "Café"


def test_what_nobody_wants_may_be_in_any_encoding(tmp_path: Path) -> None:
    text = "user,item,review\na,b,Café\na,c,x\n"
    assert read(tmp_path, text.encode("iso-8859-1")) == [("a", "b"), ("a", "c")]
    assert "line 2 is not UTF-8" in refusal(tmp_path, text.replace("c,", "é,").encode("cp1252"))


@pytest.mark.parametrize("text", ["", "-", "good"])
def test_ratings_that_no_rule_needs(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, f"user,item,rating,stars\na,b,4,1\na,c,{text},1\n")
    assert read_log(path, ratings=False).ratings is None
    with pytest.raises(BadInput, match="line 3 has .*rating"):
        read_log(path)
    twice = write(tmp_path, "user,item,rating,overall\na,b,4,4\n")
    assert len(read_log(twice, ratings=False)) == 1
    named = write(tmp_path, "user,item\na,b\n")
    with pytest.raises(BadInput, match=r"data\.columns\.rating"):
        read_log(named, columns=Columns(rating="stars"), ratings=False)


@pytest.mark.parametrize(
    "packed", [gzip.compress, lambda raw: pa.compress(raw, "zstd", asbytes=True)]
)
def test_a_cut_off_table_is_never_read_in_part(tmp_path: Path, packed: Any) -> None:
    content = packed((HEADER + "".join(f"a,b{n},1,{n}\n" for n in range(50000))).encode())
    assert "cut off" in refusal(tmp_path, content[:-9])


def parquet(folder: Path, name: str = "log.parquet", **columns: Any) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.int32(), pa.int64(), pa.uint8(), pa.float64()]
    + [pa.dictionary(pa.int8(), pa.string()), pa.dictionary(pa.int32(), pa.int64())],
    ids=str,
)
def test_ids_of_any_type(tmp_path: Path, kind: Any) -> None:
    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    values = pa.array(["7", "5", "7"]).cast(inner)
    values = values.dictionary_encode() if inner != kind else values
    nested = pa.array([{"a": [1]}] * 3)
    path = parquet(tmp_path, user=values, extra=nested, item=values)
    log = read_parquet(path, Columns())
    assert raw(log.users) == raw(log.items) == ["7", "5", "7"]
    assert log.users.names == ["7", "5"]


def test_values_that_no_row_has_are_no_ids(tmp_path: Path) -> None:
    users = pa.DictionaryArray.from_arrays(pa.array([2, 0], pa.int32()), ["a", "b", "c"])
    log = read_parquet(parquet(tmp_path, user=users, item=["x", "y"]), Columns())
    assert log.users.names == ["c", "a"]


@pytest.mark.parametrize("name", ["user.id", "user", "a b"])
def test_a_column_of_any_name(tmp_path: Path, name: str) -> None:
    path = parquet(tmp_path, **{name: ["a"], "id": ["b"], "item": ["c"]})
    assert raw(read_parquet(path, Columns(user=name)).users) == ["a"]


def test_part_files_are_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "ratings.parquet"
    parquet(folder, "part-1.parquet", user_id=[3], item_id=["a"], timestamp=[9.5])
    parquet(folder, "part-0.snappy.parquet", item_id=["b", "a"], user_id=[3.0, 7], timestamp=[1, 2])
    write(folder, "", "_SUCCESS")
    write(folder, "x", ".part-0.crc")
    write(folder, "read me", "README")
    log = read_parquet(folder, Columns())
    assert rows_of(log) == [("3", "b", 1.0), ("7", "a", 2.0), ("3", "a", 9.5)]
    assert log.name == tmp_path.name  # of ratings.parquet, which says nothing
    parquet(folder, "part-2", user_id=[1, None], item_id=["a", "b"], timestamp=[1, 2])
    with pytest.raises(BadInput, match="row 2 of part-2 has no user"):
        read_parquet(folder, Columns())
    write(folder, "", "part-3.parquet")
    with pytest.raises(BadInput, match=r"a whole Parquet file.*part-3\.parquet"):
        read_parquet(folder, Columns())


def test_refused_parquet(tmp_path: Path) -> None:
    def refused(path: Path, what: str) -> None:
        with pytest.raises(BadInput, match=what) as caught:
            read_parquet(path, Columns())
        assert "\n" not in str(caught.value)

    refused(write(tmp_path, "PAR1 and no more"), "a whole Parquet file")
    whole = parquet(tmp_path, user=["a"] * 99, item=["b"] * 99).read_bytes()
    refused(write(tmp_path, whole[: len(whole) // 2]), "a whole Parquet file")
    invalid = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"], pa.binary()).buffers())
    refused(parquet(tmp_path, user=["a"], item=["b"], title=invalid), "a whole Parquet file")
    refused(parquet(tmp_path, user=[{"id": 1}], item=["b"]), "the user column has the type struct")
    refused(parquet(tmp_path, user=[], item=[]), "it has none")
    refused(
        parquet(tmp_path, user=[1.5], item=["b"]),
        "row 1 has the user 1.5; expected",
    )
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "it has none")
    parquet(tmp_path / "mixed", "0.parquet", user=[1], item=[1])
    parquet(tmp_path / "mixed", "1.parquet", user=["a"], item=[1])
    refused(tmp_path / "mixed", "part files of the same columns")


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
    assert [line for line, _ in records(path, delimiter, quoted=True)] == starts


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("user;item;x\na;b;1,5\nc;d;2,5\n", 3),
        ("user,item,x\na,b,c|d\nc,d,e|f\n", 3),
        ("user\titem\tx\na\tb\tc, d\na\tb\tc\n", 3),
        ("1;2;1,5\n3;4;2,5\n", 3),  # the commas split alike, and less
        ("1|2|3\n" * 9 + "4|5|5,6\n", 3),
    ],
)
def test_the_delimiter_splits_most_lines_alike(tmp_path: Path, text: str, width: int) -> None:
    named = {} if text.startswith("user") else {"user": "1", "item": "2"}
    assert len(read(tmp_path, text, **named)) == text.count("\n") - (not named)
    assert f"expected {width} columns" in refusal(tmp_path, text + "z\n", **named)


def test_only_the_start_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "user,item,x\n" + 'a,b,"c\nd"\n' * 5
    for size in range(14, len(text) + 2):
        monkeypatch.setattr("depthprobe.data.readers.streams.START", size)
        assert read(tmp_path, text) == [("a", "b")] * 5


# as the three generations of MovieLens write the same ratings
FILMS = [(7, 10, "3.5", 900000200), (7, 2, "4", 900000100), (8, 10, "1", 900000300)]
COLONS = "".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in FILMS)
TABS = "".join(f"{u}\t{i}\t{r[0]}\t{t}\n" for u, i, r, t in FILMS)
WITH_HEADER = "userId,movieId,rating,timestamp\n" + COLONS.replace("::", ",")
MOVIES = "2::Amélie (2001)::Comedy\n3::No::X\n10::Ran (1985)::War\n"
GENERATIONS = {
    "ml-100k": {
        "u.data": TABS,
        "u.item": "2|Amélie (2001)|01-Jan||x|0\n10|Ran (1985)|01-Jan||y|1\n".encode("iso-8859-1"),
        "u1.base": TABS,
        "u.user": "7|24|M|technician|85711\n",
        "README": "These are ratings.\n",
    },
    "ml-1m": {
        "ratings.dat": COLONS,
        "movies.dat": MOVIES.encode("iso-8859-1"),
        "users.dat": "7::F::1::10::48067\n",
    },
    "ml-25m": {
        "ratings.csv": WITH_HEADER,
        "movies.csv": 'movieId,title,genres\n2,"Amélie (2001)",Comedy\n10,Ran (1985),War\n',
        "tags.csv": "userId,movieId,tag,timestamp\n7,10,x,1\n",
        "links.csv": "movieId,imdbId,tmdbId\n2,3,4\n",
    },
}


@pytest.mark.parametrize("name", GENERATIONS)
def test_movielens(tmp_path: Path, name: str) -> None:
    for file, content in GENERATIONS[name].items():
        write(tmp_path / name, content, file)
    log = read_log(tmp_path / name)
    first = 3.0 if name == "ml-100k" else 3.5
    times = [900000200, 900000100, 900000300]
    expected = [("7", "10", first), ("7", "2", 4.0), ("8", "10", 1.0)]
    assert rows_of(log) == [(*row, time) for row, time in zip(expected, times, strict=True)]
    assert log.titles == {"2": "Amélie (2001)", "10": "Ran (1985)"}
    assert log.name == name


def test_movielens_columns_by_place_take_no_names(tmp_path: Path) -> None:
    path = write(tmp_path, TABS, "u.data")
    with pytest.raises(BadInput, match=r"data\.columns\.user: .*has no header"):
        read_log(path, columns=Columns(user="2"))


INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
u1\t"i1\t4\t20
u2\ti2\t3.5\t10
"""
ITEM = """item_id:token\tmovie_title:token_seq\tclass:token_seq
"i1\tThe "Blue" one\tDrama
i2\tRed  soap\tComedy
"""


def test_recbole_quotes_are_plain_text(tmp_path: Path) -> None:
    write(tmp_path, ITEM, "x.item")
    log = read_log(write(tmp_path, INTER, "x.inter"))
    assert log.items.names == ['"i1', "i2"]
    assert log.ratings is not None
    assert log.ratings.tolist() == [4.0, 3.5]
    assert log.times is not None
    assert log.times.tolist() == [20, 10]
    assert log.titles == {'"i1': 'The "Blue" one', "i2": "Red soap"}
    assert log.name == "x"


@pytest.mark.parametrize("kind", ["", ":token"])
def test_recbole_columns_are_named_with_or_without_their_types(tmp_path: Path, kind: str) -> None:
    text = "who:token\titem_id:token\twhat:token\nu1\ti1\tx\nu1\ti2\ty\n"
    path = write(tmp_path, text, "x.inter")
    log = read_log(path, columns=Columns(user=f"who{kind}", item=f"what{kind}"))
    assert (log.users.names, log.items.names) == (["u1"], ["x", "y"])


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("ratings.dat", COLONS + "8::11::5\n", "line 4 has 5; expected 7 columns"),
        ("u.data", TABS + "8\t11\t5\tnever\n", "line 4 has the time 'never'"),
        (
            "x.inter",
            "session_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n",
            "each of its rows has a list of items; expected an interaction a row",
        ),
        ("x.inter", "user_id:token\tcolour:token\n1\tred\n", "none is known as the item's"),
        ("x.inter", INTER + "u3\ti1\tgood\t30\n", "line 4 has the rating 'good'"),
    ],
)
def test_refused_movielens_and_recbole(tmp_path: Path, name: str, text: str, fault: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_log(write(tmp_path, text, name))
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (COLONS, "movielens"),
        (TABS.replace("\n", "\r\n"), "movielens"),
        (WITH_HEADER, "movielens"),
        ("1\t2\t3\t4\n", "sequences"),
        ("user,item,rating,timestamp\n", "csv"),
        (INTER, "recbole"),
        ("user_id:token\titem_id:token\r\n1\t2", "recbole"),
        ("user_id\titem_id:token\n", "csv"),
    ],
)
def test_texts_are_recognised_by_their_first_lines(tmp_path: Path, text: str, name: str) -> None:
    assert recognise(write(tmp_path, text)) == name
