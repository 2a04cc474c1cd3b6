"""The cost of each depth from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from depthprobe.cost import curve
from depthprobe.cost.curve import cost_table, predicted_tables
from depthprobe.cost.workload import Workload
from depthprobe.errors import BadInput

QUICK = Workload(batch=3, length=5, items=20, width=4, prompt=2, seconds=0.01)
PHASES = ("train_step", "encode", "score", "answer", "encode_one", "score_one", "answer_one")


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, llama_config: Callable[..., LlamaConfig]
) -> str:
    folder = tmp_path_factory.mktemp("llama")
    llama_config().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def table(config: str) -> pd.DataFrame:
    return cost_table(config, "1,2", device="cpu", workload=QUICK, price=2)


def test_one_row_a_depth_and_the_whole(table: pd.DataFrame) -> None:
    assert table["depth"].tolist() == [1, 2, 4]
    steps = table["parameters_blocks"].diff().dropna().tolist()
    assert steps == [table["parameters_blocks"][0], 2 * table["parameters_blocks"][0]]


def test_every_phase_is_timed(table: pd.DataFrame) -> None:
    for phase in PHASES:
        low, p50, high = (table[f"{phase}_ms{end}"] for end in ("_low", "", "_high"))
        assert ((low > 0) & (low <= p50) & (p50 <= high)).all()
        assert (table[f"{phase}_ms_p90"] >= p50).all()
        assert (table[f"{phase}_ms_n"] >= 7).all()
    assert table["train_step_times_faster"].iloc[-1] == 1
    assert table["not_measured"].isna().all()
    assert set(table.attrs["seconds"]) >= {"train_step:4", "answer_one:1", "score"}


def test_memory_is_that_of_the_process_where_there_is_no_gpu(table: pd.DataFrame) -> None:
    assert (table[["serving_rss_bytes", "training_rss_bytes"]] > 1e6).all(axis=None)
    assert not any("allocated" in name or "reserved" in name for name in table)


def test_energy_that_nothing_counts_is_not_zero(table: pd.DataFrame) -> None:
    assert table[["serving_joules_per_user", "training_joules_per_user"]].isna().all(axis=None)
    assert table["energy"].str.startswith("not measured").all()


def test_a_billion_requests(table: pd.DataFrame) -> None:
    rate = 3 / (table["answer_ms"] / 1000)
    assert table["users_per_second"].to_numpy() == pytest.approx(rate.to_numpy())
    hours = (1e9 / rate / 3600).to_numpy()
    assert table["hours_per_billion"].to_numpy() == pytest.approx(hours)
    assert table["money_per_billion"].to_numpy() == pytest.approx(2 * hours)


@pytest.mark.parametrize("tuning", ["lora", "frozen"])
def test_what_is_trained_is_measured_too(config: str, tuning: Any) -> None:
    workload = Workload(batch=2, length=3, items=20, width=4, tuning=tuning, seconds=0.01)
    table = cost_table(config, "1", device="cpu", workload=workload)
    assert (table["train_step_ms"] > 0).all()
    assert table["tuning"].tolist() == [tuning, tuning]


def test_a_batch_is_found(config: str) -> None:
    workload = Workload(length=3, items=20, width=4, seconds=0.05)
    table = cost_table(config, "1", device="cpu", workload=workload)
    (batch,) = set(table["batch"])
    assert batch in {2**power for power in range(3, 13)}


def test_what_does_not_fit_is_counted_but_not_timed(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "free_memory", lambda device: 1000)
    table = cost_table(config, "1", device="cpu")
    empty = ["encode_ms", "train_step_ms", "users_per_second", "training_rss_bytes"]
    assert table[empty].isna().all(axis=None)
    assert (table["flops_user"] > 0).all()
    assert table["not_measured"].str.contains("predicted to take").all()


def test_what_takes_too_long_is_not_begun(config: str) -> None:
    table = cost_table(config, "1", device="cpu", workload=Workload(batch=4096, seconds=1e-6))
    assert table["answer_ms"].isna().all()
    assert "s or more" in table["not_measured"][0]
    nothing = cost_table(config, "1", device="cpu", workload=Workload(seconds=0))
    assert nothing["not_measured"][0] == "no time was given to it"


def test_running_out_of_memory_is_an_answer(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(curve, "measure", measure)
    table = cost_table(config, "1", device="cpu", workload=QUICK)
    assert "ran out of memory with 3 users" in table["not_measured"][0]


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
    workload = Workload(tuning="lora")
    (table,) = predicted_tables(str(tmp_path), "4,8", gpus="H100", workload=workload, price=2)
    assert table["depth"].tolist() == [4, 8, 32]
    ratios = table["predicted_answer_times_faster"].tolist()
    assert ratios == pytest.approx([8, 4, 1], rel=0.01)
    assert table["predicted_fits"].tolist() == ["serving and training"] * 3
    assert all(name.startswith("predicted_") for name in table.columns[4:])


def test_a_learned_position_is_not_made_up(tmp_path: Path) -> None:
    GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2).save_pretrained(
        tmp_path
    )
    with pytest.raises(BadInput, match="length: 8 .* at most 8 positions"):
        cost_table(str(tmp_path), "1", device="cpu", workload=Workload(length=8, prompt=1))


def test_what_can_not_be_cut(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=11, d_model=8, num_layers=2, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(BadInput, match="backbone"):
        cost_table(str(tmp_path), "1", device="cpu", workload=QUICK)


def test_depths_that_are_not_there(config: str) -> None:
    with pytest.raises(BadInput, match="layers"):
        cost_table(config, "5", device="cpu")


@pytest.mark.gpu
def test_a_gpu_has_two_kinds_of_memory_and_no_rss(config: str) -> None:
    table = cost_table(config, "1,2", device="cuda", workload=QUICK)
    for task in ("serving", "training"):
        allocated, reserved = (table[f"{task}_{kind}_bytes"] for kind in ("allocated", "reserved"))
        assert ((allocated > 0) & (allocated <= reserved)).all()
    assert not any("rss" in name for name in table)
    assert (table["train_step_ms"] > 0).all()
