"""The knapsack against all combinations, and what it chose against models built by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet, evaluate, mean_ndcg
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import cut_copy
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.mix import (
    KEPT,
    MAP,
    NO_ATTENTION,
    NO_MLP,
    OPTIONS,
    SKIP,
    choose,
    fit_maps,
    measure_damages,
    mix_route,
    option_costs,
    part_sizes,
    possible_options,
    total,
)
from depthprobe.probing.replace import fit_replacements, fold_map
from depthprobe.probing.walk import rank_routes, route

CPU = torch.device("cpu")


def cheapest(damages: np.ndarray, costs: np.ndarray, budget: float) -> float:
    """The least summed damage of all combinations that are models within the budget."""
    best = np.inf
    for mix in itertools.product(range(len(OPTIONS)), repeat=len(damages)):
        carried = all(
            block and mix[block - 1] in (KEPT, NO_ATTENTION)
            for block, option in enumerate(mix)
            if option == MAP
        )
        damage = sum(damages[block, option] for block, option in enumerate(mix))
        if carried and min(mix) <= NO_MLP and total(costs, mix) <= budget and damage < best:
            best = damage
    return best


@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_the_knapsack_equals_brute_force(scale: float) -> None:
    for seed in range(12):
        rng = np.random.default_rng(seed)
        damages = scale * rng.normal(0.2, 1, size=(4, 5))
        damages[:, KEPT] = 0
        damages[0, MAP] = np.nan
        damages[rng.integers(4), rng.integers(1, 5)] = np.nan
        costs = option_costs(rng.integers(7, 12, 4), rng.integers(1, 4, 4), rng.integers(2, 7, 4))
        for budget in (8.0, 15.0, 22.0, 30.0):
            mix = choose(damages, costs, budget)
            assert total(costs, mix) <= budget
            best = cheapest(np.where(np.isnan(damages), np.inf, damages), costs, budget)
            assert total(damages, mix) == pytest.approx(best, abs=1e-9 * scale)
            assert mix[0] != MAP
            assert min(mix) <= NO_MLP


def test_whole_blocks_fit_their_own_budget() -> None:
    damages = np.full((3, 5), 9.0)
    damages[:, KEPT], damages[0, MAP], damages[:, SKIP] = 0, np.nan, (3, 1, 2)
    costs = option_costs([0.1] * 3, [0.03] * 3, [0.06] * 3)
    assert choose(damages, costs, costs[:, KEPT].sum() * 2 / 3) == (KEPT, SKIP, KEPT)
    gains = np.where(np.arange(5) == SKIP, -1.0, damages)  # as noise may have it
    assert choose(gains, costs, 1.0).count(SKIP) == 2  # some block stays
    damages[1:, MAP:] = np.nan  # only the first block can go
    with pytest.raises(ValueError, match=r"no combination of options costs 0\.05 or less"):
        choose(damages, costs, 0.05)


def test_a_mix_of_skips_is_the_route_of_the_walk() -> None:
    assert mix_route((KEPT, SKIP, KEPT, SKIP)) == route([0, 2])
    steps = mix_route((NO_ATTENTION, MAP, NO_MLP, SKIP))
    assert [tuple(step) for step in steps] == [(0, "attention", True), (2, "mlp", False)]


def by_hand(model: Recommender, eval_set: EvalSet, mix: tuple[int, ...]) -> Recommender:
    """A copy with zeros in hooks, maps in the weights, and the other blocks gone."""
    built = copy.deepcopy(model)
    blocks = list(find_blocks(built.backbone))
    for block, option in enumerate(mix):
        if option == MAP:
            span = [(block, block + 1)]
            fold_map(built, fit_replacements(model, eval_set, span, device=CPU)[0])
        if option in (NO_ATTENTION, NO_MLP):
            part = blocks[block].self_attn if option == NO_ATTENTION else blocks[block].mlp
            part.register_forward_hook(
                lambda _, __, out: (
                    (torch.zeros_like(out[0]), *out[1:])
                    if isinstance(out, tuple)
                    else torch.zeros_like(out)
                )
            )
    return cut_copy(built, [b for b, option in enumerate(mix) if option not in (MAP, SKIP)])


def test_routes_of_mixes_equal_models_built_by_hand(
    teacher: Recommender, eval_set: EvalSet
) -> None:
    mixes = [
        (KEPT, MAP, NO_ATTENTION, MAP, NO_MLP),
        (NO_MLP, KEPT, MAP, SKIP, NO_ATTENTION),
        (NO_ATTENTION, SKIP, SKIP, KEPT, MAP),
    ]
    before = copy.deepcopy(teacher.state_dict())
    folded = fit_maps(teacher, eval_set, possible_options(teacher), device=CPU)
    assert sorted(folded) == [0, 1, 2, 3]
    routes = [mix_route(mix) for mix in mixes]
    ranked = rank_routes(teacher, eval_set, routes, device=CPU, folded=folded)
    for mix, ranks in zip(mixes, ranked, strict=True):
        expected = evaluate(by_hand(teacher, eval_set, mix), eval_set, device=CPU)
        for protocol, values in ranks.items():
            np.testing.assert_array_equal(values, expected[protocol], str(mix))
    whole = evaluate(teacher, eval_set, device=CPU)
    assert not any(np.array_equal(ranks["full"], whole["full"]) for ranks in ranked)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_damages_are_those_of_each_option_alone(plain: Recommender, few: EvalSet) -> None:
    possible = possible_options(plain)
    assert possible.sum() == 5 * 5 - 1
    assert not possible[0, MAP]
    folded = fit_maps(plain, few, possible, device=CPU)
    damages = measure_damages(plain, few, possible, folded, device=CPU)
    full = mean_ndcg(evaluate(plain, few, device=CPU)["full"])
    assert np.isnan(damages[0, MAP])
    assert not damages[:, KEPT].any()
    for block, option in [(0, NO_ATTENTION), (1, MAP), (3, NO_MLP), (4, SKIP), (4, MAP)]:
        mix = tuple(option if b == block else KEPT for b in range(5))
        score = mean_ndcg(evaluate(by_hand(plain, few, mix), few, device=CPU)["full"])
        assert damages[block, option] == pytest.approx(full - score, abs=1e-12)
    assert len(np.unique(damages[possible])) > 5


def test_parts_and_what_is_left_of_a_block(plain: Recommender) -> None:
    sizes = {part: part_sizes(plain.backbone, part) for part in ("attention", "mlp")}
    assert sizes == {"attention": [4 * 16 * 16] * 5, "mlp": [3 * 16 * 24] * 5}
    block = sum(weight.numel() for weight in find_blocks(plain.backbone)[0].parameters())
    costs = option_costs([block] * 5, *sizes.values())
    norms = 2 * 16
    np.testing.assert_array_equal(costs[2], [block, 1152 + norms, 1024 + norms, 0, 0])


# what each family's blocks can be replaced by; the first block never by a map
FAMILIES = {
    "llama": "attention mlp map skip",
    "gpt2": "attention mlp map skip",
    "opt": "attention mlp map skip",
    "gpt_neox": "attention mlp map skip",
    "gemma2": "attention mlp skip",
    "mixtral": "attention mlp skip",
    "bloom": "attention mlp map skip",
    "mamba": "attention skip",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_options_by_family(family: str, draw: Callable[[int, int], EvalSet]) -> None:
    changes: dict[str, Any] = {"bloom": {"n_layer": 4}}.get(family, {})
    torch.manual_seed(0)
    backbone = tiny_model(CONFIG_MAPPING[family](**changes), depth=3)
    model, few = Recommender(backbone, torch.randn(41, 6), ()).double().eval(), draw(8, 0)
    possible = possible_options(model)
    names = dict(zip(("kept", "attention", "mlp", "map", "skip"), possible[1:].T, strict=True))
    assert {name for name, found in names.items() if found.all()} == {
        "kept", *FAMILIES[family].split(),
    }  # fmt: skip
    assert not possible[0, MAP]
    folded = fit_maps(model, few, possible, device=CPU)
    damages = measure_damages(model, few, possible, folded, device=CPU)
    assert np.array_equal(np.isfinite(damages), possible)
    costs = option_costs([1.0] * 3, [0.4] * 3, [0.6] * 3)
    assert total(costs, choose(damages, costs, 2.0)) <= 2
