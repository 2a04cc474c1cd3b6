"""The shared prompt and right padding against the padded reference, and what is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthprobe.models.backbones import embedded_tokenizer
from depthprobe.models.build import (
    learned_table,
    load_trained,
    make_trainable,
    merge_lora,
    prompt_tokens,
    save_trained,
)
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.study import Backbone

PROMPT = (3, 1, 4, 1, 5)
HISTORIES = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
LENGTHS = torch.tensor([4, 2, 1])
SHARING = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "phi", "gemma2", "stablelm", "olmo2")


def build(backbone: PreTrainedModel, prompt: tuple[int, ...] = PROMPT) -> Recommender:
    torch.manual_seed(0)
    return Recommender(backbone, torch.randn(9, 6), prompt).double().eval()


def reference(model: Recommender, history: list[int]) -> Tensor:
    """One user alone, prompt and items in one sequence, no cache, no padding: (d_item,)."""
    tokens = model.backbone.get_input_embeddings()(model.prompt)
    items = model.input_adapter(model.items(torch.tensor(history)))
    whole = torch.cat([tokens, items])[None]
    out = model.backbone(inputs_embeds=whole, use_cache=False).last_hidden_state
    return model.output_adapter(out[0, -1])


@pytest.mark.parametrize("name", SHARING)
def test_shared_prompt_equals_every_slot_of_every_user(
    name: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = build(make_model(name))
    vectors = model.encode(HISTORIES, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        expected = reference(model, HISTORIES[row, :length].tolist())
        loose = 1e-6 if name == "gemma2" else 1e-10  # its attention caps scores in float32
        torch.testing.assert_close(vectors[row], expected, rtol=loose, atol=loose)


def test_gradients_equal_the_reference(make_model: Callable[..., PreTrainedModel]) -> None:
    # its norms run in float64; Llama's are float32 by design
    ours, theirs = build(make_model("gpt_neox")), build(make_model("gpt_neox"))
    ours.encode(HISTORIES, LENGTHS).square().sum().backward()
    for row, length in enumerate(LENGTHS.tolist()):
        reference(theirs, HISTORIES[row, :length].tolist()).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10)


def test_no_prompt(make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama"), prompt=())
    assert model.prepare_prompt() is None
    items = model.input_adapter(model.items(HISTORIES[:1]))
    out = model.backbone(inputs_embeds=items, use_cache=False).last_hidden_state
    expected = model.output_adapter(out[0, -1])
    torch.testing.assert_close(model.encode(HISTORIES, LENGTHS)[0], expected)


def test_prepared_prompt_can_be_used_again(make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama"))
    with torch.no_grad():
        prompt = model.prepare_prompt()
        first = model.encode(HISTORIES, LENGTHS, prompt)
        again = model.encode(HISTORIES, LENGTHS, prompt)
    assert torch.equal(first, again)


def test_tap_sees_the_items_and_not_the_prompt(make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama"))
    with torch.no_grad(), tap_blocks(model.backbone) as tap:
        model(HISTORIES)
    assert {state.shape for state in tap.states} == {(3, 4, 32)}


def test_adapted_items_are_as_large_as_tokens(make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama"))
    adapted = model.input_adapter(model.items.weight[1:])
    tokens = model.backbone.get_input_embeddings().weight
    torch.testing.assert_close(adapted.std(), tokens.std(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tuning", ["full", "lora", "frozen"])
def test_what_is_trained(tuning: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama")).float()
    make_trainable(model, Backbone(tuning=tuning))  # type: ignore[arg-type]
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {n for n in names if n.startswith(("input_adapter", "output_adapter"))}
    inside = names - adapters
    assert len(adapters) == 4
    assert not any(part in name for name in names for part in ("embed_tokens", "items."))
    if tuning == "frozen":
        assert not inside
    elif tuning == "lora":
        assert inside
        assert all("lora_" in name and ".mlp." in name for name in inside)
    else:
        assert any("self_attn" in name for name in inside)


def test_trained_weights_survive_the_disk(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    for tuning in ("full", "lora"):
        settings = Backbone(tuning=tuning)  # type: ignore[arg-type]
        model, other = build(make_model("llama")).float(), build(make_model("llama")).float()
        for each in (model, other):
            make_trainable(each, settings)
            each.eval()  # the adapters that LoRA adds have a dropout of their own
        with torch.no_grad():
            for weight in model.parameters():
                if weight.requires_grad:
                    weight.add_(torch.randn_like(weight) * 0.1)
        assert not torch.allclose(model(HISTORIES), other(HISTORIES))
        save_trained(model, tmp_path / tuning)
        load_trained(other, tmp_path / tuning)
        assert torch.equal(model(HISTORIES), other(HISTORIES))
        with pytest.raises(ValueError, match="does not fit"):
            load_trained(build(make_model("gpt2")), tmp_path / tuning)


def test_merged_lora_is_a_plain_model(make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama"))
    keys = set(model.backbone.state_dict())
    make_trainable(model, Backbone(tuning="lora"))
    model.double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
        before = model(HISTORIES)
        merge_lora(model)
        torch.testing.assert_close(model(HISTORIES), before, rtol=1e-9, atol=1e-10)
    assert set(model.backbone.state_dict()) == keys


def test_prompt_begins_once_with_the_start_token() -> None:
    settings = Backbone(source="embedded", prompt="Next:")
    ids = prompt_tokens(settings)
    assert ids[0] == embedded_tokenizer().bos_token_id
    assert len(ids) == 1 + len(b"Next:")
    assert prompt_tokens(Backbone(source="embedded", prompt="")) == []


def test_a_linear_head_scores_every_item(make_model: Callable[..., PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = Recommender(make_model("llama"), torch.randn(9, 6), PROMPT, head="linear").double()
    assert model.output_adapter is None
    scores = model.eval().encode(HISTORIES, LENGTHS) @ model.item_matrix().T
    tokens = model.backbone.get_input_embeddings()(model.prompt)
    whole = torch.cat([tokens, model.input_adapter(model.items(HISTORIES[0]))])[None]
    state = model.backbone(inputs_embeds=whole, use_cache=False).last_hidden_state[0, -1]
    assert model.head is not None
    torch.testing.assert_close(scores[0], model.head(state))
    assert scores.shape == (3, 9)


def test_suffix_follows_the_last_item(make_model: Callable[..., PreTrainedModel]) -> None:
    torch.manual_seed(0)
    model = Recommender(make_model("llama"), torch.randn(9, 6), PROMPT, suffix=(2, 7, 1)).double()
    vectors = model.eval().encode(HISTORIES, LENGTHS)
    assert torch.equal(model(HISTORIES, LENGTHS), vectors)
    table = model.backbone.get_input_embeddings()
    for row, length in enumerate(LENGTHS.tolist()):
        items = model.input_adapter(model.items(HISTORIES[row, :length]))
        whole = torch.cat([table(model.prompt), items, table(model.suffix)])[None]
        state = model.backbone(inputs_embeds=whole, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(vectors[row], model.output_adapter(state))


def test_a_learned_table_is_seeded_and_of_unit_length() -> None:
    table, again = learned_table(50, 16, seed=3), learned_table(50, 16, seed=3)
    assert torch.equal(table, again)
    assert not torch.equal(table, learned_table(50, 16, seed=4))
    assert not table[0].any()
    assert table[1:].norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
