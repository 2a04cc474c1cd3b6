"""What is left out block by block: every way, against a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.report.numbers import Summary
from depthprobe.report.tables import left_out_table


def test_numbers_equal_a_recomputation_from_ranks(run: Any, summary: Summary) -> None:
    table = left_out_table(summary)
    assert table is not None
    assert set(table.frame["method"]) == {"skip", "span", "drop-attention", "drop-mlp"}
    users = run.users[run.users["protocol"] == "full"].merge(run.trials, on="trial")
    gain = np.where(users["rank"] <= 10, 1 / np.log2(users["rank"] + 1), 0)
    teacher = gain[users["method"] == "full"].mean()
    for _, row in table.frame.iterrows():
        own = (users["method"] == row["method"]) & (users["removed"] == row["removed"])
        assert row["NDCG@10"] == pytest.approx(gain[own].mean())
        assert row["change"] == pytest.approx(gain[own].mean() / teacher - 1)
        assert row["change low"] <= row["change"] <= row["change high"]


def test_without_such_trials_there_is_no_table(make: Callable[..., Any], tmp_path: Path) -> None:
    assert left_out_table(make(tmp_path, users=60, seeds=1, methods={"full"})) is None


def test_without_a_teacher_there_is_no_change(make: Callable[..., Any], tmp_path: Path) -> None:
    table = left_out_table(make(tmp_path, users=60, seeds=1, methods={"skip"}))
    assert table is not None
    assert {row.cells[-1].text for row in table.rows} == {"–"}
