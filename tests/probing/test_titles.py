"""The closed form of the read-out of titles equals plain least squares; spread equals loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from depthprobe.evaluation.ranks import EvalSet, evaluate, mean_ndcg
from depthprobe.probing import titles
from depthprobe.probing.titles import (
    TitleReadout,
    anisotropy,
    effective_rank,
    fit_title_readout,
    user_features,
)

ITEMS, WIDTH = 12, 3


@pytest.fixture
def table() -> Tensor:
    rows = torch.randn(ITEMS + 1, WIDTH, generator=torch.Generator().manual_seed(1))
    rows[0] = 0
    return rows


def draw(users: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, ITEMS + 1, size=rng.integers(2, 7)) for _ in range(users)]


def asked(windows: list[np.ndarray]) -> EvalSet:
    histories, targets = [w[:-1] for w in windows], np.array([w[-1] for w in windows])
    return EvalSet(np.arange(len(windows)), histories, targets, seen=None, negatives=None)


def features(table: Tensor, history: np.ndarray) -> np.ndarray:
    rows = table.double().numpy()[history]
    return np.concatenate([rows[-1], rows.mean(axis=0), [1.0]])


def test_a_user_is_the_last_item_and_the_mean_of_all(table: Tensor) -> None:
    window = np.array([3, 9, 9, 1])
    found = user_features(table.double(), torch.tensor([[3, 9, 9, 1, 0]]))[0]
    for length in range(1, 5):
        np.testing.assert_allclose(found[length - 1], features(table, window[:length]))


@pytest.mark.parametrize("ridge", titles.RIDGES)
def test_the_map_is_that_of_plain_least_squares(
    table: Tensor, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: a row for each position and item, in float64, the ridge as rows of its own."""
    windows = draw(40)
    monkeypatch.setattr(titles, "RIDGES", (ridge,))
    monkeypatch.setattr(titles, "BATCH", 7)
    fitted = fit_title_readout(table, windows, asked(draw(5, seed=9)))
    positions = [(w[:t], w[t]) for w in windows for t in range(1, len(w))]
    users = np.stack([features(table, history) for history, _ in positions])
    items = table[1:].double().numpy()
    rows = np.einsum("ni,kj->nkij", users, items).reshape(len(users) * ITEMS, -1)
    wanted = np.zeros((len(users), ITEMS))
    wanted[np.arange(len(users)), [target - 1 for _, target in positions]] = 1
    sizes = np.outer(np.linalg.eigvalsh(users.T @ users), np.linalg.eigvalsh(items.T @ items))
    extra = (ridge * sizes.mean()) ** 0.5 * np.eye(rows.shape[1])
    rows, goal = np.vstack([rows, extra]), np.append(wanted.ravel(), np.zeros(len(extra)))
    expected = np.linalg.lstsq(rows, goal)[0].reshape(2 * WIDTH + 1, WIDTH)
    np.testing.assert_allclose(fitted.weight, expected, rtol=1e-3, atol=1e-5)


def test_validation_users_choose_the_ridge(table: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, validation = draw(40), asked(draw(60, seed=9))

    def score(fitted: TitleReadout) -> float:
        return mean_ndcg(evaluate(fitted, validation, device=table.device)["full"])

    chosen = score(fit_title_readout(table, windows, validation))
    each = []
    for ridge in titles.RIDGES:
        monkeypatch.setattr(titles, "RIDGES", (ridge,))
        each.append(score(fit_title_readout(table, windows, validation)))
    assert chosen == max(each) > min(each)


def test_a_rule_that_titles_tell_is_found() -> None:
    """The next item's vector is the last one's turned: the map turns it back."""
    torch.manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(8, 6, dtype=torch.float64), dim=1)
    turn = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    table = torch.zeros(17, 6, dtype=torch.float64)
    table[1:9], table[9:] = rows, rows @ turn
    windows = [np.array([item, item + 8]) for item in range(1, 9)] * 5
    fitted = fit_title_readout(table, windows, asked(windows))
    ranks = evaluate(fitted, asked(windows), device=table.device)["full"]
    assert mean_ndcg(ranks) > 0.9


def test_anisotropy_is_the_mean_over_pairs(table: Tensor) -> None:
    rows = (table[1:] + 2).double()
    pairs = [
        float(torch.cosine_similarity(rows[i], rows[j], dim=0))
        for i in range(ITEMS)
        for j in range(i)
    ]
    assert anisotropy(table + 2) == pytest.approx(np.mean(pairs))
    assert anisotropy(torch.ones(9, 4)) == pytest.approx(1)
    assert anisotropy(torch.cat([torch.zeros(1, 4), torch.eye(4), -torch.eye(4)])) == pytest.approx(
        -1 / 7
    )


def test_effective_rank_counts_directions(table: Tensor) -> None:
    cross = torch.cat([torch.zeros(1, 4), torch.eye(4), -torch.eye(4)])
    assert effective_rank(cross) == pytest.approx(4)
    assert effective_rank(cross + 7) == pytest.approx(4)  # of the spread, not of the mean
    assert effective_rank(cross[:, :1] * torch.tensor([1.0, 2.0])) == pytest.approx(1)
    squares = np.linalg.svd(table[1:] - table[1:].mean(0), compute_uv=False) ** 2
    shares = squares / squares.sum()
    assert effective_rank(table) == pytest.approx(
        np.exp(-(shares * np.log(shares)).sum()), rel=1e-5
    )
