"""Taylor importance against autograd written out, finite differences, and planted blocks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from depthprobe.evaluation.ranks import EvalSet
from depthprobe.models.blocks import find_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model
from depthprobe.probing.taylor import taylor_importance

CPU = torch.device("cpu")


def first(eval_set: EvalSet, users: int) -> EvalSet:
    return EvalSet(
        eval_set.users[:users], eval_set.histories[:users], eval_set.targets[:users], None, None
    )


def loss_of(model: Recommender, eval_set: EvalSet) -> torch.Tensor:
    """Mean cross-entropy over the catalogue, one user at a time."""
    losses = []
    for history, target in zip(eval_set.histories, eval_set.targets, strict=True):
        row = torch.from_numpy(history)[None]
        vector = model.encode(row, torch.tensor([len(history)]))
        scores = vector @ model.item_matrix()[1:].T
        losses.append(cross_entropy(scores, torch.tensor([target - 1])))
    return torch.stack(losses).mean()


def by_autograd(model: Recommender, eval_set: EvalSet) -> list[float]:
    """To 1e-6 or so: Llama's norm computes in float32."""
    model = copy.deepcopy(model).requires_grad_(True)
    loss_of(model, eval_set).backward()
    found = []
    for block in find_blocks(model.backbone):
        weights = [p for p in block.parameters() if p.grad is not None]
        found.append(sum(float((p * p.grad).detach().abs().sum()) for p in weights))
    return found


@pytest.mark.parametrize("batch_size", [7, 64])
def test_against_autograd_user_by_user(
    teacher: Recommender, eval_set: EvalSet, batch_size: int
) -> None:
    few = first(eval_set, 40)
    found = taylor_importance(teacher, few, device=CPU, batch_size=batch_size)
    assert found.shape == (5,)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, by_autograd(teacher, few), rtol=1e-6)
    assert (found > 1e-3).all()


def test_against_finite_differences(eval_set: EvalSet) -> None:
    few = first(eval_set, 4)
    # all of it in float64, as Llama's norm is not
    sizes = {"n_embd": 4, "n_head": 2, "n_inner": 3, "n_layer": 1, "n_positions": 32}
    backbone = GPT2LMHeadModel(GPT2Config(vocab_size=11, **sizes))
    model = Recommender(backbone, torch.randn(41, 6), (3, 1)).double().eval()
    total, step = 0.0, 1e-5
    with torch.no_grad():
        for parameter in find_blocks(backbone)[0].parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
        for parameter in find_blocks(backbone)[0].parameters():
            weights = parameter.view(-1)
            for index, weight in enumerate(weights.tolist()):
                weights[index] = weight + step
                above = loss_of(model, few)
                weights[index] = weight - step
                below = loss_of(model, few)
                weights[index] = weight
                total += abs(weight * float(above - below) / (2 * step))
    (found,) = taylor_importance(model, few, device=CPU)
    assert found == pytest.approx(total, rel=1e-6)
    assert total > 1e-2


FAMILIES = ["llama", "gpt2", "gpt_neox", "mixtral"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["dot", "linear"])
def test_families_and_a_planted_identity(family: str, head: Any, eval_set: EvalSet) -> None:
    few = first(eval_set, 9)
    torch.manual_seed(0)
    backbone = tiny_model(CONFIG_MAPPING[family](), depth=4)
    model = Recommender(backbone, torch.randn(41, 6), (3,), head=head).double().eval()
    ends = ("o_proj", "down_proj", "c_proj", "attention.dense", "dense_4h_to_h")
    with torch.no_grad():
        for name, parameter in find_blocks(backbone)[2].named_parameters():
            if name.removesuffix(".weight").removesuffix(".bias").endswith(ends):
                parameter.zero_()
    found = taylor_importance(model, few, device=CPU, batch_size=4)
    np.testing.assert_allclose(found, by_autograd(model, few), rtol=1e-6)
    assert found[2] == 0  # a weight is 0, or nothing hangs on it
    assert (np.delete(found, 2) > 0).all()


def test_frozen_weights_count_and_nothing_is_changed(
    teacher: Recommender, eval_set: EvalSet
) -> None:
    few = first(eval_set, 20)
    expected = by_autograd(teacher, few)
    for number, parameter in enumerate(teacher.parameters()):
        parameter.requires_grad_(number % 3 == 0)
        if number % 2:
            parameter.grad = torch.full_like(parameter, number)
    teacher.items.requires_grad_(True)
    before = [(p.requires_grad, p.grad, p.detach().clone()) for p in teacher.parameters()]
    with torch.inference_mode():  # as a caller may be
        found = taylor_importance(teacher, few, device=CPU)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not torch.is_inference_mode_enabled()
    for number, (parameter, (required, grad, value)) in enumerate(
        zip(teacher.parameters(), before, strict=True)
    ):
        assert parameter.requires_grad == required
        assert parameter.grad is grad
        assert grad is None or (grad == number).all()
        assert torch.equal(parameter, value)


