"""Lenses equal a naive fit of each depth alone, start as early exit, and approach the teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from depthprobe.evaluation.evaluate import Questions, mean_ndcg
from depthprobe.models.recommender import Recommender
from depthprobe.probing.early_exit import early_exit
from depthprobe.probing.lens import fit_lenses
from depthprobe.probing.passes import passes
from depthprobe.probing.readout import CachedStates, Fitting, rank_readouts

CPU = torch.device("cpu")


def draw(users: int, seed: int) -> Questions:
    rng = np.random.default_rng(seed)
    histories = [rng.integers(1, 41, size=rng.integers(1, 9)) for _ in range(users)]
    return Questions(np.arange(users), histories, rng.integers(1, 41, size=users), None, None)


@torch.inference_mode()
def exact(model: Recommender, asked: Questions) -> CachedStates:
    states = np.empty((len(asked.users), model.depth + 1, model.width))
    for batch in passes(model, asked, device=CPU):
        states[batch.chosen] = batch.states.transpose(0, 1).numpy()
    return CachedStates(asked, states)


def log_shares(model: Recommender, states: Tensor) -> Tensor:
    vectors = model.output_adapter(model.backbone.norm(states))
    return (vectors @ model.item_matrix()[1:].T).log_softmax(dim=-1)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    return kl_div(found, wanted, log_target=True, reduction="batchmean")


def naive_ndcg(scores: Tensor, targets: Tensor) -> float:
    wanted = scores.gather(1, targets[:, None] - 1)
    ranks = 1 + (scores > wanted).sum(1) + ((scores == wanted).sum(1) - 1) / 2
    return mean_ndcg(ranks.numpy())


def test_side_by_side_is_each_depth_alone(teacher: Recommender) -> None:
    train, validation = exact(teacher, draw(150, 1)), exact(teacher, draw(90, 2))
    settings = Fitting(epochs=6, batch_size=40, learning_rate=0.02, patience=2)
    fitted = fit_lenses(teacher, train, validation, device=CPU, seed=3, settings=settings)
    x, v = torch.from_numpy(train.states), torch.from_numpy(validation.states)
    y = torch.from_numpy(validation.asked.targets)
    with torch.no_grad():
        goal = log_shares(teacher, x[:, -1])
    for depth in range(5):
        size = x[:, depth].square().mean().sqrt()
        a = torch.zeros(16, 16, dtype=torch.float64, requires_grad=True)
        b = torch.zeros(16, dtype=torch.float64, requires_grad=True)

        def translated(states: Tensor, a: Tensor, b: Tensor, size: Tensor = size) -> Tensor:
            return log_shares(teacher, states + states @ a.T + size * b)

        optimizer = torch.optim.AdamW([a, b], lr=0.02, weight_decay=0.01)
        best, chosen, step = naive_ndcg(log_shares(teacher, v[:, depth]).detach(), y), 0, 0
        weight, bias = a.detach().clone(), b.detach().clone()
        for epoch in range(1, 7):
            order = np.random.default_rng((3, epoch)).permutation(150)
            for rows in (order[:40], order[40:80], order[80:120], order[120:]):
                optimizer.param_groups[0]["lr"] = 0.01 * (1 + math.cos(math.pi * step / 24))
                optimizer.zero_grad()
                divergence(goal[rows], translated(x[rows, depth], a, b)).backward()
                optimizer.step()
                step += 1
            found = naive_ndcg(translated(v[:, depth], a, b).detach(), y)
            if found > best:
                best, chosen = found, epoch
                weight, bias = a.detach().clone(), b.detach().clone()
            if epoch - chosen >= 2:
                break
        assert fitted.epochs[depth] == chosen
        assert fitted.ndcg[depth] == pytest.approx(best, abs=1e-12)
        torch.testing.assert_close(fitted.weight[depth], weight.T, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(fitted.bias[depth, 0], size * bias, rtol=1e-8, atol=1e-8)
    assert len(set(fitted.epochs)) > 1
    teacher.zero_grad()


def test_starts_as_early_exit(teacher: Recommender, asked: Questions) -> None:
    cached = exact(teacher, draw(30, 1))
    fitted = fit_lenses(teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=0))
    found = rank_readouts(teacher, fitted, asked, device=CPU)
    for ranks, expected in zip(found, early_exit(teacher, asked, device=CPU), strict=True):
        assert ranks.keys() == {"full", "sampled-7"}
        for protocol in expected:
            np.testing.assert_array_equal(ranks[protocol], expected[protocol])


def test_last_depth_stays_the_teacher(teacher: Recommender, asked: Questions) -> None:
    cached = exact(teacher, draw(80, 1))
    fitted = fit_lenses(
        teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=5, batch_size=20)
    )
    assert fitted.epochs[-1] == 0
    assert not fitted.weight[-1].any()
    assert not fitted.bias[-1].any()
    with torch.inference_mode():
        for batch in list(passes(teacher, asked, device=CPU)):
            vectors = fitted.vectors(teacher, batch.states)[-1]
            own = teacher.encode(batch.histories, batch.lengths)
            torch.testing.assert_close(vectors, own, rtol=0, atol=1e-14)
    found = rank_readouts(teacher, fitted, asked, device=CPU)[-1]
    expected = early_exit(teacher, asked, device=CPU)[-1]
    np.testing.assert_array_equal(found["full"], expected["full"])


def test_approaches_the_teacher(teacher: Recommender) -> None:
    asked, told = draw(800, 1), []
    for cached in (exact(teacher, asked), exact(teacher, draw(200, 2))):
        with torch.no_grad():  # the targets are what the teacher would say
            best = log_shares(teacher, torch.from_numpy(cached.states[:, -1])).argmax(1) + 1
        part = cached.asked
        told.append(
            CachedStates(
                Questions(part.users, part.histories, best.numpy(), None, None), cached.states
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


def test_leaves_the_teacher_as_it_was(teacher: Recommender) -> None:
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    cached = exact(teacher, draw(50, 1))
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
