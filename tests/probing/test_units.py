"""The importance of channels and heads, against loops over users and autograd written out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.models.narrowing import plan_narrowing
from depthprobe.models.recommender import Recommender
from depthprobe.probing import units
from depthprobe.probing.units import unit_scores

from .conftest import make_teacher

CPU = torch.device("cpu")


@pytest.fixture
def grouped(llama_config: Callable[..., LlamaConfig]) -> Recommender:
    """Four heads in two groups, a prompt."""
    config = llama_config(
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=4
    )
    return make_teacher(config, (3, 1, 2))


@torch.no_grad()
def test_activations_are_means_over_the_positions_of_histories(
    grouped: Recommender, few: EvalSet
) -> None:
    plan = plan_narrowing(grouped.backbone, 0.5)
    scores = unit_scores(grouped, plan, few, by="activation", device=CPU)
    prompt = grouped.prepare_prompt()
    for index, block in enumerate(find_blocks(grouped.backbone)):
        ends = (block.mlp.down_proj, block.self_attn.o_proj)
        seen: list[list[torch.Tensor]] = [[], []]
        hooks = [
            end.register_forward_pre_hook(lambda _, args, own=own: own.append(args[0][0]))
            for end, own in zip(ends, seen, strict=True)
        ]
        for history in few.histories:  # one by one: no padding
            grouped.encode(torch.from_numpy(history)[None], torch.tensor([len(history)]), prompt)
        for hook in hooks:
            hook.remove()
        mlp, attention = (torch.cat(each).abs() for each in seen)
        torch.testing.assert_close(scores["channels"][index], mlp.mean(0), rtol=1e-6, atol=0)
        heads = attention.view(len(attention), 4, 4).mean((0, 2))
        torch.testing.assert_close(scores["heads"][index, :4], heads, rtol=1e-6, atol=0)
        assert scores["heads"][index, 4:].eq(0).all()


def test_slopes_against_autograd(grouped: Recommender, few: EvalSet) -> None:
    plan = plan_narrowing(grouped.backbone, 0.5)
    scores = unit_scores(grouped, plan, few, by="taylor", device=CPU)
    model = copy.deepcopy(grouped).requires_grad_(True)
    loss = torch.zeros(())
    for history, target in zip(few.histories, few.targets, strict=True):
        vector = model.encode(torch.from_numpy(history)[None], torch.tensor([len(history)]))
        logits = vector @ model.item_matrix()[1:].T
        loss = loss + cross_entropy(logits, torch.tensor([target - 1]))
    loss.backward()
    for index, block in enumerate(find_blocks(model.backbone)):
        weigh = {
            name: (p * p.grad).detach().abs() for name, p in block.named_parameters() if p.dim() > 1
        }
        own = {name.split(".")[1]: value for name, value in weigh.items()}
        channels = own["gate_proj"].sum(1) + own["up_proj"].sum(1) + own["down_proj"].sum(0)
        torch.testing.assert_close(scores["channels"][index], channels, rtol=1e-5, atol=1e-9)
        heads = own["q_proj"].view(4, -1).sum(1) + own["o_proj"].T.reshape(4, -1).sum(1)
        groups = own["k_proj"].view(2, -1).sum(1) + own["v_proj"].view(2, -1).sum(1)
        found = torch.cat([heads, groups])
        torch.testing.assert_close(scores["heads"][index], found, rtol=1e-5, atol=1e-9)


def test_no_more_users_than_are_needed(
    plain: Recommender, few: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_narrowing(plain.backbone, 0.5)
    every = unit_scores(plain, plan, few, by="activation", device=CPU)
    monkeypatch.setattr(units, "USERS", 2)
    ends = EvalSet(
        few.users[[0, -1]], [few.histories[0], few.histories[-1]], few.targets[[0, -1]], None, None
    )
    two = unit_scores(plain, plan, few, by="activation", device=CPU)
    monkeypatch.undo()
    same = unit_scores(plain, plan, ends, by="activation", device=CPU)
    for kind, values in two.items():
        assert torch.equal(values, same[kind])
        assert not np.allclose(values, every[kind])
