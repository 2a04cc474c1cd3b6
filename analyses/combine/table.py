"""Tables of the README, from a published run: what models keep and weigh, and interactions.

    python analyses/combine/table.py reports/combine/combine-smollm2 full int8:full finetune:1,4

A method's depths stand behind its last colon (``finetune:1,4``); without any, all are printed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd


def share(row: pd.Series, name: str) -> str:
    """``99.6 % [98.9, 100.4]``."""
    mean, low, high = (100 * float(row[f"{name}{end}"]) for end in ("", " low", " high"))
    return "" if pd.isna(mean) else f"{mean:.1f} % [{low:.1f}, {high:.1f}]"


def models(folder: Path, wanted: list[str]) -> list[str]:
    """A row a method and depth."""
    table = pd.read_csv(folder / "tables/front.csv")
    table = table[table["protocol"] == "full"]
    lines = [
        "| | blocks | MB | NDCG@10 | of the teacher's | of its source's |",
        "|---|" + "---|" * 5,
    ]
    for each in wanted:
        method, _, last = each.rpartition(":")
        method, depths = (method, last.split(",")) if last[:1].isdigit() else (each, None)
        for _, row in table[table["method"] == method].sort_values("depth").iterrows():
            if depths is None or str(row["depth"]) in depths:
                ndcg = f"{row['NDCG@10']:.4f}".lstrip("0")
                kept = "" if method == "full" else share(row, "NDCG@10 of teacher")
                megabytes = f"{row['bytes'] / 1e6:.1f}" if row["bytes"] > 0 else ""
                own = share(row, "of source")
                lines.append(
                    f"| {method} | {row['depth']} | {megabytes} | {ndcg} | {kept} | {own} |"
                )
    return lines


def interactions(folder: Path) -> list[str]:
    """A row a lever, method and depth: what is lost, in points of the teacher's accuracy."""
    table = pd.read_csv(folder / "tables/interaction.csv")
    lines = [
        "| lever | model | alone | lever alone | both | more than the sum |",
        "|---|" + "---|" * 5,
    ]
    for _, row in table.iterrows():
        cells = [share(row, name) for name in ("alone", "lever alone", "both", "more than the sum")]
        cells = [cell.replace(" %", "") for cell in cells]
        lines.append(f"| {row['lever']} | {row['model']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="+")
    asked = parser.parse_args()
    print("\n".join([*models(asked.folder, asked.methods), "", *interactions(asked.folder)]))


if __name__ == "__main__":
    main()
