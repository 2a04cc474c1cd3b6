"""`status`: where a run is, from this machine or another, while it runs or after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from depthprobe.cli.options import check_run
from depthprobe.cli.tables import show_table

STATES = ("done", "failed", "working", "left")


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that sweep writes.")],
) -> None:
    """What of a run is done, what failed and why, who works on what, what is left."""
    check_run(run)

    from depthprobe.runs.status import status_of

    found = status_of(run)
    rows = [
        [method, *(counts[state] for state in STATES)] for method, counts in found.counts.items()
    ]
    rows.append(["all", *(found.total(state) for state in STATES)])
    show_table(["tasks of", *STATES], rows, words=["tasks of"], title=str(run))
    if found.working:
        lines = [[each.task, each.line, f"{each.seconds:.0f} s ago"] for each in found.working]
        show_table(["working on", "last said", ""], lines, words=["working on", "last said"])
    for task, reason in found.failed:
        print(f"failed: {task}: {reason}", file=sys.stderr)
    if found.failed:
        print("--retry-failed tries them again")
    if found.total("left") and not found.working:
        print("nobody works on it; the same sweep continues it")
