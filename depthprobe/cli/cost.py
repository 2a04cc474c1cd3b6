"""`cost`: parameters, FLOPs, time and memory by depth, from a configuration alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from depthprobe.cli.options import AS_JSON, check_revision, number, option, path, whole
from depthprobe.cli.terminal import cell, echo, scaled, show_progress, show_table
from depthprobe.errors import BadInput, check_writable
from depthprobe.formatting import rounded
from depthprobe.study import Study, override

if TYPE_CHECKING:
    import pandas as pd

TUNINGS = {
    "full": "all weights of the blocks trained",
    "lora": "low-rank updates of the MLPs trained",
    "frozen": "the adapters alone trained",
}
FORMATS = (".csv", ".json")
BUSY = 0.5  # running processes per core; starting this command adds some
Row = dict[str, Any]


def cost(
    backbone: Annotated[
        str, option("B", "A folder (config.json is enough), a Hugging Face id, or embedded.")
    ],
    layers: Annotated[str, option("DEPTHS", "Depths: 1,2,4 or 1-12 or all or auto.")] = "auto",
    device: Annotated[str, option("auto|cpu|cuda|mps", "Where to measure.")] = "auto",
    revision: Annotated[str | None, option("REV", "The revision of a Hugging Face id.")] = None,
    price: Annotated[
        float | None, option("P", "Price of an hour of the device.", parser=number)
    ] = None,
    batch: Annotated[
        int | None, option("N", "Users in a batch [default: 128].", parser=whole)
    ] = None,
    length: Annotated[
        int | None, option("N", "Items in a history [default: 30].", parser=whole)
    ] = None,
    items: Annotated[
        int | None, option("N", "Items in the catalogue [default: 10,000].", parser=whole)
    ] = None,
    prompt: Annotated[
        int | None, option("N", "Prompt slots before the items [default: 0].", parser=whole)
    ] = None,
    dtype: Annotated[
        str | None, option("auto|float32|bfloat16|float16", "Dtype of the weights.")
    ] = None,
    tuning: Annotated[
        str | None, option("full|lora|frozen", "Which weights a training step updates.")
    ] = None,
    seconds: Annotated[
        float | None,
        option("S", "Seconds to measure for [default: 20]; 0: don't measure.", parser=number),
    ] = None,
    output: Annotated[
        Path | None, option("FILE", "Write all numbers to FILE.csv or FILE.json.", parser=path)
    ] = None,
    as_json: AS_JSON = False,
) -> None:
    """Estimate parameters, FLOPs, time and memory by depth.

    A configuration is enough: no weights are downloaded. What fits this machine is measured, with
    random weights.
    """
    override(Study(), layers=layers, device=device)  # refuses settings that a study would refuse
    check_revision(revision, backbone)
    if output is not None:
        if output.is_dir() or output.suffix not in FORMATS:
            raise BadInput("output", output, f"a file that ends in {' or '.join(FORMATS)}")
        check_writable("output", output.parent)
    import sys

    from depthprobe.cost.table import Workload, cost_table

    sizes = {"batch": batch, "length": length, "items": items, "prompt": prompt}
    settings: Row = {**sizes, "dtype": dtype, "tuning": tuning, "seconds": seconds}
    workload = Workload(**{name: value for name, value in settings.items() if value is not None})
    with show_progress(sys.stderr):
        table = cost_table(
            backbone, layers, device=device, revision=revision, workload=workload, price=price
        )
    if as_json:
        echo(json.dumps(_strict(table), indent=1, allow_nan=False))
    else:
        show_costs(table)
    if output is not None:
        _write(output, table)


def _write(output: Path, table: pd.DataFrame) -> None:
    """Write all digits of every number, one row per depth."""
    from depthprobe.files import complete_file, write_json

    if output.suffix == ".csv":
        with complete_file(output) as temporary:
            table.to_csv(temporary, index=False)
        return
    write_json(output, _strict(table))


def _strict(table: pd.DataFrame) -> Row:
    """The numbers for JSON, with the raw seconds; null for what was not measured."""
    import pandas as pd

    rows = table.astype(object).to_dict(orient="records")
    strict = [
        {name: None if pd.isna(value) else value for name, value in row.items()} for row in rows
    ]
    return {"schema": 1, "rows": strict, "seconds": table.attrs["seconds"]}


def show_costs(table: pd.DataFrame) -> None:
    """Print a result of :func:`depthprobe.cost.table.cost_table`, one small table per question."""
    rows: list[Row] = table.to_dict(orient="records")  # type: ignore[assignment]
    first = rows[0]
    header = ["depth", "parameters", "in blocks", "weights", "optimiser", "FLOPs a user"]
    columns = ("depth", "parameters", "parameters_blocks", "bytes", "optimizer_bytes", "flops_user")
    units = ("", "", "", "B", "B", "FLOP")
    show_table(header, [_cells(row, columns, units) for row in rows])
    if first["not_measured"]:
        echo(f"\nNothing was measured on this machine: {first['not_measured']}.")
        return
    threads = f"{first['threads']} thread{'' if first['threads'] == 1 else 's'}, "
    place = f"{first['device_name']}), {threads if first['device'] == 'cpu' else ''}"
    prompt = f" behind {first['prompt']} shared slots of prompt" if first["prompt"] else ""
    echo(f"\nMeasured on {first['device']} ({place}{first['dtype']}, with random weights of this")
    echo(f"shape; torch {first['torch']}, transformers {first['transformers']}.")
    echo(f"Histories of {first['length']} items{prompt}, {first['items']:,} items to choose from;")
    echo(f"{TUNINGS[first['tuning']]}.")
    echo("Medians of n rounds in turn, with 95 % intervals.")
    if first["busy"] > BUSY:
        echo(f"Other work was running ({first['busy']:.1f} processes a core): times are too long.")
    for name, title in (
        ("train_step", f"A training step of {first['batch']} users"),
        ("latency", "One user, from history to the best items"),
    ):
        header = ["depth", "ms", "95 %", "n", "times faster", "95 %"]
        show_table(header, [_timed(row, name) for row in rows], title=title)
    hours = "GPU-hours" if first["device"] == "cuda" else "machine-hours"
    header = ["depth", "encode ms", "95 %", "score ms", "times faster", "users/s", hours]
    served = [
        [
            *(row["depth"], row["encode_ms"], _interval(row, "encode_ms"), row["score_ms"]),
            *(_times(row["serving_times_faster"]), row["users_per_second"]),
            *(row["hours_per_billion"], row["money_per_billion"]),
        ]
        for row in rows
    ]
    if first["money_per_billion"] is None:
        served = [cells[:-1] for cells in served]
    else:
        header.append("money")
    show_table(
        header, served, title=f"{first['batch']} users at once; {hours} of a billion requests"
    )
    tasks = ("serving_", "training_")
    if peaks := [name for name in first if name.startswith(tasks) and name.endswith("_bytes")]:
        header = ["depth", *(name.removesuffix("_bytes").replace("_", ", ") for name in peaks)]
        cells = [_cells(row, ("depth", *peaks), ("", *["B"] * len(peaks))) for row in rows]
        process = "" if first["device"] == "cuda" else " (of the process)"
        show_table(header, cells, title=f"Peak memory{process}")


def _cells(row: Row, columns: Sequence[str], units: Sequence[str]) -> list[object]:
    """The cells of a row: plain counts as they are, the rest with a unit such as M or GB."""
    pairs = zip(columns, units, strict=True)
    return [scaled(row[name], unit) if unit else row[name] for name, unit in pairs]


def _timed(row: Row, name: str) -> list[object]:
    ratio = f"{name}_times_faster"
    own = [row["depth"], row[f"{name}_ms"], _interval(row, f"{name}_ms"), row[f"{name}_ms_n"]]
    return [*own, _times(row[ratio]), _interval(row, ratio)]


def _interval(row: Row, name: str) -> str:
    low, high = cell(row[f"{name}_low"]), cell(row[f"{name}_high"])
    return "-" if low == "-" else f"{low} to {high}"


def _times(ratio: float) -> str:
    return "-" if math.isnan(ratio) else f"{rounded(ratio)}x"
