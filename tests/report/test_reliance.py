"""The table of how far cheap scores can be trusted, against the definitions written out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.trust import reliability
from depthprobe.report.page import build_report
from depthprobe.report.reliance import reliance_table
from depthprobe.runs.store import Run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Backbone, Cost, Data, Protocol, Recipe, SasRecSettings, Study

WANTED = ("full", "skip", "span", "drop-mlp", "similarity", "taylor", "early-exit", "finetune")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("reliance")
    rng = np.random.default_rng(0)
    starts = rng.integers(30, size=80)
    lines = [
        f"u{u} " + " ".join(f"i{(s + k) % 30}" for k in range(7)) for u, s in enumerate(starts)
    ]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=5,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "backbone")
    few = Recipe(epochs=2, batch_size=16, learning_rate=0.01)
    study = Study(
        name="reliance", layers="1,2,3,4", methods=WANTED, seeds=1, device="cpu", recipe=few,
        item_table="learned", item_width=8, protocol=Protocol(resamples=100),
        data=Data(source=str(folder / "log.txt")), sasrec=SasRecSettings(width=8, recipe=few),
        backbone=Backbone(source=str(folder / "backbone"), prompt=""),
        cost=Cost(batch_size=8, warmup=0, rounds=1),
    )  # fmt: skip
    return run_sweep(study, folder / "run", jobs=0)


def by_user(run: Run, trial: str) -> np.ndarray:
    users = run.users
    chosen = users[(users["trial"] == trial) & (users["protocol"] == "full")]
    return np.asarray(per_user_metric(chosen.sort_values("user")["rank"].to_numpy(), "NDCG@10"))


def ndcg(run: Run, trial: str) -> float:
    return float(by_user(run, trial).mean())


def row(frame: pd.DataFrame, candidate: str, by: str, score: str) -> pd.Series:
    chosen = frame.query("candidate == @candidate and by == @by and score == @score")
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_correlations_are_those_of_scores_and_damage(run: Run) -> None:
    table = reliance_table(run)
    assert table is not None
    frame, maps = table.frame, run.scores("similarity")
    whole = ndcg(run, "full-d05-s0")
    blocks = [whole - ndcg(run, f"skip-b{b:02d}-s0") for b in range(5)]
    influence = maps[maps["score"] == "block-influence"].sort_values("start")["value"]
    found = row(frame, "blocks", "skip", "block-influence")
    assert found["spearman"] == pytest.approx(stats.spearmanr(influence, blocks).statistic)
    assert found["kendall"] == pytest.approx(stats.kendalltau(influence, blocks).statistic)
    assert (found["candidates"], found["users"]) == (5, 80)

    spans = [(i, i + n) for n in (2, 3, 4) for i in range(6 - n)]
    damage = [whole - ndcg(run, f"span-b{i:02d}-{j - 1:02d}-s0") for i, j in spans]
    cka = maps[maps["score"] == "cka"].set_index(["start", "end"])["value"]
    unlike = [1 - cka[span] for span in spans]
    found = row(frame, "spans", "span", "1 - CKA")
    assert found["spearman"] == pytest.approx(stats.spearmanr(unlike, damage).statistic)
    summed = [sum(blocks[i:j]) for i, j in spans]
    found = row(frame, "spans", "span", "skip damage, summed")
    assert found["spearman"] == pytest.approx(stats.spearmanr(summed, damage).statistic)


def test_depths_are_judged_by_the_variants_trained_there(run: Run) -> None:
    table = reliance_table(run)
    assert table is not None
    exits = [-ndcg(run, f"early-exit-d{d:02d}-s0") for d in (1, 2, 3, 4)]
    trained = [-ndcg(run, f"finetune-d{d:02d}-s0") for d in (1, 2, 3, 4)]
    found = row(table.frame, "depths", "finetune", "early exit loss")
    expected = stats.spearmanr(exits, trained).statistic
    np.testing.assert_allclose(found["spearman"], expected)


def test_the_reliability_is_that_of_the_damages(run: Run) -> None:
    table = reliance_table(run)
    assert table is not None
    whole = by_user(run, "full-d05-s0")
    losses = np.stack([whole - by_user(run, f"skip-b{b:02d}-s0") for b in range(5)], axis=1)
    of_blocks = table.frame.query("candidate == 'blocks'")["reliability"]
    assert len(of_blocks) > 1
    assert of_blocks.tolist() == pytest.approx([reliability(losses)] * len(of_blocks))
    place = table.columns.index("damage's reliability")
    shown = [row.cells[place].text for row in table.rows]
    assert shown == [f"{value:.2f}" for value in table.frame["reliability"]]


def test_a_part_is_judged_by_its_own_damage(run: Run) -> None:
    table = reliance_table(run)
    assert table is not None
    found = row(table.frame, "MLP alone", "drop-mlp", "mlp-influence")
    assert found["candidates"] == 5
    assert "attention alone" not in set(table.frame["candidate"])


def test_the_page_has_it_and_the_folder_too(run: Run, tmp_path: Path) -> None:
    page = build_report(run, tmp_path / "page.html").read_text()
    assert "How far cheap scores can be trusted" in page
    saved = pd.read_csv(run.path / "tables" / "reliance.csv")
    assert "reliability" in saved
    assert set(saved["candidate"]) == {"blocks", "spans", "MLP alone", "depths"}


def test_no_table_without_scores_or_damage(run: Run) -> None:
    assert reliance_table(Run(run.path, replace(run.study), run.manifest)) is not None
    bare = Run(run.path, run.study, run.manifest)
    bare.scores = lambda method: pd.DataFrame()  # type: ignore[method-assign]
    chosen = run.trials["method"].isin(["full", "finetune", "skip"])
    bare.trials = run.trials[chosen]
    assert reliance_table(bare) is None
