"""Any causal recommender can be probed, early exit is a truncated model, memory may run out."""

from __future__ import annotations

import copy
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from depthprobe.evaluation.ranks import EvalSet, evaluate
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.probing.passes import CausalEncoder, early_exit, passes, settling
from depthprobe.probing.replace import fit_replacements
from depthprobe.probing.similarity import similarities
from depthprobe.probing.taylor import taylor_importance
from depthprobe.probing.walk import greedy, rank_routes, route, route_without

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


def test_early_exit_equals_truncated_models(teacher: Recommender, eval_set: EvalSet) -> None:
    exits = early_exit(teacher, eval_set, device=CPU)
    assert len({tuple(ranks["full"]) for ranks in exits}) == 6  # the depths differ
    for depth in range(1, 6):
        truncated = copy.deepcopy(teacher)
        keep_blocks(truncated.backbone, range(depth))
        expected = evaluate(truncated, eval_set, device=CPU)
        assert expected.keys() == exits[depth].keys() == {"full", "sampled-7"}
        for protocol, ranks in expected.items():
            np.testing.assert_array_equal(exits[depth][protocol], ranks)


def test_every_probe_of_a_model_of_ones_own(few: EvalSet) -> None:
    model = Mine()
    depths = early_exit(model, few, device=CPU)
    for depth in range(1, 5):
        expected = evaluate(cut(list(range(depth))), few, device=CPU)
        np.testing.assert_array_equal(depths[depth]["full"], expected["full"])
    subsets = [list(s) for n in range(1, 5) for s in itertools.combinations(range(4), n)]
    routes = rank_routes(model, few, [route(s) for s in subsets], device=CPU)
    for kept, ranks in zip(subsets, routes, strict=True):
        expected = evaluate(cut(kept), few, device=CPU)
        np.testing.assert_array_equal(ranks["full"], expected["full"])
    (without,) = rank_routes(model, few, [route_without("attention", 2, 4)], device=CPU)
    assert not np.array_equal(without["full"], depths[4]["full"])
    assert len(greedy(model, few, device=CPU).removed) == 3
    assert (similarities(model, few, device=CPU).influence > 0).all()
    assert (taylor_importance(model, few, device=CPU) > 0).all()
    settled = settling(model, few, device=CPU)
    np.testing.assert_array_equal(settled.ranks[:, -1], depths[4]["full"])


def test_states_are_those_of_the_model(eval_set: EvalSet) -> None:
    model = Mine()
    with torch.inference_mode():
        for chosen, states in list(passes(model, eval_set, device=CPU, batch_size=64)):
            assert states.shape == (5, len(chosen), 16)
            # of this batch alone: it is free before the next one
            assert states.untyped_storage().nbytes() <= 5 * 64 * 16 * 8
            for place, user in enumerate(chosen):
                ids = torch.from_numpy(eval_set.histories[user])[None]
                hidden = model.backbone(ids, use_cache=False, output_hidden_states=True)
                for k in range(4):  # the last one of theirs is behind the norm
                    alone = hidden.hidden_states[k][0, -1]
                    torch.testing.assert_close(states[k, place], alone, rtol=0, atol=1e-12)


def test_a_model_read_out_elsewhere_is_refused(few: EvalSet) -> None:
    long = replace(few, histories=[np.array([1, 2, *history]) for history in few.histories])
    with pytest.raises(ValueError, match="define last_place and read_out as encode has them"):
        early_exit(Mine(shift=1), long, device=CPU)


PROBES: dict[str, Callable[[Any, EvalSet], Any]] = {
    "early-exit": lambda model, few: early_exit(model, few, device=CPU),
    "skip": lambda model, few: rank_routes(model, few, [route([0, 2, 4]), route([1])], device=CPU),
    "settling": lambda model, few: vars(settling(model, few, device=CPU)),
    "similarity": lambda model, few: vars(similarities(model, few, device=CPU)),
    "taylor": lambda model, few: {"": taylor_importance(model, few, device=CPU)},
    "replace": lambda model, few: vars(fit_replacements(model, few, [(1, 3)], device=CPU)[0]),
}


@pytest.mark.parametrize("probe", PROBES)
def test_out_of_memory_halves_the_batch(
    plain: Recommender,
    few: EvalSet,
    probe: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = PROBES[probe](plain, few)
    real, sizes = plain.backbone.layers[2].forward, list[int]()

    def forward(state: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs out in the middle of a pass, when other blocks have left something behind."""
        sizes.append(len(state))
        if len(state) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(state, *args, **kwargs)

    plain.backbone.layers[2].forward = forward
    with caplog.at_level(logging.WARNING, "depthprobe"):
        results = PROBES[probe](plain, few)
    assert "out of memory with 30 users at once: now 15" in caplog.messages
    assert max(sizes) > 8
    pairs = (
        zip(expected, results, strict=True)
        if probe in ("early-exit", "skip")
        else [(expected, results)]
    )
    for one, other in pairs:
        for name in one:
            np.testing.assert_allclose(other[name], one[name], rtol=1e-9, atol=1e-12)


def test_the_guide_runs() -> None:
    guide = Path(__file__).parents[2] / "docs" / "probing.md"
    _, code = re.findall(r"```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102 - our own page
    ranks = early_exit(names["model"], names["eval_set"], device=CPU)  # type: ignore[arg-type]
    assert len(ranks) == 5
    lines = code[code.index("class Mine") : code.index("model = ")].strip().splitlines()
    assert len(lines) <= 20
