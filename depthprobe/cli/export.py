"""`export`: write a trial's model to a folder, also as ONNX, or to the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from depthprobe.cli.options import VERDICT, apply_flags, option, path, share, takes_flags
from depthprobe.cli.runs import Run
from depthprobe.cli.terminal import echo, scaled, show_facts, show_table
from depthprobe.errors import BadInput, check_writable, closest, shell_line
from depthprobe.formatting import percent, plain_percent

BEST = "best"
FILES = {  # names of an export's files; the others are the tokenizer's
    "config.json": "the backbone's shape",
    "generation_config.json": "transformers' own",
    "model.safetensors": "the backbone's weights",
    "recommender.json": "items, titles, and how histories are read",
    "recommender.safetensors": "the recommender's weights: item table, adapters",
    "recommender.onnx": "the whole recommender in ONNX",
    "recommender.onnx.data": "its weights",
    "onnx.json": "how it compares with ours",
    "README.md": "the model card",
}
TOKENIZER = "the backbone's tokenizer or code"
SAVED = "written by your save"


@takes_flags({"margin": replace(VERDICT["margin"], help="The acceptable loss, for TRIAL best.")})
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
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="Write the whole recommender as an ONNX file too; compare its answers to all test"
            " users with ours, and time both.",
        ),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        option(
            "NAME",
            "Upload the folder to this model repository of the Hugging Face Hub, such as me/small."
            " A new one is private.",
        ),
    ] = None,
    **flags: Any,
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
    if flags["margin"] is not None and trial != BEST:
        raise BadInput("margin", flags["margin"], f"{BEST} as the trial: it decides which that is")
    chosen = _recommended(run, known, **flags) if trial == BEST else trial

    from depthprobe.runs.export import check_hub, export_trial
    from depthprobe.runs.export import push_to_hub as push

    if push_to_hub is not None:
        check_hub(push_to_hub)
    written = export_trial(run, chosen, folder, exit_margin=exit, onnx=onnx)
    card = json.loads((written / "recommender.json").read_text(encoding="utf-8"))
    other = SAVED if card.get("own") else TOKENIZER
    sizes = {file.name: file.stat().st_size for file in sorted(written.iterdir())}
    echo(f"{written}: {chosen}")
    show_facts(
        {name: f"{scaled(size, 'B'):>8}  {FILES.get(name, other)}" for name, size in sizes.items()}
    )
    if exit is not None:
        echo(f"\nearly exit: {_exit_words(card.get('exit'))}")
    if onnx:
        _show_onnx(json.loads((written / "onnx.json").read_text(encoding="utf-8")))
    if push_to_hub is not None:
        echo(f"\nuploading {scaled(sum(sizes.values()), 'B')}")
        url = push(written, push_to_hub)
        fetch = shell_line(["hf", "download", url.repo_id, "--local-dir", str(folder)])
        echo(f"{url}: a new repository is private\nelsewhere: {fetch}")
    echo(f"\nnext: {_next(written, card)}")


def _show_onnx(facts: dict[str, Any]) -> None:
    """Print whether the ONNX file gives the same answers, and how fast both are."""
    others, users = facts["test_users_in_another_order"], facts["test_users"]
    ties = f"; {others:,} in another order, of scores equal up to rounding" if others else ""
    echo(f"\nONNX: the same ten best items as ours for all {users:,} test users{ties}")
    rows = [
        [
            f"{one['users']:,}",
            f"{1000 * one['torch']:.3g} ms",
            f"{1000 * one['onnxruntime']:.3g} ms",
            f"{one['times_faster']:.2f}x",
        ]
        for one in facts["latencies"]
    ]
    show_table(["users at once", "PyTorch", "onnxruntime", "faster"], rows)
    machine, rounds = facts["machine"], facts["latencies"][0]["rounds"]
    where = f"{machine['device_name']}, threads: {machine['threads']}"
    echo(f"medians of {rounds} rounds in turn; {where}")


def _exit_words(rule: dict[str, Any] | None) -> str:
    """A sentence on how early exit was calibrated."""
    if rule is None:
        return "none; on the validation users no rule was shown to lose no more than the margin"
    return (
        f"users leave once {rule['same']} of their 10 best items stay. The {rule['users']:,}"
        f" validation users keep {percent(rule['kept'])} of the {rule['metric']} with"
        f" {rule['depth']:.1f} blocks on average; at least {plain_percent(1 - rule['margin'])} with"
        f" confidence {plain_percent(rule['level'])}"
    )


def _recommended(run: Path, known: Sequence[str], **flags: Any) -> str:
    """The trial that the report recommends; without one, ``BadInput`` names the best candidate."""
    from depthprobe.report.answer import build_answer
    from depthprobe.runs.store import open_run

    opened = open_run(run)
    opened.study = apply_flags(opened.study, **flags)
    answer = build_answer(opened)
    if answer.trial:
        return answer.trial
    likely = [name for name in known if name.startswith(f"{answer.method}-d{answer.depth or 0:02}")]
    such = f", such as {likely[0]}" if likely else ""
    fault = f"the report recommends none ({answer.lines[0].rstrip('.')}); name one of RUN/trials"
    raise BadInput("TRIAL", BEST, f"{fault}{such}", fault=True)


def _next(folder: Path, card: dict[str, Any]) -> str:
    """A command that recommends items to an example user with two items."""
    items, own = card["item_ids"], card.get("own")
    blank = "\t" if any(len(item.split()) > 1 for item in items) else " "
    history = shell_line(["echo", blank.join(["you", *items[:2]])])
    command = ["depthprobe", "recommend", str(folder), "--history", "/dev/stdin"]
    by = ["--recommender", own["source"]] if own else []
    more = ["--exit"] if card.get("exit") else []
    return f"{history} | {shell_line([*command, *by, *more])}"
