"""Block by block: what leaving one out costs, and how much each turns the state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from depthprobe.evaluation.statistics import Interval
from depthprobe.report.drawing import Array, arms, legend_below, need, new_axes, signed, three
from depthprobe.report.readings import skip_changes
from depthprobe.report.scores import scores_of
from depthprobe.report.style import MUTED, figure_style, method_style, significant
from depthprobe.report.summary import HEADLINE, RunLike, Summary, as_summary

PARTS = ("skip", "drop-attention", "drop-mlp")
LINEAR = 5.0  # per cent: changes up to here are drawn to scale, larger ones on a log scale
TICKS = (100, 50, 20, 10, 5, 2, 0)
# the score of a block, its name, colour and marker
INFLUENCES = {
    "block-influence": ("the block", method_style("skip").colour, "o"),
    "attention-influence": ("its attention", method_style("drop-attention").colour, "1"),
    "mlp-influence": ("its MLP", method_style("drop-mlp").colour, "2"),
}


def skip_sensitivity(
    run: RunLike | Summary | str | Path, *, metric: str = HEADLINE, ax: Axes | None = None
) -> Axes:
    """Change of the teacher's accuracy without one block, or its attention or MLP alone.

    Bars are 95 % intervals of the paired change. Where one block costs far more than most, the
    scale is logarithmic beyond 5 %.
    """
    summary = as_summary(run)
    with figure_style():
        drawn = {part: skip_changes(summary, metric, method=part) for part in PARTS}
        drawn = {part: found for part, found in drawn.items() if found}
        need(drawn, summary, "a teacher and skip, drop-attention or drop-mlp")
        ax = ax or new_axes(right=0.97, bottom=0.14 if len(drawn) == 1 else 0.23)
        every = 100 * np.array([three(i) for found in drawn.values() for _, i in found])  # (n, 3)
        for index, (part, found) in enumerate(drawn.items()):
            blocks = np.array([int(point.removed) for point, _ in found], dtype=np.float64)
            x = blocks + 0.24 * (index - (len(drawn) - 1) / 2)
            y = 100 * np.array([interval.value for _, interval in found])
            style = method_style(part)
            label = "whole block" if part == "skip" and len(drawn) > 1 else style.label
            ax.vlines(x, 0, y, color=style.colour, alpha=0.3, linewidth=5, zorder=2)
            ax.errorbar(
                x, y, yerr=100 * arms([interval for _, interval in found]), zorder=3,
                color=style.colour, marker=style.marker, linestyle="none", elinewidth=1.2,
                label=label,
            )  # fmt: skip
        if abs(every[:, 0]).max() > 4 * LINEAR and np.median(abs(every[:, 0])) < LINEAR:
            _far_scale(ax, every)
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.grid(visible=False, axis="x")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: signed(v)))
        far = f"; scale logarithmic beyond ±{LINEAR:g} %" if ax.get_yscale() == "symlog" else ""
        ax.set_xlabel(f"block left out, counted from 0{far}")
        ax.set_title(f"Change of {metric} without one block")
        if len(drawn) > 1:
            legend_below(ax, columns=len(drawn))
    return ax


def _far_scale(ax: Axes, every: Array) -> None:
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
    low, high = min(1.25 * every.min(), -LINEAR), max(1.25 * every.max(), 2.0)
    ticks = [sign * t for t in TICKS for sign in (-1, 1) if low <= sign * t <= high]
    ax.yaxis.set_major_locator(FixedLocator(sorted(set(ticks))))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylim(low, high)


def block_influence(run: RunLike | Summary | str | Path, *, ax: Axes | None = None) -> Axes:
    """How much a block, its attention and its MLP turn the state: 1 - cosine, a mean over users.

    On a log scale; with several teachers the mean over them, bars from the lowest to the highest.
    """
    summary = as_summary(run)
    need(len(scores_of(summary, "block-influence")), summary, "similarity")
    with figure_style():
        ax = ax or new_axes(right=0.97, bottom=0.23)
        for index, (score, (label, colour, marker)) in enumerate(INFLUENCES.items()):
            frame = scores_of(summary, score)
            if frame.empty:
                continue
            found = frame.groupby("start")["value"].agg(["mean", "min", "max"])
            x = found.index.to_numpy(dtype=np.float64) + 0.14 * (index - 1)
            spans = [Interval(*map(float, row)) for row in found.to_numpy()]
            ax.errorbar(
                x, found["mean"], yerr=arms(spans), color=colour, marker=marker, linewidth=1,
                elinewidth=1.2, label=label,
            )  # fmt: skip
        ax.set_yscale("log")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: significant(v, 1)))
        ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
        ax.set_xlabel("block, counted from 0")
        ax.set_title("Influence: 1 − cosine of states before and after")
        legend_below(ax, columns=len(INFLUENCES))
    return ax


def influence_reading(summary: Summary) -> str:
    """Which block turns the state most and least; empty without the score."""
    frame = scores_of(summary, "block-influence")
    if frame.empty:
        return ""
    means = frame.groupby("start")["value"].mean()
    blocks = [int(block) for block in means.index.to_numpy()]
    most, least = blocks[int(means.argmax())], blocks[int(means.argmin())]
    seeds = frame["seed"].nunique()
    over = f" Means over {seeds} teachers, bars from lowest to highest." if seeds > 1 else ""
    return (
        f"Block {most} turns the state most ({significant(means.max(), 2)}), block {least} least "
        f"({significant(means.min(), 2)}). Little influence is a hint that a block can go, not a "
        f"proof.{over}"
    )
