from __future__ import annotations

from pathlib import Path

import pytest

from depthprobe.data.readers.formats import is_recbole, read_log, read_recbole
from depthprobe.errors import BadInput
from depthprobe.study import Columns

INTER = """user_id:token\titem_id:token\trating:float\ttimestamp:float
u1\t"i1\t4\t20
u2\ti2\t3.5\t10
"""
ITEM = """item_id:token\tmovie_title:token_seq\tclass:token_seq
"i1\tThe "Blue" one\tDrama
i2\tRed  soap\tComedy
"""


def write(folder: Path, text: str, name: str = "x.inter") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_quotes_are_plain_text(tmp_path: Path) -> None:
    write(tmp_path, ITEM, "x.item")
    log = read_log(write(tmp_path, INTER))
    assert log.items.names == ['"i1', "i2"]
    assert log.ratings is not None
    assert log.ratings.tolist() == [4.0, 3.5]
    assert log.times is not None
    assert log.times.tolist() == [20, 10]
    assert log.titles == {'"i1': 'The "Blue" one', "i2": "Red soap"}
    assert log.name == "x"


@pytest.mark.parametrize("kind", ["", ":token"])
def test_columns_are_named_with_or_without_their_types(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, "who:token\titem_id:token\twhat:token\nu1\ti1\tx\nu1\ti2\ty\n")
    log = read_recbole(path, Columns(user=f"who{kind}", item=f"what{kind}"))
    assert (log.users.names, log.items.names) == (["u1"], ["x", "y"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "session_id:token\titem_id_list:token_seq\titem_id:token\n1\t2 3\t4\n",
            "a row of item_id_list:token_seq is a list of items; expected an interaction a row",
        ),
        ("user_id:token\tcolour:token\n1\tred\n", "none is known as the item's"),
        (INTER + "u3\ti1\n", "line 4 has 2"),
        (INTER + "u3\ti1\tgood\t30\n", "line 4 has the rating 'good'"),
        (INTER + "u3\ti1\t5\t\n", "line 4 has no time"),
    ],
)
def test_refuses_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        read_log(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_item_file_without_titles_is_told(tmp_path: Path) -> None:
    write(tmp_path, "item_id:token\tclass:token_seq\ni2\tComedy\n", "x.item")
    log = read_log(write(tmp_path, INTER))
    assert log.titles == {}
    assert log.notes == ("x.item beside the log has no title column",)


def test_recognises_typed_headers() -> None:
    assert is_recbole(INTER)
    assert is_recbole("user_id:token\titem_id:token\r\n1\t2")
    assert not is_recbole("user_id\titem_id:token\n")
    assert not is_recbole("user_id:int\titem_id:token\n")
    assert not is_recbole("")
