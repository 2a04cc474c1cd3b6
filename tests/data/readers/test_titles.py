"""Titles of items, and other columns of users and items."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest

from depthprobe.data.log import Log, encode_ids
from depthprobe.data.readers.formats import read_log
from depthprobe.data.readers.titles import companion, read_attribute, read_values, with_titles
from depthprobe.errors import BadInput
from depthprobe.study import Columns

WANTED = {"B1", "B2", "1", "2", "3"}
TITLES = {"B1": 'Soap, "blue"', "B2": "Thé & lemon"}


def titles(path: Path, columns: Columns | None = None, wanted: set[str] = WANTED) -> dict[str, str]:
    named = columns or Columns()
    return read_values(path, "item", wanted=wanted, key=named.item, value=named.title)


def write(folder: Path, text: str | bytes, name: str = "items") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def metadata(year: int) -> str:
    """What Amazon's metadata of a year look like."""
    escaped = {"B1": "Soap, &quot;blue&quot;", "B2": "Th&eacute;  &amp; lemon\n"}
    key = "parent_asin" if year == 2023 else "asin"
    lines = [{key: item, "title": title, "price": None} for item, title in escaped.items()]
    lines.insert(1, {key: "B0", "imUrl": "http://x", "related": {"also_bought": ["B1"]}})
    return "".join((repr(one) if year == 2014 else json.dumps(one)) + "\n" for one in lines)


TEXTS = {
    "items.tsv": 'item_id\ttitle\nB1\tSoap,  "blue"\n\n B2 \tThé & lemon\r\n',
    "tsv with more columns": 'price\tname\tid\n1\tSoap, "blue"\tB1\n2\tThé & lemon\tB2\n',
    "csv": 'asin,price,title\nB1,1,"Soap, ""blue"""\nB2,,"Thé\n & lemon"\n',
    "semicolons": '\ufeffitemId;Title\nB1;"Soap, ""blue"""\nB2;Thé & lemon\n',
    "recbole": 'item_id:token\tclass:token\titem_name:token_seq\nB1\tx\tSoap, "blue"\n'
    "B2\ty\tThé & lemon\n",
    "movies.dat": 'B1::Soap, "blue"::Drama\nB2::Thé & lemon::Drama\n',
    "latin movies.dat": 'B1::Soap, "blue"::Drama\nB2::Thé & lemon::Drama\n'.encode("iso-8859-1"),
    "2014": metadata(2014),
    "2018": metadata(2018),
    "2023": metadata(2023),
}


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("form", TEXTS)
def test_each_form_gives_the_same_titles(tmp_path: Path, form: str, compress: type[bytes]) -> None:
    text = TEXTS[form]
    path = write(tmp_path, compress(text.encode() if isinstance(text, str) else text))
    assert titles(path) == TITLES
    assert titles(path, wanted={"B2", "other"}) == {"B2": TITLES["B2"]}


@pytest.mark.parametrize("half", [r"\ud83d", r"\ude00", r"x\uD83D\ud83d"])
@pytest.mark.parametrize("form", ["json", "literal", "table"])
def test_half_a_surrogate_pair_is_replaced(tmp_path: Path, half: str, form: str) -> None:
    text = f'"title": "Soap {half} blue"'
    line = {"json": f'{{"asin": "B1", {text}}}\n', "literal": f"{{'asin': 'B1', {text}}}\n"}
    path = write(tmp_path, line.get(form, "id\ttitle\nB1\tSoap \ufffd blue\n"))
    found = titles(path)["B1"]
    assert found.encode().startswith(b"Soap ")
    assert found.endswith("\ufffd blue")


@pytest.mark.parametrize("delimiter", ["\t", ",", ";"])
def test_quotes_are_read_as_in_a_log(tmp_path: Path, delimiter: str) -> None:
    def table(*rows: tuple[str, str]) -> Path:
        lines = [("item_id", "title"), *rows]
        return write(tmp_path, "".join(delimiter.join(row) + "\n" for row in lines))

    whole = table(("1", '"Both"'), ("2", 'In "the" middle'))
    assert titles(whole) == {"1": "Both", "2": 'In "the" middle'}
    stray = table(("1", '"Opening only'), ("2", "x"), ("3", 'Closing only"'))
    if delimiter == "\t":
        assert titles(stray) == {"1": '"Opening only', "2": "x", "3": 'Closing only"'}
    else:  # a comma may lie between quotes, so that they say where a column ends
        with pytest.raises(BadInput, match="quote"):
            titles(stray)


