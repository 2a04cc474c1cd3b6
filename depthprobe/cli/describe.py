"""What `data show` and `data prepare` print of a log, group by group, its warnings last."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from depthprobe.cli.tables import bar, cell, show_facts, show_table
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
    """Print sizes, cleaning, quantiles, charts on demand, the split, the warnings.

    Without a ``protocol`` the split is the default one, and a log that can't be split so is no
    error: it is still worth a look.

    Raises:
        BadInput: if the log can't be split as the protocol says.
    """
    rule = protocol or Protocol()
    warnings = list(sequences.warnings)
    split = None
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
    if warnings:
        print()
    for warning in warnings:
        print(f"warning: {warning}")


def _sizes(sequences: Sequences, source: str) -> dict[str, str]:
    """Name, source, sizes, density, order in time, and the fingerprint."""
    numbers = sequences.statistics
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
        rows["same time"] = f"{_percent(numbers['shared_times'])} of neighbours in a history"
    if sequences.given is not None:
        given, offsets = np.asarray(sequences.given), np.asarray(sequences.offsets)
        ends = [offsets[:-1], given[:, 0], given[:, 1], offsets[1:]]
        sizes = [cell(int((end - start).sum())) for start, end in pairwise(ends)]
        parts = ", ".join(f"{part} {size}" for part, size in zip(PARTS, sizes, strict=True))
        rows["came split"] = f"{parts} (used by --split given)"
    titles = sequences.titles
    rows["titles"] = "none" if titles is None else f"for {cell(sum(map(bool, titles)))} items"
    rows["fingerprint"] = sequences.fingerprint[:16]
    return rows


def _parts(split: Split, name: str) -> dict[str, str]:
    """What trains, who is in which part, and who and what is unknown to training."""
    numbers = split.statistics
    rows = {"split": name}
    if "test_begins" in numbers:
        begins = (numbers["validation_begins"], numbers["test_begins"])
        rows["split"] += f", validation from {begins[0]}, test from {begins[1]}"
    items = cell(numbers["training_items"])
    rows["training"] = f"{cell(numbers['training_interactions'])} interactions of {items} items"
    for part in PARTS[1:]:
        rows[part] = f"{cell(numbers[f'{part}_users'])} users"
        if cold := numbers.get(f"cold_{part}_users"):
            rows[part] += f", {cell(cold)} cold ones left out"
    if unknown := numbers["cold_test_targets"]:
        rows["test"] += f", {cell(unknown)} of their targets unknown to training"
    return rows


def _show_cleaning(sequences: Sequences) -> None:
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


def _show_charts(lengths: np.ndarray, counts: np.ndarray) -> None:
    """Draw users by the length of their history, and how much the most popular items take."""
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
    return f"{100 * float(share):.3g} %"
