"""Own columns by which a run's test users are sliced: read once, kept beside the log."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from depthprobe.data.attributes import What, read_attribute
from depthprobe.data.splits import Split
from depthprobe.evaluation.slices import TAKEN
from depthprobe.files import complete_file
from depthprobe.study import BadInput
from depthprobe.study.measuring import Protocol

SLICES = "slices.parquet"


def asked_slices(protocol: Protocol) -> dict[str, list[str]]:
    """The own columns that a study names, as the manifest of a run holds them."""
    return {"user": list(protocol.user_slices), "item": list(protocol.item_slices)}


def own_slices(protocol: Protocol, split: Split) -> pd.DataFrame:
    """Labels of the test's users: user, and one column for each that the study names.

    A user has the value of their own, or that of the item asked for; empty where the file has
    none.

    Raises:
        BadInput: if a file can't be read, or two columns have one name.
    """
    sequences, users = split.sequences, split.test.users
    frame = pd.DataFrame({"user": users})
    ids: dict[What, list[str]] = {
        "user": [name.strip() for name in sequences.user_ids[users].tolist()],
        "item": [name.strip() for name in sequences.item_ids[split.targets("test") - 1].tolist()],
    }
    for what, settings in asked_slices(protocol).items():
        kind: What = "user" if what == "user" else "item"
        field = f"protocol.{what}_slices"
        for setting in settings:
            name, values = read_attribute(setting, kind, field=field, wanted=set(ids[kind]))
            if name in TAKEN or name in frame:
                raise BadInput(field, setting, f"another name for the column {name!r}: it is taken")
            frame[name] = [values.get(key, "") for key in ids[kind]]
    return frame


def write_slices(frame: pd.DataFrame, shared: Path) -> None:
    """Keep the labels in a run's shared folder; without any, what was there goes."""
    if len(frame.columns) == 1:
        (shared / SLICES).unlink(missing_ok=True)
        return
    with complete_file(shared / SLICES) as temporary:
        frame.to_parquet(temporary, index=False)


def read_slices(shared: Path) -> dict[str, list[str]]:
    """Labels of the test's users by the name of the column; none where the run has none."""
    if not (shared / SLICES).is_file():
        return {}
    frame = pd.read_parquet(shared / SLICES)
    return {str(name): frame[name].tolist() for name in frame.columns.drop("user")}
