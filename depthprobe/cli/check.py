"""`check`: the self-tests that show whether an architecture can be cut safely."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from depthprobe.cli.options import check_output_file, function, option, path
from depthprobe.cli.terminal import echo, show_table
from depthprobe.errors import BadInput, one_line
from depthprobe.files import complete_file

if TYPE_CHECKING:
    from depthprobe.models.check import CheckResult


def check(
    backbone: Annotated[
        str | None, option("B", "A folder (config.json is enough), a Hugging Face id, or embedded.")
    ] = None,
    recommender: Annotated[
        str | None,
        option(
            "MODULE:FUNCTION",
            "A recommender of your own, to build and try.",
            parser=function,
        ),
    ] = None,
    revision: Annotated[str | None, option("REV", "The revision of a Hugging Face id.")] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Run the model's own code. From the Hub it needs --revision.",
        ),
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Check every decoder family of transformers (minutes).")
    ] = False,
    output: Annotated[Path, option("FILE", "Where --all writes its table.", parser=path)] = Path(
        "architectures.md"
    ),
) -> int:
    """Test whether an architecture, or a recommender of your own, can be cut safely.

    A backbone needs no weights. Exits with 1 if it can't be cut, or can't be a recommender's
    backbone.
    """
    if recommender is not None:
        if every or backbone is not None:
            raise BadInput("--recommender", recommender, "neither --backbone nor --all beside it")
        return _check_own(recommender)
    if every and backbone is None:
        return _check_all(output)
    if every or backbone is None:
        raise BadInput(
            "--backbone", backbone, "a folder, a Hugging Face id or embedded, or else --all"
        )

    from transformers.utils.logging import disable_progress_bar

    from depthprobe.models.check import can_be_cut, check_backbone

    disable_progress_bar()  # transformers prints one for each model that is reloaded
    results = check_backbone(backbone, revision=revision, trust_remote_code=trust_remote_code)
    _show(results, required=None)
    safe, usable = can_be_cut(results), any(r.name == "recommender" and r.passed for r in results)
    verdict = "can be cut" if safe else "can NOT be cut safely"
    if safe and not usable:
        verdict += ", but can NOT be a recommender's backbone"
    echo(f"\n{backbone}: {verdict}")
    return 0 if safe and usable else 1


def _check_own(source: str) -> int:
    from depthprobe.models.check import NOT_SEEN, check_own
    from depthprobe.models.own import load_own

    results = check_own(load_own(source), source)
    _show(results, required=True)
    safe = all(each.passed for each in results)
    echo(f"\n{source}: {'can be cut' if safe else 'can NOT be cut safely'}. {NOT_SEEN}")
    return 0 if safe else 1


def _show(results: Sequence[CheckResult], *, required: bool | None) -> None:
    """Print the table of results, including checks that are not required."""
    header, failures = ["check", "result", "detail"], {True: "FAILED", False: "no"}
    rows = [
        (
            each.name,
            "passed" if each.passed else failures[each.required if required is None else required],
            each.detail,
        )
        for each in results
    ]
    show_table(header, rows, words=header)


def _check_all(page: Path) -> int:
    check_output_file(page)

    from depthprobe.models.families import check_families, families, support_table

    names, checked = families(), []
    for family in check_families(names, jobs=os.cpu_count() or 1):
        checked.append(family)
        verdict = "can be cut" if family.can_be_cut else f"no: {one_line(family.reason)}"
        line = f"[{len(checked)}/{len(names)}] {family.name}  {verdict}"
        echo(line, sys.stderr)
    with complete_file(page) as temporary:
        temporary.write_text(support_table(checked), encoding="utf-8")
    echo(f"{sum(family.can_be_cut for family in checked)} of {len(checked)} families can be cut")
    echo(page)
    return 0
