"""What trials and sweeps share is not deleted, lost or left behind by one of them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.errors import BadInput
from depthprobe.files import HOST
from depthprobe.methods import (
    METHODS,
    Method,
    Task,
    each_part,
    no_backbone,
    prefixes,
    register,
    walks_found,
)
from depthprobe.runs import layout, probing
from depthprobe.runs.context import Context, Result
from depthprobe.runs.plan import trial_of
from depthprobe.runs.records import read_manifest
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.training import FEATURES, teacher_for
from depthprobe.study import Study, load_study


def test_students_of_all_depths_and_variants_share_one_folder_of_features(
    small_run: Run, study: Study, tmp_path: Path
) -> None:
    """Else the second student would delete what the first one reads."""
    (tmp_path / "shared").mkdir()
    for name in ("data", "negatives.npy"):
        if (small_run.path / "shared" / name).exists():
            (tmp_path / "shared" / name).symlink_to(small_run.path / "shared" / name)
    (tmp_path / "trials").symlink_to(small_run.path / "trials")
    one = replace(study.variants["top"], distillation=None)  # a depth that no other student has
    variants = {
        **study.variants,
        "one": replace(one, select="0,2"),
        "two": replace(one, select="1"),
    }
    few = replace(study, layers="1", methods=("distill", "distill:one"), variants=variants)
    context = Context(tmp_path, few)
    students = [trial_of("distill", (0,), 0, 3), trial_of("distill:one", (0, 2), 0, 3)]
    for trial in students:
        teacher, seconds = teacher_for(context, trial)
        assert teacher is not None
        assert seconds > 0
    (folder,) = (tmp_path / "shared").glob(f"{FEATURES}-*-*")
    more = Context(tmp_path, replace(few, methods=(*few.methods, "distill:logits")))
    teacher_for(more, students[0])  # another sweep, which has more students
    assert folder.is_dir()
    stale = folder.with_name(folder.name.replace(context.teacher_digest(0, 3), "0" * 12))
    folder.rename(stale)
    teacher_for(context, students[0])
    assert not stale.exists()  # no such teacher is left


def test_a_killed_probe_leaves_a_folder_that_the_next_sweep_clears(
    small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(BaseException):
        pass

    def stop(*_: object, path: Path, **__: object) -> None:
        folders.append(path.parent.name)
        raise Stopped

    folders: list[str] = []
    context = Context(tmp_path, small_run.study)
    context.shared.mkdir()
    monkeypatch.setattr(context, "teacher", lambda seed, blocks: None)
    monkeypatch.setattr(Context, "training", None)
    monkeypatch.setattr(Context, "validation", None)
    monkeypatch.setattr(probing, "cache_states", stop)
    with pytest.raises(Stopped):
        list(probing.read_outs(context, Task("readout", 0, (), (), 3)))
    assert folders[0].startswith(f".tmp-{HOST}-")  # which `remove_leftovers` knows


def test_methods_that_another_sweep_adds_meanwhile_are_kept(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep reads study and manifest again once it is alone with the run."""
    folder = tmp_path / "run"
    run_sweep(replace(tiny, methods=("popularity",)), folder, jobs=0, command="first")
    real = layout._new_manifest

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(layout, "_new_manifest", real)
        run_sweep(replace(tiny, methods=("sasrec",)), folder, jobs=0, command="second")
        return real(*arguments)

    monkeypatch.setattr(layout, "_new_manifest", meanwhile)
    run_sweep(replace(tiny, methods=("popularity",)), folder, jobs=0, command="third")
    assert load_study(folder / "study.toml").methods == ("popularity", "sasrec")
    assert read_manifest(folder).command == "first\nsecond"
    assert set(open_run(folder).trials["trial"]) == {"popularity-s0", "sasrec-s0"}


def by_chance(context: Context, task: Task) -> Iterator[Result]:
    """Ranks that nobody has learnt."""
    ranks = np.random.default_rng(task.seed).integers(1, 40, len(context.test.users))
    yield Result(task.trials[0], {"full": ranks.astype(np.float64)}, {"total": 0})


def test_workers_know_the_methods_that_were_registered_here(tiny: Study, tmp_path: Path) -> None:
    register(Method(name="by-chance", role="baseline", run=by_chance, trials=no_backbone))
    register(Method(name="by-lambda", role="baseline", run=lambda context, task: iter(())))
    try:
        study = replace(tiny, methods=("popularity", "by-chance"))
        with pytest.raises(BadInput, match="expected --jobs 0, or functions that a module holds"):
            run_sweep(study, tmp_path / "run", jobs=1)
        del METHODS["by-lambda"]
        run = run_sweep(study, tmp_path / "run", jobs=1)
        assert run.failed == []
        assert set(run.trials["method"]) == {"popularity", "by-chance"}
        # of which methods are made
        for trials in (partial(prefixes, 1, -1), partial(each_part, "mlp")):
            method = Method(name="a", role="probe", run=by_chance, trials=trials)
            pickle.dumps(replace(method, work=partial(walks_found, 1)))
    finally:
        METHODS.pop("by-chance", None)
        METHODS.pop("by-lambda", None)
