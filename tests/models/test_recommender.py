"""What a recommender reads out, what of it is trained and saved, and the best of its scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.build import (
    learned_table,
    load_trained,
    make_trainable,
    merge_lora,
    prompt_and_suffix,
    save_trained,
)
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.families import family_config
from depthprobe.models.recommender import Recommender, best_columns
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone

PROMPT = (3, 1, 4, 1, 5)
HISTORIES = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
LENGTHS = torch.tensor([4, 2, 1])


def build(backbone: PreTrainedModel, prompt: tuple[int, ...] = PROMPT) -> Recommender:
    torch.manual_seed(0)
    return Recommender(backbone, torch.randn(9, 6), prompt).double().eval()


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


ATTENTION = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
MLP = {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("mlp",), MLP),
        (("attention",), ATTENTION),
        (("all",), ATTENTION | MLP),
        (("q_proj", "mlp.up_proj"), {"self_attn.q_proj", "mlp.up_proj"}),
        (("attention", "down_proj", "q_proj"), ATTENTION | {"mlp.down_proj"}),
    ],
)
def test_lora_trains_what_is_named(
    targets: tuple[str, ...], expected: set[str], make_model: Callable[..., PreTrainedModel]
) -> None:
    model = build(make_model("llama"))
    make_trainable(model, Backbone(tuning="lora", lora_targets=targets))
    trained = {n for n, p in model.backbone.named_parameters() if p.requires_grad}
    depth = model.backbone.config.num_hidden_layers
    assert trained == {
        f"layers.{block}.{path}.lora_{side}.default.weight"
        for block in range(depth)
        for path in expected
        for side in "AB"
    }


@pytest.mark.parametrize("target", ["c_attn", "proj", "0.mlp.up_proj", "layers", "q_proj."])
def test_lora_on_no_map_is_refused(target: str, make_model: Callable[..., PreTrainedModel]) -> None:
    model = build(make_model("llama"))
    with pytest.raises(BadInput, match=r"lora_targets: expected some of .*q_proj.*, got ") as told:
        make_trainable(model, Backbone(tuning="lora", lora_targets=("all", target)))
    assert told.value.value == target
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_trained_weights_survive_the_disk(
    make_model: Callable[..., PreTrainedModel], tmp_path: Path
) -> None:
    for tuning in ("full", "lora"):
        settings = Backbone(tuning=tuning, lora_targets=("mlp", "q_proj"))  # type: ignore[arg-type]
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


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("target", ["mlp", "attention", "all"])
def test_merged_lora_is_a_plain_model(
    name: str, target: str, make_model: Callable[..., PreTrainedModel]
) -> None:
    model = build(make_model(name))
    keys = set(model.backbone.state_dict())
    make_trainable(model, Backbone(tuning="lora", lora_targets=(target,)))
    model.double().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.1)
        before = model(HISTORIES)
        merge_lora(model)
        torch.testing.assert_close(model(HISTORIES), before, rtol=1e-9, atol=1e-10)
    assert set(model.backbone.state_dict()) == keys


@pytest.mark.parametrize(
    "kind", ["mamba", "mamba2", "falcon_h1", "jamba", "bamba", "qwen3_next", "deepseek_v3"]
)
def test_lora_acts_wherever_it_sits(kind: str) -> None:
    """PEFT knows these families: it refuses some maps, and of mixtures adapts others than asked."""
    settings = Backbone(tuning="lora", lora_rank=2, lora_targets=("all",))
    model = Recommender(tiny_model(family_config(kind), depth=2).float(), torch.randn(9, 6), PROMPT)
    plain = {name for name, part in model.named_modules() if isinstance(part, nn.Linear)}
    make_trainable(model, settings)
    model.eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    before = model(HISTORIES)
    before.square().sum().backward()
    adapters = {n: w.grad for n, w in model.named_parameters() if "lora_" in n}
    assert adapters
    assert {name.partition(".lora_")[0] for name in adapters} <= plain
    for name, gradient in adapters.items():
        assert gradient is not None, name
        assert gradient.abs().any(), name
    merge_lora(model)
    torch.testing.assert_close(model(HISTORIES), before, rtol=1e-4, atol=1e-5)
    assert not any(hasattr(part, "peft_config") for part in model.modules())


def test_prompt_begins_once_with_the_start_token() -> None:
    ids, after = prompt_and_suffix(Backbone(source="embedded", prompt="Next:", suffix=" is"))
    assert ids[0] == embedded_tokenizer().bos_token_id
    assert len(ids) == 1 + len(b"Next:")
    assert after == embedded_tokenizer()(" is")["input_ids"]
    assert prompt_and_suffix(Backbone(source="embedded", prompt="")) == ([], [])


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


def test_a_learned_table_is_seeded_and_of_unit_length() -> None:
    table, again = learned_table(50, 16, seed=3), learned_table(50, 16, seed=3)
    assert torch.equal(table, again)
    assert not torch.equal(table, learned_table(50, 16, seed=4))
    assert not table[0].any()
    assert table[1:].norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)


# The best columns of scores, against a stable sort of each row.

INF = float("inf")


def naive(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda column: -row[column])[:k]


@given(st.data())
def test_agrees_with_a_stable_sort(data: st.DataObject) -> None:
    n_rows, width = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 12))
    value = st.sampled_from([-INF, -1.0, -0.0, 0.0, 1.0, 2.0, INF])  # few values: many ties
    row = st.lists(value, min_size=width, max_size=width)
    scores = data.draw(st.lists(row, min_size=n_rows, max_size=n_rows))
    k = data.draw(st.integers(1, width))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    given_scores = torch.tensor(scores, dtype=dtype).view(n_rows, width)
    kept = given_scores.clone()
    columns, values = best_columns(given_scores, k)
    assert columns.dtype == torch.int64
    assert columns.tolist() == [naive(row, k) for row in scores]
    assert values.tolist() == [[row[c] for c in naive(row, k)] for row in scores]
    assert torch.equal(given_scores, kept)


@pytest.mark.parametrize("levels", [1, 3, 50, 10**6])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_wide_rows(levels: int, k: int) -> None:
    """Wide enough for other ways through ``topk``, with ties in all, some or none of the rows."""
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(levels, (23, 3001), generator=draw).double()
    columns, values = best_columns(scores, k)
    expected = scores.sort(dim=1, descending=True, stable=True)
    assert torch.equal(columns, expected.indices[:, :k])
    assert torch.equal(values, expected.values[:, :k])


def test_nan_is_above_all_as_for_topk() -> None:
    scores = torch.tensor([[1.0, torch.nan, 1.0, 1.0, 0.0]])
    assert best_columns(scores, 3)[0].tolist() == [[1, 0, 2]]
