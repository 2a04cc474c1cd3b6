"""The README's table: each metric's mean over users and seeds of finished trials, 95 % intervals.

Arguments are run folders: python analyses/baselines/table.py runs/beauty runs/toys runs/ml-1m
"""

from __future__ import annotations

import sys

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import mean_interval
from depthprobe.runs.store import Run, open_run

METRICS = ("HR@5", "NDCG@5", "HR@10", "NDCG@10")


def short(number: float) -> str:
    """Four digits without the zero before them, as papers print a share."""
    return f"{number:.4f}".removeprefix("0")


def rows(run: Run) -> list[str]:
    """A line a method: seeds, best epochs, and its metrics by full ranking."""
    full = run.users[run.users["protocol"] == "full"]
    table = full.pivot(index="user", columns="trial", values="rank")  # (U, trials)
    found = []
    for method in run.study.methods:
        records = [r for r in run.records if r.method == method and r.done]
        if not records:
            continue
        ranks = [table[r.id] for r in records]
        cells = [run.study.name, method, str(len(records))]
        fits = [r.training for r in records if r.training]
        cells.append(", ".join(f"{fit.best_epoch}/{fit.epochs}" for fit in fits) or "-")
        for name in METRICS:
            values = [per_user_metric(seed, name) for seed in ranks]  # (S, U)
            interval = mean_interval(values)
            bounds = f"[{short(interval.low)}, {short(interval.high)}]"
            cells.append(f"{short(interval.value)} {bounds}")
        found.append("| " + " | ".join(cells) + " |")
    return found


def main() -> None:
    print("| study | method | seeds | best epoch | " + " | ".join(METRICS) + " |")
    print("|---|---|---|---|" + "---|" * len(METRICS))
    for path in sys.argv[1:]:
        print("\n".join(rows(open_run(path))))


if __name__ == "__main__":
    main()
