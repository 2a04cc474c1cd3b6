"""The front of all levers, and whether their losses add up, against direct computations."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import Interval, interaction_interval, ratio_interval
from depthprobe.methods import method_info
from depthprobe.report import page
from depthprobe.report.answer import build_answer
from depthprobe.report.drawing import FIGURES
from depthprobe.report.figures import accuracy_vs_cost, curves
from depthprobe.report.front import (
    AXES,
    front_table,
    interaction_table,
    interaction_words,
    interactions,
    pareto_front,
    priced,
)
from depthprobe.report.numbers import FULL, Summary, summarise
from depthprobe.report.page import tables_of
from depthprobe.report.result import make_result
from depthprobe.report.tables import cost_table, slice_table
from depthprobe.runs.records import Validation

Make = Callable[..., Any]
PLAIN = {"popularity", "sasrec", "full", "finetune", "distill"}
QUANTISED = PLAIN | {"int8:full", "int8:distill"}
NARROW = QUANTISED | {"distill:narrow", "int8:distill:narrow"}


def gains(run: Any, method: str, depth: int) -> np.ndarray:
    """NDCG@10 of each seed and user, (S, U), from the table of ranks."""
    trials = run.trials[(run.trials["method"] == method) & (run.trials["depth"] == depth)]
    users = run.users[run.users["protocol"] == FULL]
    table = users.pivot(index="trial", columns="user", values="rank")
    return per_user_metric(table.loc[trials["trial"]].to_numpy(), "NDCG@10")


@pytest.fixture(scope="module")
def made(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp("levers"), methods=QUANTISED, users=400, seeds=3)


@pytest.fixture(scope="module")
def narrow(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make(tmp_path_factory.mktemp("narrow"), methods=NARROW, users=400, seeds=3)


@pytest.fixture(scope="module")
def levers(made: Any) -> Summary:
    """The numbers of a run with quantised models."""
    return summarise(made)


@pytest.mark.parametrize("cost", [*AXES, "parameters"])
def test_the_front_against_brute_force(levers: Summary, cost: str) -> None:
    named = "bytes" if cost == "size" else cost
    places = {
        p.trials: (p.cost(named) or 0, levers.share(p).value)  # type: ignore[union-attr]
        for p in priced(levers, cost)
    }
    assert any(":int8" in trials[0] for trials in places)
    expected = {
        trials
        for trials, (x, y) in places.items()
        if not any((u <= x and v >= y) and (u, v) != (x, y) for u, v in places.values())
    }
    assert {point.trials for point in pareto_front(levers, cost)} == expected


def test_every_model_stands_in_the_table_with_its_costs(made: Any, levers: Summary) -> None:
    table = front_table(levers)
    assert table is not None
    frame = table.frame.set_index(["method", "depth"])
    assert set(frame.index.get_level_values("method")) == QUANTISED - {"popularity"}
    row = frame.loc["int8:distill", 4]
    own, source, teacher = (
        gains(made, *name) for name in (("int8:distill", 4), ("distill", 4), ("full", 12))
    )
    of_source, of_teacher = ratio_interval(own, source), ratio_interval(own, teacher)
    assert row["of source"] == pytest.approx(of_source.value)
    assert row["of source low"] == pytest.approx(of_source.low)
    assert row["NDCG@10 of teacher high"] == pytest.approx(of_teacher.high)
    assert pd.isna(frame.loc["distill", 4]["of source"])
    # four bytes a weight; of the blocks one
    plain, less = frame.loc["distill", 4], 3 * row["parameters blocks"]
    assert row["bytes"] == plain["bytes"] - less == 4 * row["parameters total"] - less
    assert row["user ms"] == pytest.approx(row["inference ms"] / 128)  # users of a batch
    assert row["levers"] == "int8"
    for cost in AXES:
        on_front = {p.trials for p in pareto_front(levers, cost)}
        point = next(p for p in levers.of("int8:distill") if p.depth == 4)
        assert (cost in row["front"].split(", ")) == (point.trials in on_front)
    assert "of its source's" in table.columns


def test_a_variant_stands_on_the_front_beside_its_method(levers: Summary) -> None:
    points = [
        replace(p, method="distill:cos") if p.method == "finetune" else p for p in levers.points
    ]
    offered = {point.method for point in priced(replace(levers, points=points), "size")}
    assert {"distill", "distill:cos"} <= offered


def test_training_time_is_that_of_all_that_a_model_takes(made: Any, levers: Summary) -> None:
    """Steps times the measured step: of a student its teacher's too, of int8 its source's."""
    step = {
        (record.method, record.depth or int(record.id.split("-")[1])): record.costs
        for record in made.records
    }

    def seconds(method: str, depth: int) -> float:
        costs = step[method, depth]
        return float(costs.training.steps * np.median(costs.timing["train_step"].seconds))

    points = {(p.method, p.depth): p.training for p in levers.points}
    teacher, features = seconds("full", 12), 900 - 60 * 13
    assert points["full", 12] == pytest.approx(teacher)
    assert points["finetune", 4] == pytest.approx(seconds("finetune", 4))
    assert points["distill", 4] == pytest.approx(seconds("distill", 4) + features + teacher)
    assert points["int8:distill", 4] == points["distill", 4]
    assert points["int8:full", 12] == points["full", 12]
    assert points["popularity", 0] is None


def test_an_early_exit_costs_its_teacher_s_training(summary: Summary) -> None:
    assert {p.training for p in summary.of("early-exit")} == {summary.of("full")[0].training}


def test_a_step_that_was_not_timed_counts_by_the_clock(make: Make, tmp_path: Path) -> None:
    made = make(tmp_path, methods={"full", "finetune"}, users=40, seeds=1, timing=False)
    points = {(p.method, p.depth): p.training for p in summarise(made).points}
    assert points["finetune", 4] == 60.0 * 5


def test_losses_of_two_levers_equal_a_recomputation(made: Any, levers: Summary) -> None:
    found = {each.model.depth: each for each in interactions(levers)}
    assert sorted(found) == [1, 2, 4]
    teacher, alone = gains(made, "full", 12), gains(made, "int8:full", 12)
    for depth, each in found.items():
        model, both = gains(made, "distill", depth), gains(made, "int8:distill", depth)
        assert each.alone.value == pytest.approx(1 - model.mean() / teacher.mean())
        assert each.other.value == pytest.approx(1 - alone.mean() / teacher.mean())
        assert each.both.value == pytest.approx(1 - both.mean() / teacher.mean())
        sums = each.alone.value + each.other.value
        assert each.more.value == pytest.approx(each.both.value - sums)
        assert each.more == interaction_interval(model, alone, both, teacher)
        assert each.seeds == 3
    table = interaction_table(levers)
    assert table is not None
    assert table.frame["more than the sum"].tolist() == [e.more.value for e in found.values()]


def test_the_sentence_says_no_more_than_the_intervals(
    levers: Summary, make: Make, tmp_path: Path
) -> None:
    found = interactions(levers)
    shown = [each for each in found if each.more.low > 0]
    assert shown  # int8 costs the shallowest most in this world
    most = max(shown, key=lambda each: each.more.value)
    points = f"{100 * most.more.value:.2f} [{100 * most.more.low:.2f}, {100 * most.more.high:.2f}]"
    said = interaction_words(levers)
    assert said.startswith(
        f"int8 costs more on {most.model.name} than on the teacher: by {points} points."
    )
    assert said.endswith(f"{len(shown)} of 3 such intervals leave out 0.")

    def undo(method: str, depth: int) -> float:
        return 0.3 / depth if method.startswith("int8") else 0.0

    equal = summarise(make(tmp_path, methods=QUANTISED, users=400, seeds=3, gain=undo))
    assert not any(e.more.low > 0 or e.more.high < 0 for e in interactions(equal))
    assert interaction_words(equal).startswith("No interaction of int8 is shown: with distilled ")


def test_width_and_depth_and_width_and_int8_have_an_interaction_each(narrow: Any) -> None:
    summary = summarise(narrow)
    found = {(each.lever, each.model.name): each for each in interactions(summary)}
    assert list(found) == [
        ("int8", "distilled 1"), ("int8", "distilled 2"), ("int8", "distilled 2, narrow"),
        ("int8", "distilled 4"), ("int8", "distilled 12, narrow"), ("narrow", "distilled 2"),
    ]  # fmt: skip
    teacher, quantised = gains(narrow, "full", 12), gains(narrow, "int8:full", 12)
    for depth in (2, 12):
        model, both = (gains(narrow, f"{q}distill:narrow", depth) for q in ("", "int8:"))
        name = f"distilled {depth}, narrow"
        assert found["int8", name].more == interaction_interval(model, quantised, both, teacher)
    shallow, wide = gains(narrow, "distill:narrow", 2), gains(narrow, "distill:narrow", 12)
    own = found["narrow", "distilled 2"]
    assert own.more == interaction_interval(gains(narrow, "distill", 2), wide, shallow, teacher)
    assert re.search(r"\. (No interaction of narrow|narrow costs) ", interaction_words(summary))


def test_a_lever_that_changes_nothing_is_said_to(make: Make, tmp_path: Path) -> None:
    """And not that the dust of a sum is an interaction."""
    made = make(tmp_path, methods=QUANTISED, users=60, seeds=3)
    source = made.users["trial"].str.removesuffix(":int8")
    ranks = made.users.set_index(["trial", "protocol", "user"])["rank"]
    keys = list(zip(source, made.users["protocol"], made.users["user"], strict=True))
    made.users["rank"] = ranks.loc[keys].to_numpy()
    summary = summarise(made)
    assert {each.more for each in interactions(summary)} == {Interval(0, 0, 0)}
    assert interaction_words(summary) == "int8 changes no test user's NDCG@10."


def test_labels_of_the_front_stay_inside_and_apart(narrow: Any) -> None:
    ax = accuracy_vs_cost(summarise(narrow))
    canvas = FigureCanvasAgg(ax.get_figure(root=True))
    canvas.draw()
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in ax.texts]
    inside = ax.get_window_extent()
    assert len(boxes) > 2
    assert all(box.x0 >= inside.x0 - 1 and box.x1 <= inside.x1 + 1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_a_lever_is_held_against_itself_on_the_teacher(levers: Summary) -> None:
    """Where the teacher was quantised in two ways, each has its own interactions."""
    teacher = levers.of("int8:full")[0]
    other = replace(
        teacher, method="int4:full", levers=("int4",), trials=levers.of("full")[0].trials
    )
    both = replace(levers, points=(other, *levers.points))
    assert interactions(both) == interactions(levers)


def test_a_depth_has_no_time_of_a_narrower_model(make: Make, tmp_path: Path) -> None:
    made = make(tmp_path, methods={"full", "distill:narrow"}, users=40, seeds=1)
    assert cost_table(made) is None


def test_a_point_names_its_levers_in_the_order_in_which_they_were_pulled(narrow: Any) -> None:
    summary = summarise(narrow)
    points = {p.method: p for p in summary.points if p.depth == 2}
    both = points["int8:distill:narrow"]
    assert (both.levers, both.plain, both.name) == (
        ("narrow", "int8"), "distill", "distilled 2, narrow, int8",
    )  # fmt: skip
    assert summary.source(both) == points["distill:narrow"]
    assert points["distill:narrow"].levers == ("narrow",)
    assert points["distill"].levers == ()


def test_a_quantised_method_is_named_after_its_source() -> None:
    assert method_info("int8:distill").label == "distilled, int8"
    assert method_info("int8:distill:narrow").label == "distilled: narrow, int8"


def test_without_the_lever_at_full_depth_there_is_no_interaction(
    make: Make, tmp_path: Path
) -> None:
    lacking = summarise(make(tmp_path, methods=QUANTISED - {"int8:full"}, users=40, seeds=2))
    assert (interactions(lacking), interaction_table(lacking)) == ([], None)
    assert interaction_words(lacking) == ""


def test_only_seeds_that_all_four_arms_have_count(make: Make, tmp_path: Path) -> None:
    failing = [("int8:full", 12, 1), ("int8:distill", 4, 2)]
    found = interactions(summarise(make(tmp_path, methods=QUANTISED, seeds=3, failing=failing)))
    assert {each.model.depth: each.seeds for each in found} == {1: 2, 2: 2, 4: 1}


def test_other_levers_change_no_number_of_depth(make: Make, tmp_path: Path) -> None:
    """Verdict, curves, slices and times by depth are those of the run without them."""
    world = {"users": 200, "seeds": 3, "gain": lambda m, _: 0.4 if m == "distill" else 0.0}
    bare, more = (summarise(make(tmp_path, methods=m, **world)) for m in (PLAIN, NARROW))
    assert more.sufficiency == bare.sufficiency
    for kept in (True, False):
        assert curves(more, "NDCG@10", kept=kept) == curves(bare, "NDCG@10", kept=kept)
    for table in (cost_table, slice_table):
        one, other = table(more), table(bare)
        assert (one and one.rows) == (other and other.rows)
    first, second = build_answer(bare), build_answer(more)
    assert second.lines[:3] == first.lines
    assert replace(second, lines=first.lines, quantized=None) == first


def test_a_quantised_recommendation_is_measured_against_itself(make: Make, tmp_path: Path) -> None:
    made = make(tmp_path, methods=QUANTISED, users=400, seeds=3,
                gain=lambda m, _: 0.6 if "distill" in m else -0.3 * (m == "sasrec"))  # fmt: skip
    summary = summarise(made)
    answer = build_answer(summary)
    assert answer.verdict == "shown"
    assert (of := answer.quantized) is not None
    assert of.trial == f"{answer.trial}:int8"
    assert of.command == f"depthprobe export {tmp_path} {of.trial} DIR"
    own, source = (
        gains(made, "int8:distill", answer.depth or 0),
        gains(made, "distill", answer.depth or 0),
    )
    assert of.kept == ratio_interval(own, source)
    said = answer.lines[3]
    assert f"it keeps {100 * of.kept.value:.1f} % [" in said
    assert of.latency is not None
    assert of.latency.value < 1  # int8 is slower in this world, and that is what is said
    assert " slower [" in said
    assert "faster" not in said
    assert said.endswith("That this suffices is not tested.")
    assert of.bytes is not None
    assert f"{100 * of.bytes:.0f} % of its bytes" in said
    result = make_result(summary, answer, tables_of(summary))
    assert result.recommendation is not None
    assert result.recommendation.trial == answer.trial  # still the unquantised one
    assert result.recommendation.quantized is not None
    assert result.recommendation.quantized.trial == of.trial
    assert result.recommendation.quantized.command == of.command


def test_page_and_terminal_say_how_the_quantised_one_is_exported(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make(tmp_path / "run", methods=QUANTISED, users=400, seeds=3,
                gain=lambda m, _: 0.6 if "distill" in m else -0.3 * (m == "sasrec"))  # fmt: skip
    monkeypatch.setattr(page, "save_figure", lambda *_: '<svg viewBox="0 0 1 1"></svg>')
    summary = summarise(made)
    answer = build_answer(summary)
    assert answer.quantized is not None
    lines = page.report_words(summary, tmp_path / "page.html").splitlines()
    assert lines[3:] == [
        answer.lines[3], answer.command, answer.quantized.command, str(tmp_path / "page.html"),
    ]  # fmt: skip
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"<code>{answer.quantized.command}</code>" in text
    assert "Do the losses add up?" in text
    assert interaction_words(summary).partition(" by ")[0] in text


def test_of_several_the_smallest_within_the_margin_is_named(make: Make, tmp_path: Path) -> None:
    def gain(method: str, depth: int) -> float:
        more = 0.32 / depth if method.startswith("int8") else 0.0
        return more + (0.6 if "distill" in method else -0.3 * (method == "sasrec"))

    made = make(tmp_path, methods=QUANTISED, users=400, seeds=3, gain=gain)
    for record in made.records:  # the seed that is best on validation
        record.validation = Validation(ndcg=0.1 + record.seed, users=9)
    summary = summarise(made)
    answer = build_answer(summary)
    int8 = next(p for p in summary.of("int8:distill") if p.depth == answer.depth)
    bad = next(p for p in summary.of("int8:full"))
    for trials, expected in ((int8.trials, "int4"), (bad.trials, "int8")):
        half = 0.5 * (int8.bytes or 0)
        int4 = replace(int8, method="int4:distill", levers=("int4",), trials=trials, bytes=half)
        of = build_answer(replace(summary, points=(*summary.points, int4))).quantized
        assert of is not None
        ship = next(p for p in summary.of("distill") if p.depth == answer.depth)
        assert of.bytes == pytest.approx((half if expected == "int4" else int8.bytes) / ship.bytes)
        assert of.trial == f"{ship.trials[2]}:int8"


def test_a_figure_of_levers(levers: Summary) -> None:
    ax = accuracy_vs_cost(levers)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels.count("distilled") == 1
    assert "int8" in labels
    assert ", int8" in " ".join(text.get_text() for text in ax.texts)
    hollow = [line for line in ax.get_lines() if line.get_markerfacecolor() == "white"]
    assert len(hollow) == 3  # of the teacher and the student, and of the legend
    caption = FIGURES["accuracy_vs_size"].drawn(replace(levers, margin=0.3))[1]
    assert "the cheapest with one lever is " in caption
    assert ", the cheapest with several is distilled " in caption
    unequal = replace(
        levers, points=tuple(p if p.of else replace(p, bytes=None) for p in levers.points)
    )
    assert accuracy_vs_cost(unequal).get_xlabel() == "parameters in all"
