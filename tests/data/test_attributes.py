"""Own columns: tables as people have them, and every refusal in one line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from depthprobe.data.readers.titles import read_attribute
from depthprobe.errors import BadInput

WANTED = {"1", "2", "3"}


def read(setting: str, what: Any = "user", wanted: set[str] = WANTED) -> tuple[str, dict[str, str]]:
    return read_attribute(setting, what, field="protocol.user_slices", wanted=wanted)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


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
def test_tables_with_a_header(text: str, column: str, tmp_path: Path) -> None:
    path = write(tmp_path / "users.txt", text)
    assert read(f"{path}:{column}") == ("country", {"1": "de", "2": "fr"})
    packed = tmp_path / "users.txt.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read(f"{packed}:{column}")[1] == {"1": "de", "2": "fr"}


def test_parquet_with_numbers_and_gaps(tmp_path: Path) -> None:
    frame = pd.DataFrame({"item_id": [1, 2, 3, 7], "year": ["1995", None, "1996", "x"]})
    frame.to_parquet(tmp_path / "items.parquet", index=False)
    found = read(f"{tmp_path / 'items.parquet'}:year", "item")
    assert found == ("year", {"1": "1995", "3": "1996"})


def test_long_values_are_cut_and_blanks_collapsed(tmp_path: Path) -> None:
    path = write(tmp_path / "items.csv", f"item_id,brand\n1,  a   b \n2,{'x' * 99}\n")
    assert read(f"{path}:brand", "item")[1] == {"1": "a b", "2": "x" * 40}


@pytest.mark.parametrize(
    ("text", "setting", "said"),
    [
        ("", "country", "FILE:COLUMN"),
        ("", "{}", "there is no file|FILE:COLUMN"),
        ("user_id,country\n1,de\n", "{}:contry", "did you mean country"),
        ("name,country\n1,de\n", "{}:country", "none is known as the user's id"),
        ("user_id,country\n9,de\n", "{}:country", "knows none of the log's users, such as '1'"),
        ("user_id,country\n1,de\n1,fr\n", "{}:country", "two values, 'de' and 'fr'"),
        ("user_id,country\n1,de,x\n", "{}:country", "line 2 has 3 columns, the header 2"),
        ("", "{}:country", "a column of"),
        ('user_id,country\n1,"de\n', "{}:country", "can't be read"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, setting: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "users.csv", text)
    with pytest.raises(BadInput, match=said) as caught:
        read(setting.format(path))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "users.csv").write_bytes(b"user_id,country\n1,\xff\n")
    with pytest.raises(BadInput, match="not UTF-8"):
        read(f"{tmp_path / 'users.csv'}:country")
    (tmp_path / "users.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInput, match="a whole Parquet file"):
        read(f"{tmp_path / 'users.parquet'}:country")
