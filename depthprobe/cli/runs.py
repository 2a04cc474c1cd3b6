"""`report`, `status` and `export`: what is made of a run, or read from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
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
    share,
    takes_flags,
)
from depthprobe.cli.terminal import echo, scaled, show_facts, show_table
from depthprobe.errors import BadInput, check_writable, closest, one_line, shell_line
from depthprobe.formatting import percent, plain_percent
from depthprobe.study import Study

if TYPE_CHECKING:
    from depthprobe.runs.store import Status

STATES = ("done", "failed", "working", "left")
BEST = "best"
FILES = {  # of an export, by name; the others are the tokenizer's
    "config.json": "the backbone's shape",
    "generation_config.json": "transformers' own",
    "model.safetensors": "the backbone's weights",
    "recommender.json": "items, titles, and how histories are read",
    "recommender.safetensors": "the recommender's weights: item table, adapters",
    "README.md": "the model card",
}
TOKENIZER = "the backbone's tokenizer or code"
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
    apply_flags(Study(), **flags)  # refuses what a study can't say

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
    if state.damaged:  # all has been shown, but for that
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


def export(
    run: Run,
    trial: Annotated[
        str,
        typer.Argument(
            metavar="TRIAL", help="A trial's name in RUN/trials, or best: the one to ship."
        ),
    ],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A new or empty folder.", parser=path)
    ],
    exit: Annotated[
        float | None,
        option("M", "Calibrate early exit of users, to lose at most 2% or 0.02.", parser=share),
    ] = None,
) -> None:
    """Export the model of a trial as a Hugging Face checkpoint.

    The folder also has what `depthprobe recommend DIR` needs.
    """
    known = sorted(path.name for path in (run / "trials").glob("*") if path.is_dir())
    if known and trial not in {*known, BEST}:
        close = closest(trial, known) or known[:3]
        raise BadInput(
            "trial", trial, f"{BEST}, or one of this run's {len(known)}, such as {', '.join(close)}"
        )
    check_writable("dir", folder)
    if exit is not None and not 0 <= exit < 1:
        raise BadInput("exit", exit, "a share from 0 to below 1, such as 2%")
    chosen = _recommended(run, known) if trial == BEST else trial

    from depthprobe.runs.export import export_trial

    written = export_trial(run, chosen, folder, exit_margin=exit)
    sizes = {file.name: file.stat().st_size for file in sorted(written.iterdir())}
    echo(f"{written}: {chosen}")
    show_facts(
        {
            name: f"{scaled(size, 'B'):>8}  {FILES.get(name, TOKENIZER)}"
            for name, size in sizes.items()
        }
    )
    card = json.loads((written / "recommender.json").read_text(encoding="utf-8"))
    if exit is not None:
        echo(f"\nearly exit: {_exit_words(card.get('exit'))}")
    echo(f"\nnext: {_next(written, card)}")


def _exit_words(rule: dict[str, Any] | None) -> str:
    """What was calibrated, and on whom."""
    if rule is None:
        return "none; on the validation users no rule was shown to lose no more than the margin"
    return (
        f"users leave once {rule['same']} of their 10 best items stay. The {rule['users']:,}"
        f" validation users keep {percent(rule['kept'])} of the {rule['metric']} with"
        f" {rule['depth']:.1f} blocks on average; at least {plain_percent(1 - rule['margin'])} with"
        f" confidence {plain_percent(rule['level'])}"
    )


def _recommended(run: Path, known: Sequence[str]) -> str:
    """The trial that the report's answer ships.

    Raises:
        BadInput: if it ships none; with the reason, and the trial of the best candidate.
    """
    from depthprobe.report.answer import build_answer

    answer = build_answer(run)
    if answer.trial:
        return answer.trial
    likely = [name for name in known if name.startswith(f"{answer.method}-d{answer.depth or 0:02}")]
    such = f", such as {likely[0]}" if likely else ""
    fault = f"the report recommends none ({answer.lines[0].rstrip('.')}); name one of RUN/trials"
    raise BadInput("TRIAL", BEST, f"{fault}{such}", fault=True)


def _next(folder: Path, card: dict[str, Any]) -> str:
    """A command that recommends to somebody who had two items of the catalogue."""
    items, own = card["item_ids"], card.get("own")
    blank = "\t" if any(len(item.split()) > 1 for item in items) else " "
    history = shell_line(["echo", blank.join(["you", *items[:2]])])
    command = ["depthprobe", "recommend", str(folder), "--history", "/dev/stdin"]
    by = ["--recommender", own["source"]] if own else []
    more = ["--exit"] if card.get("exit") else []
    return f"{history} | {shell_line([*command, *by, *more])}"
