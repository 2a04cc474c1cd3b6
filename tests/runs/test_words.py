"""A study whose histories are read in words: every method runs, and what is exported is served."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import depthprobe as dp
from depthprobe.errors import BadInput
from depthprobe.methods import base_of
from depthprobe.runs.export import export_trial
from depthprobe.runs.layout import read_inputs
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import METHODS, Recipe, Study

ITEMS = 120


@pytest.fixture(scope="module")
def in_words(study: Study) -> Study:
    return replace(
        study,
        # the kernel of int4 takes no blocks that are so narrow
        methods=tuple(name for name in METHODS if name != "int4"),
        variants={},
        seeds=1,
        layers="2",
        backbone=replace(study.backbone, reads="titles", title_tokens=6),
        recipe=Recipe(epochs=1, batch_size=32, tokens=600),
    )


def lines() -> list[list[str]]:
    """A user, and items that count up, in a small catalogue."""
    starts = np.random.default_rng(5).integers(ITEMS, size=50)
    return [[f"u{n:02d}", *(f"i{(s + k) % ITEMS}" for k in range(9))] for n, s in enumerate(starts)]


def write_log(folder: Path) -> Path:
    """The lines as a table, and the titles of its items, of one to six words, beside it."""
    rows = [f"{user},{item},{time}" for user, *own in lines() for time, item in enumerate(own)]
    titles = [f"i{n},{' '.join(['Night'] * (n % 6) + [f'Song {n}'])}" for n in range(ITEMS)]
    (folder / "items.csv").write_text("\n".join(["item,title", *titles, ""]))
    (folder / "log.csv").write_text("\n".join(["user,item,timestamp", *rows, ""]))
    return folder / "log.csv"


def test_every_method_reads_words_and_serves_what_it_measured(
    in_words: Study, tmp_path: Path
) -> None:
    log = write_log(tmp_path)
    data = replace(in_words.data, source=str(log), items=str(tmp_path / "items.csv"))
    run = run_sweep(replace(in_words, data=data), tmp_path / "run", jobs=0)
    assert not run.failed
    assert {base_of(method) for method in run.trials["method"]} | {"similarity"} <= {*METHODS}
    check_candidates(run)
    # words take more than one position each, and the parts of a batch as many as allowed
    items = run.record("finetune-d02-s0").costs
    assert items is not None
    assert items.parameters["adapters"] > 0
    for trial in ("full-d03-s0", "finetune-d02-s0"):
        export_trial(run.path, trial, tmp_path / trial)
        model = dp.load_recommender(tmp_path / trial)
        listed = model.recommend([items[:-1] for _, *items in lines()], top=10)
        hits = [
            next((1 / np.log2(n + 2) for n, each in enumerate(own) if each.item == line[-1]), 0)
            for own, line in zip(listed, lines(), strict=True)
        ]
        table = run.metrics.query("split == 'test' and protocol == 'full' and slice == 'all'")
        measured = table[table["trial"] == trial].set_index("metric")["value"]["NDCG@10"]
        assert np.mean(hits) == pytest.approx(measured, abs=1e-9)


def check_candidates(run: Run) -> None:
    """Ranks among 100 candidates are of all who rank them, and no trial's."""
    table = run.scores("prompt-only")
    depths = {"likelihood": [2, 3], "normalised": [2, 3], "popularity": [0], "sasrec": [0]}
    groups = table.groupby("by")["depth"].unique().map(list).to_dict()
    assert groups == depths | {"full": [3]}
    assert table.groupby(["by", "depth"]).size().eq(50).all()
    assert table["rank"].between(1, 100).all()
    # a target is not better among all items than among a part of them
    everyone = run.users[run.users["protocol"] == "full"].pivot(
        index="user", columns="trial", values="rank"
    )
    for by, trial in (
        ("popularity", "popularity-s0"),
        ("sasrec", "sasrec-s0"),
        ("full", "full-d03-s0"),
    ):
        own = table[table["by"] == by].set_index("user")["rank"]
        worse = everyone[trial] - own
        assert worse.between(0, ITEMS - 100).all()
        assert worse.max() > 0
    assert "sampled-99" not in set(run.metrics["protocol"])


def test_a_method_of_titles_is_refused_where_there_are_none(study: Study, tmp_path: Path) -> None:
    wanted = replace(study, methods=("prompt-only",), variants={})
    with pytest.raises(BadInput, match="methods: expected a log with item titles.*prompt-only"):
        run_sweep(wanted, tmp_path / "run", jobs=0)


@pytest.mark.parametrize(
    ("items", "head", "reason"),
    [
        (60, True, "every user has 99 items left to draw from"),
        (ITEMS, False, "a language-model head"),
    ],
)
def test_what_the_untouched_backbone_cannot_rank_is_said(
    in_words: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    items: int,
    head: bool,
    reason: str,
) -> None:
    monkeypatch.setitem(globals(), "ITEMS", items)
    data = replace(in_words.data, source=str(write_log(tmp_path)))
    backbone = in_words.backbone
    if not head:
        folder = tmp_path / "backbone"
        shutil.copytree(backbone.source, folder)
        dp.load_backbone(backbone.source).base_model.save_pretrained(folder)
        backbone = replace(backbone, source=str(folder), reads="items")
    wanted = replace(
        in_words, data=data, backbone=backbone, methods=("prompt-only",), item_table="text"
    )
    run = run_sweep(wanted, tmp_path / "run", jobs=0)
    ((name, words),) = run.failed
    assert name == "prompt-only-s0"
    assert reason in words


def test_a_log_without_titles_is_refused(in_words: Study, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="backbone.reads") as refused:
        run_sweep(replace(in_words, methods=("full",)), tmp_path / "run", jobs=0)
    assert "titles" in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_titles_are_read_by_as_many_blocks_as_there_are(in_words: Study, tmp_path: Path) -> None:
    data = replace(in_words.data, source=str(write_log(tmp_path)))
    most = replace(in_words, data=data, item_table="text:4")
    for dry in (True, False):
        with pytest.raises(BadInput, match="item_table: expected at most 3 blocks.*text:4"):
            read_inputs(most, tmp_path / "run", dry=dry)
    inputs = read_inputs(replace(most, item_table="text:3:last"), tmp_path / "run")
    assert inputs.table is not None
    assert inputs.table.shape == (ITEMS + 1, inputs.config.hidden_size)
