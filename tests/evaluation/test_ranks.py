from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.evaluation.ranks import rank_targets, rank_users, top_items

INF = float("inf")


def naive_rank(scores: list[float], target: int, keep: list[bool] | None = None) -> float:
    """Mean place of the target over all orders that agree with the scores."""
    above = tied = 0
    for item, score in enumerate(scores):
        if item == target or (keep is not None and not keep[item]):
            continue
        above += score > scores[target]
        tied += score == scores[target]
    return 1 + above + tied / 2


@pytest.mark.parametrize(
    ("scores", "target", "rank"),
    [
        ([3, 2, 1], 0, 1),
        ([3, 2, 1], 2, 3),
        ([1, 1, 1, 1], 2, 2.5),  # constant scores: the middle, not the top
        ([5, 5, 1], 0, 1.5),
        ([5, 5, 1], 2, 3),
        ([-INF, 0, -INF], 0, 2.5),
        ([INF, INF, 0], 1, 1.5),
        ([7], 0, 1),
    ],
)
def test_hand_worked(scores: list[float], target: int, rank: float) -> None:
    found = rank_targets([scores], [target])
    assert found.tolist() == [rank]
    assert found.dtype == torch.float64


def test_excluded_items_are_not_counted_and_the_target_always_is() -> None:
    scores = [[4.0, 3.0, 3.0, 2.0]] * 3
    exclude = [[True, False, False, False], [False, False, True, False], [True] * 4]
    assert rank_targets(scores, [1, 1, 1], exclude).tolist() == [1.5, 2, 1]


@given(st.data())
def test_agrees_with_a_loop(data: st.DataObject) -> None:
    n_rows, n_items = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    value = st.sampled_from([-INF, -1.0, 0.0, 0.5, INF])  # few values: many ties
    row = st.lists(value, min_size=n_items, max_size=n_items)
    scores = data.draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    targets = [data.draw(st.integers(0, n_items - 1)) for _ in range(n_rows)]
    keep = np.array(
        [[data.draw(st.booleans()) for _ in range(n_items)] for _ in range(n_rows)], dtype=bool
    )
    found = rank_targets(np.array(scores), np.array(targets), ~keep)
    assert found.tolist() == [
        naive_rank(s, t, k) for s, t, k in zip(scores, targets, keep.tolist(), strict=True)
    ]
    assert all(1 <= rank <= n_items for rank in found.tolist())


def test_kinds_of_input_agree() -> None:
    scores = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(6)
    expected = rank_targets(scores.double(), targets)
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        assert torch.equal(rank_targets(scores.to(dtype), targets), expected)
    assert torch.equal(rank_targets(scores.numpy(), targets.numpy().astype(np.int32)), expected)
    assert torch.equal(rank_targets(scores.float().requires_grad_(), targets), expected)
    assert rank_targets(torch.zeros(0, 3), torch.zeros(0).long()).shape == (0,)


def test_the_arguments_stay_as_they_are() -> None:
    scores, exclude = torch.tensor([[1.0, 1.0]]), torch.tensor([[True, True]])
    rank_targets(scores, [0], exclude)
    assert scores.tolist() == [[1, 1]]
    assert exclude.all()


def test_bad_input_is_refused() -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match="row 1 hold NaN"):
        rank_targets(scores, [0, 0, 0])
    good = torch.zeros(3, 4)
    for bad in ([0, 0], [[0, 0, 0]]):
        with pytest.raises(ValueError, match=r"expected scores \(B, I\) and targets"):
            rank_targets(good, bad)
    for bad in ([0, 0, 4], [0, -1, 0]):
        with pytest.raises(ValueError, match=r"expected 0\.\.3"):
            rank_targets(good, bad)
    with pytest.raises(ValueError, match="expected integers"):
        rank_targets(good, [0.0, 1.0, 2.0])
    with pytest.raises(ValueError, match="expected exclude"):
        rank_targets(good, [0, 0, 0], torch.zeros(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="expected exclude"):
        rank_targets(good, [0, 0, 0], torch.zeros(3, 4))


def case(users: int = 37, items: int = 50) -> dict[str, object]:
    """Whole numbers, so that every product is exact and there are many ties."""
    draw = np.random.default_rng(0)
    seen = [draw.integers(1, items + 1, size=draw.integers(0, 9)) for _ in range(users)]
    targets = draw.integers(1, items + 1, size=users)
    seen[3] = np.array([targets[3], targets[3], 5, 5], dtype=np.int32)  # the target and repeats
    return {
        "vectors": torch.from_numpy(draw.integers(-2, 3, size=(users, 3))).float(),
        "item_matrix": torch.from_numpy(draw.integers(-2, 3, size=(items + 1, 3))).float(),
        "targets": targets,
        "seen": seen,
        "negatives": draw.integers(1, items + 1, size=(users, 7)),
        "bias": torch.from_numpy(draw.integers(-1, 2, size=items + 1)).float(),
    }


def naive_users(given: dict[str, object], *, seen: bool, bias: bool) -> dict[str, list[float]]:
    vectors, table = given["vectors"].numpy(), given["item_matrix"].numpy()  # type: ignore[attr-defined]
    ranks: dict[str, list[float]] = {"full": [], "sampled-7": []}
    for user, target in enumerate(given["targets"]):  # type: ignore[arg-type, var-annotated]
        scores = (table @ vectors[user] + (given["bias"].numpy() if bias else 0)).tolist()  # type: ignore[attr-defined]
        left_out = {0, *(given["seen"][user].tolist() if seen else [])}  # type: ignore[index]
        keep = [item not in left_out for item in range(len(scores))]
        ranks["full"].append(naive_rank(scores, target, keep))
        drawn = [i for i in given["negatives"][user].tolist() if i != target]  # type: ignore[index]
        ranks["sampled-7"].append(naive_rank([scores[target], *(scores[i] for i in drawn)], 0))
    return ranks


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 50 * 4 * 5, 2**20])
def test_users_agree_with_a_loop(seen: bool, bias: bool, chunk_bytes: int) -> None:
    given = case()
    expected = naive_users(given, seen=seen, bias=bias)
    assert any(rank % 1 for rank in expected["full"])  # ties there are
    options = {name: given[name] for name in ("negatives", "seen", "bias")}
    if not seen:
        del options["seen"]
    if not bias:
        del options["bias"]
    found = rank_users(
        given["vectors"], given["item_matrix"], given["targets"], chunk_bytes=chunk_bytes, **options
    )
    assert {name: ranks.tolist() for name, ranks in found.items()} == expected


