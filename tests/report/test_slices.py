"""Who loses: paired changes by slice, against the bootstrap of each slice alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.statistics import bootstrap_difference
from depthprobe.report.numbers import Summary, summarise
from depthprobe.report.tables import lists_table, slice_table

Make = Callable[..., Any]


def gains(run: Any, method: str, depth: int, inside: np.ndarray) -> np.ndarray:
    """NDCG@10 by seed and user, (S, U)."""
    done = run.trials[run.trials["status"] == "done"]
    trials = done[(done["method"] == method) & (done["depth"] == depth)]
    found = []
    for trial in trials.sort_values("seed")["trial"]:
        users = run.users[(run.users["trial"] == trial) & (run.users["protocol"] == "full")]
        ranks = users.sort_values("user")["rank"].to_numpy()[inside]
        found.append(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0))
    return np.stack(found)


def test_changes_are_those_of_the_slice_alone(run: Any, summary: Summary) -> None:
    table = slice_table(summary)
    assert table is not None
    frame = table.frame.set_index(["slice", "method", "depth"])
    resamples = run.study.protocol.resamples
    seen = 0
    for name in frame.index.unique("slice"):
        family, _, label = name.partition(":")
        inside = (
            np.ones(len(run.slices), bool)
            if name == "all"
            else (run.slices[family] == label).to_numpy()
        )
        teacher = gains(run, "full", 12, inside)
        for (method, depth), row in frame.loc[name].iterrows():
            assert row["users"] == inside.sum()
            assert row["teacher"] == pytest.approx(teacher.mean(), abs=1e-12)
            if inside.sum() < 30:
                assert math.isnan(row["difference"])
                continue
            own = gains(run, method, depth, inside)
            expected = bootstrap_difference(own, teacher, resamples=resamples)
            assert row["difference"] == pytest.approx(expected.value, abs=1e-12)
            assert row["difference low"] == pytest.approx(expected.low, abs=1e-12)
            assert row["difference high"] == pytest.approx(expected.high, abs=1e-12)
            assert row["relative"] == pytest.approx(own.mean() / teacher.mean() - 1, abs=1e-12)
            seen += 1
    assert seen >= 12


def test_what_stands_in_the_table(run: Any, summary: Summary) -> None:
    table = slice_table(summary)
    assert table is not None
    words = [row.cells[0].text for row in table.rows]
    assert words == [
        "all",
        "history of 3-4 items",
        "history of 5-8 items",
        "head target",
        "middle target",
        "tail target",
        "cold target",
    ]
    assert [row.group for row in table.rows] == [True, True, False, True, False, False, False]
    # where fine-tuned and distilled ones were trained; the best of each depth, or the answer
    assert table.columns[3:] == ("distilled 1", "distilled 2", "distilled 4")
    users = {row.cells[0].text: row.cells for row in table.rows}
    assert [cell.text for cell in users["cold target"][3:]] == ["–"] * 3  # too few users
    cell = users["tail target"][3]
    assert cell.text[0] in "+-"
    assert cell.note.startswith("[")
    assert cell.note.endswith(" %")


def test_no_slices_or_no_models_make_no_table(run: Any, make: Make, tmp_path: Path) -> None:
    assert slice_table(replace(run, slices=pd.DataFrame())) is None
    assert slice_table(replace(run, slices=run.slices.iloc[:-1])) is None  # of other users
    bare = make(tmp_path, users=60, seeds=1, methods={"full", "early-exit"})
    bare.slices = pd.DataFrame({"user": np.unique(bare.users["user"])})
    assert slice_table(bare) is None
    assert lists_table(bare) is None


def test_lists_are_means_over_seeds(run: Any, summary: Summary) -> None:
    table = lists_table(summary)
    assert table is not None
    metrics = run.metrics.set_index(["trial", "metric"])["value"]
    frame = table.frame.set_index(["method", "depth"])
    assert set(frame.index) == {
        *(("popularity", 0), ("sasrec", 0), ("full", 12)),
        *(("distill", 1), ("distill", 2), ("distill", 4)),
    }
    for (method, depth), row in frame.iterrows():
        own = (run.trials["method"] == method) & (run.trials["depth"] == depth)
        trials = run.trials.loc[own, "trial"]
        for name in ("coverage@10", "gini@10", "popularity@10"):
            expected = np.mean([metrics[trial, name] for trial in trials])
            assert row[name] == pytest.approx(expected, abs=1e-12)
    cells = {row.cells[0].text: row.cells for row in table.rows}
    assert cells["teacher"][2].text.endswith(" %")
    assert cells["teacher"][2].note.startswith("[")
    assert cells["popularity"][2].note == ""  # one seed


def test_seeds_that_the_teacher_lacks_are_left_out(make: Make, tmp_path: Path) -> None:
    run = make(
        tmp_path, users=120, methods={"full", "finetune"}, failing=[("full", 12, 1)], resamples=100
    )
    run.slices = pd.DataFrame({"user": np.unique(run.users["user"])})
    table = slice_table(summarise(run))
    assert table is not None
    everybody = np.ones(120, bool)
    for _, row in table.frame.iterrows():
        own = gains(run, row["method"], row["depth"], everybody)[:1]
        expected = (own - gains(run, "full", 12, everybody)).mean()
        assert row["difference"] == pytest.approx(expected, abs=1e-12)
