"""SASRec is causal, ignores padding, drops the share it is told; popularity counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from depthprobe.models.recommender import Popularity
from depthprobe.models.sasrec import SASRec, dropout


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


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)  # no multiple of four: the last word is cut
    out = dropout(x, share, True)
    dropped = (out == 0).double()
    # a million draws: five standard deviations of a share of one half are .0025
    assert dropped.mean().item() == pytest.approx(share, abs=0.0025)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - share)))
    # the four draws of a word are independent of each other
    words = dropped.flatten()[: 4 * 249_000].view(-1, 4)
    assert (torch.corrcoef(words.T) - torch.eye(4)).abs().max() < 0.011
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_dropout_follows_the_seed_and_is_off_outside_training() -> None:
    x = torch.ones(50, 3)
    torch.manual_seed(3)
    one = dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(one, dropout(x, 0.5, True))
    assert not torch.equal(one, dropout(x, 0.5, True))
    assert dropout(x, 0.5, False) is x


def test_popularity_scores_are_training_counts() -> None:
    model = Popularity(np.array([1, 3, 3, 3, 2, 2]), 4)
    vectors = model.encode(torch.tensor([[1], [2]]), torch.tensor([1, 1]))
    assert (vectors @ model.item_matrix().T).tolist() == [[0, 1, 2, 3, 0]] * 2
