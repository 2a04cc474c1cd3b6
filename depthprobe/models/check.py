"""Self-test of an architecture: can its blocks be cut, skipped, saved and cached without error?"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from depthprobe.models.backbones import backbone_config
from depthprobe.models.blocks import find_blocks, keep_blocks
from depthprobe.models.config_fields import cut_config
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.tap import tap_blocks

DEPTH = 8  # enough for one period of the usual patterns of block kinds
TOKENS = 9  # longer than the shrunk attention windows
# What a field may be at most in the tiny copy. Absent fields stay absent.
CONTENT = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "max_position_embeddings": 128,
    "sliding_window": 4,
    "attention_chunk_size": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "n_inner": 48,
    "n_group": 1,
    "topk_group": 1,
}
WIDTH = {
    "hidden_size": 32,
    "word_embed_proj_dim": 16,
    "num_attention_heads": 4,
    "head_dim": 8,
    "rotary_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
}
LARGEST = 50_000_000  # parameters of a copy whose width could not be shrunk

_auto: Any = AutoModelForCausalLM  # untyped in transformers


@dataclass(frozen=True)
class CheckResult:
    """One line of the self-test."""

    name: str
    passed: bool
    detail: str


def check_backbone(
    source: str | os.PathLike[str] | PreTrainedConfig, *, revision: str | None = None
) -> list[CheckResult]:
    """Test in seconds, without its weights, whether an architecture can be cut safely.

    Runs on a tiny random copy (float64, same kinds of blocks in the same order, at most 8): blocks
    are found; the model cut to k blocks equals the early read-out bit for bit; a skipped block
    equals one that ran and was undone, and one that was cut out; a cut model reloads with no
    missing or unexpected keys; single steps after a cached prefix, and many tokens at once (what a
    shared prompt needs), equal one pass without a cache.

    Args:
        source: as for :func:`load_backbone`, or a configuration.
        revision: of a hub id.

    Raises:
        BadInput: if there is no such backbone.
    """
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        config = backbone_config(source, revision=revision)
    results = [_run("blocks", lambda: _blocks(config))]
    built: list[PreTrainedModel] = []
    if results[0].passed:
        results.append(_run("tiny copy", lambda: _build(config, built)))
    if not built:
        return results
    model = built[0]
    ids = torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)
    checks: dict[str, Callable[[PreTrainedModel, Tensor], str]] = {
        "cut = read-out": _read_out,
        "skip = undo = cut": _skip,
        "save and reload": _reload,
        "cached steps": _cache,
        "cached prefix": _prefix,
    }
    for name, check in checks.items():
        results.append(_run(name, lambda check=check: check(model, ids)))  # type: ignore[misc]
    return results


def tiny_config(config: PreTrainedConfig, *, width: bool = True) -> PreTrainedConfig:
    """A copy with few, narrow blocks of the same kinds in the same order.

    Args:
        config: any decoder's.
        width: whether to shrink the hidden size and the heads too.
    """
    depth = config.get_text_config(decoder=True).num_hidden_layers
    tiny = cut_config(config, range(min(depth, DEPTH)))
    text = tiny.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    key_heads = getattr(text, "num_key_value_heads", None)
    for name, most in (CONTENT | (WIDTH if width else {})).items():
        value = getattr(text, name, None)
        if isinstance(value, list):
            setattr(text, name, [min(item, most) for item in value])
        elif isinstance(value, int) and not isinstance(value, bool) and not _computed(text, name):
            setattr(text, name, min(value, most))
    rotary = getattr(text, "qk_rope_head_dim", None)
    if width and rotary and hasattr(text, "head_dim") and not _computed(text, "head_dim"):
        text.head_dim = rotary  # multi-head latent attention: what the rotary table is made for
    if width and heads and key_heads and not _computed(text, "num_key_value_heads"):
        few = text.num_attention_heads
        text.num_key_value_heads = (
            few if key_heads == heads else (1 if key_heads == 1 else few // 2)
        )
    for name, value in (("pad_token_id", 0), ("bos_token_id", 1), ("eos_token_id", 2)):
        setattr(text, name, value)
    if isinstance(getattr(text, "rope_parameters", None), dict):
        text.rope_parameters = _plain_rope(text.rope_parameters)
    return tiny


def _computed(config: PreTrainedConfig, name: str) -> bool:
    found = getattr(type(config), name, None)
    return isinstance(found, property) and found.fset is None


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Without the per-frequency scaling tables, which belong to one head size."""
    kept = ("rope_theta", "partial_rotary_factor")
    if "rope_type" in rope or not any(isinstance(value, dict) for value in rope.values()):
        return {"rope_type": "default"} | {name: rope[name] for name in kept if name in rope}
    return {
        kind: _plain_rope(value) if isinstance(value, dict) else value
        for kind, value in rope.items()
    }


