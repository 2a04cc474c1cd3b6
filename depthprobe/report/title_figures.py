"""Figures of item titles: accuracy by the block they are read at, and how vectors are spread."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from depthprobe.formatting import in_percent, rounded, significant, with_bounds
from depthprobe.methods import INK, method_info
from depthprobe.report import drawing
from depthprobe.report.drawing import figure, need, without_bar
from depthprobe.report.numbers import FULL, POPULARITY, SASREC, SPREAD, TITLES, Summary

AXIS = "blocks that read the titles"


@figure("titles")
def accuracy_vs_title_depth(ax: Axes, summary: Summary, *, metric: str | None = None) -> str:
    """Accuracy by the block that titles are read at, with SASRec on its own items as a band.

    Bars and bands are confidence intervals over users, and over seeds where there are several.
    """
    metric = metric or summary.headline
    methods = [name for name in TITLES if summary.of(name)]
    need(methods, summary, " or ".join(TITLES))
    for point in summary.of(SASREC, POPULARITY):
        drawing.draw_level(ax, point.value(metric), point.info)
    said, drawn = [], []
    for index, name in enumerate(methods):
        look, points = method_info(name), summary.of(name)
        values = [point.accuracy[FULL, metric] for point in points]
        drawn += values
        places = drawing.beside([point.depth for point in points], index, len(methods))
        tips = [f"{p.name}: {with_bounds(v)}" for p, v in zip(points, values, strict=True)]
        drawing.draw_series(ax, places, values, look, tips=tips, linestyle=look.line, zorder=4)
        most, best = max(zip(values, points, strict=True), key=lambda pair: pair[0].value)
        last = points[-1]
        said.append(
            f"{look.label[0].upper()}{look.label[1:]}: of {len(points)} depths {best.depth} is the "
            f"best, {with_bounds(most)}"
        )
        ratio = summary.against(best, last) if metric == summary.headline else None
        if ratio is not None and best is not last:
            said[-1] += f", {in_percent(ratio)} of depth {last.depth}"
    said += [
        f"SASRec with items of its own: {with_bounds(value)}"
        for point in summary.of(SASREC)
        if (value := point.value(metric)) is not None
    ]
    others = [value for point in summary.of(SASREC) if (value := point.value(metric))]
    drawing.own_range(ax, [*drawn, *others])
    drawing.block_axis(ax.xaxis, AXIS, 12)
    drawing.finish(ax, f"{metric} by the block that titles are read at")
    return f"{'. '.join(said)}.{without_bar(drawn)}"


MEANING = {
    "anisotropy": "the mean cosine of two different items; near 1 all point the same way",
    "effective_rank": "in how many directions items vary: the exponential of the entropy of their "
    "covariance's eigenvalues",
}


@figure(
    "titles",
    title_anisotropy={"score": "anisotropy"},
    title_effective_rank={"score": "effective_rank"},
)
def title_spread(ax: Axes, summary: Summary, *, score: str = "anisotropy") -> str:
    """How the vectors of the titles are spread, by the block that they are read at.

    "anisotropy" is the mean cosine of two different items, "effective_rank" the number of
    directions in which items vary. Both are measured before an item table centres the vectors.
    """
    frame = summary.run.scores(SPREAD)
    need(len(frame), summary, SPREAD)
    depths, values = (frame[name].to_numpy(np.float64) for name in ("depth", score))
    ax.plot(depths, values, color=INK, marker="o", linewidth=1.2)
    tips = [f"depth {d:.0f}: {significant(v)}" for d, v in zip(depths, values, strict=True)]
    drawing.draw_tips(ax, depths, values, tips, INK)
    drawing.block_axis(ax.xaxis, AXIS, 12)
    name = score.replace("_", " ").capitalize()
    drawing.finish(ax, f"{name} of the titles' vectors")
    first, last, most = values[0], values[-1], int(values.argmax())
    return (
        f"{name} ({MEANING[score]}): {significant(first)} without a block, {significant(last)} "
        f"behind all of them, highest at depth {rounded(depths[most])} "
        f"({significant(values[most])})."
    )
