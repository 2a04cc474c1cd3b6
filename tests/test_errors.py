"""Text of others: what a terminal would obey is shown, what is long is cut, what is text stays."""

from __future__ import annotations

import os
import subprocess
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.errors import (
    LONGEST,
    BadInput,
    check_writable,
    one_line,
    shell_line,
    short,
    visible,
)

CHARACTERS = st.characters()  # halves of characters included


@given(st.text(CHARACTERS))
def test_nothing_is_sent_that_a_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert not any(unicodedata.category(each) in {"Cc", "Cs", "Zl", "Zp"} for each in shown)
    assert len(shown.splitlines()) <= 1
    shown.encode()  # raises for what no encoding can hold
    assert visible(shown) == shown


@pytest.mark.parametrize("text", ["Фильм 日本", "👩‍👩‍👧", "naïve – “quoted”", "عربي‏", "a\u00a0b"])
def test_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    "character", ["\x1b", "\x07", "\x7f", "\x9b", "\u202e", "\u2066", "\udc80"]
)
def test_what_is_not_sent_is_shown(character: str) -> None:
    assert visible(f"a{character}b") == f"a{ascii(character)[1:-1]}b"


@given(st.text(CHARACTERS, max_size=30), st.integers(1, 300))
def test_a_message_is_one_line_of_some_length(text: str, times: int) -> None:
    line = one_line(text * times)
    assert len(line) <= LONGEST
    assert "\n" not in line


def test_both_ends_of_a_long_message_stay() -> None:
    line = one_line(f"begin {'x' * 5000} end")
    assert (line[:6], line[-4:]) == ("begin ", " end")


def test_any_value_can_be_named() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, deep, "x" * 10**6, b"\0", None):
        assert len(short(value)) <= 120
        assert str(BadInput("key", value, "something else")).startswith("key: ")
    while deep:  # taken apart: to delete it whole would need as deep a stack
        deep = deep.pop()  # type: ignore[assignment]


def test_a_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(BadInput, match="the current folder is gone"):
        check_writable("output", Path("run"))
    check_writable("output", tmp_path / "run")


WORDS = ["", "a b", "a'b", "$(id)", "a\nid\n#", "\x1b'\\n`id`", "caf\udce9", "\u2028é", "-x=a"]


@pytest.mark.parametrize("word", WORDS)
def test_a_shell_takes_a_word_back(word: str) -> None:
    line = shell_line(["printf", "%s", word])
    assert len(line.splitlines()) == 1
    done = subprocess.run(["bash", "-c", line], capture_output=True, check=True)
    assert done.stdout == os.fsencode(word)
