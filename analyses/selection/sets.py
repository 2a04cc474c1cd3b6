"""Cheap scores against sets of blocks, before training and after: correlations, choices, a figure.

    python analyses/selection/sets.py runs/RUN --draw sets.png

A set is what is left of the teacher. Its worth before training is the NDCG@10 of the first seed's
teacher without the other blocks, after training that of the healed sets, in the mean over seeds: a
score may choose other blocks with each seed. A score of single blocks predicts the loss as the sum
over the blocks that went. Correlations are over the random sets alone: Spearman's, with a one-sided
lower bound for other random sets (Bonett and Wright 2000).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import norm, spearmanr

from depthprobe.report.numbers import FULL, Ranks, as_summary
from depthprobe.report.reliance import scores_of
from depthprobe.runs.store import Run, open_run
from depthprobe.study import parse_blocks

METRIC, RANDOM = "NDCG@10", "random"
TITLES = {  # of the scores of whole blocks
    "block-influence": "block influence",
    "angular-distance": "angular distance",
    "1 - CKA": "1 - CKA",
    "Taylor": "Taylor",
}


def mean_of(ranks: Ranks, trials: list[str]) -> float:
    """Mean of the metric over the test users, and over the trials."""
    return float(np.mean(ranks.values(FULL, METRIC, [trials])[0]))


def sets_of(run: Run, ranks: Ranks) -> pd.DataFrame:
    """A row a choice, and a row a random set: the blocks kept at the first seed, the worths."""
    drawn = run.scores("random-blocks").query("metric == @METRIC")
    before = drawn.groupby(["selection", "kept"], as_index=False)["value"].first()
    before = before.rename(columns={"selection": "choice", "value": "before"})
    healed = run.trials.query("status == 'done' and method.str.startswith('heal')")
    kept = healed["kept"].map(lambda blocks: ",".join(map(str, parse_blocks(blocks))))
    healed = healed.assign(kept=kept).sort_values("seed")
    after = healed.groupby("method").agg(kept=("kept", "first"), trials=("trial", list))
    after["after"] = after["trials"].map(lambda own: mean_of(ranks, own))
    after["choice"] = [name.partition(":")[2] or "prefix" for name in after.index]
    # every name that says no rule, r01 ..., is of a random set
    random = after["kept"].isin(before.query("choice == @RANDOM")["kept"])
    after.loc[random & ~after["choice"].isin(before["choice"]), "choice"] = RANDOM
    return before.merge(after[["choice", "kept", "after"]], how="outer", on=["choice", "kept"])


def damages(run: Run) -> dict[str, np.ndarray]:
    """What each score of the first teacher says of every block, (L,): higher if it matters more."""
    scores = scores_of(as_summary(run), 0)
    blocks = [
        (block, block + 1) for block in range(max(end for own in scores.values() for _, end in own))
    ]
    return {
        TITLES[name]: np.array([own[block] for block in blocks])
        for name, own in scores.items()
        if name in TITLES
    }


def lower_bound(correlation: float, number: int) -> float:
    """One-sided 95 % bound of Spearman's correlation over other sets."""
    spread = math.sqrt((1 + correlation**2 / 2) / (number - 3))
    return math.tanh(math.atanh(min(correlation, 1 - 1e-9)) - float(norm.ppf(0.95)) * spread)


def correlation_table(sets: pd.DataFrame, of_blocks: dict[str, np.ndarray]) -> str:
    """Does the sum of a score over the blocks that went order random sets as they are worth?"""
    drawn = sets.query("choice == @RANDOM")
    lines = ["| score, summed over what went | before training | after training |", "|---|---|---|"]
    kept = [[int(block) for block in own.split(",")] for own in drawn["kept"]]
    predicted = {
        name: np.array([np.delete(values, own).sum() for own in kept])
        for name, values in of_blocks.items()
    }
    predicted["the first block went (control)"] = np.array([float(0 not in own) for own in kept])
    predicted["the worth before training"] = -drawn["before"].to_numpy()
    for name, loss in predicted.items():
        cells = []
        for worth in ("before", "after"):
            has = drawn[worth].notna().to_numpy()
            if has.sum() <= 3 or name == "the worth before training" and worth == "before":
                cells.append("")
                continue
            value = float(spearmanr(-loss[has], drawn.loc[has, worth]).statistic)
            cells.append(f"{value:.2f}, at least {lower_bound(value, int(has.sum())):.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choice_table(sets: pd.DataFrame, teacher: float) -> str:
    """Each choice and its reverse: share of the teacher's, and how many random sets are worse."""
    drawn = sets.query("choice == @RANDOM")
    lines = [
        "| choice | blocks that stay | before | better than random | after | better than random |",
        "|---|---|---|---|---|---|",
    ]
    for _, row in sets.query("choice != @RANDOM").sort_values("before", ascending=False).iterrows():
        cells = []
        for worth in ("before", "after"):
            others = drawn.loc[drawn["kept"] != row["kept"], worth].dropna()
            value, has = row[worth], len(others) and not pd.isna(row[worth])
            cells += [f"{100 * value / teacher:.1f} %" if has else ""]
            cells += [f"{(others < value).sum()} of {len(others)}" if has else ""]
        lines.append(f"| {row['choice']} | {row['kept']} | {' | '.join(cells)} |")
    for worth in ("before", "after"):
        own = 100 * drawn[worth].dropna() / teacher
        if len(own):
            lines.append(
                f"\nRandom sets {worth} training: median {own.median():.1f} %, "
                f"from {own.min():.1f} to {own.max():.1f} %."
            )
    return "\n".join(lines)


def draw(sets: pd.DataFrame, teacher: float, title: str, path: Path) -> None:
    """Every set: its worth before training, and after."""
    figure, axes = plt.subplots(figsize=(5.6, 4.2), layout="constrained")
    share = sets.dropna(subset=["before", "after"]).copy()
    share[["before", "after"]] *= 100 / teacher
    both = ["before", "after"]
    drawn, chosen = share.query("choice == @RANDOM"), share.query("choice != @RANDOM")
    axes.plot(*drawn[both].T.to_numpy(), "o", color="#999999", label="random sets")
    axes.plot(
        *chosen[both].T.to_numpy(), "D", color="#1f5fa8", label="a score, its reverse, a rule"
    )
    for _, row in chosen.iterrows():
        at = (row["before"], row["after"])
        axes.annotate(row["choice"], at, (4, 4), textcoords="offset points", fontsize=7)
    axes.set_xlabel("before training, % of the full model's NDCG@10")
    axes.set_ylabel("after training, %")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draw", type=Path, help="a PNG of the sets before and after training")
    asked = parser.parse_args()
    run = open_run(asked.run)
    ranks = Ranks(run.users)
    full = run.trials.query("status == 'done' and method == 'full'")
    teacher, sets = mean_of(ranks, [*full["trial"]]), sets_of(run, ranks)
    first = mean_of(ranks, [*full.query("seed == 0")["trial"]])
    sets["before"] *= (
        teacher / first
    )  # measured with the first teacher: as a share of its own worth
    print(correlation_table(sets, damages(run)), choice_table(sets, teacher), sep="\n\n")
    if asked.draw:
        draw(sets, teacher, run.path.name, asked.draw)


if __name__ == "__main__":
    main()
