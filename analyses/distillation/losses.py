"""What each loss adds to what it is added to: paired changes of NDCG@10, at each depth of a run.

    python analyses/distillation/losses.py runs/distillation-ml-1m

In per cent, with 95 % intervals over users and the seeds that both have, one comparison at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from depthprobe.evaluation.statistics import bootstrap_ratio
from depthprobe.report.style import method_style
from depthprobe.report.summary import FULL, HEADLINE, Point, Summary, summarise
from depthprobe.sweep.store import open_run

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


def change(summary: Summary, new: Point | None, old: Point | None) -> str:
    """Of NDCG@10 in per cent, over the seeds that both have; empty where there is nothing."""
    seeds = [seed for seed in new.seeds if seed in old.seeds] if new and old else []
    if not new or not old or not seeds:
        return ""
    trials = [tuple(p.trials[p.seeds.index(seed)] for seed in seeds) for p in (new, old)]
    with_it, without = summary.ranks.values(FULL, HEADLINE, trials)  # (seeds, users) each
    ratio = bootstrap_ratio(with_it, without, resamples=summary.run.study.protocol.resamples)
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
            yield f"| {loss} | {method_style(old).label} | {' | '.join(cells)} |"
    yield ""


def main() -> None:
    for path in sys.argv[1:]:
        print("\n".join(table(summarise(open_run(path)))))


if __name__ == "__main__":
    main()
