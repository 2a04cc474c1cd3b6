"""Figures of single blocks, spans of blocks, users' answers, and ways to train a shallow model."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from depthprobe.evaluation.statistics import Interval, bootstrap_means
from depthprobe.methods import METHODS
from depthprobe.report import style
from depthprobe.report.numbers import (
    BLOCK,
    PARTS,
    PLAIN,
    SETTLING,
    SPAN,
    STATES,
    Point,
    Source,
    Summary,
    as_summary,
    less_one,
)
from depthprobe.report.reliance import Span, block_scores, score_tables
from depthprobe.report.style import (
    MUTED,
    Look,
    drawing,
    in_percent,
    method_info,
    need,
    significant,
    without_bar,
)
from depthprobe.report.tables import ablation_table, records

# --- one block at a time ---------------------------------------------------------------------

LINEAR = 5.0  # per cent: changes up to here are drawn to scale, larger ones on a log scale
TICKS = (100, 50, 20, 10, 5, 2, 0)


def skip_changes(
    summary: Summary, metric: str | None = None
) -> dict[str, list[tuple[int, Interval]]]:
    """Relative change against the teacher for each block left out alone, by method and block.

    Of the methods that leave out one block in each of their trials, or one part of one block.
    """
    found, metric = {}, metric or summary.headline
    for method in (name for name, info in METHODS.items() if info.by_block):
        points = summary.of(method)
        if all(point.removed.isdigit() for point in points):
            changes = [(int(p.removed), change) for p in points if (change := p.change(metric))]
            found[method] = sorted(changes, key=lambda pair: pair[0])
    return {method: changes for method, changes in found.items() if changes}


def skip_sensitivity(run: Source, *, metric: str | None = None, ax: Axes | None = None) -> Axes:
    """Change of the teacher's accuracy without one block, or its attention or MLP alone.

    Bars are 95 % intervals of the paired change. Where one block costs far more than most, the
    scale is logarithmic beyond 5 %.
    """
    summary = as_summary(run)
    metric = metric or summary.headline
    drawn = skip_changes(summary, metric)
    need(drawn, summary, f"a teacher and {BLOCK}, {' or '.join(PARTS.values())}")
    with drawing(ax) as ax:
        for index, (method, changes) in enumerate(drawn.items()):
            look, shown = method_info(method), [style.scaled(change) for _, change in changes]
            places = style.beside([block for block, _ in changes], index, len(drawn), 0.24)
            ax.vlines(
                places, 0, [c.value for c in shown], color=look.colour, alpha=0.3, linewidth=5
            )
            label = "whole block" if method == BLOCK else look.label
            style.draw_series(ax, places, shown, look, linestyle="none", zorder=3, label=label)
        every = [style.scaled(change) for own in drawn.values() for _, change in own]
        sizes = [abs(change.value) for change in every]
        if max(sizes) > 4 * LINEAR and np.median(sizes) < LINEAR:
            low, high = style.limits(every)
            low, high = min(1.25 * low, -LINEAR), max(1.25 * high, 2.0)
            ticks = {sign * t for t in TICKS for sign in (-1, 1) if low <= sign * t <= high}
            ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
            ax.yaxis.set_major_locator(FixedLocator(sorted(ticks)))
            ax.yaxis.set_minor_locator(NullLocator())
            ax.set_ylim(low, high)
            ax.set_ylabel(f"logarithmic beyond ±{LINEAR:g} %")
        style.percent_axis(ax, signed=True)
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.grid(visible=False, axis="x")
        _block_axis(ax, "block left out, counted from 0")
        ax.set_title(f"Change of {metric} without one block")
        if len(drawn) > 1:
            style.legend(ax, columns=len(drawn))
    return ax


def _block_axis(ax: Axes, label: str) -> None:
    ax.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    ax.set_xlabel(label)


def skip_reading(summary: Summary, metric: str | None = None) -> str:
    """Which block matters most, and for how many no change was seen."""
    metric = metric or summary.headline
    changes = skip_changes(summary, metric).get(BLOCK)
    if not changes:
        return ""
    block, worst = min(changes, key=lambda pair: pair[1].value)
    unclear = sum(change.low <= 0 <= change.high for _, change in changes)
    return (
        f"Block {block} costs the most when it is left out: {metric} changes by "
        f"{in_percent(worst, sign=True)}. The interval of the change contains zero for "
        f"{unclear or 'none'} of {len(changes)} blocks.{without_bar(i for _, i in changes)}"
    )


def block_influence(run: Source, *, ax: Axes | None = None) -> Axes:
    """How much a block, its attention and its MLP turn the state: 1 - cosine, a mean over users.

    On a log scale; with several teachers the mean over them, bars from the lowest to the highest.
    """
    summary = as_summary(run)
    need(len(block_scores(summary, "block-influence")), summary, STATES)
    drawn = {"block": ("the block", BLOCK), "attention": ("its attention", PARTS["attention"]),
             "mlp": ("its MLP", PARTS["mlp"])}  # fmt: skip
    with drawing(ax) as ax:
        for index, (part, (label, method)) in enumerate(drawn.items()):
            frame = block_scores(summary, f"{part}-influence")
            found = frame.groupby("start")["value"].agg(["mean", "min", "max"])
            if len(found):
                places = style.beside(found.index.tolist(), index, len(drawn), 0.14)
                means = [Interval(*map(float, row)) for row in found.to_numpy()]
                style.draw_series(ax, places, means, method_info(method), linewidth=1, label=label)
        ax.set_yscale("log")
        style.log_ticks(ax.yaxis, lambda value: significant(value, 1))
        _block_axis(ax, "block, counted from 0")
        ax.set_title("Influence: 1 − cosine of states before and after")
        style.legend(ax, columns=len(drawn))
    return ax


def influence_reading(summary: Summary) -> str:
    """Which block turns the state most and least."""
    frame = block_scores(summary, "block-influence")
    if frame.empty:
        return ""
    means, seeds = frame.groupby("start")["value"].mean(), frame["seed"].nunique()
    over = f" Means over {seeds} teachers, bars from lowest to highest." if seeds > 1 else ""
    return (
        f"Block {means.idxmax()} turns the state most ({significant(means.max(), 2)}). Block "
        f"{means.idxmin()} turns it least ({significant(means.min(), 2)}). Little influence is a "
        f"hint that a block can go, not a proof.{over}"
    )


# --- every span of blocks at once: how alike the states at its ends, what it costs -----------

FEWEST = 3  # cells: fewer are no map
# from a tint on: white is where nothing was measured
PALE = ListedColormap(colormaps["Blues"](np.linspace(0.1, 1, 256)).tolist())
TITLES = {
    "damage": "Loss of {metric} without blocks a to b",
    "angular-distance": "Angular distance over blocks a to b",
    "cka": "Similarity (CKA) around blocks a to b",
}


def span_map(run: Source, *, score: str = "damage", ax: Axes | None = None) -> Axes:
    """A score of every span of blocks: from block a (row) to block b (column).

    "damage" is the share of NDCG@10 lost when the span is left out, "angular-distance" and "cka"
    compare the states before and after it. Means over seeds; pale is little change.
    """
    summary = as_summary(run)
    cells = span_cells(summary, score)
    need(cells, summary, f"a teacher and {SPAN}" if score == "damage" else STATES)
    size = max(end for _, end in cells)
    damage, alike = score == "damage", score == "cka"
    grid = np.full((size, size), np.nan)
    for (start, end), value in cells.items():
        grid[start, end - 1] = 100 * value if damage else value
    low, high = (float(np.nanmin(grid)), 1.0) if alike else (0.0, float(np.nanmax(grid)))
    # one early block may cost all: the root keeps the others apart
    norm = PowerNorm(0.5 if damage else 1, vmin=low, vmax=max(high, low + 1e-9))
    with drawing(ax) as ax:
        ax.grid(visible=False)
        # a mesh and no picture: sharp on paper at any size
        mesh = ax.pcolormesh(
            np.arange(size), np.arange(size), np.ma.masked_invalid(np.clip(grid, low, None)),
            cmap=PALE.reversed() if alike else PALE, norm=norm, shading="nearest",
            edgecolors="white", linewidth=0.3,
        )  # fmt: skip
        ax.set_aspect("equal")
        ax.invert_yaxis()
        ax.spines[["left", "bottom"]].set_visible(False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=13, integer=True, min_n_ticks=1))
        ax.set_xlabel("last block, b")
        ax.set_ylabel("first block, a")
        ax.set_title(TITLES[score].format(metric=summary.headline))
        bar = ax.figure.colorbar(mesh, ax=ax, shrink=0.85, format="%g %%" if damage else "%g")
        bar.outline.set_visible(False)
    return ax


def span_cells(summary: Summary, score: str) -> dict[Span, float]:
    """The score by span of blocks [start, end), a mean over seeds; empty where not measured."""
    if score == "damage":
        changes = {
            span: point.change(summary.headline) for span, point in _left_out(summary).items()
        }
        return {span: -change.value for span, change in changes.items() if change is not None}
    means = block_scores(summary, score).groupby(["start", "end"])["value"].mean()
    return {(row["start"], row["end"]): row["value"] for row in records(means.reset_index())}


def _left_out(summary: Summary) -> dict[Span, Point]:
    """Single blocks and spans of blocks that were left out, by [start, end)."""
    return {p.span: p for p in summary.of(BLOCK, SPAN) if p.span is not None}


def span_reading(summary: Summary, score: str) -> str:
    """What the map shows: the longest span that costs little, or the most alike ends."""
    cells = span_cells(summary, score)
    wide = {span: value for span, value in cells.items() if span[1] - span[0] > 1}
    if len(wide) < FEWEST:
        return ""
    if score != "damage":
        start, end = (max if score == "cka" else min)(wide, key=lambda span: wide[span])
        verb, how = "turn the state least", "angular distance {}, where 0 is not at all and 0.5 is "
        if score == "cka":
            verb, how = "change the states least", "CKA {}"
        else:
            how += "a right angle"
        value = how.format(significant(wide[start, end], 2))
        return f"Of spans of two blocks or more, blocks {start} to {end - 1} {verb}: {value}."
    margin = f"{100 * summary.margin:g} %"
    small = [span for span, loss in wide.items() if loss <= summary.margin]
    if small:
        start, end = max(small, key=lambda span: (span[1] - span[0], -wide[span]))
        text = f"The longest span whose mean loss is at most {margin} is"
    else:
        start, end = min(wide, key=lambda span: wide[span])
        text = f"Every span of two blocks or more costs more than {margin} on the mean; least costs"
    change = _left_out(summary)[start, end].change(summary.headline)
    cost = in_percent(change, sign=True) if change else ""
    return (
        f"{text} blocks {start} to {end - 1}: {cost} against the teacher. It was picked out of "
        f"{len(wide)}, so it may look better than it is."
    )


# --- at which depth a user's answer is settled -----------------------------------------------

CURVES = {  # by the column of the settling table
    "rank_settled": Look("rank within one", "#9b4f96", "o"),
    "set_settled": Look("same ten items", "#0069a8", "s"),
    "top_settled": Look("same order too", "#c2500a", "^"),
}


def _settling(summary: Summary) -> pd.DataFrame:
    frames = (frame for frame in score_tables(summary) if set(CURVES) <= set(frame))
    return next(frames, pd.DataFrame())


def settling_depth(run: Source, *, ax: Axes | None = None) -> Axes:
    """Share of users whose answer is settled by a depth: the top ten, its order, the target's rank.

    Bars are 95 % bootstrap intervals over users; with several teachers, of the users' means.
    """
    summary = as_summary(run)
    frame = _settling(summary)
    need(len(frame), summary, SETTLING)
    with drawing(ax) as ax:
        depths, highest = np.arange(summary.blocks), 0.0  # at the last one all are settled
        for column, look in CURVES.items():
            by_seed = frame.sort_values("user", kind="stable").groupby("seed")[column]
            settled = [own.to_numpy()[:, None] <= depths for _, own in by_seed]  # (U, depths) each
            found = bootstrap_means(np.mean(settled, axis=0), resamples=summary.resamples)
            shares = [style.scaled(share) for share in found]
            style.draw_series(ax, depths, shares, look)
            highest = max(highest, shares[-1].value)
        ax.set_ylim(0, min(102.0, 1.2 * highest + 1))
        style.percent_axis(ax)
        _block_axis(ax, "depth (blocks passed)")
        ax.set_title("Users whose answer is settled")
        style.legend(ax, columns=len(CURVES))
    return ax


def settling_reading(summary: Summary) -> str:
    """Who waits for the last block, and whom it costs the target."""
    frame = _settling(summary)
    if frame.empty:
        return ""
    means = frame.assign(
        late=frame["set_settled"] >= summary.blocks,
        lost=(frame["best_rank"] <= 10) & (frame["final_rank"] > 10),
        hit=frame["final_rank"] <= 10,
    ).groupby("user")[["late", "overthinking", "lost", "hit"]].mean()  # fmt: skip
    found = bootstrap_means(means.to_numpy(dtype=np.float64), resamples=summary.resamples)
    late, over, lost, hit = map(in_percent, found)
    return (
        f"For {late} of users the ten items change in the last block. For {over} an earlier depth "
        f"ranked the target better than the last depth (overthinking). For {hit} the target is "
        f"among the first ten at the last depth. For {lost} it was among them only earlier."
    )


# --- ways to a shallow model beside plain fine-tuning ----------------------------------------

ROW = 0.2  # inches


def ablation_changes(run: Source, *, ax: Axes | None = None) -> Axes:
    """Relative change of NDCG@10 against fine-tuning at the same depth, by depth and method.

    Bars are 95 % intervals of the paired ratio, over users and seeds; one comparison at a time.
    """
    summary = as_summary(run)
    changes = _changes(summary)
    need(changes, summary, f"{PLAIN} and another way to train at the same depth")
    depths = len({depth for depth, _, _ in changes})
    with drawing(ax, (style.SIZE[0], max(2.2, ROW * (len(changes) + depths) + 0.9))) as ax:
        names, place, last = {}, 0.0, None
        for depth, method, change in changes:
            place += 1 if last == depth else 1.6
            look, shown = method_info(method), style.scaled(change)
            ax.errorbar(
                [shown.value], [place], xerr=style.bars([shown]), color=look.colour,
                marker=look.marker, linestyle="none", elinewidth=1,
            )  # fmt: skip
            names[place] = f"{style.short(look.label)} {depth}"
            last = depth
        ax.axvline(0, color=MUTED, linewidth=0.9)
        ax.set_yticks(list(names), list(names.values()))
        ax.set_ylim(place + 0.8, 0.6)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
        style.percent_axis(ax, signed=True, horizontal=True)
        ax.set_title(f"Change of {summary.headline} against fine-tuning")
    return ax


def _changes(summary: Summary) -> list[tuple[int, str, Interval]]:
    """Depth, method and relative change."""
    table = ablation_table(summary)
    if table is None:
        return []
    columns = ["depth", "method", "ratio", "ratio low", "ratio high"]
    rows = table.frame.dropna(subset="ratio")[columns].itertuples(index=False)
    return [(depth, method, less_one(Interval(*ratio))) for depth, method, *ratio in rows]


def ablation_reading(summary: Summary) -> str:
    """Which ways are shown better or worse than fine-tuning."""
    changes = _changes(summary)
    if not changes:
        return ""
    better = sum(change.low > 0 for _, _, change in changes)
    worse = sum(change.high < 0 for _, _, change in changes)
    depth, method, best = max(changes, key=lambda change: change[2].value)
    return (
        f"Of {len(changes)} comparisons with fine-tuning, {better or 'none'} "
        f"{'lies' if better == 1 else 'lie'} above zero with the whole interval and "
        f"{worse or 'none'} below. By chance alone about one in forty would on each side. The "
        f"highest is {method_info(method).label} at depth {depth}: {in_percent(best, sign=True)}."
        f"{without_bar(change for _, _, change in changes)}"
    )
