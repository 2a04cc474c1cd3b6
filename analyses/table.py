"""Tables of a README, from a published run: NDCG@10, the share of the teacher's, what is served.

    python analyses/table.py reports/real_llm/smollm2-office full finetune early-exit:8,29

A method's depths stand behind its last colon; without any, all are printed. Where bytes were
counted they are told, and what a model in fewer bits keeps of itself; and interactions of levers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

METRIC = "NDCG@10"
KEYS, SOURCE = ["method", "depth"], "of source"


def rows(folder: Path, wanted: list[str]) -> list[str]:
    """Lines of Markdown, one a method and depth."""
    table = pd.read_csv(folder / "tables" / "methods.csv")
    table, front = table[table["protocol"] == "full"], folder / "tables" / "front.csv"
    heads = ["", "blocks", METRIC, "share of the teacher's"]
    served = front.is_file()
    if served:
        more = pd.read_csv(front)
        more = more[more["protocol"] == "full"].reindex(
            columns=[*KEYS, "bytes", *(f"{SOURCE}{end}" for end in ("", " low", " high"))]
        )
        table = table.merge(more, on=KEYS, how="left")
        heads += ["MB", "of its source's"]
    lines = [line(heads), line(["---"] * len(heads)).replace(" ", "")]
    for each in wanted:
        parts = each.rsplit(":", 1) if each.rsplit(":", 1)[-1][:1].isdigit() else [each]
        method = parts[0]
        depths = [int(depth) for depth in parts[1].split(",")] if len(parts) > 1 else None
        own = table[table["method"] == method].sort_values("depth")
        for _, row in own.iterrows():
            if depths is not None and row["depth"] not in depths:
                continue
            share = "" if method == "full" else interval(row, f"{METRIC} of teacher", share=True)
            depth = "-" if method in {"popularity", "sasrec"} else int(row["depth"])
            cells = [method, str(depth), interval(row, METRIC), share]
            if served:
                megabytes = "" if pd.isna(row["bytes"]) else f"{row['bytes'] / 1e6:.1f}"
                cells += [megabytes, interval(row, SOURCE, share=True)]
            lines.append(line(cells))
    return lines


def interactions(file: Path) -> list[str]:
    """A row a lever, method and depth: what is lost, in shares of the teacher's accuracy."""
    heads = ["alone", "lever alone", "both", "more than the sum"]
    lines = [line(["lever", "model", *heads]), "|---" * (2 + len(heads)) + "|"]
    for _, row in pd.read_csv(file).iterrows():
        cells = [interval(row, head, share=True) for head in heads]
        lines.append(line([row["lever"], row["model"], *cells]))
    return lines


def line(cells: list[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def interval(row: pd.Series, name: str, *, share: bool = False) -> str:
    """``.0872 [.0752, .0993]``, or ``93.0 % [87.5, 98.5]``; nothing of what is not known."""
    mean, low, high = (float(row[f"{name}{end}"]) for end in ("", " low", " high"))
    if pd.isna(mean):
        return ""
    if share:
        return f"{100 * mean:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"
    return "{} [{}, {}]".format(*(f"{value:.4f}".lstrip("0") for value in (mean, low, high)))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print("\n".join(rows(folder, sys.argv[2:])))
    if (file := folder / "tables" / "interaction.csv").is_file():
        print("\n".join(["", *interactions(file)]))
