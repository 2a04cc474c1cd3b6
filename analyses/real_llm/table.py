"""A table of the README, from a published run: NDCG@10 and the share of the teacher's.

    python analyses/real_llm/table.py reports/real_llm/smollm2-office full finetune early-exit:8,29

A method's depths stand behind its colon; without any, all are printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

METRIC = "NDCG@10"


def rows(folder: Path, wanted: list[str]) -> list[str]:
    """Lines of Markdown, one a method and depth."""
    table = pd.read_csv(folder / "tables" / "methods.csv")
    table = table[table["protocol"] == "full"]
    lines = ["| | blocks | NDCG@10 | share of the teacher's |", "|---|---|---|---|"]
    for each in wanted:
        parts = each.rsplit(":", 1) if each.rsplit(":", 1)[-1][:1].isdigit() else [each]
        method = parts[0]
        depths = [int(depth) for depth in parts[1].split(",")] if len(parts) > 1 else None
        own = table[table["method"] == method].sort_values("depth")
        for _, row in own.iterrows():
            if depths is None or row["depth"] in depths:
                share = (
                    "" if method == "full" else interval(row, f"{METRIC} of teacher", share=True)
                )
                depth = "-" if method in {"popularity", "sasrec"} else int(row["depth"])
                lines.append(f"| {method} | {depth} | {interval(row, METRIC)} | {share} |")
    return lines


def interval(row: pd.Series, name: str, *, share: bool = False) -> str:
    """``.0872 [.0752, .0993]``, or ``93.0 % [87.5, 98.5]``."""
    mean, low, high = (float(row[f"{name}{end}"]) for end in ("", " low", " high"))
    if share:
        return f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return "{} [{}, {}]".format(*(f"{value:.4f}".lstrip("0") for value in (mean, low, high)))


if __name__ == "__main__":
    print("\n".join(rows(Path(sys.argv[1]), sys.argv[2:])))
