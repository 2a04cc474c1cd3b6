"""The typed files of a run's folder: the only reader and writer of records and manifest.

Every file that a number depends on has a digest, which is checked when it is read. A JSON file ends
with its own. A record names the digests of the files beside it, and the manifest those of the
shared files. Files of versions without digests are not checked.

Importing this imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np
import pandas as pd
from msgspec import Meta, Struct
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.files import complete_file, complete_folder, digest_of
from depthprobe.methods import Task, Trial

Status = Literal["done", "failed"]
FULL = "full"  # the protocol that ranks the whole catalogue
SCHEMA = 1  # of records and manifest; raise it when the meaning of a key changes
STUDY, MANIFEST, TABLES = "study.toml", "manifest.json", ("trials.parquet", "metrics.parquet")
TRIALS, PROBES, SHARED, LOGS, LOCKS = "trials", "probes", "shared", "logs", ".locks"
CHECKPOINTS = "checkpoints"
PLACES = (".", TRIALS, PROBES, CHECKPOINTS, SHARED, "tables", "figures")
# in the folder of a trial or of a probe's table
RECORD, MODEL = "record.json", "model"
USERS, ITEMS, SCORES = "users.parquet", "items.parquet", "scores.parquet"
# in the folder of what all trials share
DATA, NEGATIVES, TIMING, ITEM_TABLE = "data", "negatives.npy", "timing.json", "item-table.npy"
# what messages advise for a damaged file
AGAIN = "delete its folder, and the same sweep makes it anew"
ALONE = "delete it, and the same sweep makes it anew"
NEVER = "bring back the file as it was, or begin anew in another folder"
SEAL = b',\n "digest": "'  # how the last line of a JSON file begins

T = TypeVar("T")
Origins = Mapping[str, Sequence[str | None]]
Blocks = Annotated[int, Meta(ge=1, le=10_000)]


# --- the manifest: what all trials of a run share ------------------------------------------------


class Facts(Struct):
    """A table of the manifest; its values can be read by attribute or by key."""

    def __getitem__(self, key: str) -> Any:
        """The value of a key."""
        if key not in self.__struct_fields__:
            raise KeyError(key)
        return getattr(self, key)


class Dataset(Facts):
    """The log that a run began with."""

    name: str
    users: int
    items: int
    interactions: int
    fingerprint: str
    warnings: list[str] = []
    statistics: dict[str, Any] = {}
    cleaning: list[dict[str, Any]] = []  # what each step kept
    split: dict[str, Any] = {}


class BackboneFacts(Facts):
    """The backbone that a run began with; ``revision`` is a commit or a hash.

    ``precision`` is the one that ``recipe.precision = "auto"`` chose. ``prompt`` has the token ids
    before and after the items. ``words`` is a hash of the items' tokens, if histories are titles.
    """

    source: str
    revision: str | None
    blocks: Blocks
    width: int
    family: str
    parameters: int
    dtype: str = ""
    precision: Literal["float32", "bfloat16"] = "float32"
    prompt: list[list[int]] | None = None
    words: str | None = None


class ItemTable(Facts):
    """Where the item embeddings come from; the hash is of a table that all seeds share."""

    source: str
    width: int
    trained: bool = False
    sha256: str | None = None


class Machine(Facts):
    """The machine that a run began on."""

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
        studies: hashes of the study, as it was begun and with the variants that were added.
        slices: the columns by which the test's users are sliced, of users and of items.
        timing: the conditions under which every depth was timed.
        files: digests of what all trials share, and of the table of metrics.
    """

    schema: int = SCHEMA
    study_hash: str
    studies: list[str] = []
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
    files: dict[str, str] = {}
    digest: str | None = None


# --- records: one trial, or one table of a probe -------------------------------------------------


class Provenance(Struct):
    """The study, data, weights, code and machine that a record comes from."""

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

    ``tried`` has the best validation NDCG@10 of each learning rate, None if it diverged, and
    ``tuning_seconds`` the time of all but the best. Only seed 0 tries several rates.
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
    threads: list[int] = []  # when begun, and each time when resumed
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
    """What a trial costs; ``flops_user`` is for a user with a median history.

    ``bytes`` are those of the weights as served, by the parts of ``parameters``.
    """

    parameters: dict[str, int] = {}
    bytes: dict[str, int] = {}
    flops_user: int | None = None
    prompt: str | None = None
    training: TrainingCosts | None = None
    timing: dict[str, Rounds] | None = None


class Record(Struct, kw_only=True):
    """The record of a trial, done or failed, or of a probe's table.

    Attributes:
        of: the trial whose trained model it is a variant of.
        metrics: by split, protocol and name.
        seconds: that a probe's table took.
        files: digests of the files beside the record.
        digest: of the record itself.
    """

    schema: int = SCHEMA
    id: str
    method: str
    of: str | None = None
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
    files: dict[str, str] = {}
    digest: str | None = None

    @property
    def done(self) -> bool:
        """Whether the trial succeeded."""
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
    with _new_folder(folder) as temporary:
        users.to_parquet(temporary / USERS, index=False)
        items.to_parquet(temporary / ITEMS, index=False)
        save(temporary / MODEL)
        record.files = digests_in(temporary)
        _write(temporary / RECORD, record)


