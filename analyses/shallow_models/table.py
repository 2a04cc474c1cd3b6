"""The README's tables: what each way keeps of its teacher, and what it adds to fine-tuning.

Arguments are run folders: python analyses/shallow_models/table.py runs/embedded
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from depthprobe.evaluation.statistics import Interval
from depthprobe.methods import base_of, names
from depthprobe.report.numbers import FULL, HEADLINE, Summary, summarise
from depthprobe.report.style import method_info
from depthprobe.report.tables import ablation_table
from depthprobe.runs.store import Run, open_run

BASELINES = ("popularity", "sasrec", "full", "early-exit", "readout")


def percent(found: Interval) -> str:
    return f"{100 * found.value:.1f} [{100 * found.low:.1f}, {100 * found.high:.1f}]"


def kept(run: Run, summary: Summary) -> Iterator[str]:
    """A line a method: the share of the teacher's NDCG@10, and that itself at all blocks."""
    depths = sorted({p.depth for p in summary.points if base_of(p.method) == "finetune"})
    head = " | ".join(map(str, depths))
    yield f"| {run.study.name}, % of the teacher's NDCG@10 | seeds | {head} | all |"
    yield "|---|---|" + "---|" * (len(depths) + 1)
    for method in run.study.methods:
        points = {point.depth: point for point in summary.points if point.method == method}
        if (
            method not in BASELINES
            and base_of(method) not in names("trained", "control")
            or not points
        ):
            continue
        cells = [
            percent(points[depth].ratio[FULL, HEADLINE]) if depth in points else ""
            for depth in depths
        ]
        whole = points.get(0 if method in ("popularity", "sasrec") else summary.blocks or 0)
        value = whole.value(HEADLINE) if whole else None
        cells.append(f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]" if value else "")
        seeds = {len(point.seeds) for point in points.values()}
        name = method_info(method).label
        yield f"| {name} | {'-'.join(map(str, sorted(seeds)))} | {' | '.join(cells)} |"


def changes(run: Run, summary: Summary) -> Iterator[str]:
    """A line a way of training against fine-tuning, at the depths that have most of them.

    With a budget of compute at every depth: there it is the question what each depth costs.
    """
    table = ablation_table(summary)
    if table is None:
        return
    numbers = table.frame
    ways = numbers.groupby("depth").size()
    most = ways.index[ways == ways.max()]
    depths = ways.index if run.study.budget == "compute" else most
    head = "NDCG@10 | change against fine-tuning, % | training s | with teacher s"
    for depth in depths:
        yield f"| {depth} {'block' if depth == 1 else 'blocks'} | {head} |"
        yield "|---|---|---|---|---|"
        for row in numbers[numbers["depth"] == depth].to_dict(orient="records"):
            ratio = Interval(row["ratio"] - 1, row["ratio low"] - 1, row["ratio high"] - 1)
            change = "" if row["method"] == "finetune" else percent(ratio)
            seconds = row["training seconds"]
            taught = seconds + row["teacher seconds"]
            name = method_info(row["method"]).label
            yield f"| {name} | {row['NDCG@10']:.4f} | {change} | {seconds:.1f} | {taught:.1f} |"
        yield ""


def main() -> None:
    for path in sys.argv[1:]:
        run = open_run(path)
        summary = summarise(run)
        print("\n".join([*kept(run, summary), "", *changes(run, summary)]))


if __name__ == "__main__":
    main()
