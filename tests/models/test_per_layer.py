"""Per-layer embeddings: a recommender of the tokens themselves against stock transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from depthprobe.models.blocks import find_decoder, no_token, per_layer
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import family_config
from depthprobe.models.recommender import Recommender
from depthprobe.models.tiny import tiny_model

PROMPT, SUFFIX = (3, 1, 4, 1, 5), (2, 7)
HISTORIES, LENGTHS = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])
FAMILIES = ("gemma3n_text", "gemma4_text")


def build(backbone: PreTrainedModel, **settings: Any) -> Recommender:
    """A recommender whose items are embedded as what stands for no token."""
    torch.manual_seed(0)
    model = Recommender(backbone, torch.randn(6, 4), **settings).double().eval()
    with torch.no_grad():
        for weight in model.backbone.parameters():
            weight.add_(0.1 * torch.randn_like(weight))  # some begin at zero and hide the rest
        model.input_adapter.weight.zero_()
        filler = torch.tensor(no_token(model.backbone))
        model.input_adapter.bias.copy_(model.token_embeddings(filler))
    return model


def stock(model: Recommender, items: int) -> torch.Tensor:
    """States of one user with so many items, by the token ids alone, (T, D)."""
    ids = [*model.prompt.tolist(), *[no_token(model.backbone)] * items, *model.suffix.tolist()]
    states: torch.Tensor = model.backbone(input_ids=torch.tensor([ids]), use_cache=False)[0][0]
    return states


@torch.no_grad()
@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["suffix", "none"])
@pytest.mark.parametrize("prompt", [PROMPT, ()], ids=["prompt", "none"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_a_pass_over_token_ids(name: str, prompt: Any, suffix: Any) -> None:
    model = build(tiny_model(family_config(name), depth=6), prompt=prompt, suffix=suffix)
    found = model.encode(HISTORIES, LENGTHS)
    expected = torch.stack([stock(model, int(items))[-1] for items in LENGTHS])
    torch.testing.assert_close(found, model.read_out(expected), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_tells(name: str) -> None:
    """Other embeddings of one token: what is tested above is not lost in the noise."""
    model = build(tiny_model(family_config(name), depth=6), prompt=PROMPT, suffix=SUFFIX)
    before = model.encode(HISTORIES, LENGTHS)
    for token in (PROMPT[0], no_token(model.backbone), SUFFIX[0]):
        model.backbone.embed_tokens_per_layer.weight[token] *= -1
        after = model.encode(HISTORIES, LENGTHS)
        assert (after - before).abs().max() > 1e-5
        before = after


@torch.no_grad()
def test_cut() -> None:
    model = build(keep_blocks(tiny_model(family_config("gemma4_text"), depth=6), (4, 5)), prompt=())
    found = model.encode(HISTORIES, LENGTHS)
    expected = torch.stack([stock(model, int(items))[-1] for items in LENGTHS])
    torch.testing.assert_close(found, model.read_out(expected), rtol=0, atol=1e-6)


def test_other_decoders_are_told_nothing() -> None:
    decoder = find_decoder(tiny_model(family_config("llama"), depth=2))
    assert per_layer(decoder, torch.zeros(1, 1, dtype=torch.long)) == {}
