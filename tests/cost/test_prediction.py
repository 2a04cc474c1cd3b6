"""Predictions against sums by hand, and their memory against what autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig

from depthprobe.cost.actions import random_backbone, recommender, stepping
from depthprobe.cost.depths import Shape, depth_shapes
from depthprobe.cost.gpus import GPUS, Roof
from depthprobe.cost.prediction import (
    encode_seconds,
    largest_gain,
    prediction_table,
    saturating_batch,
    score_seconds,
    serving_bytes,
    train_seconds,
    training_bytes,
    trains,
)
from depthprobe.cost.workload import Workload

CPU = torch.device("cpu")
TOY = Shape(
    depth=2,
    parameters=0,
    blocks=0,
    weights=1000,
    block_weights=800,
    trained=100,
    positions=5,
    prompt_positions=7,
    ports=30,
    flops_encode=6000.0,
    flops_prompt=500.0,
    flops_score=80.0,
    items=20,
    dtype="bfloat16",
    tuning="full",
)
# infinitely fast in one way, to see the other
COMPUTES = Roof("computes", {"bfloat16": 1.0, "float32": 1.0}, float("inf"), 1e4)
MOVES = Roof("moves", {"bfloat16": float("inf"), "float32": float("inf")}, 1.0, 1e4)


def test_seconds_by_hand() -> None:
    assert encode_seconds(TOY, 3, COMPUTES) == 3 * 6000
    assert encode_seconds(TOY, 3, MOVES) == 800 + 3 * 5 * 30 * 2
    assert score_seconds(TOY, 3, COMPUTES) == 3 * 80
    assert score_seconds(TOY, 3, MOVES) == 40 * 4 + 2 * 3 * 20 * 4
    assert train_seconds(TOY, 3, COMPUTES, asked=5) == 3 * (3 * 6000 + 500) + 2 * 15 * 80
    of_scores = 2 * 40 * 4 + 4 * 15 * 20 * 4
    moved = 2 * 800 + 10 * 100 + 3 * (15 + 7) * 30 * 2
    assert train_seconds(TOY, 3, MOVES, asked=5) == moved + of_scores


def test_weights_that_are_frozen_get_no_gradient() -> None:
    frozen = replace(TOY, tuning="lora")
    assert train_seconds(frozen, 3, COMPUTES, asked=5) == 2 * (3 * 6000 + 500) + 2 * 15 * 80


def test_bytes_by_hand() -> None:
    assert serving_bytes(TOY, 3) == 1000 + 3 * 5 * 15 * 2 + 2 * 3 * 20 * 4
    assert training_bytes(TOY, 3) == 1000 + 300 + (15 + 7) * 30 * 2 + 2 * 15 * 20 * 4
    assert trains(TOY, 3, memory=1e6)
    assert not trains(TOY, 3, memory=5000)


def test_a_batch_saturates_where_doubling_gains_little() -> None:
    def rate(batch: int) -> float:
        return batch / (50 + batch)  # users a second of a device with a fixed cost

    found = saturating_batch(rate, lambda batch: True, gain=1.1)
    assert rate(2 * found) < 1.1 * rate(found)
    assert rate(found) >= 1.1 * rate(found // 2)
    assert saturating_batch(rate, lambda batch: batch <= 32, gain=1.1) == 32


def test_a_batch_for_a_memory_that_no_step_fits() -> None:
    small = replace(GPUS["H100-SXM"], memory=10_000)
    assert not trains(TOY, 8, small.memory)
    # 5,960 bytes for 16 users, 10,920 for 32
    assert largest_gain(TOY, small) == 16


def test_speed_ups_are_over_the_last_row() -> None:
    half = replace(TOY, depth=1, block_weights=400, ports=15, flops_encode=3000.0)
    table = prediction_table([half, TOY], COMPUTES, Workload(batch=4, length=5), price=3)
    assert table["predicted_answer_times_faster"].tolist() == pytest.approx([6080 / 3080, 1])
    hours = table["predicted_hours_per_billion"]
    assert table["predicted_money_per_billion"].tolist() == pytest.approx((3 * hours).tolist())
    assert table["predicted_answer_ms"].tolist() == [4 * 3080 * 1000, 4 * 6080 * 1000]


def test_a_shape_by_hand(llama_config: Callable[..., LlamaConfig]) -> None:
    workload = Workload(batch=2, length=5, items=20, width=4, prompt=3, tuning="full")
    one, whole = depth_shapes(llama_config(), [1, 4], workload)
    matrices = 4 * 16 * 16 + 3 * 16 * 24  # q, k, v, o; gate, up, down
    block = matrices + 2 * 16
    assert (one.blocks, whole.blocks) == (block, 4 * block)
    assert whole.block_weights == 4 * 4 * block
    assert one.ports == 4 * 32 + 3 * 40
    assert (one.positions, one.prompt_positions) == (5, 3)
    adapters = 4 * 16 + 16 + 16 * 4 + 4 + 16
    assert one.parameters == block + 11 * 16 + adapters
    assert one.trained == 4 * (block + adapters)  # token embeddings stay as they are
    attention = 4 * 5 * (5 + 3) * 16
    assert one.flops_encode == pytest.approx(2 * matrices * 5 + attention + 2 * 6 * 4 * 16, rel=0.1)
    assert whole.flops_encode - one.flops_encode == pytest.approx(
        3 * (2 * matrices * 5 + attention)
    )


def test_activations_are_about_what_autograd_keeps(
    llama_config: Callable[..., LlamaConfig],
) -> None:
    config = llama_config(hidden_size=64, intermediate_size=172, num_attention_heads=4)
    workload = Workload(batch=16, length=30, items=10, width=4, tuning="full")
    (shape,) = depth_shapes(config, [4], workload)
    model = recommender(random_backbone(config, workload, CPU), workload).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    action = stepping(model, workload, 16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        action()
    predicted = training_bytes(shape, 16) - shape.weights - 3 * shape.trained
    assert 0.6 < predicted / sum(kept.values()) < 1.6
