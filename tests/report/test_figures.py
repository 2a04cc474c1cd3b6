"""Figures: the expected series, with intervals, without overlapping names."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import depthprobe
from depthprobe.errors import BadInput
from depthprobe.report.depth_figures import pareto_front, priced, skip_changes
from depthprobe.report.drawing import save_figure
from depthprobe.report.figures import (
    FIGURES,
    accuracy_vs_cost,
    accuracy_vs_depth,
    kept_vs_depth,
    skip_sensitivity,
)
from depthprobe.report.numbers import Summary, summarise


def _series(ax: Axes) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in ax.containers if isinstance(c, ErrorbarContainer)}


def test_accuracy_vs_depth_draws_every_method(summary: Summary) -> None:
    ax = accuracy_vs_depth(summary)
    assert set(_series(ax)) == {"early exit", "fine-tuned", "distilled", "random init"}
    assert {"teacher", "SASRec", "popularity"} <= {line.get_label() for line in ax.get_lines()}
    points = _series(ax)["distilled"].lines[0]
    assert np.round(points.get_xdata()).tolist() == [1, 2, 4]
    expected = [p.accuracy["full", "NDCG@10"].value for p in summary.of("distill")]
    assert points.get_ydata() == pytest.approx(expected)


def test_error_bars_are_the_intervals(summary: Summary) -> None:
    (bars,) = _series(accuracy_vs_depth(summary, metric="HR@10"))["fine-tuned"].lines[2]
    for segment, point in zip(bars.get_segments(), summary.of("finetune"), strict=True):
        interval = point.accuracy["full", "HR@10"]
        assert segment[:, 1].tolist() == pytest.approx([interval.low, interval.high])


@pytest.mark.parametrize("draw", [accuracy_vs_depth, kept_vs_depth])
def test_names_do_not_overlap(summary: Summary, draw: Callable[[Summary], Axes]) -> None:
    ax = draw(summary)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) >= 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    right = ax.figure.bbox.x1
    assert all(box.x1 <= right for box in boxes)


@pytest.mark.parametrize("draw", [accuracy_vs_depth, kept_vs_depth, accuracy_vs_cost])
def test_more_variants_than_can_be_told_apart_are_drawn_as_one(
    draw: Callable[..., Axes], summary: Summary
) -> None:
    others = [p for p in summary.points if p.method != "finetune"]
    (point,) = (p for p in summary.of("finetune") if p.depth == 2)

    def drawn(count: int) -> set[str]:
        variants = [replace(point, method=f"finetune:k{n}") for n in range(count)]
        return set(_series(draw(replace(summary, points=[*others, *variants]))))

    assert {f"fine-tuned: k{n}" for n in range(8)} <= drawn(8)
    assert "fine-tuned" in drawn(9)
    assert not any(name.startswith("fine-tuned:") for name in drawn(9))


def test_kept_vs_depth_shows_the_margin(summary: Summary) -> None:
    ax = kept_vs_depth(summary)
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert lines["margin"].get_ydata()[0] == pytest.approx(99)
    assert lines["teacher"].get_ydata()[0] == 100


@pytest.mark.parametrize("cost", ["parameters", "inference", "training"])
def test_accuracy_vs_cost(summary: Summary, cost: str) -> None:
    ax = accuracy_vs_cost(summary, cost=cost)
    series = _series(ax)
    assert {"SASRec", "teacher", "fine-tuned", "distilled", "random init"} <= set(series)
    assert "skip" not in series
    assert ("early exit" in series) == (cost != "training")
    front = next(line for line in ax.get_lines() if line.get_label() == "Pareto front")
    assert len(front.get_xdata()) == len(pareto_front(priced(summary, cost), cost))


def test_pareto_front_against_brute_force(summary: Summary) -> None:
    points = priced(summary, "parameters")
    places = [(p.cost("parameters") or 0, p.accuracy["full", "NDCG@10"].value) for p in points]
    expected = {
        p.trials
        for p, (x, y) in zip(points, places, strict=True)
        if not any((u <= x and v >= y) and (u, v) != (x, y) for u, v in places)
    }
    assert {p.trials for p in pareto_front(points, "parameters")} == expected


def test_skip_sensitivity_has_every_block(summary: Summary) -> None:
    ax = skip_sensitivity(summary)
    assert set(_series(ax)) == {"whole block", "attention left out", "MLP left out"}
    points = _series(ax)["whole block"].lines[0]
    assert np.round(points.get_xdata()).tolist() == list(range(12))
    changes = [100 * change.value for _, change in skip_changes(summary)]
    assert points.get_ydata() == pytest.approx(changes)
    assert int(np.argmin(changes)) == 0  # as it was made up


def test_given_axes_are_drawn_on(summary: Summary) -> None:
    ax = Figure().add_subplot()
    assert accuracy_vs_depth(summary, ax=ax) is ax


def test_a_run_is_taken_as_well(make: Callable[..., Any], tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune"})
    assert "fine-tuned" in _series(accuracy_vs_depth(run))


def test_every_figure_reads_as_one_sentence_or_more(summary: Summary) -> None:
    for entry in FIGURES:
        assert entry.reading(summary).endswith(".")


def test_without_data_a_figure_has_no_reading(make: Callable[..., Any], tmp_path: Path) -> None:
    summary = summarise(make(tmp_path, users=60, methods={"popularity"}))
    assert [entry.name for entry in FIGURES if entry.reading(summary)] == []


@pytest.mark.parametrize(
    ("name", "chosen", "lacking"),
    [
        ("accuracy_vs_cost", {"cost": "training"}, "training time"),
        ("ablation_changes", {}, "finetune"),
        ("block_influence", {}, "similarity"),
        ("settling_depth", {}, "settling"),
        ("skip_sensitivity", {}, "skip"),
        ("span_map", {"score": "cka"}, "similarity"),
        ("span_map", {}, "span"),
        ("speed_vs_depth", {}, "times"),
    ],
)
def test_what_a_run_does_not_hold_is_refused_by_name(
    make: Callable[..., Any], tmp_path: Path, name: str, chosen: dict[str, str], lacking: str
) -> None:
    summary = summarise(make(tmp_path, users=60, seeds=1, methods={"full"}, timing=False))
    with pytest.raises(BadInput, match=f"run.*one with .*{lacking}"):
        getattr(depthprobe.figures, name)(summary, **chosen)


def test_the_same_figure_twice_is_the_same_file(summary: Summary, tmp_path: Path) -> None:
    for name in "ab":
        save_figure(skip_sensitivity(summary), tmp_path / name)
    for suffix in ("svg", "png", "pdf"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_importing_figures_leaves_the_backend_alone() -> None:
    code = (
        "import sys, depthprobe.report.figures\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
