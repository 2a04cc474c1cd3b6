"""Degenerate worlds: whatever a run holds there is a page, with words and no broken number."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.metrics import METRICS, per_user_metric
from depthprobe.report import page
from depthprobe.report.answer import build_answer
from depthprobe.report.numbers import summarise
from depthprobe.report.tables import to_latex, to_markdown

METHODS = {
    *("popularity", "sasrec", "full", "early-exit", "readout", "skip"),
    *("finetune", "distill", "random-init"),
}
# an exponent, a zero with a minus, what is no number, a sentence with a hole
WRONG = re.compile(
    r"\d[eE][+-]\d|(?<![\d.\w])[-\u2212]0(\.0*)?(?![.\d])|\b([Nn]a[Nn]|inf|None|NaT)\b"
    r"|internal:| \.\s"
)
World = Callable[[Any], None]


def ranks(change: Callable[[pd.DataFrame], Any]) -> World:
    """A world whose ranks are others; its metrics are those of the ranks."""

    def build(run: Any) -> None:
        run.users = run.users.assign(rank=lambda users: change(users))
        groups = run.users.groupby(["trial", "protocol"])["rank"]
        own = {key: ranked.to_numpy() for key, ranked in groups}
        for name in METRICS:
            rows = run.metrics["metric"] == name
            keys = run.metrics.loc[rows, ["trial", "protocol"]].itertuples(index=False)
            means = [per_user_metric(own[tuple(key)], name).mean() for key in keys]
            for column in ("value", "ci_low", "ci_high"):
                run.metrics.loc[rows, column] = means

    return build


def one_hit(users: pd.DataFrame) -> Any:
    return np.where(users["user"] == users["user"].min(), 1.0, 900.0)


def teacher_misses(users: pd.DataFrame) -> Any:
    return users["rank"].where(~users["trial"].str.startswith("full"), np.inf)


def left(*methods: str) -> World:
    """A world in which the trials of some methods alone have not failed."""

    def build(run: Any) -> None:
        gone = run.trials.loc[~run.trials["method"].isin(methods), "trial"]
        run.trials.loc[run.trials["trial"].isin(gone), "status"] = "failed"
        run.trials.loc[run.trials["trial"].isin(gone), "error"] = "DivergedError: at step 3"
        run.trials.loc[run.trials["trial"].isin(gone), "parameters_total"] = np.nan
        run.records = [record for record in run.records if record.id not in set(gone)]
        run.users, run.metrics = (
            table[~table["trial"].isin(gone)] for table in (run.users, run.metrics)
        )

    return build


def only(**chosen: Any) -> World:
    """A world with some rows alone."""

    def build(run: Any) -> None:
        for table in ("trials", "users", "metrics"):
            frame = getattr(run, table)
            for name, values in chosen.items():
                if name in frame:
                    frame = frame[frame[name].isin(values)]
            setattr(run, table, frame)
        known = set(run.trials["trial"])
        run.users = run.users[run.users["trial"].isin(known)]
        run.records = [record for record in run.records if record.id in known]

    return build


def few_rounds(run: Any) -> None:
    for record in run.records:
        for rounds in record.costs.timing.values() if record.costs.timing else ():
            rounds.seconds = rounds.seconds[:1]


def still_states(run: Any) -> None:
    frame = run.probes["similarity"]
    frame["value"] = frame["value"].where(frame["score"] != "cka", np.nan)
    frame["value"] = frame["value"].where(frame["score"] == "cka", 0.0)


def probes_of_no_hit(run: Any) -> None:
    settling, order = run.probes["settling"], run.probes["shuffled"]
    settling[["final_rank", "best_rank"]] = np.inf
    order[["rank", "shuffled-1", "shuffled-2"]] = np.inf
    run.probes["random-blocks"][["value", "beats"]] = 0.0


def extreme(run: Any) -> None:
    protocol = replace(run.study.protocol, margin=1e-7, level=0.999999, metric="HR@1")
    run.study = replace(run.study, protocol=protocol)


def one_slice(run: Any) -> None:
    for family in run.slices.columns.drop("user"):
        run.slices[family] = pd.Categorical(["3-4"] * len(run.slices), ["3-4"])


WORLDS: dict[str, tuple[World, str]] = {  # and what the first line says
    "one hit": (ranks(one_hit), "No answer: the teacher is not shown to be more accurate than pop"),
    "no hit": (ranks(lambda users: 900.0), "No answer: the teacher hits no target"),
    "nothing can be served": (ranks(lambda users: np.inf), "No answer: the teacher hits no target"),
    "the teacher alone hits none": (ranks(teacher_misses), "No answer: the teacher hits no target"),
    "all are hit": (ranks(lambda users: 1.0), "No answer: the teacher is not shown to be more"),
    "all ranks are equal": (ranks(lambda users: 7.5), "No answer: the teacher is not shown to be"),
    "one user": (only(user=[1]), "No"),
    "three users": (only(user=[1, 4, 7]), "No"),
    "one seed": (only(seed=[0]), "Not decided: one seed never shows a depth. The others are not"),
    "one depth": (only(depth=[0, 1, 12]), "Keep all blocks"),
    "all failed": (left(), "No answer: no trial of this run is finished."),
    "popularity alone": (left("popularity"), "No answer: the teacher failed."),
    "a student alone": (left("distill"), "No answer: the teacher failed."),
    "the teacher alone": (left("full"), "No answer: no depth below the teacher's was tried."),
    "one round": (few_rounds, "Not decided"),
    "still states": (still_states, "Not decided"),
    "probes of no hit": (probes_of_no_hit, "Not decided"),
    "extreme settings": (extreme, "Not decided"),
    "one slice": (one_slice, "Not decided"),
}
RENDERED = {"one hit", "one user", "still states"}  # it takes most of the time


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.filterwarnings("error")
def test_every_world_has_a_page_in_words(
    world: str,
    make: Callable[..., Any],
    add_more: Callable[[Any], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = add_more(make(tmp_path, methods=METHODS, users=40, resamples=100))
    build, first = WORLDS[world]
    build(run)
    monkeypatch.setattr(page, "folder_of", lambda target: None)  # no files of figures
    if world not in RENDERED:
        monkeypatch.setattr(page, "rendered", lambda *_: b'<svg viewBox="0 0 1 1"></svg>')
    summary = summarise(run)
    made = page.build_report(summary, tmp_path / "page.html").read_text()
    answer, tables = build_answer(summary), page.tables_of(summary)
    assert answer.lines[0].startswith(first)
    assert len(answer.lines[0]) <= 120  # four lines on a phone
    assert answer.lines[0].count("[") <= 1
    text = re.sub(r"<(style|script|defs)>.*?</\1>", "", made, flags=re.DOTALL)
    pieces = [piece.strip() for piece in re.findall(r">([^<]+)<", text)]
    for table in tables.values():
        pieces += [*to_markdown(table).splitlines(), *to_latex(table).splitlines()]
    assert len(pieces) > 40
    of_times = 1 + (summary.level == 0.95) * 100  # whose intervals have a level of their own
    assert len(re.findall(r"95.% int", text)) <= of_times
    for piece in (*answer.lines, *answer.caveats, *pieces):
        assert not WRONG.search(piece), piece
