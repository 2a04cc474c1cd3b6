"""The cost of each depth from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import BartConfig, GPT2Config, LlamaConfig, RwkvConfig, T5Config, XLMConfig

from depthprobe.cost import table as module
from depthprobe.cost.table import Workload, cost_table, random_backbone
from depthprobe.errors import BadInput

QUICK = Workload(batch=3, length=5, items=20, width=4, prompt=2, seconds=0.01)


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, llama_config: Callable[..., LlamaConfig]
) -> str:
    folder = tmp_path_factory.mktemp("llama")
    llama_config().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def costs(config: str) -> pd.DataFrame:
    return cost_table(config, "1,2", device="cpu", workload=QUICK, price=2)


def test_one_row_a_depth_and_the_full_one(costs: pd.DataFrame) -> None:
    assert costs["depth"].tolist() == [1, 2, 4]
    steps = costs["parameters_blocks"].diff().dropna().tolist()
    assert steps == [costs["parameters_blocks"][0], 2 * costs["parameters_blocks"][0]]


def test_sizes_by_hand(costs: pd.DataFrame) -> None:
    block = 4 * 16 * 16 + 3 * 16 * 24 + 2 * 16  # q, k, v, o; gate, up, down; norms
    adapters = 4 * 16 + 16 + 16 * 4 + 4 + 16
    assert costs["parameters_blocks"].tolist() == [block, 2 * block, 4 * block]
    assert costs["parameters"][0] == block + 11 * 16 + adapters
    assert costs["bytes"][0] == 4 * (block + 11 * 16 + adapters + 21 * 4)
    # gradients and two moments; the token embeddings stay as they are
    assert costs["optimizer_bytes"][0] == 3 * 4 * (block + adapters)
    flops = 2 * (5 * (block - 32) + 2 * 5 * 7 * 16) + 2 * (6 * 4 * 16 + 20 * 4)
    assert costs["flops_user"][0] == pytest.approx(flops, rel=0.01)


def test_every_phase_is_timed(costs: pd.DataFrame) -> None:
    for phase in ("train_step", "encode", "score", "latency"):
        assert (costs[f"{phase}_ms"] > 0).all()
        assert (costs[f"{phase}_ms_n"] >= 1).all()
    assert costs["train_step_times_faster"].iloc[-1] == 1
    assert costs["not_measured"].isna().all()
    assert set(costs.attrs["seconds"]) >= {"train:4", "latency:1", "score"}


def test_memory_is_that_of_the_process_where_there_is_no_gpu(costs: pd.DataFrame) -> None:
    assert (costs[["serving_rss_bytes", "training_rss_bytes"]] > 1e6).all(axis=None)
    assert not any("allocated" in name or "reserved" in name for name in costs)


def test_a_billion_requests_by_hand() -> None:
    timing = module.Timing({"encode:1": [0.4], "score": [0.1]}, 0, 1, (), batch=100)
    found = module._times(1, 1, timing, price=3)
    assert found["users_per_second"] == 200  # so 5,000,000 seconds
    assert found["hours_per_billion"] == pytest.approx(5e6 / 3600)
    assert found["money_per_billion"] == pytest.approx(3 * 5e6 / 3600)


@pytest.mark.parametrize("tuning", ["lora", "frozen"])
def test_what_is_trained_is_measured_too(config: str, tuning: Any) -> None:
    workload = Workload(batch=2, length=3, items=20, width=4, tuning=tuning, seconds=0.01)
    costs = cost_table(config, "1", device="cpu", workload=workload)
    assert (costs["train_step_ms"] > 0).all()
    assert costs["tuning"].tolist() == [tuning, tuning]


def test_what_does_not_fit_is_counted_but_not_timed(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    costs = cost_table(config, "1", device="cpu")
    assert costs[["encode_ms", "train_step_ms", "users_per_second"]].isna().all(axis=None)
    assert (costs["flops_user"] > 0).all()
    assert costs["not_measured"].str.contains("0.0 GB are free").all()
    nothing = cost_table(config, "1", device="cpu", workload=Workload(seconds=0))
    assert nothing["not_measured"][0] == "no time was given to it"


def test_a_backbone_of_seven_billion_without_a_weight(
    tmp_path: Path, llama_config: Callable[..., LlamaConfig]
) -> None:
    llama_config(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    workload = Workload(tuning="lora", seconds=0)
    costs = cost_table(str(tmp_path), "4,8", workload=workload)
    assert costs["depth"].tolist() == [4, 8, 32]
    assert costs["parameters"].iloc[-1] == pytest.approx(6.6e9, rel=0.02)
    ratios = costs["flops_user"].iloc[-1] / costs["flops_user"]
    assert ratios.tolist() == pytest.approx([8, 4, 1], rel=0.01)


def test_making_a_backbone_leaves_the_random_state(
    llama_config: Callable[..., LlamaConfig],
) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    cpu = torch.device("cpu")
    first, second = (random_backbone(llama_config(), "auto", cpu) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_learned_position_is_not_made_up(tmp_path: Path) -> None:
    GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(BadInput, match="length: expected at most 8 positions .*got 8"):
        cost_table(str(tmp_path), "1", device="cpu", workload=Workload(length=8, prompt=1))


def test_what_can_not_be_cut(tmp_path: Path) -> None:
    T5Config(vocab_size=11, d_model=8, num_layers=2, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="backbone"):
        cost_table(str(tmp_path), "1", device="cpu", workload=QUICK)
    RwkvConfig(vocab_size=11, hidden_size=8, num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="rescales its weights") as caught:
        cost_table(str(tmp_path), "1", device="cpu", workload=QUICK)
    assert str(caught.value).count("expected") == 1
    heads = {"decoder_attention_heads": 2, "encoder_attention_heads": 2}
    BartConfig(
        vocab_size=11, d_model=8, encoder_layers=2, decoder_layers=2, **heads
    ).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="no token embeddings of its own"):
        cost_table(str(tmp_path), "1", device="cpu", workload=QUICK)
    XLMConfig(vocab_size=11, emb_dim=8, n_layers=2, n_heads=2, n_langs=1).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="more than one list of blocks"):
        cost_table(str(tmp_path), "1", device="cpu", workload=QUICK)


def test_depths_that_are_not_there(config: str) -> None:
    with pytest.raises(BadInput, match="layers"):
        cost_table(config, "5", device="cpu")


@pytest.mark.parametrize("price", [0, -1, float("nan"), float("inf")])
def test_a_price_that_is_none(config: str, price: float) -> None:
    with pytest.raises(BadInput, match="price"):
        cost_table(config, price=price)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0),
        ("length", 0),
        ("items", 9),
        ("prompt", -1),
        ("dtype", "int8"),
        ("tuning", "none"),
        ("seconds", -1),
        ("seconds", float("inf")),
    ],
)
def test_a_workload_that_is_none(field: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"^{field}: "):
        Workload(**{field: value})


@pytest.mark.gpu
def test_a_gpu_has_two_kinds_of_memory_and_no_rss(config: str) -> None:
    costs = cost_table(config, "1,2", device="cuda", workload=QUICK)
    for task in ("serving", "training"):
        allocated, reserved = (costs[f"{task}_{kind}_bytes"] for kind in ("allocated", "reserved"))
        assert ((allocated > 0) & (allocated <= reserved)).all()
    assert not any("rss" in name for name in costs)
    assert (costs["train_step_ms"] > 0).all()
