"""The gradient of the scores is autograd's, without scores; cached states are those of a pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.recommender import Recommender
from depthprobe.probing.readout import CachedStates, cache_states, score_gradient

CPU = torch.device("cpu")
Draw = Callable[[int, int], EvalSet]
StatesOf = Callable[[Recommender, EvalSet], CachedStates]


def test_gradient_by_hand() -> None:
    table = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    vectors = torch.tensor([[[0.0], [math.log(3) / 2]]], dtype=torch.float64)
    # shares are (1/2, 1/2) and (3/4, 1/4), targets the first and the second item, two users
    found = score_gradient(vectors, table, torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([[[-0.5], [0.75]]], dtype=torch.float64))
    # of the same distributions, as user vectors: each other's
    found = score_gradient(vectors, table, vectors[0].flip(0))
    torch.testing.assert_close(found, torch.tensor([[[-0.25], [0.25]]], dtype=torch.float64))


def by_autograd(vectors: Tensor, table: Tensor, wanted: Tensor) -> Tensor:
    """In float64, one depth after the other."""
    leaf, table = vectors.detach().clone().double().requires_grad_(), table.double()
    for each in leaf:
        shares = (each @ table.T).log_softmax(1)
        if wanted.dim() == 1:
            cross_entropy(each @ table.T, wanted - 1).backward()
        else:
            goal = (wanted.double() @ table.T).log_softmax(1)
            kl_div(shares, goal, log_target=True, reduction="batchmean").backward()
    assert leaf.grad is not None
    return leaf.grad


# fewer and more than a kernel takes at once, of users and of items; widths it has to pad
@pytest.mark.parametrize(
    ("users", "items", "width"), [(1, 1, 1), (10, 23, 5), (10, 2000, 6), (300, 1100, 64)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_is_autograd_s(users: int, items: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # scores from -50 to 50 or so: what one item gets is nearly all, or nearly nothing
    vectors = (20 / width**0.5 * torch.randn(3, users, width)).to(dtype)
    table, own = torch.randn(items, width).to(dtype), torch.randn(users, width).to(dtype)
    before = [each.clone() for each in (vectors, table, own)]
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for wanted in (torch.randint(1, items + 1, (users,)), own):
        expected = by_autograd(vectors, table, wanted)
        found = score_gradient(vectors, table, wanted)
        assert found.dtype == dtype
        assert found.shape == vectors.shape
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-12))
        assert error < tolerance
    assert all(map(torch.equal, before, (vectors, table, own)))


def test_scores_never_exist_as_a_whole() -> None:
    users, items = 64, 200_000
    vectors, table = torch.randn(2, users, 4), torch.randn(items, 4)
    with torch.profiler.profile(profile_memory=True) as profile:
        score_gradient(vectors, table, torch.randint(1, items, (users,)))
    most = max(event.cpu_memory_usage for event in profile.key_averages())
    assert most < users * items * 4 / 10


def test_cached_states(
    teacher: Recommender, eval_set: EvalSet, states_of: StatesOf, tmp_path: Path
) -> None:
    path = tmp_path / "states.npy"
    cached, expected = (
        cache_states(teacher, eval_set, path=path, device=CPU),
        states_of(teacher, eval_set),
    )
    assert cached.states.dtype == np.float16
    assert cached.states.shape == (300, 6, 16)
    np.testing.assert_array_equal(np.load(path), cached.states)
    np.testing.assert_allclose(cached.states, expected.states, rtol=2**-11, atol=2**-25)
    rows = np.array([4, 200, 7])
    states = cached.at(rows, CPU, torch.float64)
    assert states.dtype == torch.float64
    np.testing.assert_array_equal(states.numpy(), cached.states[rows].swapaxes(0, 1))


def test_cached_states_too_large_for_half(
    teacher: Recommender, eval_set: EvalSet, states_of: StatesOf, tmp_path: Path
) -> None:
    with torch.no_grad():
        teacher.backbone.layers[3].mlp.down_proj.weight.mul_(1e7)
    cached = cache_states(teacher, eval_set, path=tmp_path / "states.npy", device=CPU)
    assert cached.states.dtype == np.float32
    assert abs(cached.states).max() > 65504
    np.testing.assert_allclose(
        cached.states, states_of(teacher, eval_set).states, rtol=2**-24, atol=1e-9
    )


def test_cached_states_refused(teacher: Recommender, draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no users"):
        cache_states(teacher, draw(0, 0), path=tmp_path / "states.npy", device=CPU)
    eval_set = draw(300, 0)
    for history in eval_set.histories:
        history[history == 40] = 39
    eval_set.histories[17] = np.array([40])  # among the shortest: not in the first batch
    with torch.no_grad():
        teacher.items.weight[40] = torch.nan
    with pytest.raises(ValueError, match="infinite or NaN"):
        cache_states(teacher, eval_set, path=tmp_path / "states.npy", device=CPU)
