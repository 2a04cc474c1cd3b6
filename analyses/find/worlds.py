"""How often does a search show a depth wrongly, and what does it save? In worlds we made.

    python analyses/find/worlds.py worlds.csv [--worlds 300]

The worlds are those of analyses/coverage, with up to five seeds and the margin of 5 %. What the
probes predict is the truth and an error of 5 %; or, to break the search if that can be done, what
the first seed's test users themselves say ("peeking"). A row is written as soon as its cell is
done; cells that the file holds already are passed over.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from pathlib import Path

import numpy as np

from depthprobe.evaluation.search import replay, search
from depthprobe.evaluation.sufficiency import sufficient_depth

sys.path.append(str(Path(__file__).parents[1] / "coverage"))
from simulate import CURVES, MARGIN, Population

SEEDS, ERROR = 5, 0.05
COLUMNS = [
    *("curve", "q", "candidates", "predicted", "worlds", "wrong", "shown", "sweep shows"),
    *("same as the sweep", "same levels", "median cost", "largest cost"),
]
CELLS = [
    *itertools.product(["at the margin"], (0.0, 1.0, 2.0, 4.0), (4, 11), ("error", "peeking")),
    *itertools.product(["rising", "deep half good", "deepest bad"], (0.0, 2.0), (11,), ("error",)),
    *itertools.product(["at the margin", "rising"], (0.0, 2.0), (29,), ("error",)),
]


def cell(curve: str, q: float, count: int, predicted: str, worlds: int) -> list[object]:
    """A row: rates over so many worlds, and what a search costs beside a full sweep."""
    shares = CURVES[curve](np.linspace(0, 1, count))
    good = shares > 1 - MARGIN + 1e-9
    rng, population = np.random.default_rng([int(10 * q), count, 24]), Population(count + 1, SEEDS)
    blocks, names = count + 1, range(1, count + 1)
    full = SEEDS * blocks * (blocks + 1) / 2
    found, costs = np.zeros(5), []
    for _ in range(worlds):
        teacher, arms = population.draw(rng, shares, q)
        looked = shares + ERROR * rng.normal(size=count)
        if predicted == "peeking":
            looked = arms[:, 0].mean(axis=1) / teacher[0].mean()
        asked = {
            "blocks": blocks, "predicted": dict(zip(names, looked.tolist(), strict=True)),
            "seeds": SEEDS, "margin": MARGIN,
        }  # fmt: skip
        values = {depth: dict(enumerate(arms[depth - 1])) for depth in names}
        searched = replay({**values, blocks: dict(enumerate(teacher))}, **asked)
        end = searched.states[-1]
        rows = end.verdict.rows if end.verdict else ()
        sweep = sufficient_depth({("finetune", d): arms[d - 1] for d in names}, teacher,
                                 margin=MARGIN)  # fmt: skip
        levels = search(dict(enumerate(teacher)), values, **asked)
        found += [
            any(row.shown and not good[row.depth - 1] for row in rows), end.shown is not None,
            sweep.depth is not None, end.shown == sweep.depth, end.shown == levels.shown,
        ]  # fmt: skip
        costs.append(searched.cost / full)
    cost = [round(float(np.median(costs)), 3), round(max(costs), 3)]
    return [curve, q, count, predicted, worlds, *(found / worlds).round(4).tolist(), *cost]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--worlds", type=int, default=300)
    asked = parser.parse_args()
    done = set()
    if asked.output.exists():
        with asked.output.open(newline="") as file:
            done = {tuple(row[name] for name in COLUMNS[:4]) for row in csv.DictReader(file)}
    with asked.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(COLUMNS)
        for each in CELLS:
            if tuple(map(str, each)) not in done:
                writer.writerow(cell(*each, asked.worlds))
                file.flush()


if __name__ == "__main__":
    main()
