"""Tables: equal to a direct computation from the ranks, escaped, bounded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.statistics import difference_interval
from depthprobe.methods import method_info, method_order
from depthprobe.report.figures import curves
from depthprobe.report.numbers import SAMPLED, Summary, summarise
from depthprobe.report.tables import (
    ablation_table,
    all_tables,
    cost_table,
    depth_table,
    escape_markdown,
    left_out_table,
    lists_table,
    save_table,
    slice_table,
    to_latex,
    to_markdown,
    trial_table,
)

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def users(run: Any) -> pd.DataFrame:
    """Ranks of done trials beside what the trials are, with each user's NDCG@10."""
    done = run.trials[run.trials["status"] == "done"]
    users = run.users.merge(done, on="trial")
    return users.assign(
        gain=np.where(users["rank"] <= 10, 1 / np.log2(users["rank"] + 1), 0)
    ).sort_values(["seed", "user"], kind="stable")


def gains(users: pd.DataFrame, method: str, depth: int) -> np.ndarray:
    """NDCG@10 of full ranking by seed and user, (S, U)."""
    own = users[(users["method"] == method) & (users["depth"] == depth)]
    own = own[own["protocol"] == "full"]
    return own["gain"].to_numpy().reshape(own["seed"].nunique(), -1)


@pytest.mark.parametrize("protocol", ["full", SAMPLED])
def test_methods_equal_a_recomputation(
    users: pd.DataFrame, summary: Summary, protocol: str
) -> None:
    table = depth_table(summary, protocol=protocol)
    assert table is not None
    users = users[users["protocol"] == protocol]
    for _, row in table.frame.iterrows():
        same = (users["method"] == row["method"]) & (users["kept"] == row["kept"])
        ranks = users[same]["rank"].to_numpy()
        for k in (1, 5, 10):
            assert row[f"HR@{k}"] == pytest.approx(np.mean(ranks <= k))
        assert row["NDCG@10"] == pytest.approx(users[same]["gain"].mean())
        assert row["MRR"] == pytest.approx((1 / ranks).mean())
    methods = list(dict.fromkeys(table.frame["method"]))
    assert methods[:3] == ["popularity", "sasrec", "full"]
    distilled = table.frame[table.frame["method"] == "distill"]["depth"].tolist()
    assert distilled == sorted(distilled)


def test_trials_are_all_there_with_their_errors(run: Any, summary: Summary) -> None:
    table = trial_table(summary)
    assert table is not None
    assert sorted(table.frame["trial"]) == sorted(run.trials["trial"])
    failed = table.rows[next(n for n, mark in enumerate(table.marks) if mark == "failed")]
    assert failed[-1] == "RuntimeError: loss is not finite"
    place = table.columns.index("NDCG@10")
    assert failed[place] == "–"
    assert "\n[" in table.rows[0][place]


def test_files_hold_every_digit_and_booktabs(summary: Summary, tmp_path: Path) -> None:
    tables = all_tables(summary)
    for table in tables.values():
        save_table(table, tmp_path)
        read = pd.read_csv(tmp_path / f"{table.name}.csv")
        for name in table.frame.select_dtypes("float"):
            np.testing.assert_array_equal(read[name], table.frame[name])
    text = (tmp_path / "methods.tex").read_text(encoding="utf-8")
    assert "\\toprule" in text
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {line.count(" & ") for line in rows} == {rows[0].count(" & ")}
    assert {path.suffix for path in tmp_path.iterdir()} == {".csv", ".md", ".tex"}


def test_texts_are_escaped(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=60, seeds=1, methods={"full", "distill"},
               failing=[("distill", 4, 0)], error="50% of $x_1 & more\nline two")  # fmt: skip
    table = trial_table(summarise(run))
    assert table is not None
    text = to_latex(table)
    assert r"50\% of \$x\_1 \& more" in text
    assert "line two" not in text
    assert escape_markdown("a|b [x](y) <b> *c*") == r"a\|b \[x\](y) \<b\> \*c\*"
    table = depth_table(run)
    assert table is not None
    lines = to_markdown(table).splitlines()
    assert len(lines) == 2 + len(table.rows)
    assert {re.sub(r"\\\\|\\\|", "", line).count("|") for line in lines} == {len(table.columns) + 1}
    assert lines[2].startswith("| teacher | 12 | ")


