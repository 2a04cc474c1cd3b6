"""The trials of some runs as one table: what each is, what it costs, its test metrics.

    python analyses/gpu/collect.py OUTPUT.csv RUN...

The runs may be at work: what has no record yet is missing.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from depthprobe.files import complete_file
from depthprobe.runs.records import FULL
from depthprobe.runs.store import open_run


def main() -> None:
    frames = []
    for run in map(open_run, sys.argv[2:]):
        metrics = {each.id: each.metrics["test"][FULL] for each in run.records if each.done}
        if metrics:
            trials = run.trials.set_index("trial")
            frames.append(trials.join(pd.DataFrame(metrics).T).assign(run=run.path.name))
    if frames:
        with complete_file(Path(sys.argv[1])) as temporary:
            pd.concat(frames).to_csv(temporary)


if __name__ == "__main__":
    main()
