"""A tiny recommender and training windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.models.recommender import Recommender


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
def windows() -> list[np.ndarray]:
    """Thirty users whose items count up by one: easily learnt."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, 12, size=30)
    return [(start + np.arange(rng.integers(2, 8))) % 12 + 1 for start in starts]
