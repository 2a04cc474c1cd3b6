"""The search for the sufficient depth: what to train next, and what is shown so far.

A search is a function of the trained values: equal values give equal answers, in whatever order the
depths were trained. Two questions are kept apart.

**What is shown** is decided on test users by the test of :mod:`.sufficiency`, so that with
confidence ``level`` no depth at all is wrongly shown, though seeds are added one at a time and the
search itself picks the depths:

- All depths share the level equally, and one that is shown hands its own on to the next shallower
  one: the fallback procedure of a full sweep. It holds for any order of looks, since a depth that
  is never trained never passes.
- A depth is looked at after 2, 3, ... seeds, and its level is spent over the looks, nearly all of
  it at the last (Lan and DeMets 1983; the power family of Kim and DeMets 1987). The level may grow
  (Maurer and Bretz 2013).
- Few trainings say little about the variance between seeds, and the test allows for that: see
  :meth:`.NonInferiority.p_value`.
- A depth is *refuted* where the opposite passes the same test, each of K depths at a Kth of
  ``1 - level``.

With everything trained the verdict is the sweep's, except for the level that the looks cost.

**What to train next** only has to be cheap. A Gaussian process over depths combines the probes'
predictions with the measurements; it gives the odds that a depth passes after all seeds. A depth
may need the levels of deeper ones, so the search compares *chains* of neighbours that all have to
pass. Next is a training of the chain with the best odds for its cost. The search ends when no depth
below the smallest one shown has odds worth the cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import trapezoid
from scipy.optimize import brentq
from scipy.special import ndtr, stdtrit
from scipy.stats import norm

from depthprobe.evaluation.statistics import Spread, ratio_interval, standard_error
from depthprobe.evaluation.sufficiency import (
    NonInferiority,
    RetainedAccuracy,
    Sufficiency,
    nearest_undecided,
    paired_tests,
)

Seeds = Mapping[int, Any]  # per-user values (U,) by seed
MOST = 0.7  # share of a full sweep's compute that a search may take
WARY = 4  # odds that are worth a training: that share to this power
LATE = 10  # the level is spent as the information to this power: 98 % of it is left at the end
SPREAD, REACH, ROUGH = 0.06, 1.5, 0.02  # of shares around the prediction: see analyses/find
MENDED = 0.5  # part of a read-out's loss that remains after training
COMMON = 0.5  # correlation of two depths' errors: both are compared with one teacher
GRID = 801  # points of a density


@dataclass(frozen=True)
class Step:
    """A training that the search asks for; the depth of all blocks is the teacher's."""

    depth: int
    seed: int


@dataclass(frozen=True)
class Search:
    """The state of a search.

    ``verdict`` is about the depths compared so far, None before the first; ``seeds`` has their
    numbers of seeds. ``odds`` has for every depth the odds that it would be shown with all seeds,
    its own and those of the deeper depths that it may need, up to the one in ``chains``. ``next``
    is None when the search has ended.
    """

    verdict: Sufficiency | None
    seeds: Mapping[int, int]
    refuted: tuple[int, ...]
    odds: Mapping[int, float]
    chains: Mapping[int, int]
    next: Step | None

    @property
    def shown(self) -> int | None:
        """The smallest depth that is shown to suffice."""
        return self.verdict.depth if self.verdict else None

    @property
    def open(self) -> tuple[int, ...]:
        """Undecided depths below the smallest that suffices."""
        below = self.shown or math.inf
        return tuple(depth for depth in self.odds if depth < below and depth not in self.refuted)


