"""Fitted read-outs equal a naive fit of each depth alone, and find what a depth knows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.evaluate import Questions, mean_ndcg
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing import readout
from depthprobe.probing.early_exit import early_exit
from depthprobe.probing.passes import passes
from depthprobe.probing.readout import (
    CachedStates,
    Fitting,
    cache_states,
    fit_readouts,
    rank_readouts,
    score_gradient,
)

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


def naive_ndcg(vectors: Tensor, items: Tensor, targets: Tensor) -> float:
    scores = vectors @ items[1:].T
    wanted = scores.gather(1, targets[:, None] - 1)
    ranks = 1 + (scores > wanted).sum(1) + ((scores == wanted).sum(1) - 1) / 2
    return mean_ndcg(ranks.numpy())


def test_side_by_side_is_each_depth_alone(teacher: Recommender) -> None:
    train, validation = exact(teacher, draw(150, 1)), exact(teacher, draw(90, 2))
    settings = Fitting(epochs=12, batch_size=40, learning_rate=0.05, patience=2)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=3, settings=settings)
    items = teacher.item_matrix()
    for depth in range(6):
        with torch.no_grad():
            x, v = (
                teacher.backbone.norm(torch.from_numpy(cached.states[:, depth]))
                for cached in (train, validation)
            )
        y, w = (torch.from_numpy(cached.asked.targets) for cached in (train, validation))
        head = nn.Linear(16, 6).double()
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.05, weight_decay=0.01)
        best, chosen, step = naive_ndcg(head(v), items, w), 0, 0
        weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
        for epoch in range(1, 13):
            order = np.random.default_rng((3, epoch)).permutation(150)
            for rows in (order[:40], order[40:80], order[80:120], order[120:]):
                optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / 48))
                optimizer.zero_grad()
                cross_entropy(head(x[rows]) @ items[1:].T, y[rows] - 1).backward()
                optimizer.step()
                step += 1
            found = naive_ndcg(head(v), items, w)
            if found > best:
                best, chosen = found, epoch
                weight, bias = head.weight.detach().clone(), head.bias.detach().clone()
            if epoch - chosen >= 2:
                break
        assert fitted.epochs[depth] == chosen
        assert fitted.ndcg[depth] == pytest.approx(best, abs=1e-12)
        torch.testing.assert_close(fitted.weight[depth], weight.T, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(fitted.bias[depth, 0], bias, rtol=1e-9, atol=1e-9)
    assert len(set(fitted.epochs)) > 1  # the depths did stop apart


def planted(teacher: Recommender, asked: Questions, depth: int) -> CachedStates:
    """The target is the item that a random head reads at a depth."""
    cached = exact(teacher, asked)
    with torch.no_grad():
        normed = teacher.backbone.norm(torch.from_numpy(cached.states[:, depth]))
        head = torch.randn(16, 6, generator=torch.Generator().manual_seed(5)).double()
        targets = (normed @ head @ teacher.item_matrix()[1:].T).argmax(dim=1) + 1
    told = Questions(asked.users, asked.histories, targets.numpy(), None, None)
    return CachedStates(told, cached.states)


def test_finds_what_the_head_cannot_read(teacher: Recommender) -> None:
    train, validation, test = (
        planted(teacher, draw(users, seed), 2) for users, seed in ((1500, 1), (300, 2), (400, 3))
    )
    settings = Fitting(epochs=15, batch_size=100, learning_rate=0.1)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=0, settings=settings)
    ranks = rank_readouts(teacher, fitted, test.asked, device=CPU)
    found = [np.mean(each["full"] == 1) for each in ranks]
    exits = [np.mean(each["full"] == 1) for each in early_exit(teacher, test.asked, device=CPU)]
    assert found[2] > 0.9
    assert max(exits) < 0.25
    assert int(np.argmax(found)) == 2


def test_finds_nothing_where_nothing_is(teacher: Recommender) -> None:
    train, validation, test = (
        exact(teacher, draw(users, seed)) for users, seed in ((600, 1), (300, 2), (1000, 3))
    )
    settings = Fitting(epochs=5, batch_size=100, learning_rate=0.05)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=0, settings=settings)
    by_chance = mean_ndcg(np.arange(1, 41))
    for ranks in rank_readouts(teacher, fitted, test.asked, device=CPU):
        assert mean_ndcg(ranks["full"]) == pytest.approx(by_chance, abs=0.03)


def test_scores_are_those_of_the_weights_it_returns(teacher: Recommender) -> None:
    train, validation = exact(teacher, draw(100, 1)), exact(teacher, draw(300, 2))
    settings = Fitting(epochs=4, batch_size=32, learning_rate=0.1)
    fitted = fit_readouts(teacher, train, validation, device=CPU, seed=0, settings=settings)
    ranks = rank_readouts(teacher, fitted, validation.asked, device=CPU)
    found = [mean_ndcg(each["full"]) for each in ranks]
    np.testing.assert_allclose(found, fitted.ndcg, rtol=1e-12)
    assert (fitted.ndcg > 0).all()


def test_gradient_by_hand() -> None:
    table = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    vectors = torch.tensor([[[0.0], [math.log(3) / 2]]], dtype=torch.float64)
    # shares are (1/2, 1/2) and (3/4, 1/4), targets the first and the second item, two users
    found = score_gradient(vectors, table, torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([[[-0.5], [0.75]]], dtype=torch.float64))
    # of the same distributions, as user vectors: each other's
    found = score_gradient(vectors, table, vectors[0].flip(0))
    torch.testing.assert_close(found, torch.tensor([[[-0.25], [0.25]]], dtype=torch.float64))


@pytest.mark.parametrize("rows", [1, 4, 7, 64])
def test_gradient_is_autograd_s(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readout, "CHUNK_BYTES", 1)
    monkeypatch.setattr(readout, "FEWEST_ROWS", rows)
    torch.manual_seed(0)
    vectors, table = 3 * torch.randn(4, 10, 5).double(), torch.randn(23, 5).double()
    leaf = vectors.clone().requires_grad_()
    targets, own = torch.randint(1, 24, (10,)), torch.randn(10, 5).double()
    sum(cross_entropy(each @ table.T, targets - 1) for each in leaf).backward()
    torch.testing.assert_close(score_gradient(vectors, table, targets), leaf.grad)
    leaf.grad = None
    wanted = (own @ table.T).log_softmax(1)
    for each in leaf:
        shares = (each @ table.T).log_softmax(1)
        kl_div(shares, wanted, log_target=True, reduction="batchmean").backward()
    torch.testing.assert_close(score_gradient(vectors, table, own), leaf.grad)


def test_cached_states(teacher: Recommender, asked: Questions, tmp_path: Path) -> None:
    path = tmp_path / "states.npy"
    cached, expected = cache_states(teacher, asked, path=path, device=CPU), exact(teacher, asked)
    assert cached.states.dtype == np.float16
    assert cached.states.shape == (300, 6, 16)
    np.testing.assert_array_equal(np.load(path), cached.states)
    np.testing.assert_allclose(cached.states, expected.states, rtol=2**-11, atol=2**-25)
    rows = np.array([4, 200, 7])
    states = cached.at(rows, CPU, torch.float64)
    assert states.dtype == torch.float64
    np.testing.assert_array_equal(states.numpy(), cached.states[rows].swapaxes(0, 1))


def test_cached_states_too_large_for_half(
    teacher: Recommender, asked: Questions, tmp_path: Path
) -> None:
    with torch.no_grad():
        teacher.backbone.layers[3].mlp.down_proj.weight.mul_(1e7)
    cached = cache_states(teacher, asked, path=tmp_path / "states.npy", device=CPU)
    assert cached.states.dtype == np.float32
    assert abs(cached.states).max() > 65504
    np.testing.assert_allclose(cached.states, exact(teacher, asked).states, rtol=2**-24, atol=1e-9)


def test_cached_states_refused(teacher: Recommender, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no questions"):
        cache_states(teacher, draw(0, 0), path=tmp_path / "states.npy", device=CPU)
    asked = draw(300, 0)
    for history in asked.histories:
        history[history == 40] = 39
    asked.histories[17] = np.array([40])  # among the shortest: not in the first batch
    with torch.no_grad():
        teacher.items.weight[40] = torch.nan
    with pytest.raises(ValueError, match="infinite or NaN"):
        cache_states(teacher, asked, path=tmp_path / "states.npy", device=CPU)


def test_leaves_the_teacher_as_it_was(teacher: Recommender) -> None:
    teacher.output_adapter.requires_grad_(False)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trains = {name: each.requires_grad for name, each in teacher.named_parameters()}
    cached = exact(teacher, draw(50, 1))
    fit_readouts(teacher, cached, cached, device=CPU, seed=0, settings=Fitting(epochs=2))
    assert trains == {name: each.requires_grad for name, each in teacher.named_parameters()}
    assert len(set(trains.values())) == 2
    assert all(each.grad is None for each in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_same_seed_same_bits(teacher: Recommender) -> None:
    cached = exact(teacher, draw(70, 1))
    settings = Fitting(epochs=2, batch_size=16)
    first, again, other = (
        fit_readouts(teacher, cached, cached, device=CPU, seed=seed, settings=settings)
        for seed in (4, 4, 5)
    )
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_half_precision_and_other_decoders(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # a projection behind OPT's last block: normed states are narrower than its blocks'
    changes = {"opt": {"hidden_size": 32, "word_embed_proj_dim": 16, "num_attention_heads": 2}}
    backbone = tiny_model(CONFIG_MAPPING[family](**changes.get(family, {})), depth=3)
    teacher = Recommender(backbone, torch.randn(41, 6), ()).eval()
    teacher.backbone.bfloat16()
    asked = draw(60, 0)
    cached = cache_states(teacher, asked, path=tmp_path / "states.npy", device=CPU)
    settings = Fitting(epochs=20, batch_size=20, learning_rate=0.1, patience=20)
    fitted = fit_readouts(teacher, cached, cached, device=CPU, seed=0, settings=settings)
    assert fitted.weight.dtype == torch.float32
    assert (fitted.ndcg > 1.5 * mean_ndcg(np.arange(1, 41))).all()  # they learn their users
    assert len(rank_readouts(teacher, fitted, asked, device=CPU)) == 4
