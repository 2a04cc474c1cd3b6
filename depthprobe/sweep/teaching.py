"""What the students of a study follow: their teacher's features, computed once for all of them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock

from depthprobe.files import complete_folder, write_json
from depthprobe.study import base_of, parse_layers, settings_of
from depthprobe.sweep.cache import features_folder, share_folder
from depthprobe.sweep.context import Context
from depthprobe.sweep.plan import Trial
from depthprobe.training.distillation import wanted_features
from depthprobe.training.features import (
    CachedTeacher,
    OnlineTeacher,
    Teacher,
    Wanted,
    write_features,
)

FEATURES, SECONDS = "teacher-features", "seconds.json"


def teacher_for(context: Context, trial: Trial) -> tuple[Teacher | None, float]:
    """What a student asks, and the seconds that it took to compute; None if it asks nothing.

    Raises:
        BadInput: if there is no trained teacher.
    """
    settings = settings_of(context.study, trial.method)
    wanted = wanted_features(
        settings.distillation, settings.recipe, depth=trial.depth, teacher_depth=trial.blocks
    )
    if not (wanted.ends or wanted.vectors or wanted.top):
        return None, 0.0
    if settings.distillation.features == "online":
        return OnlineTeacher(context.teacher(trial.seed, trial.blocks), wanted), 0.0
    folder = _features(context, trial, wanted)
    seconds = json.loads((folder / SECONDS).read_text(encoding="utf-8"))["seconds"]
    return CachedTeacher(folder, context.windows, wanted), float(seconds)


def _features(context: Context, trial: Trial, wanted: Wanted) -> Path:
    """The folder of the features of all students of a seed; made by whoever comes first.

    It is named by what it depends on, the teacher's weights among it: features of another teacher
    than that of the record are never read.
    """
    whole = _of_all_students(context, trial, wanted)
    mark = context.teacher_mark(trial.seed, trial.blocks)
    origin = json.dumps(asdict(whole)) + mark
    digest = hashlib.sha256(origin.encode()).hexdigest()[:12]
    stem = f"{FEATURES}-s{trial.seed}-{whole.objective}-"
    folder = context.shared / f"{stem}{digest}"
    with FileLock(context.shared / f".{stem}lock"):
        if folder.exists():
            return folder
        for stale in context.shared.glob(f"{stem}*"):
            shutil.rmtree(stale)
        kept = features_folder(context, mark, whole)
        if kept is not None and kept.is_dir():
            context.log(f"what the teacher of seed {trial.seed} says, from the cache")
            share_folder(kept, folder)
            return folder
        context.log(f"what the teacher of seed {trial.seed} says, for all students")
        teacher, windows = context.teacher(trial.seed, trial.blocks), context.windows
        began = time.perf_counter()
        with complete_folder(folder) as temporary:
            write_features(teacher, windows, whole, folder=temporary, device=context.device)
            write_json(temporary / SECONDS, {"seconds": time.perf_counter() - began})
        if kept is not None:
            with suppress(OSError):  # others' gain is no reason to end this trial
                share_folder(folder, kept)
    return folder


def _of_all_students(context: Context, trial: Trial, wanted: Wanted) -> Wanted:
    """What the students of the study ask together, where they are compared at the same places."""
    study, asked = context.study, [wanted]
    for method in study.methods:
        if base_of(method) == "distill":
            settings = settings_of(study, method)
            depths = {*parse_layers(settings.layers, trial.blocks), trial.depth}
            asked += [
                wanted_features(
                    settings.distillation, settings.recipe, depth=d, teacher_depth=trial.blocks
                )
                for d in depths
                if d < trial.blocks
            ]
    asked = [each for each in asked if each.objective == wanted.objective]
    return Wanted(
        objective=wanted.objective,
        ends=tuple(sorted({end for each in asked for end in each.ends})),
        vectors=any(each.vectors for each in asked),
        top=max(each.top for each in asked),
    )
