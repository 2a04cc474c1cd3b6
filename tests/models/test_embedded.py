"""The embedded backbone and its tokenizer."""

from __future__ import annotations

import torch

from depthprobe.models.backbones import (
    load_backbone,
    load_tokenizer,
)
from depthprobe.models.blocks import find_blocks
from depthprobe.models.embedded import embedded_backbone, embedded_config, embedded_tokenizer


def test_embedded_is_deterministic_and_leaves_the_random_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second, other = embedded_backbone(), load_backbone("embedded"), embedded_backbone(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.training
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name
    weight = first.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weight, other.model.layers[0].mlp.up_proj.weight)
    assert len(find_blocks(first)) == embedded_config().num_hidden_layers == 12
    assert first.dtype == torch.float32


def test_embedded_tokenizer_round_trips_any_text():
    tokenizer = embedded_tokenizer()
    assert len(tokenizer) == embedded_config().vocab_size
    for text in ("Given the history: ", "  two  spaces\n\ttab", "naïve – 日本 🙂", "", "a</b>"):
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert len(ids) == len(text.encode())
        assert all(3 <= index < len(tokenizer) for index in ids)
    padded = load_tokenizer("embedded")(["ab", "abcd"], padding=True, return_tensors="pt")
    assert padded["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert padded["input_ids"][0, 2:].tolist() == [embedded_config().pad_token_id] * 2
