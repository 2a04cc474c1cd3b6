"""Figures of blocks, spans, users and ways to train draw the numbers that they name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer

from depthprobe.report.block_figures import (
    ablation_changes,
    block_influence,
    settling_depth,
    skip_changes,
    skip_sensitivity,
    span_cells,
    span_map,
)
from depthprobe.report.drawing import FIGURES
from depthprobe.report.numbers import Summary
from depthprobe.report.tables import ablation_table


def lines(ax: Axes) -> dict[str, Any]:
    return {c.get_label(): c.lines[0] for c in ax.containers if isinstance(c, ErrorbarContainer)}


def caption(name: str, summary: Summary) -> str:
    return FIGURES[name].drawn(summary)[1]


def test_skip_sensitivity_has_every_block(summary: Summary) -> None:
    drawn = lines(skip_sensitivity(summary))
    assert set(drawn) == {"whole block", "attention left out", "MLP left out"}
    points, changes = drawn["whole block"], skip_changes(summary, "NDCG@10")["skip"]
    assert np.round(points.get_xdata()).tolist() == list(range(12))
    values = [100 * change.value for change in changes.values()]
    assert points.get_ydata() == pytest.approx(values)
    assert int(np.argmin(values)) == 0  # as it was made up
    assert caption("skip_sensitivity", summary).startswith(
        "Block 0 costs the most when it is left out"
    )


def test_damage_of_a_span_is_the_share_that_is_lost(run: Any, summary: Summary) -> None:
    users = run.users[run.users["protocol"] == "full"].merge(run.trials, on="trial")
    gain = np.where(users["rank"] <= 10, 1 / np.log2(users["rank"] + 1), 0)
    cells = span_cells(summary, "damage")
    assert len(cells) == 12 + 21  # each block, and each span of two or three
    own = gain[(users["method"] == "span") & (users["removed"] == "3-5")].mean()
    assert cells[3, 6] == pytest.approx(1 - own / gain[users["method"] == "full"].mean())


@pytest.mark.parametrize("score", ["damage", "angular-distance", "cka"])
def test_a_map_has_every_span_at_its_ends(summary: Summary, score: str) -> None:
    squares = span_map(summary, score=score).collections[0]
    centres = [tuple(path.vertices[:4].mean(axis=0)) for path in squares.get_paths()]
    drawn = dict(zip(centres, squares.get_array(), strict=True))
    cells = span_cells(summary, score)
    assert len(drawn) == len(cells)
    scale = 100 if score == "damage" else 1
    for (start, end), value in cells.items():
        expected = max(0.0, scale * value) if score != "cka" else value
        assert drawn[end - 1, start] == pytest.approx(expected)


def test_maps_name_the_span_that_changes_least(summary: Summary) -> None:
    frame = summary.run.scores("similarity")
    means = frame[frame["score"] == "angular-distance"].groupby(["start", "end"])["value"].mean()
    wide = {span: value for span, value in means.items() if span[1] - span[0] > 1}
    start, end = min(wide, key=lambda span: wide[span])
    reading = caption("angular_distance", summary)
    assert f"blocks {start} to {end - 1} turn the state least" in reading
    assert "CKA" in caption("cka", summary)
    assert "blocks" in caption("span_damage", summary)


def test_influence_is_the_mean_over_teachers(summary: Summary) -> None:
    drawn = lines(block_influence(summary))
    expected = [0.9, *(0.01 * block for block in range(2, 13))]
    assert drawn["the block"].get_ydata().tolist() == pytest.approx(expected)
    assert set(drawn) == {"the block", "its attention", "its MLP"}
    assert caption("block_influence", summary).startswith(
        "Block 0 turns the state most (0.90). Block 1 "
    )


def test_settled_users_are_counted(summary: Summary) -> None:
    frame = summary.run.scores("settling")
    curve = lines(settling_depth(summary))["same ten items"].get_ydata()
    assert curve[8] == pytest.approx(100 * (frame["set_settled"] <= 8).mean())
    assert np.all(np.diff(curve) >= 0)
    lost = ((frame["best_rank"] <= 10) & (frame["final_rank"] > 10)).mean()
    text = caption("settling_depth", summary)
    assert f"{100 * frame['overthinking'].mean():.1f} % [" in text
    assert f"{100 * lost:.1f} % [" in text


def test_ablation_draws_the_table(summary: Summary) -> None:
    table = ablation_table(summary)
    assert table is not None
    expected = 100 * (table.frame["ratio"].dropna() - 1)
    bars = [c for c in ablation_changes(summary).containers if isinstance(c, ErrorbarContainer)]
    assert [float(c.lines[0].get_xdata()[0]) for c in bars] == pytest.approx(expected.tolist())
    assert caption("ablation_changes", summary).startswith(
        f"Of {len(bars)} comparisons with fine-tuning"
    )
