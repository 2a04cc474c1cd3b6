"""Taylor+ equals autograd over users one by one, and a finite difference of the loss."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.evaluate import Questions
from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.taylor import taylor_importance

CPU = torch.device("cpu")


@pytest.fixture
def asked(asked: Questions) -> Questions:
    return replace(
        asked, users=asked.users[:40], histories=asked.histories[:40], targets=asked.targets[:40]
    )


def loss_of_one(model: Recommender, history: np.ndarray, target: int) -> Tensor:
    """``-log softmax`` of the target, from the whole sequence, prompt included, without a cache."""
    tokens = model.token_embeddings
    parts = [tokens(model.prompt), model.input_adapter(model.items(torch.as_tensor(history)))]
    sequence = torch.cat([*parts, tokens(model.suffix)])[None]
    positions = torch.arange(sequence.shape[1])[None]
    out = model.backbone(inputs_embeds=sequence, position_ids=positions, use_cache=False)
    scores = model.item_matrix() @ model.read_out(out.last_hidden_state[0, -1])
    return scores[1:].logsumexp(dim=0) - scores[target]


def naive(teacher: Recommender, asked: Questions) -> np.ndarray:
    """By backward passes over users one by one, through a copy that is trained as a whole."""
    model = copy.deepcopy(teacher)
    model.requires_grad_(True)
    for history, target in zip(asked.histories, asked.targets, strict=True):
        (loss_of_one(model, history, int(target)) / len(asked.users)).backward()
    return np.array(
        [
            sum(
                float((weight * weight.grad).abs().sum())
                for weight in block.parameters()
                if weight.grad is not None
            )
            for block in find_blocks(model.backbone)
        ]
    )


@torch.no_grad()
def loss(model: Recommender, asked: Questions) -> float:
    losses = [
        float(loss_of_one(model, history, int(target)))
        for history, target in zip(asked.histories, asked.targets, strict=True)
    ]
    return sum(losses) / len(losses)


def test_naive_loop(teacher: Recommender, asked: Questions) -> None:
    found = taylor_importance(teacher, asked, device=CPU, batch_size=16)
    assert found.shape == (5,)
    assert found.dtype == np.float64
    assert len(set(found.round(6))) == 5
    assert (found > 0.01).all()
    np.testing.assert_allclose(found, naive(teacher, asked), rtol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "gemma2"])
def test_families(family: str, asked: Questions) -> None:
    # so few users that some experts have none
    few = replace(
        asked, users=asked.users[:3], histories=asked.histories[:3], targets=asked.targets[:3]
    )
    torch.manual_seed(0)
    model = tiny_model(CONFIG_MAPPING[family](), depth=4)
    teacher = Recommender(model, torch.randn(41, 6), (3, 1, 2)).double().eval()
    found = taylor_importance(teacher, few, device=CPU)
    np.testing.assert_allclose(found, naive(teacher, few), rtol=1e-9)


def test_a_linear_head_behind_a_suffix(llama_config: Any, asked: Questions) -> None:
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(llama_config())
    teacher = Recommender(backbone, torch.randn(41, 6), (3, 1), suffix=(4, 5), head="linear")
    teacher = teacher.double().eval()
    found = taylor_importance(teacher, asked, device=CPU, batch_size=16)
    np.testing.assert_allclose(found, naive(teacher, asked), rtol=1e-9)


def test_a_finite_difference(llama_config: Any, asked: Questions) -> None:
    torch.manual_seed(0)
    config = llama_config(mlp_bias=True)
    teacher = Recommender(LlamaForCausalLM(config), torch.randn(41, 6), (3, 1, 2)).double().eval()
    block = teacher.backbone.layers[1]
    # all zero but one weight: then the block's sum has one term
    with torch.no_grad():
        for weight in block.parameters():
            weight.zero_()
        bias = block.mlp.down_proj.bias
        bias[3] = 0.7
        expected = 0.0
        for step in (1e-4, -1e-4):
            bias[3] = 0.7 + step
            expected += loss(teacher, asked) / (2 * step)
        bias[3] = 0.7
    found = taylor_importance(teacher, asked, device=CPU)
    assert abs(expected) > 1e-4
    assert found[1] == pytest.approx(0.7 * abs(expected), rel=1e-6)


def test_gradients_add_up_before_they_are_made_positive(
    teacher: Recommender, asked: Questions
) -> None:
    # mean |W dL_u/dW| over users is another, larger number
    alone = [
        taylor_importance(
            teacher,
            replace(
                asked,
                users=asked.users[i : i + 1],
                histories=asked.histories[i : i + 1],
                targets=asked.targets[i : i + 1],
            ),
            device=CPU,
        )
        for i in range(40)
    ]
    found = taylor_importance(teacher, asked, device=CPU, batch_size=1)
    assert (np.mean(alone, axis=0) > 1.1 * found).all()


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_any_batch_size(teacher: Recommender, asked: Questions, batch_size: int) -> None:
    expected = taylor_importance(teacher, asked, device=CPU)
    found = taylor_importance(teacher, asked, device=CPU, batch_size=batch_size)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_an_empty_block_does_not_matter(teacher: Recommender, asked: Questions) -> None:
    with torch.no_grad():
        for weight in teacher.backbone.layers[2].parameters():
            weight.zero_()
    found = taylor_importance(teacher, asked, device=CPU)
    assert found[2] == 0
    assert (found[[0, 1, 3, 4]] > 0.01).all()


def test_half_precision(teacher: Recommender, asked: Questions) -> None:
    teacher = teacher.to(torch.bfloat16)
    exact = taylor_importance(copy.deepcopy(teacher).double(), asked, device=CPU)
    found = taylor_importance(teacher, asked, device=CPU)
    np.testing.assert_allclose(found, exact, rtol=0.05)


def state_of(teacher: Recommender) -> list[tuple[str, bool, Tensor, Tensor | None]]:
    return [
        (name, p.requires_grad, p.detach().clone(), None if p.grad is None else p.grad.clone())
        for name, p in teacher.named_parameters()
    ]


def check_same(teacher: Recommender, before: Sequence[Any]) -> None:
    for one, other in zip(state_of(teacher), before, strict=True):
        assert one[:2] == other[:2]
        assert torch.equal(one[2], other[2])
        assert (one[3] is None) == (other[3] is None)
        assert one[3] is None or torch.equal(one[3], other[3])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in teacher.modules())


def freeze_some(teacher: Recommender) -> None:
    """Also a gradient that is under way."""
    teacher.backbone.embed_tokens.requires_grad_(False)
    teacher.backbone.layers[1].requires_grad_(False)
    teacher.backbone.layers[3].mlp.requires_grad_(False)
    weight = teacher.backbone.layers[0].mlp.up_proj.weight
    weight.grad = torch.full_like(weight, 3.0)


def test_frozen_weights_count_and_stay_frozen(teacher: Recommender, asked: Questions) -> None:
    expected = taylor_importance(teacher, asked, device=CPU)
    freeze_some(teacher)
    before = state_of(teacher)
    np.testing.assert_array_equal(taylor_importance(teacher, asked, device=CPU), expected)
    check_same(teacher, before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_where_gradients_are_off(teacher: Recommender, asked: Questions, mode: Any) -> None:
    expected = taylor_importance(teacher, asked, device=CPU)
    with mode():
        found = taylor_importance(teacher, asked, device=CPU)
        assert not torch.is_grad_enabled()
    np.testing.assert_array_equal(found, expected)


def test_leaves_the_model_as_it_was_after_a_failure(
    teacher: Recommender, asked: Questions, monkeypatch: pytest.MonkeyPatch
) -> None:
    freeze_some(teacher)
    before = state_of(teacher)
    encode, left = teacher.encode, [2]

    def fail(*args: Any) -> Tensor:
        left[0] -= 1
        if not left[0]:
            assert all(weight.requires_grad for weight in teacher.backbone.layers.parameters())
            raise RuntimeError("out of memory")
        return encode(*args)

    monkeypatch.setattr(teacher, "encode", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        taylor_importance(teacher, asked, device=CPU, batch_size=16)
    check_same(teacher, before)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights(teacher: Recommender, asked: Questions, dtype: torch.dtype) -> None:
    layer = teacher.backbone.layers[2].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=r"block weight 2\.mlp\.up_proj\.weight is quantised"):
        taylor_importance(teacher, asked, device=CPU)


@pytest.mark.parametrize("mark", ["model", "config"])
def test_quantised_weights_that_are_no_parameters(
    teacher: Recommender, asked: Questions, mark: str
) -> None:
    if mark == "model":
        teacher.backbone.is_quantized = True
    else:
        teacher.backbone.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="probe the unquantised model"):
        taylor_importance(teacher, asked, device=CPU)


def test_nobody(teacher: Recommender, asked: Questions) -> None:
    nobody = replace(asked, users=asked.users[:0], histories=[], targets=asked.targets[:0])
    with pytest.raises(ValueError, match="no questions to take a gradient of"):
        taylor_importance(teacher, nobody, device=CPU)
