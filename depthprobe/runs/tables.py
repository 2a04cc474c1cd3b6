"""The metrics table of a run, from every user's rank: for all users and for each slice."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from depthprobe.data.readers.titles import What, read_attribute
from depthprobe.data.splits import Split
from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import METRICS, check_metrics, per_user_metric
from depthprobe.evaluation.slices import ALL, RESERVED, Family, slice_means
from depthprobe.files import complete_file
from depthprobe.runs.records import FULL, TRIALS, Record, read_users
from depthprobe.study import Protocol

SLICES = "slices.parquet"


def slice_columns(protocol: Protocol) -> dict[str, list[str]]:
    """The user's columns that a study slices by, of users and of items."""
    return {"user": list(protocol.user_slices), "item": list(protocol.item_slices)}


def own_slices(protocol: Protocol, split: Split) -> pd.DataFrame:
    """Labels of the test users: user, and one column for each that the study names.

    The label is the user's own value or that of their target; empty if the file has none.
    ``BadInput`` if a file can't be read, or two columns have one name.
    """
    sequences, users = split.sequences, split.test.users
    frame = pd.DataFrame({"user": users})
    ids: dict[What, list[str]] = {
        "user": [name.strip() for name in sequences.user_ids[users].tolist()],
        "item": [name.strip() for name in sequences.item_ids[split.targets("test") - 1].tolist()],
    }
    for what, settings in slice_columns(protocol).items():
        kind: What = "user" if what == "user" else "item"
        field = f"protocol.{what}_slices"
        for setting in settings:
            name, values = read_attribute(setting, kind, field=field, wanted=set(ids[kind]))
            if name in RESERVED or name in frame:
                raise BadInput(field, setting, f"another name for the column {name!r}: it is taken")
            frame[name] = [values.get(key, "") for key in ids[kind]]
    return frame


def write_slices(frame: pd.DataFrame, shared: Path) -> None:
    """Write the labels into a run's shared folder; without labels, delete what was there."""
    if len(frame.columns) == 1:
        (shared / SLICES).unlink(missing_ok=True)
        return
    with complete_file(shared / SLICES) as temporary:
        frame.to_parquet(temporary, index=False)


def read_slices(shared: Path) -> dict[str, list[str]]:
    """Labels of the test users by column name; empty if the run has none."""
    if not (shared / SLICES).is_file():
        return {}
    frame = pd.read_parquet(shared / SLICES)
    return {str(name): frame[name].tolist() for name in frame.columns.drop("user")}


# --- the table ------------------------------------------------------------------------------------

OF_LISTS = ("coverage@10", "gini@10", "popularity@10")
COLUMNS = (
    *("trial", "method", "depth", "seed", "split", "protocol", "slice", "metric"),
    *("value", "ci_low", "ci_high", "users"),
)
VALUE_BYTES = 256 * 2**20  # of per-user values in memory at a time


def metrics_table(
    folder: Path,
    records: Sequence[Record],
    sliced: np.ndarray,
    cuts: Sequence[Family],
    asked: Protocol,
) -> pd.DataFrame:
    """The tidy metrics of finished trials, with intervals over users.

    Only full ranking is sliced. Metrics that are no mean over users (:data:`OF_LISTS`) and the
    validation score have no interval.

    Args:
        folder: of the run.
        records: of the trials that are done.
        sliced: the users in the slices, ascending (E,); empty if they are unknown.
        cuts: ways to slice these users.
        asked: the protocol, for the headline metric and the level.
    """
    frames, rows = [], []
    metrics = tuple(dict.fromkeys((*METRICS, asked.metric)))
    for record in records:
        if (best := record.validation) is not None:
            rows.append((record.id, "validation", "NDCG@10", best.ndcg, best.users))
    for protocol, users, group in _by_users(folder, records):
        own = _aligned(cuts, sliced, users) if protocol == FULL else []
        block = max(1, VALUE_BYTES // (8 * len(users) * len(metrics)))
        for start in range(0, len(group), block):
            part = group[start : start + block]
            frames.append(_ranked(part, protocol, own, metrics, level=asked.level))
        for record, _ in group if protocol == FULL else ():
            full = record.metrics.get("test", {}).get(FULL, {})
            of_lists = [name for name in OF_LISTS if name in full]
            rows += [(record.id, "test", name, full[name], len(users)) for name in of_lists]
    bare = pd.DataFrame(rows, columns=["trial", "split", "metric", "value", "users"])
    frames.append(bare.assign(protocol=FULL, slice=ALL, ci_low=math.nan, ci_high=math.nan))
    table = pd.concat([frame for frame in frames if len(frame)] or frames, ignore_index=True)
    for name in ("method", "depth", "seed"):
        table[name] = table["trial"].map({each.id: getattr(each, name) for each in records})
    order = ["trial", "split", "protocol"]
    return table[list(COLUMNS)].sort_values(order, kind="stable", ignore_index=True)


Ranked = list[tuple[Record, np.ndarray]]  # trials, and their ranks (U,)


def _by_users(folder: Path, records: Sequence[Record]) -> Iterator[tuple[str, np.ndarray, Ranked]]:
    """Trials by protocol and ranked users. All rank the same users, unless files were changed."""
    groups: dict[tuple[str, bytes], tuple[np.ndarray, Ranked]] = {}
    for record in records:
        for protocol, (users, ranks) in read_users(folder / TRIALS / record.id, record).items():
            key = protocol, users.tobytes()
            groups.setdefault(key, (users, []))[1].append((record, ranks.astype(np.float64)))
    for (protocol, _), (users, group) in sorted(groups.items(), key=lambda each: each[0]):
        yield protocol, users, group


def _aligned(cuts: Sequence[Family], sliced: np.ndarray, users: np.ndarray) -> list[Family]:
    """The slices of these users, in their order; empty if one of the users is unknown."""
    if not cuts or not np.isin(users, sliced).all():
        return []
    places = np.searchsorted(sliced, users)
    return [Family(family.name, family.labels, family.codes[places]) for family in cuts]


def _ranked(
    group: Ranked, protocol: str, cuts: Sequence[Family], metrics: Sequence[str], *, level: float
) -> pd.DataFrame:
    """Rows of trials that rank the same users, for each slice and metric."""
    values = [per_user_metric(ranks, name) for _, ranks in group for name in metrics]
    means = slice_means(np.stack(values, axis=1), cuts, level=level)
    overall = means[ALL][1][0].reshape(len(group), len(metrics))
    for row in overall.tolist():
        check_metrics(dict(zip(metrics, row, strict=True)))
    shape = len(means), 3, len(group), len(metrics)
    numbers = np.stack([each for _, each in means.values()]).reshape(shape)
    # by trial, in it by slice, in it by metric
    value, low, high = numbers.transpose(1, 2, 0, 3).reshape(3, -1)
    each = len(means) * len(metrics)
    users = np.repeat([users for users, _ in means.values()], len(metrics))
    return pd.DataFrame(
        {
            "trial": np.repeat([record.id for record, _ in group], each),
            "split": "test",
            "protocol": protocol,
            "slice": np.tile(np.repeat(list(means), len(metrics)), len(group)),
            "metric": np.tile(metrics, len(group) * len(means)),
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "users": np.tile(users, len(group)),
        }
    )
