"""How far cheap scores can be trusted, against the definitions written out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.trust import reliability
from depthprobe.report.numbers import Summary
from depthprobe.report.reliance import reliance_table
from depthprobe.report.tables import Table

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def table(summary: Summary) -> Table:
    made = reliance_table(summary)
    assert made is not None
    return made


def by_user(run: Any, trial: str) -> np.ndarray:
    users = run.users
    chosen = users[(users["trial"] == f"{trial}-0") & (users["protocol"] == "full")]
    return np.asarray(per_user_metric(chosen.sort_values("user")["rank"].to_numpy(), "NDCG@10"))


def row(table: Table, candidate: str, by: str, score: str) -> pd.Series:
    frame = table.frame.query("seed == 0 and candidate == @candidate and by == @by")
    frame = frame[frame["score"] == score]
    assert len(frame) == 1
    return frame.iloc[0]


def losses(run: Any) -> np.ndarray:
    """Of each user without each block, (U, blocks)."""
    skips = [by_user(run, f"skip-11-{block}") for block in range(12)]
    return np.stack([by_user(run, "full-12-x") - skip for skip in skips], axis=1)


def test_correlations_are_those_of_scores_and_damage(run: Any, table: Table) -> None:
    scores, blocks = run.scores("similarity").query("seed == 0"), losses(run).mean(axis=0)
    influence = scores[scores["score"] == "block-influence"].sort_values("start")["value"]
    found = row(table, "blocks", "skip", "block-influence")
    assert found["spearman"] == pytest.approx(stats.spearmanr(influence, blocks).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(influence, blocks).statistic)
    assert (found["candidates"], found["users"]) == (12, 400)

    spans = [(i, i + n) for n in (2, 3) for i in range(13 - n)]
    full = by_user(run, "full-12-x").mean()
    damage = [full - by_user(run, f"span-{12 - j + i}-{i}-{j - 1}").mean() for i, j in spans]
    cka = scores[scores["score"] == "cka"].set_index(["start", "end"])["value"]
    unlike = [1 - cka[span] for span in spans]
    found = row(table, "spans", "span", "1 - CKA")
    assert found["spearman"] == pytest.approx(stats.spearmanr(unlike, damage).statistic)
    summed = [blocks[i:j].sum() for i, j in spans]
    found = row(table, "spans", "span", "skip damage, summed")
    assert found["spearman"] == pytest.approx(stats.spearmanr(summed, damage).statistic)


def test_depths_are_judged_by_the_models_trained_there(run: Any, table: Table) -> None:
    exits, trained = (
        [-by_user(run, f"{method}-{d}-{d}-11").mean() for d in (1, 2, 4, 8)]
        for method in ("early-exit", "finetune")
    )
    found = row(table, "depths", "finetune", "early exit loss")
    expected = stats.spearmanr(exits, trained).statistic
    np.testing.assert_allclose(found["spearman"], expected)


def test_the_reliability_is_that_of_the_damages(run: Any, table: Table) -> None:
    of_blocks = table.frame.query("candidate == 'blocks' and seed == 0")["reliability"]
    assert len(of_blocks) > 1
    assert of_blocks.tolist() == pytest.approx([reliability(losses(run))] * len(of_blocks))
    place = table.columns.index("damage's reliability")
    shown = [row[place].partition("\n")[0] for row in table.rows]
    seeds = table.frame.groupby(["candidate", "by", "score"], sort=False)
    assert shown == [f"{value:.2f}" for value in seeds["reliability"].mean()]
    place = table.columns.index("Spearman")
    lowest = [row[place].partition("at least ")[2] for row in table.rows]
    assert lowest == [f"{v:.2f}" if v > -1 else "" for v in seeds["spearman_low"].min()]


def test_a_part_is_judged_by_its_own_damage(table: Table) -> None:
    for part, kind in (("mlp", "MLP alone"), ("attention", "attention alone")):
        assert row(table, kind, f"drop-{part}", f"{part}-influence")["candidates"] == 12


def test_no_table_without_scores_or_damage(run: Any, make: Make, tmp_path: Path) -> None:
    chosen = run.trials["method"].isin(["full", "finetune", "skip"])
    assert reliance_table(replace(run, trials=run.trials[chosen], probes={})) is None
    assert reliance_table(make(tmp_path, users=60, seeds=1, methods={"finetune", "skip"})) is None
