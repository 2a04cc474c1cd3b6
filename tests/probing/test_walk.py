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
    found = rank_routes(teacher, eval_set, [route(kept) for kept in subsets], device=CPU)
    assert len(found) == 31
    for kept, ranks in zip(subsets, found, strict=True):
        expected = evaluate(cut_to(teacher, kept), eval_set, device=CPU)
        assert ranks.keys() == expected.keys() == {"full", "sampled-7"}
        for protocol in expected:
            np.testing.assert_array_equal(ranks[protocol], expected[protocol])


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_every_part_left_out(teacher: Recommender, eval_set: EvalSet, part: str) -> None:
    routes = [route_without(part, b, 5) for b in range(5)]  # type: ignore[arg-type]
    found = rank_routes(teacher, eval_set, routes, device=CPU)
    whole = evaluate(teacher, eval_set, device=CPU)["full"]
    for block, ranks in enumerate(found):
        with skip_blocks(teacher.backbone, {block}, part=part):  # type: ignore[arg-type]
            expected = evaluate(teacher, eval_set, device=CPU)
        np.testing.assert_array_equal(ranks["full"], expected["full"])
        assert not np.array_equal(ranks["full"], whole)


# learned positions, parallel parts, windows and caches of their own, and no cache at all
FAMILIES = ["gpt2", "opt", "gpt_neox", "falcon", "bloom", "gemma2", "gemma3_text", "mixtral"]
FAMILIES += ["qwen3_next", "mamba", "cohere", "mistral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [(), (3, 1, 2)], ids=["no prompt", "prompt"])
def test_families(family: str, prompt: tuple[int, ...], eval_set: EvalSet) -> None:
    torch.manual_seed(0)
    changes = {"bloom": {"n_layer": 4}, "mamba": {"num_hidden_layers": 4}}.get(family, {})
    model = tiny_model(CONFIG_MAPPING[family](**changes), depth=4)
    teacher = Recommender(model, torch.randn(41, 6), prompt).double().eval()
    depth = teacher.depth
    few = EvalSet(eval_set.users[:40], eval_set.histories[:40], eval_set.targets[:40], None, None)
    kept = [k for k in ([0, 1, 3], [1, 2, 3], [3], [0, 2, 3]) if max(k) < depth]
    found = [p.states for p in walk(teacher, few, [route(k) for k in kept], device=CPU)]
    for blocks, states in zip(kept, torch.cat(found, dim=1), strict=True):
        cut = cut_to(teacher, blocks)
        (expected,) = [p.states for p in walk(cut, few, [route(range(len(blocks)))], device=CPU)]
        torch.testing.assert_close(states, expected[0], rtol=1e-9, atol=1e-12)


def test_runs_the_blocks_that_it_says(teacher: Recommender, eval_set: EvalSet) -> None:
    few = EvalSet(eval_set.users[:9], eval_set.histories[:9], eval_set.targets[:9], None, None)
    routes, sizes = spans(5), []
    counted = find_blocks(teacher.backbone)
    for block in counted:
        block.mlp.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    list(walk(teacher, few, routes, device=CPU))
    assert sum(size == 9 for size in sizes) == blocks_run(routes) == 4 + sum((1, 3, 6, 10))
    assert sum(size == 1 for size in sizes) == (24 if len(teacher.prompt) else 0)


@pytest.mark.parametrize("depth", [12, 32])
def test_price_of_a_walk(depth: int) -> None:
    singles = [route(b for b in range(depth) if b != out) for out in range(depth)]
    assert blocks_run(singles) / depth <= 0.55 * depth
    assert blocks_run(spans(depth)) / depth <= 0.20 * depth**2


def test_leaves_the_teacher_as_it_was(teacher: Recommender, eval_set: EvalSet) -> None:
    before = evaluate(teacher, eval_set, device=CPU)["full"]
    rank_routes(teacher, eval_set, [route([1, 3]), route_without("mlp", 2, 5)], device=CPU)
    np.testing.assert_array_equal(evaluate(teacher, eval_set, device=CPU)["full"], before)
    assert not any("forward" in vars(module) for module in teacher.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def test_states_do_not_depend_on_the_other_paths(teacher: Recommender, eval_set: EvalSet) -> None:
    (alone,) = rank_routes(teacher, eval_set, [route([0, 4])], device=CPU)
    among = rank_routes(teacher, eval_set, [*spans(5), route([0, 4])], device=CPU)[-1]
    np.testing.assert_array_equal(alone["full"], among["full"])


@pytest.mark.parametrize("kept", [[1, 0], [0, 5], [2, 2], [-1]])
def test_no_path(teacher: Recommender, eval_set: EvalSet, kept: list[int]) -> None:
    with pytest.raises(ValueError, match="is no route through 5 blocks"):
        rank_routes(teacher, eval_set, [route(kept)], device=CPU)
