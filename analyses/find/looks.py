"""May seeds be added one at a time, until the verdict stands? In the worlds of analyses/coverage.

    python analyses/find/looks.py looks.csv [--worlds 500]

A search looks after 2, 3, 4 and 5 seeds and stops training a candidate that is shown. Each look is
a chance to be wrong, so the level of a candidate is spent over its looks. README.md says how, and
what is known of it. A row is written as soon as its cell is done; cells that the file holds
already are passed over.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.stats import norm

from depthprobe.evaluation.search import spent

sys.path.append(str(Path(__file__).parents[1] / "coverage"))
from simulate import CURVES, MARGIN, Population, ask

LOOKS, ALPHA = (2, 3, 4, 5), 0.05
COLUMNS = ["curve", "q", "candidates", "worlds", "rule", "wrong", "right", "seeds"]


def pocock(alpha: float, share: float) -> float:
    """Spend about as much at every look (Lan and DeMets 1983)."""
    return alpha * math.log1p((math.e - 1) * share)


def obrien_fleming(alpha: float, share: float) -> float:
    """Spend little at first (Lan and DeMets 1983)."""
    return float(2 * norm.sf(norm.isf(alpha / 2) / math.sqrt(share)))


def every(alpha: float) -> tuple[float, ...]:
    """The whole level at every look."""
    return (alpha,) * len(LOOKS)


RULES: dict[str, Callable[[float], tuple[float, ...]]] = {
    "five seeds": lambda alpha: (*[0.0] * (len(LOOKS) - 1), alpha),
    "the level at every look": every,
    "a quarter at every look": lambda alpha: every(alpha / len(LOOKS)),
    "spent as Pocock": lambda alpha: spent(alpha, LOOKS[-1], pocock),
    "spent as O'Brien and Fleming": lambda alpha: spent(alpha, LOOKS[-1], obrien_fleming),
    "spent late": lambda alpha: spent(alpha, LOOKS[-1]),
}


def seeds_until_shown(
    p_values: np.ndarray, rule: Callable[[float], tuple[float, ...]]
) -> np.ndarray:
    """After how many seeds each candidate is shown; 0 for never.

    ``p_values`` (looks, K), shallow to deep. The deepest is tested first, and what is shown hands
    its level on to the next shallower one, at the look at hand and all later ones.
    """
    count = p_values.shape[1]
    shown = np.zeros(count, dtype=int)
    for look, own in enumerate(p_values):
        carried = 0.0
        for place in reversed(range(count)):
            alpha = ALPHA / count + carried
            if not shown[place] and own[place] <= rule(round(alpha, 12))[look]:
                shown[place] = LOOKS[look]
            carried = alpha if shown[place] else 0.0
    return shown


def cell(curve: str, q: float, count: int, worlds: int) -> list[list[object]]:
    """A row a rule.

    How often a candidate is wrongly shown, which share of the good ones is rightly shown, and after
    how many seeds a good one is done with.
    """
    shares = CURVES[curve](np.linspace(0, 1, count))
    good = shares > 1 - MARGIN + 1e-9
    rng, population = (
        np.random.default_rng([int(10 * q), count, 24]),
        Population(count + 1, LOOKS[-1]),
    )
    wrong, right, seeds = (dict.fromkeys(RULES, 0.0) for _ in range(3))
    for _ in range(worlds):
        teacher, arms = population.draw(rng, shares, q)
        rows = [ask(teacher[:look], arms[:, :look], 1)[1] for look in LOOKS]
        p_values = np.array([[row.p_value for row in each] for each in rows])
        for name, rule in RULES.items():
            shown = seeds_until_shown(p_values, rule)
            wrong[name] += bool((shown[~good] > 0).any())
            right[name] += (shown[good] > 0).sum()
            seeds[name] += np.where(shown > 0, shown, LOOKS[-1])[good].sum()
    several = max(1, good.sum()) * worlds
    return [
        [curve, q, count, worlds, name, wrong[name] / worlds, right[name] / several,
         seeds[name] / several]
        for name in RULES
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--worlds", type=int, default=500)
    asked = parser.parse_args()
    done = set()
    if asked.output.exists():
        with asked.output.open(newline="") as file:
            done = {(row["curve"], row["q"], row["candidates"]) for row in csv.DictReader(file)}
    with asked.output.open("a", newline="") as file:
        writer = csv.writer(file)
        if not done:
            writer.writerow(COLUMNS)
        for curve, q, count in itertools.product(CURVES, (0.0, 1.0, 2.0, 4.0), (4, 12)):
            if (curve, str(q), str(count)) not in done:
                writer.writerows(cell(curve, q, count, asked.worlds))
                file.flush()


if __name__ == "__main__":
    main()
