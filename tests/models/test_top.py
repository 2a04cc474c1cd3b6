"""The best columns of scores, against a stable sort of each row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.models.recommender import best_columns

INF = float("inf")


def naive(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda column: -row[column])[:k]


@given(st.data())
def test_agrees_with_a_stable_sort(data: st.DataObject) -> None:
    n_rows, width = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    value = st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0, INF])  # few values: many ties
    row = st.lists(value, min_size=width, max_size=width)
    scores = data.draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    k = data.draw(st.integers(1, width))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    given_scores = torch.tensor(scores, dtype=dtype).view(n_rows, width)
    kept = given_scores.clone()
    columns, values = best_columns(given_scores, k)
    assert columns.dtype == torch.int64
    assert columns.tolist() == [naive(row, k) for row in scores]
    assert values.tolist() == [[row[c] for c in naive(row, k)] for row in scores]
    assert torch.equal(given_scores, kept)


@pytest.mark.parametrize("levels", [1, 3, 50, 10**6])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_wide_rows(levels: int, k: int) -> None:
    """Wide enough for other ways through ``topk``, with ties in all, some or none of the rows."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(levels, (23, 3001), generator=draw).double()
    columns, values = best_columns(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, expected.indices[:, :k])
    assert torch.equal(values, expected.values[:, :k])


def test_nan_is_above_all_as_for_topk() -> None:
    scores = torch.tensor([[1.0, torch.nan, 1.0, 1.0, 0.0]])
    assert best_columns(scores, 3)[0].tolist() == [[1, 0, 2]]
