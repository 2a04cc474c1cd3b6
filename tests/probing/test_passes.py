"""Any causal recommender can be probed: one around a plain transformers model, in a few lines."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.cutting import keep_blocks
from depthprobe.probing.greedy import greedy
from depthprobe.probing.passes import CausalEncoder, early_exit, passes
from depthprobe.probing.settling import settling
from depthprobe.probing.similarity import similarities
from depthprobe.probing.taylor import taylor_importance
from depthprobe.probing.walk import rank_routes, route, route_without

CPU = torch.device("cpu")


class Mine(nn.Module, CausalEncoder):
    """Somebody's own recommender: item tokens in, the last state against the token table."""

    def __init__(self, shift: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=41, n_embd=16, n_layer=4, n_head=2, n_positions=32)
        self.backbone = GPT2Model(config).double().eval()
        with torch.no_grad():
            for weight in self.backbone.h.parameters():
                weight.mul_(6 if weight.dim() > 1 else 1)
        self.shift = shift

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T), (B,) -> (B, D)."""
        states = self.backbone(input_ids=histories, use_cache=False).last_hidden_state
        return states[torch.arange(len(lengths)), lengths - 1 - self.shift]

    def item_matrix(self) -> Tensor:
        """(I + 1, D)."""
        return self.backbone.get_input_embeddings().weight.detach()


def cut(kept: list[int]) -> Mine:
    model = Mine()
    keep_blocks(model.backbone, kept)
    return model


def test_every_probe_of_a_model_of_ones_own(eval_set: EvalSet) -> None:
    model = Mine()
    depths = early_exit(model, eval_set, device=CPU)
    for depth in range(1, 5):
        expected = evaluate(cut(list(range(depth))), eval_set, device=CPU)
        np.testing.assert_array_equal(depths[depth]["full"], expected["full"])
    subsets = [list(s) for n in range(1, 5) for s in itertools.combinations(range(4), n)]
    found = rank_routes(model, eval_set, [route(s) for s in subsets], device=CPU)
    for kept, ranks in zip(subsets, found, strict=True):
        expected = evaluate(cut(kept), eval_set, device=CPU)
        np.testing.assert_array_equal(ranks["full"], expected["full"])
    (without,) = rank_routes(model, eval_set, [route_without("attention", 2, 4)], device=CPU)
    assert not np.array_equal(without["full"], depths[4]["full"])
    assert len(greedy(model, eval_set, device=CPU).removed) == 3
    assert (similarities(model, eval_set, device=CPU).influence > 0).all()
    assert (taylor_importance(model, eval_set, device=CPU) > 0).all()
    settled = settling(model, eval_set, device=CPU)
    np.testing.assert_array_equal(settled.ranks[:, -1], depths[4]["full"])


def test_states_are_those_of_the_model(eval_set: EvalSet) -> None:
    model = Mine()
    with torch.inference_mode():
        for batch in passes(model, eval_set, device=CPU, batch_size=64):
            whole = model.backbone(
                input_ids=batch.histories, use_cache=False, output_hidden_states=True
            ).hidden_states
            rows = torch.arange(len(batch.chosen))
            for k in range(4):  # the last one of theirs is behind the norm
                assert torch.equal(batch.states[k], whole[k][rows, batch.lengths - 1])
            assert batch.states.shape == (5, len(batch.chosen), 16)


def test_a_model_read_out_elsewhere_is_refused(eval_set: EvalSet) -> None:
    long = [h for h in eval_set.histories if len(h) > 1]
    few = EvalSet(eval_set.users[: len(long)], long, eval_set.targets[: len(long)], None, None)
    with pytest.raises(ValueError, match="define last_place and read_out as encode has them"):
        early_exit(Mine(shift=1), few, device=CPU)


def test_only_batches_are_in_memory(eval_set: EvalSet) -> None:
    # the states of a batch are free before the next one is asked for
    alive = []
    with torch.inference_mode():
        for batch in passes(Mine(), eval_set, device=CPU, batch_size=16):
            alive.append(batch.states.untyped_storage().nbytes())
            assert batch.states.shape[1] <= 16
    assert max(alive) <= 5 * 16 * 16 * 8


def test_the_guide_runs() -> None:
    guide = Path(__file__).parents[2] / "docs" / "probing.md"
    _, code = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - our own page
    ranks = early_exit(names["model"], names["eval_set"], device=CPU)  # type: ignore[arg-type]
    assert len(ranks) == 5
    lines = code[code.index("class Mine") : code.index("model = ")].strip().splitlines()
    assert len(lines) <= 20