def test_without_data_there_is_no_table(make: Make, tmp_path: Path) -> None:
    assert all_tables(make(tmp_path, methods=set())) == {}
    run = make(tmp_path, users=60, seeds=1, methods={"full"}, sampled=False, timing=False)
    assert set(all_tables(run)) == {"methods", "trials"}
    for methods in (("full", "finetune"), ("full", "distill"), ("full", "skip", "finetune")):
        assert ablation_table(make(tmp_path, users=60, seeds=1, methods=methods)) is None
    table = left_out_table(make(tmp_path, users=60, seeds=1, methods={"skip"}))
    assert table is not None
    assert {row[-1] for row in table.rows} == {"–"}  # no teacher, no change


def test_costs_by_depth_are_those_of_the_plainest_model(summary: Summary) -> None:
    table = cost_table(summary)
    assert table is not None
    assert table.frame["depth"].tolist() == [1, 2, 4, 8, 12, 0]
    plain = {point.depth: point for point in summary.of("finetune")}
    for _, row in table.frame.iloc[:4].iterrows():
        expected = plain[row["depth"]].speed["training"].value
        assert row["training times faster"] == pytest.approx(expected)


def test_blocks_left_out_equal_a_recomputation(users: pd.DataFrame, summary: Summary) -> None:
    table = left_out_table(summary)
    assert table is not None
    assert set(table.frame["method"]) == {"skip", "span", "drop-attention", "drop-mlp"}
    users = users[users["protocol"] == "full"]
    teacher = users[users["method"] == "full"]["gain"].mean()
    for _, row in table.frame.iterrows():
        own = (users["method"] == row["method"]) & (users["removed"] == row["removed"])
        assert row["NDCG@10"] == pytest.approx(users[own]["gain"].mean())
        assert row["change"] == pytest.approx(users[own]["gain"].mean() / teacher - 1)
        assert row["change low"] <= row["change"] <= row["change high"]


def test_ablation_is_paired_by_seed_and_user(users: pd.DataFrame, summary: Summary) -> None:
    table = ablation_table(summary)
    assert table is not None
    frame = table.frame.set_index(["depth", "method"])
    assert {depth for depth, _ in frame.index} == {1, 2, 4}  # at 8 nothing is compared
    for depth in (2, 4):
        plain, other = (gains(users, method, depth) for method in ("finetune", "distill"))
        row = frame.loc[depth, "distill"]
        assert row["difference"] == pytest.approx((other - plain).mean())
        assert row["difference low"] < row["difference"] < row["difference high"]
        assert row["ratio"] == pytest.approx(other.mean() / plain.mean())
    first = [row[1] for row, mark in zip(table.rows, table.marks, strict=True) if mark]
    assert first == ["fine-tuned"] * 3


def test_variants_are_methods_of_their_own(run: Any) -> None:
    renamed = run.trials["method"].replace({"random-init": "distill:cos"})
    summary = summarise(replace(run, trials=run.trials.assign(method=renamed)))
    assert method_info("distill:cos").label == "distilled: cos"
    assert method_info("distill:cos") != method_info("distill")
    ordered = ["finetune", "heal:ends", "distill", "distill:cos", "elastic"]
    assert sorted(reversed(ordered), key=method_order) == ordered
    table = ablation_table(summary)
    assert table is not None
    assert "distill:cos" in set(table.frame["method"])
    # beside their method they would crowd the curves; alone they are drawn
    assert "distill:cos" not in curves(summary, "NDCG@10")


def test_changes_are_those_of_the_slice_alone(
    run: Any, users: pd.DataFrame, summary: Summary
) -> None:
    table = slice_table(summary)
    assert table is not None
    seen = 0
    for _, row in table.frame.iterrows():
        family, _, label = row["slice"].partition(":")
        inside = np.ones(len(run.slices), bool)
        if label:
            inside = (run.slices[family] == label).to_numpy()
        teacher = gains(users, "full", 12)[:, inside]
        assert row["users"] == inside.sum()
        assert row["teacher"] == pytest.approx(teacher.mean(), abs=1e-12)
        if inside.sum() < 30:
            assert math.isnan(row["difference"])
            continue
        own = gains(users, row["method"], row["depth"])[:, inside]
        expected = difference_interval(own, teacher)
        for name, value in (("", expected.value), (" low", expected.low), (" high", expected.high)):
            assert row[f"difference{name}"] == pytest.approx(value, abs=1e-12)
        assert row["relative"] == pytest.approx(own.mean() / teacher.mean() - 1, abs=1e-12)
        seen += 1
    assert seen >= 12


