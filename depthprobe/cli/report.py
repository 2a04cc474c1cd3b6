"""`report`: the HTML report, figures and tables of a run, or several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from depthprobe.cli.options import check_run
from depthprobe.errors import BadInput, check_writable


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that sweep wrote.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="The page [default: RUN/report.html, or comparison.html beside several runs].",
        ),
    ] = None,
) -> None:
    """The HTML report, figures, CSV, Markdown and LaTeX tables of a run; or runs side by side."""
    for run in runs:
        check_run(run)
    if output is not None:
        if output.is_dir():
            raise BadInput("output", output, "a file, not a folder")
        check_writable("output", output.absolute().parent)

    if len(runs) > 1:
        from depthprobe.report.comparison import build_comparison, default_output

        target = default_output(runs) if output is None else output
        check_writable("output", target.parent)
        print(build_comparison(runs, target))
        return

    from depthprobe.report.page import build_report
    from depthprobe.runs.store import open_run

    opened = open_run(runs[0])
    print(build_report(opened) if output is None else build_report(opened, output))
