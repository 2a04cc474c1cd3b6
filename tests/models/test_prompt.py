"""A prompt computed once against one computed for every user: outputs, gradients, what is saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel, RobertaConfig

from depthprobe.models.blocks import find_blocks, find_decoder, no_token, per_layer
from depthprobe.models.build import make_trainable
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.families import family_config
from depthprobe.models.prompt import ExactAttention, checkpointed_blocks
from depthprobe.models.recommender import Recommender
from depthprobe.models.taps import tap_blocks
from depthprobe.models.tiny import tiny_model
from depthprobe.study import Backbone

LONG, SHORT = (3, 1, 4, 1, 5, 9, 2), (3, 1)  # windows of attention are 4 wide
SUFFIX = (2, 7, 1)
HISTORIES = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
LENGTHS = torch.tensor([4, 2, 1])
SLOTS = 6  # what the padded layout pads histories to
MAKE = Callable[..., PreTrainedModel]

# what these remember of a prompt is more than keys and values
REPEATING = ("gemma3n_text", "jamba", "lfm2", "mamba", "qwen3_next")
# parts of these run in float32 in a model of any dtype: queries and keys; the softmax; the router
FLOAT32 = {"codegen": 1e-7, "gptj": 1e-7, "gpt_neo": 1e-6, "gemma2": 1e-6}
FLOAT32 |= {"bloom": 1e-6, "mpt": 1e-6, "deepseek_v3": 1e-5, "llama4_text": 1e-6}
# attention sees everything before it, and positions are ids: padding in the middle changes nothing
PADDABLE = ("llama", "qwen3", "gpt_neox", "phi", "stablelm", "olmo2", "cohere", "gemma", "mixtral")
PADDABLE += ("gpt2", "opt", "biogpt", "gpt_bigcode", "bloom", "falcon", "starcoder2", "nemotron")


def build(backbone: PreTrainedModel, *, prompt: Any = LONG, suffix: Any = SUFFIX) -> Recommender:
    torch.manual_seed(0)
    model = Recommender(backbone, torch.randn(9, 6), prompt, suffix=suffix).double().eval()
    model.items.requires_grad_(True)
    return model


def ours(model: nn.Module, suffix: Any = SUFFIX) -> Tensor:
    """User vectors as training reads them out, (N, d): one a user, or one an item."""
    if suffix:
        last: Tensor = model(HISTORIES, LENGTHS)
        return last
    every: Tensor = model(HISTORIES)
    return every[torch.arange(HISTORIES.shape[1]) < LENGTHS[:, None]]


def alone(model: Recommender) -> Tensor:
    """The same of each user alone: prompt, items, suffix in one sequence; no cache, no padding."""
    table, found = model.token_embeddings, []
    for row, length in enumerate(LENGTHS.tolist()):
        items = model.input_adapter(model.items(HISTORIES[row, :length]))
        whole = torch.cat([table(model.prompt), items, table(model.suffix)])[None]
        fillers = torch.full((length,), no_token(model.backbone))
        told = per_layer(model.backbone, torch.cat([model.prompt, fillers, model.suffix])[None])
        states = model.backbone(inputs_embeds=whole, use_cache=False, **told).last_hidden_state[0]
        found.append(states[-1:] if len(model.suffix) else states[-length:])
    return model.read_out(torch.cat(found))


def padded(model: Recommender) -> Tensor:
    """The same in the layout of the papers: left-padded items between prompt and suffix."""
    left = torch.zeros(len(HISTORIES), SLOTS, dtype=torch.long)
    for row, length in enumerate(LENGTHS.tolist()):
        left[row, SLOTS - length :] = HISTORIES[row, :length]
    prompt, suffix = (
        model.token_embeddings(part).expand(len(left), -1, -1)
        for part in (model.prompt, model.suffix)
    )
    whole = torch.cat([prompt, model.input_adapter(model.items(left)), suffix], dim=1)
    seen = nn.functional.pad((left > 0).long(), (len(model.prompt), len(model.suffix)), value=1)
    states = model.backbone(
        inputs_embeds=whole,
        attention_mask=seen,
        position_ids=(seen.cumsum(dim=1) - 1).clamp(min=0),
        use_cache=False,
    ).last_hidden_state
    if len(model.suffix):
        return model.read_out(states[:, -1])
    return model.read_out(states[:, -SLOTS:][left > 0])


def gradients(model: nn.Module, vectors: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    vectors.double().square().sum().backward()
    return {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}


def assert_equal_training(
    model: Recommender, found: Tensor, expected: Tensor, *, outputs: float, grads: float = 1e-6
) -> None:
    torch.testing.assert_close(found, expected, rtol=outputs, atol=outputs)
    new, old = gradients(model, found), gradients(model, expected)
    assert new.keys() == old.keys()
    largest = max(float(grad.abs().max()) for grad in old.values())
    for name, grad in old.items():
        # relative to the weight's largest; a key's bias has none but what rounding leaves
        scale = max(float(grad.abs().max()), 1e-9 * largest)
        assert float((new[name] - grad).abs().max()) <= grads * scale, name


def compare(model: Recommender, suffix: Any, reference: Any, name: str) -> None:
    loose = FLOAT32.get(name)
    grads = 1e-6 if loose is None else max(1e-6, 10 * loose)
    found, expected = ours(model, suffix), reference(model)
    assert_equal_training(model, found, expected, outputs=loose or 1e-10, grads=grads)


@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["last", "every"])
def test_equals_each_user_alone(family: str, suffix: Any, make_model: MAKE) -> None:
    for prompt in (LONG, SHORT):
        model = build(make_model(family), prompt=prompt, suffix=suffix)
        assert model.prompt_mode == "shared"
        compare(model, suffix, alone, family)


@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["last", "every"])
@pytest.mark.parametrize("name", REPEATING)
def test_falls_back_to_a_prompt_in_every_row(name: str, suffix: Any, make_model: MAKE) -> None:
    model = build(make_model(name), suffix=suffix)
    assert model.prompt_mode == "repeated"
    assert model.prepare_prompt() is None
    compare(model, suffix, alone, name)


@pytest.mark.parametrize("error", [IndexError, KeyError, TypeError, ValueError, AttributeError])
def test_a_fault_of_the_backbone_is_no_reason_to_repeat_the_prompt(
    error: type[Exception], make_model: MAKE
) -> None:
    backbone = make_model("llama")

    def fails(*_: object, cache: object = None, **__: object) -> None:
        raise error("planted")

    backbone.model.layers[1].forward = fails
    with pytest.raises(error, match="planted"):
        build(backbone)


def test_why_a_prompt_is_repeated_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="depthprobe.models.prompt")
    model = build(tiny_model(family_config("xlstm"), depth=2))
    assert model.prompt_mode == "repeated"
    assert "repeated for every user: it wants a cache of its own" in caplog.text
    build(tiny_model(family_config("mamba"), depth=2))
    assert "LinearAttentionLayer" in caplog.text


@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["last", "every"])
@pytest.mark.parametrize("name", PADDABLE)
def test_equals_the_padded_layout(name: str, suffix: Any, make_model: MAKE) -> None:
    compare(build(make_model(name), suffix=suffix), suffix, padded, name)


def test_without_a_prompt(make_model: MAKE) -> None:
    model = build(make_model("llama"), prompt=())
    assert model.prompt_mode == "none"
    compare(model, SUFFIX, alone, "llama")


def test_positions_behind_the_paddings_row() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = RobertaConfig(**sizes, num_attention_heads=4, pad_token_id=1, is_decoder=True)
    torch.manual_seed(0)
    model = build(AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval())
    assert (model.first, model.prompt_mode) == (2, "shared")
    compare(model, SUFFIX, alone, "roberta")
    assert build(AutoModelForCausalLM.from_config(config).eval(), prompt=()).first == 2


@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["last", "every"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_lora_in_training(name: str, suffix: Any, make_model: MAKE) -> None:
    model = build(make_model(name), suffix=suffix)
    make_trainable(model, Backbone(tuning="lora", lora_rank=4))
    model.double().train()
    without_dropout(model)
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if "lora_" in weight_name:
                weight.normal_(std=0.3)
    compare(model, suffix, alone, name)
    trained = gradients(model, ours(model, suffix))
    assert sum("lora_" in name for name in trained) > 0
    assert not any("attn" in name for name in trained)


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_autocast(name: str, make_model: MAKE) -> None:
    model = build(make_model(name)).float()
    exact = ours(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = ours(model), alone(model)
    assert not torch.equal(found.float(), exact)  # it did run in bfloat16
    # 8 bits of mantissa, six random blocks deep: as far from the other as that is from float32
    for other in (expected, exact):
        assert (found.float() - other.float()).abs().max() < 0.2 * exact.abs().max()
    new, old = gradients(model, found), gradients(model, exact)
    flat, right = (torch.cat([g.flatten() for g in each.values()]) for each in (new, old))
    assert nn.functional.cosine_similarity(flat, right, dim=0) > 0.9


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_prepared_by_accelerate(checkpointing: bool, make_model: MAKE) -> None:
    model = build(make_model("qwen2")).train()
    expected = gradients(model, alone(model))
    model.checkpoint_blocks(checkpointing)
    accelerator = Accelerator(cpu=True)
    prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))
    model.zero_grad()
    accelerator.backward(ours(prepared).square().sum())
    for name, weight in model.named_parameters():
        if name in expected:
            scale = expected[name].abs().max()
            assert (weight.grad - expected[name]).abs().max() <= 1e-6 * scale + 1e-9, name


@pytest.mark.parametrize("name", ["llama", "gpt2", "lfm2"])
@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["last", "every"])
def test_no_slot_is_computed_twice_and_no_padding(name: str, suffix: Any, make_model: MAKE) -> None:
    model = build(make_model(name), suffix=suffix).train()
    seen = [0] * model.depth
    for index, block in enumerate(find_blocks(model.backbone)):

        def count(_: nn.Module, args: Any, kwargs: Any, index: int = index) -> None:
            seen[index] += (args[0] if args else kwargs["hidden_states"]).shape[:2].numel()

        block.register_forward_pre_hook(count, with_kwargs=True)
    bucket = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 1], [2, 2, 2]])  # four users, three items
    vectors = model(bucket, torch.full((4,), 3)) if suffix else model(bucket)
    vectors.square().sum().backward()
    own = bucket.numel() + len(bucket) * len(suffix)
    prompts = {"shared": 1, "repeated": len(bucket)}[model.prompt_mode]
    assert seen == [len(LONG) * prompts + own] * model.depth


@pytest.mark.parametrize("suffix", [SUFFIX, ()], ids=["last", "every"])
def test_checkpointing_changes_no_number(family: str, suffix: Any, make_model: MAKE) -> None:
    assert_checkpointing_changes_nothing(make_model(family), suffix)


@pytest.mark.parametrize("name", REPEATING)
def test_checkpointing_of_repeated_prompts(name: str, make_model: MAKE) -> None:
    assert_checkpointing_changes_nothing(make_model(name), SUFFIX)


def assert_checkpointing_changes_nothing(
    backbone: PreTrainedModel,
    suffix: Any,
    switch: Callable[[Recommender], None] = Recommender.checkpoint_blocks,
) -> None:
    # in training mode, with whatever dropout the family has
    model = build(backbone, suffix=suffix).train()
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        vectors = ours(model, suffix)
        runs.append((vectors.detach(), gradients(model, vectors)))
        switch(model)
    (plain, old), (again, new) = runs
    assert model.checkpointing
    assert torch.equal(plain, again)
    assert old.keys() == new.keys()
    for name, grad in old.items():
        torch.testing.assert_close(new[name], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "gemma3_text", "jamba"])
def test_the_librarys_checkpointing_is_replaced(
    name: str, reentrant: bool, make_model: MAKE
) -> None:
    # its layers drop the cache, and with it the prompt, in both of its kinds
    kind = {"use_reentrant": reentrant}

    def switch(model: Recommender) -> None:
        enable = "activation_checkpointing_enable"
        if not hasattr(model.backbone, enable):
            enable = "gradient_checkpointing_enable"  # an older name
        getattr(model.backbone, enable)(kind)

    assert_checkpointing_changes_nothing(make_model(name), SUFFIX, switch)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_repeats_itself(name: str, make_model: MAKE) -> None:
    backbone = make_model(name)
    for module in backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    model = build(backbone).train()
    torch.manual_seed(1)
    first = ours(model)
    assert not torch.equal(first, ours(model))  # there is dropout
    assert_checkpointing_changes_nothing(backbone, SUFFIX)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba"])
def test_checkpointing_keeps_little_and_runs_blocks_again(name: str, make_model: MAKE) -> None:
    model = build(make_model(name)).train()
    plain, runs = saved_by_a_step(model)
    model.checkpoint_blocks()
    small, again = saved_by_a_step(model)
    assert small < plain / 3
    passes = 2 if model.prompt_mode == "shared" else 1
    assert (runs, again) == (passes, 2 * passes)
    model.eval()  # it is for training alone
    assert saved_by_a_step(model)[1] == runs


def saved_by_a_step(model: Recommender) -> tuple[int, int]:
    """Bytes that the graph holds after a forward pass, and how often a block's inside has run."""
    held: dict[int, int] = {}
    kept: list[Tensor] = []  # as long as they live, no storage takes another's address
    weights = {weight.data_ptr() for weight in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept.append(tensor)
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    runs = []
    inside = next(
        part for part in find_blocks(model.backbone)[2].children() if len([*part.parameters()])
    )
    handle = inside.register_forward_hook(lambda *_: runs.append(1))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        vectors = ours(model)
    vectors.square().sum().backward()
    handle.remove()
    return sum(held.values()), len(runs)


def test_a_tap_sees_a_checkpointed_block_once(make_model: MAKE) -> None:
    model = build(make_model("llama")).train()
    with tap_blocks(model.backbone) as tap:
        ours(model)
        expected = tap.states
        model.checkpoint_blocks()
        found = ours(model)
        states = tap.states
        assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))
        (found.square().sum() + states[3].square().sum()).backward()
        assert tap.states[3] is states[3]  # the second run left the tap alone
    assert all(block.mlp.up_proj.weight.grad is not None for block in find_blocks(model.backbone))


