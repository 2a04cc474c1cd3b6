"""`data prepare|show|list`: a log put in order, looked at, and what logs can be read."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Any

import typer

from depthprobe.cli.options import (
    SplitKind,
    SplitPoints,
    check_data,
    check_split_at,
    checked,
    number,
    split_list,
    whole,
)
from depthprobe.errors import BadInput, check_writable
from depthprobe.study import Study

PICTURES = (".png", ".svg", ".pdf")
# what the flags set of a study, whose settings are checked when it is made
SETTINGS = {
    "source": "data.source",
    "format": "data.format",
    "items": "data.items",
    "user_column": "data.columns.user",
    "item_column": "data.columns.item",
    "time_column": "data.columns.time",
    "rating_column": "data.columns.rating",
    "title_column": "data.columns.title",
    "min_rating": "data.cleaning.min_rating",
    "repeats": "data.cleaning.repeats",
    "latest": "data.cleaning.latest",
    "core": "data.cleaning.core",
    "split": "protocol.split",
}

app = typer.Typer(help="Readers, filters, statistics of a dataset.", rich_markup_mode=None)

Source = Annotated[
    str,
    typer.Argument(
        metavar="D", help="A log, a prepared folder, a public set (data list), or embedded."
    ),
]
Format = Annotated[
    str | None, typer.Option(metavar="F", help="One of data list [default: by the content].")
]
Items = Annotated[
    str | None, typer.Option(metavar="FILE", help="The items' titles [default: beside the log].")
]
Column = Annotated[
    str | None,
    typer.Option(metavar="C", help="Its name, or its number from 1 [default: guessed]."),
]
MinRating = Annotated[
    float | None, typer.Option(metavar="X", parser=number, help="Drop lower ratings.")
]
Repeats = Annotated[
    str | None,
    typer.Option(metavar="keep|first|last", help="Of a user's with the same item [default: keep]."),
]
Latest = Annotated[
    int | None, typer.Option(metavar="N", parser=whole, help="Keep so many of each user's.")
]
Core = Annotated[
    int | None,
    typer.Option(metavar="K", parser=whole, help="Keep users and items with K or more (k-core)."),
]


@app.command()
def prepare(
    context: typer.Context,
    source: Source,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The dataset's name.")] = None,
    format: Format = None,
    items: Items = None,
    user_column: Column = None,
    item_column: Column = None,
    time_column: Column = None,
    rating_column: Column = None,
    title_column: Column = None,
    min_rating: MinRating = None,
    repeats: Repeats = None,
    latest: Latest = None,
    core: Core = None,
) -> None:
    """Sort a log into sequences, clean it, write it as a memory-mapped folder."""
    data = settings(context.params).data
    check_writable("output", output)

    from depthprobe.cli.describe import describe
    from depthprobe.data.prepared import read_data

    describe(read_data(data, output, name=name), source=source)
    print(f"\n{output}")


@app.command()
def show(
    context: typer.Context,
    source: Source,
    format: Format = None,
    items: Items = None,
    user_column: Column = None,
    item_column: Column = None,
    time_column: Column = None,
    rating_column: Column = None,
    title_column: Column = None,
    min_rating: MinRating = None,
    repeats: Repeats = None,
    latest: Latest = None,
    core: Core = None,
    split: SplitKind = None,
    split_at: SplitPoints = None,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw it as well: .png, .svg or .pdf.")
    ] = None,
) -> None:
    """The shape of a log, and what to know before trusting it."""
    study = settings(context.params)
    if figure is not None:
        check_picture(figure)

    from depthprobe.cli.describe import describe
    from depthprobe.data.prepared import read_data

    sequences = read_data(study.data)
    protocol = None if split is None else study.protocol
    describe(sequences, source=source, protocol=protocol, charts=True)
    if figure is not None:
        from depthprobe.report.data_figure import save_data_figure

        print(f"\n{save_data_figure(sequences, figure, protocol=protocol)}")


def settings(flags: dict[str, Any]) -> Study:
    """The study that the flags of a command describe, of which it needs the data and the split.

    Raises:
        BadInput: for a value that can't be used, or a source that does not exist.
    """
    points = flags.get("split_at")
    changes = {SETTINGS[name]: value for name, value in flags.items() if name in SETTINGS}
    changes["protocol.split_at"] = None if points is None else split_list(points)
    study = checked(Study(), **changes)
    check_split_at(points, study.protocol)
    check_data(study.data.source)
    return study


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn or written."""
    if path.suffix.lower() not in PICTURES:
        raise BadInput("figure", path, f"a file ending in {', '.join(PICTURES)}")
    if path.is_dir():
        raise BadInput("figure", path, "a file; this is a folder")
    check_writable("figure", path.parent)


@app.command("list")
def list_logs() -> None:
    """The formats that a log may have, and the public sets that are fetched by name."""
    from depthprobe.cli.tables import show_table
    from depthprobe.data.public import cache_folder, public_sets
    from depthprobe.data.readers.formats import FORMATS

    header = ["format", "what it is"]
    show_table(header, [[name, one.help] for name, one in FORMATS.items()], words=header)
    rows, texts = [], []
    for family, group in groupby(public_sets(), key=lambda one: one.family):
        first, *others = list(group)
        name, about, size = first.name, first.about, first.files[0].size
        if others:
            name = f"{family}:CATEGORY"
            categories = [one.name.partition(":")[2] for one in (first, *others)]
            about = about.replace(categories[0].replace("_", " "), "CATEGORY")
            texts.append(f"{family}, categories: {', '.join(categories)}")
        rows.append([name, about, None if size is None else f"{size / 1e6:,.1f}"])
        texts.append(f"{family}, terms: {first.terms}")
    show_table(["public set", "what it is", "MB"], rows, words=["public set", "what it is"])
    print(f"\nfetched when first asked for, into {cache_folder()} (DEPTHPROBE_CACHE moves it)\n")
    width = min(100, get_terminal_size().columns)
    for text in texts:
        print(fill(text, width, subsequent_indent="  ", break_long_words=False,
                   break_on_hyphens=False))  # fmt: skip