def test_slices_are_named_and_grouped(summary: Summary) -> None:
    table = slice_table(summary)
    assert table is not None
    assert [(row[0], bool(mark)) for row, mark in zip(table.rows, table.marks, strict=True)] == [
        ("all", True), ("history of 3-4 items", True), ("history of 5-8 items", False),
        ("head target", True), ("middle target", False), ("tail target", False),
        ("cold target", False),
    ]  # fmt: skip
    # where fine-tuned and distilled ones were trained; the best of each depth, or the answer
    assert table.columns[3:] == ("distilled 1", "distilled 2", "distilled 4")
    rows = {row[0]: row for row in table.rows}
    assert rows["cold target"][3:] == ("–",) * 3  # too few users
    assert re.fullmatch(r"[+-]0\.\d{4}\n\[.*\], [+-].* %", rows["tail target"][3])


def test_no_slices_or_no_models_make_no_table(run: Any, make: Make, tmp_path: Path) -> None:
    assert slice_table(replace(run, slices=pd.DataFrame())) is None
    assert slice_table(replace(run, slices=run.slices.iloc[:-1])) is None  # of other users
    bare = make(tmp_path, users=60, seeds=1, methods={"full", "early-exit"})
    bare.slices = pd.DataFrame({"user": np.unique(bare.users["user"])})
    assert slice_table(bare) is None
    assert lists_table(bare) is None


def test_seeds_that_the_teacher_lacks_are_left_out(make: Make, tmp_path: Path) -> None:
    methods = {"full", "finetune"}
    run = make(tmp_path, users=120, methods=methods, failing=[("full", 12, 1)], resamples=100)
    run.slices = pd.DataFrame({"user": np.unique(run.users["user"])})
    table = slice_table(summarise(run))
    assert table is not None
    users = run.users[run.users["protocol"] == "full"].merge(run.trials, on="trial")
    users = users[users["seed"] == 0]
    gain = np.where(users["rank"] <= 10, 1 / np.log2(users["rank"] + 1), 0)
    for _, row in table.frame.iterrows():
        own = (users["method"] == row["method"]) & (users["depth"] == row["depth"])
        expected = gain[own].mean() - gain[users["method"] == "full"].mean()
        assert row["difference"] == pytest.approx(expected, abs=1e-12)


def test_lists_are_means_over_seeds(run: Any, summary: Summary) -> None:
    table = lists_table(summary)
    assert table is not None
    metrics = run.metrics.set_index(["trial", "metric"])["value"]
    frame = table.frame.set_index(["method", "depth"])
    assert set(frame.index) == {
        *(("popularity", 0), ("sasrec", 0), ("full", 12)),
        *(("distill", 1), ("distill", 2), ("distill", 4)),
    }
    for (method, depth), row in frame.iterrows():
        own = (run.trials["method"] == method) & (run.trials["depth"] == depth)
        for name in ("coverage@10", "gini@10", "popularity@10"):
            expected = np.mean([metrics[trial, name] for trial in run.trials.loc[own, "trial"]])
            assert row[name] == pytest.approx(expected, abs=1e-12)
    cells = {row[0]: row[2] for row in table.rows}
    assert " %\n[" in cells["teacher"]
    assert cells["popularity"].endswith(" %")  # one seed


def test_what_is_known_without_an_end_is_empty_in_a_file(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=1, seeds=1, methods={"full", "finetune"})
    table = depth_table(run)
    assert table is not None
    assert np.isinf(table.frame["NDCG@10 high"]).any()  # of one user
    save_table(table, tmp_path)
    assert not re.search(r",-?inf\b", (tmp_path / "methods.csv").read_text())
