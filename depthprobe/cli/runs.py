"""`report`, `status` and `export`: what is made of a run, or read from it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from depthprobe.cli.options import (
    VERDICT,
    apply_flags,
    check_output_file,
    option,
    path,
    takes_flags,
)
from depthprobe.cli.terminal import echo, show_table
from depthprobe.errors import BadInput, check_writable, closest, one_line
from depthprobe.study import Study

STATES = ("done", "failed", "working", "left")
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A folder that sweep wrote.", parser=path)]


@takes_flags(VERDICT)
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders that sweep wrote.", parser=path)
    ],
    output: Annotated[
        Path | None,
        option(
            "FILE",
            "The page [default: RUN/report.html; comparison.html beside several runs].",
            parser=path,
        ),
    ] = None,
    **flags: Any,
) -> None:
    """The HTML report, figures, CSV, Markdown and LaTeX tables of a run; or runs side by side.

    Margin, level and metric are the study's by default; with others all is computed again from the
    users' ranks.
    """
    check_output_file(output)
    apply_flags(Study(), **flags)  # refuses what a study can't say

    from depthprobe.runs.store import open_run

    opened = [open_run(run) for run in runs]
    for run in opened:
        run.study = apply_flags(run.study, **flags)
    if len(opened) > 1:
        from depthprobe.report.comparison import build_comparison

        echo(build_comparison(opened, output))
    else:
        from depthprobe.report.page import report_words

        echo(report_words(opened[0], output))


def status(run: Run) -> None:
    """What of a run is done, what failed and why, who works on what, what is left."""
    from depthprobe.runs.store import status_of

    state = status_of(run)
    rows = [[name, *(counts[each] for each in STATES)] for name, counts in state.counts.items()]
    rows.append(["all", *(state.total(each) for each in STATES)])
    show_table(["tasks of", *STATES], rows, words=["tasks of"], title=str(run))
    if state.working:
        header = ["working on", "last log line", ""]
        lines = [
            [each.task, one_line(each.line), f"{each.seconds:.0f} s ago"] for each in state.working
        ]
        show_table(header, lines, words=header[:2])
    for task, _ in state.damaged:
        echo(f"not readable: {task}")
    for task, reason in state.failed:
        echo(one_line(f"failed: {task}: {reason}"), sys.stderr)
    if state.failed:
        echo("--retry-failed tries them again")
    if state.total("left") and not state.working:
        echo("nobody works on it; the same sweep continues it")
    if state.damaged:  # all has been shown, but for that
        raise state.damaged[0][1]


def export(
    run: Run,
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's name in RUN/trials.")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new or empty folder.", parser=path)
    ],
) -> None:
    """A trial's model as a Hugging Face checkpoint.

    What serves it is written beside it; `depthprobe recommend DIR` reads the folder.
    """
    known = sorted(path.name for path in (run / "trials").glob("*") if path.is_dir())
    if known and trial not in known:
        close = closest(trial, known) or known[:3]
        raise BadInput("trial", trial, f"one of the {len(known)} of this run: {', '.join(close)}")
    check_writable("dir", folder)

    from depthprobe.runs.export import export_trial

    echo(export_trial(run, trial, folder))
