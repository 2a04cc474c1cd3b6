"""SASRec is causal, ignores padding, and popularity counts."""

from __future__ import annotations

import numpy as np
import torch

from depthprobe.models.popularity import Popularity
from depthprobe.models.sasrec import SASRec


def make() -> SASRec:
    torch.manual_seed(0)
    return SASRec(9, width=8, blocks=2, heads=2, drop=0.5, longest=6).double().eval()


def test_no_position_sees_a_later_one() -> None:
    model = make()
    one, two = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 8, 9]])
    assert torch.equal(model(one)[:, :2], model(two)[:, :2])
    assert not torch.allclose(model(one)[:, 2], model(two)[:, 2])


def test_padding_changes_nothing() -> None:
    model = make()
    short, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0, 0]])
    lengths = torch.tensor([2])
    torch.testing.assert_close(model.encode(short, lengths), model.encode(padded, lengths))
    assert model.items.weight[0].abs().sum() == 0


def test_order_matters_and_dropout_is_off_in_evaluation() -> None:
    model, lengths = make(), torch.tensor([3])
    one = model.encode(torch.tensor([[1, 2, 3]]), lengths)
    assert torch.equal(one, model.encode(torch.tensor([[1, 2, 3]]), lengths))
    assert not torch.allclose(one, model.encode(torch.tensor([[2, 1, 3]]), lengths))


def test_popularity_scores_are_training_counts() -> None:
    model = Popularity(np.array([1, 3, 3, 3, 2, 2]), 4)
    vectors = model.encode(torch.tensor([[1], [2]]), torch.tensor([1, 1]))
    assert (vectors @ model.item_matrix().T).tolist() == [[0, 1, 2, 3, 0]] * 2
