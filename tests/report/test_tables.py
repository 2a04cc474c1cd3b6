"""Tables: equal to a direct computation, escaped, bounded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from depthprobe.report.numbers import SAMPLED, Summary, summarise
from depthprobe.report.tables import (
    all_tables,
    depth_table,
    escape_latex,
    escape_markdown,
    save_table,
    to_latex,
    to_markdown,
    trial_table,
)


@pytest.mark.parametrize("protocol", ["full", SAMPLED])
def test_numbers_equal_a_recomputation_from_ranks(
    run: Any, summary: Summary, protocol: str
) -> None:
    table = depth_table(summary, protocol=protocol)
    assert table is not None
    users, trials = run.users, run.trials
    users = users[users["protocol"] == protocol].merge(trials, on="trial")
    for _, row in table.frame.iterrows():
        same = (users["method"] == row["method"]) & (users["kept"] == row["kept"])
        ranks = users[same]["rank"].to_numpy()
        for k in (1, 5, 10):
            assert row[f"HR@{k}"] == pytest.approx(np.mean(ranks <= k))
        gains = np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0)
        assert row["NDCG@10"] == pytest.approx(gains.mean())
        assert row["MRR"] == pytest.approx((1 / ranks).mean())


def test_trials_are_all_there_with_their_errors(run: Any, summary: Summary) -> None:
    table = trial_table(summary)
    assert table is not None
    trials = run.trials
    assert sorted(table.frame["trial"]) == sorted(trials["trial"])
    failed = [row for row in table.rows if row.state == "failed"]
    assert len(failed) == 1
    assert failed[0].cells[-1].text == "RuntimeError: loss is not finite"
    assert failed[0].cells[table.columns.index("NDCG@10")].text == "–"
    done = table.rows[0].cells[table.columns.index("NDCG@10")]
    assert done.note.startswith("[")


def test_rows_go_from_baselines_to_students(summary: Summary) -> None:
    table = depth_table(summary)
    assert table is not None
    methods = list(dict.fromkeys(table.frame["method"]))
    assert methods[:3] == ["popularity", "sasrec", "full"]
    distilled = table.frame[table.frame["method"] == "distill"]["depth"].tolist()
    assert distilled == sorted(distilled)


def test_a_broken_bound_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    run = make(tmp_path, users=100, seeds=1, methods={"full"})
    metrics = run.metrics
    metrics.loc[(metrics["metric"] == "HR@1") & (metrics["protocol"] == "full"), "value"] = 0.99
    with pytest.raises(ValueError, match=r"trial full-12.*HR@1"):
        trial_table(summarise(run))


def test_files_hold_every_digit_and_booktabs(summary: Summary, tmp_path: Path) -> None:
    for table in all_tables(summary).values():
        save_table(table, tmp_path)
        read = pd.read_csv(tmp_path / f"{table.name}.csv")
        expected = table.frame["NDCG@10"].astype(float)
        pd.testing.assert_series_equal(read["NDCG@10"], expected, check_index=False)
    text = (tmp_path / "methods.tex").read_text(encoding="utf-8")
    assert "\\toprule" in text
    rows = [line for line in text.splitlines() if line.endswith("\\\\")]
    assert {line.count(" & ") for line in rows} == {rows[0].count(" & ")}
    assert sorted(p.suffix for p in tmp_path.iterdir()) == sorted([".csv", ".md", ".tex"] * 3)


def test_latex_is_escaped(make: Callable[..., Any], tmp_path: Path) -> None:
    assert escape_latex("50 % of a_b & {c}\\") == r"50 \% of a\_b \& \{c\}\textbackslash{}"
    run = make(tmp_path, users=60, seeds=1, methods={"full", "distill"},
               failing=[("distill", 4, 0)], error="50% of $x_1 & more\nline two")  # fmt: skip
    table = trial_table(summarise(run))
    assert table is not None
    text = to_latex(table)
    assert r"50\% of \$x\_1 \& more" in text
    assert "line two" not in text


def test_markdown_prints_every_text_as_it_is(make: Callable[..., Any], tmp_path: Path) -> None:
    assert escape_markdown("a|b [x](y) <b> *c*") == r"a\|b \[x\](y) \<b\> \*c\*"
    table = depth_table(make(tmp_path, users=60, seeds=1, methods={"full", "finetune"}))
    assert table is not None
    lines = to_markdown(table).splitlines()
    assert len(lines) == 2 + len(table.rows)
    assert {re.sub(r"\\\\|\\\|", "", line).count("|") for line in lines} == {len(table.columns) + 1}
    assert lines[2].startswith("| teacher | 12 | ")


def test_without_ranks_there_is_no_table(make: Callable[..., Any], tmp_path: Path) -> None:
    assert all_tables(make(tmp_path, methods=set())) == {}
    run = make(tmp_path, users=60, seeds=1, methods={"full"}, sampled=False)
    assert set(all_tables(run)) == {"methods", "trials"}
