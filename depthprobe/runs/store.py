"""Read a run: its records, the tables made from them, and its progress.

Importing this imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import time
import tomllib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from depthprobe.data.splits import make_split
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.data.storage import load_data
from depthprobe.errors import BadInput
from depthprobe.evaluation.slices import Family, families
from depthprobe.files import complete_file, digest_of
from depthprobe.runs.plan import plan
from depthprobe.runs.records import (
    DATA,
    LOGS,
    MANIFEST,
    NEVER,
    PROBES,
    SCORES,
    SHARED,
    STUDY,
    TABLES,
    TRIALS,
    Costs,
    CutShort,
    Manifest,
    Record,
    check_origin,
    check_places,
    damaged,
    folders_of,
    intact,
    origins_of,
    outputs_of,
    read_manifest,
    read_table,
    read_users,
    shared_file,
    state_of,
    write_manifest,
)
from depthprobe.runs.scheduler import held
from depthprobe.runs.tables import SLICES, metrics_table, read_slices
from depthprobe.study import Study, ranges, study_digest, study_from_dict

if TYPE_CHECKING:
    from depthprobe.runs.search import Found

PARTS = ("blocks", "token_embeddings", "adapters", "item_table", "total", "trainable")


class Run:
    """A run opened for reading: its study, its records, and tables made from them."""

    def __init__(self, path: Path, study: Study, manifest: Manifest) -> None:
        self.path, self.study, self.manifest = path, study, manifest
        self._origins = origins_of(manifest)

    @property
    def seen_items(self) -> str:
        """What happens to the items of a history: ``left out``, or ``ranked too``."""
        filtered = "left out" if self.study.protocol.filter_seen else "ranked too"
        return str(self.manifest.data.split.get("seen_items", filtered))  # older runs lack it

    @cached_property
    def records(self) -> list[Record]:
        """All records by name, done and failed; ``BadInput`` if one is damaged or foreign."""
        return self._read(TRIALS)

    def record(self, trial: str) -> Record:
        """The record of one trial; ``BadInput`` if the run has no such trial."""
        by_name = {record.id: record for record in self.records}
        if trial not in by_name:
            raise BadInput("trial", trial, f"one of {', '.join(by_name) or 'none yet'}")
        return by_name[trial]

    @cached_property
    def _probes(self) -> list[Record]:
        """The records of the tables of probes."""
        return self._read(PROBES)

    def _read(self, kind: str) -> list[Record]:
        read = [check_origin(each, self._origins) for each in folders_of(self.path / kind)]
        return [record for record in read if record is not None]

    def check(self) -> None:
        """Refuse damaged records, records of other runs, and links."""
        check_places(self.path)
        for kind in (TRIALS, PROBES):
            for each in folders_of(self.path / kind):
                with suppress(CutShort):  # a sweep makes it anew
                    check_origin(each, self._origins)

    @property
    def _done(self) -> list[Record]:
        return [record for record in self.records if record.done]

    @property
    def failed(self) -> list[tuple[str, str]]:
        """(trial, error) of each failed trial, and of each probe that failed."""
        return [(r.id, r.error or "") for r in (*self.records, *self._probes) if not r.done]

    def scores(self, method: str) -> pd.DataFrame:
        """The table of a probe that makes no trials, with the seed of its teacher.

        Empty if the run has no such table.
        """
        frames = [
            read_table(self.path / PROBES / record.id / SCORES, record.files.get(SCORES)).assign(
                seed=record.seed
            )
            for record in self._probes
            if record.method == method and record.done
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row per trial: what it is, its parameters, its training, its median times."""
        return pd.DataFrame([_trial_row(record) for record in self.records])

    @cached_property
    def users(self) -> pd.DataFrame:
        """Rank of each test user's target: trial, user, protocol, rank."""
        frames = [
            pd.DataFrame({"trial": record.id, "user": users, "protocol": protocol, "rank": ranks})
            for record in self._done
            for protocol, (users, ranks) in read_users(
                self.path / TRIALS / record.id, record
            ).items()
        ]
        if not frames:
            return pd.DataFrame(columns=["trial", "user", "protocol", "rank"])
        return pd.concat(frames, ignore_index=True)

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per trial, split, protocol, slice and metric: value, interval, users."""
        written = self.written_metrics()
        return self.compute_metrics() if written is None else written

    def written_metrics(self) -> pd.DataFrame | None:
        """The table on disk; None if it is unreadable or older than the records and slices."""
        path = self.path / TABLES[1]
        try:
            table = read_table(path, self.manifest.files.get(path.name))
        except (OSError, BadInput):
            return None
        # earlier versions did not write what the table was made from
        return table if table.attrs.get("records", self._digest) == self._digest else None

    @cached_property
    def _digest(self) -> str:
        """A hash of everything that the metrics table is made from."""
        content = [(r.id, r.status, r.metrics, r.validation) for r in self.records]
        asked = self.study.protocol.metric, self.study.protocol.level
        text = repr((content, self.manifest.slices, asked))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def compute_metrics(self) -> pd.DataFrame:
        """The metrics table, recomputed from every user's rank.

        Raises:
            BadInput: if a trial's ranks can't be read, or do not match its record.
            ValueError: if the metrics of a trial break the bounds between them.
        """
        users, cuts = self._cuts
        return metrics_table(self.path, self._done, users, cuts, self.study.protocol)

    @cached_property
    def slices(self) -> pd.DataFrame:
        """Which slice each test user is in: user, and one column a way to slice them.

        ``target`` is ``head``, ``middle``, ``tail`` or ``cold``, ``history`` the length of the
        history as ``5-8``; own columns that the study names follow. Without the run's prepared log
        there are no slices, and no rows.
        """
        users, cuts = self._cuts
        frame = pd.DataFrame({"user": users})
        for family in cuts:
            kinds = pd.CategoricalDtype(list(family.labels))
            frame[family.name] = pd.Categorical.from_codes(family.codes, dtype=kinds)
        return frame

    @cached_property
    def _cuts(self) -> tuple[np.ndarray, list[Family]]:
        """The test users, ascending, and the ways to slice them."""
        prepared = self.path / SHARED / DATA
        if not (prepared / DATA_MANIFEST).exists():
            return np.empty(0, np.int64), []
        log, own = (shared_file(self.path, self.manifest, name) for name in (DATA, SLICES))
        split = make_split(load_data(log), self.study.protocol)
        return split.test.users, families(split, read_slices(own.parent))


def open_run(path: str | Path) -> Run:
    """Open the folder of a run.

    Raises:
        BadInput: if it is no run, if another version of the format wrote it, or if its study is
            not the one that it began with.
    """
    folder = Path(path)
    if not (folder / MANIFEST).is_file() or not (folder / STUDY).is_file():
        allowed = f"a folder that sweep wrote ({MANIFEST} and {STUDY} in it)"
        raise BadInput("run", str(path), allowed)
    manifest, file = read_manifest(folder), intact(folder / STUDY, None, NEVER)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(file, error, NEVER) from None
    if manifest.studies and study_digest(content) not in manifest.studies:
        raise damaged(file, "another study than it was", NEVER)
    return Run(folder, study_from_dict(content), manifest)


def write_tables(run: Run) -> None:
    """Write trials.parquet and metrics.parquet from the records."""
    metrics = run.compute_metrics()
    metrics.attrs["records"] = run._digest
    # the metrics last: they name what both are made from
    for name, frame in zip(TABLES, (run.trials, metrics), strict=True):
        with complete_file(run.path / name, parents=False) as temporary:
            frame.to_parquet(temporary, index=False)
    run.__dict__.pop("metrics", None)
    run.manifest = read_manifest(run.path)
    run.manifest.files[TABLES[1]] = digest_of(run.path / TABLES[1])
    write_manifest(run.path, run.manifest)


def _trial_row(record: Record) -> dict[str, Any]:
    costs = record.costs or Costs()
    training, timing = costs.training, costs.timing or {}
    row: dict[str, Any] = {
        "trial": record.id,
        "method": record.method,
        "of": record.of,
        "depth": record.depth,
        "kept": ranges(record.kept),
        "removed": ranges(record.removed),
        "seed": record.seed,
        "status": record.status,
        "error": record.error,
    }
    numbers: dict[str, float | None] = {"flops_user": costs.flops_user}
    row |= {f"parameters_{name}": costs.parameters.get(name, math.nan) for name in PARTS}
    row |= {f"bytes_{name}": costs.bytes.get(name, math.nan) for name in PARTS[:-1]}
    for name in ("steps", "epochs", "learning_rate", "seconds", "teacher_seconds", "flops"):
        numbers[f"training_{name}"] = getattr(training, name, None)
    for name in ("train_step", "encode", "score", "latency"):
        rounds = timing[name].seconds if name in timing else ()
        numbers[f"{name}_ms"] = 1000 * median(rounds) if rounds else None
    return row | {name: math.nan if value is None else value for name, value in numbers.items()}


# --- how far a run is ----------------------------------------------------------------------------

TAIL = 4096  # bytes to read from the end of a log


@dataclass(frozen=True)
class Working:
    """A task that a living process works on: the last line of its log, and that line's age."""

    task: str
    line: str
    seconds: float