def test_u_item(tmp_path: Path) -> None:
    path = write(tmp_path, "1|Amélie (2001)|01-Jan-2001||x|0\n2||||\n".encode("iso-8859-1"))
    assert titles(path) == {"1": "Amélie (2001)"}


def test_parquet_with_integer_ids(tmp_path: Path) -> None:
    table = pa.table({"title": ["a", None, "c  c"], "movieId": [3, 1, 2]})
    pa.parquet.write_table(table, tmp_path / "items")
    assert titles(tmp_path / "items") == {"3": "a", "2": "c c"}


def test_columns_that_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "id,title,label\nB1,x,Soap\n")
    assert titles(path, Columns(title="label")) == {"B1": "Soap"}
    # the log's item column need not be called so in the item file
    assert titles(path, Columns(item="product")) == {"B1": "x"}
    lines = write(tmp_path, '{"asin": "B0"}\n{"asin": "B1", "label": "Soap"}\n', "meta")
    assert titles(lines, Columns(title="label")) == {"B1": "Soap"}
    with pytest.raises(BadInput, match="did you mean label"):
        titles(path, Columns(title="lable"))


def test_lines_of_other_items_are_not_parsed(tmp_path: Path) -> None:
    path = write(tmp_path, metadata(2018) + "{'asin': 'B2', 'title' oops\n")
    assert titles(path, wanted={"B1"}) == {"B1": TITLES["B1"]}
    with pytest.raises(BadInput, match="line 4 is"):
        titles(path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "it is empty"),
        ("1\tsoap\n", "its columns are 1, soap, and none is known as the item's; expected item_id"),
        ("item_id\ttitle\n1\tsoap\n1 soap\n", "line 3 has 1; expected 2 columns"),
        ("item_id,title\n,soap\n", "line 2 has no item"),
        ("item_id,colour\n1,blue\n", "none is known as the title's; say --title-column"),
        (
            "item_id,title\n1,soap\n 1 ,tea\n",
            "item '1' has both 'soap' and 'tea'; expected one value",
        ),
        (b"item_id,title\n1,\xff\n", "line 2 is not UTF-8"),
        ("1::soap::x\ntea\n", "line 2 has no '::'"),
        ('{"asin": "1", "title": "soap"}\n{"asin": \n', "line 2 is"),
        ('{"asin": "1", "title": ["soap"]}\n', "line 1 has no item id, or a title that is no text"),
        ('{"title": "soap"}\n', "its columns are title, and none is known as the item's"),
        ('["1", "soap"]\n', "expected a JSON object on each line"),
        (gzip.compress(metadata(2018).encode())[:-9], "cut off"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, text: str | bytes, fault: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        titles(path)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("log", "files", "chosen"),
    [
        ("sequences.txt", ["items.tsv", "movies.dat"], "items.tsv"),
        ("ratings.dat", ["movies.dat", "users.dat"], "movies.dat"),
        ("ratings.csv", ["movies.csv.zst"], "movies.csv.zst"),
        ("u.data", ["u.item", "u.user"], "u.item"),
        ("a.inter", ["a.item", "b.item", "a.user"], "a.item"),
        ("a.train.inter", ["a.item"], "a.item"),
        ("a.inter", ["b.item"], None),
        (
            "reviews_Beauty_5.json.gz",
            ["meta_Beauty.json.gz", "meta_Toys.json.gz"],
            "meta_Beauty.json.gz",
        ),
        (
            "All_Beauty.jsonl",
            ["meta_Beauty.jsonl", "meta_All_Beauty.jsonl"],
            "meta_All_Beauty.jsonl",
        ),
        ("movies.csv", [], None),
    ],
)
def test_companions(tmp_path: Path, log: str, files: list[str], chosen: str | None) -> None:
    for name in [log, *files]:
        write(tmp_path, "", name)
    assert companion(tmp_path / log) == (None if chosen is None else tmp_path / chosen)


def log_with(items: list[str], titles: dict[str, str] | None = None) -> Log:
    return Log(encode_ids("u" * len(items)), encode_ids(items), titles=titles or {})


def test_titles_are_those_of_the_raw_ids(tmp_path: Path) -> None:
    path = write(tmp_path, "item_id\ttitle\n1\tsoap\n3\ttea\n", "items.tsv")
    log = with_titles(
        log_with([" 1", "2", "3"]), tmp_path / "log.csv", items=None, columns=Columns()
    )
    assert log.titles == {" 1": "soap", "3": "tea"}
    own = log_with(["1"], {"1": "own"})
    assert (
        with_titles(own, tmp_path / "log.csv", items=None, columns=Columns()).titles == own.titles
    )
    replaced = with_titles(own, tmp_path / "log.csv", items=path, columns=Columns())
    assert replaced.titles == {"1": "soap"}