def search(
    teacher: Seeds,
    candidates: Mapping[int, Seeds],
    *,
    blocks: int,
    predicted: Mapping[int, float],
    seeds: int,
    lost: Collection[Step] = (),
    method: str = "finetune",
    margin: float = 0.01,
    level: float = 0.95,
) -> Search:
    """What the trainings show so far, and which training should be next.

    Args:
        teacher: its per-user values of a metric, by seed.
        candidates: the same for the trained depths.
        blocks: of the teacher. A training's cost is its depth.
        predicted: the share of the teacher's accuracy that each depth is predicted to keep, from
            validation users; its keys are the depths to search in.
        seeds: the most seeds of a depth.
        lost: trainings that failed. A failed teacher removes its seed.
        method: how candidates are trained, as the rows name it.
        margin: the acceptable relative loss.
        level: confidence.
    """
    depths = sorted(predicted)
    share = (1 - level) / len(depths)
    pairs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for depth in depths:
        common = sorted(teacher.keys() & candidates.get(depth, {}).keys())
        # with one user, or a teacher that hits no target, nothing can be decided
        if any(len(teacher[seed]) > 1 and np.any(teacher[seed]) for seed in common):
            own = [[arm[seed] for seed in common] for arm in (candidates[depth], teacher)]
            pairs[depth] = np.array(own[0], float), np.array(own[1], float)
    several = [depth for depth, (x, _) in pairs.items() if len(x) > 1]
    degrees = luck_df([len(pairs[depth][0]) for depth in several])
    tests, reversed_tests = (
        {d: replace(t, luck_df=degrees) for d, t in paired_tests(each, several).items()}
        for each in (pairs, {d: (r, x) for d, (x, r) in pairs.items()})
    )

    rows: dict[int, RetainedAccuracy] = {}
    refuted: list[int] = []
    levels: dict[int, float] = {}
    carried = 0.0
    for depth in reversed(depths):
        levels[depth], carried = share + carried, 0.0
        if depth not in tests:
            continue
        test = tests[depth]
        looked = test.n_seeds, max(seeds, test.n_seeds)
        tested_at = look_level(levels[depth], *looked)
        p_value = test.p_value(1 - margin)
        rows[depth] = RetainedAccuracy(
            method, depth, ratio_interval(*pairs[depth], level=level),
            test.lower(tested_at) if tested_at else -math.inf,
            tested_at, p_value, p_value <= tested_at,
        )  # fmt: skip
        # kept < 1 - margin is 1 / kept > 1 / (1 - margin)
        opposite = reversed_tests[depth].p_value(1 / (1 - margin))
        if opposite <= look_level(share, *looked):
            refuted.append(depth)
        if rows[depth].shown:
            carried = levels[depth]
    outlooks = outlooks_of(tests, predicted, seeds=seeds, margin=margin)
    passed = [depth for depth, row in rows.items() if row.shown]
    shown = min(passed, default=None)
    odds, chains, step = _next(
        teacher, candidates, {d: o for d, o in outlooks.items() if d not in refuted}, levels,
        passed=passed, share=share, blocks=blocks, seeds=seeds, lost=lost,
    )  # fmt: skip
    verdict = None
    if rows:
        repeated = [row for depth, row in rows.items() if tests[depth].n_seeds > 1]
        nearest = nearest_undecided(repeated, margin, shown)
        needed = None
        if nearest is not None:
            depth = nearest.depth
            needed = tests[depth].needed(method, depth, margin, levels[depth])
        verdict = Sufficiency(
            rows=tuple(rows[depth] for depth in sorted(rows)),
            method=method if shown else None,
            depth=shown,
            needed=needed,
            users=next(iter(tests.values())).n_users,
            seeds=max(test.n_seeds for test in tests.values()),
            margin=margin,
            level=level,
        )
    return Search(
        verdict, {depth: tests[depth].n_seeds for depth in sorted(tests)}, tuple(sorted(refuted)),
        odds, chains, step,
    )  # fmt: skip


def _next(
    teacher: Seeds,
    candidates: Mapping[int, Seeds],
    outlooks: Mapping[int, Outlook],
    levels: Mapping[int, float],
    *,
    passed: Collection[int],
    share: float,
    blocks: int,
    seeds: int,
    lost: Collection[Step],
) -> tuple[dict[int, float], dict[int, int], Step | None]:
    """The odds of each depth, the start of its chain, and the most useful next training.

    A chain goes from a depth down to a shallower one, and each of them gets the levels of those
    above it if these pass. Their errors are much alike, so a chain is about as likely as its least
    likely depth. The chain with the best odds for its cost is next, and of it the depth that most
    likely fails, for its cost. ``outlooks`` are those of all depths but the refuted.
    """
    full = seeds * (sum(levels) + blocks)
    spent = sum(depth * len(arms) for depth, arms in candidates.items()) + blocks * len(teacher)
    left = {
        depth: [
            seed
            for seed in range(seeds)
            if seed not in candidates.get(depth, {})
            and not {Step(depth, seed), Step(blocks, seed)}.intersection(lost)
        ]
        for depth in outlooks
    }
    depths, shown = sorted(levels), min(passed, default=math.inf)
    odds, chains, best, chosen = dict.fromkeys(depths, 0.0), {d: d for d in depths}, 0.0, None
    for i, top in enumerate(depths):
        level, chance, cost, urgent, first = levels[top] - share, 1.0, 0, 0.0, top
        for depth in depths[i::-1]:
            if depth not in outlooks:
                break
            level += share
            if depth not in passed:
                own = outlooks[depth].odds(look_level(level, seeds, seeds))
                chance = min(chance, own)
                if more := depth * len(left[depth]):
                    cost += more
                    if (1 - own) / more >= urgent:
                        urgent, first = (1 - own) / more, depth
            if chance > odds[depth]:
                odds[depth], chains[depth] = chance, top
            if not cost or depth >= shown:
                continue
            seed = left[first][0]
            # the teacher's seeds serve all depths: the next one counts, not all to come
            step = Step(first if seed in teacher else blocks, seed)
            part = (spent + step.depth) / full
            worth = chance / (cost + blocks * (seed not in teacher))
            if part <= MOST and chance >= part**WARY and worth > best:
                best, chosen = worth, step
    return odds, chains, chosen


