"""Direct contrasts of two methods at the same depth, paired by user and seed.

    python analyses/contrasts.py runs/RUN distill:scores,distill:states finetune
    python analyses/contrasts.py runs/ONE runs/TWO finetune random-init --slices --csv some.csv
    python analyses/contrasts.py --csv some.csv --draw some.png

Each method of the first list against the one after it: the share that it has of that one's mean,
and whether it is superior or inferior at all, at a level that the methods of one line share. That
is said only if the share's 95 % interval leaves out 100 % too.
``full`` stands for ``finetune`` at full depth. With ``--slices`` each group of test users apart.

``--csv`` keeps what was found: a contrast takes the place of an earlier one between the same arms
of a run of the same name, and the table and the picture are of all that the file holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

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
    users: int
    method: str
    reference: str
    share: float
    low: float
    high: float
    shown: str  # "superior", "inferior" or nothing

    @property
    def place(self) -> tuple[str, int, str, str, str]:
        """What is compared, where: one row of a file."""
        return self.run, self.depth, self.group, self.method, self.reference

    @property
    def text(self) -> str:
        """``99.5 % [96.2, 102.8] superior``."""
        return f"{in_percent(Interval(self.share, self.low, self.high))} {self.shown}".rstrip()


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
                shown = next((v for v in ("superior", "inferior") if each.shows(v)), "")
                # non-inferiority at no margin is superiority, one-sided; a difference is two-sided
                one_sided = shown == "inferior" and 2 * each.p_values[shown] > each.tested_at
                share = (each.share.value, each.share.low, each.share.high)
                # of two seeds the test can be surer than the interval: both have to agree
                if one_sided or share[1] <= 1 <= share[2] or len(base) == 1:
                    shown = ""  # one seed says nothing of other trainings
                of = (run.path.name, depth, name, int(users.sum()), method, reference)
                yield Contrast(*of, *share, shown)


def joined(path: Path, found: list[Contrast]) -> list[Contrast]:
    """The contrasts of a file, which is made if there is none, with those found in their places."""
    known: list[Contrast] = []
    if path.exists():
        rows = pd.read_csv(path, keep_default_na=False).to_dict("records")
        known = [Contrast(**{str(key): value for key, value in row.items()}) for row in rows]
    every = {each.place: each for each in (*known, *found)}
    pd.DataFrame(every.values()).to_csv(path, index=False, float_format="%.7f")
    return list(every.values())


def table(found: list[Contrast]) -> str:
    """A line a run, depth and group; a column a method."""
    methods = list(dict.fromkeys(each.method for each in found))
    lines = [
        f"| run | blocks | users | {' | '.join(methods)} | of |",
        f"|---|---|---|{'---|' * len(methods)}---|",
    ]
    lined: dict[tuple[object, ...], dict[str, str]] = {}
    for each in found:
        line = each.run, each.depth, f"{each.group} ({each.users:,})", each.reference
        lined.setdefault(line, {})[each.method] = each.text
    for (*place, reference), texts in lined.items():
        cells = [*map(str, place), *(texts.get(method, "") for method in methods), reference]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(found: list[Contrast], path: Path) -> None:
    """Every share with its interval, in a row of its own; a panel a run and reference."""
    panelled: dict[tuple[str, str], list[Contrast]] = {}
    for each in found:
        panelled.setdefault((each.run, each.reference), []).append(each)
    most = max(map(len, panelled.values()))
    lines = -(-len(panelled) // 3)
    columns = -(-len(panelled) // lines)
    figure, panels = plt.subplots(
        lines, columns, figsize=(3 + 3.2 * columns, lines * (1.2 + 0.25 * most)), sharex=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    groups = len({each.group for each in found}) > 1
    for panel in panels.flat[len(panelled) :]:
        panel.set_visible(False)
    for panel, ((run, reference), own) in zip(panels.flat, panelled.items(), strict=False):
        for row, each in enumerate(own):
            colour = {"superior": "#1b7f4d", "inferior": "#b3402e"}.get(each.shown, "#555555")
            panel.plot([100 * each.low, 100 * each.high], [row, row], color=colour, lw=1.5)
            panel.plot(100 * each.share, row, "o", color=colour, ms=5)
        names = [
            f"{each.method} at {each.depth}"
            + (f", {each.group} ({each.users:,})" if groups else "")
            for each in own
        ]
        panel.set_yticks(range(len(own)), names, fontsize=8)
        panel.invert_yaxis()
        panel.tick_params(axis="x", labelbottom=True, labelsize=8)
        panel.axvline(100, color="black", lw=0.8)
        panel.set_title(run, fontsize=9)
        panel.set_xlabel(f"% of {reference} at the same depth", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", help="runs, methods with commas between, reference")
    parser.add_argument("--slices", action="store_true")
    parser.add_argument("--csv", type=Path, help="a file of contrasts to add to")
    parser.add_argument("--draw", type=Path, help="a PNG of the shares and their intervals")
    asked = parser.parse_args()
    found: list[Contrast] = []
    if len(asked.runs) > 2:
        *runs, methods, reference = asked.runs
        for path in runs:
            run = open_run(Path(path))
            found += contrasts(run, methods.split(","), reference, slices=asked.slices)
    elif asked.runs or not asked.csv:
        parser.error("expected runs, methods and a reference; or --csv alone")
    if asked.csv:
        found = joined(asked.csv, found)
    print(table(found))
    if asked.draw:
        draw(found, asked.draw)


if __name__ == "__main__":
    main()