def test_users_agree_with_rank_targets() -> None:
    vectors, table = torch.randn(20, 16), torch.randn(301, 16)
    targets = torch.randint(1, 301, (20,))
    found = rank_users(vectors, table, targets)
    assert found.keys() == {"full"}
    assert torch.equal(found["full"], rank_targets(vectors @ table[1:].T, targets - 1))


def test_padding_is_never_ranked() -> None:
    table = torch.tensor([[100.0], [1.0], [2.0]])
    assert rank_users(torch.ones(1, 1), table, [2])["full"].tolist() == [1]
    assert top_items(torch.ones(1, 1), table, k=2)[0].tolist() == [[2, 1]]


def test_a_twin_of_the_target_ties_with_it() -> None:
    """Equal items have equal scores only within one product."""
    table = torch.randn(100, 64).repeat(3, 1)[:257]
    table = torch.cat([torch.zeros(1, 64), table])
    vectors = torch.randn(40, 64).double()
    ranks = rank_users(vectors, table.double(), torch.arange(1, 41))["full"]
    twins = torch.tensor([2.0 if item + 200 <= 257 else 1.0 for item in range(1, 41)])
    apart = ranks - twins / 2  # one more than those above: a whole number
    assert torch.equal(apart, apart.round())


def test_half_precision_is_raised_before_scoring() -> None:
    vectors, table = torch.randn(8, 32).bfloat16(), torch.randn(2001, 32).bfloat16()
    targets = torch.randint(1, 2001, (8,))
    assert torch.equal(
        rank_users(vectors, table, targets)["full"],
        rank_users(vectors.float(), table.float(), targets)["full"],
    )


def test_random_vectors_hit_at_chance() -> None:
    vectors, table = torch.randn(20_000, 8), torch.randn(201, 8)
    ranks = rank_users(vectors, table, torch.randint(1, 201, (20_000,)))["full"]
    hits, chance = float((ranks <= 10).double().mean()), 10 / 200
    assert abs(hits - chance) < 4 * (chance * (1 - chance) / 20_000) ** 0.5


def test_users_refuse_bad_input() -> None:
    vectors, table = torch.zeros(3, 2), torch.zeros(5, 2)
    for targets in ([0, 1, 1], [1, 5, 1]):
        with pytest.raises(ValueError, match=r"expected 1\.\.4"):
            rank_users(vectors, table, targets)
    with pytest.raises(ValueError, match="vectors"):
        rank_users(vectors, torch.zeros(5, 3), [1, 1, 1])
    with pytest.raises(ValueError, match="targets"):
        rank_users(vectors, table, [1, 1])
    with pytest.raises(ValueError, match="seen items of 3 users"):
        rank_users(vectors, table, [1, 1, 1], seen=[np.array([1])])
    with pytest.raises(ValueError, match=r"seen items are 0\.\.0"):
        rank_users(vectors, table, [1, 1, 1], seen=[np.array([0])] * 3)
    with pytest.raises(ValueError, match="negatives"):
        rank_users(vectors, table, [1, 1, 1], negatives=np.ones((2, 4)))
    with pytest.raises(ValueError, match="bias"):
        rank_users(vectors, table, [1, 1, 1], bias=torch.zeros(4))
    vectors[2, 1] = torch.nan
    with pytest.raises(ValueError, match="row 2 hold NaN"):
        rank_users(vectors, table, [1, 1, 1], chunk_bytes=1)
    with pytest.raises(ValueError, match="k is 5, expected 1 to 4"):
        top_items(vectors, table, k=5)


