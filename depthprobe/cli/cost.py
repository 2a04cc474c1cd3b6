"""`cost`: parameters, FLOPs, time and memory by depth; the configuration alone is enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe.cli.cost_views import show_costs, show_predicted
from depthprobe.cli.options import check_backbone, check_revision, check_settings, number, whole
from depthprobe.errors import BadInput, check_writable

if TYPE_CHECKING:
    import pandas as pd

USUAL_GPU = "H100-SXM"  # predicted where nothing can be measured and none was named
FORMATS = (".csv", ".json")


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
    gpu: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Predict for these GPUs: H100-SXM,L4.")
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(metavar="P", parser=number, help="Of an hour of the device, any currency."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", parser=whole, help="Users in a batch; else one is found."),
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="N", parser=whole, help="Items in a history (30).")
    ] = None,
    items: Annotated[
        int | None, typer.Option(metavar="N", parser=whole, help="Items in all (10,000).")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option(metavar="N", parser=whole, help="Slots before the items (0).")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="auto|float32|bfloat16|float16", help="Of the backbone.")
    ] = None,
    tuning: Annotated[
        str | None, typer.Option(metavar="full|lora|frozen", help="What of it a step trains.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(metavar="S", parser=number, help="To measure for (20); 0: nothing."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="All numbers: FILE.csv, or FILE.json.")
    ] = None,
) -> None:
    """Parameters, FLOPs, time, memory by depth.

    A configuration is enough: no weights are downloaded. What fits this machine is measured; for
    other GPUs, --gpu predicts.
    """
    check_settings(layers=layers, device=device)
    check_backbone(backbone)
    check_revision(revision, backbone)
    settings = {
        "batch": batch,
        "length": length,
        "items": items,
        "prompt": prompt,
        "dtype": dtype,
        "tuning": tuning,
        "seconds": seconds,
    }
    options = _options({k: v for k, v in settings.items() if v is not None}, price, gpu)
    _check_output(output)

    from depthprobe.cost.curve import cost_table

    where: dict[str, Any] = {"revision": revision, **options}
    # before anything is measured: it takes a moment, and may refuse
    predicted = _predict(backbone, layers, gpu, where)
    table = cost_table(backbone, layers, device=device, **where)
    show_costs(table)
    if gpu is None and _nothing_measured(table):
        predicted = _predict(backbone, layers, USUAL_GPU, where)
    for each in predicted:
        show_predicted(each, table)
    if output is not None:
        _write(output, table, predicted)


def _predict(
    backbone: str, layers: str, gpus: str | None, where: dict[str, Any]
) -> list[pd.DataFrame]:
    if gpus is None:
        return []
    from depthprobe.cost.curve import predicted_tables

    return predicted_tables(backbone, layers, gpus=gpus, **where)


def _options(settings: dict[str, Any], price: float | None, gpu: str | None) -> dict[str, Any]:
    """Keyword arguments of the tables that differ from the defaults, all checked without torch."""
    from depthprobe.cost.gpus import find_gpu
    from depthprobe.cost.serving import check_price
    from depthprobe.cost.workload import Workload

    check_price(price)
    for name in gpu.split(",") if gpu is not None else ():
        find_gpu(name.strip())
    options: dict[str, Any] = {"workload": Workload(**settings)} if settings else {}
    return options if price is None else {**options, "price": price}


def _nothing_measured(table: pd.DataFrame) -> bool:
    return "not_measured" in table and bool(table["not_measured"].notna().all())


def _check_output(output: Path | None) -> None:
    if output is None:
        return
    if output.is_dir() or output.suffix not in FORMATS:
        raise BadInput("output", output, f"a file that ends in {' or '.join(FORMATS)}")
    check_writable("output", output.absolute().parent)


def _write(output: Path, table: pd.DataFrame, predicted: list[pd.DataFrame]) -> None:
    """Every number in full: a row a depth, measured here or predicted for a GPU."""
    import pandas as pd

    from depthprobe.files import complete_file, write_json

    frames = (table, *predicted)
    # frame by frame, since a column that others lack would turn their counts into fractions
    rows = [row for frame in frames for row in frame.astype(object).to_dict(orient="records")]
    if output.suffix == ".csv":
        with complete_file(output) as temporary:
            pd.DataFrame(rows, dtype=object).to_csv(temporary, index=False)
        return
    strict = [
        {name: None if pd.isna(value) else value for name, value in row.items()} for row in rows
    ]
    write_json(output, {"rows": strict, "seconds": table.attrs["seconds"]})