def test_an_item_file_that_does_not_help_is_noted_or_refused(tmp_path: Path) -> None:
    log, source = log_with(["i1"]), tmp_path / "log.csv"
    other = write(tmp_path, "item_id\ttitle\n1\tsoap\n", "items.tsv")
    noted = with_titles(log, source, items=None, columns=Columns())
    assert noted.titles == {}
    assert "no titles from items.tsv: it knows none of the log's items, such as" in noted.notes[0]
    for items, fault in ((other, "knows none"), (tmp_path / "nowhere.csv", "No such file")):
        with pytest.raises(BadInput, match=rf"data\.items: .*{fault}"):
            with_titles(log, source, items=items, columns=Columns())


def test_a_named_title_column_may_be_the_item_files_alone(tmp_path: Path) -> None:
    source = write(tmp_path, "user,item\na,i1\nb,i1\n", "log.csv")
    named = Columns(title="label")
    with pytest.raises(BadInput, match=r"data\.columns\.title: expected .*neither has it.*'label'"):
        read_log(source, columns=named)
    path = write(tmp_path, "item,label\ni1,Soap\n", "items.csv")
    assert read_log(source, columns=named).titles == {"i1": "Soap"}
    assert read_log(source, columns=named, items=path).titles == {"i1": "Soap"}
    with pytest.raises(BadInput, match="did you mean label"):
        read_log(source, columns=Columns(title="lable"))


def read(setting: str, what: Any = "user", wanted: set[str] = WANTED) -> tuple[str, dict[str, str]]:
    return read_attribute(setting, what, field="protocol.user_slices", wanted=wanted)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("user_id,country\n1,de\n2,fr\n9,it\n", "country"),
        ("country\tuser\nde\t1\nfr\t2\n\t3\n", "country"),
        ("user_id:token\tcountry:token\n1\tde\n2\tfr\n", "country"),
        ('id;country;note\n 1 ; de ;"a;b"\n2;fr;\n', "country"),
        ("\ufeffuser_id|country\n1|de\n2|fr\n2|fr\n", "country"),
    ],
)
def test_attributes_of_tables_with_a_header(text: str, column: str, tmp_path: Path) -> None:
    path = write(tmp_path, name="users.txt", text=text)
    assert read(f"{path}:{column}") == ("country", {"1": "de", "2": "fr"})
    packed = tmp_path / "users.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(f"{packed}:{column}")[1] == {"1": "de", "2": "fr"}


def test_attributes_of_parquet_with_numbers_and_gaps(tmp_path: Path) -> None:
    frame = pd.DataFrame({"item_id": [1, 2, 3, 7], "year": ["1995", None, "1996", "x"]})
    frame.to_parquet(tmp_path / "items.parquet", index=False)
    found = read(f"{tmp_path / 'items.parquet'}:year", "item")
    assert found == ("year", {"1": "1995", "3": "1996"})


def test_long_values_are_cut_and_blanks_collapsed(tmp_path: Path) -> None:
    path = write(tmp_path, name="items.csv", text=f"item_id,brand\n1,  a   b \n2,{'x' * 99}\n")
    assert read(f"{path}:brand", "item")[1] == {"1": "a b", "2": "x" * 40}


@pytest.mark.parametrize(
    ("text", "setting", "fault"),
    [
        ("", "{}", "there is no file|FILE:COLUMN"),
        ("user_id,country\n1,de\n", "{}:contry", "did you mean country"),
        ("name,country\n1,de\n", "{}:country", "none is known as the user's"),
        ("user_id,country\n9,de\n", "{}:country", "knows none of the log's users, such as '1'"),
        ("user_id,country\n1,de\n1,fr\n", "{}:country", "both 'de' and 'fr'"),
        ("", "{}:country", "it is empty"),
        ('user_id,country\n1,"de\n2,fr\n', "{}:country", "a quote isn't closed"),
    ],
)
def test_refused_attributes(text: str, setting: str, fault: str, tmp_path: Path) -> None:
    path = write(tmp_path, name="users.csv", text=text)
    with pytest.raises(BadInput, match=fault) as caught:
        read(setting.format(path))
    assert "\n" not in str(caught.value)


def test_attributes_of_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_bytes(b"user_id,country\n1,\xff\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        read(f"{tmp_path / 'users.csv'}:country")
    (tmp_path / "users.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match="a whole Parquet file"):
        read(f"{tmp_path / 'users.parquet'}:country")
