"""The search for a depth: levels by hand, what it does in worlds that are known, that it is a
function of what was trained."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from depthprobe.evaluation import search as searching
from depthprobe.evaluation.search import (
    MOST,
    Step,
    look_level,
    luck_df,
    predict,
    replay,
    search,
    spent,
)
from depthprobe.evaluation.sufficiency import sufficient_depth

Values = dict[int, dict[int, np.ndarray]]
BLOCKS, SEEDS = 8, 4


def world(keeps: dict[int, float], *, noise: float = 0.05, luck: float = 0.0,
          users: int = 2000, seed: int = 0) -> Values:  # fmt: skip
    """Per-user values by depth and seed; the teacher's under BLOCKS."""
    draw = np.random.default_rng(seed)
    ease = draw.gamma(2.0, 0.5, size=users)
    return {
        depth: {
            s: ease * (share + luck * draw.normal() + noise * draw.normal(size=users))
            for s in range(SEEDS)
        }
        for depth, share in {**keeps, BLOCKS: 1.0}.items()
    }


KNEE = {1: 0.7, 2: 0.8, 3: 0.9, 4: 1.0, 5: 1.0, 6: 1.0, 7: 1.0}


def asked(keeps: dict[int, float], **more: object) -> dict[str, object]:
    return {"blocks": BLOCKS, "predicted": keeps, "seeds": SEEDS, "margin": 0.05, **more}


def test_the_knee_is_found_without_the_deep_half() -> None:
    values = world(KNEE)
    found = replay(values, **asked(KNEE))
    end = found.states[-1]
    assert end.shown == 4
    assert set(end.seeds) <= {1, 2, 3, 4}  # nothing deeper was trained
    assert found.cost < 0.5 * SEEDS * sum(range(1, BLOCKS + 1))
    assert 3 in end.refuted or 3 in end.open
    candidates = {("finetune", d): [*values[d].values()] for d in KNEE}
    full = sufficient_depth(candidates, [*values[BLOCKS].values()], margin=0.05)
    assert full.depth == end.shown


def test_a_wrong_prediction_costs_but_does_not_deceive() -> None:
    upside_down = {depth: 1.7 - share for depth, share in KNEE.items()}
    end = replay(world(KNEE), **asked(upside_down)).states[-1]
    assert end.shown is None or end.shown >= 4
    assert not {*end.refuted} & {4, 5, 6, 7}


def test_a_search_that_luck_drowns_ends_early() -> None:
    # luck of 30 % in every training: four seeds can hardly show anything
    found = [replay(world(KNEE, luck=0.3, seed=seed), **asked(KNEE)) for seed in range(8)]
    assert sum(each.states[-1].shown is not None for each in found) <= 2
    costs = [each.cost / (SEEDS * sum(range(1, BLOCKS + 1))) for each in found]
    assert np.median(costs) < 0.4


def test_two_seeds_that_agree_prove_no_absence_of_luck() -> None:
    # one depth, two seeds with the same luck by chance: a plain test would pass it
    draw = np.random.default_rng(0)
    ease = draw.gamma(2.0, 0.5, size=2000)
    teacher = {s: ease + 0.01 * draw.normal(size=2000) for s in range(2)}
    lucky = {4: {s: 1.5 * ease + 0.01 * draw.normal(size=2000) for s in range(2)}}
    state = search(teacher, lucky, **asked(KNEE))
    assert state.shown is None
    plain = sufficient_depth({("finetune", 4): [*lucky[4].values()]}, [*teacher.values()],
                             margin=0.05)  # fmt: skip
    assert plain.depth == 4


@given(st.randoms(use_true_random=False), st.integers(0, 20))
def test_a_function_of_what_was_trained(random, seed: int) -> None:
    values = world(KNEE, luck=0.03, users=300, seed=seed)
    had = [Step(d, s) for d in values for s in range(SEEDS) if random.random() < 0.5]
    random.shuffle(had)
    trained: Values = {}
    for step in had:
        trained.setdefault(step.depth, {})[step.seed] = values[step.depth][step.seed]
    in_order = {d: dict(sorted(arms.items())) for d, arms in sorted(trained.items())}
    states = [
        search(each.get(BLOCKS, {}), {d: a for d, a in each.items() if d != BLOCKS}, **asked(KNEE))
        for each in (trained, in_order)
    ]
    assert states[0] == states[1]
    step = states[0].next
    assert step is None or step not in had


