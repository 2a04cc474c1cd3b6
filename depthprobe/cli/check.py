"""`check`: can this architecture be cut safely? The self-tests, one line each."""

from __future__ import annotations

from typing import Annotated

import typer

from depthprobe.cli.options import check_backbone as refuse_unusable


def check(
    backbone: Annotated[
        str, typer.Option(metavar="B", help="A folder, a Hugging Face id, or embedded.")
    ],
) -> int:
    """Self-test: can this architecture be cut safely?

    The exit code is 1 if not.
    """
    refuse_unusable(backbone)

    from depthprobe.models.check import check_backbone

    results = check_backbone(backbone)
    for result in results:
        print(f"{'passed' if result.passed else 'FAILED'}  {result.name}: {result.detail}")
    return 0 if all(result.passed for result in results) else 1
