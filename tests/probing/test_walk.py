"""Each route equals the metric of a model that was really cut to its blocks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import skip_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.walk import Route, blocks_run, rank_routes, route, route_without, walk

CPU = torch.device("cpu")


def cut_to(teacher: Recommender, kept: Iterable[int]) -> Recommender:
    cut = copy.deepcopy(teacher)
    keep_blocks(cut.backbone, kept)
    return cut


def spans(depth: int) -> list[Route]:
    pairs = itertools.combinations(range(depth + 1), 2)
    return [route(b for b in range(depth) if not i <= b < j) for i, j in pairs if j - i < depth]


def test_every_subset_of_the_blocks(teacher: Recommender, eval_set: EvalSet) -> None:
    subsets = [kept for n in range(1, 6) for kept in itertools.combinations(range(5), n)]
    routes = rank_routes(teacher, eval_set, [route(kept) for kept in subsets], device=CPU)
    assert len(routes) == 31
    for kept, ranks in zip(subsets, routes, strict=True):
        expected = evaluate(cut_to(teacher, kept), eval_set, device=CPU)
        assert ranks.keys() == expected.keys() == {"full", "sampled-7"}
        for protocol in expected:
            np.testing.assert_array_equal(ranks[protocol], expected[protocol])


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_every_part_left_out(teacher: Recommender, few: EvalSet, part: str) -> None:
    routes = [route_without(part, b, 5) for b in range(5)]  # type: ignore[arg-type]
    full_depth = evaluate(teacher, few, device=CPU)["full"]
    for block, ranks in enumerate(rank_routes(teacher, few, routes, device=CPU)):
        with skip_blocks(teacher.backbone, {block}, part=part):  # type: ignore[arg-type]
            expected = evaluate(teacher, few, device=CPU)
        np.testing.assert_array_equal(ranks["full"], expected["full"])
        assert not np.array_equal(ranks["full"], full_depth)


# learned positions, parallel parts, windows and caches of their own, and no cache at all
SLOW = ["gpt_neox", "bloom", "gemma3_text", "mixtral", "qwen3_next", "cohere", "mistral"]
FAMILIES = [
    *("gpt2", "opt", "falcon", "gemma2", "mamba"),
    *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW),
]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [(), (3, 1, 2)], ids=["no prompt", "prompt"])
def test_families(family: str, prompt: tuple[int, ...], few: EvalSet) -> None:
    torch.manual_seed(0)
    changes = {"bloom": {"n_layer": 4}, "mamba": {"num_hidden_layers": 4}}.get(family, {})
    model = tiny_model(CONFIG_MAPPING[family](**changes), depth=4)
    teacher = Recommender(model, torch.randn(41, 6), prompt).double().eval()
    kept = [k for k in ([0, 1, 3], [1, 2, 3], [3], [0, 2, 3]) if max(k) < teacher.depth]
    ((_, ends),) = walk(teacher, few, [route(k) for k in kept], device=CPU)
    for blocks, states in zip(kept, ends, strict=True):
        cut = cut_to(teacher, blocks)
        ((_, expected),) = walk(cut, few, [route(range(len(blocks)))], device=CPU)
        torch.testing.assert_close(states, expected[0], rtol=1e-9, atol=1e-12)


def test_runs_the_blocks_that_it_says(teacher: Recommender, few: EvalSet) -> None:
    routes, sizes = spans(5), list[int]()
    for block in find_blocks(teacher.backbone):
        block.mlp.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    list(walk(teacher, few, routes, device=CPU))
    assert sizes.count(30) == blocks_run(routes) == 4 + sum((1, 3, 6, 10))
    assert sizes.count(1) == (24 if len(teacher.prompt) else 0)


@pytest.mark.parametrize("depth", [12, 32])
def test_price_of_a_walk(depth: int) -> None:
    singles = [route(b for b in range(depth) if b != out) for out in range(depth)]
    assert blocks_run(singles) / depth <= 0.55 * depth
    assert blocks_run(spans(depth)) / depth <= 0.20 * depth**2


def test_leaves_the_teacher_as_it_was(teacher: Recommender, few: EvalSet) -> None:
    before = evaluate(teacher, few, device=CPU)["full"]
    rank_routes(teacher, few, [route([1, 3]), route_without("mlp", 2, 5)], device=CPU)
    np.testing.assert_array_equal(evaluate(teacher, few, device=CPU)["full"], before)
    assert not any("forward" in vars(module) for module in teacher.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


@pytest.mark.parametrize("kept", [[1, 0], [0, 5], [2, 2], [-1], []])
def test_no_route(plain: Recommender, few: EvalSet, kept: list[int]) -> None:
    with pytest.raises(ValueError, match="is no route through 5 blocks"):
        rank_routes(plain, few, [route(kept)], device=CPU)
