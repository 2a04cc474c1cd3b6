"""The first screen says what the numbers carry, and no more."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from depthprobe.evaluation.sufficiency import Needed
from depthprobe.report.answer import build_answer
from depthprobe.report.numbers import Summary, summarise
from depthprobe.runs.records import Record, Validation
from depthprobe.study import override

Make = Callable[..., Any]


def _better_student(method: str, depth: int) -> float:
    return {("distill", 4): 0.4, ("sasrec", 0): -0.3}.get((method, depth), 0.0)


def test_a_shown_student_is_shipped(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=400, seeds=3, gain=_better_student)
    best = next(record for record in run.records if record.id == "distill-4-4-11-2")
    best.validation = Validation(ndcg=0.3, users=9)
    summary = summarise(run)
    answer = build_answer(summary)
    assert (answer.verdict, answer.method, answer.depth) == ("shown", "distill", 4)
    point, (baseline,) = summary.candidates["distill", 4], summary.of("sasrec")
    assert summary.teacher is not None
    assert answer.kept is not None
    assert answer.kept.value == pytest.approx(
        point.accuracy["full", "NDCG@10"].value / summary.teacher.accuracy["full", "NDCG@10"].value
    )
    ship, sure, saves = answer.lines
    # of the seeds the one that is best on validation
    assert ship.startswith("Ship the distilled model, depth 4 of 12: it keeps ")
    assert f"{100 * answer.kept.value:.1f} % [" in ship
    assert answer.command == f"depthprobe export {tmp_path} distill-4-4-11-2 DIR"
    assert answer.trial == "distill-4-4-11-2"
    assert "With 95 % confidence it loses at most 1 %: it keeps at least" in sure
    assert "allowing for the choice among 7 candidates. The interval is for this model" in sure
    assert summary.sufficiency is not None
    row = summary.sufficiency.row
    assert row is not None
    assert f"keeps at least {100 * row.lower:.1f} %" in sure
    assert "The teacher is undertrained" in sure  # of a student 50 % better
    assert "It has 34 % of the parameters." in saves
    assert re.search(r"faster \[.*\] to serve\. It is .* faster \[.*\] to train", saves)
    assert answer.sasrec == summary.against(point, baseline)
    assert f"{100 * answer.sasrec.value:.1f} % [" in saves
    assert [tile.label for tile in answer.tiles] == [
        "accuracy kept", "parameters", "inference time", "training time", "against SASRec",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gains", "advice"),
    [
        ({"sasrec": 0.6}, "Ship SASRec: it is more accurate than the best shallow model, and no"),
        ({"sasrec": 1.5, "distill": 0.5}, "Ship SASRec: it is more accurate than the shallowest"),
        ({"sasrec": 0.1, "finetune": -1, "distill": -1}, "Ship SASRec, or the teacher if its cost"),
    ],
)
def test_a_better_sasrec_is_shipped(
    gains: dict[str, float], advice: str, make: Make, tmp_path: Path
) -> None:
    def gain(method: str, depth: int) -> float:
        return gains.get(method, 0.0)

    answer = build_answer(make(tmp_path, users=400, seeds=3, gain=gain))
    assert (answer.verdict, answer.trial) == ("SASRec is better", "sasrec-0-x-0")
    assert answer.command == f"depthprobe export {tmp_path} sasrec-0-x-0 DIR"
    assert answer.lines[0].startswith(advice)
    assert answer.sasrec is not None
    assert answer.sasrec.high < 1
    dear = make(tmp_path, users=400, seeds=3, gain=gain, timing=False)
    dear.trials.loc[dear.trials["method"] == "sasrec", "parameters_total"] = 1e9
    undecided = build_answer(dear)
    assert (undecided.trial, undecided.command) == ("", "")
    assert undecided.lines[0].startswith("Not decided: SASRec is more accurate than the ")
    assert undecided.lines[0].endswith(", but has more parameters.")


def test_one_seed_shows_nothing(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=400, seeds=1, gain=_better_student))
    assert (answer.verdict, answer.command, answer.trial) == ("not shown", "", "")
    assert answer.lines[0] == (
        "Not decided: one seed never shows a depth. Run three seeds or more (--seeds 3)."
    )
    assert "over users alone" in answer.lines[1]
    worse = make(tmp_path, users=400, seeds=1, gain=lambda m, _: 1.5 if m == "sasrec" else 0.0)
    assert build_answer(worse).verdict == "not shown"  # nor that SASRec is better


def test_not_shown_says_what_it_would_take(summary: Summary) -> None:
    assert summary.sufficiency is not None
    needed = Needed("distill", 4, users=(8281, 16_001), seeds=(12, None))
    unsure = replace(summary.sufficiency, depth=None, method=None, needed=needed, seeds=2)
    answer = build_answer(replace(summary, sufficiency=unsure))
    assert answer.verdict == "not shown"
    assert answer.lines[0] == (
        "Not decided: even odds of a decision take about 8,300 test users or 12 seeds (400 and 2 "
        "now)."
    )
    assert answer.lines[1].startswith(
        "Odds of 80 % take about 17,000 test users. Best candidate: distilled, depth 4 of 12. It "
    )
    assert answer.kept is not None
    assert f"[{100 * answer.kept.low:.1f}, {100 * answer.kept.high:.1f}]" in answer.lines[1]
    never = replace(unsure, needed=Needed("distill", 4, users=(None, None), seeds=(None, None)))
    said = build_answer(replace(summary, sufficiency=never)).lines[0]
    assert said == "Not decided: neither more users nor more seeds alone would decide."
    # just below the floor: that may not be rounded away
    rows = tuple(replace(row, lower=0.98996, shown=False) for row in unsure.rows)
    close = build_answer(replace(summary, sufficiency=replace(unsure, rows=rows)))
    assert "95 % confidence only 98.996 % is shown, allowing" in close.lines[1]


def test_far_below_the_margin_the_teacher_is_kept(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=400, seeds=3, methods={"full", "finetune"},
               gain=lambda method, depth: -1.0 if method == "finetune" else 0.0)  # fmt: skip
    answer = build_answer(run)
    assert answer.verdict == "not shown"
    assert answer.lines[0].startswith("Keep all blocks: no shallower model keeps 99 %")
    assert answer.trial.startswith("full-12-")


@pytest.mark.parametrize(
    ("methods", "verdict", "headline", "tiles"),
    [
        (set(), "nothing finished", "no trial of this run is finished", []),
        ({"popularity", "sasrec"}, "no teacher", "no trial of the teacher is finished",
         ["NDCG@10, popularity", "NDCG@10, SASRec"]),
        ({"sasrec", "full"}, "no depth tried", "no depth below the teacher's was tried",
         ["NDCG@10, teacher", "NDCG@10, SASRec"]),
        ({"full", "early-exit"}, "probes only", "no shallower model was trained",
         ["NDCG@10, teacher"]),
    ],
)  # fmt: skip
def test_what_is_missing_for_an_answer_is_named(
    methods: set[str], verdict: str, headline: str, tiles: list[str], make: Make, tmp_path: Path
) -> None:
    answer = build_answer(make(tmp_path, users=60, methods=methods))
    assert (answer.verdict, answer.kept, answer.depth) == (verdict, None, None)
    assert answer.lines[0].startswith(f"No answer: {headline}")
    assert [tile.label for tile in answer.tiles] == tiles


def test_a_study_without_a_teacher_is_told_from_an_unfinished_one(
    make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, users=60, methods={"popularity", "finetune"})
    run.study = replace(run.study, methods=("popularity", "finetune"))
    answer = build_answer(run)
    assert answer.verdict == "no teacher"
    assert answer.lines[0].startswith("No answer: this study has no teacher (full)")


def test_a_failed_teacher_is_no_answer(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=60, failing=[("full", 12, 0), ("full", 12, 1)]))
    assert answer.verdict == "no teacher"
    assert answer.lines[:2] == (
        "No answer: the teacher failed.", "Its error: RuntimeError: loss is not finite.",
    )  # fmt: skip
    assert any(text.startswith("2 of 73 trials failed;") for text in answer.caveats)


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
    # what the log leaves open comes before all else, the controls before the conditions
    data, control, rate = (
        text.index(words)
        for words in ("Data: no times", "The teacher is less accurate than SASRec", "The learning")
    )
    assert data < control < rate
    assert "was not tuned (0.001 for all)" in text
    text = said(make, tmp_path, users=300, gain=lambda m, _: 0.7 if m == "random-init" else 0.0)
    assert "Pretraining is not shown to help" in text
    text = said(make, tmp_path, methods={"full", "finetune"})
    assert "SASRec was not run" in text
    assert "No random init" in text
    for gain in (0.0, 1.1):  # of a head on the last item alone
        run = {"users": 300, "methods": {"full", "finetune", "readout"}}
        text = said(make, tmp_path, **run, gain=lambda _, d, gain=gain: 0.0 if d else gain)
        assert ("not shown that blocks add" in text) == bool(gain)
    run = make(tmp_path / "words", **run, gain=lambda _, d: 0.0 if d else 1.1)
    for reads, read in (("items", "item"), ("titles", "token")):
        run.study = override(run.study, **{"backbone.reads": reads})
        text = " ".join(build_answer(run).caveats)
        assert f"a fresh head on the last {read} alone reaches" in text


def test_trainings_that_may_have_gone_further_are_named(make: Make, tmp_path: Path) -> None:
    run = make(tmp_path, users=100)
    run.study = override(run.study, **{"recipe.learning_rate": [1e-3, 3e-3, 1e-2]})

    def train(records: Iterable[Record], rate: float, best: int) -> list[str]:
        for record in records:
            record.training.learning_rate, record.training.best_epoch = rate, best
        return [text for text in build_answer(run).caveats if "may help" in text]

    trained = [record for record in run.records if record.training]
    whole, epochs = run.study.sasrec.recipe.epochs, run.study.recipe.epochs
    assert train(trained, 3e-3, 1) == []  # in the middle of all that was tried
    assert not any("not tuned" in text for text in build_answer(run).caveats)
    # SASRec has one rate of its own, and more epochs than the others
    assert whole > epochs
    assert train((r for r in trained if r.method == "sasrec"), 1e-2, epochs) == []
    (said,) = train((r for r in trained if r.method == "sasrec"), 1e-2, whole)
    assert said == "A longer training may help what was best at its last epoch: SASRec."
    train((r for r in trained if r.method == "random-init"), 1e-3, 2)
    last, ends = train((r for r in trained if r.method == "full"), 1e-2, epochs)
    assert last.endswith("epoch: SASRec, teacher 12.")
    assert re.search(r"was the lowest for random init \d.*; the highest for teacher 12\.$", ends)
    last, _ = train(trained, 1e-2, epochs)
    assert re.search(r" and \d+ more\.$", last)  # a sentence, no list of thirty models


def test_few_hits_are_counted(make: Make, tmp_path: Path) -> None:
    assert "intervals are rough" not in said(make, tmp_path)
    assert re.search(r"hits the targets of \d users alone: intervals are rough", said(
        make, tmp_path, users=12
    ))  # fmt: skip


def test_a_teacher_no_better_than_popularity_answers_nothing(make: Make, tmp_path: Path) -> None:
    worst = {"popularity": 1.9, "distill": 0.5}
    answer = build_answer(make(tmp_path, users=300, gain=lambda method, _: worst.get(method, 0.0)))
    assert (answer.verdict, answer.command) == ("weak teacher", "")
    assert answer.lines[0].startswith("No answer: the teacher is")
    assert "popularity" in answer.lines[0]


def test_without_times_no_speed_is_claimed(make: Make, tmp_path: Path) -> None:
    answer = build_answer(make(tmp_path, users=100, timing=False))
    assert "faster" not in " ".join(answer.lines)
    assert answer.inference is None
    labels = [tile.label for tile in answer.tiles]
    assert labels == ["accuracy kept", "parameters", "against SASRec"]
    assert any("No times were compared" in text for text in answer.caveats)
