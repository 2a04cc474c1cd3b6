"""Block by block: what leaving one out costs, and how much each turns the state."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from depthprobe.evaluation.statistics import Interval, bootstrap_means
from depthprobe.report.depth_figures import skip_changes
from depthprobe.report.drawing import (
    Array,
    arms,
    depth_axis,
    label_right,
    legend_below,
    need,
    new_axes,
    signed,
    three,
)
from depthprobe.report.numbers import HEADLINE, Point, RunLike, Summary, as_summary
from depthprobe.report.reliance import probe_table, scores_of
from depthprobe.report.style import MUTED, figure_style, in_percent, method_style, significant
from depthprobe.report.tables import ablation_table, change_of

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


# Every contiguous run of blocks at once: how alike the states at its ends, what it costs.

FEWEST = 3  # cells: fewer are no map
NUMBERS = 8  # blocks: up to so many a cell has room for its number
# from a tint on: white is where nothing was measured
PALE = ListedColormap(colormaps["Blues"](np.linspace(0.1, 1, 256)).tolist())
TITLES = {
    "damage": f"Loss of {HEADLINE} without blocks a to b",
    "angular-distance": "Angular distance over blocks a to b",
    "cka": "Similarity (CKA) around blocks a to b",
}


def span_map(
    run: RunLike | Summary | str | Path, *, score: str = "damage", ax: Axes | None = None
) -> Axes:
    """A score of every contiguous run of blocks: from block a (row) to block b (column).

    "damage" is the share of NDCG@10 lost when the run is left out, "angular-distance" and "cka"
    compare the states before and after it. Means over seeds; pale is little change.
    """
    summary = as_summary(run)
    cells = span_cells(summary, score)
    need(cells, summary, "a teacher and span" if score == "damage" else "similarity")
    size = max(end for _, end in cells)
    grid = np.full((size, size), np.nan)
    for (start, end), value in cells.items():
        grid[start, end - 1] = value
    scale = 100 if score == "damage" else 1
    with figure_style():
        ax = ax or new_axes(right=0.97)
        shown = scale * grid
        low, high = (0.0, float(np.nanmax(shown))) if score != "cka" else (np.nanmin(shown), 1.0)
        # one early block costs all: the root keeps the others apart
        norm = PowerNorm(0.5 if score == "damage" else 1, vmin=low, vmax=max(high, low + 1e-9))
        colours = PALE.reversed() if score == "cka" else PALE
        ax.grid(visible=False)
        # a mesh and no picture: sharp on paper at any size
        places = np.arange(size)
        cells_shown = np.ma.masked_invalid(np.clip(shown, low, None))
        mesh = ax.pcolormesh(
            places, places, cells_shown, cmap=colours, norm=norm, shading="nearest",
            edgecolors="white", linewidth=0.3,
        )  # fmt: skip
        ax.set_aspect("equal")
        ax.invert_yaxis()
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
        ax.set_xlabel("last block, b")
        ax.set_ylabel("first block, a")
        ax.set_title(TITLES[score])
        figure = ax.figure
        bar = figure.colorbar(mesh, ax=ax, shrink=0.85, pad=0.03)
        bar.outline.set_visible(False)
        unit = " %" if score == "damage" else ""
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{unit}"))
        if size <= NUMBERS:
            _write(ax, shown, norm, score)
    return ax


def _write(ax: Axes, shown: Array, norm: PowerNorm, score: str) -> None:
    for (row, column), value in np.ndenumerate(shown):
        if np.isfinite(value):
            dark = float(norm(max(value, norm.vmin or 0.0)))
            dark = 1 - dark if score == "cka" else dark
            text = f"{value:.0f}" if score == "damage" else f"{value:.2f}"
            colour = "white" if dark > 0.55 else "black"
            ax.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def span_cells(summary: Summary, score: str) -> dict[tuple[int, int], float]:
    """The score by run of blocks [start, end), a mean over seeds; empty where it was not taken."""
    if score == "damage":
        return {
            span: -change.value
            for span, point in _left_out(summary).items()
            if (change := change_of(point)) is not None
        }
    frame = scores_of(summary, score)
    if frame.empty:
        return {}
    means = frame.groupby(["start", "end"], as_index=False)["value"].mean()
    columns = (means[name].tolist() for name in ("start", "end", "value"))
    return {
        (int(start), int(end)): float(value) for start, end, value in zip(*columns, strict=True)
    }


def _left_out(summary: Summary) -> dict[tuple[int, int], Point]:
    """Single blocks and runs of blocks that were left out, by [start, end)."""
    found = {}
    for point in summary.of("skip", "span"):
        first, _, last = point.removed.partition("-")
        if first.isdigit() and (last or first).isdigit():
            found[int(first), int(last or first) + 1] = point
    return found


def span_reading(summary: Summary, score: str) -> str:
    """What the map shows: the longest run that costs little, or the most alike ends."""
    cells = span_cells(summary, score)
    runs = {span: value for span, value in cells.items() if span[1] - span[0] > 1}
    if len(runs) < FEWEST:
        return ""
    if score == "damage":
        return _damage_reading(summary, runs)
    turned = -1 if score == "cka" else 1
    start, end = min(runs, key=lambda span: turned * runs[span])
    value = significant(runs[start, end], 2)
    if score == "cka":
        name = _name(start, end)
        return (
            f"Of runs of two blocks or more, the states around {name} are most alike: CKA {value}."
        )
    return (
        f"Of runs of two blocks or more, {_name(start, end)} turn the state least: angular "
        f"distance {value}, where 0 is not at all and 0.5 a right angle."
    )


def _damage_reading(summary: Summary, runs: dict[tuple[int, int], float]) -> str:
    small = [span for span, loss in runs.items() if loss <= summary.margin]
    margin = f"{100 * summary.margin:g} %"
    if not small:
        start, end = min(runs, key=lambda span: runs[span])
        text = f"Every run of two blocks or more costs more than {margin} on the mean; least costs"
    else:
        start, end = max(small, key=lambda span: (span[1] - span[0], -runs[span]))
        text = f"The longest run whose loss is within {margin} on the mean is"
    change = change_of(_left_out(summary)[start, end])
    said = in_percent(change) if change else ""
    return (
        f"{text} {_name(start, end)}: {said} against the teacher. It was picked out of "
        f"{len(runs)}, so it may look better than it is."
    )


def _name(start: int, end: int) -> str:
    return f"blocks {start} to {end - 1}"


# When a user's answer is settled: at which depth lists and ranks are the last ones.

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


# Ways to a shallow model beside plain fine-tuning: the change of each, with its interval.

ROW = 0.2  # inches
Change = tuple[int, str, Interval]  # depth, method, relative change


def ablation_changes(run: RunLike | Summary | str | Path, *, ax: Axes | None = None) -> Axes:
    """Relative change of NDCG@10 against fine-tuning at the same depth, by depth and method.

    Bars are 95 % intervals of the paired ratio, over users and seeds; one comparison at a time.
    """
    summary = as_summary(run)
    changes = _changes(summary)
    need(changes, summary, "finetune and another way to train at the same depth")
    with figure_style():
        height = max(2.2, ROW * (len(changes) + len({d for d, _, _ in changes})) + 0.9)
        ax = ax or new_axes(right=0.97, left=0.36, bottom=0.5 / height, size=(4.7, height))
        places, names, place, last = [], [], 0.0, None
        for depth, method, change in changes:
            place += 1 if last == depth else 1.8
            style = method_style(method)
            if depth != last:
                ax.text(
                    0.005, place - 0.95, f"depth {depth}", transform=ax.get_yaxis_transform(),
                    va="center", fontsize=8, color=MUTED, fontweight="bold",
                )  # fmt: skip
            ax.errorbar(
                [100 * change.value], [place], xerr=100 * arms([change]), color=style.colour,
                marker=style.marker, linestyle="none", elinewidth=1.2,
            )  # fmt: skip
            places.append(place)
            names.append(style.label)
            last = depth
        ax.axvline(0, color=MUTED, linewidth=0.9)
        ax.set_yticks(places, names)
        ax.set_ylim(place + 0.8, 0.2)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: signed(v)))
        ax.set_title(f"Change of {HEADLINE} against fine-tuning", x=-0.5)
    return ax


def _changes(summary: Summary) -> list[Change]:
    table = ablation_table(summary)
    if table is None:
        return []
    frame = table.frame.dropna(subset="ratio")
    columns = (frame[name] for name in ("depth", "method", "ratio", "ratio low", "ratio high"))
    return [
        (int(depth), str(method), Interval(value - 1, low - 1, high - 1))
        for depth, method, value, low, high in zip(*columns, strict=True)
    ]


def ablation_reading(summary: Summary) -> str:
    """Which ways are shown better or worse than fine-tuning; empty without two to compare."""
    changes = _changes(summary)
    if not changes:
        return ""
    better = sum(change.low > 0 for _, _, change in changes)
    worse = sum(change.high < 0 for _, _, change in changes)
    text = (
        f"Of {len(changes)} comparisons with fine-tuning, {better or 'none'} "
        f"{'lies' if better < 2 else 'lie'} above zero with the whole interval, "
        f"{worse or 'none'} below; by chance alone about one in forty would on each side."
    )
    depth, method, best = max(changes, key=lambda change: change[2].value)
    sign = "+" if best.value >= 0 else ""
    return (
        f"{text} The highest is {method_style(method).label} at depth {depth}: "
        f"{sign}{in_percent(best)}."
    )
