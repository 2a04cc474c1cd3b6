"""A run of item titles by depth: tables as `text:K` makes them, once; no user read, none timed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate
from depthprobe.models.item_tables import item_texts, make_table, read_titles
from depthprobe.probing.titles import anisotropy, effective_rank, fit_title_readout
from depthprobe.report import figures
from depthprobe.report.page import build_report
from depthprobe.runs import titles
from depthprobe.runs.context import Context
from depthprobe.runs.estimate import preview
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.timing import read_timing
from depthprobe.study import Study

METHODS = ("popularity", "sasrec", "item-text", "item-text-linear", "item-text-spread")
STATES = "shared/titles/states.npy"


@pytest.fixture(scope="module")
def asking(study: Study, shared_folder: Callable[..., Path]) -> Study:
    def write(folder: Path) -> None:
        shutil.copy(study.data.source, folder / "log.txt")
        rows = ["item_id\ttitle", *(f"i{number}\tTitle of number {number}" for number in range(40))]
        (folder / "items.tsv").write_text("\n".join(rows) + "\n")

    log = shared_folder("titles-log", write) / "log.txt"
    data = replace(study.data, source=str(log))
    return replace(study, methods=METHODS, layers="1", variants={}, data=data)


@pytest.fixture(scope="module")
def run(asking: Study, shared_folder: Callable[..., Path]) -> Run:
    folder = shared_folder("titles-run", lambda folder: run_sweep(asking, folder, jobs=0))
    return open_run(folder)


def test_a_trial_a_depth_and_seed_and_one_seed_of_what_is_not_trained(run: Run) -> None:
    assert not run.failed
    trials = run.trials.groupby("method")["trial"].agg(list)
    assert trials["item-text"] == [f"item-text-d{d:02d}-s{s}" for d in (0, 1, 3) for s in (0, 1)]
    assert trials["item-text-linear"] == [f"item-text-linear-d{d:02d}-s0" for d in range(4)]
    record = run.record("item-text-d01-s0")
    assert record.training is not None
    assert record.costs.parameters["item_table"] == 41 * 16
    assert not (run.path / "trials" / "item-text-d01-s0" / "model").exists()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_table_of_a_depth_is_that_of_text_k(run: Run, depth: int) -> None:
    context = Context(run.path, run.study)
    ids, named = context.sequences.item_ids.tolist(), context.sequences.titles
    expected = make_table(f"text:{depth}", context.backbone, ids, named, device=context.device)
    found = titles.title_table(context, 3, depth)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_read_out_and_the_spread_are_those_of_each_table(run: Run) -> None:
    context, spread = Context(run.path, run.study), run.scores("item-text-spread")
    texts = item_texts(context.sequences.item_ids.tolist(), context.sequences.titles)
    raw = read_titles(context.backbone, texts, depths=range(4), device=context.device)
    assert spread["depth"].tolist() == [0, 1, 2, 3]
    np.testing.assert_allclose(spread["anisotropy"], [anisotropy(t) for t in raw], rtol=1e-6)
    np.testing.assert_allclose(
        spread["effective_rank"], [effective_rank(t) for t in raw], rtol=1e-5
    )
    table = titles.title_table(context, 3, 2)
    fitted = fit_title_readout(table, context.windows, context.validation)
    users = run.users
    own = users[(users["trial"] == "item-text-linear-d02-s0") & (users["protocol"] == "full")]
    expected = evaluate(fitted, context.test, device=context.device)["full"]
    np.testing.assert_array_equal(own.sort_values("user")["rank"], expected)


def test_titles_are_read_once_and_anew_where_the_file_is_damaged(
    run: Run, asking: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(run.path, tmp_path / "run")
    shutil.rmtree(folder / "probes")
    context, before = Context(folder, asking), (folder / STATES).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(titles, "read_titles", lambda *_, **__: pytest.fail("read again"))
        assert not run_sweep(asking, folder, jobs=0).failed
    (folder / STATES).write_bytes(before[:-1] + b"\x01")
    states = titles.title_states(context, 3)
    assert states.shape == (4, 41, 16)
    assert (folder / STATES).read_bytes() == before


def test_no_depth_is_timed_and_no_memory_of_a_training_asked_for(
    run: Run, asking: Study, tmp_path: Path
) -> None:
    timed = read_timing(run.path / "shared" / "timing.json")["seconds"]
    assert not [
        name for name in timed if name.startswith(("encode", "train")) and "sasrec" not in name
    ]
    assert run.record("item-text-d01-s0").costs.timing is None
    plan = preview(asking, tmp_path / "new")
    assert plan.inputs.job_memory == 0
    assert plan.estimate is not None
    assert plan.estimate.by_method["item-text"] > 0


def test_a_log_without_titles_is_refused(asking: Study, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    shutil.copy(asking.data.source, log)
    bare = replace(asking, data=replace(asking.data, source=str(log)))
    with pytest.raises(BadInput, match="methods: .*item titles.*'item-text'"):
        run_sweep(bare, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def test_figures_of_titles_and_none_of_depth(run: Run, tmp_path: Path) -> None:
    page = build_report(run, tmp_path / "page.html").read_text(encoding="utf-8")
    assert 'id="titles"' in page
    assert "of 4 depths" in page
    ax = figures.accuracy_vs_title_depth(run)
    labels = ax.get_legend_handles_labels()[1]
    assert set(labels) == {"popularity", "SASRec", "SASRec on titles", "linear on titles"}
    lines = figures.title_spread(run, score="effective_rank").get_lines()
    (line,) = (each for each in lines if not str(each.get_gid()).startswith("tip:"))
    np.testing.assert_allclose(line.get_ydata(), run.scores("item-text-spread")["effective_rank"])
    with pytest.raises(BadInput, match="a method at some depth"):
        figures.accuracy_vs_depth(run)