def _run(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except Exception as error:  # whatever an architecture does is a finding, not a crash
        lines = str(error).strip().splitlines()
        return CheckResult(name, False, lines[0] if lines else type(error).__name__)


def _blocks(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder: only decoders can be cut")
    with torch.device("meta"):
        model = _auto.from_config(copy.deepcopy(config))
    blocks = find_blocks(model)
    kinds = sorted({type(block).__name__ for block in blocks})
    return f"{len(blocks)} blocks ({', '.join(kinds)}) in {type(model).__name__}"


def _build(config: PreTrainedConfig, built: list[PreTrainedModel]) -> str:
    """The narrowest copy that can be built and run; appended to ``built``."""
    failure: Exception | None = None
    for width in (True, False):
        try:
            tiny = tiny_config(config, width=width)
            with torch.device("meta"):
                size = _auto.from_config(copy.deepcopy(tiny)).num_parameters()
            if size > LARGEST:
                raise ValueError(f"cannot be made small ({size:,} parameters): {failure}")
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                # The fused experts have no float64.
                model = _auto.from_config(
                    tiny, dtype=torch.float64, experts_implementation="eager"
                ).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    # Fresh weights are so small that a wrong mask would change almost nothing.
                    parameter.mul_(5 if parameter.dim() > 1 else 1)
                model(torch.ones(1, TOKENS, dtype=torch.long), use_cache=False)
        except Exception as error:
            failure = error
            continue
        built.append(model)
        return f"{len(find_blocks(model))} blocks, {size:,} parameters"
    raise ValueError(f"cannot be built small: {failure}")


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


def _cuts(
    model: PreTrainedModel, choices: Iterator[tuple[int, ...]]
) -> tuple[dict[tuple[int, ...], PreTrainedModel], str]:
    """The cut models, and why others were refused; raises if none is possible."""
    done: dict[tuple[int, ...], PreTrainedModel] = {}
    refused: list[str] = []
    for kept in choices:
        try:
            done[kept] = keep_blocks(copy.deepcopy(model), kept)
        except ValueError as error:
            refused.append(str(error))
    if not done:
        raise ValueError(refused[0] if refused else "no cut to try")
    note = f"; {len(refused)} other cuts refused, such as: {refused[0]}" if refused else ""
    return done, note


def _prefixes(depth: int) -> Iterator[tuple[int, ...]]:
    return (tuple(range(k)) for k in range(1, depth))


def _all_but_one(depth: int) -> Iterator[tuple[int, ...]]:
    return (tuple(i for i in range(depth) if i != left_out) for left_out in range(depth))


def _read_out(model: PreTrainedModel, ids: Tensor) -> str:
    depth = len(find_blocks(model))
    cuts, note = _cuts(model, _prefixes(depth))
    with torch.no_grad(), tap_blocks(model) as tap:
        model(ids, use_cache=False)
        for kept, cut in cuts.items():
            expected = cut.base_model(ids, use_cache=False)[0]
            if not torch.equal(after_blocks(model, tap.states[len(kept)]), expected):
                raise AssertionError(f"the model cut to {len(kept)} blocks differs from read-out")
    return f"{len(cuts)} depths, bit for bit{note}"


def _skip(model: PreTrainedModel, ids: Tensor) -> str:
    depth = len(find_blocks(model))
    whole = _logits(model, ids)
    cuts, note = _cuts(model, _all_but_one(depth))
    for left_out, kept in enumerate(_all_but_one(depth)):
        try:
            with skip_blocks(model, {left_out}):
                skipped = _logits(model, ids)
        except ValueError as error:
            note += f"; block {left_out} not skippable: {error}"
            continue
        with _undone(model, left_out):
            _assert_close(skipped, _logits(model, ids), f"skipping block {left_out}")
        if kept in cuts and not torch.equal(skipped, _logits(cuts[kept], ids)):
            raise AssertionError(f"skipping block {left_out} differs from cutting it out")
    if not torch.equal(_logits(model, ids), whole):
        raise AssertionError("the model is not restored after skipping")
    return f"{depth} blocks{note}"


@contextmanager
def _undone(model: PreTrainedModel, index: int) -> Iterator[None]:
    """The block runs, and its output is replaced by its input: an oracle for skipping."""

    def undo(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        return (state, *output[1:]) if isinstance(output, tuple) else state

    handle = find_blocks(model)[index].register_forward_hook(undo, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _reload(model: PreTrainedModel, ids: Tensor) -> str:
    depth = len(find_blocks(model))
    choices = [
        tuple(range(max(1, depth // 2))),
        tuple(range(0, depth, 2)),
        tuple(range(1, depth)),
        tuple(range(depth - 1)),
    ]
    cuts, note = _cuts(model, iter(dict.fromkeys(kept for kept in choices if kept)))
    for kept, cut in cuts.items():
        with tempfile.TemporaryDirectory() as folder:
            cut.save_pretrained(folder)
            loaded, info = _auto.from_pretrained(
                folder,
                dtype=torch.float64,
                experts_implementation="eager",
                output_loading_info=True,
            )
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[what]:
                    raise AssertionError(
                        f"{what} {sorted(info[what])[:3]} with blocks {list(kept)}"
                    )
            _assert_close(_logits(loaded.eval(), ids), _logits(cut, ids), f"reloaded {list(kept)}")
    return f"{len(cuts)} cuts, no missing or unexpected keys{note}"


def _cache(model: PreTrainedModel, ids: Tensor) -> str:
    return _continue(model, ids, 1)


def _prefix(model: PreTrainedModel, ids: Tensor) -> str:
    return _continue(model, ids, TOKENS)


def _continue(model: PreTrainedModel, ids: Tensor, tokens: int) -> str:
    """Continue after a cached prefix, ``tokens`` at once."""
    depth = len(find_blocks(model))
    cuts, note = _cuts(model, iter([tuple(range(depth)), tuple(range(1, depth))]))
    start = TOKENS // 2
    for kept, variant in cuts.items():
        with torch.no_grad():
            first = variant(ids[:, :start], use_cache=True)
            cache = getattr(first, "past_key_values", None)
            if cache is None:
                return "has no key-value cache"
            rest = [
                variant(part, past_key_values=cache, use_cache=True).logits
                for part in torch.split(ids[:, start:], tokens, dim=1)
            ]
        expected = _logits(variant, ids)[:, start:]
        _assert_close(torch.cat(rest, dim=1), expected, f"cached, blocks {list(kept)}")
    return f"{len(cuts)} models, cached equals uncached{note}"


def _assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    # Relative to the logits' spread: some norms and recurrences run in float32 whatever the dtype.
    error = (found - expected).abs().max() / expected.std()
    if not error <= 1e-3:
        raise AssertionError(f"{what}: off by {error:.1e} of the logits' spread")
