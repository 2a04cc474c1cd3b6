"""Read-outs and lenses equal a naive fit of each depth alone, and find what a depth knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet, mean_ndcg
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.passes import early_exit, passes
from depthprobe.probing.readout import (
    CachedStates,
    Fitting,
    cache_states,
    fit_lenses,
    fit_readouts,
    rank_readouts,
    score_gradient,
)

CPU = torch.device("cpu")
Draw = Callable[[int, int], EvalSet]
StatesOf = Callable[[Recommender, EvalSet], CachedStates]


def by_autograd(vectors: Tensor, table: Tensor, goal: Tensor) -> Tensor:
    """In float64, one depth after the other."""
    leaf, table = vectors.detach().clone().double().requires_grad_(), table.double()
    for each in leaf:
        if goal.dim() == 1:
            cross_entropy(each @ table.T, goal - 1).backward()
        else:
            divergence(
                (goal.double() @ table.T).log_softmax(1), (each @ table.T).log_softmax(1)
            ).backward()
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
    for goal in (torch.randint(1, items + 1, (users,)), own):
        expected = by_autograd(vectors, table, goal)
        gradient = score_gradient(vectors, table, goal)
        assert (gradient.dtype, gradient.shape) == (dtype, vectors.shape)
        error = float((gradient - expected).norm() / expected.norm().clamp_min(1e-12))
        assert error < (1e-12 if dtype == torch.float64 else 1e-5)
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
    path, expected = tmp_path / "states.npy", states_of(teacher, eval_set).states
    cached = cache_states(teacher, eval_set, path=path, device=CPU)
    assert (cached.states.dtype, cached.states.shape) == (np.float16, (300, 6, 16))
    np.testing.assert_array_equal(np.load(path), cached.states)
    np.testing.assert_allclose(cached.states, expected, rtol=2**-11, atol=2**-25)
    rows = np.array([4, 200, 7])
    states = cached.at(rows, CPU, torch.float64)
    assert states.dtype == torch.float64
    np.testing.assert_array_equal(states.numpy(), cached.states[rows].swapaxes(0, 1))
    with torch.no_grad():  # too large for half precision
        teacher.backbone.layers[3].mlp.down_proj.weight.mul_(1e7)
    cached, expected = (
        cache_states(teacher, eval_set, path=path, device=CPU),
        states_of(teacher, eval_set).states,
    )
    assert cached.states.dtype == np.float32
    assert abs(cached.states).max() > 65504
    np.testing.assert_allclose(cached.states, expected, rtol=2**-24, atol=1e-9)


def test_cached_states_refused(plain: Recommender, draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no users"):
        cache_states(plain, draw(0, 0), path=tmp_path / "states.npy", device=CPU)
    eval_set = draw(300, 0)
    for history in eval_set.histories:
        history[history == 40] = 39
    eval_set.histories[17] = np.array([40])  # among the shortest: not in the first batch
    with torch.no_grad():
        plain.items.weight[40] = torch.nan
    with pytest.raises(ValueError, match="infinite or NaN"):
        cache_states(plain, eval_set, path=tmp_path / "states.npy", device=CPU)


def test_readouts_are_those_of_each_depth_alone(
    plain: Recommender, draw: Draw, states_of: StatesOf, fit_alone: Callable[..., Any]
) -> None:
    train, validation = states_of(plain, draw(150, 1)), states_of(plain, draw(90, 2))
    settings = Fitting(epochs=12, batch_size=40, learning_rate=0.05, patience=2)
    fitted = fit_readouts(plain, train, validation, device=CPU, seed=3, settings=settings)
    items, y = plain.item_matrix(), torch.from_numpy(train.eval_set.targets)
    for depth in range(6):
        with torch.no_grad():
            x, v = (
                plain.backbone.norm(torch.from_numpy(cached.states[:, depth]))
                for cached in (train, validation)
            )
        head = nn.Linear(16, 6).double()
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

        def scores(states: Tensor, head: nn.Linear = head) -> Tensor:
            return head(states) @ items[1:].T

        chosen, best, (weight, bias) = fit_alone(
            list(head.parameters()),
            loss=lambda rows, x=x, f=scores: cross_entropy(f(x[rows]), y[rows] - 1),
            scores=lambda v=v, f=scores: f(v),
            targets=torch.from_numpy(validation.eval_set.targets),
            epochs=12,
            learning_rate=0.05,
        )
        assert fitted.epochs[depth] == chosen
        assert fitted.ndcg[depth] == pytest.approx(best, abs=1e-12)
        torch.testing.assert_close(fitted.weight[depth], weight.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fitted.bias[depth, 0], bias, rtol=1e-9, atol=1e-9)
    assert len(set(fitted.epochs)) > 1  # the depths did stop apart


def log_shares(model: Recommender, states: Tensor) -> Tensor:
    vectors = model.output_adapter(model.backbone.norm(states))
    return (vectors @ model.item_matrix()[1:].T).log_softmax(dim=-1)


def divergence(goal: Tensor, shares: Tensor) -> Tensor:
    return kl_div(shares, goal, log_target=True, reduction="batchmean")


def test_lenses_are_those_of_each_depth_alone(
    plain: Recommender, draw: Draw, states_of: StatesOf, fit_alone: Callable[..., Any]
) -> None:
    train, validation = states_of(plain, draw(150, 1)), states_of(plain, draw(90, 2))
    settings = Fitting(epochs=6, batch_size=40, learning_rate=0.02, patience=2)
    fitted = fit_lenses(plain, train, validation, device=CPU, seed=3, settings=settings)
    x, v = torch.from_numpy(train.states), torch.from_numpy(validation.states)
    with torch.no_grad():
        goal = log_shares(plain, x[:, -1])
    for depth in range(5):
        size = x[:, depth].square().mean().sqrt()
        a = torch.zeros(16, 16, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(16, dtype=torch.float64, requires_grad=True)

        def translated(states: Tensor, a: Tensor = a, b: Tensor = b, size: Tensor = size) -> Tensor:
            return log_shares(plain, states + states @ a.T + size * b)

        chosen, best, (weight, bias) = fit_alone(
            [a, b],
            loss=lambda rows, k=depth, f=translated: divergence(goal[rows], f(x[rows, k])),
            scores=lambda k=depth, f=translated: f(v[:, k]),
            targets=torch.from_numpy(validation.eval_set.targets),
            epochs=6,
            learning_rate=0.02,
        )
        assert fitted.epochs[depth] == chosen
        assert fitted.ndcg[depth] == pytest.approx(best, abs=1e-12)
        torch.testing.assert_close(fitted.weight[depth], weight.T, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(fitted.bias[depth, 0], size * bias, rtol=1e-8, atol=1e-8)
    assert len(set(fitted.epochs)) > 1


def planted(model: Recommender, cached: CachedStates, depth: int) -> CachedStates:
    """The target is the item that a random head reads at a depth."""
    with torch.no_grad():
        normed = model.backbone.norm(torch.from_numpy(cached.states[:, depth]))
        head = torch.randn(16, 6, generator=torch.Generator().manual_seed(5)).double()
        targets = (normed @ head @ model.item_matrix()[1:].T).argmax(dim=1) + 1
    return CachedStates(replace(cached.eval_set, targets=targets.numpy()), cached.states)


def test_finds_what_the_head_cannot_read(
    plain: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    train, validation, test = (
        planted(plain, states_of(plain, draw(users, seed)), 2)
        for users, seed in ((1500, 1), (300, 2), (400, 3))
    )
    settings = Fitting(epochs=12, batch_size=100, learning_rate=0.1)
    fitted = fit_readouts(plain, train, validation, device=CPU, seed=0, settings=settings)
    ranks = rank_readouts(plain, fitted, test.eval_set, device=CPU)
    hits = [np.mean(each["full"] == 1) for each in ranks]
    exits = [np.mean(each["full"] == 1) for each in early_exit(plain, test.eval_set, device=CPU)]
    assert hits[2] > 0.9
    assert max(exits) < 0.25
    assert int(np.argmax(hits)) == 2


def test_lenses_start_as_early_exit(
    teacher: Recommender, eval_set: EvalSet, few: EvalSet, states_of: StatesOf
) -> None:
    cached = states_of(teacher, few)
    fitted = fit_lenses(teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=0))
    lenses = rank_readouts(teacher, fitted, eval_set, device=CPU)
    for ranks, expected in zip(lenses, early_exit(teacher, eval_set, device=CPU), strict=True):
        assert ranks.keys() == {"full", "sampled-7"}
        for protocol in expected:
            np.testing.assert_array_equal(ranks[protocol], expected[protocol])


def test_lenses_approach_the_teacher_and_the_last_depth_stays_it(
    plain: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    cached = []
    for own in (states_of(plain, draw(800, 1)), states_of(plain, draw(200, 2))):
        with torch.no_grad():  # the targets are the teacher's first choices
            best = log_shares(plain, torch.from_numpy(own.states[:, -1])).argmax(1) + 1
        cached.append(CachedStates(replace(own.eval_set, targets=best.numpy()), own.states))
    settings = Fitting(epochs=10, batch_size=50, learning_rate=0.02)
    fitted = fit_lenses(plain, *cached, device=CPU, seed=0, settings=settings)
    states = torch.from_numpy(cached[1].states).transpose(0, 1)
    with torch.no_grad():
        goal = log_shares(plain, states[-1])
        before = [float(divergence(goal, log_shares(plain, each))) for each in states]
        after = [
            float(divergence(goal, (each @ plain.item_matrix()[1:].T).log_softmax(1)))
            for each in fitted.vectors(plain, states)
        ]
    assert all(late < 0.7 * early for early, late in zip(before[:-1], after[:-1], strict=True))
    assert before[-1] == 0
    assert (fitted.epochs[-1], fitted.weight[-1].any(), fitted.bias[-1].any()) == (0, False, False)
    with torch.inference_mode():
        ((_, histories, lengths),) = draw(50, 3).batches(device=CPU)
        ((_, last),) = passes(plain, draw(50, 3), device=CPU)
        expected = plain.encode(histories, lengths)
        torch.testing.assert_close(fitted.vectors(plain, last)[-1], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fit", [fit_readouts, fit_lenses])
def test_the_same_seed_gives_the_same_bits_and_leaves_the_teacher_as_it_was(
    fit: Callable[..., Any], teacher: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    teacher.output_adapter.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trains = {name: each.requires_grad for name, each in teacher.named_parameters()}
    cached = states_of(teacher, draw(70, 1))
    settings = Fitting(epochs=2, batch_size=16)
    first, again, other = (
        fit(teacher, cached, cached, device=CPU, seed=seed, settings=settings) for seed in (4, 4, 5)
    )
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    if fit is fit_readouts:  # a lens may keep its zeros
        assert not torch.equal(first.weight, other.weight)
    assert trains == {name: each.requires_grad for name, each in teacher.named_parameters()}
    assert len(set(trains.values())) == 2
    assert all(each.grad is None for each in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_half_precision_and_other_decoders(family: str, draw: Draw, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # a projection behind OPT's last block: normed states are narrower than its blocks'
    changes = {"opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}}
    backbone = tiny_model(CONFIG_MAPPING[family](**changes.get(family, {})), depth=3)
    teacher = Recommender(backbone, torch.randn(41, 6), ()).eval()
    teacher.backbone.bfloat16()
    eval_set = draw(60, 0)
    cached = cache_states(teacher, eval_set, path=tmp_path / "states.npy", device=CPU)
    settings = Fitting(epochs=20, batch_size=20, learning_rate=0.1, patience=20)
    fitted = fit_readouts(teacher, cached, cached, device=CPU, seed=0, settings=settings)
    assert fitted.weight.dtype == torch.float32
    assert (fitted.ndcg > 1.5 * mean_ndcg(np.arange(1, 41))).all()  # they learn their users
    assert len(rank_readouts(teacher, fitted, eval_set, device=CPU)) == 4
