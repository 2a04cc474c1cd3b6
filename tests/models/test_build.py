"""Recommenders from settings: parts where the backbone is, the same parts for the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig

from depthprobe.errors import BadInput
from depthprobe.models.backbones import pretrained, pretrained_config
from depthprobe.models.build import (
    WEIGHTS,
    around,
    build_recommender,
    check_lengths,
    load_trained,
    prompt_and_suffix,
    save_trained,
)
from depthprobe.models.embedded import embedded_backbone, embedded_tokenizer
from depthprobe.models.families import family_config
from depthprobe.models.tiny import ends_at_positions, tiny_model
from depthprobe.study import Backbone


def test_the_parts_are_where_the_backbone_is():
    """A quantised backbone is on a GPU before its recommender is made; the meta device is here."""
    backbone = embedded_backbone().to("meta")
    settings = Backbone(prompt="", tuning="frozen")
    model = around(backbone, settings, torch.randn(5, 3), seed=0)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    assert torch.empty(1).device.type == "cpu"


def test_a_seed_decides_the_adapters_and_a_random_backbone_alone():
    items = torch.randn(5, 3)
    first, again = (build_recommender(Backbone(), items, kept=(0, 3), seed=1) for _ in range(2))
    other = build_recommender(Backbone(), items, kept=(0, 3), seed=2)
    control = build_recommender(Backbone(), items, kept=(0, 3), seed=1, random_init=True)
    assert first.depth == 2
    weights = [model.input_adapter.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    inside = [m.backbone.layers[1].mlp.up_proj.weight for m in (first, other, control)]
    assert torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], inside[2])


def nothing(file: Path) -> None:
    file.unlink()


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:20])


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        weights = load_file(file)
        change(weights)
        save_file(weights, file)

    return edit


DAMAGE = {
    "gone": nothing,
    "cut short": half,
    "noise": lambda file: file.write_bytes(bytes(range(256)) * 20),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "NaN": rewrite(lambda weights: weights["weight"].fill_(torch.nan)),
    "infinity": rewrite(lambda weights: weights["bias"].fill_(torch.inf)),
    # a copy that does not look would broadcast it
    "another shape": rewrite(lambda weights: weights.update(bias=torch.ones(1))),
    "missing": rewrite(lambda weights: weights.pop("bias")),
    "unexpected": rewrite(lambda weights: weights.update(more=torch.ones(1))),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_weights_that_were_damaged_are_named(tmp_path: Path, case: str) -> None:
    model = torch.nn.Linear(2, 2)
    save_trained(model, tmp_path)
    load_trained(model, tmp_path)
    DAMAGE[case](tmp_path / WEIGHTS)
    with pytest.raises(BadInput, match=f"{WEIGHTS}.*delete its trial") as caught:
        load_trained(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert torch.isfinite(model.weight).all()


# --- texts: tokens without an embedding, more of them than positions ---


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Backbones of 16 that it has with the embedded tokenizer: of a table, and of any number."""
    folders = {}
    for family in ("gpt2", "llama"):
        config = family_config(family, max_position_embeddings=16, vocab_size=259)
        folder = tmp_path_factory.mktemp(family)
        tiny_model(config, depth=2).float().save_pretrained(folder)
        embedded_tokenizer().save_pretrained(folder)
        folders[family] = str(folder)
    return folders


@pytest.mark.parametrize("template", ["$A </s>", "<s> $A </s>", "$A <pad>", "<s> $A", "$A"])
def test_a_prompt_does_not_end_the_text(tmp_path: Path, template: str) -> None:
    tokenizer = embedded_tokenizer()
    pieces = [("<pad>", 0), ("<s>", 1), ("</s>", 2)]
    put: Any = TemplateProcessing(single=template, special_tokens=pieces)
    tokenizer.backend_tokenizer.post_processor = put
    tokenizer.save_pretrained(tmp_path)
    letters = [ord("a") - 33 + 3, ord("b") - 33 + 3]  # behind the special tokens
    assert prompt_and_suffix(Backbone(source=str(tmp_path), prompt="ab"))[0] == [1, *letters]
    own = prompt_and_suffix(Backbone(source=str(tmp_path), prompt="ab</s>"))[0]
    assert own == [1, *letters, 2]  # somebody wants it there


@pytest.mark.parametrize("field", ["prompt", "suffix"])
def test_a_token_without_an_embedding_is_refused(short: dict[str, str], field: str) -> None:
    texts = {"prompt": "", "suffix": ""} | {field: "\u00e9"}
    settings = Backbone(source=short["llama"], **texts)
    for whole in (True, False):
        with pytest.raises(BadInput, match=f"{field}: .*128 tokens that the backbone has"):
            prompt_and_suffix(settings, pretrained(settings, weights=whole))


def test_texts_and_items_need_positions(short: dict[str, str], caplog: Any) -> None:
    for family, source in short.items():
        settings = Backbone(source=source, prompt="1234567890", suffix="12")
        config = pretrained_config(settings)
        assert check_lengths(settings, config, 3) == []  # 16 in all, with the start token
        if family == "gpt2":
            with pytest.raises(BadInput, match="16 positions that it has.*data.max_history = 3"):
                check_lengths(settings, config, 4)
        else:
            (warning,) = check_lengths(settings, config, 4)
            assert "16 positions of the backbone" in warning
            assert warning in caplog.text
    settings = Backbone(source=short["gpt2"], prompt="1234567890" * 2)
    with pytest.raises(BadInput, match="a shorter prompt or suffix$"):
        check_lengths(settings, pretrained_config(settings), 1)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize(
    ("rope", "positions"),
    [({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}, 16), (LONGROPE, 64)],
)
def test_a_user_does_not_depend_on_the_others_of_a_batch(
    llama_config: Callable[..., LlamaConfig], tmp_path: Path, rope: dict[str, Any], positions: int
) -> None:
    config = llama_config(
        hidden_size=16,
        num_attention_heads=2,
        vocab_size=259,
        rope_parameters=rope,
        max_position_embeddings=positions,
    )
    config.save_pretrained(tmp_path)
    embedded_tokenizer().save_pretrained(tmp_path)
    settings = Backbone(source=str(tmp_path), prompt="123456789")  # 10 with the start token
    assert check_lengths(settings, config, 6) == []
    with pytest.raises(BadInput, match="16 positions .* same for all users: .*max_history = 6"):
        check_lengths(settings, config, 7)
    # why: the shorter of two users, alone and beside one of 6 or 7 items
    items = torch.randn(10, 3)
    model = build_recommender(settings, items, kept=None, seed=0, random_init=True).eval()
    for longest, same in ((6, True), (7, False)):
        pair = torch.ones(2, longest, dtype=torch.long)
        pair[0, 2:] = 0
        with torch.no_grad():
            alone = model.encode(pair[:1, :2], torch.tensor([2]))
            beside = model.encode(pair, torch.tensor([2, longest]))[:1]
        assert torch.allclose(alone, beside, rtol=0, atol=1e-6) is same


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("gpt2", True), ("opt", True), ("gptj", True), ("llama", False), ("falcon", False)],
)
def test_which_families_end_at_their_positions(kind: str, ends: bool) -> None:
    assert ends_at_positions(family_config(kind)) is ends
