"""What ids tell of where they came from."""

from __future__ import annotations

import numpy as np
import pytest

from depthprobe.data.log import encode_ids, id_notes


def notes(*names: str) -> list[str]:
    return id_notes(encode_ids(names), "item")


@pytest.mark.parametrize("other", ["7.0", "07", "7.", "+7", "7e+0", "0.7e1"])
def test_spellings_of_one_number(other: str) -> None:
    found = notes("7", " 8", "i9", other)
    assert "1 item ids spell a number that another one spells too" in found[0]
    assert f"such as 7 and {other}" in found[0]


def test_ids_that_are_fine() -> None:
    assert notes("7", "8", "i7", "i07", "7-0", "B007", "1_0", "7.5", "10" * 20, "x1e5") == []
    assert notes("1e5", "100000", "12E3", "713752e1", "3fa", "0ab") == []  # hexadecimal
    assert notes(*map(str, range(5000))) == []
    assert notes(*map(str, range(10**18, 10**18 + 40))) == []


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("form", [".0f", ".1f", ".25e"])
def test_ids_that_went_through_floats(kind: type[np.floating], form: str) -> None:
    limit = 2 ** (np.finfo(kind).nmant + 1)
    rounded = [float(kind(limit + n)) for n in range(60)]
    found = notes(*(format(number, form) for number in rounded))
    assert f"exact as {kind.__name__}: if they were written as such" in found[-1]
    assert notes(*(str(limit + n) for n in range(60))) == []


@pytest.mark.parametrize("name", ["1.67772e+07", "1e+05", "1.2E7"])
def test_ids_that_a_program_rounded(name: str) -> None:
    assert f"such as {name}: if they were rounded" in notes(name, "12")[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("café", "cafe\u0301"),  # composed or not
        ("a b", "a\u00a0b"),  # a blank that doesn't break
        ("u1", "\ufeffu1"),  # a byte order mark, as in files joined to one
        ("u1", "u\u200b1"),  # no width
        ("12", "１２"),  # full width
    ],
)
def test_ids_that_look_the_same(one: str, other: str) -> None:
    (note,) = notes("x", one, other, "y")
    assert note.startswith("1 item ids look like another one")
    assert f"such as {ascii(one)} and {ascii(other)}: " in note
    assert note.isascii()
    assert notes(one, "y") == notes(other, "y") == []


@pytest.mark.parametrize("name", ["nan", "None", "NULL", "<NA>", "NaT", "N/A", "\\N", "(not set)"])
def test_ids_that_stand_for_missing_ones(name: str) -> None:
    assert notes("a", name, name) == [
        f"2 interactions are of the item {name!r}: is the id missing?"
    ]


def test_ids_with_characters_that_could_not_be_read() -> None:
    (note,) = notes("Caf\ufffd", "b")
    assert note.startswith("1 item ids hold \ufffd, such as 'Caf\ufffd'")
