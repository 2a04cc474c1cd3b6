"""Controls: what shuffled histories cost, and chosen blocks beside random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
from matplotlib.axes import Axes

from depthprobe.report.answer import caveats
from depthprobe.report.controls import (
    order_table,
    order_words,
    selection_table,
    selections,
    untouched_table,
)
from depthprobe.report.drawing import FIGURES
from depthprobe.report.numbers import Summary


def test_what_shuffling_costs_is_said_with_its_interval(summary: Summary) -> None:
    table = order_table(summary)
    assert table is not None
    assert table.frame["lost"].tolist() == pytest.approx([0.4, 0.4, 1.0])
    assert table.frame["in order"].tolist() == pytest.approx([0.5, 0.5, 0.5])
    words, matters = order_words(summary)
    assert matters
    assert words.startswith("Shuffling the histories costs the teacher 40.0 % [")
    assert "SASRec 100.0 %" in words
    assert words not in caveats(summary, None)


def test_a_log_whose_order_is_worth_nothing_is_named_on_the_first_screen(summary: Summary) -> None:
    frame = summary.run.scores("shuffled")
    frame = frame.assign(**{name: frame["rank"] for name in ("shuffled-1", "shuffled-2")})
    blind, none = (_with_order(summary, each) for each in (frame, pd.DataFrame()))
    words, matters = order_words(blind)
    assert not matters
    assert "cannot tell depths apart" in words
    assert words in caveats(blind, None)
    assert order_table(none) is None
    assert order_words(none) == ("", True)


def _with_order(summary: Summary, frame: pd.DataFrame) -> Summary:
    run: Any = summary.run
    return replace(summary, run=replace(run, probes=run.probes | {"shuffled": frame}))


def test_chosen_blocks_stand_beside_random_ones(summary: Summary) -> None:
    table = selection_table(summary)
    assert table is not None
    assert table.rows == (
        ("4", "greedy", "0.3000", "0.1050\n[0.0100, 0.2000]", "100 %", "0.05"),
        ("4", "greedy, reversed", "0.0000", "0.1050\n[0.0100, 0.2000]", "0 %", "1.00"),
    )
    ax: Axes = selections(summary)
    band, lines = ax.collections[0], {line.get_label(): line for line in ax.get_lines()}
    assert band.get_datalim(ax.transData).bounds[1::2] == pytest.approx((0.01, 0.19))
    assert list(lines["greedy"].get_ydata()) == [0.3]
    _, caption = FIGURES["selections"].drawn(summary)
    assert caption.startswith("1 of 1 selection is better than random blocks")
    assert caption.endswith("one test at a time: greedy 4.")


def test_the_untouched_backbone_is_labelled_as_sampled(summary: Summary) -> None:
    table = untouched_table(summary)
    assert table is not None
    assert table.name.endswith("sampled")
    assert table.columns == ("sampled, 100 candidates", "depth", "HR@1", "HR@10", "NDCG@10")
    names = [(row[0], row[1]) for row in table.rows]
    without = "title likelihood, less that without a history"
    assert names[:2] == [("title likelihood", "4"), (without, "4")]
    assert names[2:] == [("popularity", "–"), ("chance", "–")]
    assert table.rows[1][3] == "0.500\n[0.338, 0.662]"  # 0.5 -+ 2.0227 * sqrt(0.25 / 39)
    assert table.rows[3][2:] == ("0.010", "0.100", "0.045")
    assert table.frame["HR@1"].tolist() == pytest.approx([0.25, 0.5, 0.2, 0.01])
    run: Any = summary.run
    empty = replace(run, probes=run.probes | {"prompt-only": pd.DataFrame()})
    assert untouched_table(replace(summary, run=empty)) is None
