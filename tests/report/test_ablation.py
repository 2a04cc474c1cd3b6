"""Ways to a shallow model: paired changes against fine-tuning, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.report.depth_figures import curves
from depthprobe.report.numbers import Summary, summarise
from depthprobe.report.style import method_order, method_style
from depthprobe.report.tables import ablation_table


def gains(run: Any, trial: str) -> np.ndarray:
    users = run.users
    ranks = users[(users["trial"] == trial) & (users["protocol"] == "full")]["rank"].to_numpy()
    found: np.ndarray = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
    return found


def test_changes_are_paired_by_seed_and_user(run: Any, summary: Summary) -> None:
    table = ablation_table(summary)
    assert table is not None
    frame = table.frame.set_index(["depth", "method"])
    assert {depth for depth, _ in frame.index} == {1, 2, 4}  # at 8 nothing is compared
    for depth in (2, 4):
        plain, other = (f"{m}-{depth}-{depth}-11-" for m in ("finetune", "distill"))
        change = [(gains(run, other + s) - gains(run, plain + s)).mean() for s in "01"]
        row = frame.loc[depth, "distill"]
        assert row["difference"] == pytest.approx(np.mean(change))
        assert row["difference low"] < row["difference"] < row["difference high"]
        both = [gains(run, name + s).mean() for name in (other, plain) for s in "01"]
        assert row["ratio"] == pytest.approx(sum(both[:2]) / sum(both[2:]))
    first = [row.cells[1].text for row in table.rows if row.group]
    assert first == ["fine-tuned"] * 3


def test_nothing_to_compare_makes_no_table(make: Any, tmp_path: Path) -> None:
    for methods in (("full", "finetune"), ("full", "distill"), ("full", "skip", "finetune")):
        assert ablation_table(make(tmp_path / methods[-2], methods=methods)) is None


def test_variants_are_methods_of_their_own(run: Any) -> None:
    renamed = run.trials["method"].replace({"random-init": "distill:cos"})
    summary = summarise(replace(run, trials=run.trials.assign(method=renamed)))
    assert method_style("distill:cos").label == "distilled: cos"
    assert method_style("distill:cos") != method_style("distill")
    names = ["finetune", "heal:ends", "distill:cos", "distill", "elastic"]
    assert sorted(names, key=method_order) == [
        "finetune",
        "heal:ends",
        "distill",
        "distill:cos",
        "elastic",
    ]
    table = ablation_table(summary)
    assert table is not None
    assert "distill:cos" in set(table.frame["method"])
    # beside their method they would crowd the curves; alone they are drawn
    assert "distill:cos" not in curves(summary, "NDCG@10")
