"""Do the intervals cover, and how often is a depth wrongly shown to suffice? In worlds we made.

    python analyses/coverage/simulate.py coverage.csv [--worlds 500]

Every world has a teacher and K candidates, S seeds and 1,000 test users. NDCG@10 comes from ranks:
three of four users have 0, and a user who is easy for one model is easy for all. Training luck
multiplies all values of a model and seed. Its size is q: its standard deviation in one comparison
over the standard error that users give the same comparison with one seed. Means are known exactly,
since users are drawn from a population of 40,000 that is scaled to them.

A row is written as soon as its cell is done; cells that the file holds already are passed over.
"""

from __future__ import annotations

import argparse
import csv
import itertools
from pathlib import Path

import numpy as np

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.sufficiency import (
    ODDS,
    Components,
    Name,
    RetainedAccuracy,
    Sufficiency,
    plan,
    sufficient_depth,
)

USERS, POPULATION, MARGIN = 1000, 40_000, 0.05
COLUMNS = ["curve", "seeds", "q", "candidates", "worlds", "question", "found", "compared"]
Row = tuple[str, float, float]  # a question, what was found, what it is compared with
CURVES = {  # shares of the teacher's mean by depth, shallow to deep, as functions of 0..1
    "at the margin": lambda depth: 1 - MARGIN + 0 * depth,
    "rising": lambda depth: 0.85 + 0.17 * depth,
    "deep half good": lambda depth: np.where(depth > 0.5, 1.01, 1 - MARGIN),
    "deepest bad": lambda depth: np.where(depth == 1, 0.9, 1.0),
}


