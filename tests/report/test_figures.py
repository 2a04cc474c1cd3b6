"""Figures of depth and cost: the expected series, each with its intervals."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

import depthprobe
import depthprobe.report
from depthprobe.errors import BadInput
from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import METHODS
from depthprobe.report.drawing import (
    NoData,
    drawing,
    figure_style,
    finish,
    rendered,
    save_figure,
)
from depthprobe.report.figures import (
    FIGURES,
    accuracy_vs_cost,
    accuracy_vs_depth,
    kept_limits,
    kept_side_by_side,
    kept_vs_depth,
    speed_vs_depth,
)
from depthprobe.report.front import pareto_front
from depthprobe.report.numbers import FULL, Summary, summarise
from depthprobe.report.tables import ablation_table

Make = Callable[..., Any]


def series(ax: Axes) -> dict[str, ErrorbarContainer]:
    return {c.get_label(): c for c in ax.containers if isinstance(c, ErrorbarContainer)}


def caption(summary: Summary, name: str = "kept_vs_depth") -> str:
    return FIGURES[name].drawn(summary)[1]


def test_accuracy_vs_depth_draws_every_method_with_its_intervals(summary: Summary) -> None:
    ax = accuracy_vs_depth(summary, metric="HR@10")
    drawn = series(ax)
    assert set(drawn) == {"early exit", "fine-tuned", "distilled", "random init"}
    assert {"teacher", "SASRec", "popularity"} <= {line.get_label() for line in ax.get_lines()}
    intervals = [point.accuracy[FULL, "HR@10"] for point in summary.of("distill")]
    points, _, (bars,) = drawn["distilled"].lines
    assert np.round(points.get_xdata()).tolist() == [1, 2, 4]
    assert points.get_ydata() == pytest.approx([interval.value for interval in intervals])
    for segment, interval in zip(bars.get_segments(), intervals, strict=True):
        assert segment[:, 1].tolist() == pytest.approx([interval.low, interval.high])


def test_accuracy_is_drawn_in_the_range_of_what_is_in_question(summary: Summary) -> None:
    bottom, top = accuracy_vs_depth(summary, metric="NDCG@10").get_ylim()
    reach = [
        p.accuracy[FULL, "NDCG@10"] for p in summary.points if p.info.role in ("trained", "control")
    ]
    assert 0 < bottom < min(value.low for value in reach)
    assert top > max(value.high for value in reach)
    assert bottom > summary.of("popularity")[0].accuracy[FULL, "NDCG@10"].high
    said = caption(summary, "accuracy_vs_depth_ndcg10")
    below = [p for p in summary.of("early-exit") if p.accuracy[FULL, "NDCG@10"].value < bottom]
    assert f"Below the scale: popularity, early exit 1\u2013{len(below)}." in said


def test_points_below_the_scale_are_named_and_have_no_bars(summary: Summary) -> None:
    ax = kept_vs_depth(summary)
    line, _, (bars,) = series(ax)["early exit"].lines
    above = line.get_ydata() >= ax.get_ylim()[0]
    assert 0 < sum(above) < len(above)
    assert len(bars.get_segments()) == sum(above)
    assert "Below the scale: early exit 1" in caption(summary, "kept_vs_depth")


def test_probes_alone_are_drawn_in_their_own_range(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "early-exit"})
    ax = accuracy_vs_depth(run, metric="NDCG@10")
    assert ax.get_ylim()[0] <= min(series(ax)["early exit"].lines[0].get_ydata())


def test_kept_vs_depth_shows_the_margin(summary: Summary) -> None:
    lines = {line.get_label(): line for line in kept_vs_depth(summary).get_lines()}
    assert lines["margin: 99 %"].get_ydata()[0] == pytest.approx(99)
    assert lines["teacher"].get_ydata()[0] == 100


def test_infinite_bounds_are_left_out_and_the_caption_says_so(summary: Summary) -> None:
    points = [
        replace(p, ratio=p.ratio | {(FULL, "NDCG@10"): Interval(0.99, -np.inf, np.inf)})
        if p.method == "finetune" else p for p in summary.points
    ]  # fmt: skip
    endless = replace(summary, points=tuple(points))
    ax = kept_vs_depth(endless)
    assert np.isfinite(ax.get_ylim()).all()
    _, _, (bars,) = series(ax)["fine-tuned"].lines
    assert all(np.ptp(segment[:, 1]) == 0 for segment in bars.get_segments())
    assert "4 of the intervals have an infinite end, which is not drawn." in caption(endless)
    assert "infinite" not in caption(summary)


def test_models_out_of_reach_do_not_widen_the_scale(summary: Summary) -> None:
    low, _ = kept_limits(summary)
    trained = [p.ratio[FULL, "NDCG@10"].low for p in summary.points if p.info.role == "trained"]
    shallow = min(p.ratio[FULL, "NDCG@10"].low for p in summary.of("early-exit"))
    assert 100 * shallow < low - 20  # a depth without training that keeps little
    assert low <= 100 * min(trained)


def test_panels_of_several_runs_share_one_scale(summary: Summary) -> None:
    axes = kept_side_by_side([summary, summary])
    assert len({ax.get_ylim() for ax in axes}) == 1
    assert {ax.get_title(loc="left") for ax in axes} == {summary.run.path.name}


@pytest.mark.parametrize("cost", ["size", "parameters", "latency", "inference", "training"])
def test_accuracy_vs_cost(summary: Summary, cost: str) -> None:
    ax = accuracy_vs_cost(summary, cost=cost)
    drawn = series(ax)
    assert {"SASRec", "teacher", "fine-tuned", "distilled", "random init"} <= set(drawn)
    assert "skip" not in drawn
    assert drawn["teacher"].lines[0].get_ydata().tolist() == [100]
    shares = [100 * p.ratio[FULL, "NDCG@10"].value for p in summary.of("finetune")]
    assert drawn["fine-tuned"].lines[0].get_ydata().tolist() == pytest.approx(shares)
    front = pareto_front(summary, cost)
    line = next(line for line in ax.get_lines() if line.get_label() == "Pareto front")
    assert len(line.get_xdata()) == len(front)
    words = [[str(p.depth)] * (p.depth > 0) + [*p.levers] for p in front]
    assert [text.get_text() for text in ax.texts] == [", ".join(each) for each in words if each]


def test_without_a_teacher_cost_is_held_against_accuracy(make: Make, tmp_path: Path) -> None:
    summary = summarise(make(tmp_path, users=60, seeds=1, methods={"finetune", "sasrec"}))
    drawn = series(accuracy_vs_cost(summary))["fine-tuned"].lines[0].get_ydata()
    assert drawn.tolist() == [p.accuracy[FULL, "NDCG@10"].value for p in summary.of("finetune")]


def test_speed_of_the_plainest_model(summary: Summary) -> None:
    drawn = series(speed_vs_depth(summary))["to train"].lines[0].get_ydata()
    expected = [p.speed["training"].value for p in summary.of("finetune")]
    assert drawn.tolist() == pytest.approx(expected)


def test_one_round_of_timing_draws_no_endless_bar(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune"})
    for record in run.records:
        for rounds in (record.costs.timing or {}).values():
            rounds.seconds = rounds.seconds[:1]
    low, high = speed_vs_depth(summarise(run)).get_ylim()
    assert 0 < low < 1 < high < 100


def test_a_run_is_taken_as_well_and_given_axes_are_drawn_on(make: Make, tmp_path: Path) -> None:
    run, ax = make(tmp_path, users=60, seeds=1, methods={"full", "finetune"}), Figure().subplots()
    assert accuracy_vs_depth(run, ax=ax) is ax
    assert "fine-tuned" in series(ax)


def test_captions_are_sentences_and_without_data_there_is_no_figure(
    summary: Summary, make: Make, tmp_path: Path
) -> None:
    bare = summarise(make(tmp_path, users=60, methods={"popularity"}))
    for name, entry in FIGURES.items():
        if entry.section != "search":  # which this run has none of
            assert caption(summary, name).endswith(".")
        with pytest.raises(NoData):
            entry.drawn(bare)


def test_a_method_of_another_package_is_drawn_and_may_be_the_answer(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added = replace(METHODS["distill"], name="ours", label="our way")
    monkeypatch.setitem(METHODS, "ours", added)
    run = make(tmp_path, users=60, seeds=1, methods={"full", "finetune", "distill"})
    run.trials["method"] = run.trials["method"].replace("distill", "ours")
    summary = summarise(run)
    assert "our way" in series(accuracy_vs_depth(summary))
    assert ("ours", 4) in summary.candidates
    table = ablation_table(summary)
    assert table is not None
    assert "our way" in {row[1] for row in table.rows}


def test_methods_are_named_in_one_module_alone() -> None:
    source = Path(depthprobe.report.__file__).parent
    others = {path.name: path.read_text(encoding="utf-8") for path in source.glob("*.py")}
    del others["numbers.py"]
    named = {
        (path, name) for path, text in others.items() for name in METHODS if f'"{name}"' in text
    }
    # the head or name of a column, a score, and selections of blocks
    assert named == {
        ("comparison.py", "sasrec"), ("tables.py", "popularity"), ("reliance.py", "taylor"),
        ("controls.py", "skip"), ("controls.py", "greedy"),
    }  # fmt: skip


def test_what_a_run_does_not_hold_is_refused_by_name(make: Make, tmp_path: Path) -> None:
    summary = summarise(make(tmp_path, users=60, seeds=1, methods={"full"}, timing=False))
    for name, chosen, lacking in (
        ("accuracy_vs_cost", {"cost": "training"}, "training time"),
        ("ablation_changes", {}, "finetune"),
        ("block_influence", {}, "similarity"),
        ("settling_depth", {}, "settling"),
        ("skip_sensitivity", {}, "skip"),
        ("span_map", {"score": "cka"}, "similarity"),
        ("span_map", {}, "span"),
        ("speed_vs_depth", {}, "times"),
    ):
        with pytest.raises(BadInput, match=f"run with .*{lacking}"):
            getattr(depthprobe.figures, name)(summary, **chosen)


def test_the_same_figure_twice_is_the_same_file(summary: Summary, tmp_path: Path) -> None:
    for name in "ab":
        save_figure(kept_vs_depth(summary), tmp_path / name)
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


def test_the_style_leaves_no_trace() -> None:
    before = dict(matplotlib.rcParams)
    with figure_style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_a_long_legend_leaves_the_axes_their_height() -> None:
    with drawing(None) as few:
        few.plot([0], [0], label="one")
        few.plot([0], [0], label="two")
        finish(few, "title")
    with drawing(None) as many:
        for k in range(40):
            many.plot([0], [0], label=f"healed: a selection {k}")
        finish(many, "title")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heights = [
            float(ax.get_window_extent().height) for ax in (few, many) if rendered(ax, "png")
        ]
    assert heights[1] > 0.8 * heights[0]
