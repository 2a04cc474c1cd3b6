"""How reliable a run's cheap scores are, compared with the damage that it measured."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from depthprobe.evaluation.trust import trust
from depthprobe.formatting import fixed, rounded
from depthprobe.methods import METHODS, method_info, names
from depthprobe.report.numbers import (
    BLOCK,
    FULL,
    PARTS,
    READERS,
    SPAN,
    TEACHER,
    Source,
    Summary,
    as_summary,
    span_of,
)
from depthprobe.report.tables import Column, Table, Values, label, make_table, plain

Span = tuple[int, int]  # [start, end)
OF_PARTS = {  # scores of parts of blocks: the part, and the score's label
    "attention-influence": ("attention", "attention alone"),
    "mlp-influence": ("mlp", "MLP alone"),
}
FEWEST_CANDIDATES = 4  # with three, a random order is right one time in six


def score_tables(summary: Summary) -> Iterator[pd.DataFrame]:
    """The tables of probes, with the seed of their teacher."""
    found = (summary.run.scores(name) for name, method in METHODS.items() if method.table)
    return (frame for frame in found if not frame.empty)


def block_scores(summary: Summary, score: str = "") -> pd.DataFrame:
    """All scores, or one by name, of blocks [start, end): score, start, end, value, seed."""
    frames = [frame for frame in score_tables(summary) if "score" in frame]
    if not frames:
        return pd.DataFrame(columns=["score", "start", "end", "value", "seed"])
    scores = pd.concat(frames, ignore_index=True)
    return scores[scores["score"] == score] if score else scores


class _Question(NamedTuple):
    """Candidates of one kind: their name, and the method that measured their damage."""

    kind: str
    method: str
    trials: Mapping[Span, str]  # what each candidate removes, and its trial
    scores: Mapping[str, Mapping[Span, float]]


def reliance_table(run: Source) -> Table | None:
    """Rank correlation of each cheap score with the measured damage; None without either.

    The frame has one row per score, kind of candidate and seed. The shown rows have means over
    seeds, and the lowest of their lower bounds. Damage is the test users' mean loss of the headline
    metric, for depths that of the models trained there; lower bounds are over users. The damage's
    reliability depends only on the candidates, so all their scores have the same.
    """
    summary = as_summary(run)
    frames = []
    for seed in summary.teacher.seeds if summary.teacher else ():
        for question in _questions(summary, seed):
            frame = _correlations(summary, question, seed)
            if frame is not None:
                frame.insert(0, "candidate", question.kind)
                frame.insert(1, "by", question.method)
                frame.insert(2, "seed", seed)
                frames.append(frame)
    if not frames:
        return None
    frame = pd.concat(frames, ignore_index=True)
    rows = []
    for (kind, by, score), own in frame.groupby(["candidate", "by", "score"], sort=False):
        row: Values = {name: own[name].mean() for name in ("candidates", "reliability")}
        row |= {"candidate": kind, "by": by, "group": (kind, by), "seeds": own["seed"].nunique()}
        row |= {"score": re.sub(r"(?<=\w)-(?=\w)", " ", str(score))}
        for name in ("spearman", "kendall"):
            low, value = own[f"{name}_low"].min(), fixed(own[name].mean())
            row[name] = f"{value}\nat least {fixed(low)}" if low > -1 else value
        rows.append(row)
    columns: list[Column] = [
        ("candidates", "candidate", plain), ("damage by", "by", label),
        ("cheap score", "score", plain), ("seeds", "seeds", plain),
        ("number", "candidates", rounded),
        ("damage's reliability", "reliability", fixed), ("Spearman", "spearman", plain),
        ("Kendall", "kendall", plain),
    ]  # fmt: skip
    return make_table("reliance", rows, columns, words=3, group="group", frame=frame)


def _questions(summary: Summary, seed: int) -> Iterator[_Question]:
    """A question each for blocks, spans of blocks, parts of blocks, and depths."""
    scores, ranks, trials = scores_of(summary, seed), summary.ranks, summary.run.trials
    own = trials[(trials["status"] == "done") & (trials["seed"] == seed)]
    done = [trial for trial in own.to_dict("records") if ranks.has([trial["trial"]])]
    means = {
        trial["trial"]: float(ranks.values(FULL, summary.headline, [[trial["trial"]]])[0].mean())
        for trial in done
    }
    spans: dict[str, dict[Span, str]] = {method: {} for method in (BLOCK, SPAN, *PARTS.values())}
    for trial in done:
        span = span_of(trial["removed"])
        if trial["method"] in spans and span is not None:
            spans[trial["method"]][span] = trial["trial"]
    of_spans = {name: own for name, own in scores.items() if name not in OF_PARTS}
    of_blocks = {
        name: {span: v for span, v in own.items() if span[1] - span[0] == 1}
        for name, own in of_spans.items()
    }
    yield _Question("blocks", BLOCK, spans[BLOCK], of_blocks)

    full = next((trial for trial in done if trial["method"] == TEACHER), None)
    if full is None:
        return
    top = means[full["trial"]]
    damages = {span: top - means[trial] for span, trial in spans[BLOCK].items()}
    for name, values in (*of_blocks.items(), (f"{BLOCK} damage", damages)):
        # sum a score of single blocks over each span, unless it scores all spans itself
        if name not in of_spans or not set(spans[SPAN]) <= set(of_spans[name]):
            of_spans[f"{name}, summed"] = {
                (start, end): sum(values[b, b + 1] for b in range(start, end))
                for start, end in spans[SPAN]
                if all((b, b + 1) in values for b in range(start, end))
            }
    yield _Question("spans", SPAN, spans[SPAN], of_spans)

    for name, (part, kind) in OF_PARTS.items():
        of_part = {name: scores[name]} if name in scores else {}
        yield _Question(kind, PARTS[part], spans[PARTS[part]], of_part)

    # depths below the full one, compared with the accuracy after training
    shallow: dict[str, dict[Span, str]] = {}
    for trial in done:
        if trial["depth"] < full["depth"]:
            removed = trial["depth"], full["depth"]
            shallow.setdefault(trial["method"], {})[removed] = trial["trial"]
    read = {
        f"{method_info(method).label} loss": {
            removed: -means[trial] for removed, trial in shallow[method].items()
        }
        for method in READERS
        if method in shallow
    }
    for method in names("trained"):
        if METHODS[method].selectable and method in shallow:
            usable = {n: v for n, v in (read | scores).items() if set(shallow[method]) <= set(v)}
            yield _Question("depths", method, shallow[method], usable)


def scores_of(summary: Summary, seed: int) -> dict[str, dict[Span, float]]:
    """The run's scores by name and span, with signs such that higher is more important."""
    found: dict[str, dict[Span, float]] = {}
    scores = block_scores(summary)
    for row in scores[(scores["seed"] == seed) & (scores["score"] != "norm")].to_dict("records"):
        name, value = row["score"].replace("taylor", "Taylor"), row["value"]
        if name == "cka":
            name, value = "1 - CKA", 1 - value
        found.setdefault(name, {})[row["start"], row["end"]] = value
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
    reference, *outcomes = summary.ranks.values(
        FULL, summary.headline, [[trial] for trial in trials]
    )
    table = np.concatenate(outcomes).T  # (U, M)
    resamples = int(summary.run.study.protocol.resamples)
    return trust(scores, reference[0], table, resamples=resamples, level=summary.level)
