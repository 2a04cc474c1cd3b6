"""`export`: a trial's model as a Hugging Face checkpoint and recommender."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated

import typer

from depthprobe.cli.options import check_run
from depthprobe.errors import BadInput, check_writable


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A folder that sweep wrote.")],
    trial: Annotated[str, typer.Argument(metavar="TRIAL", help="A trial's name in RUN/trials.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
) -> None:
    """A trial's model as a Hugging Face checkpoint.

    What serves it is written beside it; `depthprobe recommend DIR` reads the folder.
    """
    check_run(run)
    known = sorted(path.name for path in (run / "trials").glob("*") if path.is_dir())
    if trial not in known:
        close = difflib.get_close_matches(trial, known, n=3, cutoff=0.3) or known[:3]
        raise BadInput("trial", trial, f"one of the {len(known)} of this run: {', '.join(close)}")
    if folder.is_dir() and any(folder.iterdir()):
        raise BadInput("dir", folder, "a new or empty folder")
    check_writable("dir", folder)

    from depthprobe.runs.export import export_trial

    print(export_trial(run, trial, folder))
