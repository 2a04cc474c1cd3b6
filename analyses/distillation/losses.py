"""What each loss adds to what it is added to: paired changes of NDCG@10, at each depth of a run.

    python analyses/distillation/losses.py runs/distillation-ml-1m runs/distillation-ml-1m-random

And what the second run's teacher, begun from random weights, changes against the first one's. In
per cent, with 95 % intervals over users and the seeds that both have, one comparison at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from depthprobe.evaluation.statistics import Interval, ratio_interval
from depthprobe.report.numbers import FULL, HEADLINE, Point, Summary, summarise
from depthprobe.report.style import method_info
from depthprobe.runs.store import open_run

ADDED = (  # the loss, the student with it, the student without
    ("cosine", "distill:cos", "finetune"),
    ("norm", "distill:cos-norm", "distill:cos"),
    ("L_ms", "distill:ms", "finetune"),
    ("L_ms", "distill:cos-ms", "distill:cos"),
    ("L_ms", "distill", "distill:cos-norm"),
    ("cosine, norm, L_ms", "distill", "finetune"),
    ("all scores", "distill:kl", "finetune"),
    ("all scores", "distill:all-kl", "distill"),
    ("scores of the 100 best", "distill:kl-top", "finetune"),
    ("random weights instead of pretrained", "distill:fresh", "finetune"),
    ("the same, with all scores", "distill:fresh-kl", "distill:kl"),
    ("all scores", "distill:fresh-kl", "distill:fresh"),
)
ACROSS = (  # students begun from random weights: of the second run, of the first
    ("the items alone", "finetune", "distill:fresh"),
    ("the teacher's scores, too", "distill:kl", "distill:fresh-kl"),
)


def change(summary: Summary, new: Point | None, old: Point | None) -> str:
    """Of NDCG@10 in per cent, over the seeds that both have; empty where there is nothing."""
    ratio = summary.against(new, old) if new and old else None
    if ratio is None:
        return ""
    return percent(ratio)


def percent(ratio: Interval) -> str:
    """A ratio as a change."""
    value, low, high = (100 * (bound - 1) for bound in (ratio.value, ratio.low, ratio.high))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(summary: Summary) -> Iterator[str]:
    """A row an added loss, a column a depth."""
    points = {(point.method, point.depth): point for point in summary.points}
    depths = sorted({depth for method, depth in points if method == "finetune"})
    users = next(point.users for point in summary.of("full"))
    yield f"| {summary.run.study.name}, {users:,} users | to | {' | '.join(map(str, depths))} |"
    yield "|---" * (len(depths) + 2) + "|"
    for loss, new, old in ADDED:
        pairs = [(points.get((new, depth)), points.get((old, depth))) for depth in depths]
        cells = [change(summary, *pair) for pair in pairs]
        if any(cells):
            yield f"| {loss} | {method_info(old).label} | {' | '.join(cells)} |"
    yield ""


def across(new: Summary, old: Summary) -> Iterator[str]:
    """The students under one teacher against those under another, and the teachers themselves."""
    yield "| under the other teacher | depth | change |"
    yield "|---|---|---|"
    for name, first, second in (*ACROSS, ("the teacher itself", "full", "full")):
        for own, theirs in zip(new.of(first), old.of(second), strict=True):  # by depth
            ratio = ratio_interval(values(new, own), values(old, theirs))
            yield f"| {name} | {own.depth} | {percent(ratio)} |"


def values(summary: Summary, point: Point) -> Any:
    """NDCG@10 of each seed and user, (S, U); users in the order of their ids."""
    return summary.ranks.values(FULL, HEADLINE, [point.trials])[0]


def main() -> None:
    summaries = [summarise(open_run(path)) for path in sys.argv[1:]]
    for summary in summaries:
        print("\n".join(table(summary)))
    if len(summaries) == 2:
        old, new = summaries
        print("\n".join(across(new, old)))


if __name__ == "__main__":
    main()
