from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.data import batches as module
from depthprobe.data.batches import length_buckets, negatives, pad
from depthprobe.data.log import Log, encode_ids
from depthprobe.data.prepared import order_log
from depthprobe.data.splits import leave_one_out
from depthprobe.data.storage import Sequences


@given(
    lengths=st.lists(st.integers(0, 30), max_size=200),
    batch_size=st.integers(1, 40),
    seed=st.none() | st.integers(0, 9),
    pool=st.integers(1, 5),
)
def test_every_index_once(lengths: list[int], batch_size: int, seed: int | None, pool: int) -> None:
    found = length_buckets(lengths, batch_size, seed=seed, pool=pool)
    assert sorted(i for batch in found for i in batch.tolist()) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in found)


def test_sorted_without_a_seed() -> None:
    found = length_buckets([1, 3, 2, 3, 1], 2)
    assert [batch.tolist() for batch in found] == [[1, 3], [2, 0], [4]]


def test_seeds_and_epochs() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, size=1000)

    def flat(**options: int) -> list[int]:
        return np.concatenate(length_buckets(lengths, 16, **options)).tolist()

    assert flat(seed=1) == flat(seed=1, epoch=0)
    assert flat(seed=1) != flat(seed=2)
    assert flat(seed=1) != flat(seed=1, epoch=1)
    # batches come in a random order: the mean length of the first half is that of all
    order = lengths[flat(seed=1, pool=100)]
    assert abs(order[:500].mean() - order.mean()) < 4


def padding_share(lengths: np.ndarray, batches: list[np.ndarray]) -> float:
    """The share of slots that are padding when each batch is as wide as its longest sequence."""
    slots = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    return 1 - int(lengths.sum()) / slots


def test_buckets_save_padding() -> None:
    lengths = np.random.default_rng(0).geometric(0.1, size=4000).clip(max=50)
    random = np.split(np.random.default_rng(1).permutation(4000), 50)
    bucketed = padding_share(lengths, length_buckets(lengths, 80, seed=0, pool=25))
    assert padding_share(lengths, random) > 0.5
    assert bucketed < 0.1
    assert padding_share(lengths, length_buckets(lengths, 80)) <= bucketed


def test_pad_by_hand() -> None:
    found = pad([np.array([5, 6], dtype=np.int32), np.array([], dtype=np.int32), np.array([7])])
    assert found.dtype == np.int64
    assert found.tolist() == [[5, 6], [0, 0], [7, 0]]
    assert pad([np.array([1]), np.array([2, 3])], value=-100).tolist() == [[1, -100], [2, 3]]
    assert pad([np.array([])]).shape == (1, 0)


def make(users: int, items: int, longest: int) -> Sequences:
    draw = np.random.default_rng(0)
    rows = [draw.permutation(items)[: draw.integers(1, longest + 1)] for _ in range(users)]
    rows[0] = draw.permutation(items)[:longest]
    rows.append(np.arange(items)[: max(3, longest)])
    owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    missing = np.setdiff1d(np.arange(items), np.concatenate(rows))
    owner = np.concatenate([owner, len(rows) + np.arange(len(missing))])  # single interactions
    raw = np.concatenate([*rows, missing])
    return order_log(Log(encode_ids(owner), encode_ids(f"{item:06d}" for item in raw)))


# many free items (drawn and thrown away), few (a key for each), exactly as many as asked for
@pytest.mark.parametrize(("items", "longest", "count"), [(500, 20, 50), (60, 20, 35), (60, 20, 40)])
def test_negatives_are_distinct_and_never_own(items: int, longest: int, count: int) -> None:
    sequences = make(300, items, longest)
    users = leave_one_out(sequences).test.users
    found = negatives(sequences, users, count=count, seed=3)
    assert found is not None
    assert found.shape == (len(users), count)
    assert found.dtype == np.int32
    assert found.min() >= 1
    assert found.max() <= items
    for place, user in enumerate(users):
        assert len(set(found[place].tolist())) == count
        assert not set(found[place].tolist()) & set(sequences.history(user).tolist())
    again, other = (negatives(sequences, users, count=count, seed=seed) for seed in (3, 4))
    assert again is not None
    assert again.tolist() == found.tolist()
    assert other is not None
    assert other.tolist() != found.tolist()


@pytest.mark.parametrize(("items", "count"), [(200, 20), (40, 25)])
def test_negatives_are_uniform(items: int, count: int) -> None:
    sequences = make(400, items, 8)
    users = leave_one_out(sequences).test.users
    drawn = np.zeros(items + 1)
    for seed in range(20):
        found = negatives(sequences, users, count=count, seed=seed)
        assert found is not None
        drawn += np.bincount(found.ravel(), minlength=items + 1)
    expected = np.zeros(items + 1)  # count / (free items) for each user who may get the item
    for user in users:
        free = np.setdiff1d(np.arange(1, items + 1), sequences.history(user))
        expected[free] += 20 * count / len(free)
    z = (drawn[1:] - expected[1:]) / np.sqrt(expected[1:] * (1 - count / items))
    assert abs(z).max() < 4.5
    assert z.std() < 1.25


