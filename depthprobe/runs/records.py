"""What a task finds: trials, or a table."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile
from torch import nn

from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import (
    LISTS,
    TrainingPopularity,
    exposure,
    list_metrics,
    metrics_from_ranks,
)
from depthprobe.files import complete_folder, write_json
from depthprobe.methods import Task, Trial
from depthprobe.models.build import save_trained
from depthprobe.models.recommender import Recommender
from depthprobe.probing.replace import Replacement, save_replacement
from depthprobe.runs.context import MODEL, PROBES, TRIALS
from depthprobe.training.checkpoint import Fit


@dataclass(frozen=True)
class Result:
    """What a trial found: test ranks by protocol, and the model and its training if it has one.

    Attributes:
        ranks: of every test user, (E,) by protocol; and under ``"top-10"`` the best items, (E, 10).
        training_flops: of its training, without its teacher's.
        taught: seconds that its teacher took before, training and features.
        replacement: the map that stands for blocks of the teacher, whose weights the trial shares.
    """

    trial: Trial
    ranks: dict[str, np.ndarray]
    parameters: dict[str, int]
    flops: int | None = None
    fit: Fit | None = None
    training_flops: int | None = None
    taught: float = 0.0
    model: nn.Module | None = None
    replacement: Replacement | None = None

    @property
    def prompt(self) -> str | None:
        """``shared``, ``repeated`` or ``none``; None for what has no model of its own."""
        return self.model.prompt_mode if isinstance(self.model, Recommender) else None


@dataclass(frozen=True)
class Scores:
    """A table that speaks of blocks, spans or users, where no trial does."""

    frame: pd.DataFrame


# One record a trial: complete, or absent.

SCHEMA = 1
RECORD, USERS, ITEMS, SCORES = "record.json", "users.parquet", "items.parquet", "scores.parquet"


def write_result(
    folder: Path,
    result: Result,
    users: np.ndarray,
    *,
    taken: TrainingPopularity,
    timing: dict[str, Any] | None,
    provenance: dict[str, Any],
    validation_users: int,
) -> None:
    """Write a finished trial, complete or not at all: users, items, model, the record last."""
    trial, fit = result.trial, result.fit
    ranks = {name: values for name, values in result.ranks.items() if name != LISTS}
    metrics = {protocol: metrics_from_ranks(values) for protocol, values in ranks.items()}
    lists = result.ranks.get(LISTS, np.zeros((0, 0), np.int32))
    counts = exposure(lists, len(taken.popularity))  # (I,)
    metrics["full"] |= list_metrics(counts, taken)
    training = None
    validation = None
    if fit is not None:
        training = {
            "epochs": fit.epochs,
            "steps": fit.steps,
            "seconds": round(fit.seconds, 3),
            "teacher_seconds": round(result.taught, 3),
            "flops": result.training_flops,
            "processes": fit.processes,
            "parts": fit.parts,
            "reused": fit.reused,
            "resumed_at": fit.resumed_at,
            "best_epoch": fit.best_epoch,
            "losses": fit.losses,
            "validation": fit.scores,
        }
        validation = {"NDCG@10": fit.best_score, "users": validation_users}
    record = _record(trial, "done", None, provenance) | {
        "metrics": {"test": metrics},
        "validation": validation,
        "costs": {
            "parameters": result.parameters,
            "flops_user": result.flops,
            "prompt": result.prompt,
            "training": training,
            "timing": timing,
        },
    }
    with complete_folder(folder) as temporary:
        parts = [
            pd.DataFrame({"user": users.astype(np.int32), "protocol": name, "rank": values})
            for name, values in ranks.items()
        ]
        pd.concat(parts, ignore_index=True).to_parquet(temporary / USERS, index=False)
        shown = np.flatnonzero(counts)
        items = {"item": (shown + 1).astype(np.int32), "lists": counts[shown].astype(np.int32)}
        pd.DataFrame(items).to_parquet(temporary / ITEMS, index=False)
        if result.model is not None:
            save_trained(result.model, temporary / MODEL)
        if result.replacement is not None:
            save_replacement(result.replacement, temporary / MODEL)
        write_json(temporary / RECORD, record)


def write_scores(
    folder: Path, task: Task, scores: Scores, *, provenance: dict[str, Any], seconds: float
) -> None:
    """Write a task's table and its record, complete or not at all."""
    record = _table_record(task, "done", None, provenance) | {"seconds": round(seconds, 3)}
    with complete_folder(folder) as temporary:
        scores.frame.to_parquet(temporary / SCORES, index=False)
        write_json(temporary / RECORD, record)