def replace_times(folder: Path, timing: dict[str, Rounds] | None) -> None:
    """Replace the measured times of a finished trial."""
    record = read_record(folder)
    if record is not None and record.done and record.costs is not None:
        record.costs.timing = timing
        _write(folder / RECORD, record)


def write_scores(
    folder: Path, task: Task, frame: pd.DataFrame, *, provenance: Provenance, seconds: float
) -> None:
    """Write a task's table and its record, complete or not at all."""
    with _new_folder(folder) as temporary:
        frame.to_parquet(temporary / SCORES, index=False)
        record = record_of(task, provenance, seconds=round(seconds, 3))
        record.files = digests_in(temporary)
        _write(temporary / RECORD, record)


def write_failure(folders: list[Path], task: Task, error: str, provenance: Provenance) -> None:
    """Record that a task failed, with the reason in one line; finished trials stay."""
    parts: Sequence[Trial | Task] = task.trials or (task,)
    for folder, trial in zip(folders, parts, strict=True):
        if not is_done(folder):
            reason = " ".join(error.split())
            record = record_of(trial, provenance, status="failed", error=reason)
            with _new_folder(folder) as temporary:
                _write(temporary / RECORD, record)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Write a folder into a run; a run that was moved or deleted is not made again."""
    folder.parent.mkdir(exist_ok=True)
    with complete_folder(folder, parents=False) as temporary:
        yield temporary


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a run, atomically."""
    _write(folder / MANIFEST, manifest)


def _write(path: Path, content: Struct) -> None:
    # numpy's floats become Python's; through json, since msgspec writes a NaN as null
    values = msgspec.to_builtins(content, enc_hook=lambda value: value.item())
    del values["digest"]
    write_sealed(path, values)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Strict JSON (a NaN is an error), atomically; the last key is a digest of all before it."""
    body = json.dumps(content, indent=1, allow_nan=False).encode().removesuffix(b"\n}")
    with complete_file(path, parents=False) as temporary:
        temporary.write_bytes(_sealed(body))


def digests_in(folder: Path) -> dict[str, str]:
    """Digests of all files of a folder, by their paths in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): digest_of(path) for path in files}


def _sealed(body: bytes) -> bytes:
    return b'%b%b%b"\n}\n' % (body, SEAL, hashlib.sha256(body).hexdigest()[:32].encode())


def record_of(
    trial: Trial | Task, provenance: Provenance, *, status: Status = "done", **more: Any
) -> Record:
    """The record of a trial, or of a task that leaves a table."""
    if isinstance(trial, Trial):
        more |= {"kept": trial.kept, "removed": trial.removed, "depth": trial.depth}
        more["of"] = trial.of
    return Record(
        id=trial.id,
        method=trial.method,
        seed=trial.seed,
        status=status,
        provenance=provenance,
        **more,
    )


# --- reading -------------------------------------------------------------------------------------


def damaged(path: Path, why: object, remedy: str, kind: type[BadInput] = BadInput) -> BadInput:
    """The error for a file that was changed or damaged."""
    text = str(path)
    shown = text if len(text) <= 110 else f"...{text[-107:]}"  # its end says which it is
    reason = " ".join(str(why).split())[:100]
    return kind("run", shown, f"a readable {path.name}, as the sweep wrote it ({reason}; {remedy})")


class CutShort(BadInput):
    """A file that holds no JSON, for example after a full disk: nothing of it can be used."""


def intact(path: Path, digest: str | None, remedy: str) -> Path:
    """The path of a file, after a check: ``BadInput`` if it is no file or its digest differs."""
    if not path.is_file():  # of a pipe nothing would ever come
        raise damaged(path, "it is no plain file, or missing", remedy)
    if digest is not None and digest_of(path) != digest:
        raise damaged(path, "it was changed", remedy)
    return path


