"""Fitted read-outs equal a naive fit of each depth alone, and find what a depth knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet, mean_ndcg
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.passes import early_exit
from depthprobe.probing.readout import (
    CachedStates,
    Fitting,
    cache_states,
    fit_readouts,
    rank_readouts,
)

CPU = torch.device("cpu")
Draw = Callable[[int, int], EvalSet]
StatesOf = Callable[[Recommender, EvalSet], CachedStates]


def test_side_by_side_is_each_depth_alone(
    teacher: Recommender, draw: Draw, states_of: StatesOf, fit_alone: Callable[..., Any]
) -> None:
    train, validation = states_of(teacher, draw(150, 1)), states_of(teacher, draw(90, 2))
    settings = Fitting(epochs=12, batch_size=40, learning_rate=0.05, patience=2)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=3, settings=settings)
    items, y = teacher.item_matrix(), torch.from_numpy(train.eval_set.targets)
    for depth in range(6):
        with torch.no_grad():
            x, v = (
                teacher.backbone.norm(torch.from_numpy(cached.states[:, depth]))
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


def planted(teacher: Recommender, cached: CachedStates, depth: int) -> CachedStates:
    """The target is the item that a random head reads at a depth."""
    with torch.no_grad():
        normed = teacher.backbone.norm(torch.from_numpy(cached.states[:, depth]))
        head = torch.randn(16, 6, generator=torch.Generator().manual_seed(5)).double()
        targets = (normed @ head @ teacher.item_matrix()[1:].T).argmax(dim=1) + 1
    return CachedStates(replace(cached.eval_set, targets=targets.numpy()), cached.states)


def test_finds_what_the_head_cannot_read(
    teacher: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    train, validation, test = (
        planted(teacher, states_of(teacher, draw(users, seed)), 2)
        for users, seed in ((1500, 1), (300, 2), (400, 3))
    )
    settings = Fitting(epochs=15, batch_size=100, learning_rate=0.1)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=0, settings=settings)
    ranks = rank_readouts(teacher, fitted, test.eval_set, device=CPU)
    found = [np.mean(each["full"] == 1) for each in ranks]
    exits = [np.mean(each["full"] == 1) for each in early_exit(teacher, test.eval_set, device=CPU)]
    assert found[2] > 0.9
    assert max(exits) < 0.25
    assert int(np.argmax(found)) == 2


def test_finds_nothing_where_nothing_is(
    teacher: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    train, validation, test = (
        states_of(teacher, draw(users, seed)) for users, seed in ((600, 1), (300, 2), (1000, 3))
    )
    settings = Fitting(epochs=5, batch_size=100, learning_rate=0.05)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=0, settings=settings)
    by_chance = mean_ndcg(np.arange(1, 41))
    for ranks in rank_readouts(teacher, fitted, test.eval_set, device=CPU):
        assert mean_ndcg(ranks["full"]) == pytest.approx(by_chance, abs=0.03)


def test_scores_are_those_of_the_weights_it_returns(
    teacher: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    train, validation = states_of(teacher, draw(100, 1)), states_of(teacher, draw(300, 2))
    settings = Fitting(epochs=4, batch_size=32, learning_rate=0.1)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=0, settings=settings)
    ranks = rank_readouts(teacher, fitted, validation.eval_set, device=CPU)
    found = [mean_ndcg(each["full"]) for each in ranks]
    np.testing.assert_allclose(found, fitted.ndcg, rtol=1e-12)
    assert (fitted.ndcg > 0).all()


def test_leaves_the_teacher_as_it_was(
    teacher: Recommender, draw: Draw, states_of: StatesOf
) -> None:
    teacher.output_adapter.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trains = {name: each.requires_grad for name, each in teacher.named_parameters()}
    cached = states_of(teacher, draw(50, 1))
    fit_readouts(teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=2))
    assert trains == {name: each.requires_grad for name, each in teacher.named_parameters()}
    assert len(set(trains.values())) == 2
    assert all(each.grad is None for each in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_same_seed_same_bits(teacher: Recommender, draw: Draw, states_of: StatesOf) -> None:
    cached = states_of(teacher, draw(70, 1))
    settings = Fitting(epochs=2, batch_size=16)
    first, again, other = (
        fit_readouts(teacher, cached, cached, device=CPU, seed=seed, settings=settings)
        for seed in (4, 4, 5)
    )
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


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
