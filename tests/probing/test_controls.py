"""Shuffled histories where order is nothing or all; sets of blocks against random ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.probing.controls import (
    against_random,
    by_score,
    random_sets,
    shuffled,
    without_order,
)

CPU = torch.device("cpu")
ITEMS = 200


class Reader(nn.Module):
    """Reads the sum of a history's items, or the last one alone, and knows what follows an item."""

    def __init__(self, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.table = torch.eye(ITEMS + 1, dtype=torch.float64)  # whole numbers: sums are exact

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        if self.last:
            histories = histories[torch.arange(len(lengths)), lengths - 1][:, None]
        known = self.table.roll(1, dims=1) * (torch.arange(ITEMS + 1) > 0)[:, None]
        return known[histories].sum(dim=1)  # item i votes for item i + 1

    def item_matrix(self) -> Tensor:
        return self.table


def walks(users: int) -> EvalSet:
    """Each user walks up the items: the next one follows from the last one."""
    starts = np.random.default_rng(3).integers(1, ITEMS - 40, size=users)
    histories = [np.arange(start, start + 30, dtype=np.int32) for start in starts]
    return EvalSet(np.arange(users) + 7, histories, starts + 30, seen=histories, negatives=None)


@pytest.mark.parametrize(("last", "lost"), [(False, 0.0), (True, 0.96)])
def test_what_order_is_worth(last: bool, lost: float) -> None:
    users = walks(200)
    found = without_order(lambda each: [evaluate(Reader(last=last), each, device=CPU)], users)
    assert found["user"].tolist() == users.users.tolist()
    assert set(found["place"]) == {0}
    own = per_user_metric(found["rank"].to_numpy(), "NDCG@10").mean()
    draws = [
        per_user_metric(found[f"shuffled-{k}"].to_numpy(), "NDCG@10").mean() for k in range(1, 6)
    ]
    assert own > 0.3
    if not last:
        assert draws == [own] * 5
    else:
        assert 1 - np.mean(draws) / own == pytest.approx(lost, abs=0.02)
        assert len(set(draws)) > 1


def test_a_draw_is_the_same_order_for_everybody() -> None:
    users = walks(20)
    once, again, other = shuffled(users, 1), shuffled(users, 1), shuffled(users, 2)
    for before, one, two, three in zip(
        users.histories, once.histories, again.histories, other.histories, strict=True
    ):
        assert one.tolist() == two.tolist() != three.tolist()
        assert sorted(one) == before.tolist() != one.tolist()
    assert any(
        one[-1] != before[-1] for one, before in zip(once.histories, users.histories, strict=True)
    )


def test_random_sets() -> None:
    sets = random_sets(4, 12)
    assert len(set(sets)) == 20
    assert all(len(kept) == 4 and list(kept) == sorted(set(kept)) for kept in sets)
    assert all(0 <= block < 12 for kept in sets for block in kept)
    assert sets == random_sets(4, 12) != random_sets(4, 12, seed=1)
    assert len(random_sets(2, 6)) == 15  # all there are


def test_blocks_by_score() -> None:
    damage = [0.5, 0.1, 0.1, 0.9]
    assert by_score(damage, 2) == (0, 3)
    assert by_score(damage, 2, reverse=True) == (1, 2)
    assert by_score(damage, 3) == (0, 2, 3)  # of equals the later one stays


def test_against_random_by_hand() -> None:
    def ranks(*values: float) -> dict[str, np.ndarray]:
        return {"full": np.array(values)}

    drawn = {(0,): ranks(1, 1), (1,): ranks(1, 2), (2,): ranks(3, 3), (0, 1): ranks(1, 1)}
    chosen = {("good", (0,)): ranks(1, 1), ("bad", (2,)): ranks(4, 4), ("mid", (1,)): ranks(1, 3)}
    found = against_random(chosen, drawn)
    own = found[found["metric"] == "MRR"].set_index(["selection", "depth", "kept"])
    assert own.loc[("random", 1, "1"), "value"] == 0.75
    assert np.isnan(own.loc[("random", 1, "1"), "p"])
    # of the two other sets of one block; the set of two is no rival
    for name, kept, beats in (("good", "0", 2), ("bad", "2", 0), ("mid", "1", 1)):
        assert own.loc[(name, 1, kept), "beats"] == beats / 2
        assert own.loc[(name, 1, kept), "p"] == pytest.approx((3 - beats) / 3)
