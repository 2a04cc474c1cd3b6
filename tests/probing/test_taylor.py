"""Taylor importance against autograd written out, finite differences, and planted blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.taylor import taylor_importance

CPU = torch.device("cpu")
Draw = Callable[[int, int], EvalSet]


def loss_of(model: Recommender, eval_set: EvalSet) -> torch.Tensor:
    """Mean cross-entropy over the catalogue, one user at a time."""
    losses = []
    for history, target in zip(eval_set.histories, eval_set.targets, strict=True):
        vector = model.encode(torch.from_numpy(history)[None], torch.tensor([len(history)]))
        scores = vector @ model.item_matrix()[1:].T
        losses.append(cross_entropy(scores, torch.tensor([target - 1])))
    return torch.stack(losses).mean()


def by_autograd(model: Recommender, eval_set: EvalSet) -> list[float]:
    """To 1e-6 or so: Llama's norm computes in float32."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss_of(model, eval_set).backward()
    return [
        sum(
            float((p * p.grad).detach().abs().sum())
            for p in block.parameters()
            if p.grad is not None
        )
        for block in find_blocks(model.backbone)
    ]


@pytest.mark.parametrize("batch_size", [7, 64])
def test_against_autograd_user_by_user(teacher: Recommender, few: EvalSet, batch_size: int) -> None:
    importance = taylor_importance(teacher, few, device=CPU, batch_size=batch_size)
    assert (importance.shape, importance.dtype) == ((5,), np.float64)
    np.testing.assert_allclose(importance, by_autograd(teacher, few), rtol=1e-6)
    assert (importance > 1e-3).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "mixtral"])
@pytest.mark.parametrize("head", ["dot", "linear"])
def test_families_and_a_planted_identity(family: str, head: Any, draw: Draw) -> None:
    users = draw(9, 0)
    torch.manual_seed(0)
    backbone = tiny_model(CONFIG_MAPPING[family](), depth=4)
    model = Recommender(backbone, torch.randn(41, 6), (3,), head=head).double().eval()
    ends = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    with torch.no_grad():
        for name, parameter in find_blocks(backbone)[2].named_parameters():
            if name.removesuffix(".weight").removesuffix(".bias").endswith(ends):
                parameter.zero_()
    importance = taylor_importance(model, users, device=CPU, batch_size=4)
    np.testing.assert_allclose(importance, by_autograd(model, users), rtol=1e-6)
    assert importance[2] == 0  # a weight is 0, or nothing hangs on it
    assert (np.delete(importance, 2) > 0).all()


def test_frozen_weights_count_and_nothing_is_changed(teacher: Recommender, few: EvalSet) -> None:
    expected = by_autograd(teacher, few)
    for number, parameter in enumerate(teacher.parameters()):
        parameter.requires_grad_(number % 3 == 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, number)
    teacher.items.requires_grad_(True)
    before = [(p.requires_grad, p.grad, p.detach().clone()) for p in teacher.parameters()]
    with torch.inference_mode():  # as a caller may be
        importance = taylor_importance(teacher, few, device=CPU)
    np.testing.assert_allclose(importance, expected, rtol=1e-6)
    with torch.no_grad():
        assert taylor_importance(teacher, few, device=CPU).tolist() == importance.tolist()
        assert not torch.is_grad_enabled()
    for number, (parameter, (required, grad, value)) in enumerate(
        zip(teacher.parameters(), before, strict=True)
    ):
        assert parameter.requires_grad == required
        assert parameter.grad is grad
        assert grad is None or (grad == number).all()
        assert torch.equal(parameter, value)


def test_restored_after_an_error(
    plain: Recommender, few: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain.requires_grad_(False)
    encode, calls = plain.encode, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(any(p.requires_grad for p in find_blocks(plain.backbone).parameters()))
        if len(calls) == 2:
            raise RuntimeError("a kernel failed")
        return encode(*args)

    monkeypatch.setattr(plain, "encode", failing)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        taylor_importance(plain, few, device=CPU, batch_size=16)
    assert calls == [True, True]
    assert not any(p.requires_grad for p in plain.parameters())
    assert all(p.grad is None for p in plain.parameters())


def test_low_rank_adapters_count_beside_what_they_adapt(plain: Recommender, few: EvalSet) -> None:
    bare = taylor_importance(plain, few, device=CPU)
    lora = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, plain.backbone)
    plain.double()
    importance = taylor_importance(plain, few, device=CPU)
    np.testing.assert_allclose(importance, by_autograd(plain, few), rtol=1e-6)
    assert (importance != bare).all()


def test_half_precision_adds_up_in_float32(teacher: Recommender, eval_set: EvalSet) -> None:
    expected = taylor_importance(teacher, eval_set, device=CPU)
    half = copy.deepcopy(teacher)
    half.backbone.bfloat16()
    importance = taylor_importance(half, eval_set, device=CPU, batch_size=8)
    np.testing.assert_allclose(importance, expected, rtol=0.1)


def test_quantised_weights_are_refused(plain: Recommender, few: EvalSet) -> None:
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        model = copy.deepcopy(plain)
        mlp: Any = find_blocks(model.backbone)[3].mlp
        packed = torch.zeros(3, 2, dtype=dtype)
        mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
        with pytest.raises(ValueError, match=r"3\.mlp\.up_proj\.weight is torch.*quantised"):
            taylor_importance(model, few, device=CPU)
    # packed weights may be buffers, or no parameters at all
    marked = copy.deepcopy(plain)
    marked.backbone.is_quantized = True
    plain.backbone.config.quantization_config = {"quant_method": "gptq"}
    for model in (marked, plain):
        with pytest.raises(ValueError, match="probe the unquantised model"):
            taylor_importance(model, few, device=CPU)


def test_behind_a_suffix(few: EvalSet) -> None:
    backbone = tiny_model(CONFIG_MAPPING["llama"](), depth=3)
    model = Recommender(backbone, torch.randn(41, 6), (3, 1), suffix=(4, 5)).double().eval()
    importance = taylor_importance(model, few, device=CPU)
    np.testing.assert_allclose(importance, by_autograd(model, few), rtol=1e-6)


def test_no_users_and_an_unused_weight(plain: Recommender, few: EvalSet, draw: Draw) -> None:
    with pytest.raises(ValueError, match="no users"):
        taylor_importance(plain, draw(0, 0), device=CPU)
    expected = taylor_importance(plain, few, device=CPU)
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    find_blocks(plain.backbone)[2].register_parameter("spare", spare)
    np.testing.assert_array_equal(taylor_importance(plain, few, device=CPU), expected)
