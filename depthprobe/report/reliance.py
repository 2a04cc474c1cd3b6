"""How far the cheap scores of a run can be relied on, held against the damage that it measured."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from depthprobe.evaluation.statistics import Interval
from depthprobe.evaluation.trust import trust
from depthprobe.methods import METHODS, names
from depthprobe.report import style
from depthprobe.report.numbers import (
    BLOCK,
    FULL,
    HEADLINE,
    PARTS,
    READERS,
    SPAN,
    TEACHER,
    Source,
    Summary,
    as_summary,
    span_of,
)
from depthprobe.report.tables import Cell, Column, Table, label, make_table, ready, records, text

Span = tuple[int, int]  # [start, end)
Scores = dict[str, dict[Span, float]]  # by name; higher: believed to matter more
FEWEST_CANDIDATES = 4  # of three, every sixth order is the right one by chance


def score_tables(summary: Summary) -> Iterator[pd.DataFrame]:
    """What the probes that leave a table found, with the seed of their teacher."""
    found = (summary.run.scores(name) for name, method in METHODS.items() if method.table)
    return (frame for frame in found if not frame.empty)


def block_scores(summary: Summary, score: str = "") -> pd.DataFrame:
    """Scores of the blocks [start, end): score, start, end, value, seed; all, or one by name."""
    frames = [frame for frame in score_tables(summary) if "score" in frame]
    if not frames:
        return pd.DataFrame(columns=["score", "start", "end", "value", "seed"])
    scores = pd.concat(frames, ignore_index=True)
    return scores[scores["score"] == score] if score else scores


@dataclass(frozen=True)
class _Question:
    """Candidates of one kind: what they are called, and which method measured their damage."""

    kind: str
    method: str
    trials: Mapping[Span, str]  # what each candidate leaves out, and its trial
    scores: Mapping[str, Mapping[Span, float]]


def reliance_table(run: Source) -> Table | None:
    """Rank correlation of each cheap score with the measured damage; None without either.

    One row a score, kind of candidate and seed. Damage is the mean loss of NDCG@10 of the test
    users, or for depths that of the variants trained there; intervals are over users. The damage's
    reliability is the candidates', so each of their scores has the same.
    """
    summary = as_summary(run)
    frames = []
    for seed in summary.teacher.seeds if summary.teacher else ():
        for question in _questions(summary, seed):
            frame = _correlations(summary, question, seed)
            if frame is not None:
                frames.append(frame.assign(candidate=question.kind, by=question.method, seed=seed))
    if not frames:
        return None
    frame = pd.concat(frames, ignore_index=True)
    frame = frame[["candidate", "by", "seed", *frame.columns.drop(["candidate", "by", "seed"])]]
    rows = records(frame)
    for row in rows:
        row["group"] = row["candidate"], row["by"], row["seed"]
        row["score"] = re.sub(r"(?<=\w)-(?=\w)", " ", row["score"])
        found = (row["reliability"], math.nan, math.nan)
        row["reliability"] = _cell(found)
        for name in ("spearman", "kendall"):
            row[name] = _cell((row[name], row[f"{name}_low"], row[f"{name}_high"]))
    columns: list[Column] = [
        ("candidates", "candidate", text), ("damage by", "by", label),
        ("cheap score", "score", text), ("seed", "seed", text), ("number", "candidates", text),
        ("damage's reliability", "reliability", ready), ("Spearman", "spearman", ready),
        ("Kendall", "kendall", ready),
    ]  # fmt: skip
    return make_table("reliance", rows, columns, words=3, group="group", frame=frame)


def _cell(found: tuple[float, float, float]) -> Cell | None:
    if not math.isfinite(found[0]):
        return None
    return Cell(f"{found[0]:.2f}", style.bounds(Interval(*found), digits=2))


def _questions(summary: Summary, seed: int) -> Iterator[_Question]:
    """Blocks, spans of blocks, parts of blocks, and depths."""
    scores, ranks, trials = _scores(summary, seed), summary.ranks, summary.run.trials
    own = trials[(trials["status"] == "done") & (trials["seed"] == seed)]
    done = [trial for trial in records(own) if ranks.has([trial["trial"]])]
    means = {
        trial["trial"]: float(ranks.values(FULL, HEADLINE, [[trial["trial"]]])[0].mean())
        for trial in done
    }
    spans: dict[str, dict[Span, str]] = {method: {} for method in (BLOCK, SPAN, *PARTS.values())}
    for trial in done:
        span = span_of(trial["removed"])
        if trial["method"] in spans and span is not None:
            spans[trial["method"]][span] = trial["trial"]
    of_parts = {f"{part}-influence" for part in PARTS}
    of_spans = {name: dict(values) for name, values in scores.items() if name not in of_parts}
    of_blocks = {
        name: {span: v for span, v in values.items() if span[1] - span[0] == 1}
        for name, values in of_spans.items()
    }
    yield _Question("blocks", BLOCK, spans[BLOCK], of_blocks)

    full = [trial for trial in done if trial["method"] == TEACHER]
    top = means[full[0]["trial"]] if full else math.nan
    damages = {span: top - means[trial] for span, trial in spans[BLOCK].items() if full}
    for name, values in (*of_blocks.items(), (f"{BLOCK} damage", damages)):
        # a score of single blocks is one of spans by its sum
        if name not in of_spans or not set(spans[SPAN]) <= set(of_spans[name]):
            of_spans[f"{name}, summed"] = {
                (start, end): sum(values[b, b + 1] for b in range(start, end))
                for start, end in spans[SPAN]
                if all((b, b + 1) in values for b in range(start, end))
            }
    yield _Question("spans", SPAN, spans[SPAN], of_spans)

    for part, kind in (("attention", "attention alone"), ("mlp", "MLP alone")):
        of_part = {name: scores[name] for name in scores if name == f"{part}-influence"}
        yield _Question(kind, PARTS[part], spans[PARTS[part]], of_part)

    # depths below the full one, against the accuracy after training there
    shallow: dict[str, dict[Span, str]] = {}
    for trial in done:
        if full and trial["depth"] < full[0]["depth"]:
            removed = trial["depth"], full[0]["depth"]
            shallow.setdefault(trial["method"], {})[removed] = trial["trial"]
    read = {
        f"{style.method_info(method).label} loss": {
            removed: -means[trial] for removed, trial in shallow[method].items()
        }
        for method in READERS
        if method in shallow
    }
    for method in names("trained"):
        if METHODS[method].selectable and method in shallow:
            usable = {n: v for n, v in (read | scores).items() if set(shallow[method]) <= set(v)}
            yield _Question("depths", method, shallow[method], usable)


def _scores(summary: Summary, seed: int) -> Scores:
    """The run's scores by name and span, each turned so that more means more important."""
    found: Scores = {}
    scores = block_scores(summary)
    own = scores[(scores["seed"] == seed) & (scores["score"] != "norm")]
    columns = (own[name] for name in ("score", "start", "end", "value"))
    for name, start, end, value in zip(*columns, strict=True):
        turned = 1 - float(value) if name == "cka" else float(value)
        called = "1 - CKA" if name == "cka" else str(name).replace("taylor", "Taylor")
        found.setdefault(called, {})[int(start), int(end)] = turned
    return found


def _correlations(summary: Summary, question: _Question, seed: int) -> pd.DataFrame | None:
    if summary.teacher is None or len(question.trials) < FEWEST_CANDIDATES:
        return None
    trials = [*summary.teacher.of_seeds([seed]), *question.trials.values()]
    scores = {
        name: np.array([values[span] for span in question.trials])
        for name, values in question.scores.items()
        if all(span in values for span in question.trials)
    }
    if not scores or not summary.ranks.has(trials):
        return None
    reference, *outcomes = summary.ranks.values(FULL, HEADLINE, [[trial] for trial in trials])
    table = np.concatenate(outcomes).T  # (U, M)
    return trust(scores, reference[0], table, resamples=summary.resamples)