def test_unlucky_rows_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no reserve about half of the rows lack a draw; they must come out right all the same."""
    sequences = make(300, 500, 20)
    users = leave_one_out(sequences).test.users
    again: list[int] = []
    by_keys = module._draw_by_keys

    def spy(rng: np.random.Generator, taken: np.ndarray, *arguments: Any) -> np.ndarray:
        again.append(len(taken))
        return by_keys(rng, taken, *arguments)

    monkeypatch.setattr(module, "_draw_by_keys", spy)
    monkeypatch.setattr(module.np, "sqrt", lambda _: -2.0)
    found = negatives(sequences, users, count=50, seed=0)
    assert found is not None
    assert 0 < sum(again) < len(found)
    for place, user in enumerate(users):
        assert len(set(found[place].tolist()) - set(sequences.history(user).tolist())) == 50


def test_too_small_a_catalogue() -> None:
    sequences = make(50, 60, 20)
    users = leave_one_out(sequences).test.users
    assert negatives(sequences, users, count=41, seed=0) is None
    assert negatives(sequences, users, seed=0) is None


def skewed(items: int) -> tuple[Sequences, np.ndarray]:
    """Users of four items each, and a pool that holds item i in proportion to 1 / i."""
    draw = np.random.default_rng(1)
    own = np.concatenate([draw.permutation(items)[:4] for _ in range(200)] + [np.arange(items)])
    users = np.append(np.repeat(np.arange(200), 4), 200 + np.arange(items))
    sequences = order_log(Log(encode_ids(users), encode_ids(f"{item:06d}" for item in own)))
    pool = np.repeat(np.arange(1, items + 1), np.maximum(1, 200 // np.arange(1, items + 1)))
    return sequences, pool


# drawn from the pool again and again, and with a key for each item
@pytest.mark.parametrize(("items", "count"), [(600, 40), (60, 30)])
def test_popular_negatives_are_a_successive_sample(items: int, count: int) -> None:
    """As often as by numpy's own weighted draws without replacement, item by item."""
    sequences, pool = skewed(items)
    users = leave_one_out(sequences).test.users
    weights = np.bincount(pool, minlength=items + 1).astype(float)
    found, expected = np.zeros(items + 1), np.zeros(items + 1)
    draw = np.random.default_rng(3)
    for seed in range(10):
        drawn = negatives(sequences, users, count=count, seed=seed, pool=pool)
        assert drawn is not None
        assert drawn.dtype == np.int32
        for place, user in enumerate(users):
            own = sequences.history(user)
            assert len(set(drawn[place].tolist())) == count
            assert not set(drawn[place].tolist()) & set(own.tolist())
            free = weights.copy()
            free[own] = 0
            other = draw.choice(items + 1, count, replace=False, p=free / free.sum())
            expected[other] += 1
        found += np.bincount(drawn.ravel(), minlength=items + 1)
    drawings = 10 * len(users)
    share = (found + expected) / (2 * drawings)
    spread = np.sqrt(2 * drawings * np.maximum(share * (1 - share), 1e-9))
    z = ((found - expected) / spread)[1:]
    assert abs(z).max() < 4.5
    assert z.std() < 1.2
    assert found[1] > 2 * found[items]


def test_popular_negatives_by_hand() -> None:
    """Of items held 1, 2 and 3 times, one is drawn in 1/6, 2/6 and 3/6 of the cases."""
    rows = [["a", "b", "c"]] * 400 + [["x", "y", "z"]]
    raw = [item for row in rows for item in row]
    owner = np.repeat(np.arange(len(rows)), 3)
    sequences = order_log(Log(encode_ids(owner), encode_ids(raw)))  # a b c x y z are 1 to 6
    pool = np.array([4, 5, 5, 6, 6, 6])
    drawn = [
        negatives(sequences, np.arange(400), count=1, seed=seed, pool=pool) for seed in range(10)
    ]
    counts = np.bincount(np.concatenate(drawn).ravel(), minlength=7)  # type: ignore[arg-type]
    assert counts[:4].tolist() == [0] * 4  # what the pool lacks is never drawn
    assert negatives(sequences, np.arange(400), count=4, seed=0, pool=pool) is None
    for item, share in ((4, 1 / 6), (5, 2 / 6), (6, 3 / 6)):
        assert abs(counts[item] - 4000 * share) < 4 * (4000 * share * (1 - share)) ** 0.5


def test_the_stream_takes_items_where_they_first_stand() -> None:
    """A later repeat must not move an item back: popular ones would then be drawn too rarely."""
    draw = np.random.default_rng(0)
    taken = np.zeros((7, 30), dtype=bool)
    taken[:, [0, 5]] = True
    for _ in range(20):
        draws = draw.integers(1, 30, size=(7, 40)).astype(np.int32)
        chosen, enough = module._first_distinct(draws, taken, 12)
        for row, items in enumerate(draws.tolist()):
            expected = [item for item in dict.fromkeys(items) if item != 5]
            assert enough[row] == (len(expected) >= 12)
            if enough[row]:
                assert chosen[row].tolist() == expected[:12]
