"""What probing leaves in a run: trials that know their blocks, and tables of scores and users."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.models.blocks import find_blocks
from depthprobe.probing.passes import early_exit
from depthprobe.probing.similarity import Similarities
from depthprobe.runs import probing as probes
from depthprobe.runs.context import Context
from depthprobe.runs.plan import trial_of
from depthprobe.runs.probing import kept_by_states
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.training import _with_blocks
from depthprobe.study import Probing, Study


def ranks(run: Run, trial: str) -> np.ndarray:
    users = run.users
    chosen = users[(users["trial"] == trial) & (users["protocol"] == "full")]
    return chosen.sort_values("user")["rank"].to_numpy()


def test_methods_that_ask_the_same_agree(small_run: Run) -> None:
    # the blocks of a greedy trial are those of a skip, a span or an early exit with the same ranks
    for seed in (0, 1):
        whole = ranks(small_run, f"full-d03-s{seed}")
        same = [("early-exit-d02", "skip-b02"), ("early-exit-d01", "span-b01-02")]
        for one, other in [*same, ("interval-e02", "skip-b01")]:
            np.testing.assert_array_equal(
                ranks(small_run, f"{one}-s{seed}"), ranks(small_run, f"{other}-s{seed}")
            )
        for part in ("attention", "mlp"):
            without = ranks(small_run, f"drop-{part}-b01-s{seed}")
            assert not np.array_equal(without, whole)


def test_a_search_records_the_blocks_that_it_found(small_run: Run) -> None:
    for seed in (0, 1):
        kept = {d: small_run.record(f"greedy-d{d:02d}-s{seed}").kept for d in (1, 2)}
        assert set(kept[1]) < set(kept[2]) < {0, 1, 2}
        (out,) = {0, 1, 2} - set(kept[2])
        np.testing.assert_array_equal(
            ranks(small_run, f"greedy-d02-s{seed}"), ranks(small_run, f"skip-b{out:02d}-s{seed}")
        )
        replaced = small_run.record(f"replace-d02-s{seed}")
        assert replaced.removed in ((1,), (2,))  # the first block carries no map
        assert small_run.record(f"replace-d01-s{seed}").removed == (1, 2)


def test_a_part_is_counted_and_its_block_is_kept(small_run: Run) -> None:
    record = small_run.record("drop-mlp-b01-s0")
    assert (record.depth, record.kept, record.removed) == (3, (0, 1, 2), (1,))
    teacher = Context(small_run.path, small_run.study).teacher(0, 3)
    mlp = sum(weight.numel() for weight in find_blocks(teacher.backbone)[1].mlp.parameters())
    whole = small_run.record("full-d03-s0").costs.parameters
    assert record.costs.parameters["total"] == whole["total"] - mlp


def test_readings_without_the_norm_are_others(small_run: Run) -> None:
    context = Context(small_run.path, small_run.study)
    found = early_exit(context.teacher(0, 3), context.test, device=context.device, norm=False)
    for depth in range(3):
        raw, normed = (f"early-exit{name}-d{depth:02d}-s0" for name in ("-raw", ""))
        expected = metrics_from_ranks(found[depth]["full"])
        assert expected.items() <= small_run.record(raw).metrics["test"]["full"].items()
        assert not np.array_equal(ranks(small_run, raw), ranks(small_run, normed))


def test_tables_of_scores_and_of_users(small_run: Run) -> None:
    scores = small_run.scores("similarity")
    sizes = {"block-influence": 3, "angular-distance": 6, "cka": 6, "norm": 4}
    sizes |= {"attention-influence": 3, "mlp-influence": 3}
    assert scores.groupby("score").size().to_dict() == {k: 2 * v for k, v in sizes.items()}
    assert set(scores["seed"]) == {0, 1}
    assert (small_run.scores("taylor")["value"] > 0).all()
    users = small_run.scores("settling")
    assert len(users) == 2 * 60
    one = users[users["seed"] == 0].sort_values("user")
    np.testing.assert_array_equal(one["final_rank"], ranks(small_run, "full-d03-s0"))
    best = np.min([ranks(small_run, f"early-exit-d{d:02d}-s0") for d in range(3)], axis=0)
    np.testing.assert_array_equal(one["overthinking"], best < ranks(small_run, "full-d03-s0"))


def test_shuffled_histories_of_every_model(small_run: Run) -> None:
    table = small_run.scores("shuffled").sort_values("user", kind="stable")
    models = [("sasrec", 0, "sasrec"), ("full", 3, "full-d03")]
    models += [("early-exit", depth, f"early-exit-d{depth:02d}") for depth in range(3)]
    for seed in (0, 1):
        for method, depth, trial in models:
            own = table.query(f"method == '{method}' and depth == {depth} and seed == {seed}")
            expected = ranks(small_run, f"{trial}-s{seed}").astype(np.float32)
            np.testing.assert_array_equal(own["rank"], expected)
            draws = own[[f"shuffled-{k}" for k in range(1, 6)]].to_numpy()
            assert len(np.unique(draws, axis=1).T) > 1
    assert len(table) == 2 * 5 * 60


def test_sets_of_blocks_against_random_ones(small_run: Run) -> None:
    table = small_run.scores("random-blocks")
    assert set(table["seed"]) == {0}
    own = table[table["metric"] == "NDCG@10"].set_index(["selection", "kept"])
    assert own.loc["random"]["depth"].value_counts().to_dict() == {1: 3, 2: 3}  # all there are
    for depth, kept in (own.loc["greedy"]["depth"]).reset_index()[["depth", "kept"]].to_numpy():
        record = small_run.record(f"greedy-d{depth:02d}-s0")
        assert kept == ",".join(map(str, record.kept))
        expected = record.metrics["test"]["full"]["NDCG@10"]
        assert own.loc[("greedy", kept), "value"] == pytest.approx(expected, rel=1e-6)
    assert own.loc["prefix"].index.tolist() == ["0", "0,1"]
    for name in ("skip", "influence", "greedy", "angular"):
        pair = zip(own.loc[name].index, own.loc[f"{name}-reversed"].index, strict=True)
        assert all(one != other for one, other in pair)


def test_a_training_keeps_the_blocks_that_the_probe_names(small_run: Run) -> None:
    table = small_run.scores("random-blocks").set_index(["selection", "depth"])["kept"]
    context = Context(small_run.path, small_run.study)
    for select in ("influence", "angular", "greedy"):
        for depth in (1, 2):
            trial = trial_of(f"finetune:{select}", range(depth), 0, 3)
            found = ",".join(map(str, _with_blocks(context, trial).kept))
            assert found == table[select, depth].iloc[0]


def test_the_blocks_of_least_influence_go() -> None:
    values = dict.fromkeys((each.name for each in fields(Similarities)), np.zeros(0))
    states = Similarities(**values | {"influence": np.array([0.3, 0.02, 0.2, 0.1, 0.25])})
    assert kept_by_states("influence", states, 3) == (0, 2, 4)
    assert kept_by_states("influence", states, 1) == (0,)


def test_a_table_that_fails_is_a_failure_and_is_made_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = replace(study, methods=("similarity",), seeds=1)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such luck")

    with monkeypatch.context() as patch:
        patch.setattr(probes, "similarities", broken)
        run = run_sweep(wanted, tmp_path / "run", jobs=0)
    assert [name for name, _ in run.failed] == ["similarity-s0"]
    assert "no such luck" in run.failed[0][1]
    assert run.scores("similarity").empty
    again = run_sweep(wanted, tmp_path / "run", jobs=0, retry_failed=True)
    assert again.failed == []
    assert len(again.scores("similarity")) == 3 + 6 + 6 + 4 + 3 + 3
    pd.testing.assert_frame_equal(
        open_run(tmp_path / "run").scores("similarity"), again.scores("similarity")
    )


def test_screened_spans_are_the_nearest_ones(study: Study, tmp_path: Path) -> None:
    wanted = replace(
        study, methods=("similarity", "span"), seeds=1, probing=Probing(spans=1), variants={}
    )
    run = run_sweep(wanted, tmp_path / "run", jobs=0)
    assert not run.failed
    table = run.scores("similarity")
    table = table[table["score"] == "angular-distance"]
    pairs = table[table["end"] - table["start"] == 2]
    nearest = pairs.loc[pairs["value"].idxmin()]
    trials = run.trials[run.trials["method"] == "span"]
    assert trials["trial"].tolist() == ["span-d01-n1-s0"]
    assert trials["removed"].tolist() == [f"{int(nearest['start'])}-{int(nearest['end']) - 1}"]
