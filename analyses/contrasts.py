"""Direct contrasts of two methods at the same depth, paired by user and seed.

    python analyses/contrasts.py runs/RUN distill:scores,distill:states finetune
    python analyses/contrasts.py runs/RUN finetune random-init --slices

Each method of the first list against the one after it: the share that it has of that one's mean,
and whether it is superior or inferior at all, at a level that the methods of one line share.
``full`` stands for ``finetune`` at full depth. With ``--slices`` each group of test users apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from depthprobe.evaluation.slices import FEWEST
from depthprobe.evaluation.sufficiency import compare
from depthprobe.report.numbers import FULL, Ranks
from depthprobe.runs.store import Run, open_run

Arms = Mapping[tuple[str, int], np.ndarray]  # per-user values (S, U) by method and depth


def arms_of(run: Run) -> Arms:
    """The values of the study's metric by full ranking, of all methods with every seed."""
    trials = run.trials.query("status == 'done'").sort_values("seed")
    trials = trials.assign(method=trials["method"].replace("full", "finetune"))
    groups = trials.groupby(["method", "depth"])["trial"]
    groups = {name: list(own) for name, own in groups if len(own) == run.study.seeds}
    values = Ranks(run.users).values(FULL, run.study.protocol.metric, [*groups.values()])
    return dict(zip(groups, values, strict=True))


def line(arms: Arms, depth: int, methods: list[str], reference: str, users: np.ndarray) -> str:
    """A row of the table: the contrasts at one depth, of some users (U,) bool."""
    base = arms[reference, depth][:, users]
    asked = {method: arms[method, depth][:, users] for method in methods if (method, depth) in arms}
    if not base.any() or not asked:
        return " | ".join("" for _ in methods)
    found = compare(asked, base, margin=0)
    cells = []
    for method in methods:
        if method not in found:
            cells.append("")
            continue
        each = found[method]
        share, shown = each.share, [name for name in ("superior", "inferior") if each.shows(name)]
        # non-inferiority at no margin is superiority, one-sided; a difference is two-sided
        if shown == ["inferior"] and 2 * each.p_values["inferior"] > each.tested_at:
            shown = []
        told = f"{100 * share.value:.1f} % [{100 * share.low:.1f}, {100 * share.high:.1f}]"
        cells.append(" ".join([told, *shown]))
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("methods")
    parser.add_argument("reference")
    parser.add_argument("--slices", action="store_true")
    asked = parser.parse_args()
    run, methods = open_run(asked.run), asked.methods.split(",")
    arms, slices = arms_of(run), run.slices.set_index("user")
    print(f"| blocks | users | {' | '.join(methods)} |\n|---|---|{'---|' * len(methods)}")
    for depth in sorted(depth for name, depth in arms if name == asked.reference):
        groups = {"all": np.ones(len(slices), bool)}
        if asked.slices:
            for family in slices:
                own = slices[family]
                groups |= {
                    f"{family}:{kind}": (own == kind).to_numpy() for kind in own.cat.categories
                }
        for name, users in groups.items():
            if users.sum() >= FEWEST:
                cells = line(arms, depth, methods, asked.reference, users)
                print(f"| {depth} | {name} ({users.sum():,}) | {cells} |")


if __name__ == "__main__":
    main()
