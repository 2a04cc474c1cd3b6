"""A search in a run: what it trains and in what order, killed, continued, cut short, refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from depthprobe.errors import BadInput
from depthprobe.evaluation.search import Search as State
from depthprobe.evaluation.search import Step
from depthprobe.runs import search as searching
from depthprobe.runs.plan import plan
from depthprobe.runs.records import write_failure
from depthprobe.runs.search import Found, find_out, plan_search
from depthprobe.runs.store import Run, open_run, status_of
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Protocol, Search, Study, override
from tests.runs.conftest import Recorder

METHODS = ("popularity", "sasrec", "full", "readout", "finetune")


@pytest.fixture(scope="session")
def searched(study: Study) -> Study:
    """A margin so wide that a depth of three blocks may be shown with three seeds."""
    wide = Protocol(margin=0.9, resamples=100)
    return replace(study, layers="find", methods=METHODS, seeds=3, protocol=wide, variants={})


@pytest.fixture(scope="session")
def found_run(searched: Study, shared_folder: Callable[..., Path]) -> Run:
    folder = shared_folder("found", lambda folder: run_sweep(searched, folder, jobs=0))
    return open_run(folder)


def finds(run: Run) -> Found:
    return find_out(run.path, run.study, run.manifest.backbone.blocks)


def trained(run: Run) -> set[Step]:
    own = run.trials[run.trials["method"].isin(["full", "finetune"])]
    return {Step(int(d), int(s)) for d, s in zip(own["depth"], own["seed"], strict=True)}


def test_it_trains_what_its_history_says_and_no_more(found_run: Run) -> None:
    found = finds(found_run)
    assert {*found.history.steps} == trained(found_run)
    assert found.history.states[-1] == found.state
    assert found.state.next is None
    assert Step(3, 0) in trained(found_run)  # the teacher
    assert len(trained(found_run)) < 9
    # the probes that predict are of the first seed alone
    assert {*found_run.trials.query("method == 'readout'")["seed"]} == {0}


def test_predictions_are_of_validation_users(found_run: Run) -> None:
    run, found = found_run, finds(found_run)
    score = {r.depth: r.validation.ndcg for r in run.records if r.method == "readout"}
    best = max(min(1, score[d] / score[3]) for d in (1, 2))
    assert found.predicted[2] == pytest.approx(1 - 0.5 * (1 - best))
    assert score[3] != pytest.approx(
        run.record("readout-d03-s0").metrics["test"]["full"]["NDCG@10"]
    )


def test_a_killed_search_goes_on_to_the_same_end(
    found_run: Run, searched: Study, tmp_path: Path, recorder: Recorder
) -> None:
    shutil.copytree(found_run.path, tmp_path / "run")
    steps = finds(found_run).history.steps
    for step in steps[2:]:
        method = "full" if step.depth == 3 else "finetune"
        shutil.rmtree(tmp_path / "run" / "trials" / f"{method}-d{step.depth:02d}-s{step.seed}")
    again = run_sweep(searched, tmp_path / "run", jobs=0, progress=recorder)
    assert finds(again).history.steps == steps
    ended = [line.split()[0] for line in recorder.ended]
    assert ended == [f"{'full' if d == 3 else 'finetune'}-d{d:02d}-s{s}"
                     for d, s in ((step.depth, step.seed) for step in steps[2:])]  # fmt: skip
    assert recorder.texts[-1].startswith("shown: ")
    assert "ended: " in recorder.texts[-1]


def test_what_a_full_sweep_trained_is_used(study: Study, searched: Study, tmp_path: Path) -> None:
    full = replace(searched, layers="1,2", seeds=2)
    before = trained(run_sweep(full, tmp_path / "run", jobs=0))
    assert len(before) == 6
    run = run_sweep(replace(searched, seeds=2), tmp_path / "run", jobs=0)
    assert trained(run) == before  # nothing was left to train
    assert run.study.layers == "find"
    with pytest.raises(BadInput, match="layers: 'find' -> '1,2'"):  # it stays a search
        run_sweep(full, tmp_path / "run", jobs=0)


def test_what_fails_is_left_out(found_run: Run, tmp_path: Path) -> None:
    shutil.copytree(found_run.path, tmp_path / "run")
    run, tasks = open_run(tmp_path / "run"), plan(found_run.study, 3)
    task = next(task for task in tasks if task.id == "finetune-d01-s0")
    place = run.path / "trials" / task.id
    origin = run.record("full-d03-s0").provenance
    shutil.rmtree(place, ignore_errors=True)
    write_failure([place], task, "out of memory", origin)
    assert Step(1, 0) in finds(run).lost
    asked = plan_search(run.path, run.study, tasks, 3)
    assert task not in asked.tasks


def asked_in(run: Run, study: Study) -> searching.Asked:
    return plan_search(run.path, study, plan(study, 3), 3)


def test_a_budget_ends_it(found_run: Run, tmp_path: Path) -> None:
    shutil.copytree(found_run.path, tmp_path / "run")
    run, last = open_run(tmp_path / "run"), finds(found_run).history.steps[-1]
    name = f"{'full' if last.depth == 3 else 'finetune'}-d{last.depth:02d}-s{last.seed}"
    shutil.rmtree(run.path / "trials" / name)
    assert [task.id for task in asked_in(run, run.study).tasks] == [name]
    short = replace(run.study, search=Search(hours=1e-6))
    cut = asked_in(run, short)
    assert not cut.tasks
    assert cut.words.endswith("would exceed search.hours = 1e-06")
    assert "looking at" not in cut.words


def test_too_few_hours_are_refused_before_a_training(searched: Study, tmp_path: Path) -> None:
    short = replace(searched, search=Search(hours=1e-6))
    with pytest.raises(BadInput, match=r"search.hours: expected at least .* for one teacher"):
        run_sweep(short, tmp_path / "run", jobs=0)
    assert not [*(tmp_path / "run").glob("trials/*")]


def test_a_record_that_was_cut_short_is_made_anew(found_run: Run, tmp_path: Path) -> None:
    shutil.copytree(found_run.path, tmp_path / "run")
    last = finds(found_run).history.steps[-1]
    name = f"{'full' if last.depth == 3 else 'finetune'}-d{last.depth:02d}-s{last.seed}"
    (tmp_path / "run/trials" / name / "record.json").write_text("")
    asked = plan_search(tmp_path / "run", found_run.study, plan(found_run.study, 3), 3)
    assert [task.id for task in asked.tasks] == [name]


def test_the_share_of_a_sweep_ends_it(found_run: Run) -> None:
    trained = {2: {0: np.ones(5), 1: np.ones(5)}, 3: {seed: np.ones(5) for seed in range(3)}}
    found = replace(finds(found_run), trained=trained)
    state = State(None, {2: 2}, (), {2: 0.5}, {2: 2}, None)

    def ended(state: State, **changes: object) -> str:
        changed = replace(found, **changes)  # type: ignore[arg-type]
        vars(changed)["state"] = state
        return changed.ended

    assert ended(state) == "one more training would exceed 70 % of a full sweep"
    stands = "nothing more is likely to change the verdict"
    assert ended(replace(state, odds={2: 0.1})) == stands
    assert ended(state, lost=frozenset({Step(2, 2)})) == stands


def test_a_teacher_below_popularity_ends_it(
    found_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = searching.find_out
    monkeypatch.setattr(
        searching, "find_out", lambda *given: replace(real(*given), popularity=0.99)
    )
    asked = asked_in(found_run, found_run.study)
    assert not asked.tasks
    assert "ended: the teacher is no better than popularity (NDCG@10 0." in asked.words
    assert "looking at" not in asked.words


def test_the_words_of_progress(found_run: Run) -> None:
    found = finds(found_run)
    begun = replace(found, trained={3: {0: found.trained[3][0]}})
    assert begun.words.startswith("shown: none yet; looking at ")
    assert begun.words.endswith("(seed 1 of 3)")
    bare = replace(found, trained={})
    assert bare.words == "shown: none yet; looking at the teacher (seed 1 of 3)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("popularity", "full")}, "layers: expected finetune, heal or distill beside"),
        ({"search.method": "heal"}, "search.method: expected one of finetune, got 'heal'"),
        ({"layers": "find:3"}, "layers: expected some depth below 3, all blocks of"),
        ({"layers": "find:9"}, "layers: expected depths from 1 to 3"),
        ({"protocol.margin": 0.0}, "protocol.margin: expected a number above 0"),
    ],
)
def test_refused(searched: Study, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        run_sweep(override(searched, **changes), tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_other_methods_keep_to_the_ends(searched: Study) -> None:
    more = replace(searched, methods=(*METHODS, "random-init", "heal"))
    depths: dict[str, set[int]] = {}
    for task in plan(more, 3):
        depths.setdefault(task.method, set()).update(trial.depth for trial in task.trials)
    assert depths["finetune"] == {1, 2}
    assert depths["random-init"] == {3}
    assert "heal" not in depths
    # what a search trains again with each seed, and what that needs
    assert {task.method for task in plan(more, 3) if task.seed} == {"sasrec", "full", "finetune"}


def test_status_says_how_far_it_is(found_run: Run) -> None:
    state = status_of(found_run.path)
    assert state.search is not None
    assert state.search.words == finds(found_run).words
    assert "ended: nothing more" in state.search.words


def test_among_some_depths(searched: Study) -> None:
    tasks = plan(replace(searched, layers="find:1"), 3)
    assert {t.trials[0].depth for t in tasks if t.method == "finetune"} == {1}