def test_checkpointed_blocks_are_restored(make_model: MAKE) -> None:
    backbone = make_model("llama")
    blocks = find_blocks(backbone)

    def stop() -> None:
        with checkpointed_blocks(backbone):
            assert all("forward" in vars(block) for block in blocks)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stop()
    assert not any("forward" in vars(block) for block in blocks)


def without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


# Per-layer embeddings: a recommender of the tokens themselves against stock transformers.

PER_LAYER = ("gemma3n_text", "gemma4_text")
START, END = (3, 1, 4, 1, 5), (2, 7)
FEW, FEW_LENGTHS = torch.tensor([[1, 2, 3], [4, 0, 0]]), torch.tensor([3, 1])


def build_of_tokens(backbone: PreTrainedModel, **settings: Any) -> Recommender:
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
@pytest.mark.parametrize("suffix", [END, ()], ids=["suffix", "none"])
@pytest.mark.parametrize("prompt", [START, ()], ids=["prompt", "none"])
@pytest.mark.parametrize("name", PER_LAYER)
def test_equals_a_pass_over_token_ids(name: str, prompt: Any, suffix: Any) -> None:
    model = build_of_tokens(tiny_model(family_config(name), depth=6), prompt=prompt, suffix=suffix)
    found = model.encode(FEW, FEW_LENGTHS)
    expected = torch.stack([stock(model, int(items))[-1] for items in FEW_LENGTHS])
    torch.testing.assert_close(found, model.read_out(expected), rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", PER_LAYER)
def test_every_token_tells(name: str) -> None:
    """Other embeddings of one token: what is tested above is not lost in the noise."""
    model = build_of_tokens(tiny_model(family_config(name), depth=6), prompt=START, suffix=END)
    before = model.encode(FEW, FEW_LENGTHS)
    for token in (START[0], no_token(model.backbone), END[0]):
        model.backbone.embed_tokens_per_layer.weight[token] *= -1
        after = model.encode(FEW, FEW_LENGTHS)
        assert (after - before).abs().max() > 1e-5
        before = after


@torch.no_grad()
def test_cut() -> None:
    model = build_of_tokens(
        keep_blocks(tiny_model(family_config("gemma4_text"), depth=6), (4, 5)), prompt=()
    )
    found = model.encode(FEW, FEW_LENGTHS)
    expected = torch.stack([stock(model, int(items))[-1] for items in FEW_LENGTHS])
    torch.testing.assert_close(found, model.read_out(expected), rtol=0, atol=1e-6)


def test_other_decoders_are_told_nothing() -> None:
    decoder = find_decoder(tiny_model(family_config("llama"), depth=2))
    assert per_layer(decoder, torch.zeros(1, 1, dtype=torch.long)) == {}


def test_exact_attention_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 9, 16).bfloat16() for _ in range(3))
    attend = nn.functional.scaled_dot_product_attention
    exact = attend(query.float(), key.float(), value.float(), is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain = attend(query, key, value, is_causal=True)
        with ExactAttention():
            found = attend(query, key, value=value, is_causal=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    assert not torch.equal(plain, found)


def test_a_recommender_attends_in_float32_under_autocast(make_model: MAKE) -> None:
    model, seen = build(make_model("llama"), suffix=()).float(), []

    class Look(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is nn.functional.scaled_dot_product_attention:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    for half in (True, False):
        with Look(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            model(HISTORIES)
    assert len(seen) > 2
    assert set(seen) == {torch.float32}
