"""What is timed computes what it says: shared weights, real gradients, the best items."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from depthprobe.cost import actions
from depthprobe.cost.actions import (
    answering,
    encoding,
    random_backbone,
    recommender,
    shared_copy,
    stepping,
)
from depthprobe.cost.workload import Workload
from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks

CPU = torch.device("cpu")
WORKLOAD = Workload(length=5, items=20, width=4, prompt=2)


@pytest.fixture
def config(llama_config: Callable[..., LlamaConfig]) -> LlamaConfig:
    return llama_config()


def test_a_copy_shares_weights_and_is_cut_alone(config: LlamaConfig) -> None:
    backbone = random_backbone(config, WORKLOAD, CPU)
    copy = keep_blocks(shared_copy(backbone), range(2))
    assert (len(find_blocks(copy)), len(find_blocks(backbone))) == (2, 4)
    assert config.num_hidden_layers == backbone.config.num_hidden_layers == 4
    own = {id(p) for p in backbone.parameters()}
    assert all(id(p) in own for p in copy.parameters())
    out = copy(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits
    keep_blocks(backbone, range(2))
    assert torch.equal(out, backbone(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False).logits)


def test_making_a_backbone_leaves_the_random_state(config: LlamaConfig) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (random_backbone(config, WORKLOAD, CPU) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_gradient_is_that_of_the_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actions, "CHUNK", 3 * 4 * 9)  # three positions at a time
    vectors = torch.randn(10, 4, requires_grad=True)
    items, targets = torch.randn(9, 4), torch.randint(1, 9, (10,))
    found = actions._gradient(vectors, items, targets)
    cross_entropy(vectors @ items.T, targets).backward()
    torch.testing.assert_close(found, vectors.grad)


def test_a_step_changes_what_is_trained_and_nothing_else(config: LlamaConfig) -> None:
    model = recommender(random_backbone(config, WORKLOAD, CPU), WORKLOAD).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    stepping(model, WORKLOAD, 3)()
    for name, weight in model.named_parameters():
        assert torch.equal(before[name], weight) != weight.requires_grad, name
        assert weight.grad is None


def test_depths_share_the_optimisers_moments(config: LlamaConfig) -> None:
    backbone = random_backbone(config, WORKLOAD, CPU)
    state: defaultdict[Any, Any] = defaultdict(dict)
    for depth in (4, 2):
        model = recommender(keep_blocks(shared_copy(backbone), range(depth)), WORKLOAD)
        stepping(model, WORKLOAD, 3, state=state)()
    block = find_blocks(backbone)
    assert state[block[0].mlp.up_proj.weight]["step"] == 2
    assert state[block[3].mlp.up_proj.weight]["step"] == 1


def test_an_answer_is_the_best_items_of_what_encodes(
    config: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actions, "CHUNK", 2 * 4 * 21)  # two users at a time
    model = recommender(random_backbone(config, WORKLOAD, CPU), WORKLOAD).eval()
    torch.manual_seed(0)
    vectors = encoding(model, WORKLOAD, 5)()
    torch.manual_seed(0)
    answer = answering(model, WORKLOAD, 5)()
    assert isinstance(vectors, torch.Tensor)
    expected = (vectors @ model.item_matrix().T).topk(10).indices
    assert torch.equal(torch.as_tensor(answer), expected)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch", 0),
        ("length", 0),
        ("items", 9),
        ("prompt", -1),
        ("dtype", "int8"),
        ("tuning", "none"),
        ("seconds", -1),
        ("seconds", float("inf")),
    ],
)
def test_a_workload_that_is_none(field: str, value: Any) -> None:
    with pytest.raises(BadInput, match=f"^{field}: "):
        Workload(**{field: value})
