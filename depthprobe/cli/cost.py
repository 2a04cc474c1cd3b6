"""`cost`: parameters, FLOPs, time and memory by depth; the configuration alone is enough."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe.cli.options import check_backbone, check_revision, check_settings, number, whole
from depthprobe.cli.tables import cell, scaled, show_table
from depthprobe.errors import BadInput, check_writable

if TYPE_CHECKING:
    import pandas as pd

TUNINGS = {
    "full": "all weights of the blocks trained",
    "lora": "low-rank updates of the MLPs trained",
    "frozen": "the adapters alone trained",
}
FORMATS = (".csv", ".json")
BUSY = 0.5  # processes a core; this command's own start makes some
Row = dict[str, Any]


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
    price: Annotated[
        float | None,
        typer.Option(metavar="P", parser=number, help="Of an hour of the device, any currency."),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", parser=whole, help="Users in a batch (128).")
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

    A configuration is enough: no weights are downloaded. What fits this machine is measured, with
    random weights.
    """
    check_settings(layers=layers, device=device)
    check_backbone(backbone)
    check_revision(revision, backbone)
    if output is not None:
        if output.is_dir() or output.suffix not in FORMATS:
            raise BadInput("output", output, f"a file that ends in {' or '.join(FORMATS)}")
        check_writable("output", output.absolute().parent)
    settings: Row = {
        "batch": batch,
        "length": length,
        "items": items,
        "prompt": prompt,
        "dtype": dtype,
        "tuning": tuning,
        "seconds": seconds,
    }

    import sys

    from depthprobe.cli.progress import show_progress
    from depthprobe.cost.table import Workload, cost_table

    workload = Workload(**{name: value for name, value in settings.items() if value is not None})
    with show_progress(sys.stderr):
        table = cost_table(
            backbone, layers, device=device, revision=revision, workload=workload, price=price
        )
    show_costs(table)
    if output is not None:
        _write(output, table)


def _write(output: Path, table: pd.DataFrame) -> None:
    """Every number in full, a row a depth."""
    import pandas as pd

    from depthprobe.files import complete_file, write_json

    if output.suffix == ".csv":
        with complete_file(output) as temporary:
            table.to_csv(temporary, index=False)
        return
    rows = table.astype(object).to_dict(orient="records")
    strict = [
        {name: None if pd.isna(value) else value for name, value in row.items()} for row in rows
    ]
    write_json(output, {"rows": strict, "seconds": table.attrs["seconds"]})


def show_costs(table: pd.DataFrame) -> None:
    """Print what :func:`depthprobe.cost.table.cost_table` made, a small table for each question."""
    rows: list[Row] = table.to_dict(orient="records")  # type: ignore[assignment]
    first = rows[0]
    show_table(
        ["depth", "parameters", "in blocks", "weights", "optimiser", "FLOPs a user"],
        [
            [
                *(row[name] for name in ("depth", "parameters", "parameters_blocks")),
                *(scaled(row[name], "B") for name in ("bytes", "optimizer_bytes")),
                scaled(row["flops_user"], "FLOP"),
            ]
            for row in rows
        ],
    )
    if first["not_measured"]:
        print(f"\nNothing was measured on this machine: {first['not_measured']}.")
        return
    print(f"\nMeasured on {_place(first)}, with random weights of this shape;")
    print(f"torch {first['torch']}, transformers {first['transformers']}.")
    print(f"{_users(first)}; {TUNINGS[first['tuning']]}.")
    print("Medians of rounds in turn (their number is n), with 95 % intervals.")
    if first["busy"] > BUSY:
        print(f"Other work was running ({first['busy']:.1f} processes a core): times are too long.")
    batch = first["batch"]
    spread = ["95 %", "n", "times faster", "95 %"]
    show_table(
        ["depth", "ms", *spread],
        [[row["depth"], *_timed(row, "train_step")] for row in rows],
        title=f"A training step of {first['train_batch']} users",
    )
    show_table(
        ["depth", "ms", *spread],
        [[row["depth"], *_timed(row, "latency")] for row in rows],
        title="One user, from history to the best items",
    )
    hours = "GPU-hours" if first["device"] == "cuda" else "machine-hours"
    priced = first["money_per_billion"] is not None
    header = ["depth", "encode ms", "95 %", "score ms", "times faster", "users/s", hours]
    show_table(
        [*header, *(["money"] if priced else [])],
        [
            [
                row["depth"],
                *(row["encode_ms"], _interval(row, "encode_ms"), row["score_ms"]),
                *(_times(row["serving_times_faster"]), row["users_per_second"]),
                *(row["hours_per_billion"], row["money_per_billion"])[: 1 + priced],
            ]
            for row in rows
        ],
        title=f"{batch} users at once; {hours} of a billion requests",
    )
    kinds = [kind for kind in ("allocated", "reserved", "rss") if f"serving_{kind}_bytes" in table]
    tasks = ("serving", "training")
    if kinds:
        show_table(
            ["depth", *(f"{task}, {kind}" for task in tasks for kind in kinds)],
            [
                [row["depth"], *(scaled(row[f"{t}_{k}_bytes"], "B") for t in tasks for k in kinds)]
                for row in rows
            ],
            title="Peak memory" + (" (of the process)" if "rss" in kinds else ""),
        )


def _timed(row: Row, name: str) -> list[object]:
    """Milliseconds, interval, rounds; how many times faster, interval."""
    return [
        row[f"{name}_ms"],
        _interval(row, f"{name}_ms"),
        row[f"{name}_ms_n"],
        _times(row[f"{name}_times_faster"]),
        _interval(row, f"{name}_times_faster"),
    ]


def _interval(row: Row, name: str) -> str:
    low, high = cell(row[f"{name}_low"]), cell(row[f"{name}_high"])
    return "-" if low == "-" else f"{low} to {high}"


def _times(ratio: float) -> str:
    return "-" if ratio != ratio else f"{ratio:.3g}x"  # noqa: PLR0124 - NaN


def _place(row: Row) -> str:
    count = row["threads"]
    threads = f"{count} thread{'' if count == 1 else 's'}, " if row["device"] == "cpu" else ""
    return f"{row['device']} ({row['device_name']}), {threads}{row['dtype']}"


def _users(row: Row) -> str:
    prompt = f" behind {row['prompt']} shared slots of prompt" if row["prompt"] else ""
    return f"Histories of {row['length']} items{prompt}, {row['items']:,} items to choose from"
