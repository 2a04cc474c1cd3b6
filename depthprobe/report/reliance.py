"""What probes say of blocks, spans and users, where no trial does; with the seed of its teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.trust import trust
from depthprobe.report.numbers import FULL, HEADLINE, RunLike, Summary, as_summary
from depthprobe.report.style import NONE, bounds, method_style
from depthprobe.report.tables import Cell, Row, Table


def probe_table(summary: Summary, method: str) -> pd.DataFrame:
    """The table of ``similarity``, ``taylor`` or ``settling``; empty where there is none."""
    run = summary.run
    return run.scores(method) if hasattr(run, "scores") else pd.DataFrame()


def scores_of(summary: Summary, score: str) -> pd.DataFrame:
    """One score by name: score, start, end, value, seed; of the blocks [start, end)."""
    frame = probe_table(summary, "similarity")
    return frame if frame.empty else frame[frame["score"] == score]


# How far the cheap scores of a run can be relied on: held against the damage that it measured.

Span = tuple[int, int]  # [start, end)
FEWEST_CANDIDATES = 4  # of three, every sixth order is the right one by chance


@dataclass(frozen=True)
class _Question:
    """Candidates of one kind: what they are called, and which method measured their damage."""

    kind: str
    method: str
    trials: Mapping[Span, str]  # what each candidate leaves out, and its trial
    scores: Mapping[str, Mapping[Span, float]]  # higher: believed to matter more


def reliance_table(run: RunLike | Summary) -> Table | None:
    """Rank correlation of each cheap score with the measured damage; None without either.

    One row a score, kind of candidate and seed. Damage is the mean loss of NDCG@10 of the test
    users, or for depths that of the variants trained there; intervals are over users. The damage's
    reliability is the candidates', so each of their scores has the same.
    """
    summary = as_summary(run)
    frames = []
    for seed in summary.teacher.seeds if summary.teacher else ():
        for question in _questions(summary, seed):
            frame = _answered(summary, question, seed)
            if frame is not None:
                frames.append(frame.assign(candidate=question.kind, by=question.method, seed=seed))
    if not frames:
        return None
    frame = pd.concat(frames, ignore_index=True)
    frame = frame[["candidate", "by", "seed", *frame.columns.drop(["candidate", "by", "seed"])]]
    rows, last = [], None
    for _, found in frame.iterrows():
        kind = (found["candidate"], found["by"], found["seed"])
        cells = [
            Cell(str(found["candidate"])),
            Cell(method_style(str(found["by"])).label),
            Cell(re.sub(r"(?<=\w)-(?=\w)", " ", str(found["score"]))),
            Cell(str(found["seed"])),
            Cell(str(found["candidates"])),
            _reliability(float(found["reliability"])),
            _correlation(found, "spearman"),
            _correlation(found, "kendall"),
        ]
        rows.append(Row(tuple(cells), group=kind != last))
        last = kind
    columns = (
        "candidates", "damage by", "cheap score", "seed", "number", "damage's reliability",
        "Spearman", "Kendall",
    )  # fmt: skip
    return Table("reliance", columns, 3, tuple(rows), frame)


def _questions(summary: Summary, seed: int) -> list[_Question]:
    maps, done = _maps(summary, seed), _done(summary, seed)
    trials = {
        method: {_span(trial.removed): trial.name for trial in done if trial.method == method}
        for method in ("skip", "span", "drop-attention", "drop-mlp")
    }
    whole = {
        name: values
        for name, values in maps.items()
        if name not in {"attention-influence", "mlp-influence"}
    }
    of_blocks = {
        name: {span: v for span, v in values.items() if span[1] - span[0] == 1}
        for name, values in whole.items()
    }
    of_spans = {name: dict(values) for name, values in whole.items()}
    damages = _damages(done, trials["skip"])
    for name, values in (*of_blocks.items(), ("skip damage", damages)):
        summed = _summed(values, trials["span"])
        if name not in of_spans or not set(trials["span"]) <= set(of_spans[name]):
            of_spans[f"{name}, summed"] = summed
    questions = [
        _Question("blocks", "skip", trials["skip"], of_blocks),
        _Question("spans", "span", trials["span"], of_spans),
    ]
    for part in ("attention", "mlp"):
        scores = {name: maps[name] for name in maps if name == f"{part}-influence"}
        kind = {"attention": "attention alone", "mlp": "MLP alone"}[part]
        questions.append(_Question(kind, f"drop-{part}", trials[f"drop-{part}"], scores))
    return questions + _depths(done, maps)


@dataclass(frozen=True)
class _Trial:
    """A trial of one seed, and its mean NDCG@10."""

    name: str
    method: str
    depth: int
    removed: str
    mean: float


def _done(summary: Summary, seed: int) -> list[_Trial]:
    """The seed's trials that were ranked."""
    trials = summary.run.trials
    own = trials[(trials["status"] == "done") & (trials["seed"] == seed)]
    columns = (own[name] for name in ("trial", "method", "depth", "removed"))
    return [
        _Trial(str(name), str(method), int(depth), str(removed), _mean(summary, str(name)))
        for name, method, depth, removed in zip(*columns, strict=True)
        if summary.ranks.has([str(name)], FULL)
    ]