def test_infinite_scores_are_no_nan() -> None:
    bias = torch.tensor([0, INF, -INF, 0, 0])
    ranks = rank_users(torch.zeros(3, 2), torch.zeros(5, 2), [1, 2, 3], bias=bias)["full"]
    assert ranks.tolist() == [1, 4, 2.5]


def naive_top(scores: list[float], k: int) -> tuple[list[int], list[float]]:
    """Items 1..I of scores (I,), by a stable sort; those that score -inf are not there."""
    best = sorted(range(len(scores)), key=lambda item: -scores[item])
    best = [item for item in best if scores[item] > -INF][:k]
    short = k - len(best)
    return [item + 1 for item in best] + [0] * short, [scores[i] for i in best] + [-INF] * short


@pytest.mark.parametrize("k", [1, 12, 49, 50])
@pytest.mark.parametrize("chunk_bytes", [1, 999, 2**20])
def test_top_items_agree_with_a_sort(k: int, chunk_bytes: int) -> None:
    given = case()
    vectors, table, bias = given["vectors"], given["item_matrix"], given["bias"]
    scores = (vectors @ table.T + bias)[:, 1:].numpy()  # type: ignore[operator, index]
    for user, seen in enumerate(given["seen"]):  # type: ignore[arg-type, var-annotated]
        scores[user, seen - 1] = -INF
    last = -np.sort(-scores, axis=1)[:, k - 1 : k + 1]
    assert k == 50 or (last[:, 0] == last[:, 1]).any()  # ties across the last place there are
    found, values = top_items(
        vectors,  # type: ignore[arg-type]
        table,  # type: ignore[arg-type]
        k=k,
        seen=given["seen"],  # type: ignore[arg-type]
        bias=bias,  # type: ignore[arg-type]
        chunk_bytes=chunk_bytes,
    )
    assert found.dtype == torch.int64
    for user, row in enumerate(scores.tolist()):
        assert (found[user].tolist(), values[user].tolist()) == naive_top(row, k)


def test_top_items_of_equal_scores_are_the_first_ones() -> None:
    found, values = top_items(torch.ones(9, 1), torch.ones(1001, 1), k=10, seen=[np.array([2])] * 9)
    assert found.tolist() == [[1, *range(3, 12)]] * 9
    assert (values == 1).all()


def test_top_items_leave_out_what_scores_minus_infinity() -> None:
    """Seen or not: a seen item must not take the place of one that can't be recommended."""
    bias = torch.tensor([0.0, 0.0, 0.0, -INF, 2.0])
    found, values = top_items(
        torch.zeros(1, 1), torch.zeros(5, 1), k=4, seen=[np.array([1])], bias=bias
    )
    assert found.tolist() == [[4, 2, 0, 0]]
    assert values.tolist() == [[2, 0, -INF, -INF]]


def test_top_items_when_few_are_left() -> None:
    found, values = top_items(torch.ones(1, 1), torch.ones(4, 1), k=3, seen=[np.array([3, 1, 1])])
    assert found.tolist() == [[2, 0, 0]]
    assert values.tolist() == [[1, -INF, -INF]]


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 999, 2**20])
@pytest.mark.parametrize("top", [3, 10, 50, 60])
def test_lists_beside_ranks_are_the_top_items(seen: bool, chunk_bytes: int, top: int) -> None:
    given = case()
    options = {name: given[name] for name in ("negatives", "bias")}
    if seen:
        options["seen"] = given["seen"]
    arms = given["vectors"], given["item_matrix"]
    found = rank_users(*arms, given["targets"], top=top, chunk_bytes=chunk_bytes, **options)
    lists = found.pop(f"top-{top}")
    assert lists.dtype == torch.int64
    del options["negatives"]
    expected, _ = top_items(*arms, k=min(top, 50), **options)
    assert torch.equal(lists[:, :50], expected)
    assert (lists[:, 50:] == 0).all()
    # and the ranks are what they are without them
    options["negatives"] = given["negatives"]
    alone = rank_users(*arms, given["targets"], **options)
    assert {name: ranks.tolist() for name, ranks in found.items()} == {
        name: ranks.tolist() for name, ranks in alone.items()
    }


def test_a_seen_target_is_ranked_but_not_recommended() -> None:
    table = torch.tensor([[0.0], [3.0], [2.0], [1.0]])
    found = rank_users(torch.ones(1, 1), table, [1], seen=[np.array([1, 3])], top=2)
    assert found["full"].tolist() == [1]
    assert found["top-2"].tolist() == [[2, 0]]
