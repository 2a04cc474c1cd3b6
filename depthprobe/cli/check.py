"""`check`: can this architecture be cut safely? The self-tests, one line each."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from depthprobe.cli.options import check_backbone as refuse_unusable
from depthprobe.cli.tables import show_table
from depthprobe.errors import BadInput, check_writable
from depthprobe.files import complete_file

PAGE = "architectures.md"


def check(
    backbone: Annotated[
        str | None,
        typer.Option(metavar="B", help="A folder (config.json is enough), an id, or embedded."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="The revision of a Hugging Face id.")
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Run the model's own code; an id's needs --revision."
        ),
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every decoder family of transformers, in minutes.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"Where --all writes its table [default: {PAGE}]."),
    ] = None,
) -> int:
    """Self-test: can this architecture be cut safely?

    Needs no weights. The exit code is 1 if not.
    """
    if every:
        if backbone is not None:
            raise BadInput("backbone", backbone, "not together with --all")
        return _all(output or Path(PAGE))
    if backbone is None:
        raise BadInput("backbone", None, "a folder, a Hugging Face id, embedded, or --all")
    if output is not None:
        raise BadInput("output", output, "with --all alone")
    refuse_unusable(backbone)

    from depthprobe.models.check import can_be_cut, check_backbone

    results = check_backbone(backbone, revision=revision, trust_remote_code=trust_remote_code)
    marks = {(True, True): "passed", (True, False): "passed", (False, True): "FAILED"}
    show_table(
        ["check", "result", "what was found"],
        [(r.name, marks.get((r.passed, r.required), "no"), r.detail) for r in results],
        words=["check", "result", "what was found"],
    )
    safe = can_be_cut(results)
    print(f"\n{backbone}: {'can be cut' if safe else 'can NOT be cut safely'}")
    return 0 if safe else 1


def _all(page: Path) -> int:
    if page.is_dir():
        raise BadInput("output", page, "a file")
    check_writable("output", page.parent)

    from depthprobe.models.families import check_families, families, support_table

    names = families()
    found = []
    for family in check_families(names, jobs=os.cpu_count() or 1):
        found.append(family)
        verdict = "can be cut" if family.can_be_cut else f"no: {' '.join(family.reason.split())}"
        print(f"[{len(found)}/{len(names)}] {family.name}  {verdict}", file=sys.stderr, flush=True)
    with complete_file(page) as temporary:
        temporary.write_text(support_table(found), encoding="utf-8")
    print(f"{sum(family.can_be_cut for family in found)} of {len(found)} families can be cut")
    print(page)
    return 0
