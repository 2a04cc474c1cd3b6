"""`report` and `status`: write the report of a run, show its progress."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe.cli.options import (
    AS_JSON,
    VERDICT,
    apply_flags,
    check_output_file,
    option,
    path,
    takes_flags,
)
from depthprobe.cli.terminal import echo, show_table
from depthprobe.errors import BadInput, one_line
from depthprobe.study import Study

if TYPE_CHECKING:
    from depthprobe.runs.store import Status

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
    as_json: AS_JSON = False,
    **flags: Any,
) -> None:
    """Write the report of a run, or of several side by side.

    An HTML page, result.json, figures, and CSV, Markdown and LaTeX tables. Another margin, level
    or metric than the study's is computed from the users' ranks; nothing is trained again.
    """
    check_output_file(output)
    if as_json and len(runs) > 1:
        raise BadInput("--json", len(runs), "one run")
    apply_flags(Study(), **flags)  # refuses settings that a study would refuse

    from depthprobe.runs.store import open_run

    opened = [open_run(run) for run in runs]
    for run in opened:
        run.study = apply_flags(run.study, **flags)
    if len(opened) > 1:
        from depthprobe.report.comparison import build_comparison

        echo(build_comparison(opened, output))
    elif as_json:
        from depthprobe.report.page import build_report, folder_of

        folder = runs[0] if output is None else folder_of(output)
        if folder is None:
            raise BadInput("output", output, "a file beside --json, not a device")
        build_report(opened[0], output)
        echo((folder / "result.json").read_text(encoding="utf-8").rstrip())
    else:
        from depthprobe.report.page import report_words

        echo(report_words(opened[0], output))


def status(run: Run, *, as_json: AS_JSON = False) -> None:
    """Show what is done, failed, running and left in a run."""
    from depthprobe.runs.store import status_of

    state = status_of(run)
    if as_json:
        states = (*STATES, "damaged")
        tasks = {
            name: {each: count[each] for each in states} for name, count in state.counts.items()
        }
        content = {
            "schema": 1,
            "run": str(run),
            "tasks": tasks,
            "all": {each: state.total(each) for each in states},
            "working": [asdict(each) for each in state.working],
            "failed": [{"task": task, "reason": reason} for task, reason in state.failed],
            "search": state.search and state.search.words,
            "damaged": [{"task": task, "reason": str(why)} for task, why in state.damaged],
        }
        echo(json.dumps(content, indent=1, allow_nan=False))
    else:
        _show_status(run, state)
    if state.damaged:  # the rest has been shown
        raise state.damaged[0][1]


def _show_status(run: Path, state: Status) -> None:
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
        echo("sweep --retry-failed runs them again")
    if state.search:
        echo(f"a search, which trains few of those left; {state.search.words}")
    ended = state.search and state.search.ended
    if state.total("left") and not state.working and not ended:
        echo("no sweep is running; run the same command to continue")
