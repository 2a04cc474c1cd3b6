"""Small models, training windows, and a training that is short or killed."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Recipe
from depthprobe.training.loop import Fit, fit


@pytest.fixture
def make_recommender(llama_config: Callable[..., LlamaConfig]) -> Callable[..., Recommender]:
    """``make_recommender(blocks=4, prompt=(3, 1), suffix=(), seed=0)``: float32, random weights."""

    def make(
        blocks: int = 4,
        prompt: tuple[int, ...] = (3, 1),
        suffix: tuple[int, ...] = (),
        seed: int = 0,
    ) -> Recommender:
        torch.manual_seed(seed)
        config = llama_config(num_hidden_layers=blocks)
        return Recommender(LlamaForCausalLM(config), torch.randn(13, 6), prompt, suffix=suffix)

    return make


@pytest.fixture
def make_sasrec() -> Callable[..., SASRec]:
    """``make_sasrec(drop=0.0)``: always the same weights."""

    def make(drop: float = 0.0) -> SASRec:
        torch.manual_seed(0)
        return SASRec(12, width=8, blocks=1, heads=2, drop=drop, longest=10)

    return make


@pytest.fixture
def windows() -> list[np.ndarray]:
    """Thirty users whose items count up by one: easily learnt. Four batches of eight."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 12, size=30)
    return [(start + np.arange(rng.integers(2, 8))) % 12 + 1 for start in starts]


@pytest.fixture
def train(windows: list[np.ndarray]) -> Callable[..., Fit]:
    """``train(objective, recipe, scores=..., **options of fit)``, on a CPU with seed 0."""

    def run(
        objective: nn.Module, recipe: Recipe, scores: Iterable[float] | None = None, **options: Any
    ) -> Fit:
        left = itertools.repeat(0.0) if scores is None else iter(scores)
        options = {"windows": windows, "validate": lambda: next(left), "seed": 0, **options}
        return fit(objective, recipe=recipe, device=torch.device("cpu"), **options)

    return run


@pytest.fixture(scope="session")
def launched() -> ModuleType:
    """The script of small trainings that two processes run."""
    script = Path(__file__).with_name("launched.py")
    spec = importlib.util.spec_from_file_location("launched", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def spoiled(launched: ModuleType) -> Callable[..., nn.Module]:
    """``spoiled(objective, call, spoil)``: by default the training is killed."""

    def make(
        objective: nn.Module, call: int, spoil: Callable[[Tensor], Tensor] = launched.kill
    ) -> nn.Module:
        model: nn.Module = launched.Spoiled(objective, call, spoil)
        return model

    return make


@pytest.fixture
def assert_same() -> Callable[..., None]:
    """``assert_same(one, other, near=0.0)``: two models have the same weights, to the bit."""

    def check(one: nn.Module, other: nn.Module, near: float = 0.0) -> None:
        for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=near, msg=name)

    return check
