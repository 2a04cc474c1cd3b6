"""One model for every depth: its loss, what is dropped, and that each prefix is a recommender."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Distillation, Elastic, Recipe
from depthprobe.training.distillation import Distiller
from depthprobe.training.elastic import ElasticObjective, dropout_rates
from depthprobe.training.loop import fit
from depthprobe.training.objectives import NextItem, make_batch

CPU = torch.device("cpu")
Maker = Callable[..., Recommender]


def test_rates_grow_with_depth() -> None:
    rates = dropout_rates(5, 0.2)
    formula = [0.2 * (np.exp(block * np.log(2) / 4) - 1) for block in range(5)]
    np.testing.assert_allclose(rates, formula)
    assert dropout_rates(1, 0.2).tolist() == [0.0]


@pytest.mark.parametrize("objective", ["every", "last"])
def test_loss_is_that_of_really_cut_models(
    objective: str, make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    model, recipe = make_recommender(), Recipe(objective=objective)  # type: ignore[arg-type]
    batch = make_batch(windows, np.arange(6), CPU, recipe.objective)
    settings = Elastic(exits=3, weight=0.6, dropout=0.0)
    with torch.no_grad():
        found = ElasticObjective(model, settings, recipe)(batch)
        expected = NextItem(model, recipe)(batch)
        for depth in (1, 2, 3):
            cut = make_recommender()
            keep_blocks(cut.backbone, range(depth))
            expected = expected + 0.6 / 3 * NextItem(cut, recipe)(batch)
    torch.testing.assert_close(found, expected)


def test_what_is_dropped_is_left_out_in_training_alone(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    model, settings = make_recommender(), Elastic(dropout=0.9, weight=0.0)
    objective = ElasticObjective(model, settings, Recipe())
    draws = np.random.default_rng(11).random(4) < dropout_rates(4, 0.9)
    assert draws.any()
    batch = make_batch(windows, np.arange(6), CPU, "every", draw=11)
    with torch.no_grad():
        whole = NextItem(model, Recipe())(batch)
        with skip_blocks(model.backbone, np.flatnonzero(draws).tolist()):
            dropped = NextItem(model, Recipe())(batch)
        torch.testing.assert_close(objective.train()(batch), dropped)
        torch.testing.assert_close(objective.eval()(batch), whole)
        assert not torch.equal(whole, dropped)


def test_gradients_are_those_of_the_cut_models_too(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    model, batch = make_recommender().double(), make_batch(windows, np.arange(6), CPU, "every")
    ElasticObjective(model, Elastic(exits=3, weight=3.0, dropout=0.0), Recipe())(batch).backward()
    losses = NextItem(model2 := make_recommender().double(), Recipe())(batch)
    losses.backward()
    expected = {name: p.grad.clone() for name, p in model2.named_parameters() if p.grad is not None}
    for depth in (1, 2, 3):
        cut = make_recommender().double()
        keep_blocks(cut.backbone, range(depth))
        NextItem(cut, Recipe())(batch).backward()
        for name, p in cut.named_parameters():
            if p.grad is not None:
                expected[name] += p.grad
    for name, p in model.named_parameters():
        if name in expected:
            # the norms compute in float32
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_training_makes_every_prefix_better(
    make_recommender: Maker, windows: list[np.ndarray]
) -> None:
    model, recipe = make_recommender(), Recipe(epochs=8, batch_size=8, learning_rate=0.01)
    batch = make_batch(windows, np.arange(30), CPU, "every")

    def losses() -> list[float]:
        found = []
        for depth in range(1, 5):
            with torch.no_grad(), skip_blocks(model.backbone, range(depth, 4)):
                found.append(float(NextItem(model, recipe)(batch)))
        return found

    before = losses()
    objective = ElasticObjective(model, Elastic(), recipe)
    fit(objective, windows, recipe=recipe, validate=count().__next__, seed=0, device=CPU)
    assert all(after < first for after, first in zip(losses(), before, strict=True))


def test_several_streams_between_blocks_are_refused() -> None:
    backbone = tiny_model(CONFIG_MAPPING["gemma3n_text"](), depth=4)
    model = Recommender(backbone, torch.randn(13, 6), (3, 1))
    with pytest.raises(ValueError, match="gemma3n_text can't be read out by depth"):
        ElasticObjective(model, Elastic(), Recipe())
    with pytest.raises(ValueError, match="gemma3n_text can't be read out by depth"):
        Distiller(model, Distillation(), Recipe(), None)
