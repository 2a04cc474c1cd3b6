"""What a run's folder holds, typed once: the only reader and writer of records and manifest.

Importing this imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd
from msgspec import Struct
from pyarrow.parquet import ParquetFile

from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.files import complete_folder, write_json
from depthprobe.methods import Task, Trial

Status = Literal["done", "failed"]
FULL = "full"  # the protocol that ranks the whole catalogue
SCHEMA = 1  # of records and manifest; raise it when the meaning of a key changes
STUDY, MANIFEST, TABLES = "study.toml", "manifest.json", ("trials.parquet", "metrics.parquet")
TRIALS, PROBES, SHARED, LOGS = "trials", "probes", "shared", "logs"
# in the folder of a trial or of a probe's table
RECORD, MODEL = "record.json", "model"
USERS, ITEMS, SCORES = "users.parquet", "items.parquet", "scores.parquet"
# in the folder of what all trials share
DATA, NEGATIVES, TIMING, ITEM_TABLE = "data", "negatives.npy", "timing.json", "item-table.npy"


# --- the manifest: what all trials of a run share ------------------------------------------------


class Facts(Struct):
    """What a table of the manifest holds, by attribute; or by key, as in the JSON file."""

    def __getitem__(self, key: str) -> Any:
        """The value of a key."""
        if key not in self.__struct_fields__:
            raise KeyError(key)
        return getattr(self, key)


class Dataset(Facts):
    """The log that a run was begun with."""

    name: str
    users: int
    items: int
    interactions: int
    fingerprint: str
    warnings: list[str] = []
    statistics: dict[str, Any] = {}
    cleaning: list[dict[str, Any]] = []  # what each step left
    split: dict[str, Any] = {}


class BackboneFacts(Facts):
    """The backbone that a run was begun with; ``revision`` is a commit or a hash."""

    source: str
    revision: str | None
    blocks: int
    width: int
    family: str
    parameters: int
    dtype: str = ""


class ItemTable(Facts):
    """Where the item embeddings come from; the hash is of a table that all seeds share."""

    source: str
    width: int
    trained: bool = False
    sha256: str | None = None


class Machine(Facts):
    """What a run was begun on."""

    device: str = ""
    gpu: str | None = None
    cpu: str = ""
    cores: int | None = None
    memory_gib: float | None = None
    system: str = ""

    @property
    def name(self) -> str:
        """The accelerator, else the processor."""
        return self.gpu or self.cpu or self.device


class Git(Facts):
    """The code's checkout."""

    commit: str | None = None
    dirty: bool = False


class Sampled(Facts):
    """How the negatives of sampled ranking were drawn."""

    negatives: str
    seed: int


class Manifest(Facts, kw_only=True):
    """What all trials of a run share, and where it comes from.

    Attributes:
        slices: the columns by which the test's users are sliced, of users and of items.
        timing: the conditions under which every depth was timed.
    """

    schema: int = SCHEMA
    study_hash: str
    created: str
    command: str | None = None
    data: Dataset
    item_table: ItemTable
    slices: dict[str, list[str]] | None = None
    machine: Machine
    versions: dict[str, str]
    git: Git | None = None
    timing: dict[str, Any] | None = None
    wall_seconds: float = 0.0
    backbone: BackboneFacts
    sampled: Sampled | None = None


# --- records: one trial, or one table of a probe -------------------------------------------------


class Provenance(Struct):
    """Which study, data, weights, code and machine a record comes from."""

    study: str
    data: str
    backbone: str | None
    git: Git | None
    versions: dict[str, str]
    device: str
    device_type: str
    threads: int


class Validation(Struct):
    """The best validation score, and over how many users."""

    ndcg: float = msgspec.field(name="NDCG@10")
    users: int


class TrainingCosts(Struct):
    """What a training took and how it went; ``losses`` and ``validation`` are by epoch.

    ``tried`` has the best validation NDCG@10 by learning rate, None where the loss diverged, and
    ``tuning_seconds`` the time of those that were not the best: a grid is searched at seed 0.
    """

    epochs: int
    steps: int
    seconds: float
    teacher_seconds: float = 0.0
    flops: int | None = None
    processes: int = 1
    parts: int = 1  # that a batch was computed in
    reused: bool = False  # from the cache
    resumed_at: list[int] = []  # steps
    best_epoch: int = 0
    losses: list[float] = []
    validation: list[float] = []
    learning_rate: float | None = None
    tried: dict[str, float | None] = {}
    tuning_seconds: float = 0.0


class Rounds(Struct):
    """Seconds of each round of a measurement."""

    seconds: list[float]


class Costs(Struct):
    """What a trial takes; ``flops_user`` is of a user with a median history."""

    parameters: dict[str, int] = {}
    flops_user: int | None = None
    prompt: str | None = None
    training: TrainingCosts | None = None
    timing: dict[str, Rounds] | None = None


class Record(Struct, kw_only=True):
    """One trial, done or failed; or the table of a probe, which keeps no blocks of its own.

    Attributes:
        metrics: by split, protocol and name.
        seconds: that a table took.
    """

    schema: int = SCHEMA
    id: str
    method: str
    kept: tuple[int, ...] = ()
    removed: tuple[int, ...] = ()
    depth: int = 0
    seed: int
    status: Status
    error: str | None = None
    provenance: Provenance | None = None
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    validation: Validation | None = None
    costs: Costs | None = None
    seconds: float | None = None

    @property
    def done(self) -> bool:
        """Whether it succeeded."""
        return self.status == "done"

    @property
    def training(self) -> TrainingCosts | None:
        """What its training took, if it had one."""
        return self.costs.training if self.costs else None


# --- writing -------------------------------------------------------------------------------------