@dataclass(frozen=True)
class Replay:
    """The order in which a search trained, and its state before each step and at the end."""

    steps: tuple[Step, ...]
    states: tuple[Search, ...]  # one more than steps

    @property
    def cost(self) -> int:
        """The cost of all steps, each training counted by its depth."""
        return sum(step.depth for step in self.steps)


def replay(
    trained: Mapping[int, Seeds], *, blocks: int, lost: Collection[Step] = (), **asked: Any
) -> Replay:
    """What a search that began with nothing would have done, as far as the values reach.

    Args:
        trained: per-user values by depth and seed, the teacher's under ``blocks``.
        blocks: of the teacher.
        lost: trainings that failed.
        asked: as :func:`search` takes it.
    """
    had: dict[int, dict[int, Any]] = {}
    steps: list[Step] = []
    states = []
    while True:
        depths = {depth: arms for depth, arms in had.items() if depth != blocks}
        state = search(had.get(blocks, {}), depths, blocks=blocks, lost=lost, **asked)
        states.append(state)
        step = state.next
        if step is None or step.seed not in trained.get(step.depth, {}):
            return Replay(tuple(steps), tuple(states))
        had.setdefault(step.depth, {})[step.seed] = trained[step.depth][step.seed]
        steps.append(step)


# --- levels --------------------------------------------------------------------------------------


def look_level(alpha: float, look: int, last: int) -> float:
    """The level of a p-value after ``look`` seeds, with alpha spent over 2, 3, ... ``last``.

    Alpha is rounded down to three digits, so that few are computed.
    """
    if look < 2 or alpha < 1e-6:
        return 0.0
    digits = 2 - math.floor(math.log10(alpha))
    return spent(math.floor(alpha * 10**digits) / 10**digits, last)[look - 2]


def late(alpha: float, share: float) -> float:
    """Spend nearly all of the level at the last look (Kim and DeMets 1987)."""
    return alpha * share**LATE


@cache
def spent(
    alpha: float, last: int, spending: Callable[[float, float], float] = late
) -> tuple[float, ...]:
    """The level of each look's p-value, after 2 to ``last`` seeds, for the levels to spend.

    By the recursion of Armitage, McPherson and Rowe (1969) for a sum with independent increments,
    whose density, where no look has passed yet, is kept on a grid. The information of S seeds is
    taken to grow as S. Users add to it, and then looks are more alike than here and wrong verdicts
    rarer.
    """
    levels: list[float] = []
    before, time_before, density, points = 0.0, 0.0, np.ones(1), np.zeros(1)
    for time in (look / last for look in range(2, last + 1)):
        step = math.sqrt(time - time_before)
        total = spending(alpha, time)
        share, before, time_before = total - before, total, time

        def left(bound: float) -> float:
            passing = norm.sf((bound - points) / step)  # noqa: B023
            return float(_integral(density * passing, points)) - share  # noqa: B023

        bound = float(brentq(left, -2, 12))
        levels.append(float(norm.sf(bound / math.sqrt(time))))
        after = np.linspace(-8 * math.sqrt(time), bound, GRID)
        moved = norm.pdf((after[:, None] - points) / step) / step
        density, points = _integral(density * moved, points), after
    return tuple(levels)


