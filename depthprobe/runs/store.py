"""The run folder: one record a trial, complete or absent; tables derived from the records."""

from __future__ import annotations

import hashlib
import tomllib
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from depthprobe.data.splits import make_split
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.data.storage import load_data
from depthprobe.errors import BadInput
from depthprobe.evaluation.slices import Family, families
from depthprobe.files import complete_file
from depthprobe.runs.context import DATA, PROBES, TRIALS
from depthprobe.runs.records import (
    MANIFEST,
    SCORES,
    Costs,
    Manifest,
    Record,
    folders_of,
    read_manifest,
    read_record,
    read_users,
)
from depthprobe.runs.tables import metrics_table, read_slices
from depthprobe.study import Study, ranges, study_from_dict

STUDY = "study.toml"
TABLES = ("trials.parquet", "metrics.parquet")


class Run:
    """A run opened for reading: its study, its records, and tables made from them."""

    def __init__(self, path: Path, study: Study, manifest: Manifest) -> None:
        self.path, self.study, self.manifest = path, study, manifest

    @cached_property
    def records(self) -> list[Record]:
        """All records, done and failed, in the order of their names; a damaged one is no record."""
        found = map(read_record, folders_of(self.path / TRIALS))
        return [record for record in found if record is not None]

    def record(self, trial: str) -> Record:
        """The record of one trial.

        Raises:
            BadInput: if the run has no such trial.
        """
        for record in self.records:
            if record.id == trial:
                return record
        known = ", ".join(record.id for record in self.records) or "none yet"
        raise BadInput("trial", trial, f"one of {known}")

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(trial, error) of each failed trial, and of each table that could not be made."""
        every = [*self.records, *self._probes]
        return [(r.id, r.error or "") for r in every if not r.done]

    @cached_property
    def _probes(self) -> list[Record]:
        """The records of the tables under ``probes``."""
        found = map(read_record, folders_of(self.path / PROBES))
        return [record for record in found if record is not None]

    def scores(self, method: str) -> pd.DataFrame:
        """What ``similarity``, ``taylor`` or ``settling`` found, with the seed of its teacher.

        Empty where the run has no such table.
        """
        frames = [
            pd.read_parquet(self.path / PROBES / record.id / SCORES).assign(seed=record.seed)
            for record in self._probes
            if record.method == method and record.done
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row a trial: what it is, its parameters, its training, its median times."""
        return pd.DataFrame([_trial_row(record) for record in self.records])

    @cached_property
    def users(self) -> pd.DataFrame:
        """Rank of each test user's target: trial, user, protocol, rank."""
        frames = []
        for record in self.records:
            if record.done:
                for protocol, (users, ranks) in read_users(
                    self.path / TRIALS / record.id, record
                ).items():
                    told = {"trial": record.id, "user": users, "protocol": protocol}
                    frames.append(pd.DataFrame(told | {"rank": ranks}))
        if not frames:
            return pd.DataFrame(columns=["trial", "user", "protocol", "rank"])
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row a trial, split, protocol, slice and metric: value, interval, how many users."""
        found = self.written_metrics()
        return self.compute_metrics() if found is None else found

    def written_metrics(self) -> pd.DataFrame | None:
        """The table on disk, if it is of the records and slices as they are now, and readable."""
        try:
            found = pd.read_parquet(self.path / TABLES[1])
        except (OSError, ValueError):
            return None
        # versions before this one did not write down what a table is made from
        return found if found.attrs.get("records", self._mark) == self._mark else None

    @cached_property
    def _mark(self) -> str:
        """What names the content of the metrics table."""
        made_from = [(r.id, r.status, r.metrics, r.validation) for r in self.records]
        content = repr((made_from, self.manifest.slices))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def compute_metrics(self) -> pd.DataFrame:
        """The metrics table, recomputed from every user's rank.

        Raises:
            BadInput: if the ranks of a trial can't be read, or are not those of its record.
            ValueError: if the metrics of a trial break the bounds between them.
        """
        done = [record for record in self.records if record.done]
        asked, cuts = self._cuts
        resamples = self.study.protocol.resamples
        return metrics_table(self.path, done, asked, cuts, resamples=resamples)

    @cached_property
    def slices(self) -> pd.DataFrame:
        """Which slice each test user is in: user, and one column a way to slice them.

        ``target`` is ``head``, ``middle``, ``tail`` or ``cold``, ``history`` the length of the
        history as ``5-8``; own columns that the study names follow. Without the run's prepared log
        there are no slices, and no rows.
        """
        asked, cuts = self._cuts
        frame = pd.DataFrame({"user": asked})
        for family in cuts:
            kinds = pd.CategoricalDtype(list(family.labels))
            frame[family.name] = pd.Categorical.from_codes(family.codes, dtype=kinds)
        return frame

    @cached_property
    def _cuts(self) -> tuple[np.ndarray, list[Family]]:
        """The test's users, ascending, and the ways to slice them."""
        prepared = self.path / "shared" / DATA
        if not (prepared / DATA_MANIFEST).is_file():
            return np.empty(0, np.int64), []
        split = make_split(load_data(prepared), self.study.protocol)
        return split.test.users, families(split, read_slices(self.path / "shared"))


def open_run(path: str | Path) -> Run:
    """Open the folder of a run.

    Raises:
        BadInput: if it is not one.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file() or not (folder / STUDY).is_file():
        raise BadInput(
            "run", str(path), f"a folder that sweep wrote ({MANIFEST} and {STUDY} in it)"
        )
    try:
        content = tomllib.loads((folder / STUDY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput("run", str(path), f"readable {STUDY} ({error})") from None
    return Run(folder, study_from_dict(content), read_manifest(folder))


def write_tables(run: Run) -> None:
    """Write trials.parquet and metrics.parquet anew from the records."""
    metrics = run.compute_metrics()
    metrics.attrs["records"] = run._mark
    # the metrics last: they say what both are made from
    for name, frame in zip(TABLES, (run.trials, metrics), strict=True):
        with complete_file(run.path / name) as temporary:
            frame.to_parquet(temporary, index=False)
    run.__dict__.pop("metrics", None)


def _trial_row(record: Record) -> dict[str, Any]:
    costs = record.costs or Costs()
    training, timing = costs.training, costs.timing or {}
    row = {
        "trial": record.id,
        "method": record.method,
        "depth": record.depth,
        "kept": ranges(record.kept),
        "removed": ranges(record.removed),
        "seed": record.seed,
        "status": record.status,
        "error": record.error,
    }
    none = float("nan")
    for name in ("blocks", "token_embeddings", "adapters", "item_table", "total", "trainable"):
        row[f"parameters_{name}"] = costs.parameters.get(name, none)
    row["flops_user"] = none if costs.flops_user is None else costs.flops_user
    for name in ("steps", "epochs", "seconds", "teacher_seconds", "flops"):
        value = None if training is None else getattr(training, name)
        row[f"training_{name}"] = none if value is None else value
    for name in ("train_step", "encode", "score", "latency"):
        rounds = timing[name].seconds if name in timing else ()
        row[f"{name}_ms"] = 1000 * median(rounds) if rounds else none
    return row
