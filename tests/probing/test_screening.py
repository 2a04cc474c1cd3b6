"""Which runs of blocks turn the state least."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.probing.greedy import nearest_spans


@given(st.integers(1, 9), st.data())
def test_every_run_once_and_the_nearest_first(blocks: int, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, blocks))
    first = data.draw(st.integers(0, blocks - length))
    angular = np.random.default_rng(blocks).random((blocks + 1, blocks + 1))
    found = nearest_spans(angular, length, first=first)
    expected = [(start, start + length) for start in range(first, blocks - length + 1)]
    assert sorted(found) == expected
    distances = [angular[span] for span in found]
    assert distances == sorted(distances)


@pytest.mark.parametrize(("length", "first"), [(0, 0), (4, 0), (3, 1)])
def test_no_such_run(length: int, first: int) -> None:
    with pytest.raises(ValueError, match="no run"):
        nearest_spans(np.zeros((4, 4)), length, first=first)
