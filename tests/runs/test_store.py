"""A run opened for reading: metrics by slice and of all lists, recomputed; how far it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from depthprobe.data.batches import negatives
from depthprobe.data.prepared import read_data
from depthprobe.data.splits import make_split
from depthprobe.data.storage import load_data
from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.methods import Task
from depthprobe.runs.context import Context
from depthprobe.runs.layout import TOO_SMALL
from depthprobe.runs.plan import plan, trial_of
from depthprobe.runs.records import Sampled
from depthprobe.runs.scheduler import Claims
from depthprobe.runs.store import Run, open_run, status_of, working, write_tables
from depthprobe.runs.sweep import run_sweep
from depthprobe.runs.tables import OF_LISTS
from depthprobe.study import Data, Study, override


def table(run: Run) -> pd.DataFrame:
    metrics = run.metrics
    return metrics[(metrics["split"] == "test") & (metrics["protocol"] == "full")]


def test_slices_are_recomputed_from_every_users_rank(small_run: Run) -> None:
    labels = small_run.slices
    assert list(labels) == ["user", "history", "target"]
    users = small_run.users.query("protocol == 'full'").merge(labels, on="user")
    found = table(small_run)
    names = set(found["slice"])
    assert names > {"all"}
    for trial in ("full-d03-s1", "popularity-s0", "skip-b02-s0"):
        own = users[users["trial"] == trial]
        for name in names:
            family, _, label = name.partition(":")
            ranks = own["rank"] if name == "all" else own.loc[own[family] == label, "rank"]
            rows = found[(found["trial"] == trial) & (found["slice"] == name)].set_index("metric")
            rows = rows[~rows.index.isin(OF_LISTS)]
            bounded = rows.dropna()
            assert (bounded["ci_low"] - 1e-12 <= bounded["value"]).all()
            assert (bounded["value"] <= bounded["ci_high"] + 1e-12).all()
            assert (rows["users"] == len(ranks)).all()
            expected = metrics_from_ranks(ranks)
            assert rows["value"].to_dict() == pytest.approx(
                {metric: expected[metric] for metric in rows.index}, abs=1e-12
            )
    assert set(found["slice"].str.partition(":")[0]) == {"all", "history", "target"}


def test_a_run_is_asked_for_another_metric_and_level(small_run: Run) -> None:
    run = open_run(small_run.path)
    run.study = override(run.study, **{"protocol.metric": "HR@20", "protocol.level": 0.8})
    keys = ["trial", "split", "protocol", "slice", "metric"]
    usual, asked = (each.metrics.set_index(keys).sort_index() for each in (small_run, run))
    more = asked.drop(usual.index)
    assert set(more.index.unique("metric")) == {"HR@20"}
    assert usual["value"].equals(asked.loc[usual.index, "value"])
    bounds = usual["ci_low"].dropna()
    narrower = asked.loc[bounds.index, "ci_low"] - bounds
    assert narrower.min() >= 0 < narrower.max()
    ranks = run.users.query("trial == 'full-d03-s1' and protocol == 'full'")["rank"]
    assert (
        more.loc[("full-d03-s1", "test", "full", "all", "HR@20"), "value"] == (ranks <= 20).mean()
    )


def test_each_user_is_in_one_slice_of_a_family(small_run: Run) -> None:
    found = table(small_run)
    for _, rows in found[found["metric"] == "HR@10"].groupby("trial"):
        sizes = rows.groupby(rows["slice"].str.partition(":")[0])["users"].sum()
        assert sizes.nunique() == 1
        # so the mean over all is the mean of the slices, weighted by their users
        whole = rows.loc[rows["slice"] == "all", "value"].item()
        for family in ("history", "target"):
            part = rows[rows["slice"].str.startswith(family)]
            assert np.average(part["value"], weights=part["users"]) == pytest.approx(whole)


def test_slices_agree_with_the_split(small_run: Run) -> None:
    split = make_split(load_data(small_run.path / "shared" / "data"), small_run.study.protocol)
    labels = small_run.slices
    assert labels["user"].tolist() == split.test.users.tolist()
    for place, label in enumerate(labels["history"]):
        low, _, high = label.partition("-")
        assert int(low) <= len(split.history("test", place)) <= int(high or low)


def test_what_is_recommended_is_recomputed_from_the_items(small_run: Run) -> None:
    context = Context(small_run.path, small_run.study)
    popularity, usual = context.popularity.popularity, context.popularity.usual
    found = table(small_run).query("slice == 'all'").set_index(["trial", "metric"])
    for trial in small_run.trials["trial"]:
        items = pd.read_parquet(small_run.path / "trials" / trial / "items.parquet")
        counts = np.zeros(len(popularity))
        counts[items["item"] - 1] = items["lists"]
        users = len(small_run.slices)
        assert counts.sum() == 10 * users  # the log leaves ten items to everybody
        assert counts.max() <= users
        expected = {
            "coverage@10": (counts > 0).mean(),
            "gini@10": np.abs(counts[:, None] - counts).mean() / 2 / counts.mean(),
            "popularity@10": (counts * popularity).sum() / counts.sum() / usual,
        }
        record = small_run.record(trial).metrics["test"]["full"]
        for name, value in expected.items():
            assert record[name] == pytest.approx(value, abs=1e-12)
            row = found.loc[(trial, name)]
            assert (row["value"], row["users"]) == (record[name], users)
            assert np.isnan(row["ci_low"])
    popular = found.xs("popularity@10", level="metric")["value"]
    assert popular["popularity-s0"] == popular.max()


def test_lists_of_a_trial_are_those_of_its_model(small_run: Run) -> None:
    context = Context(small_run.path, small_run.study)
    model = context.trained(trial_of("finetune", (0, 1), 0, 3))
    counts = np.zeros(context.sequences.n_items + 1, dtype=int)
    seen_by_user = context.test.seen
    assert seen_by_user is not None
    for history, seen in zip(context.test.histories, seen_by_user, strict=True):
        items = torch.from_numpy(history.astype(np.int64))[None]
        with torch.inference_mode():
            vector = model.encode(items, torch.tensor([len(history)]))[0]
            scores = (model.item_matrix()[1:] @ vector).numpy()
        scores[np.unique(seen) - 1] = -np.inf
        best = np.argsort(-scores, kind="stable")[:10]
        counts[best[scores[best] > -np.inf] + 1] += 1
    items = pd.read_parquet(small_run.path / "trials" / "finetune-d02-s0" / "items.parquet")
    assert items["item"].tolist() == np.flatnonzero(counts).tolist()
    assert items["lists"].tolist() == counts[counts > 0].tolist()


def test_runs_of_before_open_without_slices(small_run: Run, tmp_path: Path) -> None:
    """Neither the log nor what was recommended: the metrics of all users stay as they are."""
    copy = tmp_path / "run"
    shutil.copytree(small_run.path, copy)
    shutil.rmtree(copy / "shared")
    for path in (copy / "trials").glob("*/record.json"):
        record = json.loads(path.read_text())
        for name in ("coverage@10", "gini@10", "popularity@10"):
            del record["metrics"]["test"]["full"][name]
        del record["digest"]
        path.write_text(json.dumps(record))
    run = open_run(copy)
    write_tables(run)
    assert run.slices.empty
    new, old = run.metrics, small_run.metrics
    assert set(new["slice"]) == {"all"}
    kept = old[(old["slice"] == "all") & old["metric"].isin(new["metric"])]
    kept = kept.reset_index(drop=True)
    pd.testing.assert_frame_equal(new, kept, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "popularity"])
def test_negatives_are_drawn_as_the_study_says(kind: str, tiny: Study, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [draw.permutation(1500)[: draw.integers(5, 12)] for _ in range(300)]
    log = tmp_path / "log.txt"
    log.write_text(
        "".join(f"u{user} " + " ".join(map(str, row)) + "\n" for user, row in enumerate(rows))
    )
    protocol = replace(tiny.protocol, negatives=kind)
    study = replace(
        tiny, methods=("popularity",), protocol=protocol, data=Data(source=str(log), max_history=10)
    )
    run = run_sweep(study, tmp_path / "run", jobs=0)
    assert run.manifest.sampled == Sampled(kind, 999)
    drawn = np.load(run.path / "shared" / "negatives.npy")
    split = make_split(load_data(run.path / "shared" / "data"), protocol)
    pool = split.sequences.items[split.trained]
    expected = negatives(
        split.sequences,
        split.test.users,
        seed=999,
        pool=pool if kind == "popularity" else None,
    )
    np.testing.assert_array_equal(drawn, expected)
    if kind == "popularity":
        assert set(np.unique(drawn)) <= set(np.unique(pool))
    assert "sampled-999" in set(run.metrics["protocol"])


def test_a_small_catalogue_says_why_it_has_no_sampled_ranking(tiny: Study, tmp_path: Path) -> None:
    run = run_sweep(replace(tiny, methods=("popularity",)), tmp_path / "run", jobs=0)
    assert run.manifest.sampled is None
    assert TOO_SMALL in run.manifest.data.warnings
    asked = replace(tiny, methods=("popularity",), protocol=replace(tiny.protocol, sampled=False))
    run = run_sweep(asked, tmp_path / "none", jobs=0)
    assert TOO_SMALL not in run.manifest.data.warnings


def test_own_columns_are_slices_and_may_be_added_later(tiny: Study, tmp_path: Path) -> None:
    split = make_split(read_data(tiny.data), tiny.protocol)
    users, items = split.sequences.user_ids.tolist(), split.sequences.item_ids.tolist()
    countries = [(name, "de" if len(name) == 2 else "fr") for name in users[1:]]
    write_csv(tmp_path / "users.csv", "user_id,country", countries)
    write_csv(tmp_path / "items.csv", "item_id,brand", [(i, f"b{len(i)}") for i in items])
    one = replace(tiny, methods=("popularity",))
    run = run_sweep(one, tmp_path / "run", jobs=0)
    before = {path: path.stat().st_mtime_ns for path in run.path.glob("trials/*/*")}
    assert list(run.slices) == ["user", "history", "target"]

    protocol = replace(
        one.protocol,
        user_slices=(f"{tmp_path / 'users.csv'}:country",),
        item_slices=(f"{tmp_path / 'items.csv'}:brand",),
    )
    sliced = replace(one, protocol=protocol)
    assert sliced.digest() == one.digest()
    run = run_sweep(sliced, run.path, jobs=0)
    assert {path: path.stat().st_mtime_ns for path in run.path.glob("trials/*/*")} == before
    labels = run.slices.set_index("user")
    for place, user in enumerate(split.test.users.tolist()):
        name, item = users[user], items[int(split.targets("test")[place]) - 1]
        expected = "unknown" if user == 0 else "de" if len(name) == 2 else "fr"
        assert labels.loc[user, "country"] == expected
        assert labels.loc[user, "brand"] == f"b{len(item)}"
    found = table(run).query("metric == 'HR@10'").set_index("slice")
    assert {"country:de", "country:fr", "country:unknown", "brand:b3"} <= set(found.index)
    assert found.loc["country:unknown", "users"] == 1

    # the run holds what it needs, and goes on without the files
    (tmp_path / "users.csv").unlink()
    again = run_sweep(replace(sliced, methods=("sasrec",)), run.path, jobs=0)
    assert "country:de" in set(again.metrics.query("trial == 'sasrec-s0'")["slice"])
    without = run_sweep(replace(one, methods=("popularity",)), run.path, jobs=0)
    assert list(without.slices) == ["user", "history", "target"]


def test_own_columns_that_cannot_be_used_write_nothing(tiny: Study, tmp_path: Path) -> None:
    write_csv(tmp_path / "users.csv", "user_id,history", [("u1", "x")])
    for setting in (f"{tmp_path / 'users.csv'}:history", f"{tmp_path / 'none.csv'}:country"):
        study = replace(tiny, protocol=replace(tiny.protocol, user_slices=(setting,)))
        with pytest.raises(BadInput, match="protocol.user_slices"):
            run_sweep(study, tmp_path / "run", jobs=0)
    assert not (tmp_path / "run").exists()


def write_csv(path: Path, header: str, rows: list[tuple[str, str]]) -> None:
    path.write_text("\n".join([header, *(",".join(row) for row in rows)]) + "\n")


# --- how far a run is


def test_states_of_tasks(small_run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_run.path, tmp_path / "run"))
    tasks = {task.id: task for task in plan(small_run.study, 3)}
    whole = status_of(folder)
    assert whole.total("done") == len(tasks)
    assert not whole.working
    assert not whole.failed
    shutil.rmtree(folder / "trials" / "finetune-d01-s0")
    shutil.rmtree(folder / "trials" / "early-exit-d01-s1")  # one of its pass
    record = folder / "trials" / "heal-d02-s1" / "record.json"
    failed = json.loads(record.read_text()) | {"status": "failed", "error": "no\nluck"}
    del failed["digest"]
    record.write_text(json.dumps(failed))
    claims = Claims(folder)
    assert claims.take(tasks["finetune-d01-s0"]) == "ours"
    found = status_of(folder)
    assert found.failed == [("heal-d02-s1", "no luck")]
    assert [each.task for each in found.working] == ["finetune-d01-s0"]
    assert found.counts["finetune"] == {"done": 3, "working": 1}
    assert found.counts["early-exit"] == {"done": 1, "left": 1}
    assert found.total("done") == len(tasks) - 3
    claims.leave_all()
    assert status_of(folder).counts["finetune"] == {"done": 3, "left": 1}


def test_the_last_line_without_its_time(tmp_path: Path) -> None:
    task = Task("sasrec", 0, (trial_of("sasrec", (), 0, 2),))
    claims = Claims(tmp_path)
    assert claims.take(task) == "ours"
    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / f"{task.id}.log"
    log.write_text("2026-01-01 10:00:00 begun\n2026-01-01 10:00:09 step 3/9  loss 1.2\n")
    (found,) = working(tmp_path)
    assert (found.task, found.line) == (task.id, "step 3/9  loss 1.2")
    assert 0 <= found.seconds < 60
    log.unlink()
    (found,) = working(tmp_path)
    assert found.line == ""
    claims.leave_all()
