"""`data prepare|show|list`: prepare a log, describe it, list the formats that can be read."""

from __future__ import annotations

from itertools import groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe.cli.options import LOG, SPLIT, apply_flags, option, path, takes_flags
from depthprobe.cli.terminal import bar, cell, echo, say, show_facts, show_table
from depthprobe.errors import BadInput, check_writable, one_line
from depthprobe.formatting import part_percent
from depthprobe.study import Protocol, Study

if TYPE_CHECKING:
    import numpy as np

    from depthprobe.data.splits import Split
    from depthprobe.data.storage import Sequences

PICTURES = (".png", ".svg", ".pdf")

app = typer.Typer(help="Read, clean and describe a log.", rich_markup_mode=None)

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
    output: Annotated[
        Path, typer.Argument(metavar="DIR", help="The folder to write.", parser=path)
    ],
    name: Annotated[str | None, option("NAME", "The dataset's name.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a prepared folder at DIR.")
    ] = False,
    **flags: Any,
) -> None:
    """Sort and clean a log, and write it as a prepared folder."""
    study = apply_flags(Study(), data=source, **flags)

    from depthprobe.data.prepared import read_data

    sequences = read_data(study.data, output, name=name, overwrite=overwrite)
    describe(sequences, source=source)
    echo(f"\n{output}")


@app.command()
@takes_flags(LOG | SPLIT)
def show(
    source: Source,
    figure: Annotated[
        Path | None, option("FILE", "Also draw it: .png, .svg or .pdf.", parser=path)
    ] = None,
    **flags: Any,
) -> None:
    """Describe a log, and warn of what may mislead."""
    study = apply_flags(Study(), data=source, **flags)
    if figure is not None:
        if figure.suffix.lower() not in PICTURES or figure.is_dir():
            raise BadInput("figure", figure, f"a file ending in {', '.join(PICTURES)}")
        check_writable("figure", figure.parent)

    from depthprobe.data.prepared import read_data

    sequences = read_data(study.data)
    protocol = None if flags["split"] is None else study.protocol
    describe(sequences, source=source, protocol=protocol, charts=True)
    if figure is not None:
        from depthprobe.report.data_figure import save_data_figure

        echo(f"\n{save_data_figure(sequences, figure, protocol=protocol)}")


@app.command("list")
def list_logs() -> None:
    """List the formats of logs, and the public sets by name."""
    from depthprobe.data.public import SETS, cache_folder
    from depthprobe.data.readers.formats import FORMATS

    header = ["format", "what it is"]
    show_table(header, [[name, one.help] for name, one in FORMATS.items()], words=header)
    rows, notes = [], []
    for family, group in groupby(SETS.values(), key=lambda one: one.family):
        first, *others = group
        name, about, size = first.name, first.about, first.files[0].size
        if others:
            name = f"{family}:CATEGORY"
            categories = [one.name.partition(":")[2] for one in (first, *others)]
            about = about.replace(categories[0].replace("_", " "), "CATEGORY")
            notes.append(f"{family}, categories: {', '.join(categories)}")
        rows.append([name, about, None if size is None else f"{size / 1e6:,.1f}"])
        notes.append(f"{family}, terms: {first.terms}")
    show_table(["public set", "what it is", "MB"], rows, words=["public set", "what it is"])
    echo(f"\nfetched when first used, into {cache_folder()} (DEPTHPROBE_CACHE moves it)\n")
    for note in notes:
        say(note)


def describe(
    sequences: Sequences, *, source: str, protocol: Protocol | None = None, charts: bool = False
) -> None:
    """Print sizes, cleaning, quantiles, charts if asked for, the split and warnings.

    Without a ``protocol`` the default split is shown, and a log that it can't split is not an
    error: the rest is still worth seeing.
    """
    import numpy as np

    from depthprobe.data.splits import make_split
    from depthprobe.data.statistics import LEVELS, popularity, quantiles

    rule = protocol or Protocol()
    warnings, split = list(sequences.warnings), None
    try:
        split = make_split(sequences, rule)
        warnings += split.warnings
    except BadInput as error:
        if protocol is not None:
            raise
        warnings.append(f"no {rule.split} split ({error.allowed})")
    lengths, counts = np.diff(sequences.offsets), popularity(sequences)  # (U,), (I,)
    show_facts(_sizes(sequences, source))
    _show_cleaning(sequences)
    header = ["interactions", *LEVELS]
    rows = [
        ["of a user", *quantiles(lengths).values()],
        ["of an item", *quantiles(counts).values()],
    ]
    show_table(header, rows, words=header[:1])
    if charts:
        _show_charts(lengths, counts)
    if split is not None:
        show_facts(_parts(split, rule.split))
    echo("".join(f"\nwarning: {one_line(warning)}" for warning in warnings))


