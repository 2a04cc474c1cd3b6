"""Early exit equals the metric of really truncated models, at every depth."""

from __future__ import annotations

import copy

import numpy as np
import torch

from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.passes import early_exit

CPU = torch.device("cpu")


def test_equals_truncated_models(teacher: Recommender, eval_set: EvalSet) -> None:
    found = early_exit(teacher, eval_set, device=CPU)
    assert len(found) == 6
    for depth in range(1, 6):
        cut = copy.deepcopy(teacher)
        keep_blocks(cut.backbone, range(depth))
        expected = evaluate(cut, eval_set, device=CPU)
        assert expected.keys() == found[depth].keys() == {"full", "sampled-7"}
        for protocol, ranks in expected.items():
            np.testing.assert_array_equal(found[depth][protocol], ranks)


def test_depths_differ(teacher: Recommender, eval_set: EvalSet) -> None:
    found = early_exit(teacher, eval_set, device=CPU)
    assert len({tuple(ranks["full"]) for ranks in found}) == 6
