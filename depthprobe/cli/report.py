"""`report`: the HTML report, figures and tables of a run, made again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from depthprobe.cli.options import check_run
from depthprobe.study import BadInput, check_writable


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that sweep wrote.")],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page [default: RUN/report.html].")
    ] = None,
) -> None:
    """The HTML report, figures, CSV and LaTeX tables of a run."""
    check_run(run)
    if output is not None:
        if output.is_dir():
            raise BadInput("output", output, "a file, not a folder")
        check_writable("output", output.absolute().parent)

    from depthprobe.report.html import build_report
    from depthprobe.sweep.store import open_run

    opened = open_run(run)
    print(build_report(opened) if output is None else build_report(opened, output))