class Population:
    """Values of NDCG@10 of A arms and S seeds, (users, S, A), each with a mean of 1 exactly."""

    def __init__(self, arms: int, seeds: int) -> None:
        draw = np.random.default_rng(arms * 100 + seeds)
        ease = draw.normal(size=(POPULATION, 1, 1))
        # what a model makes of a user in all its seeds, and in one
        own = 0.25 * draw.normal(size=(POPULATION, 1, arms))
        noise = 0.3 * draw.normal(size=(POPULATION, seeds, arms))
        ranks = np.ceil(np.exp(np.clip(3.5 - 1.6 * ease + own + noise, 0, 8)))
        values = per_user_metric(ranks, "NDCG@10")
        self.values = values / values.mean(axis=0)
        # of one comparison, one seed, one user
        change = self.values[:, 0, 1:] - (1 - MARGIN) * self.values[:, 0, :1]
        self.deviation = float(change.std(axis=0).mean())

    def luck(self, q: float) -> float:
        """Standard deviation of one model's luck, of which a comparison has two."""
        return q * self.deviation / np.sqrt(USERS) / np.sqrt(2)

    def draw(
        self, rng: np.random.Generator, shares: np.ndarray, q: float, users: int = USERS
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teacher (S, U) and the candidates (K, S, U) of one world."""
        chosen = self.values[rng.integers(POPULATION, size=users)]  # (U, S, A)
        luck = 1 + self.luck(q) * rng.normal(size=chosen.shape[1:])
        scaled = chosen * (luck * np.append(1.0, shares))
        arms = np.ascontiguousarray(scaled.transpose(2, 1, 0))
        return arms[0], arms[1:]


def ask(
    teacher: np.ndarray, arms: np.ndarray, methods: int
) -> tuple[Sufficiency, list[RetainedAccuracy]]:
    """The verdict, and its rows in the order of the arms: depths in turn, each by all methods."""
    names: list[Name] = [(f"method {i % methods}", 1 + i // methods) for i in range(len(arms))]
    found = sufficient_depth(dict(zip(names, arms, strict=True)), teacher, margin=MARGIN)
    rows = {(row.method, row.depth): row for row in found.rows}
    return found, [rows[name] for name in names]


def verdicts(seeds: int, q: float, count: int, curve: str, worlds: int) -> list[Row]:
    """How often candidates are wrongly and rightly shown, and intervals cover."""
    methods = 1 if count < 8 else 2
    shares = CURVES[curve](np.repeat(np.linspace(0, 1, count // methods), methods))
    good = shares > 1 - MARGIN + 1e-9
    rng, population = (
        np.random.default_rng([seeds, int(10 * q), count]),
        Population(count + 1, seeds),
    )
    wrong, right, covered = np.zeros(2), np.zeros(2), 0.0
    for _ in range(worlds):
        _, rows = ask(*population.draw(rng, shares, q), methods)
        ours = np.array([row.shown for row in rows])
        bonferroni = np.array([row.p_value <= 0.05 / count for row in rows])
        wrong += [(ours & ~good).any(), (bonferroni & ~good).any()]
        right += [(ours & good).sum(), (bonferroni & good).sum()]
        inside = [row.kept.low <= s <= row.kept.high for row, s in zip(rows, shares, strict=True)]
        covered += float(np.mean(inside))
    found: list[Row] = [("wrongly shown", *(wrong / worlds)), ("covered", covered / worlds, 0.95)]
    if good.any():  # of the candidates that are good, how many are shown
        found.append(("rightly shown", *(right / worlds / good.sum())))
    return found


def advice(seeds: int, q: float, count: int, share: float, worlds: int) -> list[Row]:
    """Is "so many users" enough, and is "more seeds" said where seeds are what limits?

    The number comes from variance components and a mean that are known; the odds are then counted
    in new worlds with so many users. What a run of 1,000 users says is counted too.
    """
    rng, population = np.random.default_rng([seeds, int(10 * q), 7]), Population(count + 1, seeds)
    shares = np.full(count, share)
    change = population.values[:, :, 1:] * share - (1 - MARGIN) * population.values[:, :, :1]
    both = float(change.var(axis=1, ddof=1).mean())
    user = float(change.mean(axis=1).var(axis=0).mean()) - both / seeds
    own = Components(user, population.luck(q) ** 2 * (share**2 + (1 - MARGIN) ** 2), both)
    gap = share - 1 + MARGIN
    exact, _ = plan(gap, own, users=2, seeds=seeds, tested_at=0.05 / count)
    found: list[Row] = []
    for odds, number in zip(ODDS, exact, strict=True):
        if number is None or number > POPULATION / 2:
            continue
        passed = 0.0
        for _ in range(worlds):
            _, rows = ask(*population.draw(rng, shares, q, number), 1)
            passed += float(np.mean([row.p_value <= 0.05 / count for row in rows]))
        found.append((f"power with {number} users", passed / worlds, odds))
    undecided = limited = 0
    for _ in range(worlds):
        verdict, _ = ask(*population.draw(rng, shares, q), 1)
        if verdict.needed is not None:
            undecided += 1
            limited += verdict.needed.users[0] is None
    return [*found, ("no number of users will do", limited / undecided, exact[0] is None)]


CELLS = [  # curve, seeds, q, candidates
    *itertools.product(["at the margin"], (3, 5, 2), (0, 1, 2, 3, 4), (4, 34)),
    *itertools.product(["at the margin"], [1], [0], (4, 34)),
    *itertools.product(["advice"], (3, 5), (0, 2), [4]),
    *itertools.product(["rising", "deep half good", "deepest bad"], (3, 5), (0, 2), [10]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument(
        "--worlds", type=int, default=500, help="of four candidates; of more, fewer"
    )
    options = parser.parse_args()
    done: set[tuple[str, ...]] = set()
    if options.file.is_file():
        with options.file.open(newline="", encoding="utf-8") as file:
            done = {tuple(row[:4]) for row in csv.reader(file)}
    with options.file.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(COLUMNS)
        for curve, seeds, q, count in CELLS:
            if (curve, str(seeds), str(q), str(count)) in done:
                continue
            worlds = options.worlds * 4 // min(count, 16)
            if curve == "advice":
                rows = advice(seeds, q, count, 1.0, worlds // 3)
            else:
                rows = verdicts(seeds, q, count, curve, worlds)
            for question, rate, against in rows:
                writer.writerow(
                    [curve, seeds, q, count, worlds, question, f"{rate:.4f}", f"{against:.4f}"]
                )
            file.flush()


if __name__ == "__main__":
    main()