def _sizes(sequences: Sequences, source: str) -> dict[str, str]:
    """Name, source, sizes, density, order in time, and the fingerprint."""
    numbers, titles = sequences.statistics, sequences.titles
    rows = {
        "name": sequences.name,
        "source": source,
        "users": cell(sequences.n_users),
        "items": cell(sequences.n_items),
        "interactions": cell(sequences.n_interactions),
        "density": _percent(numbers["density"]),
        "repeats": f"{_percent(numbers['repeats'])} of interactions: the user had the item before",
        "times": "none",
    }
    if sequences.times is not None:
        rows["times"] = f"{numbers['first']} to {numbers['last']}"
        shared = f"{_percent(numbers['shared_times'])} of neighbours in a history"
        rows["same time"] = f"{shared}, their order is {numbers.get('ties', 'that of the file')}"
    if sequences.given is not None:
        offsets, given = sequences.offsets, sequences.given  # (U + 1,), (U, 2): where parts end
        ends = (offsets[:-1].sum(), *given.sum(axis=0), offsets[1:].sum())
        sizes = [cell(high - low) for low, high in pairwise(ends)]
        parts = "training {}, validation {}, test {}".format(*sizes)
        rows["came split"] = f"{parts} (used by --split given)"
    if sequences.columns is not None:
        rows["columns"] = str(sequences.columns)
    rows["titles"] = "none" if titles is None else f"for {cell(sum(map(bool, titles)))} items"
    rows["fingerprint"] = sequences.fingerprint[:16]
    return rows


def _parts(split: Split, name: str) -> dict[str, str]:
    """The size of each part, and which users and items training has not seen."""
    numbers = split.statistics
    rows = {"split": name}
    if "test_begins" in numbers:
        begins = f"validation from {numbers['validation_begins']}, test from"
        rows["split"] += f", {begins} {numbers['test_begins']}"
    items = cell(numbers["training_items"])
    rows["training"] = f"{cell(numbers['training_interactions'])} interactions of {items} items"
    for part in ("validation", "test"):
        rows[part] = f"{cell(numbers[f'{part}_users'])} users"
        if cold := numbers.get(f"cold_{part}_users"):
            rows[part] += f", {cell(cold)} cold ones left out"
    if unknown := numbers["cold_test_targets"]:
        rows["test"] += f", {cell(unknown)} of their targets unknown to training"
    which = {"repeated": "that the user had before", "tied": "at the time of a neighbour"}
    for what, text in which.items():
        if count := numbers.get(f"{what}_test_targets"):
            rows["test"] += f", {cell(count)} of their targets {text}"
    rows["seen items"] = str(numbers["seen_items"])
    return rows


def _show_cleaning(sequences: Sequences) -> None:
    """Print what each cleaning step removed and left; nothing without steps."""
    steps = sequences.cleaning
    if len(steps) < 2:
        return
    lost = [None, *(before.interactions - step.interactions for before, step in pairwise(steps))]
    rows = [
        [s.step, s.interactions, s.users, s.items, gone]
        for s, gone in zip(steps, lost, strict=True)
    ]
    show_table(["cleaning", "interactions", "users", "items", "gone"], rows, words=["cleaning"])


def _show_charts(lengths: np.ndarray, counts: np.ndarray) -> None:
    """Draw the users by length of history, and the share of the most popular items."""
    from depthprobe.data.statistics import length_bins, top_shares

    bins = length_bins(lengths)
    most = max(users for _, _, users in bins)
    rows: list[list[object]] = [
        [f"{low:,}-{high:,}" if low < high else low, bar(users / most), users,
         _percent(users / len(lengths))]
        for low, high, users in bins
    ]  # fmt: skip
    show_table(["history", "", "users", "share"], rows, words=[""])
    rows = [
        [f"{top} %", bar(share), _percent(share), count] for top, count, share in top_shares(counts)
    ]
    show_table(["most popular", "", "of the interactions", "items"], rows, words=[""])


def _percent(share: float | int | str) -> str:
    return part_percent(float(share), 3)
