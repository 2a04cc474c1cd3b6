"""Narrower blocks of tiny models: against models with the same units silenced, and from disk."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from depthprobe.errors import BadInput
from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import family_config
from depthprobe.models.narrowing import Width, narrow_blocks, plan_narrowing
from depthprobe.models.prompt import cache_argument
from depthprobe.models.tiny import tiny_model

# Eight families and more whose configuration can say fewer channels and heads.
NARROW = (
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "smollm3",
    "starcoder2", "cohere", "glm4", "olmo", "nemotron",
)  # fmt: skip
WIDE = {  # and the reason for some of the others
    "gpt2": "its configuration can't say fewer heads of the same size",
    "bloom": "its configuration does not say how wide the MLP of its blocks is",
    "olmo2": "a norm over all heads",
    "mixtral": "a mixture of experts",
    "jamba": "not every block has channels that its configuration says",
}
OFTEN = {"llama", "phi3", "gemma2", "gpt2", "olmo2"}


def params(names):
    return [pytest.param(n, marks=() if n in OFTEN else pytest.mark.slow) for n in names]


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


def random_scores(plan, blocks):
    generator = torch.Generator().manual_seed(3)
    return {kind: torch.rand(blocks, n, generator=generator) for kind, n in plan.units.items()}


def best_units(plan, scores, index):
    """Channels and heads that stay in a block, by a loop over sorted lists."""
    channel = scores["channels"][index].tolist()
    order = sorted(range(len(channel)), key=lambda c: -channel[c])
    before, after = plan.before, plan.after
    own = scores["heads"][index].tolist()
    groups = [list(range(g * before.alike, (g + 1) * before.alike)) for g in range(before.groups)]
    worth = [sum(own[h] for h in group) + own[before.heads + g] for g, group in enumerate(groups)]
    stay = sorted(range(before.groups), key=lambda g: -worth[g])[: after.groups]
    heads = [h for g in stay for h in sorted(groups[g], key=lambda h: -own[h])[: after.alike]]
    return sorted(order[: after.channels]), sorted(heads)


@torch.no_grad()
def silenced(model, plan, scores):
    """The full model; what its MLPs and attentions read of the units that go is zero."""
    masked = copy.deepcopy(model)
    size = plan.before.size
    for index, block in enumerate(find_blocks(masked)):
        channels, heads = best_units(plan, scores, index)
        columns = {
            "channels": channels,
            "heads": [h * size + d for h in heads for d in range(size)],
        }
        for kind, end in plan.ends(block):
            left = torch.zeros(end.in_features, dtype=torch.bool)
            left[columns[kind]] = True
            end.weight[:, ~left] = 0
    return masked


@pytest.mark.parametrize("name", params(NARROW))
def test_a_narrow_model_is_the_full_one_with_units_silenced(name, ids, tmp_path) -> None:
    model = tiny_model(family_config(name), depth=4)
    plan = plan_narrowing(model, 0.5)
    scores = random_scores(plan, 4)
    goal = logits(silenced(model, plan, scores), ids)
    assert not torch.allclose(goal, logits(model, ids))  # there was something to silence
    narrow = narrow_blocks(model, plan, scores)
    torch.testing.assert_close(logits(narrow, ids), goal, rtol=1e-10, atol=1e-10)
    text = narrow.config.get_text_config(decoder=True)
    assert (text.intermediate_size, text.num_attention_heads) == (24, 2)
    narrow.save_pretrained(tmp_path)
    again, said = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=narrow.dtype, output_loading_info=True
    )
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    torch.testing.assert_close(logits(again.eval(), ids), goal, rtol=1e-10, atol=1e-10)
    cached = {cache_argument(again): again(ids[:, :5], use_cache=True).past_key_values}
    step = again(ids[:, 5:], **cached, use_cache=True).logits
    torch.testing.assert_close(step, goal[:, 5:], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", params(WIDE))
def test_what_no_configuration_can_say_is_refused(name) -> None:
    model = tiny_model(family_config(name), depth=4)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(BadInput, match=WIDE[name]) as refused:
        plan_narrowing(model, 0.5)
    assert type(model).__name__ in str(refused.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_channels_and_heads_of_zeros_are_no_loss(make_model, ids) -> None:
    """Queries in groups: two of eight heads' groups, and a quarter of the channels, are zero."""
    model = tiny_model(family_config("llama", num_attention_heads=4, num_key_value_heads=2))
    plan = plan_narrowing(model, 0.5)
    assert plan.before == Width(48, 2, 2, 8)
    assert plan.after == Width(24, 1, 2, 8)
    scores = {kind: torch.ones(8, units) for kind, units in plan.units.items()}
    with torch.no_grad():
        for index, block in enumerate(find_blocks(model)):
            scores["channels"][index, index : index + 24] = 0
            block.mlp.down_proj.weight[:, index : index + 24] = 0
            gone = index % 2  # a group of two heads
            scores["heads"][index, [2 * gone, 2 * gone + 1, 4 + gone]] = 0
            block.self_attn.o_proj.weight[:, 16 * gone : 16 * gone + 16] = 0
    goal = logits(model, ids)
    narrow = narrow_blocks(model, plan, scores)
    assert narrow.config.num_key_value_heads == 1
    assert find_blocks(narrow)[0].self_attn.k_proj.weight.shape == (8, 32)
    torch.testing.assert_close(logits(narrow, ids), goal, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("width", "share", "left"),
    [
        (Width(1536, 3, 3, 64), 0.5, Width(768, 2, 2, 64)),  # SmolLM2: 4 of 9 heads
        (Width(100, 4, 1, 8), 0.5, Width(50, 2, 1, 8)),
        (Width(100, 1, 8, 8), 0.25, Width(25, 1, 2, 8)),  # one group: out of it
        (Width(100, 8, 4, 8), 0.5, Width(50, 4, 4, 8)),  # whole groups, not half of each
        (Width(100, 1, 1, 8), 0.01, Width(1, 1, 1, 8)),  # one stays
    ],
)
def test_a_share_of_a_width(width, share, left) -> None:
    assert width.narrower(share) == left


def test_a_group_counts_with_its_keys_and_values(ids) -> None:
    model = tiny_model(family_config("llama", num_attention_heads=4, num_key_value_heads=2))
    plan = plan_narrowing(model, 0.5)
    keys = [block.self_attn.k_proj.weight.detach().clone() for block in find_blocks(model)]
    scores = {kind: torch.ones(8, units) for kind, units in plan.units.items()}
    scores["heads"][:, 5] = 3  # the keys and values of the second group
    narrow_blocks(model, plan, scores)
    for block, key in zip(find_blocks(model), keys, strict=True):
        assert torch.equal(block.self_attn.k_proj.weight, key[8:])


def test_a_cut_model_can_be_narrowed_and_cut_again(make_model, ids) -> None:
    model, twin = make_model("qwen3"), make_model("qwen3")
    keep_blocks(model, [0, 2, 3])
    plan = plan_narrowing(model, 0.5)
    scores = random_scores(plan, 3)
    narrow_blocks(model, plan, scores)
    keep_blocks(model, [0, 2])
    keep_blocks(twin, [0, 3])
    two = {kind: each[[0, 2]] for kind, each in scores.items()}
    narrow_blocks(twin, plan_narrowing(twin, 0.5), two)
    assert torch.equal(logits(model, ids), logits(twin, ids))


def test_all_of_a_width_is_no_narrower_one(make_model) -> None:
    with pytest.raises(BadInput, match="width"):
        plan_narrowing(make_model("llama"), 0.999)
