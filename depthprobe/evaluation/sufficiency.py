"""The sufficient depth: the smallest depth that is shown by a test to keep the teacher's accuracy.

A candidate is *shown* to suffice by a test of non-inferiority, paired by user and seed: the mean of
``D = x - (1 - margin) r`` is above 0, x and r being the candidate's and the reference's values.

- The error of D's mean uses the seeds' variance averaged over all trained candidates, or the
  candidate's own if that is larger. Three seeds estimate a variance so badly that a candidate whose
  own is small by chance would pass far too often.
- Testing many candidates and taking the smallest that passes would show too many. So methods share
  ``1 - level`` equally, and the K depths of a method share its part. The deepest is tested first,
  and one that passes hands its level on to the next shallower one (the fallback procedure: Wiens
  and Dmitrienko 2005, J. Biopharm. Stat. 15). So with confidence ``level`` no candidate at all is
  wrongly shown.
- If few users differ between a candidate and the reference, one more is counted who loses a usual
  hit.
- One seed never shows a depth, since the variance between trainings is unknown.

:func:`compare` puts the same test to results that exist already, without a search for a depth.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, fdtri, ndtr, stdtr, stdtrit

from depthprobe.evaluation.statistics import (
    Interval,
    Spread,
    as_arms,
    difference_interval,
    ratio_interval,
    spread,
    standard_error,
)
from depthprobe.methods import METHODS, base_of

Key = TypeVar("Key", bound=Hashable)
Name = tuple[str, int]  # method and depth
ODDS = (0.5, 0.8)
Numbers = tuple[int | None, ...]  # one for each of the odds
DIFFERING = 30  # users from which on a mean difference is roughly normal
PLACES = (np.arange(32) + 0.5) / 32  # of a distribution
TAIL, IN_TAIL = PLACES**3, PLACES**2 / (PLACES**2).sum()  # denser at the start; and their weights
MOST_USERS, MOST_SEEDS = 10**9, 100  # beyond this the answer is never


@dataclass(frozen=True)
class RetainedAccuracy:
    """A candidate's share of the reference's mean.

    ``kept`` is a two-sided interval for this candidate, without correction for the others.
    ``lower`` is the one-sided bound at its tested level, which allows for all candidates; -inf for
    one seed. ``shown`` says that ``p_value <= tested_at``, which is the same as ``lower >= 1 -
    margin``.
    """

    method: str
    depth: int
    kept: Interval
    lower: float
    tested_at: float
    p_value: float
    shown: bool


class Needed(NamedTuple):
    """What it would take to show an undecided candidate, if its estimate is true.

    Test users with the present seeds, or seeds with the present users, each for even odds and for
    80 %. None if no number suffices.
    """

    method: str
    depth: int
    users: Numbers
    seeds: Numbers


@dataclass(frozen=True)
class Sufficiency:
    """All candidates by depth, and the smallest that is shown to suffice; None if none is.

    ``needed`` is for the candidate with the smallest p-value among those shallower than ``depth``
    whose estimate is within the margin. None without such a candidate, and for one seed.
    """

    rows: tuple[RetainedAccuracy, ...]
    method: str | None
    depth: int | None
    needed: Needed | None
    users: int
    seeds: int
    margin: float
    level: float

    @property
    def row(self) -> RetainedAccuracy | None:
        """The row of the sufficient depth."""
        key = self.method, self.depth
        return next((row for row in self.rows if (row.method, row.depth) == key), None)


def sufficient_depth(
    candidates: Mapping[Name, Any],
    reference: Any,
    *,
    margin: float = 0.01,
    level: float = 0.95,
) -> Sufficiency:
    """Find the smallest depth whose loss against the reference is within the margin.

    Args:
        candidates: per-user values of a metric, (S, U) or (U,), by method and depth. Candidates
            that are equal in every value count as one.
        reference: the teacher's values, of the same shape, users and seeds; their mean above 0.
        margin: the relative loss that is acceptable, 0.01 is 1 %.
        level: confidence.
    """
    if not 0 <= margin < 1 or not 0.5 < level < 1:
        expected = "expected a margin from 0 and a level above 0.5, both below 1"
        raise ValueError(f"margin is {margin} and level is {level}, {expected}")
    # deepest first, the order of the tests
    names = sorted(candidates, key=lambda name: (-name[1], name[0]))
    *arms, base = as_arms([*(candidates[name] for name in names), reference])
    if not base.mean() > 0:
        raise ValueError(f"the reference's mean is {base.mean():g}, expected a number above 0")
    first: dict[bytes, Name] = {}  # candidates with equal values share one test
    stands_for = {
        name: first.setdefault(arm.tobytes(), name) for name, arm in zip(names, arms, strict=True)
    }
    tested = {name: arm for name, arm in zip(names, arms, strict=True) if stands_for[name] == name}
    trained = [name for name in tested if _is_trained(name[0])] or list(tested)
    tests = paired_tests({name: (arm, base) for name, arm in tested.items()}, trained)

    depths = Counter(method for method, _ in tested)
    carried = dict.fromkeys(depths, 0.0)
    rows: dict[Name, RetainedAccuracy] = {}
    for (method, depth), test in tests.items():
        tested_at = (1 - level) / len(depths) / depths[method] + carried[method]
        p_value = test.p_value(1 - margin)
        shown = p_value <= tested_at
        carried[method] = tested_at if shown else 0.0
        rows[method, depth] = RetainedAccuracy(
            method, depth, ratio_interval(tested[method, depth], base, level=level),
            test.lower(tested_at), tested_at, p_value, shown,
        )  # fmt: skip
    rows = {name: replace(rows[stands_for[name]], method=name[0], depth=name[1]) for name in names}
    shallow_first = sorted(rows.values(), key=lambda row: (row.depth, row.method))
    shown_rows = [row for row in shallow_first if row.shown]
    best = min(shown_rows, key=lambda row: (row.depth, -row.kept.value), default=None)

    nearest = nearest_undecided(
        [rows[name] for name in tested], margin, best.depth if best else None
    )
    needed = None
    if nearest is not None and min(base.shape) > 1:
        test = tests[nearest.method, nearest.depth]
        needed = test.needed(nearest.method, nearest.depth, margin, nearest.tested_at)
    return Sufficiency(
        rows=tuple(shallow_first),
        method=best.method if best else None,
        depth=best.depth if best else None,
        needed=needed,
        users=base.shape[1],
        seeds=base.shape[0],
        margin=margin,
        level=level,
    )


def nearest_undecided(
    rows: Iterable[RetainedAccuracy], margin: float, shown: int | None
) -> RetainedAccuracy | None:
    """Of the rows below the depth shown with an estimate within the margin, that of the smallest p.

    None if there is no such row.
    """
    undecided = (
        row
        for row in rows
        if not row.shown and row.kept.value > 1 - margin and (shown is None or row.depth < shown)
    )
    return min(undecided, key=lambda row: (row.p_value, row.method, row.depth), default=None)


# From the strongest: what a candidate can be shown to be.
CLAIMS = ("superior", "equivalent", "non-inferior", "inferior")


@dataclass(frozen=True)
class Comparison:
    """The comparison of a candidate with a reference, without a search for a depth.

    ``p_values`` are by claim, of :data:`CLAIMS`; a claim is shown where its own is at most
    ``tested_at``. ``lower`` is the bound of the share at that level. ``users`` and ``seeds`` say
    how many would decide whether the loss is within the margin, for even odds and for 80 %. Both
    are empty once that is decided, and ``seeds`` also for fixed models.
    """

    difference: Interval
    share: Interval
    lower: float
    tested_at: float
    p_values: dict[str, float]
    users: Numbers
    seeds: Numbers

    def shows(self, claim: str) -> bool:
        """Whether a claim is shown."""
        return self.p_values[claim] <= self.tested_at

    @property
    def verdict(self) -> str:
        """The strongest claim that is shown, or ``undecided``."""
        return next((claim for claim in CLAIMS if self.shows(claim)), "undecided")


def compare(
    candidates: Mapping[str, Any], reference: Any, *, margin: float = 0.01, level: float = 0.95
) -> dict[str, Comparison]:
    """Test candidates against a reference for each of :data:`CLAIMS`.

    With theta the share that is kept, and 1 - level shared equally by the candidates:

    - non-inferior: ``theta > 1 - margin``; inferior: ``theta < 1 - margin``; one-sided.
    - equivalent: ``1 - margin < theta < 1 + margin``, two one-sided tests (Schuirmann 1987).
    - superior: ``theta > 1``, with the p-value of a two-sided test.

    With one seed the models are fixed: the result holds for these models and other users, and says
    nothing about other trainings.

    Args:
        candidates: per-user values of a metric, (S, U) or (U,), by name.
        reference: of the same shape, users and seeds; its mean above 0.
        margin: relative, from 0 and below 1.
        level: confidence.
    """
    *arms, base = as_arms([*candidates.values(), reference])
    if not base.mean() > 0:
        raise ValueError(f"the reference's mean is {base.mean():g}, expected a number above 0")
    pairs = dict(zip(candidates, arms, strict=True))
    ahead = paired_tests({name: (x, base) for name, x in pairs.items()}, pairs, fixed=True)
    # theta < t is 1 / theta > 1 / t: the same test with the roles exchanged
    behind = paired_tests({name: (base, x) for name, x in pairs.items()}, pairs, fixed=True)
    tested_at = (1 - level) / len(pairs)
    found = {}
    for name, x in pairs.items():
        above, below = ahead[name], behind[name]
        p_values = {
            "superior": min(1.0, 2 * above.p_value(1)),
            "equivalent": max(above.p_value(1 - margin), below.p_value(1 / (1 + margin))),
            "non-inferior": above.p_value(1 - margin),
            "inferior": below.p_value(1 / (1 - margin)),
        }
        users: Numbers = ()
        seeds: Numbers = ()
        if min(p_values["non-inferior"], p_values["inferior"]) > tested_at and base.shape[1] > 1:
            gap = float(x.mean() - (1 - margin) * base.mean())
            of = above.components(1 - margin)
            if gap < 0:
                gap, of = -gap / (1 - margin), below.components(1 / (1 - margin))
            users, seeds = plan(
                gap, of, users=base.shape[1], seeds=len(base), tested_at=tested_at
            )  # fmt: skip
        found[name] = Comparison(
            difference_interval(x, base, level=level), ratio_interval(x, base, level=level),
            above.lower(tested_at), tested_at, p_values, users, seeds if len(base) > 1 else (),
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class NonInferiority:
    """Is ``mean(x) / mean(r)`` above a share? The mean of ``D = x - share r`` against 0.

    The spreads of xx, xr and rr give that of D as a weighted sum, for any share.
    """

    means: tuple[float, float]  # of the candidate x and the reference r
    own: np.ndarray  # (3, parts of a spread)
    others: np.ndarray  # the same, a mean over the trained candidates
    n_users: int
    n_seeds: int
    fixed: bool  # one seed: the question is about these models, not about their trainings
    luck_df: float = math.inf  # degrees of freedom of the seeds' variance, where they are few

    @property
    def kept(self) -> float:
        """The candidate's share of the reference's mean."""
        return self.means[0] / self.means[1]

    def spreads(self, share: float) -> tuple[Spread, Spread]:
        """The candidate's own spread of D, and that of the trained ones."""
        weights = np.array([1, -2 * share, share**2])
        own, others = (np.maximum(weights @ part, 0).tolist() for part in (self.own, self.others))
        return Spread(*own), Spread(*others)

    def components(self, share: float) -> Components:
        """Variances by the method of moments, which keeps users' noise out of the seeds' part.

        The seeds' part is an average over all trained candidates, since one candidate's own is too
        uncertain. It is 0 unless an F test at 10 % finds more than noise between seeds.
        """
        own, others = self.spreads(share)
        degrees = self.n_seeds - 1, (self.n_seeds - 1) * (self.n_users - 1)
        differ = others.seeds > fdtri(*degrees, 0.9) * others.noise
        return Components(
            user=max(0.0, own.users - own.noise / self.n_seeds) * self.n_users,
            seed=differ * (others.seeds - others.noise),
            both=own.noise * self.n_users,
        )

    def needed(self, method: str, depth: int, margin: float, tested_at: float) -> Needed:
        """How many users or seeds would show what the candidate seems to keep."""
        gap = self.means[0] - (1 - margin) * self.means[1]
        of = self.components(1 - margin)
        have = {"users": self.n_users, "seeds": self.n_seeds}
        return Needed(method, depth, *plan(gap, of, **have, tested_at=tested_at))

    def p_value(self, share: float) -> float:
        """One-sided p-value; 1 for one user, and for one seed unless the models are fixed.

        With few ``luck_df`` it is at least a mean over the possible true variances between seeds,
        given the estimate: a generalized p-value (Tsui and Weerahandi 1989, JASA 84). Otherwise two
        seeds that agree by chance would look as if trainings never differ.
        """
        if self.n_users == 1 or (self.n_seeds == 1 and not self.fixed):
            return 1.0
        own, others = self.spreads(share)
        of = own._replace(seeds=max(own.seeds, others.seeds - others.noise + own.noise))
        error, df = standard_error(of, n_users=self.n_users, n_seeds=self.n_seeds)
        mean = self.means[0] - share * self.means[1]
        p_value = float(stdtr(df, -mean / error)) if error else float(mean <= 0)
        if math.isinf(self.luck_df):
            return p_value
        # the estimate times its degrees over a draw of chi-squared; at least the noise
        may_be = np.maximum(of.noise, of.seeds * self.luck_df / chdtri(self.luck_df, 1 - TAIL))
        errors = np.sqrt(max(0.0, of.users - of.noise / self.n_seeds) + may_be / self.n_seeds)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.where(errors > 0, ndtr(-mean / errors), mean <= 0)
        return max(p_value, float(IN_TAIL @ each))

    def lower(self, tested_at: float) -> float:
        """The share up to which the test passes at this level; -inf if it never does."""
        share, below = self.kept, 1e-3
        while self.p_value(share - below) > tested_at:
            below *= 4
            if below > 1e6:
                return -math.inf
        return float(
            brentq(lambda at: self.p_value(at) - tested_at, share - below, share, xtol=1e-10)
        )


