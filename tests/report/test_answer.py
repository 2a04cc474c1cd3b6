"""The first screen says what the numbers carry, and no more."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.sufficiency import Needed
from depthprobe.report.answer import build_answer
from depthprobe.report.numbers import Summary, summarise

Make = Callable[..., Any]


def _better_student(method: str, depth: int) -> float:
    return 0.4 if (method, depth) == ("distill", 4) else 0.0


def test_shown(make: Make, tmp_path: Path) -> None:
    summary = summarise(make(tmp_path, users=400, gain=_better_student))
    answer = build_answer(summary)
    assert (answer.verdict, answer.method, answer.depth) == ("shown", "distill", 4)
    point = summary.candidates["distill", 4]
    assert summary.teacher is not None
    assert answer.kept is not None
    assert answer.kept.value == pytest.approx(
        point.accuracy["full", "NDCG@10"].value / summary.teacher.accuracy["full", "NDCG@10"].value
    )
    assert answer.kept.low > 1 - answer.margin  # or it would not be shown
    assert answer.headline.startswith(f"4 of 12 blocks keep {100 * answer.kept.value:.1f} % [")
    assert answer.headline.endswith("of the teacher's NDCG@10.")
    assert "With 95 % confidence it loses at most 1 % of the teacher's NDCG@10" in answer.detail
    assert "Method: distilled. It has 34 % of the parameters." in answer.detail
    assert re.search(r"faster \[.*\] to serve\. It is .* faster \[.*\] to train", answer.detail)
    assert [tile.label for tile in answer.tiles] == [
        "accuracy kept", "parameters", "inference time", "training step",
    ]  # fmt: skip


def test_not_shown_says_so_first(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=120))
    assert answer.verdict == "not shown"
    assert answer.headline.startswith("Not shown at a margin of 1 %")
    assert answer.detail.startswith("Best candidate: ")
    assert answer.kept is not None
    assert f"[{100 * answer.kept.low:.1f}, {100 * answer.kept.high:.1f}]" in answer.detail
    if answer.users_needed is not None:
        assert "test users" in answer.detail
        assert answer.users_needed > answer.users


def test_far_below_the_margin_asks_for_no_more_users(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=400, methods={"full", "finetune"},
               gain=lambda method, depth: -1.0 if method == "finetune" else 0.0)  # fmt: skip
    answer = build_answer(run)
    assert answer.verdict == "not shown"
    assert answer.users_needed is None
    assert "more users would not change that" in answer.detail


@pytest.mark.parametrize(
    ("methods", "verdict", "headline", "tiles"),
    [
        (set(), "nothing finished", "no trial of this run is finished", []),
        ({"popularity", "sasrec"}, "no teacher", "no trial of the teacher is finished",
         ["NDCG@10, popularity", "NDCG@10, SASRec"]),
        ({"sasrec", "full", "early-exit"}, "no depth tried", "no model of fewer blocks was trained",
         ["NDCG@10, teacher", "NDCG@10, SASRec"]),
    ],
)  # fmt: skip
def test_what_is_missing_for_an_answer_is_named(
    methods: set[str], verdict: str, headline: str, tiles: list[str], make: Make, tmp_path: Path
) -> None:
    answer = build_answer(make(tmp_path, users=60, methods=methods))
    assert (answer.verdict, answer.kept, answer.depth) == (verdict, None, None)
    assert answer.headline.startswith(f"No answer: {headline}")
    assert [tile.label for tile in answer.tiles] == tiles


def test_a_failed_teacher_is_no_answer(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=60, failing=[("full", 12, 0), ("full", 12, 1)]))
    assert answer.verdict == "no teacher"
    assert "2 of 73 trials failed" in answer.detail


def said(make: Make, tmp_path: Path, **options: Any) -> str:
    """All caveats of a made-up run."""
    return " ".join(build_answer(make(tmp_path, **({"users": 100} | options))).caveats)


def test_few_seeds_failures_and_warnings_are_said(
    summary: Summary, make: Make, tmp_path: Path
) -> None:
    caveats = build_answer(summary).caveats
    assert any(f"1 of {len(summary.run.trials)} trials failed" in text for text in caveats)
    assert any(text.startswith("2 seeds") for text in caveats)
    assert "Data: no times: order is the file's." in caveats
    assert "One seed: " in said(make, tmp_path, seeds=1)
    assert "1 seed of 2 compared" in said(make, tmp_path, failing=[("distill", 4, 1)])


def test_controls_that_weaken_the_answer_are_said(make: Make, tmp_path: Path) -> None:
    text = said(make, tmp_path, users=300, gain=lambda m, _: 0.8 if m == "sasrec" else 0.0)
    assert text.startswith("The teacher is less accurate than SASRec")
    text = said(make, tmp_path, users=300, gain=lambda m, _: 0.7 if m == "random-init" else 0.0)
    assert "Pretraining is not shown to help" in text
    text = said(make, tmp_path, methods={"full", "finetune"})
    assert "SASRec was not run" in text
    assert "No random init" in text
    for gain in (0.0, 1.1):  # of a head on the last item alone
        run = {"users": 300, "methods": {"full", "finetune", "readout"}}
        text = said(make, tmp_path, **run, gain=lambda _, d, gain=gain: 0.0 if d else gain)
        assert ("not shown that blocks add" in text) == bool(gain)


def test_a_teacher_no_better_than_popularity_answers_nothing(make: Make, tmp_path: Path) -> None:
    worst = {"popularity": 1.9, "distill": 0.5}
    answer = build_answer(make(tmp_path, users=300, gain=lambda method, _: worst.get(method, 0.0)))
    assert answer.verdict == "weak teacher"
    assert answer.headline.startswith("No answer: the teacher is")
    assert "popularity" in answer.headline
    assert answer.detail.startswith("Measured all the same: ")


def test_without_times_no_speed_is_claimed(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=100, timing=False))
    assert "faster" not in answer.headline + answer.detail
    assert answer.inference is None
    assert [tile.label for tile in answer.tiles] == ["accuracy kept", "parameters"]
    assert any("No times were compared" in text for text in answer.caveats)


def test_an_interval_above_the_margin_that_is_not_enough_is_explained(summary: Summary) -> None:
    assert summary.sufficiency is not None
    row = next(r for r in summary.sufficiency.rows if (r.method, r.depth) == ("distill", 4))
    near = replace(row, kept=Interval(1.003, 0.991, 1.014), lower=0.986, shown=False)
    alone = replace(
        summary.sufficiency, rows=(near, near), depth=None, method=None,
        needed=Needed("distill", 4, (8281, 16_020), (4, None)),
    )  # fmt: skip
    answer = build_answer(replace(summary, sufficiency=alone))
    assert answer.verdict == "not shown"
    assert "With all 2 candidates taken into account, its lower bound is 98.6 %" in answer.detail
    assert (
        "Even odds to decide take about 8,300 test users (17,000 for 80 %) instead of 400, or "
        "4 seeds instead of 2." in answer.detail
    )
    # just below the floor, and just above the users there are: neither may be rounded away
    needed = Needed("distill", 4, (8202, None), (None, None))
    close = replace(alone, rows=(replace(near, lower=0.98996),) * 2, users=8201, needed=needed)
    detail = build_answer(replace(summary, sufficiency=close)).detail
    assert "its lower bound is 98.996 %. Even odds to decide take about 8,300 test users" in detail
    for needed, words in (
        (Needed("distill", 4, (None, None), (7, 9)), "7 seeds (9 for 80 %) instead of 2, for the"),
        (Needed("distill", 4, (None, None), (None, None)), "Neither more users nor more seeds"),
    ):
        text = build_answer(replace(summary, sufficiency=replace(alone, needed=needed))).detail
        assert words in text


def test_one_seed_is_no_answer_and_says_so(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=400, seeds=1, gain=_better_student))
    assert answer.verdict == "not shown"
    assert "One seed shows nothing, for trainings differ: run three or more." in answer.detail


def test_a_shallower_depth_that_is_undecided_is_named(summary: Summary) -> None:
    assert summary.sufficiency is not None
    deep = next(r for r in summary.sufficiency.rows if (r.method, r.depth) == ("finetune", 8))
    best = replace(deep, kept=Interval(1.0, 0.995, 1.005), lower=0.993, shown=True)
    found = replace(
        summary.sufficiency, rows=(best,), depth=8, method="finetune",
        needed=Needed("distill", 2, (5050, None), (None, None)),
    )  # fmt: skip
    answer = build_answer(replace(summary, sufficiency=found))
    assert answer.headline.startswith("8 of 12 blocks keep 100.0 % [99.5, 100.5]")
    assert "Depth 2 (distilled) is undecided" in answer.detail