def read_sealed(path: str | Path, remedy: str, schema: int | None = None) -> dict[str, Any]:
    """What :func:`write_sealed` wrote, with its digest.

    Args:
        schema: the version of the format.

    Raises:
        FileNotFoundError: if there is no such file.
        CutShort: if it holds no JSON.
        BadInput: if it is not as it was written, or of another version.
    """
    if not os.path.isfile(path) and os.path.lexists(path):  # of a pipe nothing would ever come
        raise damaged(Path(path), "it is no plain file", remedy)
    # a run may have ten thousand of these: a Path would take longer than the decoding
    with open(path, "rb") as file:
        text = file.read()
    try:
        content = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise damaged(Path(path), error, remedy, CutShort) from None
    if schema is not None and (found := content.get("schema", schema)) != schema:
        allowed = f"a file of format {schema} (this one has format {found}: read it with"
        raise BadInput("run", str(path), f"{allowed} the version of depthprobe that wrote it)")
    if content.get("digest") is not None and text != _sealed(text.rpartition(SEAL)[0]):
        raise damaged(Path(path), "it was changed", remedy)
    return content


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a run; ``BadInput`` if it is damaged, or of another version of the format."""
    path = folder / MANIFEST
    return typed(read_sealed(path, NEVER, SCHEMA), Manifest, path, NEVER)


def read_record(folder: Path) -> Record | None:
    """The record in a trial's folder; None if it is absent, or done without its table.

    ``BadInput`` if it is damaged, another trial's, or of another version of the format.
    """
    path = os.path.join(folder, RECORD)
    try:
        content = read_sealed(path, AGAIN, SCHEMA)
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        raise damaged(folder, "it is no folder", "move it out of the run") from None
    record = typed(content, Record, path, AGAIN)
    name = os.path.basename(folder)
    if record.id != name:
        raise damaged(folder, f"the record in it is of {record.id}", "move it out of the run")
    has_table = any(os.path.exists(os.path.join(folder, name)) for name in (USERS, SCORES))
    return record if has_table or not record.done else None


def origins_of(manifest: Manifest) -> Origins:
    """The origins that a run's records may have, by the keys of their provenance.

    Runs of earlier versions did not record with which studies they began or went on.
    """
    data, backbone = [manifest.data.fingerprint], [manifest.backbone.revision]
    return {"study": [*manifest.studies], "data": data, "backbone": backbone}


def check_origin(folder: Path, origins: Origins) -> Record | None:
    """The record in a trial's folder, if any; ``BadInput`` if of another study, log or backbone."""
    record = read_record(folder)
    if record is not None and record.provenance is not None:
        for what, known in origins.items():
            if known and getattr(record.provenance, what) not in known:
                raise damaged(folder / RECORD, f"its {what} is not that of the run", AGAIN)
    return record


def shared_file(run: Path, manifest: Manifest | None, name: str) -> Path:
    """The path of a file or folder that all trials share; ``BadInput`` if it has changed."""
    place = f"{SHARED}/{name}"
    for each, digest in manifest.files.items() if manifest else ():
        if each == place or each.startswith(f"{place}/"):
            intact(run / each, digest, ALONE)
    return run / place


def typed(content: dict[str, Any], kind: type[T], path: str | Path, remedy: str) -> T:
    """Convert the content of a JSON file; ``BadInput`` if it does not fit the type."""
    try:
        return msgspec.convert(content, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise damaged(Path(path), error, remedy) from None


def read_table(path: Path, digest: str | None) -> pd.DataFrame:
    """Read a table of a trial or a probe; ``BadInput`` if it was changed."""
    with _named(intact(path, digest, AGAIN)):
        return pd.read_parquet(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn a library's error about a file that it can't read into one line with the file's name."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a fault of the disk, not of the file
        raise damaged(path, error, AGAIN) from error


def read_users(folder: Path, record: Record) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By protocol, the users that a finished trial ranked and their targets' ranks, (U,) each.

    ``BadInput`` if they can't be read, or do not give the metrics of the trial's record.
    """
    path, ranked = intact(folder / USERS, record.files.get(USERS), AGAIN), {}
    with _named(path):
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
    return ranked


def folders_of(place: Path) -> list[Path]:
    """The folders of trials or probes, sorted by name; empty if the place does not exist."""
    try:
        with os.scandir(place) as entries:
            return [place / name for name in sorted(each.name for each in entries if each.is_dir())]
    except FileNotFoundError:
        return []


def check_places(run: Path) -> None:
    """Refuse links, pipes and devices: a sweep would write outside the run, or wait for ever."""
    for place in (*PLACES, LOGS, LOCKS):
        with suppress(FileNotFoundError), os.scandir(run / place) as entries:
            for each in entries:
                is_own = each.is_file(follow_symlinks=False) or (
                    place != LOGS and each.is_dir(follow_symlinks=False)
                )
                if not is_own and os.path.lexists(each.path):  # or it was another sweep's
                    raise damaged(Path(each.path), "it is no plain file", "move it out of the run")


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
    """The state of a task by the folders that it leaves: ``failed`` if one of them failed.

    A record that was cut short counts as missing.
    """
    states = ["left"] * len(folders)
    for place, each in enumerate(folders):
        with suppress(CutShort):
            record = read_record(each)
            states[place] = "left" if record is None else record.status
    if all(status == "done" for status in states):
        return "done"
    return "failed" if "failed" in states else "left"


def forget_failures(folders: Iterable[Path]) -> None:
    """Delete the records of failures, so that the trials run again."""
    for folder in folders:
        if state_of([folder]) == "failed":
            (folder / RECORD).unlink(missing_ok=True)
