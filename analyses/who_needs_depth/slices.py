"""What each group of users keeps of its teacher's NDCG@10 at each depth, and when users settle.

The argument is a run's folder: ``slices.py runs/who-needs-depth``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import Interval, mean_interval, ratio_interval
from depthprobe.runs.store import Run, open_run

METHODS = ("early-exit", "readout", "finetune")
FEWEST = 100  # users of a group that is told of


def main() -> None:
    run = open_run(sys.argv[1])
    values = by_arm(run)
    blocks = run.manifest.backbone.blocks
    depths = sorted({depth for method, depth in values if method == "finetune"})
    users = next(iter(values.values())).shape[1]
    print(f"{run.study.name}: {users:,} users, {run.study.seeds} seeds\n")
    print("\n".join(table(run, values, depths, blocks)))
    print("\n".join(settled(run, blocks)))


def by_arm(run: Run) -> dict[tuple[str, int], np.ndarray]:
    """NDCG@10 of each user, (S, U), by method and depth, a row a seed."""
    found: dict[tuple[str, int], list[np.ndarray]] = {}
    full = run.users[run.users["protocol"] == "full"]
    ranks = {name: frame["rank"].to_numpy() for name, frame in full.groupby("trial")}
    for record in sorted(run.records, key=lambda record: record.seed):
        if record.method in (*METHODS, "full"):
            values = per_user_metric(ranks[record.id], "NDCG@10")
            found.setdefault((record.method, record.depth), []).append(values)
    return {arm: np.stack(values) for arm, values in found.items()}


def table(
    run: Run, values: dict[tuple[str, int], np.ndarray], depths: list[int], blocks: int
) -> Iterator[str]:
    """A row a group: the teacher, then the share of it that is kept, with paired intervals."""
    arms = [("early-exit", depth) for depth in depths]
    arms += [("finetune", depth) for depth in depths]
    fresh = [("readout", 0), ("readout", blocks)]  # heads of one kind: what do the blocks add?
    arms += [arm for arm in fresh if arm in values]
    heads = [f"{method}, {depth}" for method, depth in arms]
    heads += ["readout, 0 of readout, all"] if values.keys() >= set(fresh) else []
    yield f"| group | users | teacher | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 3) + "|"
    teacher = values["full", blocks]
    for name, chosen in groups(run):
        own = teacher[:, chosen]
        if chosen.sum() < FEWEST or not own.any():  # nobody is served: a share has no meaning
            continue
        pairs = [(arm, ("full", blocks)) for arm in arms]
        pairs += [(fresh[0], fresh[1])] if len(heads) > len(arms) else []
        cells = []
        for arm, reference in pairs:
            found = ratio_interval(values[arm][:, chosen], values[reference][:, chosen])
            cells.append(cell(found, digits=0))
        yield f"| {name} | {chosen.sum():,} | {own.mean():.4f} | {' | '.join(cells)} |"
    yield ""


def cell(found: Interval, *, digits: int) -> str:
    """A share and its interval, in per cent."""
    value, low, high = (100 * share for share in (found.value, found.low, found.high))
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def groups(run: Run) -> Iterator[tuple[str, np.ndarray]]:
    """Names, and which of the test's users are meant, bool (U,)."""
    slices = run.slices
    yield "all", np.ones(len(slices), dtype=bool)
    for family in ("target", "history"):
        for label in slices[family].cat.categories:
            yield f"{family} {label}", (slices[family] == label).to_numpy()


def settled(run: Run, blocks: int) -> Iterator[str]:
    """Users whose answers stand before the last block, and those whom the last blocks harmed."""
    scores = run.scores("settling")
    if scores.empty:
        return
    told = {
        "ten best settled before the last block": scores["set_settled"] < blocks,
        "the target's rank settled before": scores["rank_settled"] < blocks,
        "the target ranked better earlier": scores["overthinking"],
    }
    seeds = {
        name: np.stack([own.to_numpy(float) for _, own in values.groupby(scores["seed"])])
        for name, values in told.items()
    }  # each (S, U)
    yield f"| % of users | {' | '.join(told)} |"
    yield "|---" * (len(told) + 1) + "|"
    for name, chosen in groups(run):
        if chosen.sum() >= FEWEST:
            cells = [cell(mean_interval(own[:, chosen]), digits=1) for own in seeds.values()]
            yield f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
