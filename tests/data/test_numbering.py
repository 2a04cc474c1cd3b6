from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data.log import encode_ids, natural_order, number_ids, used_only
from depthprobe.errors import BadInput


def test_natural_order() -> None:
    texts = ["10", "9", "09", "a10b2", "a10b10", "a9", "b", "", "9" * 5000]
    shuffled = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    expected = ["", "09", "9", "10", "9" * 5000, "a9", "a10b2", "a10b10", "b"]
    assert sorted(shuffled, key=natural_order) == expected


@given(st.lists(st.from_regex(r"[ ]?[1-9][0-9]{0,3}|[ab][0-9]{1,2}", fullmatch=True), min_size=1))
def test_numbers_follow_the_natural_order(raw: list[str]) -> None:
    stripped = [text.strip() for text in raw]
    if len(set(stripped)) < len(set(raw)):
        with pytest.raises(BadInput, match="blanks around"):
            number_ids(encode_ids(raw), "user")
        return
    codes, names = number_ids(encode_ids(raw), "user")
    assert names == sorted(set(stripped), key=natural_order)
    assert [names[code] for code in codes.tolist()] == stripped
    assert codes.dtype == np.int32


def test_whole_numbers_sort_as_other_ids_do() -> None:
    draw = [str(n) for n in np.random.default_rng(1).integers(1, 10**6, size=500)]
    fast = number_ids(encode_ids(draw), "item")[1]
    assert fast == sorted(set(draw), key=natural_order)
    slow = number_ids(encode_ids([*draw, "z"]), "item")[1]
    assert slow == [*fast, "z"]


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (["a", " "], "not blank"),
        (["a", "b", "a "], "data.item: expected item ids that differ in more than"),
        (["a" * 300], "at most 256 characters"),
    ],
)
def test_refuses(raw: list[str], fault: str) -> None:
    with pytest.raises(BadInput, match=fault) as caught:
        number_ids(encode_ids(raw), "item")
    assert len(str(caught.value)) < 300


def test_used_only_closes_gaps() -> None:
    codes, names = used_only(np.array([3, 1, 3], dtype=np.int32), ["a", "b", "c", "d"])
    assert (codes.tolist(), names) == ([1, 0, 1], ["b", "d"])
