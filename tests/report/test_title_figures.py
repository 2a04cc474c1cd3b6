"""Figures of item titles, and that a run's answer does not change by them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.report.answer import build_answer
from depthprobe.report.drawing import FIGURES
from depthprobe.report.figures import (
    accuracy_vs_title_depth,
    curves,
    kept_limits,
    title_spread,
)
from depthprobe.report.front import priced
from depthprobe.report.numbers import TITLES, Summary, summarise
from depthprobe.report.tables import cost_table, depth_table

METHODS = {"popularity", "sasrec", "full", "finetune", "early-exit"}


def test_a_line_a_method_with_intervals_between_the_baselines(summary: Summary) -> None:
    ax = accuracy_vs_title_depth(summary)
    names = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    assert list(names) == ["popularity", "SASRec", "SASRec on titles", "linear on titles"]
    for method, places in zip(TITLES, ([0, 4, 12], [0, 1, 4, 12]), strict=True):
        points = summary.of(method)
        line, _, (bars,) = names[points[0].info.label]
        np.testing.assert_allclose(line.get_xdata(), places, atol=0.3)
        means = [point.accuracy["full", "NDCG@10"].value for point in points]
        np.testing.assert_allclose(line.get_ydata().astype(float), means)
        ends = [
            (p.accuracy["full", "NDCG@10"].low, p.accuracy["full", "NDCG@10"].high) for p in points
        ]
        np.testing.assert_allclose([segment[:, 1] for segment in bars.get_segments()], ends)


def test_the_caption_names_the_best_depth_against_the_deepest(summary: Summary) -> None:
    caption = FIGURES["accuracy_vs_title_depth"].drawn(summary)[1]
    best, last = (p for p in summary.of("item-text") if p.depth in (4, 12))
    ratio = summary.against(best, last)
    assert ratio is not None
    assert (
        f"SASRec on titles: of 3 depths 4 is the best, {best.accuracy['full', 'NDCG@10'].value:.4f}"
        in caption
    )
    assert f"{100 * ratio.value:.1f} % [" in caption.replace(",", "")
    assert "of depth 12. Linear on titles: of 4 depths 4 is" in caption


@pytest.mark.parametrize(
    ("score", "most"), [("anisotropy", "12 (0.900)"), ("effective_rank", "0 (70.1)")]
)
def test_spread_by_depth(summary: Summary, score: str, most: str) -> None:
    line = title_spread(summary, score=score).get_lines()[0]
    assert line.get_xdata().tolist() == [0, 4, 12]
    assert FIGURES[f"title_{score}"].drawn(summary)[1].endswith(f"highest at depth {most}.")


def test_answer_costs_and_curves_are_those_of_a_run_without_titles(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    plain = summarise(make(tmp_path, users=200, methods=METHODS))
    more = summarise(make(tmp_path, users=200, methods=METHODS | {*TITLES}))
    assert len(more.points) > len(plain.points)
    assert build_answer(more) == build_answer(plain)
    assert kept_limits(more) == kept_limits(plain)
    assert curves(more, "NDCG@10").keys() == curves(plain, "NDCG@10").keys()
    assert {p.method for p in priced(more, "parameters")} == {
        p.method for p in priced(plain, "parameters")
    }
    one, other = cost_table(more), cost_table(plain)
    assert one is not None
    assert other is not None
    assert one.rows == other.rows


def test_a_table_writes_no_block_as_0_alone(summary: Summary) -> None:
    table = depth_table(summary)
    assert table is not None
    rows = [row[1] for row in table.rows if row[0] == "SASRec on titles"]
    assert rows == ["0", "4", "12"]