def write_trial(
    folder: Path,
    record: Record,
    *,
    users: pd.DataFrame,
    items: pd.DataFrame,
    save: Callable[[Path], None],
) -> None:
    """Write a finished trial, complete or not at all.

    ``users`` has the rank of each test user's target, ``items`` how many users' best items hold an
    item; ``save`` writes the trial's model, if it has one, into a folder that it makes.
    """
    with complete_folder(folder) as temporary:
        users.to_parquet(temporary / USERS, index=False)
        items.to_parquet(temporary / ITEMS, index=False)
        save(temporary / MODEL)
        _write(temporary / RECORD, record)


def write_scores(
    folder: Path, task: Task, frame: pd.DataFrame, *, provenance: Provenance, seconds: float
) -> None:
    """Write a task's table and its record, complete or not at all."""
    with complete_folder(folder) as temporary:
        frame.to_parquet(temporary / SCORES, index=False)
        _write(temporary / RECORD, record_of(task, provenance, seconds=round(seconds, 3)))


def write_failure(folders: list[Path], task: Task, error: str, provenance: Provenance) -> None:
    """Write the records of a task that failed, with the reason in one line; what is done stays."""
    parts: Sequence[Trial | Task] = task.trials or (task,)
    for folder, trial in zip(folders, parts, strict=True):
        if not is_done(folder):
            reason = " ".join(error.split())
            record = record_of(trial, provenance, status="failed", error=reason)
            with complete_folder(folder) as temporary:
                _write(temporary / RECORD, record)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a run, atomically."""
    _write(folder / MANIFEST, manifest)


def _write(path: Path, content: Struct) -> None:
    # numpy's floats become Python's; through json, since msgspec writes a NaN as null
    write_json(path, msgspec.to_builtins(content, enc_hook=lambda value: value.item()))


def record_of(
    trial: Trial | Task, provenance: Provenance, *, status: Status = "done", **more: Any
) -> Record:
    """The record of a trial, or of a task that leaves a table."""
    if isinstance(trial, Trial):
        more |= {"kept": trial.kept, "removed": trial.removed, "depth": trial.depth}
    return Record(
        id=trial.id,
        method=trial.method,
        seed=trial.seed,
        status=status,
        provenance=provenance,
        **more,
    )


# --- reading -------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run.

    Raises:
        BadInput: if it can't be read, or another version of the format wrote it.
    """
    try:
        content = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=dict[str, Any])
        if content.get("schema") == SCHEMA:
            return msgspec.convert(content, Manifest)
    except msgspec.MsgspecError as error:
        raise BadInput("run", str(folder), f"readable {MANIFEST} ({error})") from None
    allowed = f"a run of format {SCHEMA} (this one has format {content.get('schema')}: read it with"
    raise BadInput("run", str(folder), f"{allowed} the version of depthprobe that wrote it)")


def read_record(folder: Path) -> Record | None:
    """The record in a trial's folder; None if it is absent or damaged, so that it is made anew.

    One that is done without its table is damaged, and so is one of another version.
    """
    try:
        # a run may have ten thousand of these: a Path would take longer than the decoding
        with open(os.path.join(folder, RECORD), "rb") as file:
            record = msgspec.json.decode(file.read(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None
    has_table = any(os.path.exists(os.path.join(folder, name)) for name in (USERS, SCORES))
    return record if record.schema == SCHEMA and (has_table or not record.done) else None


def read_users(folder: Path, record: Record) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By protocol, whom a finished trial ranked and the ranks of their targets, (U,) each.

    Raises:
        BadInput: if they can't be read, or don't give the metrics of the trial's record.
    """
    path, ranked = folder / USERS, {}
    try:
        # pandas would take five times as long, and a run may have ten thousand of these
        with ParquetFile(path, read_dictionary=["protocol"]) as file:
            table = file.read(use_threads=False).combine_chunks()
        users, ranks = table["user"].to_numpy(), table["rank"].to_numpy()
        kinds = table["protocol"].chunk(0)
        codes = kinds.indices.to_numpy()
        for code, protocol in enumerate(kinds.dictionary.to_pylist()):
            ranked[protocol] = users[codes == code], ranks[codes == code]
        for protocol, recorded in record.metrics.get("test", {}).items():
            now = metrics_from_ranks(ranked[protocol][1])
            if any(abs(recorded.get(name, value) - value) > 1e-9 for name, value in now.items()):
                raise ValueError("other metrics than the record's")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        allowed = (
            "the file that the sweep wrote (delete its folder, and the same sweep makes it anew)"
        )
        raise BadInput("run", str(path), allowed) from error
    return ranked


def folders_of(place: Path) -> list[Path]:
    """What is in a folder of trials or probes, by name; nothing of one that is not there."""
    try:
        return [place / name for name in sorted(os.listdir(place))]
    except FileNotFoundError:
        return []


def outputs_of(run: Path, task: Task) -> list[Path]:
    """The folders that a task leaves in a run, each complete or absent."""
    if not task.trials:
        return [run / PROBES / task.id]
    return [run / TRIALS / trial.id for trial in task.trials]


# --- the state of a task, by what it left --------------------------------------------------------


def is_done(folder: Path) -> bool:
    """Whether a trial has a record that says it succeeded."""
    return state_of([folder]) == "done"


def state_of(folders: Sequence[Path]) -> Literal["done", "failed", "left"]:
    """Where a task is, by the folders that it leaves: ``failed`` if one of them says so."""
    states = [record.status if (record := read_record(each)) else "left" for each in folders]
    if all(status == "done" for status in states):
        return "done"
    return "failed" if "failed" in states else "left"


def forget_failures(folders: Iterable[Path]) -> None:
    """Delete the records of failures: what failed is tried again."""
    for folder in folders:
        record = read_record(folder)
        if record is not None and not record.done:
            (folder / RECORD).unlink(missing_ok=True)
