"""Share results of trainings between runs: files in a folder, named by a hash of their inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedConfig

from depthprobe.cost.timing import machine
from depthprobe.evaluation.ranks import EvalSet
from depthprobe.files import complete_folder
from depthprobe.methods import Trial
from depthprobe.runs.context import Context
from depthprobe.runs.processes import launched_processes
from depthprobe.study import Recipe, settings_of
from depthprobe.training.checkpoint import FORMAT, identity, tensors_digest, windows_digest
from depthprobe.training.features import FeatureSpec

RESULTS, FEATURES = "trainings", "features"
# keys of a configuration that do not change the model
NOT_DECIDING = ("_name_or_path", "transformers_version")


def result_file(
    context: Context, trial: Trial, objective: nn.Module, recipe: Recipe
) -> Path | None:
    """The cache's file for a training that is about to begin; None for a study without a cache.

    Its name is a hash of the initial weights, the settings of model and loss, the recipe, the seed,
    the training windows, the validation users, a followed teacher's weights, and the machine with
    its library versions, since the seconds of the training are stored too.
    """
    if context.cache is None:
        return None
    context.cache.mkdir(parents=True, exist_ok=True)
    study, settings = context.study, settings_of(context.study, trial.method)
    own, windows, processes = settings.method.settings, context.windows, launched_processes()
    follows = own == "distillation"
    # the decoders' configurations: dropout, for example, is no weight
    parts = (getattr(module, "config", None) for module in objective.modules())
    configs = {id(each): each for each in parts if isinstance(each, PreTrainedConfig)}
    decides = {
        "format": FORMAT,
        "training": identity(
            objective, windows, recipe=recipe, seed=trial.seed, processes=processes
        ),
        "weights": tensors_digest(objective.state_dict()),
        "configs": [
            {key: value for key, value in each.to_dict().items() if key not in NOT_DECIDING}
            for each in configs.values()
        ],
        "settings": asdict(getattr(settings, own, None) or getattr(study, own)) if own else None,
        "backbone": _backbone(context) if settings.method.reads_users else None,
        "teacher": context.teacher_digest(trial.seed, trial.blocks) if follows else None,
        "validation": eval_set_digest(context.validation),
        "machine": _machine(context),
    }
    return context.cache / RESULTS / f"{digest(decides)}.safetensors"


def features_folder(context: Context, teacher: str, spec: FeatureSpec) -> Path | None:
    """The cache's folder for a teacher's outputs, by its digest; None without a cache."""
    if context.cache is None:
        return None
    decides = {
        "teacher": teacher,
        "spec": asdict(spec),
        "windows": windows_digest(context.windows),
        "backbone": _backbone(context),
        "machine": _machine(context),
    }
    return context.cache / FEATURES / digest(decides)


def share_folder(source: Path, target: Path) -> None:
    """Copy a folder, with hard links if both places are on one disk."""

    def place(file: str, copy: str) -> None:
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)

    with complete_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=place, dirs_exist_ok=True)


def eval_set_digest(eval_set: EvalSet) -> str:
    """Hash of users, histories, targets, and items that are never ranked."""
    hashed = hashlib.sha256()
    rows = [*eval_set.histories, *(eval_set.seen or [])]
    for values in (eval_set.users, eval_set.targets, np.array([len(row) for row in rows]), *rows):
        hashed.update(np.asarray(values, dtype=np.int64).tobytes())
    return hashed.hexdigest()


def digest(content: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of plain values."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _backbone(context: Context) -> dict[str, Any]:
    settings = asdict(context.study.backbone)
    del settings["source"]  # the weights are hashed, not their path
    return settings


def _machine(context: Context) -> dict[str, Any]:
    return {key: value for key, value in machine(context.device).items() if key != "busy"}
