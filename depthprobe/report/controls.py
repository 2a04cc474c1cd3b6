"""Controls in the report: shuffled histories, the untouched backbone, random choices of blocks."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
from matplotlib.axes import Axes

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import Interval, mean_interval, ratio_interval
from depthprobe.formatting import (
    accuracy,
    fixed,
    in_percent,
    percent,
    plain_percent,
    plural,
    with_bounds,
)
from depthprobe.methods import method_info
from depthprobe.report import drawing
from depthprobe.report.drawing import MUTED, Look, figure, need
from depthprobe.report.numbers import (
    ORDER,
    PROMPT_ONLY,
    RANDOM_BLOCKS,
    SASREC,
    TEACHER,
    Source,
    Summary,
    as_summary,
)
from depthprobe.report.tables import Column, Table, Values, label, make_table, plain

RANDOM, REVERSED = "random", "-reversed"
SAMPLED_METRICS = ("HR@1", "HR@10", "NDCG@10")
BY = {  # the scores of the untouched backbone, as the table names them
    "likelihood": "title likelihood",
    "normalised": "title likelihood, less that without a history",
    "chance": "chance",
}
LOOKS = {  # labels of selections, by their names in the table
    "prefix": Look("first blocks", "#1b1f24", "D"),
    "skip": Look("skip", "#0069a8", "s"),
    "influence": Look("block influence", "#c2500a", "o"),
    "greedy": Look("greedy", "#00805e", "^"),
    "angular": Look("angular distance", "#9b4f96", "v"),
}


def order_table(run: Source) -> Table | None:
    """What shuffling the histories costs each model; None if it was not measured."""
    return make_table("order", _orders(as_summary(run)), [
        ("model", "method", label),
        ("depth", _depth, plain),
        ("in order", "in order", accuracy), ("histories shuffled", "histories shuffled", accuracy),
        ("lost", "lost", in_percent),
    ])  # fmt: skip


def _depth(row: Values) -> int | None:
    return None if method_info(row["method"]).role == "baseline" else row["depth"]


def _orders(summary: Summary) -> list[Values]:
    frame, rows = summary.run.scores(ORDER), []
    if frame.empty:
        return []
    names = ["rank", *(name for name in frame if str(name).startswith("shuffled-"))]
    for (method, depth), own in frame.groupby(["method", "depth"], sort=False):
        ranks = own.pivot(index="seed", columns="user", values=names).dropna(axis=1)
        plain, *mixed = (per_user_metric(ranks[name], summary.headline) for name in names)
        if plain.mean() > 0:
            shuffled = np.mean(mixed, axis=0)  # (S, U)
            kept = ratio_interval(shuffled, plain, level=summary.level)
            rows.append({
                "method": method, "depth": depth, "seeds": len(plain), "users": plain.shape[1],
                "in order": plain.mean(), "histories shuffled": shuffled.mean(),
                "lost": Interval(1 - kept.value, 1 - kept.high, 1 - kept.low),
            })  # fmt: skip
    return rows


def order_words(summary: Summary) -> tuple[str, bool]:
    """A sentence on how much the order of items matters; False if it is not shown to matter."""
    lost = {row["method"]: row["lost"] for row in _orders(summary)}
    if TEACHER not in lost:
        return "", True
    also = f", SASRec {in_percent(lost[SASREC])}" if SASREC in lost else ""
    costs = (
        f"Shuffling the histories costs the teacher {in_percent(lost[TEACHER])} of its "
        f"{summary.headline}{also}"
    )
    if lost[TEACHER].low > summary.margin:
        return (
            f"{costs}. So order matters on this log, and depth may help to read it.",
            True,
        )
    return (
        f"{costs}. It is not shown that the order of items is worth more than "
        f"{plain_percent(summary.margin)}, so this log cannot tell depths apart."
    ), False


def untouched_table(run: Source) -> Table | None:
    """The untouched backbone by depth, and other models, on 100 candidates per user (sampled)."""
    rows = _untouched(as_summary(run))
    most = rows[0]["candidates"] if rows else 0
    return make_table("prompt_only_sampled", rows, [
        (f"sampled, {most} candidates", "by", lambda name: BY.get(name) or label(name)),
        ("depth", lambda row: row["depth"] or None, plain),
        *((name, name, partial(with_bounds, digits=3)) for name in SAMPLED_METRICS),
    ], group="by")  # fmt: skip


def _untouched(summary: Summary) -> list[Values]:
    frame, rows = summary.run.scores(PROMPT_ONLY), []
    if frame.empty:
        return []
    most = int(frame["candidates"].iloc[0])
    for (by, depth), own in frame.groupby(["by", "depth"], sort=False):
        row = {"by": by, "depth": depth, "candidates": most, "users": len(own)}
        for name in SAMPLED_METRICS:
            values = per_user_metric(own["rank"], name)
            row[name] = mean_interval(values, level=summary.level)
        rows.append(row)
    places = np.arange(1.0, most + 1)
    means = {name: float(per_user_metric(places, name).mean()) for name in SAMPLED_METRICS}
    chance = {name: Interval(value, math.nan, math.nan) for name, value in means.items()}
    return [*rows, {**rows[0], "by": "chance", "depth": 0} | chance]


def selection_table(run: Source) -> Table | None:
    """Blocks chosen by a score, compared with as many random blocks, without training."""
    rows = _selections(as_summary(run))
    columns: list[Column] = [
        ("depth", "depth", plain), ("blocks chosen by", "selection", _selection),
        (as_summary(run).headline, "value", accuracy),
        ("random blocks, lowest to highest", "random", _spread),
        ("better than", "beats", lambda share: percent(share, 0)), ("p", "p", fixed),
    ]  # fmt: skip
    return make_table("selections", rows, columns, words=2, group="depth")


def _spread(value: Interval) -> str:
    return f"{accuracy(value.value)} [{accuracy(value.low)}, {accuracy(value.high)}]"


def _selection(name: str) -> str:
    score, reverse, _ = name.partition(REVERSED)
    words = LOOKS[score].label if score in LOOKS else score
    return f"{words}, reversed" if reverse else words


def _selections(summary: Summary) -> list[Values]:
    frame = summary.run.scores(RANDOM_BLOCKS)
    if frame.empty:
        return []
    frame, rows = frame[frame["metric"] == summary.headline], []
    for depth, own in frame.groupby("depth"):
        drawn = own.loc[own["selection"] == RANDOM, "value"]
        spread = Interval(drawn.mean(), drawn.min(), drawn.max())
        chosen = own[own["selection"] != RANDOM].sort_values("value", ascending=False)
        for row in chosen.to_dict("records"):
            names = ("selection", "kept", "value", "beats", "p")
            rows.append({"depth": depth, "random": spread} | {n: row[n] for n in names})
    return rows


@figure("blocks")
def selections(ax: Axes, summary: Summary) -> str:
    """Accuracy of blocks chosen by scores, over the band of random choices.

    The first seed's teacher, not trained again. The band spans the lowest to the highest draw.
    """
    rows = _selections(summary)
    need(rows, summary, RANDOM_BLOCKS)
    band = {row["depth"]: row["random"] for row in rows}
    low, high = ([getattr(each, end) for each in band.values()] for end in ("low", "high"))
    width = 4.0 * (len(band) == 1)  # for one depth the band would have no width
    ax.fill_between(list(band), low, high, color=MUTED, alpha=0.18, linewidth=width, label="random")
    for name, look in LOOKS.items():
        own = [row for row in rows if row["selection"] == name]
        places = [row["depth"] for row in own]
        values = [row["value"] for row in own]
        if own:
            ax.plot(places, values, color=look.colour, marker=look.marker, label=look.label)
        tips = [f"{look.label} {row['depth']}: {accuracy(row['value'])}" for row in own]
        drawing.draw_tips(ax, places, values, tips, look.colour)
    ax.set_xlim(min(band) - 0.6, max(band) + 0.6)
    drawing.block_axis(ax.xaxis, "depth (blocks kept)", 12)
    drawing.finish(ax, f"{summary.headline} of chosen and of random blocks")

    tried = [row for row in rows if not row["selection"].endswith(REVERSED)]
    better = [f"{_selection(r['selection'])} {r['depth']}" for r in tried if r["p"] <= 0.05]
    return (
        f"{len(better) or 'None'} of {plural(len(tried), 'selection')} "
        f"{'is' if len(better) < 2 else 'are'} better than random blocks of the same number with "
        f"p at most 0.05, one test at a time{': ' + ', '.join(better) if better else ''}."
    )
