"""The embedded default: a small Llama and a byte-level tokenizer, made on the spot, no download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

EMBEDDED = "embedded"
BLOCKS, WIDTH, HEADS, INTERMEDIATE, POSITIONS = 12, 32, 2, 88, 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2


def embedded_config() -> LlamaConfig:
    """The configuration of the embedded backbone."""
    return LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def embedded_backbone(seed: int = 0) -> PreTrainedModel:
    """The embedded backbone, float32, in evaluation mode; the same seed gives the same weights."""
    make: Any = LlamaForCausalLM  # untyped in transformers
    return fresh(lambda: make(embedded_config()).float(), seed)


def fresh(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A model of random weights; the caller's random state is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs too
        model = make()
    model.eval()
    return model


def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte of UTF-8: any text round-trips. Adds no special tokens."""
    # The 256 printable stand-ins of the byte-level pre-tokenizer, in a fixed order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    pad, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
