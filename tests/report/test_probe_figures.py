"""Figures of probes and costs draw the numbers that they say, each with its interval."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer

from depthprobe.report.block_figures import (
    ablation_changes,
    ablation_reading,
    block_influence,
    influence_reading,
    settling_depth,
    settling_reading,
    span_cells,
    span_map,
    span_reading,
)
from depthprobe.report.depth_figures import speed_vs_depth
from depthprobe.report.numbers import Summary, summarise
from depthprobe.report.tables import ablation_table, cost_table, timed


def _gains(run: Any) -> Any:
    users = run.users[run.users["protocol"] == "full"].merge(run.trials, on="trial")
    gain = np.where(users["rank"] <= 10, 1 / np.log2(users["rank"] + 1), 0)
    return users.assign(gain=gain)


def test_damage_of_a_span_is_the_share_that_is_lost(run: Any, summary: Summary) -> None:
    gains = _gains(run)
    cells = span_cells(summary, "damage")
    assert len(cells) == 12 + 21  # each block, and each run of two or three
    teacher = gains[gains["method"] == "full"]["gain"].mean()
    own = gains[(gains["method"] == "span") & (gains["removed"] == "3-5")]["gain"].mean()
    assert cells[3, 6] == pytest.approx(1 - own / teacher)


@pytest.mark.parametrize("score", ["damage", "angular-distance", "cka"])
def test_a_map_has_every_run_at_its_ends(summary: Summary, score: str) -> None:
    grid = np.ma.filled(span_map(summary, score=score).collections[0].get_array(), np.nan)
    cells = span_cells(summary, score)
    assert np.isfinite(grid).sum() == len(cells)
    scale = 100 if score == "damage" else 1
    for (start, end), value in cells.items():
        expected = max(0.0, scale * value) if score != "cka" else value
        assert grid[start, end - 1] == pytest.approx(expected)


def test_maps_say_which_runs_change_least(summary: Summary) -> None:
    frame = summary.run.scores("similarity")  # type: ignore[attr-defined]
    means = frame[frame["score"] == "angular-distance"].groupby(["start", "end"])["value"].mean()
    wide = {span: value for span, value in means.items() if span[1] - span[0] > 1}
    start, end = min(wide, key=lambda span: wide[span])
    assert f"blocks {start} to {end - 1} turn the state least" in span_reading(
        summary, "angular-distance"
    )
    assert "CKA" in span_reading(summary, "cka")
    assert "blocks" in span_reading(summary, "damage")


def test_influence_is_the_mean_over_teachers(summary: Summary) -> None:
    drawn = {
        c.get_label(): c.lines[0].get_ydata()
        for c in block_influence(summary).containers
        if isinstance(c, ErrorbarContainer)
    }
    assert drawn["the block"].tolist() == pytest.approx([0.9, *(0.01 * b for b in range(2, 13))])
    assert set(drawn) == {"the block", "its attention", "its MLP"}
    assert influence_reading(summary).startswith("Block 0 turns the state most (0.90), block 1")


def test_settled_users_are_counted(summary: Summary) -> None:
    frame = summary.run.scores("settling")  # type: ignore[attr-defined]
    curves = {c.get_label(): c.lines[0] for c in settling_depth(summary).containers}
    curve = curves["same ten items"].get_ydata()
    assert curve[8] == pytest.approx(100 * (frame["set_settled"] <= 8).mean())
    assert np.all(np.diff(curve) >= 0)
    lost = ((frame["best_rank"] <= 10) & (frame["final_rank"] > 10)).mean()
    text = settling_reading(summary)
    assert f"{100 * frame['overthinking'].mean():.1f} % [" in text
    assert f"{100 * lost:.1f} % [" in text


def test_ablation_draws_the_table(summary: Summary) -> None:
    table = ablation_table(summary)
    assert table is not None
    expected = 100 * (table.frame["ratio"].dropna() - 1)
    bars = [c for c in ablation_changes(summary).containers if isinstance(c, ErrorbarContainer)]
    assert [float(c.lines[0].get_xdata()[0]) for c in bars] == pytest.approx(expected.tolist())
    assert ablation_reading(summary).startswith(f"Of {len(bars)} comparisons with fine-tuning")


def test_costs_by_depth_are_those_of_the_plainest_model(summary: Summary) -> None:
    table = cost_table(summary)
    assert table is not None
    assert table.frame["depth"].tolist() == [1, 2, 4, 8, 12, 0]
    points = {p.depth: p for p in timed(summary, "training")}
    assert {p.method for p in points.values()} == {"finetune"}
    speed = {
        c.get_label(): c
        for c in speed_vs_depth(summary).containers
        if isinstance(c, ErrorbarContainer)
    }
    drawn = speed["to train"].lines[0].get_ydata()
    assert drawn.tolist() == pytest.approx([p.speed["training"].value for p in points.values()])


def test_one_round_of_timing_draws_no_endless_bar(make: Callable[..., Any], tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune"})
    for record in run.records:
        for rounds in (record.costs.timing or {}).values():
            rounds.seconds = rounds.seconds[:1]
    low, high = speed_vs_depth(summarise(run)).get_ylim()
    assert 0 < low < 1 < high < 100
