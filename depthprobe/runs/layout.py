"""What all trials of a run share: study, log, item table, and where they come from."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from depthprobe.data.batches import negatives
from depthprobe.data.prepared import read_data
from depthprobe.data.splits import Split, make_split
from depthprobe.data.storage import MANIFEST as DATA_MANIFEST
from depthprobe.data.storage import Sequences, load_data, write_data
from depthprobe.errors import BadInput, check_writable
from depthprobe.files import complete_file, remove_leftovers
from depthprobe.methods import Task, method_order
from depthprobe.models.backbones import pinned, pinned_now, pretrained_config
from depthprobe.models.item_tables import TEXT, make_table, table_hash
from depthprobe.runs import provenance
from depthprobe.runs.context import (
    CHECKPOINTS,
    DATA,
    ITEM_TABLE,
    LEARNED,
    NEGATIVES,
    PROBES,
    TRIALS,
)
from depthprobe.runs.plan import plan
from depthprobe.runs.progress import Progress
from depthprobe.runs.records import (
    MANIFEST,
    BackboneFacts,
    Dataset,
    ItemTable,
    Manifest,
    Sampled,
    read_manifest,
    write_manifest,
)
from depthprobe.runs.store import STUDY
from depthprobe.runs.tables import asked_slices, own_slices
from depthprobe.study import Study, differences, load_study, study_to_toml
from depthprobe.training.tracking import check_trackers

NEGATIVE_SEED = 999
TOO_SMALL = "sampled ranking is left out: some user has fewer than 999 items left to draw from"
# where an interrupted process may leave something half-written
PLACES = (".", TRIALS, PROBES, CHECKPOINTS, "shared", "tables", "figures")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a sweep reads and checks before it writes anything.

    Attributes:
        study: with the methods and variants that the run has already.
        working: the same, but for the commit that the backbone's branch or tag stands for.
        before: the manifest of the run that is continued; None where a run begins.
        slices: own columns of the test users that the run does not have; None if it needs none.
        config: of the backbone's decoder.
    """

    study: Study
    working: Study
    before: Manifest | None
    tasks: list[Task]
    split: Split
    slices: pd.DataFrame | None
    config: PreTrainedConfig

    @property
    def blocks(self) -> int:
        """Of the whole backbone."""
        return int(self.config.num_hidden_layers)


def read_inputs(study: Study, folder: Path) -> Inputs:
    """Read what a sweep of a study into a folder needs, but for the item table.

    The tasks are those that the study itself asks for.

    Raises:
        BadInput: if a tracker, the cache, the data, the backbone or the depths can't be used, or
            the folder holds another study.
    """
    check_trackers(study.tracking.to)
    if study.cache is not None:
        check_writable("cache", Path(study.cache).expanduser())
    asked, study = study, continued(folder, study)
    before = manifest_before(folder)
    recorded = None if before is None else before.backbone.revision
    backbone = pinned_now(pinned(study.backbone, recorded))
    config = pretrained_config(backbone).get_text_config(decoder=True)
    tasks = plan(asked, int(config.num_hidden_layers))
    # refuses a log in which nobody can be asked
    split = make_split(read_log(study, folder), study.protocol)
    return Inputs(
        study=study,
        working=replace(study, backbone=backbone),
        before=before,
        tasks=tasks,
        split=split,
        slices=new_slices(study, split, before),
        config=config,
    )


def continued(folder: Path, study: Study) -> Study:
    """The study with the methods that the run has already; refuses any other difference."""
    # what begins with a dot, another sweep that is laying the run out may have there for a moment
    taken = folder.exists() and not folder.is_dir()
    if not taken and not any(entry.name[0] != "." for entry in _entries(folder)):
        return study
    if not (folder / STUDY).is_file():
        raise BadInput("output", str(folder), "a new or empty folder, or an earlier run")
    # it is written first: a sweep that was killed right then has left nothing else
    before = load_study(folder / STUDY)
    changed = differences(before, study)
    if changed:
        allowed = f"another folder, or the study it began with ({'; '.join(changed)})"
        raise BadInput("output", str(folder), allowed)
    methods = {*before.methods, *study.methods}
    ordered = tuple(sorted(methods, key=method_order))
    variants = {**before.variants, **study.variants}
    return replace(study, name=before.name, methods=ordered, variants=variants)


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def manifest_before(folder: Path) -> Manifest | None:
    """The manifest of the run that is continued; None where a run begins."""
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def check_same_inputs(
    folder: Path, before: Manifest | None, manifest: Manifest, revision: str
) -> None:
    """Refuse to mix records of other data, weights or embeddings under the same names."""
    if before is None:
        return
    for name, was, now in (
        ("data", before.data.fingerprint, manifest.data.fingerprint),
        ("backbone", before.backbone.revision, revision),
        ("item table", before.item_table.sha256, manifest.item_table.sha256),
    ):
        if was != now:
            allowed = f"another folder: the {name} has changed since this run began"
            raise BadInput("output", str(folder), allowed)
    for name in ("created", "wall_seconds", "timing", "backbone"):
        setattr(manifest, name, getattr(before, name))


