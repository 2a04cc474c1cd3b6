"""The search for the depth: the trainings in order, their cost, and what they showed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from matplotlib.axes import Axes

from depthprobe.formatting import duration, in_percent, p_value, percent, plural
from depthprobe.methods import method_info
from depthprobe.report import drawing
from depthprobe.report.drawing import MUTED, NoData, figure
from depthprobe.report.numbers import TEACHER, Source, Summary, as_summary
from depthprobe.report.tables import Table, Values, make_table, plain
from depthprobe.runs.search import Found
from depthprobe.study import ranges

SHOWN, REFUTED, OPEN, NOT_NEEDED = "shown", "refuted", "open", "not needed"


def search_words(summary: Summary) -> str:
    """A sentence on how much of a full sweep the search trained; empty without a search."""
    found = summary.found
    if found is None or not found.trained:
        return ""
    (trained, every), state = found.models, found.state
    said = (
        f"The search trained {trained} of the {every} models of a full sweep, "
        f"{percent(found.cost / found.full_cost, 0)} of its compute."
    )
    if found.ended:
        said += f" It ended: {found.ended}."
    if state.refuted:
        said += f" Refuted: {_depths(state.refuted)}."
    if state.open and not found.no_teacher:
        best = max(state.open, key=lambda depth: state.odds[depth])
        said += f" Open: {_depths(state.open)}; the best odds to be shown has {best}, "
        said += _odds(state.odds[best])
        passed = {row.depth for row in state.verdict.rows if row.shown} if state.verdict else set()
        left = {
            depth: found.study.seeds - state.seeds.get(depth, 0)
            for depth in sorted(found.predicted)
            if best <= depth <= state.chains[best] and depth not in passed
        }
        left = {depth: more for depth, more in left.items() if more}
        if left:
            said += f" with {plural(sum(left.values()), 'more training')} of {_depths([*left])}"
            if seconds := sum(more * found.seconds_of(depth) for depth, more in left.items()):
                said += f", {duration(seconds)}"
        said += "."
    return said


def _depths(depths: Sequence[int]) -> str:
    """Depths as words, with ranges such as ``3-9``."""
    return f"depth{'s' if len(depths) > 1 else ''} {ranges(depths)}"


@figure("search")
def search_steps(ax: Axes, summary: Summary) -> str:
    """Every training of a search in order: its depth, and its cost relative to a full sweep."""
    found = summary.found
    if found is None or not found.history.steps:
        raise NoData("run", summary.run.path, "a run with layers = find")
    history, spent = found.history, 0.0
    candidate, teacher = method_info(found.study.searched), method_info(TEACHER)
    for step, (before, state) in zip(history.steps, pairwise(history.states), strict=True):
        own = teacher if step.depth == found.blocks else candidate
        cost = 100 * step.depth / found.full_cost
        ax.plot([spent, spent + cost], [step.depth] * 2, color=own.colour, linewidth=5,
                solid_capstyle="butt", zorder=3)  # fmt: skip
        spent += cost
        for depth in sorted({*state.refuted} - {*before.refuted}):
            ax.plot(spent, depth, color=MUTED, marker="x", zorder=5)
        if state.shown != before.shown and state.shown is not None:
            ax.plot(spent, state.shown, color=candidate.colour, marker="o", markersize=9,
                    markerfacecolor="none", zorder=5)  # fmt: skip
    ax.set_xlim(0, max(100.0, spent) if spent > 60 else 1.15 * spent)
    ax.set_ylim(0, found.blocks + 0.5)
    ax.set_xlabel("compute so far, % of a full sweep")
    drawing.block_axis(ax.yaxis, "blocks that are kept", 12)
    drawing.finish(ax, "What the search trained, in its order")
    end = history.states[-1]
    shown = f"depth {end.shown} is shown (a ring)" if end.shown else "no depth is shown"
    if (steps := len(history.steps)) < (trained := found.models[0]):
        shown += f"; the search would have trained these {steps} of the {trained} models there"
    return (
        f"A bar is one training, and its length is its cost: the teacher's at the top, below it "
        f"those of {candidate.label} models. In the end {shown}; a cross marks a depth that is "
        "refuted."
    )


def search_table(run: Source) -> Table | None:
    """A row per depth: seeds, retained accuracy, test and odds; None without a search."""
    summary = as_summary(run)
    if summary.found is None:
        return None
    return make_table("search", _rows(summary.found), [
        ("depth", "depth", plain), ("verdict", "verdict", str), ("seeds", "seeds", plain),
        ("keeps", "kept", in_percent), ("p-value", "p_value", p_value),
        ("level now", "level", p_value),
        ("predicted to keep", "predicted", lambda share: percent(share, 0)),
        ("odds to be shown", "odds", _odds),
    ])  # fmt: skip


def _rows(found: Found) -> list[Values]:
    state, rows = found.state, []
    tested = {row.depth: row for row in state.verdict.rows} if state.verdict else {}
    for depth in sorted(found.predicted):
        row = tested.get(depth)
        verdict = OPEN if depth in state.open else NOT_NEEDED
        verdict = REFUTED if depth in state.refuted else verdict
        verdict = SHOWN if row is not None and row.shown else verdict
        several = row is not None and state.seeds[depth] > 1
        rows.append({
            "depth": depth, "verdict": verdict, "seeds": state.seeds.get(depth, 0),
            "kept": row.kept if row else None,
            "p_value": row.p_value if row and several else None,
            "level": row.tested_at if row and several else None,
            "predicted": found.predicted[depth],
            "odds": None if verdict in (SHOWN, NOT_NEEDED) else state.odds[depth],
        })  # fmt: skip
    return rows


def _odds(share: float) -> str:
    """Odds in per cent, or ``<1 %``."""
    return percent(share, 0) if share >= 0.005 else "<1 %"
