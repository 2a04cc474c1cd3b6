"""Budgets in a report: predicted beside measured, and what is left of each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from depthprobe.report.budgets import CELLS, budget_table, options_by_budget, predicted_damage
from depthprobe.report.drawing import FIGURES, NoData
from depthprobe.report.numbers import Summary, summarise


@pytest.fixture
def budgets(make: Callable[..., Any], summary: Summary, tmp_path: Path) -> Summary:
    run = make(tmp_path, users=200, methods={"full", "mix"}, timing=False)
    return summarise(replace(run, probes={"mix": summary.run.scores("mix")}))


def test_the_table_has_what_is_predicted_beside_what_is_measured(budgets: Summary) -> None:
    table = budget_table(budgets)
    assert table is not None
    assert table.columns[:7] == (
        "budget, blocks", "of all blocks", *CELLS,
    )  # fmt: skip
    few, more = table.rows
    assert few[:7] == ("2", "16.7 %", "1", "1", "1", "1", "8")
    assert more[:7] == ("4", "33.3 %", "3", "1", "1", "1", "6")
    assert few[8:10] == ("11.0 %", "22.0 %")
    for row, point in zip(table.frame.to_dict("records"), budgets.of("mix"), strict=True):
        change = point.change("NDCG@10")
        ends = [row["test"], row["test low"], row["test high"]]
        assert ends == [-change.value, -change.high, -change.low]
        assert row["parameters"] == point.cost("parameters")


def test_the_figure_draws_all_three(budgets: Summary) -> None:
    ax = predicted_damage(budgets)
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert [list(line.get_ydata()) for line in lines.values()][:2] == [
        pytest.approx([11, 9]), pytest.approx([22, 18]),
    ]  # fmt: skip
    assert len(lines) == 3
    caption = FIGURES["predicted_damage"].drawn(budgets)[1]
    assert "a budget of 2: predicted 11.0 %, measured 22.0 % on the same users" in caption


def test_every_cell_has_the_colour_of_its_option(budgets: Summary) -> None:
    ax = options_by_budget(budgets)
    found = {}
    for shapes, name in zip(ax.collections, CELLS, strict=True):
        for path in shapes.get_paths():
            column, row = np.round(path.vertices[:4].mean(axis=0)).astype(int)
            found[row, column] = name
            assert to_hex(shapes.get_facecolor()[0]) == CELLS[name]
    assert len(found) == 12 * 2
    assert [found[row, 0] for row in (0, 1, 2, 10, 11)] == [
        "kept whole", "linear map", "skipped", "without attention", "without MLP",
    ]  # fmt: skip
    assert found[3, 1] == "linear map"
    caption = FIGURES["options_by_budget"].drawn(budgets)[1]
    assert caption == (
        "Of 24 choices of a block under a budget: 4 kept whole, 2 without attention, 2 without MLP,"
        " 2 linear map, 14 skipped."
    )


def test_without_budgets_there_is_nothing(budgets: Summary) -> None:
    empty = replace(budgets, run=replace(budgets.run, probes={"mix": pd.DataFrame()}))
    assert budget_table(empty) is None
    for draw in (predicted_damage, options_by_budget):
        with pytest.raises(NoData, match="a run with mix"):
            draw(empty)
