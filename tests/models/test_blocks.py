"""Blocks found by structure in tiny models of many families."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BartConfig, BartForCausalLM
from transformers import LlamaForCausalLM as Llama

from depthprobe.models.blocks import find_blocks, find_decoder, input_device


def test_find_blocks_in_every_family(family, make_model):
    model = make_model(family)
    blocks = find_blocks(model)
    assert len(blocks) == 6
    assert find_blocks(model.base_model) is blocks
    used = []
    handles = [
        block.register_forward_hook(lambda *_, at=at: used.append(at))
        for at, block in enumerate(blocks)
    ]
    with torch.no_grad():
        model(torch.tensor([[3, 4]]), use_cache=False)
    assert used == list(range(6))
    assert len(handles) == 6


def test_the_decoder_is_what_the_head_reads(family, make_model, ids):
    model = make_model(family)
    decoder = find_decoder(model)
    assert find_decoder(decoder) is decoder
    assert find_blocks(decoder) is find_blocks(model)
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
        assert torch.equal(decoder(input_ids=ids, use_cache=False)[0], seen[0])


def test_seen_through_wrappers(make_model):
    model = make_model("llama")
    blocks = find_blocks(model)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert find_blocks(torch.compile(wrapped)) is blocks
    assert find_blocks(nn.DataParallel(model)) is blocks
    assert input_device(model) == torch.device("cpu")


def test_find_blocks_errors(llama_config):
    with pytest.raises(ValueError, match="Linear is not a Hugging Face"):
        find_blocks(nn.Linear(2, 2))
    bart = BartForCausalLM(
        BartConfig(d_model=16, decoder_layers=2, encoder_layers=3, decoder_attention_heads=2)
    )
    with pytest.raises(ValueError, match="BartForCausalLM"):
        find_blocks(bart)
    model = Llama(llama_config(num_hidden_layers=2))
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="no list of blocks.*num_hidden_layers=3"):
        find_blocks(model)
    model.config.num_hidden_layers = 2
    model.model.tables = nn.ModuleList([nn.Linear(2, 2), nn.Identity()])
    assert find_blocks(model) is model.model.layers  # bare projections are no blocks
    model.model.twin = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match="more than one"):
        find_blocks(model)
