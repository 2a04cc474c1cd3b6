"""`data prepare|show|list`: readers and statistics of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from depthprobe.cli.options import check_data, check_writable
from depthprobe.cli.tables import cell

if TYPE_CHECKING:
    from depthprobe.data.storage import Sequences

app = typer.Typer(help="Readers, filters, statistics of a dataset.", rich_markup_mode=None)

Source = Annotated[
    str, typer.Argument(metavar="D", help="An interaction log, a prepared folder, or embedded.")
]


@app.command()
def prepare(
    source: Source,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The dataset's name.")] = None,
) -> None:
    """Sort a log into sequences and write them as a memory-mapped folder."""
    check_data(source)
    check_writable("output", output)

    from depthprobe.data.prepared import prepare_data

    describe(prepare_data(source, output, name=name))
    print(output)


@app.command()
def show(source: Source) -> None:
    """The statistics of a dataset, and what to know before trusting it."""
    check_data(source)

    from depthprobe.data.prepared import prepare_data

    describe(prepare_data(source))


@app.command("list")
def list_formats() -> None:
    """The formats that a log may have."""
    from depthprobe.data.readers import FORMATS

    width = max(map(len, FORMATS))
    for name, reader in FORMATS.items():
        first = (reader.__doc__ or "").strip().partition("\n")[0]
        print(f"{name:{width}}  {first}".rstrip())


def describe(sequences: Sequences) -> None:
    """Print a dataset's sizes, statistics and warnings, one a line."""
    rows: dict[str, object] = {
        "name": sequences.name,
        "users": sequences.n_users,
        "items": sequences.n_items,
        "interactions": sequences.n_interactions,
    }
    rows |= {key: value for key, value in sequences.statistics.items() if key not in rows}
    rows["fingerprint"] = sequences.fingerprint[:16]
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key.replace('_', ' '):{width}}  {cell(value)}")
    for warning in sequences.warnings:
        print(f"warning: {warning}")