def test_trainings_that_no_seed_changes() -> None:
    # of the others' luck it is known that there is none, and of depth 3 there is one seed
    values = world({**KNEE, 3: 0.97}, noise=0.0)
    trained = {3: {0: values[3][0]}, 4: {seed: values[4][seed] for seed in (0, 1)}}
    state = search(values[BLOCKS], trained, **asked(KNEE))
    assert state.odds[3] == 1
    assert state.next == Step(3, 1)


def test_what_failed_is_not_asked_for_again() -> None:
    values = world(KNEE)
    lost = {Step(4, 1), Step(BLOCKS, 2)}
    kept = {d: {s: v for s, v in arms.items() if Step(d, s) not in lost}
            for d, arms in values.items()}  # fmt: skip
    found = replay(kept, **asked(KNEE, lost=lost))
    assert not lost & {*found.steps}
    assert all(step.seed != 2 for step in found.steps)  # of the teacher: lost for all depths
    assert found.states[-1].next is None  # it went on to its end


def test_everything_trained_and_nothing_left_to_ask() -> None:
    values = world(KNEE)
    teacher = values.pop(BLOCKS)
    assert search(teacher, values, **asked(KNEE)).next is None


def test_never_more_than_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    values, full = world(KNEE), SEEDS * sum(range(1, BLOCKS + 1))
    free = replay(values, **asked(KNEE)).cost / full
    assert free <= MOST
    monkeypatch.setattr(searching, "MOST", free - 0.1)
    assert replay(values, **asked(KNEE)).cost / full <= free - 0.1


def test_levels_are_handed_to_the_next_shallower_one() -> None:
    values = world(KNEE, noise=0.01)
    teacher = values.pop(BLOCKS)
    rows = {row.depth: row for row in search(teacher, values, **asked(KNEE)).verdict.rows}
    # worked by hand: 7, 6, 5 and 4 are shown, 3 has what they hand down, 2 and 1 their own
    for depth, shares in {7: 1, 6: 2, 5: 3, 4: 4, 3: 5, 2: 1, 1: 1}.items():
        expected = look_level(0.05 * shares / 7, SEEDS, SEEDS)
        assert rows[depth].tested_at == pytest.approx(expected, rel=0.01)
        assert rows[depth].shown == (depth > 3)


def test_with_everything_trained_it_says_what_a_sweep_says() -> None:
    said = []
    for seed in range(30):
        values = world({d: 0.97 for d in range(1, BLOCKS)}, luck=0.01, users=300, seed=seed)
        arms = {("finetune", d): [*values[d].values()] for d in range(1, BLOCKS)}
        full = sufficient_depth(arms, [*values[BLOCKS].values()], margin=0.05)
        teacher = values.pop(BLOCKS)
        said.append((search(teacher, values, **asked(KNEE)).shown, full.depth))
    assert sum(own == sweep for own, sweep in said) >= 29  # looks take 2 % of the level
    assert len({sweep for _, sweep in said}) > 2  # easy and hard worlds


def test_a_depth_that_needs_the_level_of_a_deeper_one_gets_it() -> None:
    flat = {d: 0.97 for d in range(1, BLOCKS)}
    values = world(flat, luck=0.01, users=300, seed=11)
    end = replay(values, **asked(flat)).states[-1]
    row = next(row for row in end.verdict.rows if row.depth == end.shown)
    assert row.p_value > look_level(0.05 / 7, SEEDS, SEEDS)  # it would not pass alone
    assert end.seeds[5] == SEEDS
    arms = {("finetune", d): [*values[d].values()] for d in flat}
    assert end.shown == sufficient_depth(arms, [*values[BLOCKS].values()], margin=0.05).depth


def test_the_odds_reckon_with_the_level_of_deeper_depths() -> None:
    keeps = {**KNEE, 3: 0.9533}
    values = world(keeps, users=600)
    state = search(values[BLOCKS], {3: values[3]}, **asked(keeps))
    (row,) = state.verdict.rows
    alone, handed = (look_level(n * 0.05 / 7, SEEDS, SEEDS) for n in (1, 2))
    assert alone < row.p_value < handed
    assert not row.shown
    assert state.chains[3] == 4  # with 4, of which nothing is trained, it would be
    assert state.odds[3] == state.odds[4] > 0.5
    assert state.next == Step(4, 0)


