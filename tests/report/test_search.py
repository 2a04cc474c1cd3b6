"""The section on a search: its words, table and figure against what was searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from depthprobe.evaluation.search import Step
from depthprobe.report.answer import _advice, build_answer
from depthprobe.report.drawing import FIGURES, NoData
from depthprobe.report.numbers import Summary, summarise
from depthprobe.report.result import make_result
from depthprobe.report.search import search_steps, search_table, search_words
from depthprobe.runs.search import Found
from depthprobe.study import Protocol, Study

KEEPS = {1: 0.8, 2: 0.99, 3: 1.0}


@pytest.fixture
def searched(make: Callable[..., Any], tmp_path: Path) -> Summary:
    """Four blocks, depth 2 suffices, three seeds; made of all that the search asked for."""
    draw = np.random.default_rng(0)
    ease = draw.gamma(2.0, 0.5, size=1000)
    study = Study(layers="find", methods=("full", "finetune"), seeds=3,
                  protocol=Protocol(margin=0.05))  # fmt: skip
    every = {
        depth: {seed: share * ease + 0.05 * draw.normal(size=1000) for seed in range(3)}
        for depth, share in {**KEEPS, 4: 1.0}.items()
    }
    every = {d: {s: np.maximum(v, 0) for s, v in arms.items()} for d, arms in every.items()}
    found = Found(study, 4, every, KEEPS, 0.1, {}, frozenset())
    trained: dict[int, dict[int, Any]] = {}
    for step in found.history.steps:
        trained.setdefault(step.depth, {})[step.seed] = every[step.depth][step.seed]
    seconds = {step: 60.0 * step.depth for step in found.history.steps}
    done = replace(found, trained=trained, seconds=seconds)
    assert done.history.steps == found.history.steps
    run = make(tmp_path, users=60, seeds=1, methods={"full"})
    return replace(summarise(run), found=done)


def test_the_words(searched: Summary) -> None:
    found = searched.found
    assert found is not None
    steps = found.history.steps
    share = round(100 * sum(step.depth for step in steps) / (3 * (1 + 2 + 3 + 4)))
    words = search_words(searched)
    assert words.startswith(
        f"The search trained {len(steps)} of the 12 models of a full sweep, {share} % of its"
    )
    assert found.state.shown == 2
    assert ("Refuted: depth 1." in words) == (1 in found.state.refuted)
    assert " It ended: nothing more is likely to change the verdict." in words
    result = make_result(searched, build_answer(searched), {}).search
    assert result is not None
    assert (result.trained, result.of, round(100 * result.compute)) == (len(steps), 12, share)
    assert result.ended == found.ended


def test_what_another_search_would_not_have_trained_is_counted(searched: Summary) -> None:
    found = searched.found
    assert found is not None
    more = {**found.trained, 3: {**found.trained.get(3, {}), 7: found.trained[2][0]}}
    grown = replace(searched, found=replace(found, trained=more))
    steps = len(found.history.steps)
    assert search_words(grown).startswith(f"The search trained {steps + 1} of the 12 models")
    _, caption = FIGURES["search_steps"].drawn(grown)
    assert f"would have trained these {steps} of the {steps + 1} models there" in caption


def test_open_depths_keep_no_blocks(searched: Summary) -> None:
    """Where the depths compared are too bad, and others have not been compared."""
    found = searched.found
    assert found is not None
    bad = {1: {s: 0.1 * found.trained[4][s] for s in (0, 1)}, 4: found.trained[4]}
    cut = replace(found, trained=bad)
    assert cut.state.verdict is not None
    assert cut.state.open
    row = cut.state.verdict.rows[0]
    assert row.kept.high < 0.95
    summary = replace(searched, found=cut)
    assert _advice(summary, cut.state.verdict)[0].startswith("Not decided: no depth is shown")
    assert _advice(replace(searched, found=None), cut.state.verdict)[0].startswith("Keep all")


def test_what_an_hour_would_buy(searched: Summary) -> None:
    found = searched.found
    assert found is not None
    few = {depth: {0: arms[0]} for depth, arms in found.trained.items() if depth in (2, 4)}
    seconds = {Step(2, 0): 120.0, Step(4, 0): 240.0}
    words = search_words(replace(searched, found=replace(found, trained=few, seconds=seconds)))
    assert "Open: depths 1-3; the best odds to be shown has " in words
    best = max(KEEPS, key=lambda depth: replace(found, trained=few).state.odds[depth])
    left = {1: 3, 2: 2, 3: 3}[best]
    assert words.endswith(f"with {left} more trainings of depth {best}, {left * best}.0 min.")


def test_a_depth_that_needs_deeper_ones_says_so(searched: Summary) -> None:
    found = searched.found
    assert found is not None
    some = replace(found, seconds={Step(2, 0): 120.0})
    some.__dict__["state"] = replace(
        found.state, verdict=None, seeds={2: 2}, refuted=(), odds={1: 0.1, 2: 0.5, 3: 0.4},
        chains={1: 1, 2: 3, 3: 3},
    )  # fmt: skip
    words = search_words(replace(searched, found=some))
    assert words.endswith("has 2, 50 % with 4 more trainings of depths 2-3, 11 min.")


def test_the_table(searched: Summary) -> None:
    table, found = search_table(searched), searched.found
    assert table is not None
    assert found is not None
    frame = table.frame.set_index("depth")
    assert list(frame.index) == [1, 2, 3]
    assert frame.loc[2, "verdict"] == "shown"
    assert frame.loc[2, "seeds"] == 3
    assert frame.loc[2, "p_value"] <= frame.loc[2, "level"]
    assert frame.loc[3, "verdict"] == "not needed"  # deeper than what is shown
    assert table.rows[2][-1] == "–"
    assert frame["predicted"].tolist() == list(KEEPS.values())


def test_the_figure(searched: Summary) -> None:
    found = searched.found
    assert found is not None
    ax, caption = FIGURES["search_steps"].drawn(searched)
    bars = [line for line in ax.lines if line.get_linewidth() == 5]
    assert [line.get_ydata()[0] for line in bars] == [step.depth for step in found.history.steps]
    ends = bars[-1].get_xdata()
    assert ends[1] == pytest.approx(100 * found.history.cost / 30)
    assert "depth 2 is shown" in caption


def test_without_a_search(make: Callable[..., Any], tmp_path: Path) -> None:
    summary = summarise(make(tmp_path, users=60, seeds=1, methods={"full"}))
    assert search_table(summary) is None
    assert search_words(summary) == ""
    with pytest.raises(NoData):
        search_steps(summary)


def test_a_search_that_ended_with_one_seed_says_why(searched: Summary) -> None:
    found = searched.found
    assert found is not None
    poor = {depth: {0: 0.3 * found.trained[4][0]} for depth in KEEPS}
    ended = replace(found, trained={4: {0: found.trained[4][0]}, **poor},
                    predicted=dict.fromkeys(KEEPS, 0.3))  # fmt: skip
    verdict = ended.state.verdict
    assert verdict is not None
    advice, _ = _advice(replace(searched, found=ended), verdict)
    assert advice == (
        "Not decided: one seed never shows a depth. The search ended: nothing more is likely to "
        "change the verdict."
    )
