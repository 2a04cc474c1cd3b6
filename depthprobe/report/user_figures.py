"""When a user's answer is settled: at which depth lists and ranks are the last ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from depthprobe.evaluation.statistics import Interval, bootstrap_means
from depthprobe.report.drawing import arms, depth_axis, need, new_axes
from depthprobe.report.labels import label_right
from depthprobe.report.scores import probe_table
from depthprobe.report.style import figure_style, in_percent
from depthprobe.report.summary import RunLike, Summary, as_summary

# the column of the settling table, what is said of it, its colour and marker
CURVES = {
    "rank_settled": ("rank within one", "#9b4f96", "o"),
    "set_settled": ("same ten items", "#0069a8", "s"),
    "top_settled": ("same order too", "#c2500a", "^"),
}


def settling_depth(run: RunLike | Summary | str | Path, *, ax: Axes | None = None) -> Axes:
    """Share of users whose answer is settled by a depth: the top ten, its order, the target's rank.

    Bars are 95 % bootstrap intervals over users; with several teachers, of the users' means.
    """
    summary = as_summary(run)
    frame = probe_table(summary, "settling")
    need(len(frame), summary, "settling")
    with figure_style():
        ax = ax or new_axes(right=0.74)
        blocks = summary.blocks or int(frame["top_settled"].max())
        depths = np.arange(blocks)  # at the last one all are settled
        ends: list[tuple[float | None, float, str, str]] = []
        highest = 0.0
        for column, (label, colour, marker) in CURVES.items():
            spans = _settled(frame, column, depths, summary)
            y = 100 * np.array([span.value for span in spans])
            ax.errorbar(
                depths, y, yerr=100 * arms(spans), color=colour, marker=marker, elinewidth=1,
                label=label,
            )  # fmt: skip
            ends.append((float(blocks - 1), float(y[-1]), label, colour))
            highest = max(highest, float(y[-1]))
        depth_axis(ax, summary, [0])
        ax.set_ylim(0, min(102.0, 1.2 * highest + 1))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g} %"))
        ax.set_xlabel("depth (blocks passed)")
        ax.set_title("Users whose answer is settled")
        label_right(ax, ends)
    return ax


def _settled(
    frame: pd.DataFrame, column: str, depths: np.ndarray, summary: Summary
) -> list[Interval]:
    """Share of users settled by each depth."""
    by_user = [
        (own[column].to_numpy()[:, None] <= depths)
        for _, own in frame.sort_values("user", kind="stable").groupby("seed")
    ]
    return bootstrap_means(np.mean(by_user, axis=0), resamples=_resamples(summary))


def _resamples(summary: Summary) -> int:
    return int(summary.run.study.protocol.resamples)


def settling_reading(summary: Summary) -> str:
    """Who waits for the last block, and whom it costs the target; empty without the table."""
    frame = probe_table(summary, "settling")
    if frame.empty:
        return ""
    last = summary.blocks or int(frame["top_settled"].max())
    means = frame.assign(
        late=frame["set_settled"] >= last,
        lost=(frame["best_rank"] <= 10) & (frame["final_rank"] > 10),
        hit=frame["final_rank"] <= 10,
    ).groupby("user")[["late", "overthinking", "lost", "hit"]].mean()  # fmt: skip
    found = bootstrap_means(means.to_numpy(dtype=np.float64), resamples=_resamples(summary))
    late, over, lost, hit = map(in_percent, found)
    return (
        f"For {late} of users the ten items change in the last block. Overthinking: for "
        f"{over} an earlier depth ranked the target better than the last; {lost} "
        f"had it among the first ten at some depth and not at the last, where {hit} do."
    )
