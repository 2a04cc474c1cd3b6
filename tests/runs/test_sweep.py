"""A whole run: complete, consistent with oracles, resumable, and refused where it must be."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from transformers import RwkvConfig, RwkvForCausalLM

from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate
from depthprobe.methods import METHODS
from depthprobe.report.page import build_report
from depthprobe.runs import layout
from depthprobe.runs import sweep as runner
from depthprobe.runs.context import Context
from depthprobe.runs.plan import trial_of
from depthprobe.runs.records import TIMING
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Study, study_to_toml
from depthprobe.training.checkpoint import Checkpoint, Progress
from depthprobe.training.distributed import Engine


def ranks(run: Run, trial: str, protocol: str = "full") -> np.ndarray:
    users = run.users
    chosen = users[(users["trial"] == trial) & (users["protocol"] == protocol)]
    return chosen["rank"].to_numpy()


def test_every_trial_is_done(small_run: Run) -> None:
    assert not small_run.failed
    counts = small_run.trials.groupby("method").size().to_dict()
    assert counts == {
        "popularity": 1,
        "sasrec": 2,
        "full": 2,
        "early-exit": 6,
        "early-exit-raw": 6,
        "readout": 8,
        "tuned-lens": 6,
        "skip": 6,
        "span": 4,
        "interval": 4,
        "greedy": 4,
        "drop-attention": 6,
        "drop-mlp": 6,
        "replace": 4,
        "replace-cosine": 4,
        "mix": 4,
        "finetune": 4,
        "heal": 4,
        "distill": 4,
        "elastic": 6,
        "random-init": 6,
        "random-selection": 4,
        "finetune:angular": 4,
        "heal:greedy": 4,
        "distill:logits": 4,
        "distill:top": 2,
    }


def test_each_task_has_a_log_with_its_epochs(small_run: Run) -> None:
    log = (small_run.path / "logs" / "full-d03-s0.log").read_text(encoding="utf-8")
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d epoch 1/\d+  loss \d", log, re.MULTILINE)
    assert "begun by process" in log


def test_models_on_disk_give_the_ranks_of_the_record(small_run: Run) -> None:
    context = Context(small_run.path, small_run.study)
    trials = [
        trial_of("full", (0, 1, 2), 1, 3),
        trial_of("heal", (0, 1), 0, 3),
        trial_of("distill", (0,), 1, 3),
        trial_of("random-init", (0, 1, 2), 0, 3),
    ]
    for trial in trials:
        found = evaluate(context.trained(trial), context.test, device=context.device)
        np.testing.assert_array_equal(found["full"], ranks(small_run, trial.id))


def test_seeds_differ_and_learning_helps(small_run: Run) -> None:
    assert not np.array_equal(ranks(small_run, "full-d03-s0"), ranks(small_run, "full-d03-s1"))
    scores = small_run.metrics.query("split == 'test' and protocol == 'full' and metric == 'HR@10'")
    scores = scores[scores["slice"] == "all"]
    mean = scores.groupby("method")["value"].mean()
    assert mean["sasrec"] > mean["popularity"]
    assert mean["full"] > mean["popularity"]


def test_costs_grow_with_depth(small_run: Run) -> None:
    trials = small_run.trials.set_index("trial")
    sizes = trials.loc[["finetune-d01-s0", "finetune-d02-s0", "full-d03-s0"]]
    assert sizes["parameters_blocks"].is_monotonic_increasing
    assert sizes["flops_user"].is_monotonic_increasing
    for name in ("train_step_ms", "encode_ms", "score_ms", "latency_ms"):
        assert (sizes[name] > 0).all()
    raw = small_run.record("full-d03-s0").costs.timing["encode"].seconds
    assert len(raw) == small_run.study.cost.rounds


def test_the_baselines_alone_wait_for_no_depths_times_and_later_methods_get_them(
    tiny: Study, tmp_path: Path
) -> None:
    folder, tiny = tmp_path / "run", replace(tiny, layers="1")
    run_sweep(tiny, folder, jobs=0)
    measured = json.loads((folder / "shared" / TIMING).read_text())["seconds"]
    assert measured.keys() == {"score", "encode:sasrec", "train:sasrec"}
    run = run_sweep(replace(tiny, methods=("finetune",)), folder, jobs=0)
    assert run.record("finetune-d01-s0").costs.timing["encode"].seconds


def test_a_second_sweep_runs_only_what_is_missing(
    small_run: Run, tmp_path: Path, recorder: Any
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_run.path, copy)
    shutil.rmtree(copy / "trials" / "finetune-d01-s1")
    (copy / "trials" / ".tmp-left").mkdir()
    damaged = copy / "trials" / "popularity-s0" / "record.json"
    damaged.write_text(damaged.read_text()[:-30])
    again = run_sweep(small_run.study, copy, jobs=0, progress=recorder)
    assert recorder.planned == ["popularity-s0", "finetune-d01-s1"]
    assert recorder.ended == ["popularity-s0 done", "finetune-d01-s1 done"]
    assert not (copy / "trials" / ".tmp-left").exists()
    # the same numbers to the bit, by a process that has done other things before
    np.testing.assert_array_equal(
        ranks(again, "finetune-d01-s1"), ranks(small_run, "finetune-d01-s1")
    )
    run_sweep(small_run.study, copy, jobs=0, progress=recorder)
    assert recorder.planned == []


def test_a_changed_study_is_refused_with_the_differences(small_run: Run) -> None:
    changed = replace(small_run.study, layers="1", item_width=3)
    with pytest.raises(BadInput, match="layers: '1,2' -> '1'; item_width: 64 -> 3"):
        run_sweep(changed, small_run.path, jobs=0)


def test_a_run_grows_by_methods(tiny: Study, tmp_path: Path, recorder: Any) -> None:
    one = run_sweep(replace(tiny, methods=("popularity",)), tmp_path / "run", jobs=0)
    before = ranks(one, "popularity-s0")
    both = run_sweep(replace(tiny, methods=("sasrec",)), one.path, jobs=0, progress=recorder)
    assert recorder.ended == ["sasrec-s0 done"]
    assert both.study.methods == ("popularity", "sasrec")
    assert set(both.metrics["trial"]) == {"popularity-s0", "sasrec-s0"}
    np.testing.assert_array_equal(ranks(both, "popularity-s0"), before)


def test_a_run_grows_by_seeds_to_the_same_numbers(
    tiny: Study, tmp_path: Path, recorder: Any
) -> None:
    study = replace(tiny, methods=("popularity", "sasrec", "finetune"), layers="1")
    grown = run_sweep(study, tmp_path / "grown", jobs=0, command="one")
    more = replace(study, seeds=2, protocol=replace(study.protocol, margin=0.05, resamples=200))
    grown = run_sweep(more, grown.path, jobs=0, command="two", progress=recorder)
    assert recorder.planned == ["sasrec-s1", "finetune-d01-s1"]
    assert study_to_toml(grown.study) == study_to_toml(replace(more, name="small"))
    assert grown.manifest.command == "two"
    whole = run_sweep(more, tmp_path / "whole", jobs=0)
    pd.testing.assert_frame_equal(grown.metrics, whole.metrics)
    pd.testing.assert_frame_equal(grown.users, whole.users)


def test_a_run_keeps_its_seeds_where_fewer_are_asked(
    tiny: Study, tmp_path: Path, recorder: Any
) -> None:
    run = run_sweep(replace(tiny, seeds=2), tmp_path / "run", jobs=0)
    again = run_sweep(tiny, run.path, jobs=0, progress=recorder)
    assert (again.study.seeds, recorder.planned) == (2, [])
    assert "the run keeps its 2 seeds: --seeds 1 is fewer" in recorder.texts


def test_intervals_are_made_anew_where_resamples_change(tiny: Study, tmp_path: Path) -> None:
    run = run_sweep(tiny, tmp_path / "run", jobs=0)
    before = run.metrics
    protocol = replace(tiny.protocol, resamples=1000)
    after = run_sweep(replace(tiny, protocol=protocol), run.path, jobs=0).metrics
    pd.testing.assert_series_equal(before["value"], after["value"])
    assert (before["ci_low"] != after["ci_low"]).any()


def test_the_command_of_a_run_makes_all_of_it(tiny: Study, tmp_path: Path) -> None:
    def swept(command: str, *methods: str, seeds: int = 1) -> str:
        few = replace(tiny, methods=methods, seeds=seeds)
        run = run_sweep(few, tmp_path / "run", jobs=0, command=command)
        return str(run.manifest.command)

    assert swept("first", "popularity") == "first"
    assert swept("again", "popularity") == "first"  # it adds nothing
    assert swept("more", "sasrec") == "first\nmore"  # neither does it alone
    assert swept("part", "popularity") == "first\nmore"
    assert swept("seeds", "sasrec", seeds=2) == "first\nmore\nseeds"
    assert swept("whole", "popularity", "sasrec", "full", seeds=2) == "whole"


def test_changed_data_are_refused(tiny: Study, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    shutil.copy(tiny.data.source, log)
    study = replace(tiny, data=replace(tiny.data, source=str(log)))
    run_sweep(study, tmp_path / "run", jobs=0)
    log.write_text(log.read_text() + "u99 i1 i2 i3 i4 i5\n")
    with pytest.raises(BadInput, match="the data has changed"):
        run_sweep(study, tmp_path / "run", jobs=0)


def test_a_backbone_that_can_not_be_cut_is_refused_before_anything_is_written(
    study: Study, tmp_path: Path
) -> None:
    config = RwkvConfig(vocab_size=259, hidden_size=8, num_hidden_layers=2)
    RwkvForCausalLM(config).save_pretrained(tmp_path / "rwkv")
    backbone = replace(study.backbone, source=str(tmp_path / "rwkv"), prompt="")
    few = replace(study, backbone=backbone, methods=("finetune",), layers="1", variants={})
    with pytest.raises(BadInput, match="cannot be cut: it rescales its weights"):
        run_sweep(few, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_run_is_refused_and_left_alone(tiny: Study, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="output"):
        run_sweep(tiny, tmp_path, jobs=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_bad_backbone_writes_nothing(tiny: Study, tmp_path: Path) -> None:
    source = tmp_path / "backbone"
    shutil.copytree(tiny.backbone.source, source)
    (source / "model.safetensors").unlink()
    study = replace(tiny, backbone=replace(tiny.backbone, source=str(source)))
    with pytest.raises(BadInput):
        run_sweep(study, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_a_trial_that_fails_is_recorded_and_tried_again_if_asked(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorder: Any
) -> None:
    def fail(context: object, task: object) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setitem(METHODS, "popularity", replace(METHODS["popularity"], run=fail))
        run = run_sweep(tiny, tmp_path / "run", jobs=0)
    assert [trial for trial, _ in run.failed] == ["popularity-s0"]
    assert "MemoryError: no room" in run.failed[0][1]
    assert open_run(tmp_path / "run").trials.set_index("trial").loc["sasrec-s0", "status"] == "done"
    left = run_sweep(tiny, tmp_path / "run", jobs=0, progress=recorder)
    assert recorder.planned == []
    assert len(left.failed) == 1
    again = run_sweep(tiny, tmp_path / "run", jobs=0, progress=recorder, retry_failed=True)
    assert recorder.planned == ["popularity-s0"]
    assert not again.failed


class Killed(BaseException):
    """No fault that anybody catches."""


@pytest.mark.parametrize("place", ["write_manifest", "write_data"])
def test_a_sweep_killed_while_it_is_laid_out_begins_again(
    place: str, tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(layout, place, kill)
        with pytest.raises(Killed):
            run_sweep(tiny, tmp_path / "run", jobs=0)
    assert (tmp_path / "run" / "study.toml").exists()
    assert not run_sweep(tiny, tmp_path / "run", jobs=0).failed


def test_a_sweep_killed_before_its_tables_leaves_none_that_are_out_of_date(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_sweep(tiny, tmp_path / "whole", jobs=0)
    folder = tmp_path / "cut"
    run_sweep(replace(tiny, methods=("popularity",)), folder, jobs=0)

    def kill(run: Run) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(runner, "write_tables", kill)
        with pytest.raises(Killed):
            run_sweep(tiny, folder, jobs=0)
    assert open_run(folder).metrics.equals(whole.metrics)
    assert set(pd.read_parquet(folder / "metrics.parquet")["trial"]) == {"popularity-s0"}
    run_sweep(tiny, folder, jobs=0)
    assert pd.read_parquet(folder / "metrics.parquet").equals(whole.metrics)


def test_tables_that_were_damaged_are_derived_anew(tiny: Study, tmp_path: Path) -> None:
    run = run_sweep(tiny, tmp_path / "run", jobs=0)
    whole = pd.read_parquet(run.path / "metrics.parquet")
    for damage in (b"", b"PAR1", (run.path / "metrics.parquet").read_bytes()[4:]):
        (run.path / "metrics.parquet").write_bytes(damage)
        assert open_run(run.path).metrics.equals(whole)
    again = run_sweep(tiny, run.path, jobs=0)
    assert pd.read_parquet(again.path / "metrics.parquet").equals(whole)


def test_ranks_that_are_missing_are_made_anew_and_others_refused(
    tiny: Study, tmp_path: Path, recorder: Any
) -> None:
    run = run_sweep(tiny, tmp_path / "run", jobs=0)
    users = run.path / "trials" / "sasrec-s0" / "users.parquet"
    before, written = run.users, pd.read_parquet(users)
    users.unlink()
    again = run_sweep(tiny, run.path, jobs=0, progress=recorder)
    assert recorder.ended == ["sasrec-s0 done"]
    assert again.users.equals(before)
    for damaged in (
        written.assign(rank=written["rank"] + 1),
        written.assign(rank=0.0),
        written.drop(columns="rank"),
    ):
        damaged.to_parquet(users, index=False)
        (run.path / "metrics.parquet").unlink(missing_ok=True)
        with pytest.raises(BadInput, match=r"delete its folder.*sasrec-s0/users.parquet"):
            run_sweep(tiny, run.path, jobs=0)
    users.write_bytes(b"PAR1")
    with pytest.raises(BadInput, match=r"delete its folder.*sasrec-s0/users.parquet"):
        open_run(run.path).users.equals(before)
    shutil.rmtree(users.parent)
    assert run_sweep(tiny, run.path, jobs=0).users.equals(before)


@pytest.mark.slow
def test_worker_processes_give_the_same_numbers(
    study: Study, small_run: Run, tmp_path: Path
) -> None:
    few = replace(study, methods=("finetune",), layers="1")
    run = run_sweep(few, tmp_path / "run", jobs=2)
    assert not run.failed
    for trial in ("sasrec-s1", "finetune-d01-s0"):
        np.testing.assert_array_equal(ranks(run, trial), ranks(small_run, trial))


def test_the_report_of_a_real_run(small_run: Run, tmp_path: Path) -> None:
    """The page stands on real records, and says who ran out of epochs."""
    copy = shutil.copytree(small_run.path, tmp_path / "run", ignore=lambda *_: ["model"])
    page = build_report(open_run(copy)).read_text(encoding="utf-8")
    cut_off = re.search(r"best at its last epoch: (.*?)\.", page)
    named = cut_off[1].split(", ") if cut_off else []
    for name, trial in (("teacher 3", "full-d03"), ("SASRec", "sasrec")):
        best = [small_run.record(f"{trial}-s{s}").costs.training.best_epoch for s in (0, 1)]
        assert (name in named) == (3 in best)
    for word in ("random init", "fine-tuned", "distilled", "healed", "SASRec"):
        assert word in page


def test_a_sweep_cut_short_goes_on_in_the_middle_of_a_training(
    tiny: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_sweep(tiny, tmp_path / "whole", jobs=0)
    steps = whole.record("sasrec-s0").costs.training.steps
    write = Checkpoint.write

    def write_and_die(self: Checkpoint, engine: Engine, progress: Progress, best: Any) -> None:
        write(self, engine, progress, best)
        if progress.fit.steps == steps - 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "is_due", lambda self: True)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(tiny, tmp_path / "cut", jobs=0)
    assert (tmp_path / "cut" / "checkpoints" / "sasrec-s0.safetensors").is_file()
    again = run_sweep(tiny, tmp_path / "cut", jobs=0)
    trained = again.record("sasrec-s0").costs.training
    assert trained.resumed_at == [steps - 2]
    assert trained.losses == whole.record("sasrec-s0").costs.training.losses
    assert again.users.equals(whole.users)
    assert not (tmp_path / "cut" / "checkpoints").exists()
