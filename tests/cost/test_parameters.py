"""Parameters against a sum by hand; FLOPs against the profiler's count."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.cost.flops import flops_per_user
from depthprobe.cost.parameters import count_parameters
from depthprobe.models.build import make_trainable
from depthprobe.models.popularity import Popularity
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.study import Backbone


@pytest.fixture
def recommender(llama_config: Callable[..., LlamaConfig]) -> Callable[[int], Recommender]:
    """``recommender(blocks)``, without a prompt; eager, which the profiler can count."""

    def make(blocks: int) -> Recommender:
        config = llama_config(
            num_hidden_layers=blocks, num_attention_heads=4, attn_implementation="eager"
        )
        return Recommender(LlamaForCausalLM(config), torch.randn(31, 6), ()).eval()

    return make


def test_parts_by_hand(recommender: Callable[[int], Recommender]) -> None:
    model = recommender(3)
    make_trainable(model, Backbone(tuning="full"))
    found = count_parameters(model)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q, k and v of two heads of four, o
    block = attention + 3 * 16 * 24 + 2 * 16
    adapters = 6 * 16 + 16 + 16 * 6 + 6 + 16  # in, out, final norm
    assert found == {
        "blocks": 3 * block,
        "token_embeddings": 11 * 16,
        "adapters": adapters,
        "item_table": 31 * 6,
        "total": 3 * block + 11 * 16 + adapters + 31 * 6,
        "trainable": 3 * block + adapters,
    }


def test_parts_add_up_for_every_model(recommender: Callable[[int], Recommender]) -> None:
    models = [
        recommender(2),
        SASRec(9, width=8, blocks=2, heads=2, drop=0.0, longest=6),
        Popularity(np.array([1, 2]), 4),
    ]
    for model in models:
        found = count_parameters(model)
        parts = ("blocks", "token_embeddings", "adapters", "item_table")
        assert sum(found[name] for name in parts) == found["total"]


@pytest.mark.parametrize("length", [1, 7])
def test_flops_equal_the_profilers(length: int, recommender: Callable[[int], Recommender]) -> None:
    model = recommender(3)
    history = torch.randint(1, 31, (1, length))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vectors = model.encode(history, torch.tensor([length]))
        _ = vectors @ model.item_matrix()[1:].T
    assert flops_per_user(model, length) == pytest.approx(counter.get_total_flops(), rel=0.01)
