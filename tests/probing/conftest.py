"""A tiny float64 recommender with weights that matter, and questions to it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.evaluation.evaluate import Questions
from depthprobe.models.recommender import Recommender


@pytest.fixture(params=[(), (3, 1, 2)], ids=["no prompt", "prompt"])
def teacher(
    request: pytest.FixtureRequest, llama_config: Callable[..., LlamaConfig]
) -> Recommender:
    torch.manual_seed(0)
    config = llama_config(num_hidden_layers=5)
    model = Recommender(LlamaForCausalLM(config), torch.randn(41, 6), request.param).double()
    with torch.no_grad():
        for weight in model.backbone.layers.parameters():
            if weight.dim() > 1:
                weight.mul_(8)  # fresh weights are so small that a skipped block changes nothing
    return model.eval()


@pytest.fixture
def asked() -> Questions:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 41, size=rng.integers(1, 9)) for _ in range(300)]
    return Questions(
        users=np.arange(300),
        histories=histories,
        targets=rng.integers(1, 41, size=300),
        seen=histories,
        negatives=rng.integers(1, 41, size=(300, 7)),
    )
