"""How `cost` shows its columns: a small table for each question, units and conditions in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from depthprobe.cli.tables import cell, scaled, show_frame, show_table

if TYPE_CHECKING:
    import pandas as pd

TUNINGS = {
    "full": "all weights of the blocks trained",
    "lora": "low-rank updates of the MLPs trained",
    "frozen": "the adapters alone trained",
}
ROOFED = {"train_step": "step", "answer": "answer", "answer_one": "answer, 1 user"}
BUSY = 0.5  # processes a core; this command's own start makes some
Row = dict[str, Any]


def show_costs(table: pd.DataFrame) -> None:
    """Print what :func:`depthprobe.cost.curve.cost_table` made."""
    if "answer_ms" not in table:
        show_frame(table)
        return
    rows: list[Row] = table.to_dict(orient="records")  # type: ignore[assignment]
    first = rows[0]
    show_table(
        ["depth", "parameters", "in blocks", "weights", "a user"],
        [_sizes(row) for row in rows],
    )
    if first["not_measured"]:
        print(f"\nNothing was measured on this machine: {first['not_measured']}.")
        return
    print(f"\nMeasured on {_place(first)}, with random weights of this shape;")
    print(f"torch {first['torch']}, transformers {first['transformers']}.")
    print(f"{_users(first)}; {TUNINGS[first['tuning']]}.")
    print(f"Medians of {first['answer_ms_n']} rounds in turn, with 95 % intervals.")
    if first["busy"] > BUSY:
        print(f"Other work was running ({first['busy']:.1f} processes a core): times are too long.")
    _show_times(rows)
    _show_memory(rows)
    _show_roofline(rows)


def show_predicted(table: pd.DataFrame, beside: pd.DataFrame) -> None:
    """Print what :func:`depthprobe.cost.curve.predicted_tables` made for one GPU.

    Args:
        beside: what was measured here, by which the method can be judged.
    """
    rows: list[Row] = table.to_dict(orient="records")  # type: ignore[assignment]
    first = rows[0]
    batch = first["batch"]
    print(
        f"\nPREDICTED for one {first['predicted_on']} in {first['dtype']}; nothing was run there."
    )
    print("The roofline of its datasheet: no measurement, but the least that it can take.")
    ratios = [
        row[f"{phase}_ms"] / row[f"predicted_{phase}_ms"]
        for row in beside.to_dict(orient="records")
        for phase in ROOFED
        if row[f"{phase}_ms"] > 0  # and not NaN, where nothing was measured
    ]
    if ratios:
        spread = f"{min(ratios):.2g} to {max(ratios):.2g}"
        print(f"Measured here: {spread} times what this method predicts.")
    header = ["depth", "step ms", "times faster", "answer ms", "times faster", "one user ms"]
    show_table(
        [*header, "times faster"],
        [_predicted_times(row) for row in rows],
        title=f"Predicted: a training step of {batch} users, an answer to {batch} and to one",
    )
    priced = first["predicted_money_per_billion"] is not None
    header = ["depth", "users/s", "GPU-hours", *(["money"] if priced else [])]
    show_table(
        [*header, "serving", "training", "fits"],
        [_predicted_serving(row, priced) for row in rows],
        words=("fits",),
        title="Predicted: a billion requests, and memory",
    )


def _predicted_times(row: Row) -> list[object]:
    found: list[object] = [row["depth"]]
    for phase in ROOFED:
        found += [row[f"predicted_{phase}_ms"], _times(row[f"predicted_{phase}_times_faster"])]
    return found


def _predicted_serving(row: Row, priced: bool) -> list[object]:
    named = {name.removeprefix("predicted_"): value for name, value in row.items()}
    memory = [_bytes(row[f"predicted_{task}_bytes"]) for task in ("serving", "training")]
    return [row["depth"], *_served(named, priced), *memory, row["predicted_fits"]]


def _show_times(rows: list[Row]) -> None:
    batch = rows[0]["batch"]
    spread = ["95 %", "p90", "times faster", "95 %"]
    show_table(
        ["depth", "ms", *spread],
        [[row["depth"], row["train_step_ms"], *_spread(row, "train_step")] for row in rows],
        title=f"A training step of {batch} users",
    )
    show_table(
        ["depth", "encode ms", "score ms", "both ms", *spread],
        [[row["depth"], *_answer(row, "")] for row in rows],
        title=f"An answer to {batch} users at once",
    )
    show_table(
        ["depth", "encode ms", "score ms", "both ms", *spread],
        [[row["depth"], *_answer(row, "_one")] for row in rows],
        title="An answer to one user",
    )
    hours = "GPU-hours" if rows[0]["device"] == "cuda" else "machine-hours"
    priced = rows[0]["money_per_billion"] is not None
    show_table(
        ["depth", "users/s", hours, *(["money"] if priced else [])],
        [[row["depth"], *_served(row, priced)] for row in rows],
        title=f"A billion requests, {batch} at once",
    )


def _answer(row: Row, mark: str) -> list[object]:
    parts = [row[f"{phase}{mark}_ms"] for phase in ("encode", "score", "answer")]
    return [*parts, *_spread(row, f"answer{mark}")]


def _served(row: Row, priced: bool) -> list[object]:
    found = [row["users_per_second"], row["hours_per_billion"]]
    return [*found, row["money_per_billion"]] if priced else found


def _show_memory(rows: list[Row]) -> None:
    kinds = [
        kind for kind in ("allocated", "reserved", "rss") if f"serving_{kind}_bytes" in rows[0]
    ]
    tasks = ("serving", "training")
    header = ["depth", *(f"{task}, {kind}" for task in tasks for kind in kinds)]
    found = [
        [row["depth"], *(_bytes(row[f"{t}_{k}_bytes"]) for t in tasks for k in kinds)]
        for row in rows
    ]
    measured = rows[0]["energy"] == "measured"
    if measured:
        header += [f"{task}, J a user" for task in tasks]
        for values, row in zip(found, rows, strict=True):
            values += [cell(row[f"{task}_joules_per_user"]) for task in tasks]
    whole = " (of the whole process)" if "rss" in kinds else ""
    show_table(header, found, title=f"Peak memory{whole}" + (" and energy" if measured else ""))
    if not measured:
        print(f"\nEnergy: {rows[0]['energy']}.")


def _show_roofline(rows: list[Row]) -> None:
    """Predictions beside what was measured: how far to trust those for another device."""
    header = ["depth"]
    for name in ROOFED.values():
        header += [f"{name}: predicted ms", "measured is"]
    found = []
    for row in rows:
        values: list[object] = [row["depth"]]
        for phase in ROOFED:
            predicted = row[f"predicted_{phase}_ms"]
            values += [predicted, _times(row[f"{phase}_ms"] / predicted)]
        found.append(values)
    show_table(header, found, title=f"PREDICTED by a roofline of this device ({rows[0]['roof']})")


def _sizes(row: Row) -> list[object]:
    weights, flops = _bytes(row["bytes"]), scaled(row["flops_user"], "FLOP")
    return [row["depth"], row["parameters"], row["parameters_blocks"], weights, flops]


def _spread(row: Row, phase: str) -> list[object]:
    """Interval, p90, how many times faster, interval."""
    return [
        _interval(row, f"{phase}_ms"),
        row[f"{phase}_ms_p90"],
        _times(row[f"{phase}_times_faster"]),
        _interval(row, f"{phase}_times_faster"),
    ]


def _interval(row: Row, name: str) -> str:
    return f"{cell(row[f'{name}_low'])} to {cell(row[f'{name}_high'])}"


def _times(ratio: float) -> str:
    return f"{ratio:.3g}x"


def _bytes(count: float) -> str:
    return scaled(count, "B")


def _place(row: Row) -> str:
    count = row["threads"]
    plural = "" if count == 1 else "s"
    threads = f"{count} thread{plural}, " if row["device"] == "cpu" else ""
    return f"{row['device']} ({row['device_name']}), {threads}{row['dtype']}"


def _users(row: Row) -> str:
    prompt = f" behind {row['prompt']} shared slots of prompt" if row["prompt"] else ""
    return f"Histories of {row['length']} items{prompt}, {row['items']:,} items to choose from"
