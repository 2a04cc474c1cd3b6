"""Direct contrasts of two methods at the same depth, paired by user and seed.

    python analyses/contrasts.py runs/RUN distill:scores,distill:states finetune
    python analyses/contrasts.py runs/ONE runs/TWO finetune random-init --slices --draw some.png

Each method of the first list against the one after it: the share that it has of that one's mean,
and whether it is superior or inferior at all, at a level that the methods of one line share.
``full`` stands for ``finetune`` at full depth. With ``--slices`` each group of test users apart.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np

from depthprobe.evaluation.slices import FEWEST
from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.sufficiency import compare
from depthprobe.formatting import in_percent
from depthprobe.report.numbers import FULL, Ranks
from depthprobe.runs.store import Run, open_run

Arms = Mapping[tuple[str, int], np.ndarray]  # per-user values (S, U) by method and depth


class Contrast(NamedTuple):
    """A method's share of the reference's mean, at one depth, over some users of a run."""

    run: str
    depth: int
    group: str
    method: str
    share: Interval
    shown: str  # "superior", "inferior" or nothing

    @property
    def text(self) -> str:
        """``99.5 % [96.2, 102.8] superior``."""
        return f"{in_percent(self.share)} {self.shown}".rstrip()


def arms_of(run: Run) -> Arms:
    """The values of the study's metric by full ranking, of all methods with every seed."""
    trials = run.trials.query("status == 'done'").sort_values("seed")
    trials = trials.assign(method=trials["method"].replace("full", "finetune"))
    groups = trials.groupby(["method", "depth"])["trial"]
    groups = {name: list(own) for name, own in groups if len(own) == run.study.seeds}
    values = Ranks(run.users).values(FULL, run.study.protocol.metric, [*groups.values()])
    return dict(zip(groups, values, strict=True))


def contrasts(run: Run, methods: list[str], reference: str, *, slices: bool) -> Iterator[Contrast]:
    """Every contrast that the run can make, by depth and group of users."""
    arms, of_users = arms_of(run), run.slices.set_index("user")
    groups = {"all": np.ones(len(of_users), bool)}
    for family in of_users if slices else ():
        own = of_users[family]
        groups |= {f"{family}: {kind}": (own == kind).to_numpy() for kind in own.cat.categories}
    for depth in sorted(depth for name, depth in arms if name == reference):
        asked = {method: arms[method, depth] for method in methods if (method, depth) in arms}
        for name, users in groups.items():
            base = arms[reference, depth][:, users]
            if not asked or users.sum() < FEWEST or not base.any():
                continue
            found = compare({m: own[:, users] for m, own in asked.items()}, base, margin=0)
            for method, each in found.items():
                shown = [verdict for verdict in ("superior", "inferior") if each.shows(verdict)]
                # non-inferiority at no margin is superiority, one-sided; a difference is two-sided
                if shown == ["inferior"] and 2 * each.p_values["inferior"] > each.tested_at:
                    shown = []
                group = f"{name} ({users.sum():,})"
                yield Contrast(run.path.name, depth, group, method, each.share, " ".join(shown))


def table(found: list[Contrast], methods: list[str]) -> str:
    """A line a run, depth and group; a column a method."""
    lines = [
        f"| run | blocks | users | {' | '.join(methods)} |",
        f"|---|---|---|{'---|' * len(methods)}",
    ]
    for key in dict.fromkeys(each[:3] for each in found):
        texts = {each.method: each.text for each in found if each[:3] == key}
        cells = [*map(str, key), *(texts.get(method, "") for method in methods)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: list[Contrast], reference: str, path: Path) -> None:
    """Every share with its interval, in a row of its own; a panel a run."""
    runs = list(dict.fromkeys(each.run for each in found))
    most = max(sum(each.run == run for each in found) for run in runs)
    figure, panels = plt.subplots(
        1, len(runs), figsize=(3 + 3.2 * len(runs), 1.2 + 0.25 * most), sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for panel, run in zip(panels[0], runs, strict=True):
        own = [each for each in found if each.run == run]
        for row, each in enumerate(own):
            colour = {"superior": "#1b7f4d", "inferior": "#b3402e"}.get(each.shown, "#555555")
            share = each.share
            panel.plot([100 * share.low, 100 * share.high], [row, row], color=colour, lw=1.5)
            panel.plot(100 * share.value, row, "o", color=colour, ms=5)
        groups = len({each.group for each in found}) > 1
        names = [
            f"{each.method} at {each.depth}" + (f", {each.group}" if groups else "") for each in own
        ]
        panel.set_yticks(range(len(own)), names, fontsize=8)
        panel.invert_yaxis()
        panel.axvline(100, color="black", lw=0.8)
        panel.set_title(run, fontsize=9)
        panel.set_xlabel(f"% of {reference} at the same depth", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("methods")
    parser.add_argument("reference")
    parser.add_argument("--slices", action="store_true")
    parser.add_argument("--draw", type=Path, help="a PNG of the shares and their intervals")
    asked = parser.parse_args()
    methods = asked.methods.split(",")
    found = [
        each
        for path in asked.runs
        for each in contrasts(open_run(path), methods, asked.reference, slices=asked.slices)
    ]
    print(table(found, methods))
    if asked.draw:
        draw(found, asked.reference, asked.draw)


if __name__ == "__main__":
    main()
