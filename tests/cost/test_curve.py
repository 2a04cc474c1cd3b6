"""The cost of each depth from a configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from depthprobe.cost import curve
from depthprobe.cost.curve import cost_table
from depthprobe.study import BadInput


@pytest.fixture
def config(tmp_path: Path, llama_config: Callable[..., LlamaConfig]) -> str:
    llama_config().save_pretrained(tmp_path)
    return str(tmp_path)


def test_one_row_a_depth_and_the_whole(config: str) -> None:
    table = cost_table(config, "1,2", device="cpu")
    assert table["depth"].tolist() == [1, 2, 4]
    steps = table["parameters_blocks"].diff().dropna().tolist()
    assert steps == [table["parameters_blocks"][0], 2 * table["parameters_blocks"][0]]
    assert (table[["encode_ms", "train_step_ms"]] > 0).all(axis=None)


def test_what_does_not_fit_is_counted_but_not_timed(
    config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curve, "_free_memory", lambda device: 1000)
    table = cost_table(config, "1", device="cpu")
    assert table["encode_ms"].isna().all()
    assert (table["flops_user"] > 0).all()


def test_depths_that_are_not_there(config: str) -> None:
    with pytest.raises(BadInput, match="layers"):
        cost_table(config, "5", device="cpu")
