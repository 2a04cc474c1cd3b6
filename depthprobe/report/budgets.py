"""What a budget keeps of each block, and whether the damages of its options add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection

from depthprobe.evaluation.statistics import Interval
from depthprobe.formatting import count, in_percent, percent, rounded
from depthprobe.report import drawing
from depthprobe.report.drawing import MUTED, Look, figure, need, scaled, without_bar
from depthprobe.report.numbers import BLOCK_OPTIONS, BUDGET, Source, Summary, as_summary
from depthprobe.report.tables import Table, Values, make_table, plain

METRIC = "NDCG@10"  # the metric of damages, whatever the headline metric
# paler if less of the block is left; a map has its own colour, because it is no part of a block
CELLS = {
    "kept whole": "#123f66",
    "without attention": "#3d87c4",
    "without MLP": "#e0873a",
    "linear map": "#7dbb9a",
    "skipped": "#eceff2",
}
NAMES = dict(zip(BLOCK_OPTIONS, CELLS, strict=True))
SERIES = {
    "predicted": Look("predicted: the sum", MUTED, "x"),
    "validation": Look("validation users", "#0069a8", "s"),
    "test": Look("test users", "#c2500a", "o"),
}


def _means(summary: Summary) -> dict[int, Values]:
    """By budget, means over seeds: the used share, damages, and the blocks with each option."""
    frame = summary.run.scores(BUDGET)
    if frame.empty:
        return {}
    names = ["share", "predicted", "validation"]
    options = pd.get_dummies(frame["option"]).reindex(columns=list(BLOCK_OPTIONS), fill_value=0)
    seeds = frame["seed"].nunique()
    counted = options.groupby(frame["depth"]).sum() / seeds
    found: dict[Any, Values] = frame.groupby("depth")[names].mean().join(counted).to_dict("index")  # type: ignore[assignment]
    return found


def _on_test(summary: Summary) -> dict[int, Interval]:
    """The loss under each budget on test users, as a share of the teacher's accuracy."""
    changes = {point.depth: point.change(METRIC) for point in summary.of(BUDGET)}
    return {
        depth: Interval(-change.value, -change.high, -change.low)
        for depth, change in changes.items()
        if change is not None
    }


def budget_table(run: Source) -> Table | None:
    """What each budget keeps of the blocks, and its damage: predicted and measured."""
    summary = as_summary(run)
    found, lost, rows = _means(summary), _on_test(summary), list[Values]()
    sizes = {point.depth: point.cost("parameters") for point in summary.of(BUDGET)}
    for depth, own in found.items():
        row = {"budget": depth, "test": lost.get(depth), "parameters": sizes.get(depth)}
        rows.append(row | own)
    return make_table("budgets", rows, [
        ("budget, blocks", "budget", plain), ("of all blocks", "share", percent),
        *((NAMES[name], name, rounded) for name in BLOCK_OPTIONS),
        ("parameters", "parameters", count),
        ("predicted loss", "predicted", percent), ("on validation users", "validation", percent),
        ("on test users", "test", in_percent),
    ])  # fmt: skip


def _value(mean: Interval) -> str:
    return percent(mean.value)


@figure("budgets")
def predicted_damage(ax: Axes, summary: Summary) -> str:
    """What each budget loses: predicted as a sum, measured on the same users and on test users.

    Means over seeds; bars are confidence intervals of the paired loss.
    """
    found, lost = _means(summary), _on_test(summary)
    need(found, summary, BUDGET)
    budgets = list(found)
    drawn = {
        name: [Interval(row[name], row[name], row[name]) for row in found.values()]
        for name in ("predicted", "validation")
    } | ({"test": list(lost.values())} if lost else {})
    for name, values in drawn.items():
        look, places = SERIES[name], list(lost) if name == "test" else budgets
        say = in_percent if name == "test" else _value
        tips = [f"{look.label}, {b}: {say(v)}" for b, v in zip(places, values, strict=True)]
        shown = [scaled(value) for value in values]
        line = ":" if name == "predicted" else "-"
        drawing.draw_series(ax, places, shown, look, tips=tips, linestyle=line)
    drawing.percent_axis(ax.yaxis)
    ax.axhline(0, color=MUTED, linewidth=0.9)
    drawing.block_axis(ax.xaxis, "budget, in whole blocks", 12)
    drawing.finish(ax, f"Loss of {METRIC} by budget")

    gaps = {depth: abs(row["validation"] - row["predicted"]) for depth, row in found.items()}
    depth = max(gaps, key=lambda each: gaps[each])
    row = found[depth]
    return (
        f"The sum and the measured loss are furthest apart with a budget of {depth}: predicted "
        f"{percent(row['predicted'])}, measured {percent(row['validation'])} on the same users. "
        f"There the options were chosen, so both may look better than they are: on test users "
        f"{in_percent(lost[depth]) if depth in lost else 'unknown'}."
        f"{without_bar(lost.values())}"
    )


@figure("budgets")
def options_by_budget(ax: Axes, summary: Summary) -> str:
    """What is left of each block (row) under each budget (column), for the first seed's teacher."""
    frame = summary.run.scores(BUDGET)
    need(len(frame), summary, BUDGET)
    own = frame[frame["seed"] == frame["seed"].min()]
    cells = own.pivot(index="block", columns="depth", values="option")
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])  # (4, 2)
    for option, name in NAMES.items():
        rows, columns = np.nonzero((cells == option).to_numpy())
        shapes = [corners + (column, row) for row, column in zip(rows, columns, strict=True)]
        ax.add_collection(
            PolyCollection(shapes, facecolors=CELLS[name], edgecolors="white", linewidth=0.6)
        )
        ax.plot([], [], color=CELLS[name], marker="s", markersize=8, linestyle="", label=name)
    ax.set(xlim=(-0.5, cells.shape[1] - 0.5), ylim=(cells.shape[0] - 0.5, -0.5))
    ax.grid(visible=False)
    ax.spines[["left", "bottom"]].set_visible(False)
    step = max(1, -(-cells.shape[1] // 12))
    ax.set_xticks(range(0, cells.shape[1], step), [str(d) for d in cells.columns[::step]])
    ax.set_xlabel("budget, in whole blocks")
    drawing.block_axis(ax.yaxis, "block", 13)
    drawing.finish(ax, "What is left of each block")

    used = own["option"].value_counts()
    said = ", ".join(f"{used.get(option, 0)} {name}" for option, name in NAMES.items())
    return f"Of {cells.size} choices of a block under a budget: {said}."