@pytest.mark.parametrize("alpha", [0.05, 0.01, 0.001])
@pytest.mark.parametrize("last", [2, 3, 5])
def test_looks_spend_their_level(alpha: float, last: int) -> None:
    levels = spent(alpha, last)
    assert len(levels) == last - 1
    assert all(a < b for a, b in itertools.pairwise(levels))
    assert levels[-1] <= alpha
    # drawn: the chance to pass at any look
    draw = np.random.default_rng(0)
    steps = draw.normal(size=(400_000, last))
    z = steps.cumsum(axis=1)[:, 1:] / np.sqrt(np.arange(2, last + 1))
    passes = (z >= stats.norm.isf(levels)).any(axis=1).mean()
    assert passes == pytest.approx(alpha, abs=4 * np.sqrt(alpha / 400_000))


def test_five_looks_of_a_published_table() -> None:
    def obrien_fleming(alpha: float, share: float) -> float:
        return float(2 * stats.norm.sf(stats.norm.isf(alpha / 2) / np.sqrt(share)))

    # O'Brien-Fleming spending at 20, 40, ... 100 % of the information, one-sided 2.5 %
    # (Lan and DeMets 1983): bounds 4.88, 3.36, 2.68, 2.29, 2.03. Ours has no look at 20 %, where
    # 5e-7 would be spent.
    found = stats.norm.isf(spent(0.025, 5, obrien_fleming))
    assert found == pytest.approx([3.36, 2.68, 2.29, 2.03], abs=0.01)


def test_nearly_all_is_left_for_the_last_look() -> None:
    for alpha in (0.05, 0.05 / 29):
        assert spent(alpha, 5)[-1] >= 0.98 * alpha


@pytest.mark.parametrize("seeds", [[5], [3, 3, 3], [2, 5], [2, 3, 5, 5]])
def test_degrees_of_freedom_of_luck(seeds: list[int]) -> None:
    # drawn: a mean of variances with df degrees has a variance of 2 / df
    draw, last = np.random.default_rng(0), max(seeds)
    teacher = draw.normal(size=(100_000, 1, last))
    luck = (draw.normal(size=(100_000, len(seeds), last)) - teacher) / np.sqrt(2)
    own = np.stack([luck[:, i, :s].var(axis=-1, ddof=1) for i, s in enumerate(seeds)])
    mean = np.average(own, axis=0, weights=[s - 1 for s in seeds])
    assert mean.mean() == pytest.approx(1, abs=0.01)
    assert luck_df(seeds) == pytest.approx(2 / mean.var(), rel=0.03)


def test_one_seed_has_no_level() -> None:
    assert look_level(0.05, 1, 5) == 0


def test_predictions() -> None:
    readout = {0: 0.04, 1: 0.06, 2: 0.05, 3: 0.09, 4: 0.10}
    found = predict(readout, [1, 2, 3], 4)
    # half of what a read-out loses comes back; no depth keeps less than a shallower one
    assert found == pytest.approx({1: 0.8, 2: 0.8, 3: 0.95})
    assert predict({}, [1, 2], 4) == {1: 1.0, 2: 1.0}


def test_nothing_trained_asks_for_the_teacher() -> None:
    assert search({}, {}, **asked(KNEE)).next == Step(BLOCKS, 0)


def test_of_a_teacher_without_a_hit_nothing_is_shown() -> None:
    none, some = {0: np.zeros(9), 1: np.zeros(9)}, {0: np.ones(9), 1: np.ones(9)}
    state = search(none, {1: some}, blocks=2, predicted={1: 1.0}, seeds=2)
    assert (state.verdict, state.refuted, state.open) == (None, (), (1,))


def test_one_user_shows_nothing() -> None:
    arms = {0: np.ones(1), 1: np.full(1, 0.5)}
    state = search(arms, {1: arms}, blocks=2, predicted={1: 1.0}, seeds=2)
    assert (state.shown, state.refuted, state.open) == (None, (), (1,))
