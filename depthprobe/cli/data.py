"""`data prepare|show|list`: a log put in order, looked at, and what logs can be read."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Any

import typer

from depthprobe.cli.options import LOG, SPLIT, apply_flags, option, takes_flags
from depthprobe.errors import BadInput, check_writable
from depthprobe.study import Study

PICTURES = (".png", ".svg", ".pdf")

app = typer.Typer(help="Readers, filters, statistics of a dataset.", rich_markup_mode=None)

Source = Annotated[
    str,
    typer.Argument(
        metavar="D", help="A log, a prepared folder, a public set (data list), or embedded."
    ),
]


@app.command()
@takes_flags(LOG)
def prepare(
    source: Source,
    output: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to write.")],
    name: Annotated[str | None, option("NAME", "The dataset's name.")] = None,
    **flags: Any,
) -> None:
    """Sort a log into sequences, clean it, write it as a memory-mapped folder."""
    study = apply_flags(Study(), data=source, **flags)
    check_writable("output", output)

    from depthprobe.cli.describe import describe
    from depthprobe.data.prepared import read_data

    describe(read_data(study.data, output, name=name), source=source)
    print(f"\n{output}")


@app.command()
@takes_flags(LOG | SPLIT)
def show(
    source: Source,
    figure: Annotated[Path | None, option("FILE", "Draw it as well: .png, .svg or .pdf.")] = None,
    **flags: Any,
) -> None:
    """The shape of a log, and what to know before trusting it."""
    study = apply_flags(Study(), data=source, **flags)
    if figure is not None:
        if figure.suffix.lower() not in PICTURES or figure.is_dir():
            raise BadInput("figure", figure, f"a file ending in {', '.join(PICTURES)}")
        check_writable("figure", figure.parent)

    from depthprobe.cli.describe import describe
    from depthprobe.data.prepared import read_data

    sequences = read_data(study.data)
    protocol = None if flags["split"] is None else study.protocol
    describe(sequences, source=source, protocol=protocol, charts=True)
    if figure is not None:
        from depthprobe.report.data_figure import save_data_figure

        print(f"\n{save_data_figure(sequences, figure, protocol=protocol)}")


@app.command("list")
def list_logs() -> None:
    """The formats that a log may have, and the public sets that are fetched by name."""
    from depthprobe.cli.tables import show_table
    from depthprobe.data.public import SETS, cache_folder
    from depthprobe.data.readers.formats import FORMATS

    header = ["format", "what it is"]
    show_table(header, [[name, one.help] for name, one in FORMATS.items()], words=header)
    rows, notes = [], []
    for family, group in groupby(SETS.values(), key=lambda one: one.family):
        first, *others = list(group)
        name, about, size = first.name, first.about, first.files[0].size
        if others:
            name = f"{family}:CATEGORY"
            categories = [one.name.partition(":")[2] for one in (first, *others)]
            about = about.replace(categories[0].replace("_", " "), "CATEGORY")
            notes.append(f"{family}, categories: {', '.join(categories)}")
        rows.append([name, about, None if size is None else f"{size / 1e6:,.1f}"])
        notes.append(f"{family}, terms: {first.terms}")
    show_table(["public set", "what it is", "MB"], rows, words=["public set", "what it is"])
    print(f"\nfetched when first used, into {cache_folder()} (DEPTHPROBE_CACHE moves it)\n")
    width = min(100, get_terminal_size().columns)
    for note in notes:
        print(fill(note, width, subsequent_indent="  ", break_long_words=False,
                   break_on_hyphens=False))  # fmt: skip