def paired_tests(
    pairs: Mapping[Key, tuple[np.ndarray, np.ndarray]],
    trained: Collection[Key],
    *,
    fixed: bool = False,
) -> dict[Key, NonInferiority]:
    """The tests of pairs of a candidate and its reference."""
    arms = {name: _with_a_loss(x, r) for name, (x, r) in pairs.items()}
    parts = {  # one user has no spread
        name: np.array([spread(x, x), spread(x, r), spread(r, r)])
        if r.shape[1] > 1
        else np.zeros((3, 3))
        for name, (x, r) in arms.items()
    }
    degrees = [len(arms[name][0]) - 1 for name in trained]
    others = np.average(
        [parts[name] for name in trained] or [np.zeros((3, 3))],
        axis=0, weights=degrees if any(degrees) else None,
    )  # fmt: skip
    return {
        name: NonInferiority(
            (float(x.mean()), float(r.mean())), parts[name], others, r.shape[1], len(r), fixed
        )
        for name, (x, r) in arms.items()
    }


def _with_a_loss(x: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """If few users differ between the arms, add one user who loses a usual hit.

    No difference among few users is no proof: with ten hits and a true loss of 1 % it is what one
    usually sees, and a spread of zero would pass any test.
    """
    if x.shape[1] == 1 or int((x != r).any(axis=0).sum()) >= DIFFERING:
        return x, r
    lost = np.full((len(r), 1), r.sum() / max(1, np.count_nonzero(r)))
    return np.hstack([x, 0 * lost]), np.hstack([r, lost])


class Components(NamedTuple):
    """Variances of a single user's D in a single seed: from the user, the seed, and neither."""

    user: float
    seed: float
    both: float


def power(gap: float, of: Components, *, users: int, seeds: int, tested_at: float) -> float:
    """The odds that a candidate passes if its D has the mean ``gap``.

    The users' part of the error is taken as known. The seeds' variance is not: the odds are a mean
    over the values that its estimate may take, at least the others' average, as in the test.
    """
    noise = of.both / users
    s2, from_users = of.seed + noise, of.user / users + noise / seeds
    drawn = s2 if seeds == 1 else np.maximum(1, chdtri(seeds - 1, PLACES) / (seeds - 1)) * s2
    error, df = standard_error(Spread(from_users, drawn, noise), n_users=users, n_seeds=seeds)
    real = math.sqrt(from_users + of.seed / seeds) or math.ulp(0)
    return float(ndtr((gap - stdtrit(df, 1 - tested_at) * error) / real).mean())


def plan(
    gap: float, of: Components, *, users: int, seeds: int, tested_at: float
) -> tuple[Numbers, Numbers]:
    """The number of users, or of seeds, at which :func:`power` reaches each of the odds."""

    def with_users(number: int) -> float:
        return power(gap, of, users=number, seeds=seeds, tested_at=tested_at)

    def with_seeds(number: int) -> float:
        return power(gap, of, users=users, seeds=number, tested_at=tested_at)

    return (
        tuple(_fewest(with_users, users + 1, MOST_USERS, odds) for odds in ODDS),
        tuple(_fewest(with_seeds, seeds + 1, MOST_SEEDS, odds) for odds in ODDS),
    )


def _fewest(power: Callable[[int], float], low: int, high: int, odds: float) -> int | None:
    """The smallest number from ``low`` to ``high`` with these odds; None if there is none."""
    if power(high) < odds:
        return None
    return bisect_left(range(high), odds, lo=low, key=power)


def _is_trained(method: str) -> bool:
    known = METHODS.get(base_of(method))
    return known is None or known.trains
