"""Lenses equal a naive fit of each depth alone, start as early exit, and approach the teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.recommender import Recommender
from depthprobe.probing.passes import early_exit, passes
from depthprobe.probing.readout import CachedStates, Fitting, fit_lenses, rank_readouts

CPU = torch.device("cpu")
Draw = Callable[[int, int], EvalSet]
StatesOf = Callable[[Recommender, EvalSet], CachedStates]


def log_shares(model: Recommender, states: Tensor) -> Tensor:
    vectors = model.output_adapter(model.backbone.norm(states))
    return (vectors @ model.item_matrix()[1:].T).log_softmax(dim=-1)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    return kl_div(found, wanted, log_target=True, reduction="batchmean")


def test_side_by_side_is_each_depth_alone(
    teacher: Recommender, draw: Draw, states_of: StatesOf, fit_alone: Callable[..., Any]
) -> None:
    train, validation = states_of(teacher, draw(150, 1)), states_of(teacher, draw(90, 2))
    settings = Fitting(epochs=6, batch_size=40, learning_rate=0.02, patience=2)
    fitted = fit_lenses(teacher, train, validation, device=CPU, seed=3, settings=settings)
    x, v = torch.from_numpy(train.states), torch.from_numpy(validation.states)
    with torch.no_grad():
        goal = log_shares(teacher, x[:, -1])
    for depth in range(5):
        size = x[:, depth].square().mean().sqrt()
        a = torch.zeros(16, 16, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(16, dtype=torch.float64, requires_grad=True)

        def translated(states: Tensor, a: Tensor = a, b: Tensor = b, size: Tensor = size) -> Tensor:
            return log_shares(teacher, states + states @ a.T + size * b)

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
    teacher.zero_grad()


def test_starts_as_early_exit(
    teacher: Recommender, eval_set: EvalSet, draw: Draw, states_of: StatesOf
) -> None:
    cached = states_of(teacher, draw(30, 1))
    fitted = fit_lenses(teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=0))
    found = rank_readouts(teacher, fitted, eval_set, device=CPU)
    for ranks, expected in zip(found, early_exit(teacher, eval_set, device=CPU), strict=True):
        assert ranks.keys() == {"full", "sampled-7"}
        for protocol in expected:
            np.testing.assert_array_equal(ranks[protocol], expected[protocol])


def test_last_depth_stays_the_teacher(
    teacher: Recommender, eval_set: EvalSet, draw: Draw, states_of: StatesOf
) -> None:
    cached = states_of(teacher, draw(80, 1))
    fitted = fit_lenses(
        teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=5, batch_size=20)
    )
    assert fitted.epochs[-1] == 0
    assert not fitted.weight[-1].any()
    assert not fitted.bias[-1].any()
    with torch.inference_mode():
        for batch in list(passes(teacher, eval_set, device=CPU)):
            vectors = fitted.vectors(teacher, batch.states)[-1]
            own = teacher.encode(batch.histories, batch.lengths)
            torch.testing.assert_close(vectors, own, rtol=0, atol=1e-14)
    found = rank_readouts(teacher, fitted, eval_set, device=CPU)[-1]
    expected = early_exit(teacher, eval_set, device=CPU)[-1]
    np.testing.assert_array_equal(found["full"], expected["full"])


def test_approaches_the_teacher(teacher: Recommender, draw: Draw, states_of: StatesOf) -> None:
    eval_set, told = draw(800, 1), []
    for cached in (states_of(teacher, eval_set), states_of(teacher, draw(200, 2))):
        with torch.no_grad():  # the targets are what the teacher would say
            best = log_shares(teacher, torch.from_numpy(cached.states[:, -1])).argmax(1) + 1
        part = cached.eval_set
        told.append(
            CachedStates(
                EvalSet(part.users, part.histories, best.numpy(), None, None), cached.states
            )
        )
    settings = Fitting(epochs=10, batch_size=50, learning_rate=0.02)
    fitted = fit_lenses(teacher, *told, device=CPU, seed=0, settings=settings)
    states = torch.from_numpy(told[1].states).transpose(0, 1)
    with torch.no_grad():
        goal = log_shares(teacher, states[-1])
        before = [float(divergence(goal, log_shares(teacher, each))) for each in states]
        vectors = fitted.vectors(teacher, states)
        after = [
            float(divergence(goal, (each @ teacher.item_matrix()[1:].T).log_softmax(1)))
            for each in vectors
        ]
    assert before[-1] == 0
    assert after[-1] == pytest.approx(0, abs=1e-14)
    assert all(late < 0.7 * early for early, late in zip(before[:-1], after[:-1], strict=True))


def test_leaves_the_teacher_as_it_was(
    teacher: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    cached = states_of(teacher, draw(50, 1))
    settings = Fitting(epochs=2, batch_size=20)
    first, again = (
        fit_lenses(teacher, cached, cached, device=CPU, seed=1, settings=settings) for _ in "ab"
    )
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert all(each.grad is None for each in teacher.parameters())
    assert teacher.backbone.norm.weight.requires_grad
    assert not any(module.training for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
