"""Files of results: every form of one result gives the same ranks, those of a naive loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthprobe.data.readers.results import Results, Targets, read_results, read_targets
from depthprobe.errors import BadInput
from depthprobe.evaluation.metrics import metrics_from_ranks

ITEMS = [f"i{number}" for number in range(8)]
Lists = dict[str, list[str]]
LISTS = st.lists(
    st.lists(st.sampled_from(ITEMS), min_size=1, max_size=6, unique=True), min_size=1, max_size=6
).map(
    lambda lists: {
        f"user {number}"[:: 1 if number % 2 else -1]: one for number, one in enumerate(lists)
    }
)
ANY = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None
)


def rows(lists: Lists) -> pd.DataFrame:
    """A row an item; the order of the rows is not that of the lists."""
    entries = [
        (user, item, place, -0.25 * place)
        for user, items in lists.items()
        for place, item in enumerate(items, start=1)
    ]
    return pd.DataFrame(entries, columns=["user", "item", "rank", "score"]).sample(
        frac=1, random_state=0
    )


def as_ranked(lists: Lists, path: Path) -> None:
    rows(lists).drop(columns="score").to_csv(path, index=False)


def as_scored(lists: Lists, path: Path) -> None:
    rows(lists).drop(columns="rank").to_csv(path, index=False, sep="\t")


def as_parquet(lists: Lists, path: Path) -> None:
    rows(lists).astype({"user": "category"}).to_parquet(path)


def as_cells(lists: Lists, path: Path) -> None:
    cells = {"user_id": list(lists), "items": [" ".join(items) for items in lists.values()]}
    pd.DataFrame(cells).to_csv(path, index=False)


def as_list_column(lists: Lists, path: Path) -> None:
    cells = {"user_id": list(lists), "items": list(lists.values())}
    pd.DataFrame(cells).to_parquet(path)


def as_trec(lists: Lists, path: Path) -> None:
    lines = [
        f"{user.replace(' ', '_')} Q0 {item} 7 {score} tag\n"  # its ranks are not read
        for user, item, _, score in rows(lists).itertuples(index=False)
    ]
    path.write_text("".join(lines))


FORMS: list[Callable[[Lists, Path], None]] = [
    as_ranked, as_scored, as_parquet, as_cells, as_list_column, as_trec,
]  # fmt: skip


@ANY
@given(lists=LISTS, data=st.data())
def test_every_form_gives_the_ranks_of_a_loop(
    tmp_path: Path, lists: Lists, data: st.DataObject
) -> None:
    asked = {user: data.draw(st.sampled_from(ITEMS)) for user in lists}
    expected = {
        user: items.index(asked[user]) + 1 if asked[user] in items else math.inf
        for user, items in lists.items()
    }
    for form in FORMS:
        form(lists, tmp_path / "file")
        wanted = {user.replace(" ", "_"): item for user, item in asked.items()}
        found = read_results([tmp_path / "file"], Targets(asked if form != as_trec else wanted, {}))
        own = {user.replace("_", " "): rank for user, rank in found.ranks["0"].items()}
        assert own == expected, form.__name__
        assert found.missed == sum(map(math.isinf, expected.values()))
        assert found.longest == max(map(len, lists.values()))
        assert found.left_out == 0


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_trec_eval(tmp_path: Path, seed: int) -> None:
    draw = np.random.default_rng(seed)
    run = {
        f"q{user}": {f"d{item}": float(draw.normal()) for item in draw.permutation(50)[:12]}
        for user in range(200)
    }
    qrels = {user: {f"d{draw.integers(50)}": 1, "d99": 0} for user in run}
    lines = [f"{u} Q0 {i} 0 {s!r} x\n" for u, own in run.items() for i, s in own.items()]
    (tmp_path / "run").write_text("".join(lines))
    lines = [f"{u} 0 {i} {r}\n" for u, own in qrels.items() for i, r in own.items()]
    (tmp_path / "qrels").write_text("".join(lines))
    names = {"HR@{}": "success_{}", "NDCG@{}": "ndcg_cut_{}"}
    evaluator = pytrec_eval.RelevanceEvaluator(
        qrels, {"success.1,5,10", "ndcg_cut.1,5,10", "recip_rank"}
    )
    each = list(evaluator.evaluate(run).values())
    expected = {
        own.format(k): np.mean([user[theirs.format(k)] for user in each])
        for own, theirs in names.items()
        for k in (1, 5, 10)
    } | {"MRR": np.mean([user["recip_rank"] for user in each])}
    found = read_results([tmp_path / "run"], read_targets(tmp_path / "qrels"))
    assert 0 < found.missed < len(run)
    assert metrics_from_ranks(found.ranks["0"]) == pytest.approx(expected, abs=1e-12)


def read(folder: Path, text: str, targets: str | None = None, *slices: str) -> Results:
    (folder / "file.csv").write_text(text)
    asked = None
    if targets is not None:
        (folder / "targets.csv").write_text(targets)
        asked = read_targets(folder / "targets.csv", slices)
    return read_results([folder / "file.csv"], asked, slices)


def test_equal_scores_share_their_mean_rank(tmp_path: Path) -> None:
    text = "user,item,score\nann,a,1\nann,b,1\nann,c,1\nann,d,2\n"
    assert read(tmp_path, text, "user,item\nann,b\n").ranks.loc["ann", "0"] == 3


def test_ranks_of_seeds_and_labels(tmp_path: Path) -> None:
    text = "user,seed,rank,land\nbob,1,2.5,FR\nann,0,1,DE\nann,1,inf,DE\nbob,0,7,FR\n"
    found = read(tmp_path, text, None, "land")
    assert found.ranks.to_dict("index") == {
        "ann": {"0": 1, "1": math.inf}, "bob": {"0": 7, "1": 2.5},
    }  # fmt: skip
    assert found.labels == {"land": {"ann": "DE", "bob": "FR"}}


def test_a_file_a_seed(tmp_path: Path) -> None:
    for name, rank in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"user,rank\nann,{rank}\nbob,3\n")
    found = read_results([tmp_path / "a", tmp_path / "b"])
    assert found.ranks.loc["ann"].to_dict() == {"0": 1, "1": 2}


def test_a_trial_of_a_run_is_read_by_its_full_ranking(tmp_path: Path) -> None:
    table = {"user": [0, 1, 0], "protocol": ["full", "full", "sampled-999"], "rank": [5.0, 6, 1]}
    pd.DataFrame(table).to_parquet(tmp_path / "users.parquet")
    assert read_results([tmp_path / "users.parquet"]).ranks["0"].to_dict() == {"0": 5, "1": 6}


def test_a_user_without_a_target_is_left_out_and_an_empty_list_is_a_miss(tmp_path: Path) -> None:
    found = read(tmp_path, "user,items\nann,a b\nbob,\ncleo,a\n", "user,item\nann,b\nbob,b\n")
    assert found.ranks["0"].to_dict() == {"ann": 2, "bob": math.inf}
    assert (found.missed, found.left_out) == (1, 1)


RANKS, TARGETS = "user,rank\nann,1\n", "user,item\nann,a\n"


@pytest.mark.parametrize(
    ("text", "targets", "words"),
    [
        (RANKS + "bob,0\n", None, "file: .*line 3 has the rank '0'; expected a number from 1"),
        (RANKS + "bob,-2\n", None, "line 3 has the rank '-2'"),
        (RANKS + "bob,nan\n", None, "line 3 has the rank 'nan'; .*or inf for a miss"),
        (RANKS + "bob,\n", None, "line 3 has no rank"),
        (RANKS + "bob,x\n", None, "line 3 has the rank 'x'"),
        (RANKS + "ann,2\n", None, "line 3 has the user 'ann'; expected each user once a seed"),
        ("user,place\nann,1\n", None, "its columns are user, place; expected user and rank; or"),
        ("user,user_id,rank\nann,a,1\n", None, None),  # the plainest spelling is not the first
        ("rank,item\n1,a\n", TARGETS, "its columns are rank, item; expected user and rank"),
        ("user,items\nann,a b\n", None, "say each user's target with --targets"),
        ("user,items\nann,a a\n", TARGETS, "line 2 has the item 'a'; expected each item once"),
        ("user,items\nann,\"['a', 'b']\"\n", TARGETS, "line 2 has the items .*no brackets"),
        ("user,items\nann,a\nann,b\n", TARGETS, "line 3 has the user 'ann'"),
        ("user,item,rank\nann,a,0\n", TARGETS, "line 2 has the rank '0'"),
        ("user,item,score\nann,a,x\n", TARGETS, "line 2 has the score 'x'"),
        ("user,items\ndan,a b\n", TARGETS, "none of its users has a target"),
        ("user,items\nann,a\n", "user,item\nann,a\nann,b\n", "targets: .*has the user 'ann'"),
        ("user,items\nann,a\n", "u1 0 a 0\n", "targets: .*at least one target"),
        ("user,rank\n", None, "expected at least one row"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, text: str, targets: str | None, words: str | None) -> None:
    if words is None:
        assert read(tmp_path, text, targets).ranks.index.tolist() == ["a"]
        return
    with pytest.raises(BadInput, match=words):
        read(tmp_path, text, targets)


def test_a_label_that_changes_and_a_seed_twice_are_refused(tmp_path: Path) -> None:
    text = "user,seed,rank,land\nann,0,1,DE\nann,1,1,FR\n"
    with pytest.raises(BadInput, match="line 3 has the land 'FR'; expected the same in all rows"):
        read(tmp_path, text, None, "land")
    with pytest.raises(BadInput, match="an earlier file has the seed 0 too"):
        read_results([tmp_path / "file.csv", tmp_path / "file.csv"])
