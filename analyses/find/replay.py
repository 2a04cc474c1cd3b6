"""What a search would have done in recorded full sweeps, beside bisection and successive halving.

    python analyses/find/replay.py replays.csv runs/find/*

Each recording is replayed at several margins, and in several orders of its seeds. "sweep" is the
verdict of the report with all depths and seeds; "levels" that of a search that has trained
everything; "needs" the share of the sweep's compute that its verdict cannot do without.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from depthprobe.evaluation.search import replay, search
from depthprobe.evaluation.sufficiency import Sufficiency, sufficient_depth
from depthprobe.runs.search import Found, find_out
from depthprobe.runs.store import open_run
from depthprobe.study import override

MARGINS, ORDERS, LEVEL = (0.01, 0.02, 0.05, 0.1, 0.2), 10, 0.95
COLUMNS = [
    *("run", "blocks", "users", "margin", "order", "how", "depth", "cost", "sweep", "levels"),
    "needs",
]
Values = Mapping[int, Mapping[int, np.ndarray]]


def verdict(trained: Values, depths: list[int], blocks: int, seeds: int, margin: float,
            level: float = LEVEL) -> Sufficiency:  # fmt: skip
    """The report's verdict on some depths with the first seeds."""
    arms = {("finetune", d): [trained[d][s] for s in range(seeds)] for d in depths}
    teacher = [trained[blocks][s] for s in range(seeds)]
    return sufficient_depth(arms, teacher, margin=margin, level=level)


def needs(sweep: Sufficiency, blocks: int, seeds: int) -> int:
    """The cost of the trainings without which the sweep's depth would not pass.

    Those of the teacher, of the depth, and of the deeper ones whose levels it needs.
    """
    if sweep.depth is None:
        return 0
    p_values = {row.depth: row.p_value for row in sweep.rows if row.depth >= sweep.depth}
    share, chain = (1 - LEVEL) / len(sweep.rows), list[int]()
    for top in sorted(p_values):
        chain.insert(0, top)
        if all(p_values[d] <= place * share for place, d in enumerate(chain, start=1)):
            break
    return seeds * (blocks + sum(chain))


def bisection(trained: Values, blocks: int, seeds: int, margin: float) -> tuple[int | None, int]:
    """Halve the bracket by all seeds of its middle; each look has its part of the level."""
    low, high, cost, shown = 0, blocks, seeds * blocks, None
    looks = math.ceil(math.log2(blocks))
    while high - low > 1:
        middle = (low + high) // 2
        cost += seeds * middle
        level = 1 - (1 - LEVEL) / looks
        if verdict(trained, [middle], blocks, seeds, margin, level).depth:
            high = shown = middle
        else:
            low = middle
    return shown, cost


def halving(trained: Values, blocks: int, seeds: int, margin: float) -> tuple[int | None, int]:
    """Successive halving: seeds double, and the half that keeps least of the teacher goes.

    The K depths that are left at the end are tested at a Kth of the level of all.
    """
    depths = [depth for depth in trained if depth != blocks]
    every, done, cost, number = len(depths), 0, 0, 1
    while True:
        cost += (number - done) * (sum(depths) + blocks)
        done = number
        if done == seeds:
            break
        kept = {d: np.mean([trained[d][s].mean() for s in range(done)]) for d in depths}
        depths = sorted(depths, key=lambda d: -kept[d])[: math.ceil(len(depths) / 2)]
        number = min(seeds, 2 * done)
    level = 1 - (1 - LEVEL) * len(depths) / every
    return verdict(trained, depths, blocks, seeds, margin, level).depth, cost


def replays(name: str, found: Found, margin: float, order: int) -> Iterator[list[object]]:
    """A row a way to search."""
    blocks, seeds = found.blocks, len(found.trained[found.blocks])
    places = np.random.default_rng(order).permutation(seeds) if order else np.arange(seeds)
    trained = {
        depth: {new: arms[int(old)] for new, old in enumerate(places)}
        for depth, arms in found.trained.items()
    }
    depths = sorted(found.predicted)
    asked = {"predicted": found.predicted, "seeds": seeds, "margin": margin, "level": LEVEL}
    sweep = verdict(trained, depths, blocks, seeds, margin)
    candidates = {depth: trained[depth] for depth in depths}
    levels = search(trained[blocks], candidates, blocks=blocks, **asked).shown
    searched = replay(trained, blocks=blocks, **asked)
    ways = {
        "search": (searched.states[-1].shown, searched.cost),
        "bisection": bisection(trained, blocks, seeds, margin),
        "halving": halving(trained, blocks, seeds, margin),
    }
    full = seeds * (sum(depths) + blocks)
    users, share = len(trained[blocks][0]), round(needs(sweep, blocks, seeds) / full, 4)
    for how, (depth, cost) in ways.items():
        said = depth, round(cost / full, 4), sweep.depth, levels, share
        yield [name, blocks, users, margin, order, how, *said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    asked = parser.parse_args()
    with asked.output.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for folder in asked.runs:
            run = open_run(folder)
            study = override(run.study, layers="find")
            found = find_out(folder, study, run.manifest.backbone.blocks)
            teacher = np.mean([*found.trained[found.blocks].values()])
            if teacher <= (found.popularity or 0):
                print(f"{folder.name}: a search is refused, the teacher is below popularity")
                continue
            kept = {d: np.mean([*found.trained[d].values()]) / teacher for d in found.predicted}
            off = np.array([kept[depth] - share for depth, share in found.predicted.items()])
            print(f"{folder.name}: kept less predicted {off.mean():+.3f}, sd {off.std():.3f}")
            for margin in MARGINS:
                for order in range(ORDERS):
                    writer.writerows(replays(folder.name, found, margin, order))


if __name__ == "__main__":
    main()
