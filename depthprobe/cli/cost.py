"""`cost`: parameters, FLOPs, time and memory by depth; the configuration alone is enough."""

from __future__ import annotations

from typing import Annotated

import typer

from depthprobe.cli.options import check_backbone, check_settings
from depthprobe.cli.tables import show_frame


def cost(
    backbone: Annotated[
        str, typer.Option(metavar="B", help="A folder (config.json is enough), an id, or embedded.")
    ],
    layers: Annotated[
        str, typer.Option(metavar="DEPTHS", help="Depths: 1,2,4 or 1-12 or all or auto.")
    ] = "auto",
    device: Annotated[
        str, typer.Option(metavar="auto|cpu|cuda|mps", help="Where to measure.")
    ] = "auto",
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="The revision of a Hugging Face id.")
    ] = None,
) -> None:
    """Parameters, FLOPs, time, memory by depth.

    A configuration is enough: no weights are downloaded.
    """
    check_settings(layers=layers, device=device)
    check_backbone(backbone)

    from depthprobe.cost.curve import cost_table

    show_frame(cost_table(backbone, layers, device=device, revision=revision))
