"""Parameters and bytes against sums by hand; planted peaks of memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.cost.size import (
    LIBRARIES,
    PARTS,
    count_bytes,
    count_parameters,
    free_memory,
    parameters_by_block,
    peak_memory,
    training_memory,
)
from depthprobe.models.build import make_trainable
from depthprobe.models.families import family_config
from depthprobe.models.recommender import Popularity, Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone

SLOW = ("bert", "bloom", "jamba", "mixtral", "qwen3_next", "roberta", "zamba2")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MEMORY = 200 * 2**20


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
        assert sum(found[name] for name in PARTS) == found["total"]


@pytest.mark.parametrize(
    "name",
    [
        *("deepseek_v3", "gemma3n_text", "gpt2", "gpt_oss", "opt"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW),
    ],
)
def test_parts_add_up_for_every_family(name: str) -> None:
    model = Recommender(tiny_model(family_config(name), depth=4), torch.randn(9, 4), ())
    found, held = count_parameters(model), count_bytes(model)
    weights = {id(weight): weight for weight in model.parameters()}.values()
    assert sum(found[part] for part in PARTS) == found["total"]
    assert found["total"] == sum(weight.numel() for weight in weights)
    assert sum(held[part] for part in PARTS) == held["total"]
    assert held["total"] == sum(weight.nbytes for weight in weights)
    blocks = parameters_by_block(model)
    assert len(blocks) == model.depth
    assert sum(blocks) == found["blocks"]
    # what is neither in a block nor a table: norms, adapters, projections at both ends
    assert found["adapters"] < found["total"] / 2


def test_blocks_that_differ() -> None:
    model = Recommender(tiny_model(family_config("deepseek_v3"), depth=5), torch.randn(9, 4), ())
    dense, *_, sparse = parameters_by_block(model)
    experts = 4 * 3 * 32 * 16 + 3 * 32 * 16 + 4 * 32  # four and a shared one, the router
    assert sparse - dense == experts - 3 * 32 * 48
    assert parameters_by_block(model) == [dense] * 3 + [sparse] * 2


def test_positions_are_token_embeddings() -> None:
    model = Recommender(tiny_model(family_config("gpt2"), depth=2), torch.randn(9, 4), ())
    assert count_parameters(model)["token_embeddings"] == (128 + 128) * 32


def test_bytes_by_dtype(recommender: Callable[[int], Recommender]) -> None:
    model = recommender(2)
    model.backbone.to(torch.bfloat16)
    counts, held = count_parameters(model), count_bytes(model)
    norm = 16
    assert held["blocks"] == 2 * counts["blocks"]
    assert held["token_embeddings"] == 2 * counts["token_embeddings"]
    assert held["item_table"] == 4 * counts["item_table"]
    assert held["adapters"] == 4 * (counts["adapters"] - norm) + 2 * norm
    assert held["bfloat16"] + held["float32"] == held["total"]
    assert "trainable" not in held


def test_tied_weights_count_once() -> None:
    linear = nn.Linear(3, 3, bias=False)
    model = nn.ModuleDict({"blocks": nn.ModuleList([linear, linear]), "head": linear})
    model.blocks = model["blocks"]
    assert count_parameters(model) == {
        "blocks": 9, "token_embeddings": 0, "adapters": 0, "item_table": 0,
        "total": 9, "trainable": 9,
    }  # fmt: skip
    assert count_bytes(model)["total"] == count_bytes(model)["float32"] == 36


def test_packed_weights(recommender: Callable[[int], Recommender]) -> None:
    model = recommender(1)
    counts, held = count_parameters(model), count_bytes(model)
    linear: Any = model.backbone.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(torch.zeros(16 * 24 // 2, 1, dtype=torch.uint8), False)
    scales = SimpleNamespace(absmax=torch.zeros(3), code=torch.zeros(4), state2=None)
    linear.weight.quant_state = SimpleNamespace(absmax=torch.zeros(6).byte(), state2=scales)
    packed = count_bytes(model)
    assert count_parameters(model)["blocks"] == counts["blocks"] == sum(parameters_by_block(model))
    assert packed["uint8"] == 16 * 24 // 2 + 6
    assert packed["blocks"] - held["blocks"] == packed["uint8"] + 7 * 4 - 16 * 24 * 4


def test_the_optimiser_holds_what_is_trained(recommender: Callable[[int], Recommender]) -> None:
    model = recommender(2)
    make_trainable(model, Backbone(tuning="frozen"))
    adapters = 6 * 16 + 16 + 16 * 6 + 6
    assert count_bytes(model)["optimizer"] == 3 * 4 * adapters


# --- memory at its peak ----------------------------------------------------------------------


def test_the_peak_of_a_process_is_seen_though_it_is_over_at_the_end() -> None:
    with peak_memory(CPU) as before:
        pass
    with peak_memory(CPU) as found:
        torch.ones(MEMORY // 4).sum()
    with peak_memory(CPU) as after:
        pass
    assert set(found) == {"rss"}
    assert 0.9 * MEMORY < found["rss"] - before["rss"] < 1.6 * MEMORY
    assert after["rss"] < found["rss"] - 0.8 * MEMORY


def test_no_more_than_half_of_what_is_free_may_be_had() -> None:
    assert 0 < free_memory(CPU) < 0.6 * psutil.virtual_memory().total


@pytest.mark.gpu
def test_a_gpus_memory_is_allocated_and_reserved() -> None:
    with peak_memory(CUDA) as found:
        torch.ones(MEMORY // 4, device="cuda").sum()
    assert set(found) == {"allocated", "reserved"}
    assert MEMORY <= found["allocated"] <= found["reserved"]


def test_the_memory_of_a_training_by_hand(llama_config: Callable[..., Any]) -> None:
    config = llama_config(hidden_size=16, intermediate_size=24, num_hidden_layers=4)
    given = {"positions": 100, "trained": True, "checkpointing": False}
    # 4 bytes: 1,000 weights, gradients and two moments; 100 positions x 4 blocks x (96 + 72)
    assert training_memory(config, 1000, **given) - LIBRARIES == 4 * (4000 + 67_200)
    frozen = training_memory(config, 1000, **given | {"trained": False, "checkpointing": True})
    assert frozen - LIBRARIES == 4 * (1000 + 100 * 4 * 16)