@dataclass(frozen=True)
class Status:
    """Tasks of a run by their state; ``counts`` are by method, in the order of the plan."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    working: list[Working] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # task, reason
    damaged: list[tuple[str, Exception]] = field(default_factory=list)  # what can't be read
    search: Found | None = None  # a search trains few of the tasks that are left

    def total(self, state: str) -> int:
        """How many tasks are ``done``, ``failed``, ``working``, ``left`` or ``damaged``."""
        return sum(count[state] for count in self.counts.values())


def status_of(folder: Path) -> Status:
    """The state of every task of a run's study; a damaged record affects only its own task.

    ``BadInput`` if the folder is no run, or has not been laid out yet.
    """
    if (folder / STUDY).is_file() and not (folder / MANIFEST).is_file():
        raise BadInput("run", str(folder), "a run that has begun (this one is being laid out)")
    from depthprobe.runs.search import find_out

    run = open_run(folder)
    status, at_work = Status(), {each.task: each for each in working(folder)}
    for task in plan(run.study, run.manifest.backbone.blocks):
        outputs = outputs_of(folder, task)
        try:
            state: str = state_of(outputs)
            records = [check_origin(path, run._origins) for path in outputs]
        except (BadInput, OSError) as error:
            state, records = "damaged", []
            status.damaged.append((task.id, error))
        if state in {"failed", "left"} and task.id in at_work:
            state = "working"
            status.working.append(at_work[task.id])
        elif state == "failed":
            reason = next((each.error for each in records if each and each.error), "")
            status.failed.append((task.id, " ".join(reason.split())))
        status.counts.setdefault(task.method, Counter())[state] += 1
    if run.study.searches and not status.damaged:
        found = find_out(folder, run.study, run.manifest.backbone.blocks)
        return replace(status, search=found)
    return status


def working(folder: Path) -> list[Working]:
    """The tasks of living processes on any machine, found by the locks that they hold."""
    found = []
    for name in held(folder):
        log = folder / LOGS / f"{name}.log"
        try:
            intact(log, None, "")
            with log.open("rb") as file:
                file.seek(max(0, log.stat().st_size - TAIL))
                lines = file.read().decode("utf-8", errors="replace").strip().splitlines()
            age = time.time() - log.stat().st_mtime
        except (OSError, BadInput):
            lines, age = [], 0.0
        found.append(Working(name, _without_time(lines[-1]) if lines else "", max(0.0, age)))
    return found


def _without_time(line: str) -> str:
    words = line.split(" ", 2)
    return words[2] if len(words) == 3 and words[0].count("-") == 2 else line