def test_restored_after_an_error(
    teacher: Recommender, eval_set: EvalSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher.requires_grad_(False)
    encode, calls = teacher.encode, []

    def failing(*args: Any) -> torch.Tensor:
        calls.append(any(p.requires_grad for p in find_blocks(teacher.backbone).parameters()))
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return encode(*args)

    monkeypatch.setattr(teacher, "encode", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        taylor_importance(teacher, eval_set, device=CPU, batch_size=16)
    assert calls == [True, True]
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())


def test_low_rank_adapters_count_beside_what_they_adapt(
    teacher: Recommender, eval_set: EvalSet
) -> None:
    few = first(eval_set, 10)
    bare = taylor_importance(teacher, few, device=CPU)
    lora = LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    inject_adapter_in_model(lora, teacher.backbone)
    teacher.double()
    found = taylor_importance(teacher, few, device=CPU)
    np.testing.assert_allclose(found, by_autograd(teacher, few), rtol=1e-6)
    assert (found != bare).all()


def test_half_precision_adds_up_in_float32(teacher: Recommender, eval_set: EvalSet) -> None:
    expected = taylor_importance(teacher, eval_set, device=CPU)
    half = copy.deepcopy(teacher)
    half.backbone.bfloat16()
    found = taylor_importance(half, eval_set, device=CPU, batch_size=8)
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_quantised_weights_are_refused(teacher: Recommender, eval_set: EvalSet) -> None:
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn):
        model = copy.deepcopy(teacher)
        mlp: Any = find_blocks(model.backbone)[3].mlp
        packed = torch.zeros(3, 2, dtype=dtype)
        mlp.up_proj.weight = nn.Parameter(packed, requires_grad=False)
        with pytest.raises(ValueError, match=r"3\.mlp\.up_proj\.weight is quantised"):
            taylor_importance(model, eval_set, device=CPU)
    teacher.backbone.is_quantized = True  # its weights may be buffers
    with pytest.raises(ValueError, match="are quantised"):
        taylor_importance(teacher, eval_set, device=CPU)


def test_packed_weights_that_are_no_parameters(teacher: Recommender, eval_set: EvalSet) -> None:
    teacher.backbone.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ValueError, match="probe the unquantised"):
        taylor_importance(teacher, eval_set, device=CPU)


def test_gradients_add_up_before_they_are_made_positive(
    teacher: Recommender, eval_set: EvalSet
) -> None:
    # the mean of |W dL/dW| over users is another, larger number
    alone = [
        taylor_importance(
            teacher,
            replace(
                eval_set,
                users=eval_set.users[i : i + 1],
                histories=eval_set.histories[i : i + 1],
                targets=eval_set.targets[i : i + 1],
            ),
            device=CPU,
        )
        for i in range(12)
    ]
    found = taylor_importance(teacher, first(eval_set, 12), device=CPU, batch_size=1)
    assert (np.mean(alone, axis=0) > 1.1 * found).all()


def test_behind_a_suffix_and_where_gradients_are_off(eval_set: EvalSet) -> None:
    few = first(eval_set, 10)
    backbone = tiny_model(CONFIG_MAPPING["llama"](), depth=3)
    model = Recommender(backbone, torch.randn(41, 6), (3, 1), suffix=(4, 5)).double().eval()
    with torch.no_grad():
        found = taylor_importance(model, few, device=CPU)
        assert not torch.is_grad_enabled()
    np.testing.assert_allclose(found, by_autograd(model, few), rtol=1e-6)


def test_no_questions(teacher: Recommender, eval_set: EvalSet) -> None:
    none = replace(eval_set, users=eval_set.users[:0], histories=[], targets=eval_set.targets[:0])
    with pytest.raises(ValueError, match="no users"):
        taylor_importance(teacher, none, device=CPU)


def test_an_unused_weight_does_not_matter(teacher: Recommender, eval_set: EvalSet) -> None:
    few = first(eval_set, 20)
    expected = taylor_importance(teacher, few, device=CPU)
    spare = nn.Parameter(torch.ones(3, dtype=torch.float64))
    find_blocks(teacher.backbone)[2].register_parameter("spare", spare)
    np.testing.assert_array_equal(taylor_importance(teacher, few, device=CPU), expected)
