"""What each group of users keeps of its teacher's NDCG@10 at each depth, and when users settle.

The argument is a run's folder: ``slices.py runs/who-needs-depth``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pandas as pd

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import bootstrap_ratio
from depthprobe.sweep.store import Run, open_run

METHODS = ("early-exit", "finetune")
FEWEST = 100  # users of a group that is told of


def main() -> None:
    run = open_run(sys.argv[1])
    values = by_arm(run)
    blocks = int(run.manifest["backbone"]["blocks"])
    depths = sorted({depth for method, depth in values if method == "finetune"})
    users = next(iter(values.values())).shape[1]
    print(f"{run.study.name}: {users:,} users, {run.study.seeds} seeds\n")
    print("\n".join(table(run, values, depths, blocks)))
    print("\n".join(settled(run)))


def by_arm(run: Run) -> dict[tuple[str, int], np.ndarray]:
    """NDCG@10 of each user, (S, U), by method and depth, a row a seed."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    full = run.users[run.users["protocol"] == "full"]
    ranks = {name: frame["rank"].to_numpy() for name, frame in full.groupby("trial")}
    for record in sorted(run.records, key=lambda record: record["seed"]):
        if record["method"] in (*METHODS, "full"):
            values = per_user_metric(ranks[record["id"]], "NDCG@10")
            found.setdefault((record["method"], record["depth"]), []).append(values)
    return {arm: np.stack(values) for arm, values in found.items()}


def table(
    run: Run, values: dict[tuple[str, int], np.ndarray], depths: list[int], blocks: int
) -> Iterator[str]:
    """A row a group: the teacher, then the share of it that is kept, with paired intervals."""
    arms = [(method, depth) for method in METHODS for depth in depths]
    heads = [f"{method}, {depth}" for method, depth in arms]
    yield f"| group | users | teacher | {' | '.join(heads)} |"
    yield "|---" * (len(arms) + 3) + "|"
    teacher = values["full", blocks]
    for name, chosen in groups(run):
        own = teacher[:, chosen]
        if chosen.sum() < FEWEST or not own.any():  # nobody is served: a share has no meaning
            continue
        cells = []
        for arm in arms:
            found = bootstrap_ratio(values[arm][:, chosen], own)
            cells.append(f"{100 * found.value:.0f} [{100 * found.low:.0f}, {100 * found.high:.0f}]")
        yield f"| {name} | {chosen.sum():,} | {own.mean():.4f} | {' | '.join(cells)} |"
    yield ""


def groups(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """Names, and which of the test's users are meant, bool (U,)."""
    slices = run.slices
    yield "all", np.ones(len(slices), dtype=bool)
    for family in ("target", "history"):
        for label in slices[family].cat.categories:
            yield f"{family} {label}", (slices[family] == label).to_numpy()


def settled(run: Run) -> Iterator[str]:
    """Users by the depth from which on their ten best items are those of the whole teacher."""
    scores = run.scores("settling")
    if scores.empty:
        return
    slices = run.slices.rename(columns={"target": "group"})
    both = scores.merge(slices[["user", "group"]], on="user")
    everybody = both.assign(group="all")
    yield "| target | top item settled | ten best settled | overthinking, % |"
    yield "|---|---|---|---|"
    for name, frame in pd.concat([everybody, both]).groupby("group", observed=True, sort=False):
        medians = [frame[column].median() for column in ("top_settled", "set_settled")]
        over = 100 * frame["overthinking"].mean()
        yield f"| {name} | {medians[0]:.0f} | {medians[1]:.0f} | {over:.0f} |"


if __name__ == "__main__":
    main()