def write_failure(folders: list[Path], task: Task, error: str, provenance: dict[str, Any]) -> None:
    """Write the records of a task that failed, with the reason in one line; what is done stays."""
    told = " ".join(error.split())
    nothing: dict[str, Any] = {"metrics": {}, "validation": None, "costs": None}
    records = [_record(t, "failed", told, provenance) | nothing for t in task.trials]
    records = records or [_table_record(task, "failed", told, provenance)]
    for folder, record in zip(folders, records, strict=True):
        if not is_done(folder):
            counted = record | {"attempts": attempts(folder) + 1}
            with complete_folder(folder) as temporary:
                write_json(temporary / RECORD, counted)


def is_done(folder: Path) -> bool:
    """Whether a trial has a record that says it succeeded."""
    record = read_record(folder)
    return record is not None and record["status"] == "done"


def state_of(folders: Sequence[Path]) -> Literal["done", "failed", "left"]:
    """Where a task is, by the folders that it leaves: ``failed`` if one of them says so."""
    found = [record["status"] if (record := read_record(each)) else "left" for each in folders]
    if all(status == "done" for status in found):
        return "done"
    return "failed" if "failed" in found else "left"


def attempts(folder: Path) -> int:
    """How often in a row what belongs in a folder has failed; 0 if it holds no failure."""
    record = read_record(folder)
    if record is None or record["status"] != "failed":
        return 0
    return int(record.get("attempts", 1))


def failures(run: Path) -> dict[str, int]:
    """The names of what has failed in a run, and how often: what a command may try once more."""
    every = [folder for place in (TRIALS, PROBES) for folder in folders_of(run / place)]
    return {folder.name: count for folder in every if (count := attempts(folder))}


def to_retry(folders: Sequence[Path], known: Mapping[str, int]) -> bool:
    """Whether all that a failed task left failed is as it was known: nobody has tried since."""
    found = {folder.name: attempts(folder) for folder in folders}
    return all(known.get(name) == count for name, count in found.items() if count)


def folders_of(place: Path) -> list[Path]:
    """What is in a folder of trials or probes, by name; nothing of one that is not there."""
    try:
        return [place / name for name in sorted(os.listdir(place))]
    except FileNotFoundError:
        return []


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record in a trial's folder; None if it is absent or damaged, so that it is made anew.

    One that is done without its table is damaged.
    """
    try:
        with open(os.path.join(folder, RECORD), encoding="utf-8") as file:
            record = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        return None
    tables = (os.path.join(folder, name) for name in (USERS, SCORES))
    if record["status"] == "done" and not any(map(os.path.exists, tables)):
        return None
    return record


def read_users(folder: Path, record: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By protocol, whom a finished trial ranked and the ranks of their targets, (U,) each.

    Raises:
        BadInput: if they can't be read, or don't give the metrics of the trial's record.
    """
    path, found = folder / USERS, {}
    try:
        # pandas would take five times as long, and a run may have ten thousand of these
        with ParquetFile(path, read_dictionary=["protocol"]) as file:
            table = file.read(use_threads=False).combine_chunks()
        users, ranks = table["user"].to_numpy(), table["rank"].to_numpy()
        kinds = table["protocol"].chunk(0)
        codes = kinds.indices.to_numpy()
        for code, protocol in enumerate(kinds.dictionary.to_pylist()):
            found[protocol] = users[codes == code], ranks[codes == code]
        for protocol, said in record.get("metrics", {}).get("test", {}).items():
            now = metrics_from_ranks(found[protocol][1])
            if any(abs(said.get(name, value) - value) > 1e-9 for name, value in now.items()):
                raise ValueError("other metrics than the record's")
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's fault, not the file's
        allowed = "as the sweep wrote it; delete its folder, and the same sweep makes it anew"
        raise BadInput("run", str(path), allowed) from error
    return found


def _table_record(
    task: Task, status: str, error: str | None, provenance: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": task.id,
        "method": task.method,
        "seed": task.seed,
        "status": status,
        "error": error,
        "provenance": provenance,
    }


def _record(
    trial: Trial, status: str, error: str | None, provenance: dict[str, Any]
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": trial.id,
        "method": trial.method,
        "kept": list(trial.kept),
        "removed": list(trial.removed),
        "depth": trial.depth,
        "seed": trial.seed,
        "status": status,
        "error": error,
        "provenance": provenance,
    }