def _integral(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Over the last axis; the value itself at a single point."""
    return values[..., 0] if len(points) == 1 else trapezoid(values, points)


# --- odds ----------------------------------------------------------------------------------------


class _Errors(NamedTuple):
    """The variance of what a depth seems to keep: with its seeds, with all; and its degrees."""

    now: float
    then: float
    df: float


def _errors(test: NonInferiority, seeds: int, margin: float) -> _Errors:
    """By the variance of the test; of one seed the luck is taken to be what users add.

    A depth's own luck counts where it is above the others', as far as its seeds tell of it.
    """
    own, others = test.spreads(1 - margin)
    number, noise = test.n_seeds, own.noise if test.n_seeds > 1 else others.noise
    luck = max(others.seeds - others.noise, 0.0)
    luck += max(own.seeds - own.noise - luck, 0.0) * (number - 1) / max(1, seeds - 1)
    if others.users == 0:
        noise, luck = 0.0, own.users
    users = max(own.users - noise / number, 0.0)
    now, then = (users + (noise + luck) / n for n in (number, max(seeds, number)))
    of = Spread(users + noise / seeds, luck + noise, noise)
    _, df = standard_error(of, n_users=test.n_users, n_seeds=seeds)
    scale = test.means[1] ** 2
    return _Errors(now / scale, then / scale, float(df))


class Outlook(NamedTuple):
    """Of a depth with all its seeds: what it is expected to keep beyond the margin, and the error.

    ``error`` and ``df`` are the test's then; ``deviation`` is what the estimate may still move by.
    ``p_value`` is that of a depth that has all its seeds, were luck known as well as in a sweep.
    """

    gap: float
    deviation: float
    error: float
    df: float
    p_value: float | None = None

    def odds(self, level: float) -> float:
        """That the depth passes at a level."""
        if self.p_value is not None:
            return float(self.p_value <= level)
        gap = self.gap - float(stdtrit(self.df, 1 - level)) * self.error
        return float(ndtr(gap / self.deviation)) if self.deviation else float(gap >= 0)


def luck_df(seeds: Sequence[int]) -> float:
    """Degrees of freedom of the seeds' variance, a mean over depths with so many seeds each.

    Each depth weighs by its own degrees. All are compared with one teacher, so their variances are
    correlated by ``COMMON**2``, and a depth's seeds are among those of one that has more.
    """
    own = np.array(seeds) - 1
    shared = COMMON**2 * (np.minimum.outer(own, own).sum() - own.sum())
    return float(own.sum() ** 2 / (own.sum() + shared)) if seeds else math.inf


def outlooks_of(
    tests: Mapping[int, NonInferiority],
    predicted: Mapping[int, float],
    *,
    seeds: int,
    margin: float,
) -> dict[int, Outlook]:
    """The outlook of each depth, by prediction and measurement together.

    What a depth keeps is a Gaussian process about the prediction, over the logarithm of the depth.
    Its variance at ``seeds`` seeds is that of the users, and the trained depths' mean luck.
    """
    depths = np.array(sorted(predicted))
    mean = np.array([predicted[d] for d in depths.tolist()])
    apart = np.abs(np.log(depths[:, None]) - np.log(depths))
    prior = SPREAD**2 * np.exp(-apart / REACH) + ROUGH**2 * np.eye(len(depths))

    known = [i for i, d in enumerate(depths.tolist()) if d in tests]
    errors = {i: _errors(tests[int(depths[i])], seeds, margin) for i in known}
    usual = _Errors(*np.median([*errors.values()], axis=0)) if known else _Errors(0, 0, math.inf)
    shares = {i: tests[int(depths[i])].kept for i in known}
    after, spread = mean, prior
    if known:
        now = np.sqrt([errors[i].now for i in known])
        noise = np.outer(now, now) * np.where(np.eye(len(known)) > 0, 1, COMMON)
        gain = prior[:, known] @ np.linalg.inv(prior[np.ix_(known, known)] + noise)
        after = mean + gain @ (np.array([shares[i] for i in known]) - mean[known])
        spread = prior - gain @ prior[known]
    found = {}
    for i, depth in enumerate(depths.tolist()):
        error = errors.get(i, usual)
        expected, variance, p_value = after[i], spread[i, i] + error.then, None
        if i in errors and tests[depth].n_seeds >= seeds:
            p_value = replace(tests[depth], luck_df=math.inf).p_value(1 - margin)
        elif i in errors:
            part = error.then / error.now if error.now else 1.0
            expected = part * shares[i] + (1 - part) * after[i]
            variance = (1 - part) * error.then + (1 - part) ** 2 * spread[i, i]
        found[depth] = Outlook(
            float(expected) - (1 - margin),
            math.sqrt(variance),
            math.sqrt(error.then),
            error.df,
            p_value,
        )
    return found


# --- what the probes predict ---------------------------------------------------------------------


def predict(readout: Mapping[int, float], depths: Collection[int], blocks: int) -> dict[int, float]:
    """The share of the teacher's accuracy that each depth may keep when it is trained.

    Args:
        readout: NDCG@10 of the teacher's read-outs on validation users, by depth from 0 to
            ``blocks``; may be empty, where the teacher could not be read out.
        depths: to predict.
        blocks: of the teacher.
    """
    top = readout.get(blocks, 0.0)
    if not top > 0:
        return dict.fromkeys(depths, 1.0)
    best, found = 0.0, {}
    for depth in sorted(depths):  # no depth keeps less than a shallower one, as far as one knows
        best = max(best, min(1.0, readout.get(depth, 0.0) / top))
        found[depth] = 1 - MENDED * (1 - best)
    return found
