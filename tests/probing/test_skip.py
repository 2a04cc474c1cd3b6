"""Each skip equals the metric of a model from which the block was really removed."""

from __future__ import annotations

import copy

import numpy as np
import torch

from depthprobe.evaluation.evaluate import Questions, evaluate
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.skip import skip_each

CPU = torch.device("cpu")


def test_equals_models_without_the_block(teacher: Recommender, asked: Questions) -> None:
    found = skip_each(teacher, asked, device=CPU)
    assert len(found) == 5
    for left_out in range(5):
        cut = copy.deepcopy(teacher)
        keep_blocks(cut.backbone, [b for b in range(5) if b != left_out])
        for protocol, ranks in evaluate(cut, asked, device=CPU).items():
            np.testing.assert_array_equal(found[left_out][protocol], ranks)


def test_runs_half_the_blocks_of_naive_passes(teacher: Recommender, asked: Questions) -> None:
    calls = []
    for block in find_blocks(teacher.backbone):
        block.register_forward_hook(lambda *_: calls.append(1))
    few = Questions(asked.users[:9], asked.histories[:9], asked.targets[:9], None, None)
    skip_each(teacher, few, device=CPU)
    batch = 5 + sum(range(5))  # one whole pass, then 4 + 3 + 2 + 1 + 0 blocks
    once = 5 + 5 * 5 + 2 * 5 if len(teacher.prompt) else 2 * 5  # prompts, read-outs, class probes
    assert batch <= len(calls) <= batch + once


def test_leaves_the_teacher_as_it_was(teacher: Recommender, asked: Questions) -> None:
    before = evaluate(teacher, asked, device=CPU)["full"]
    skip_each(teacher, asked, device=CPU)
    np.testing.assert_array_equal(evaluate(teacher, asked, device=CPU)["full"], before)
