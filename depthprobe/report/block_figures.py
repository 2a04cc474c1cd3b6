"""Figures of single blocks, spans of blocks, users' answers, and ways to train a shallow model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from depthprobe.evaluation.statistics import Interval, mean_intervals
from depthprobe.formatting import in_percent, percent, plain_percent, rounded, significant
from depthprobe.methods import METHODS, method_info
from depthprobe.report import drawing
from depthprobe.report.drawing import MUTED, Look, figure, need, scaled, without_bar
from depthprobe.report.numbers import (
    BLOCK,
    PARTS,
    PLAIN,
    SETTLING,
    SPAN,
    STATES,
    Point,
    Summary,
    less_one,
)
from depthprobe.report.reliance import Span, block_scores, score_tables
from depthprobe.report.tables import ablation_table

# --- one block at a time ---------------------------------------------------------------------

LINEAR = 5.0  # per cent: larger changes are drawn on a log scale
TICKS = (100, 50, 20, 10, 5, 2, 0)


def skip_changes(summary: Summary, metric: str) -> dict[str, dict[int, Interval]]:
    """Relative change against the teacher with one block left out, by method and block.

    Only for methods whose every trial leaves out one block, or one part of one block.
    """
    found: dict[str, dict[int, Interval]] = {}
    for method in (name for name, info in METHODS.items() if info.by_block):
        points = {point.removed: point.change(metric) for point in summary.of(method)}
        if all(block.isdigit() for block in points):
            own = {int(block): change for block, change in points.items() if change}
            found |= {method: dict(sorted(own.items()))} if own else {}
    return found


@figure("blocks")
def skip_sensitivity(ax: Axes, summary: Summary, *, metric: str | None = None) -> str:
    """Change of the teacher's accuracy without one block, or without only its attention or MLP.

    Bars are confidence intervals of the paired change. If one block costs far more than most, the
    scale is logarithmic beyond 5 %.
    """
    metric = metric or summary.headline
    drawn = skip_changes(summary, metric)
    need(drawn, summary, f"a teacher and {BLOCK}, {' or '.join(PARTS.values())}")
    for index, (method, changes) in enumerate(drawn.items()):
        look, shown = method_info(method), [scaled(change) for change in changes.values()]
        places, ends = drawing.beside(changes, index, len(drawn), 0.24), [c.value for c in shown]
        ax.vlines(places, 0, ends, color=look.colour, alpha=0.3, linewidth=5)
        label = "whole block" if method == BLOCK else look.label
        options: dict[str, Any] = {"linestyle": "none", "zorder": 3, "label": label}
        tips = [f"{label}, {b}: {in_percent(c, sign=True)}" for b, c in changes.items()]
        drawing.draw_series(ax, places, shown, look, tips=tips, **options)
    every = [scaled(change) for own in drawn.values() for change in own.values()]
    sizes = [abs(change.value) for change in every]
    if max(sizes) > 4 * LINEAR and np.median(sizes) < LINEAR:
        low, high = drawing.limits(every)
        low, high = min(1.25 * low, -LINEAR), max(1.25 * high, 2.0)
        ticks = {sign * t for t in TICKS for sign in (-1, 1) if low <= sign * t <= high}
        ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
        ax.yaxis.set_major_locator(FixedLocator(sorted(ticks)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_ylim(low, high)
        ax.set_ylabel(f"logarithmic beyond ±{rounded(LINEAR)} %")
    drawing.percent_axis(ax.yaxis, signed=True)
    ax.axhline(0, color=MUTED, linewidth=0.9)
    ax.grid(visible=False, axis="x")
    drawing.block_axis(ax.xaxis, "block left out, counted from 0")
    drawing.finish(ax, f"Change of {metric} without one block")

    method, changes = next(iter(drawn.items()))
    what = "" if method == BLOCK else f" ({method_info(method).label})"
    block, worst = min(changes.items(), key=lambda pair: pair[1].value)
    unclear = sum(change.low <= 0 <= change.high for change in changes.values())
    return (
        f"Block {block} costs the most when it is left out{what}: {metric} changes by "
        f"{in_percent(worst, sign=True)}. The interval of the change contains zero for "
        f"{unclear or 'none'} of {len(changes)} blocks.{without_bar(changes.values())}"
    )


@figure("blocks")
def block_influence(ax: Axes, summary: Summary) -> str:
    """How much a block, its attention and its MLP turn the state: 1 - cosine, a mean over users.

    The scale is logarithmic. With several teachers: their mean, with bars from lowest to highest.
    """
    whole = block_scores(summary, "block-influence")
    need((whole["value"] > 0).any(), summary, STATES)  # 0 has no logarithm
    drawn = {"block": ("the block", BLOCK), "attention": ("its attention", PARTS["attention"]),
             "mlp": ("its MLP", PARTS["mlp"])}  # fmt: skip
    for index, (part, (label, method)) in enumerate(drawn.items()):
        own = block_scores(summary, f"{part}-influence").groupby("start")["value"]
        found = own.agg(["mean", "min", "max"])
        if len(found):
            places = drawing.beside(found.index.tolist(), index, len(drawn), 0.14)
            values = [Interval(*map(float, row)) for row in found.to_numpy()]
            named = zip(found.index, values, strict=True)
            tips = [f"block {b}, {label}: {significant(v.value, 2)}" for b, v in named]
            look, more = method_info(method), {"linewidth": 1, "label": label}
            drawing.draw_series(ax, places, values, look, tips=tips, **more)
    ax.set_yscale("log")
    drawing.log_ticks(ax.yaxis, lambda value: significant(value, 1))
    drawing.block_axis(ax.xaxis, "block, counted from 0")
    drawing.finish(ax, "Influence: 1 − cosine of states before and after")

    means, seeds = whole.groupby("start")["value"].mean(), whole["seed"].nunique()
    over = f" Means over {seeds} teachers, bars from lowest to highest." if seeds > 1 else ""
    return (
        f"Block {means.idxmax()} turns the state most ({significant(means.max(), 2)}). Block "
        f"{means.idxmin()} turns it least ({significant(means.min(), 2)}). Little influence is a "
        f"hint that a block can go, not a proof.{over}"
    )


# --- every span of blocks: how similar the states at its ends are, and what it costs ---------

FEWEST = 3  # fewest spans of two or more blocks for a map
# starts with a tint, since white means not measured
PALE = ListedColormap(colormaps["Blues"](np.linspace(0.1, 1, 256)).tolist())
TITLES = {
    "damage": "Loss of {} without blocks a to b",
    "angular-distance": "Angular distance over blocks a to b",
    "cka": "Similarity (CKA) around blocks a to b",
}
LEAST = {  # the caption's words
    "angular-distance": "turn the state least: angular distance {}, where 0 is not at all and 0.5 "
    "is a right angle",
    "cka": "change the states least: CKA {}",
}


@figure(
    "maps",
    span_damage={"score": "damage"},
    angular_distance={"score": "angular-distance"},
    cka={"score": "cka"},
)
def span_map(ax: Axes, summary: Summary, *, score: str = "damage") -> str:
    """A score of every span of blocks: from block a (row) to block b (column).

    "damage" is the share of the headline metric lost when the span is left out,
    "angular-distance" and "cka" compare the states before and after it. Means over seeds; pale is
    little change.
    """
    cells, damage, alike = span_cells(summary, score), score == "damage", score == "cka"
    wide = {span: value for span, value in cells.items() if span[1] - span[0] > 1}
    need(len(wide) >= FEWEST, summary, f"a teacher and {SPAN}" if damage else STATES)
    size = max(end for _, end in cells)
    values = np.array([100 * value if damage else value for value in cells.values()])
    # all pale if states hardly turn: the differences are rounding noise
    low, high = (min(values.min(), 0.999), 1) if alike else (0, max(values.max(), 0.001))
    ax.grid(visible=False)
    # vector squares, not an image: sharp at any size
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])  # (4, 2)
    mesh = PolyCollection(
        [corners + (end - 1, start) for start, end in cells], array=np.clip(values, low, None),
        cmap=PALE.reversed() if alike else PALE, edgecolors="white", linewidth=0.3,
        # one early block may cost everything; the square root still tells the others apart
        norm=PowerNorm(0.5 if damage else 1, vmin=low, vmax=high), clip_on=False,
    )  # fmt: skip
    ax.add_collection(mesh)
    ax.set(xlim=(-0.5, size - 0.5), ylim=(-0.5, size - 0.5))
    ax.set_aspect("equal")
    ax.invert_yaxis()
    ax.spines[["left", "bottom"]].set_visible(False)
    drawing.block_axis(ax.xaxis, "last block, b", 13)
    drawing.block_axis(ax.yaxis, "first block, a", 13)
    ax.set_title(TITLES[score].format(summary.headline))
    ticks = FuncFormatter(lambda value, _: rounded(value) + " %" * damage)
    bar = ax.figure.colorbar(mesh, ax=ax, shrink=0.85, format=ticks)
    bar.outline.set_visible(False)

    if not damage:
        start, end = (max if alike else min)(wide, key=lambda span: wide[span])
        said = LEAST[score].format(significant(wide[start, end], 2))
        return f"Of spans of two blocks or more, blocks {start} to {end - 1} {said}."
    margin = plain_percent(summary.margin)
    small = [span for span, loss in wide.items() if loss <= summary.margin]
    if small:
        start, end = max(small, key=lambda span: (span[1] - span[0], -wide[span]))
        text = f"The longest span whose mean loss is at most {margin} is"
    else:
        start, end = min(wide, key=lambda span: wide[span])
        text = f"Every span of two or more blocks costs over {margin} on the mean. The cheapest is"
    change = _left_out(summary)[start, end].change(summary.headline)
    cost = in_percent(change, sign=True) if change else ""
    return (
        f"{text} blocks {start} to {end - 1}: {cost} against the teacher. It was picked out of "
        f"{len(wide)}, so it may look better than it is."
    )


def span_cells(summary: Summary, score: str) -> dict[Span, float]:
    """The score by span of blocks [start, end), a mean over seeds; empty if not measured."""
    if score == "damage":
        spans = _left_out(summary).items()
        changes = {span: point.change(summary.headline) for span, point in spans}
        return {span: -change.value for span, change in changes.items() if change is not None}
    # CKA is undefined if all users have the same state
    means = block_scores(summary, score).groupby(["start", "end"])["value"].mean()
    found: dict[Any, float] = means.dropna().to_dict()
    return found


def _left_out(summary: Summary) -> dict[Span, Point]:
    """Single blocks and spans of blocks that were left out, by [start, end)."""
    return {p.span: p for p in summary.of(BLOCK, SPAN) if p.span is not None}


# --- at which depth a user's answer is settled -----------------------------------------------

CURVES = {  # labels by column of the settling table
    "rank_settled": Look("rank within one", "#9b4f96", "o"),
    "set_settled": Look("same ten items", "#0069a8", "s"),
    "top_settled": Look("same order too", "#c2500a", "^"),
}


@figure("hurt")
def settling_depth(ax: Axes, summary: Summary) -> str:
    """Share of users whose answer is settled by a depth: the top ten, its order, the target's rank.

    Bars are confidence intervals over users; with several teachers, of each user's mean over them.
    """
    frames = (frame for frame in score_tables(summary) if set(CURVES) <= set(frame))
    frame = next(frames, pd.DataFrame())
    need(len(frame), summary, SETTLING)
    depths, highest = np.arange(summary.blocks), 0.0  # at the last depth all are settled
    for column, look in CURVES.items():
        settled = pd.DataFrame({d: frame[column] <= d for d in depths}).groupby(frame["user"])
        shares = [scaled(share) for share in _means(settled.mean(), summary)]
        tips = [f"{look.label}, depth {d}: {percent(s.value / 100)}" for d, s in enumerate(shares)]
        drawing.draw_series(ax, depths, shares, look, tips=tips)
        highest = max(highest, shares[-1].value)
    ax.set_ylim(0, min(102.0, 1.2 * highest + 1))
    drawing.percent_axis(ax.yaxis)
    drawing.block_axis(ax.xaxis, "depth (blocks passed)")
    drawing.finish(ax, "Users whose answer is settled")

    found = frame.assign(
        late=frame["set_settled"] >= summary.blocks,
        lost=(frame["best_rank"] <= 10) & (frame["final_rank"] > 10),
        hit=frame["final_rank"] <= 10,
    ).groupby("user")[["late", "overthinking", "lost", "hit"]]  # fmt: skip
    late, over, lost, hit = map(in_percent, _means(found.mean(), summary))
    return (
        f"For {late} of users the ten items change in the last block. For {over} an earlier depth "
        f"ranked the target better than the last depth (overthinking). For {hit} the target is "
        f"among the first ten at the last depth. For {lost} it was among them only earlier."
    )


def _means(by_user: pd.DataFrame, summary: Summary) -> list[Interval]:
    """Mean of each column over users."""
    return mean_intervals(by_user.to_numpy(dtype=np.float64), level=summary.level)


# --- ways to a shallow model beside plain fine-tuning ----------------------------------------

ROW = 0.2  # inches


def _changes(summary: Summary) -> list[tuple[int, str, Interval]]:
    """Depth, method and relative change."""
    table = ablation_table(summary)
    if table is None:
        return []
    columns = ["depth", "method", "ratio", "ratio low", "ratio high"]
    rows = table.frame.dropna(subset="ratio")[columns].itertuples(index=False)
    return [(depth, method, less_one(Interval(*ratio))) for depth, method, *ratio in rows]


def _height(summary: Summary) -> float:
    changes = _changes(summary)
    return max(2.2, ROW * (len(changes) + len({depth for depth, *_ in changes})) + 0.9)


@figure("ablation", height=_height)
def ablation_changes(ax: Axes, summary: Summary) -> str:
    """Relative change against fine-tuning at the same depth, by depth and method.

    Bars are confidence intervals of the paired ratio, over users and seeds, each by itself.
    """
    changes = _changes(summary)
    need(changes, summary, f"{PLAIN} and another way to train at the same depth")
    names, place, last = {}, 0.0, None
    for depth, method, change in changes:
        place += 1 if last == depth else 1.6
        look, shown = method_info(method), scaled(change)
        ax.errorbar(
            [shown.value], [place], xerr=drawing.bars([shown]), color=look.colour,
            marker=look.marker, linestyle="none", elinewidth=1,
        )  # fmt: skip
        names[place] = f"{drawing.short(look.label)} {depth}"
        tip = f"{look.label} {depth}: {in_percent(change, sign=True)}"
        drawing.draw_tips(ax, shown.value, place, [tip], look.colour)
        last = depth
    ax.axvline(0, color=MUTED, linewidth=0.9)
    ax.set_yticks(list(names), list(names.values()))
    ax.set_ylim(place + 0.8, 0.6)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6))
    drawing.percent_axis(ax.xaxis, signed=True)
    ax.set_xlabel(f"change of {summary.headline}")
    ax.set_title("Against fine-tuning")

    better = sum(change.low > 0 for *_, change in changes)
    worse = sum(change.high < 0 for *_, change in changes)
    depth, method, best = max(changes, key=lambda change: change[2].value)
    return (
        f"Of {len(changes)} comparisons with fine-tuning, {better or 'none'} "
        f"{'lies' if better == 1 else 'lie'} above zero with the whole interval and "
        f"{worse or 'none'} below. By chance alone about one in forty would on each side. The "
        f"highest is {method_info(method).label} at depth {depth}: {in_percent(best, sign=True)}."
        f"{without_bar(change for *_, change in changes)}"
    )
