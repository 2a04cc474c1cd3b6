"""What `data show` and `data prepare` print of a log, group by group, its warnings last."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from depthprobe.cli.tables import bar, cell, show_table
from depthprobe.data.log import PARTS
from depthprobe.data.splits import make_split
from depthprobe.data.statistics import LEVELS, length_bins, popularity, quantiles, top_shares
from depthprobe.errors import BadInput
from depthprobe.study import Protocol

if TYPE_CHECKING:
    from depthprobe.data.splits import Split
    from depthprobe.data.storage import Sequences


def describe(
    sequences: Sequences, *, source: str, protocol: Protocol | None = None, charts: bool = False
) -> None:
    """Print sizes, cleaning, quantiles, charts if asked for, the split, the warnings.

    Without a ``protocol`` the split is the default one, and a log that can't be split so is no
    error: it is still worth a look.

    Raises:
        BadInput: if the log can't be split as the protocol says.
    """
    asked = protocol or Protocol()
    warnings = list(sequences.warnings)
    split = None
    try:
        split = make_split(sequences, asked)
        warnings += split.warnings
    except BadInput as error:
        if protocol is not None:
            raise
        warnings.append(f"no {asked.split} split ({error.allowed})")
    lengths, taken = np.diff(sequences.offsets), popularity(sequences)
    show_rows(size_rows(sequences, source))
    show_cleaning(sequences)
    header = ["interactions", *LEVELS]
    rows = [["of a user", *quantiles(lengths).values()], ["of an item", *quantiles(taken).values()]]
    show_table(header, rows, words=header[:1])
    if charts:
        show_charts(lengths, taken)
    if split is not None:
        show_rows(split_rows(split, asked.split))
    if warnings:
        print()
    for warning in warnings:
        print(f"warning: {warning}")


def size_rows(sequences: Sequences, source: str) -> dict[str, str]:
    """Name, source, sizes, density, order in time, and the fingerprint."""
    found = sequences.statistics
    rows = {
        "name": sequences.name,
        "source": source,
        "users": cell(sequences.n_users),
        "items": cell(sequences.n_items),
        "interactions": cell(sequences.n_interactions),
        "density": percent(found["density"]),
        "repeats": f"{percent(found['repeats'])} of interactions, whose item the user had before",
    }
    if sequences.times is None:
        rows["times"] = "none"
    else:
        shared = percent(found["shared_times"])
        rows["times"] = f"{found['first']} to {found['last']}"
        rows["same time"] = f"{shared} of neighbours in a history"
    if sequences.given is not None:
        sizes = ", ".join(f"{what} {cell(size)}" for what, size in _part_sizes(sequences))
        rows["came split"] = f"{sizes} (used by --split given)"
    titles = sequences.titles
    rows["titles"] = "none" if titles is None else f"for {cell(sum(map(bool, titles)))} items"
    rows["fingerprint"] = sequences.fingerprint[:16]
    return rows


def split_rows(split: Split, name: str) -> dict[str, str]:
    """What trains and who is asked, and who and what is unknown to training."""
    found = split.statistics
    rows = {"split": name}
    if "test_begins" in found:
        rows["split"] += (
            f", validation from {found['validation_begins']}, test from {found['test_begins']}"
        )
    rows["training"] = (
        f"{cell(found['training_interactions'])} interactions of "
        f"{cell(found['training_items'])} items"
    )
    for part in PARTS[1:]:
        rows[part] = f"{cell(found[f'{part}_users'])} users"
        if cold := found.get(f"cold_{part}_users"):
            rows[part] += f", {cell(cold)} cold ones not asked"
    if unknown := found["cold_test_targets"]:
        rows["test"] += f", {cell(unknown)} of their targets unknown to training"
    return rows


def show_rows(rows: dict[str, str]) -> None:
    """Print what a thing is called and what it is, one a line."""
    print()
    width = max(12, *map(len, rows))
    for key, value in rows.items():
        print(f"  {key:{width}}  {value}")


def show_cleaning(sequences: Sequences) -> None:
    """Print what each step of the cleaning left, and took; nothing where it had no step."""
    steps = sequences.cleaning
    if len(steps) < 2:
        return
    gone = [None, *(a.interactions - b.interactions for a, b in pairwise(steps))]
    rows = [
        [step.step, step.interactions, step.users, step.items, lost]
        for step, lost in zip(steps, gone, strict=True)
    ]
    show_table(["cleaning", "interactions", "users", "items", "gone"], rows, words=["cleaning"])


def show_charts(lengths: np.ndarray, taken: np.ndarray) -> None:
    """Draw users by the length of their history, and how much the most popular items take.

    Args:
        lengths: (U,) interactions of each user.
        taken: (I,) interactions of each item.
    """
    bins = length_bins(lengths)
    most = max(users for _, _, users in bins)
    show_table(
        ["history", "", "users", "share"],
        [
            [f"{low:,}-{high:,}" if low < high else low, bar(users / most), users,
             percent(users / len(lengths))]
            for low, high, users in bins
        ],
        words=[""],
    )  # fmt: skip
    show_table(
        ["most popular", "", "of the interactions", "items"],
        [
            [f"{top} %", bar(share), percent(share), count]
            for top, count, share in top_shares(taken)
        ],
        words=[""],
    )


def percent(share: float | int | str) -> str:
    """A share as per cent, at three significant digits."""
    return f"{100 * float(share):.3g} %"


def _part_sizes(sequences: Sequences) -> list[tuple[str, int]]:
    given, offsets = np.asarray(sequences.given), np.asarray(sequences.offsets)
    ends = [offsets[:-1], given[:, 0], given[:, 1], offsets[1:]]
    sizes = [int((end - start).sum()) for start, end in zip(ends, ends[1:], strict=False)]
    return list(zip(PARTS, sizes, strict=True))
