"""The depth curve of three logs under five orders of their ties, one after another; a table of all.

python analyses/ties/repeat.py LOGS RUNS    # LOGS holds ml-100k, ml-latest-small and office

Each run adds its rows to RUNS/ties.csv; what is there already is not run again.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd

import depthprobe as dp

LOGS = ("ml-100k", "ml-latest-small", "office")
ORDERS = [("random", 0), ("file", 0), ("random", 1), ("item", 0), ("random", 2)]
KEYS = ["log", "order"]
STUDY = Path(__file__).with_name("study.toml")


def main(logs: str, runs: str) -> None:
    """Run what is missing, then print the table of all."""
    table = Path(runs) / "ties.csv"
    for ties, seed in ORDERS:
        for log in LOGS:
            order = f"{ties} {seed}" if ties == "random" else ties
            known = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=KEYS)
            if ((known["log"] == log) & (known["order"] == order)).any():
                continue
            study = dp.load_study(STUDY)
            data = replace(study.data, source=f"{logs}/{log}", ties=ties, ties_seed=seed)
            folder = Path(runs) / f"{log}-{order}".replace(" ", "-")
            run = dp.run_sweep(replace(study, data=data), folder, jobs=0)
            found = run.metrics.query(
                "split == 'test' and protocol == 'full' and slice == 'all' and metric == 'NDCG@10'"
            )
            rows = found[["method", "depth", "value"]].assign(log=log, order=order)
            pd.concat([known, rows]).to_csv(table, index=False)
    print(summary(pd.read_csv(table)).to_string(float_format="%.4f"))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """NDCG@10, a model a row: the random orders' mean and range, the file's and the ids' order."""
    wide = table.pivot_table(index=["log", "method", "depth"], columns="order", values="value")
    drawn = wide[[order for order in wide if order.startswith("random")]]
    told = pd.DataFrame({"mean": drawn.mean(axis=1), "min": drawn.min(axis=1)})
    told["max"] = drawn.max(axis=1)
    return told.join(wide[[order for order in ("file", "item") if order in wide]])


if __name__ == "__main__":
    main(*sys.argv[1:])
