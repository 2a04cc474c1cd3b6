"""Targets of a batch, and the losses of them against a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING

from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Distillation, Elastic, Recipe
from depthprobe.training.distillation import Distiller
from depthprobe.training.objectives import (
    ElasticObjective,
    NextItem,
    count_targets,
    dropout_rates,
    last_only,
    make_batch,
)

CPU = torch.device("cpu")
WINDOWS = [np.array([5, 6, 7]), np.array([8, 9]), np.array([1, 2, 3, 4])]
Maker = Callable[..., Recommender]


def test_every_position_has_a_target() -> None:
    batch = make_batch(WINDOWS, np.array([0, 1]), CPU, "every")
    assert batch.inputs.tolist() == [[5, 6], [8, 0]]  # the last item of a window is a target alone
    assert batch.targets.tolist() == [6, 7, 9]
    assert batch.rows.tolist() == [0, 1, 2]  # of [5, 6, 8, 0]; padding has no target
    assert (batch.lengths.tolist(), batch.count) == ([2, 1], 3)
    assert batch.last.tolist() == [7, 9]
    assert count_targets(WINDOWS, "every").tolist() == [2, 1, 3]


def test_the_last_position_alone_has_a_target() -> None:
    batch = make_batch(WINDOWS, np.array([2, 1, 0]), CPU, "last")
    assert batch.inputs.tolist() == [[1, 2, 3], [8, 0, 0], [5, 6, 0]]
    assert batch.targets.tolist() == batch.last.tolist() == [4, 9, 7]
    assert batch.rows.tolist() == [2, 3, 7]
    assert batch.count == count_targets(WINDOWS, "last").sum() == 3
    reduced = last_only(make_batch(WINDOWS, np.array([2, 1, 0]), CPU, "every"))
    assert reduced.objective == "last"
    for name in ("rows", "targets", "last", "inputs"):
        assert torch.equal(getattr(reduced, name), getattr(batch, name))


@pytest.mark.parametrize("objective", ["every", "last"])
@pytest.mark.parametrize("kind", ["sasrec", "recommender"])
def test_loss_is_the_mean_over_the_targets(
    kind: str, objective: Any, make_recommender: Maker, make_sasrec: Callable[..., SASRec]
) -> None:
    model: nn.Module = make_sasrec() if kind == "sasrec" else make_recommender()
    model, recipe = model.double().eval(), Recipe(objective=objective)
    batch = make_batch(WINDOWS, np.array([2, 0, 1]), CPU, objective)
    expected = []
    for window in WINDOWS:
        vectors = model(torch.from_numpy(window[:-1])[None])[0]  # alone nothing is padded
        targets = torch.from_numpy(window[1:])
        if objective == "last":
            vectors, targets = vectors[-1:], targets[-1:]
        scores = vectors @ model.item_matrix()[1:].T  # type: ignore[operator]
        expected += cross_entropy(scores, targets - 1, reduction="none").tolist()
    loss = NextItem(model, recipe)(batch)
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-7)  # norms run in float32


def test_a_suffix_needs_to_know_where_histories_end(make_recommender: Maker) -> None:
    batch = make_batch(WINDOWS, np.array([0]), CPU, "every")
    with pytest.raises(ValueError, match="suffix"):
        NextItem(make_recommender(suffix=(5, 2)), Recipe())(batch)


# One model for every depth


def test_rates_grow_with_depth() -> None:
    formula = [0.2 * (np.exp(block * np.log(2) / 4) - 1) for block in range(5)]
    np.testing.assert_allclose(dropout_rates(5, 0.2), formula)
    assert dropout_rates(1, 0.2).tolist() == [0.0]


@pytest.mark.parametrize("objective", ["every", "last"])
def test_elastic_loss_and_gradients_are_those_of_really_cut_models(
    objective: Any, make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    batch, recipe = make_batch(windows, np.arange(6), CPU, objective), Recipe(objective=objective)
    model, settings = make_recommender().double(), Elastic(exits=3, weight=0.6, dropout=0.0)
    loss = ElasticObjective(model, settings, recipe)(batch)
    loss.backward()
    expected, gradients = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for depth, weight in ((4, 1.0), (1, 0.2), (2, 0.2), (3, 0.2)):
        cut = make_recommender().double()
        keep_blocks(cut.backbone, range(depth))
        part = weight * NextItem(cut, recipe)(batch)
        part.backward()
        expected += part.item()
        for name, p in cut.named_parameters():
            gradients[name] += 0 if p.grad is None else p.grad
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    for name, p in model.named_parameters():
        if p.grad is not None:  # the norms compute in float32
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_dropped_blocks_are_left_out_in_training_alone(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    model, settings = make_recommender(), Elastic(dropout=0.9, weight=0.0)
    objective = ElasticObjective(model, settings, Recipe())
    draws = np.random.default_rng(11).random(4) < dropout_rates(4, 0.9)
    assert draws.any()
    batch = make_batch(windows, np.arange(6), CPU, "every", draw=11)
    with torch.no_grad():
        full = NextItem(model, Recipe())(batch)
        with skip_blocks(model.backbone, np.flatnonzero(draws).tolist()):
            dropped = NextItem(model, Recipe())(batch)
        torch.testing.assert_close(objective.train()(batch), dropped)
        torch.testing.assert_close(objective.eval()(batch), full)
        assert not torch.equal(full, dropped)


def test_several_streams_between_blocks_are_refused() -> None:
    backbone = tiny_model(CONFIG_MAPPING["gemma3n_text"](), depth=4)
    model = Recommender(backbone, torch.randn(13, 6), (3, 1))
    for build in (
        lambda: ElasticObjective(model, Elastic(), Recipe()),
        lambda: Distiller(model, Distillation(), Recipe(), None),
    ):
        with pytest.raises(ValueError, match="gemma3n_text can't be read out by depth"):
            build()
