"""Accuracy against depth in the published studies, as a share of the full model's.

python analyses/real_llm/draw.py docs/images/depth.png
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

REPORTS = Path(__file__).parents[2] / "reports" / "real_llm"
STUDIES = {  # the run's folder: what stands above its panel
    "smollm2-ml-100k": "SmolLM2 (135 M) reads items\nMovieLens 100K, 943 users",
    "smollm2-office": "SmolLM2 (135 M) reads items\nAmazon Office, 4,905 users",
    "smollm2-words-rates": "SmolLM2 (135 M) reads titles\nMovieLens 100K, 943 users",
    "titles-plaintext": "a toy (3 M) reads titles\nMovieLens 100K, 943 users",
}
ARMS = {  # what stands before a method's colon: its label, colour and marker
    "finetune": ("fine-tuned", "#1f5fa8", "o"),
    "distill": ("distilled by scores", "#2e8b57", "s"),
    "random-init": ("random weights", "#b3402e", "^"),
}
SHARE = "NDCG@10 of teacher"


def place(depth: Any) -> np.ndarray:
    """Depths on a logarithmic axis, with 0 one step before 1."""
    return np.log2(np.maximum(depth, 0.5))


def bars(axes: Axes, at: np.ndarray, own: pd.DataFrame, **look: str) -> None:
    """The shares of some models with their intervals."""
    spread = np.stack([own[SHARE] - own[f"{SHARE} low"], own[f"{SHARE} high"] - own[SHARE]])
    axes.errorbar(at, own[SHARE], spread, ms=5, lw=1, capsize=2, **look)


def panel(axes: Axes, table: pd.DataFrame, title: str) -> None:
    """The trained arms with their intervals, the full model as a line, SASRec as a band."""
    full = int(table.loc[table["method"] == "full", "depth"].item())
    for offset, (method, (label, colour, marker)) in enumerate(ARMS.items()):
        own = table[table["method"].str.partition(":")[0] == method].sort_values("depth")
        at = place(own["depth"]) + 0.08 * (offset - 1)  # side by side
        bars(axes, at, own, color=colour, marker=marker, label=label)
    head = table[(table["method"] == "readout") & (table["depth"] == 0)]
    label = "a head on the last item alone"
    bars(axes, place(head["depth"]), head, color="#777777", marker="D", ls="", label=label)
    sasrec = table[table["method"] == "sasrec"].iloc[0]
    axes.axhspan(sasrec[f"{SHARE} low"], sasrec[f"{SHARE} high"], color="#999999", alpha=0.2, lw=0)
    axes.axhline(sasrec[SHARE], color="#777777", ls=":", label="SASRec (with its interval)")
    axes.axhline(1, color="black", lw=0.8)
    axes.plot(place(full), 1, "k*", ms=9, label="the full model")
    ticks = [*(depth for depth in (0, 1, 2, 4, 8, 16) if depth < full), full]
    axes.set_xticks(place(ticks), ticks)
    axes.set_xlabel("blocks")
    axes.set_title(title, fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    figure, panels = plt.subplots(
        1, len(STUDIES), figsize=(3.2 * len(STUDIES), 3.8), sharey=True, layout="constrained"
    )
    for axes, (study, title) in zip(panels, STUDIES.items(), strict=True):
        table = pd.read_csv(REPORTS / study / "tables" / "methods.csv")
        panel(axes, table[table["protocol"] == "full"], title)
    panels[0].set_ylabel("share of the full model's NDCG@10")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
    )
    figure.savefig(sys.argv[1], dpi=120)


if __name__ == "__main__":
    main()