def _mean(summary: Summary, trial: str) -> float:
    return float(summary.ranks.values(FULL, HEADLINE, [[trial]])[0].mean())


def _span(removed: str) -> Span:
    """Blocks as a run's tables write them, to [start, end).

    >>> _span("4"), _span("4-6")
    ((4, 5), (4, 7))
    """
    ends = removed.split("-")
    return int(ends[0]), int(ends[-1]) + 1


def _depths(done: Sequence[_Trial], maps: Mapping[str, Mapping[Span, float]]) -> list[_Question]:
    """Depths below the whole one, against the accuracy after training there."""
    blocks = max((trial.depth for trial in done if trial.method == "full"), default=0)
    read = {
        f"{method_style(method).label} loss": {
            (trial.depth, blocks): -trial.mean
            for trial in done
            if trial.method == method and trial.depth < blocks
        }
        for method in ("early-exit", "early-exit-raw", "readout", "tuned-lens")
    }
    scores = {name: values for name, values in (read | dict(maps)).items() if values}
    found = []
    for method in ("finetune", "heal", "distill"):
        trials = {
            (trial.depth, blocks): trial.name
            for trial in done
            if trial.method == method and trial.depth < blocks
        }
        usable = {name: values for name, values in scores.items() if set(trials) <= set(values)}
        found.append(_Question("depths", method, trials, usable))
    return found


def _maps(summary: Summary, seed: int) -> dict[str, dict[Span, float]]:
    """The run's scores by name and span, each turned so that more means more important."""
    found: dict[str, dict[Span, float]] = {}
    for method in ("similarity", "taylor"):
        frame = probe_table(summary, method)
        if frame.empty:
            continue
        own = frame[(frame["seed"] == seed) & (frame["score"] != "norm")]
        for name, start, end, value in zip(
            *(own[column] for column in ("score", "start", "end", "value")), strict=True
        ):
            turned = 1 - float(value) if name == "cka" else float(value)
            label = "1 - CKA" if name == "cka" else str(name).replace("taylor", "Taylor")
            found.setdefault(label, {})[int(start), int(end)] = turned
    return found


def _damages(done: Sequence[_Trial], skips: Mapping[Span, str]) -> dict[Span, float]:
    """What each skip costs; nothing without the teacher to compare with."""
    means = {trial.name: trial.mean for trial in done}
    whole = [trial.mean for trial in done if trial.method == "full"]
    return {span: whole[0] - means[trial] for span, trial in skips.items() if whole}


def _summed(values: Mapping[Span, float], spans: Mapping[Span, str]) -> dict[Span, float]:
    """A span's score as the sum over its blocks, where each has one."""
    return {
        (start, end): sum(values[b, b + 1] for b in range(start, end))
        for start, end in spans
        if all((b, b + 1) in values for b in range(start, end))
    }


def _answered(summary: Summary, question: _Question, seed: int) -> pd.DataFrame | None:
    if summary.teacher is None or len(question.trials) < FEWEST_CANDIDATES:
        return None
    spans = list(question.trials)
    (whole,) = summary.teacher.of_seeds([seed])
    arms = [whole, *question.trials.values()]
    if not summary.ranks.has(arms, FULL):
        return None
    reference, *outcomes = summary.ranks.values(FULL, HEADLINE, [[arm] for arm in arms])
    scores = {
        name: np.array([values[span] for span in spans])
        for name, values in question.scores.items()
        if all(span in values for span in spans)
    }
    if not scores:
        return None
    resamples = int(summary.run.study.protocol.resamples)
    table = np.concatenate(outcomes).T  # (U, M)
    return trust(scores, reference[0], table, resamples=resamples)


def _reliability(value: float) -> Cell:
    return Cell(f"{value:.2f}" if math.isfinite(value) else NONE)


def _correlation(found: pd.Series, name: str) -> Cell:
    value, low, high = (float(found[f"{name}{end}"]) for end in ("", "_low", "_high"))
    if not math.isfinite(value):
        return Cell(NONE)
    return Cell(f"{value:.2f}", bounds(Interval(value, low, high), digits=2))
