"""Which items are asked where, and the loss of them against a direct computation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training.objectives import NextItem, last_only, make_batch

CPU = torch.device("cpu")
WINDOWS = [np.array([5, 6, 7]), np.array([8, 9]), np.array([1, 2, 3, 4])]


def test_every_position_is_asked() -> None:
    batch = make_batch(WINDOWS, np.array([0, 1]), CPU, "every")
    assert batch.inputs.tolist() == [[5, 6], [8, 9]]  # what follows the last position is not read
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.rows.tolist() == [0, 1, 2]  # of [5, 6, 8, 9]; nothing is asked at the padding
    assert (batch.lengths.tolist(), batch.count) == ([2, 1], 3)
    assert batch.last.tolist() == [7, 9]


def test_the_last_is_asked_alone() -> None:
    batch = make_batch(WINDOWS, np.array([2, 1, 0]), CPU, "last")
    assert batch.inputs.tolist() == [[1, 2, 3], [8, 9, 0], [5, 6, 7]]
    assert batch.targets.tolist() == batch.last.tolist() == [4, 9, 7]
    assert batch.rows.tolist() == [2, 3, 7]
    assert batch.count == 3


def test_a_batch_can_be_asked_at_its_last_positions_alone() -> None:
    every, last = (make_batch(WINDOWS, np.array([2, 1, 0]), CPU, o) for o in ("every", "last"))
    found = last_only(every)
    assert found.objective == "last"
    for name in ("rows", "targets", "last", "inputs"):
        assert torch.equal(getattr(found, name), getattr(last, name))


def vectors_alone(model: nn.Module, window: np.ndarray) -> Tensor:
    """User vectors of a window without its last item, at every position: nothing is padded."""
    found: Tensor = model(torch.from_numpy(window[:-1])[None])[0]
    return found


@pytest.mark.parametrize("objective", ["every", "last"])
@pytest.mark.parametrize("kind", ["sasrec", "recommender"])
def test_loss_is_the_mean_over_what_is_asked(
    kind: str, objective: str, make_recommender: Callable[..., Recommender]
) -> None:
    torch.manual_seed(0)
    baseline = SASRec(12, width=8, blocks=1, heads=2, drop=0.1, longest=10)
    model = (baseline if kind == "sasrec" else make_recommender()).double().eval()
    recipe = Recipe(objective=objective)  # type: ignore[arg-type]
    batch = make_batch(WINDOWS, np.array([2, 0, 1]), CPU, recipe.objective)
    expected = []
    for window in WINDOWS:
        vectors, targets = vectors_alone(model, window), torch.from_numpy(window[1:])
        if objective == "last":
            vectors, targets = vectors[-1:], targets[-1:]
        scores = vectors @ model.item_matrix()[1:].T  # type: ignore[operator]
        expected += cross_entropy(scores, targets - 1, reduction="none").tolist()
    loss = NextItem(model, recipe)(batch)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-7)  # norms run in float32


def test_a_suffix_needs_to_know_where_histories_end(
    make_recommender: Callable[..., Recommender],
) -> None:
    model = make_recommender(suffix=(5, 2))
    batch = make_batch(WINDOWS, np.array([0]), CPU, "every")
    with pytest.raises(ValueError, match="suffix"):
        NextItem(model, Recipe())(batch)