def repeating(folder: Path, study: Study, command: str | None, so_far: str | None) -> str | None:
    """The lines that do a continued run again: those so far, and this one if it asks for more."""
    had, asked = {*load_study(folder / STUDY).methods}, {*study.methods}
    if command is None or had >= asked:
        return so_far
    return command if asked >= had or so_far is None else f"{so_far}\n{command}"


def new_slices(study: Study, split: Split, before: Manifest | None) -> pd.DataFrame | None:
    """The own columns of the slices, read; None if the run has them already, or needs none."""
    had = {"user": [], "item": []} if before is None else before.slices
    same = had is not None and asked_slices(study.protocol) == had
    return None if same else own_slices(study.protocol, split)


def read_log(study: Study, folder: Path) -> Sequences:
    """The log that the run was begun with, or the source, read but not yet written."""
    prepared = folder / "shared" / DATA
    if study.data.source == "embedded" and (prepared / DATA_MANIFEST).is_file():
        return load_data(prepared)
    return read_data(study.data)


def shared_table(
    study: Study, sequences: Sequences, folder: Path, device: torch.device, watcher: Progress
) -> Tensor | None:
    """The item table that all trials share, not yet written; None where each seed has its own."""
    if study.item_table in {"sasrec", LEARNED}:
        return None
    written = folder / "shared" / ITEM_TABLE
    if study.item_table == TEXT and written.is_file():
        return torch.from_numpy(np.load(written))
    return make_table(
        study.item_table,
        study.backbone,
        sequences.item_ids.tolist(),
        sequences.titles,
        device=device,
        say=watcher.message,
    )


def lay_out(
    folder: Path, study: Study, split: Split, table: Tensor | None, manifest: Manifest
) -> None:
    """Write what trials share; a folder that has it already is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    tidy(folder)
    shared = folder / "shared"
    drawn = _draw_negatives(study, split, shared)
    manifest.sampled = None
    if drawn is not None or (shared / NEGATIVES).exists():
        manifest.sampled = Sampled(study.protocol.negatives, NEGATIVE_SEED)
    elif study.protocol.sampled:
        manifest.data.warnings.append(TOO_SMALL)
    with complete_file(folder / STUDY) as temporary:
        temporary.write_text(study_to_toml(study), encoding="utf-8")
    write_manifest(folder, manifest)
    if not (shared / DATA / DATA_MANIFEST).is_file():
        write_data(split.sequences, shared / DATA)
    if table is not None and not (shared / ITEM_TABLE).exists():
        with complete_file(shared / ITEM_TABLE) as temporary:
            np.save(temporary, table.numpy())
    if drawn is not None:
        with complete_file(shared / NEGATIVES) as temporary:
            np.save(temporary, drawn)


def tidy(folder: Path) -> None:
    """Delete what processes that are no more left half-written."""
    for place in PLACES:
        remove_leftovers(folder / place)


def _draw_negatives(study: Study, split: Split, shared: Path) -> np.ndarray | None:
    """The sampled protocol's negatives, (E, 999), if they are wanted, not there, and can be had."""
    if not study.protocol.sampled or (shared / NEGATIVES).exists():
        return None
    popular = study.protocol.negatives == "popularity"
    pool = split.sequences.items[split.trained] if popular else None
    return negatives(split.sequences, split.test.users, seed=NEGATIVE_SEED, pool=pool)


def new_manifest(
    study: Study,
    split: Split,
    table: Tensor | None,
    backbone: BackboneFacts,
    device: torch.device,
    command: str | None,
) -> Manifest:
    """The manifest of a run that begins."""
    sequences = split.sequences
    return Manifest(
        study_hash=study.digest(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=command,
        data=Dataset(
            name=sequences.name,
            users=sequences.n_users,
            items=sequences.n_items,
            interactions=sequences.n_interactions,
            fingerprint=sequences.fingerprint,
            warnings=[*sequences.warnings, *split.warnings],
            statistics=sequences.statistics,
            cleaning=[asdict(step) for step in sequences.cleaning],
            split=split.statistics,
        ),
        item_table=ItemTable(
            source=study.item_table,
            width=_table_width(study) if table is None else table.shape[1],
            trained=study.trains_items,
            sha256=None if table is None else table_hash(table),
        ),
        slices=asked_slices(study.protocol),
        machine=provenance.machine(device),
        versions=provenance.versions(),
        git=provenance.git_state(),
        backbone=backbone,
    )


def _table_width(study: Study) -> int:
    return study.sasrec.width if study.item_table == "sasrec" else study.item_width
