"""Statistics of a log, and warnings if the order of its sequences may not be that of time."""

from __future__ import annotations

import datetime

import numpy as np

from depthprobe.data.storage import Sequences
from depthprobe.formatting import part_percent, rounded

TOP = (1, 5, 10, 25, 50)  # per cent of the items
NO_TIMES = "no times: order is the file's"
MANY_TIES = 0.05  # share of neighbours at equal times above which times are too coarse
SORTED, PARTLY = 0.9, 0.6  # shares of steps to a higher id; by chance it is about a half
PADDING = {"0", "-1", "pad", "<pad>", "[pad]"}  # as items
LEVELS = {
    "min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1.0,
}  # fmt: skip


def popularity(sequences: Sequences) -> np.ndarray:
    """How many interactions each item has, int64 (I,)."""
    return np.bincount(sequences.items, minlength=sequences.n_items + 1)[1:]


def length_levels(lengths: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """The bin of each length, (U,), and the bins: 1, 2, 3 to 4, 5 to 8, ... up to the longest."""
    levels = np.searchsorted(2 ** np.arange(40), lengths)  # (U,), places of the upper bounds
    count = int(levels.max(initial=0)) + 1
    return levels, [(2 ** (n - 1) + 1 if n else 1, 2**n) for n in range(count)]


def length_bins(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Histories by length, as (shortest, longest, users), shortest first."""
    levels, bins = length_levels(lengths)
    users = np.bincount(levels).tolist()
    return [(*bins[level], users[level]) for level in range(int(levels.min()), len(users))]


def top_shares(popularity: np.ndarray) -> list[tuple[int, int, float]]:
    """The share of interactions of the most popular items, as (per cent, items, share)."""
    total = np.cumsum(np.sort(popularity)[::-1])
    counts = [-(-percent * len(popularity) // 100) for percent in TOP]
    return [(p, n, float(total[n - 1] / total[-1])) for p, n in zip(TOP, counts, strict=True)]


def statistics(
    offsets: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None,
    tied: np.ndarray | None,
    n_items: int,
    ties: str,
) -> dict[str, float | int | str]:
    """Sizes, shares and the time span of sequences.

    ``repeats`` is the share of interactions with an item that the user had before; ``shared_times``
    the share of ``tied`` neighbours and ``ties`` how they were ordered; ``first`` and ``last`` are
    dates.
    """
    lengths = np.diff(offsets)
    pairs = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths) * (n_items + 1) + items
    pairs.sort()
    values: dict[str, float | int | str] = {
        "users": len(lengths),
        "items": n_items,
        "interactions": len(items),
        "mean_length": float(lengths.mean()),
        "median_length": float(np.median(lengths)),
        "max_length": int(lengths.max()),
        "density": len(items) / (len(lengths) * n_items),
        "repeats": int((np.diff(pairs) == 0).sum()) / len(items),
    }
    if times is not None and tied is not None:
        values |= {
            "shared_times": _share(tied),
            "ties": ties,
            "first": as_date(times.min()),
            "last": as_date(times.max()),
        }
    return values


def quantiles(counts: np.ndarray) -> dict[str, int]:
    """Quantiles of lengths or popularities, by name; each is an occurring count."""
    values = np.quantile(counts, list(LEVELS.values()), method="inverted_cdf")
    return dict(zip(LEVELS, values.tolist(), strict=True))


def order_warnings(
    offsets: np.ndarray, items: np.ndarray, tied: np.ndarray | None, ids: list[str], ties: str
) -> list[str]:
    """Warnings that the order of sequences may not be that of time.

    ``items`` are numbered 1..I in the natural order of ``ids``; ``tied`` is that of
    :func:`tied_neighbours`, or None for a log without times; ``ties`` tells how they were ordered.
    """
    rows = _rows_before_another(offsets)
    warnings, where = [NO_TIMES, *_padding(rows, items, ids)], ""
    if tied is not None:
        share = _share(tied)
        rows, where = rows[tied], "within equal times, "  # other neighbours are ordered by time
        copies = _copies(rows, items)
        if share <= MANY_TIES:
            return copies
        warnings = [
            *copies,
            f"{part_percent(share)} of neighbours in a sequence have the same time "
            f"(as day-level times do): their order is {ties}",
        ]
    by_text = np.empty(len(ids) + 1, dtype=np.int64)
    by_text[np.argsort(ids, kind="stable") + 1] = np.arange(len(ids))
    found = []
    for places, what in ((items, "item id"), (by_text[items], "text of the item id")):
        steps = places[rows + 1].astype(np.int64) - places[rows]
        steps = steps[steps != 0]
        rising = _share(steps > 0)
        found.append(
            (max(rising, 1 - rising), "rises" if rising > 0.5 else "falls", what, len(steps))
        )
    share, goes, what, count = max(found)
    if share > max(PARTLY, 0.5 + 1.5 / max(count, 1) ** 0.5):  # three standard errors from a half
        order = "the order" if share > SORTED else "a part of the order"
        verb = "may be" if tied is None else "is"  # ids may follow time, where there are no ties
        warnings.append(
            f"{where}the {what} {goes} in {part_percent(share)} of the steps, by chance in about "
            f"half: {order} {verb} that of ids, not of time"
        )
    return warnings


def _copies(rows: np.ndarray, items: np.ndarray) -> list[str]:
    """A warning about duplicate interactions; ``rows`` have the same time as the next one."""
    follows = np.zeros(len(items), dtype=bool)
    follows[rows + 1] = True
    tied = follows.copy()
    tied[rows] = True
    places = np.flatnonzero(tied)
    moment = np.cumsum(~follows[places])  # of each row, its time's index
    pairs = moment * (int(items.max(initial=0)) + 1) + items[places]
    pairs.sort()
    copies = int((np.diff(pairs) == 0).sum())
    what = "interactions repeat another one of the same user, item and time"
    return [f"{copies:,} {what}"] if copies else []


def _padding(rows: np.ndarray, items: np.ndarray, ids: list[str]) -> list[str]:
    """A warning about an item that pads histories to one length, mostly next to itself."""
    warnings = []
    for number in [number for number, one in enumerate(ids, 1) if one.lower() in PADDING]:
        all_of_it = items == number
        twice = int((all_of_it[rows] & all_of_it[rows + 1]).sum())
        if 2 * twice >= int(all_of_it.sum()):
            warnings.append(
                f"the item {ids[number - 1]} follows itself {twice:,} times: if it fills histories "
                "up to one length, take it out"
            )
    return warnings


def tied_neighbours(offsets: np.ndarray, times: np.ndarray) -> np.ndarray:
    """For each row whose next one is of the same user, whether both have the same time; bool."""
    rows = _rows_before_another(offsets)
    return np.asarray(times[rows + 1] == times[rows])


def as_date(seconds: float) -> str:
    """The day of a time in seconds since 1970, UTC; the number itself beyond the calendar."""
    try:
        day = datetime.datetime(1970, 1, 1) + datetime.timedelta(seconds=float(seconds))
    except OverflowError:
        return f"{rounded(seconds, 4)} s"
    return day.date().isoformat()


def _share(flags: np.ndarray) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def _rows_before_another(offsets: np.ndarray) -> np.ndarray:
    """Rows whose next row is of the same user, ascending."""
    last = np.zeros(int(offsets[-1]), dtype=bool)
    last[offsets[1:] - 1] = True
    return np.flatnonzero(~last)
