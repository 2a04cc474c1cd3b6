"""The checks of an architecture: each compares a tiny model with an oracle, and says what it found.

A check takes the model and token ids, (2, TOKENS), returns one line, and raises if the comparison
fails or the architecture refuses. Adding one is a function and an entry in the table at the end.
"""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from depthprobe.models.backbones import backbone_config
from depthprobe.models.blocks import find_blocks, find_decoder, no_token, per_layer
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.parts import Branch, find_sublayers
from depthprobe.models.prompt import CACHE_NAMES
from depthprobe.models.recommender import Recommender
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.taps import first_tensor, input_state, tap_blocks
from depthprobe.models.tiny import DEPTH, TOKENS, brings_code, tiny_model

PROMPT, ITEMS, D_ITEM = (5, 6, 7), 11, 4  # of the recommender that is tried

_auto: Any = AutoModelForCausalLM  # untyped in transformers


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


def causal(model: PreTrainedModel, ids: Tensor) -> str:
    """What comes later changes nothing before it."""
    start = TOKENS // 2
    other = ids.clone()
    other[:, start:] = ids[:, start:].flip(1) + 1
    before, after = _logits(model, ids), _logits(model, other)
    _assert_close(after[:, :start], before[:, :start], "changing later tokens: earlier ones are")
    if torch.equal(after[:, start:], before[:, start:]):
        raise AssertionError("the tokens change nothing")
    return "earlier positions do not see later ones"


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


def cut(model: PreTrainedModel, ids: Tensor) -> str:
    """The model cut to k blocks equals the early read-out after block k, bit for bit."""
    depth = len(find_blocks(model))
    cuts, note = _cuts(model, _prefixes(depth))
    with torch.no_grad(), tap_blocks(model) as tap:
        model(ids, use_cache=False)
        for kept, cut in cuts.items():
            expected = find_decoder(cut)(ids, use_cache=False)[0]
            if not torch.equal(after_blocks(model, tap.states[len(kept)]), expected):
                raise AssertionError(f"the model cut to {len(kept)} blocks differs from read-out")
    return f"{len(cuts)} depths equal the read-out bit for bit{note}"


def skip(model: PreTrainedModel, ids: Tensor) -> str:
    """A skipped block equals one that ran and was undone, and one that was cut out."""
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
        with _changed(find_blocks(model)[left_out], _undo):
            _assert_close(skipped, _logits(model, ids), f"skipping block {left_out}: it is")
        if kept in cuts and not torch.equal(skipped, _logits(cuts[kept], ids)):
            raise AssertionError(f"skipping block {left_out} differs from cutting it out")
    if not torch.equal(_logits(model, ids), whole):
        raise AssertionError("the model is not restored after skipping")
    return f"{depth} blocks equal undoing and cutting them{note}"


def parts(model: PreTrainedModel, ids: Tensor) -> str:
    """Attention or MLP skipped equals one that was silenced; both equal the skipped block."""
    blocks = find_blocks(model)
    sublayers = find_sublayers(model)
    kinds: dict[str, set[str]] = {"attention": set(), "mlp": set()}
    for index, (block, branches) in enumerate(zip(blocks, sublayers, strict=True)):
        for part, names in kinds.items():
            chosen = [branch for branch in branches if branch.mixes == (part == "attention")]
            if chosen:
                names.add(" + ".join(branch.path for branch in chosen))
                _one_part(model, block, index, part, chosen, ids)
    if all(_has_both(branches) for branches in sublayers):
        every = range(len(blocks))
        with skip_blocks(model, every, part="attention"), skip_blocks(model, every, part="mlp"):
            parts = _logits(model, ids)
        with skip_blocks(model, every):
            _assert_close(parts, _logits(model, ids), "skipping all parts: the blocks are")
    return "; ".join(f"{part}: {' or '.join(sorted(n)) or 'none'}" for part, n in kinds.items())


def _has_both(branches: list[Branch]) -> bool:
    return {branch.mixes for branch in branches} == {True, False}


def _one_part(
    model: PreTrainedModel,
    block: nn.Module,
    index: int,
    part: Any,
    chosen: list[Branch],
    ids: Tensor,
) -> None:
    with skip_blocks(model, {index}, part=part):
        skipped = _logits(model, ids)
    with _changed(block.get_submodule(chosen[0].path), _silence):
        if len(chosen) == 1:
            _assert_close(skipped, _logits(model, ids), f"skipping {part} of block {index}: it is")
    if torch.equal(skipped, _logits(model, ids)):
        raise AssertionError(f"skipping {part} of block {index} changes nothing")


@contextmanager
def _changed(module: nn.Module, change: Callable[..., Any]) -> Iterator[None]:
    """The module runs, and its output is changed: an oracle for skipping it."""
    handle = module.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _undo(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    state = input_state(args, kwargs)
    return (state, *output[1:]) if isinstance(output, tuple | list) else state


def _silence(_: nn.Module, __: Any, ___: Any, output: Any) -> Any:
    zero = torch.zeros_like(first_tensor(output))
    return (zero, *output[1:]) if isinstance(output, tuple | list) else zero


def reload(model: PreTrainedModel, ids: Tensor) -> str:
    """Stock transformers reads a cut model back without a missing or unexpected key."""
    depth = len(find_blocks(model))
    choices = [
        tuple(range(max(1, depth // 2))),
        tuple(range(0, depth, 2)),
        tuple(range(1, depth)),
        tuple(range(depth - 1)),
    ]
    cuts, note = _cuts(model, iter(dict.fromkeys(kept for kept in choices if kept)))
    for kept, cut in cuts.items():
        with tempfile.TemporaryDirectory() as folder, _without_bars():
            cut.save_pretrained(folder)
            loaded, info = _auto.from_pretrained(
                folder,
                dtype=model.dtype,
                experts_implementation="eager",
                trust_remote_code=brings_code(cut.config),
                output_loading_info=True,
            )
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[what]:
                    raise AssertionError(
                        f"{what} {sorted(info[what])[:3]} with blocks {list(kept)}"
                    )
            _assert_close(_logits(loaded.eval(), ids), _logits(cut, ids), f"reloaded {list(kept)}:")
    return f"{len(cuts)} cuts, no missing or unexpected keys{note}"


@contextmanager
def _without_bars() -> Iterator[None]:
    """Saving and loading some kilobytes needs no progress bar."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def cache(model: PreTrainedModel, ids: Tensor) -> str:
    """Single steps after a cached beginning equal one pass without a cache."""
    depth = len(find_blocks(model))
    cuts, note = _cuts(model, iter([tuple(range(depth)), tuple(range(1, depth))]))
    start = TOKENS // 2
    positions = torch.arange(TOKENS)[None]
    takes = "position_ids" in inspect.signature(model.forward).parameters

    def at(places: slice) -> dict[str, Tensor]:
        # as generate does: some families count from zero at each step if nobody tells them
        given = {"position_ids": positions[:, places].expand(len(ids), -1)} if takes else {}
        return {"input_ids": ids[:, places]} | given

    for kept, variant in cuts.items():
        with torch.no_grad():
            expected = variant(**at(slice(None)), use_cache=False).logits[:, start:]
            first = variant(**at(slice(start)), use_cache=True)
            name = next((name for name in CACHE_NAMES if name in first), None)
            if name is None:
                return "has no cache: every step is a whole pass"
            rest = [
                variant(**at(slice(t, t + 1)), **{name: first[name]}, use_cache=True).logits
                for t in range(start, TOKENS)
            ]
        which = "uncut" if len(kept) == depth else f"cut to blocks {list(kept)}"
        _assert_close(torch.cat(rest, dim=1), expected, f"{which}, step by step:")
    return f"{len(cuts)} models, step by step equal to one pass{note}"


def recommender(model: PreTrainedModel, ids: Tensor) -> str:
    """A recommender whose prompt is shared equals one whose prompt is part of every row."""
    depth = len(find_blocks(model))
    cuts, note = _cuts(model, iter([tuple(range(depth)), tuple(range(1, depth))]))
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(ITEMS + 1, D_ITEM, generator=generator)
    histories = torch.randint(1, ITEMS + 1, ids.shape, generator=generator)
    for kept, variant in cuts.items():
        with torch.random.fork_rng(devices=[]):
            tried = Recommender(variant, items, PROMPT).to(model.dtype).eval()
        tokens = tried.token_embeddings(tried.prompt).expand(len(ids), -1, -1)
        whole = torch.cat([tokens, tried.input_adapter(tried.items(histories))], dim=1)
        with torch.no_grad():
            positions = tried.first + torch.arange(whole.shape[1])[None]
            filler = torch.full_like(histories, no_token(tried.backbone))
            beside = torch.cat([tried.prompt.expand(len(ids), -1), filler], dim=1)
            every = tried.backbone(
                inputs_embeds=whole,
                position_ids=positions,
                use_cache=False,
                **per_layer(tried.backbone, beside),
            )[0]
            found = tried.states(histories)[:, tried.lead :]
        what = "uncut" if len(kept) == depth else f"cut to blocks {list(kept)}"
        _assert_close(found, every[:, len(PROMPT) :], f"{what}, its prompt shared:")
    return f"runs; its prompt is computed once a {'user' if tried.lead else 'batch'}{note}"


def _assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    # Relative to the logits' spread: some norms and recurrences run in float32 whatever the dtype.
    error = (found - expected).abs().max() / expected.std()
    if not error <= 1e-3:
        raise AssertionError(f"{what} off by {error:.1e} of the spread")


PROOFS: dict[str, Callable[[PreTrainedModel, Tensor], str]] = {
    "causal": causal,
    "cut": cut,
    "skip": skip,
    "parts": parts,
    "reload": reload,
    "cache": cache,
    "recommender": recommender,
}


# Self-test of an architecture: can its blocks be cut, skipped, saved and cached without error?

# Without these a shallower model can't be trusted; the others tell what else the family can do.
REQUIRED = frozenset({"blocks", "tiny copy", "causal", "cut", "skip", "reload", "cache"})

_auto_model: Any = AutoModelForCausalLM  # untyped in transformers


@dataclass(frozen=True)
class CheckResult:
    """One line of the self-test."""

    name: str
    passed: bool
    detail: str

    @property
    def required(self) -> bool:
        """Whether a cut model can't be trusted without it."""
        return self.name in REQUIRED


def check_backbone(
    source: str | os.PathLike[str] | PreTrainedConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    depth: int = DEPTH,
) -> list[CheckResult]:
    """Test in seconds, without its weights, whether an architecture can be cut safely.

    The blocks of the real configuration are found on the meta device, which holds no numbers. The
    rest runs on a tiny random copy (float64, the same kinds of blocks in the same order): see
    :mod:`depthprobe.models.check`.

    Args:
        source: as for :func:`load_backbone`, or a configuration.
        revision: of a hub id.
        trust_remote_code: run Python code from the hub; only with a ``revision``.
        depth: blocks of the tiny copy at most.

    Raises:
        BadInput: if there is no such backbone.
    """
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        config = backbone_config(source, revision=revision, trust_remote_code=trust_remote_code)
    results = [_run("blocks", lambda: _blocks(config))]
    built: list[PreTrainedModel] = []
    if results[0].passed:
        results.append(_run("tiny copy", lambda: _copy(config, depth, built)))
    if not built:
        return results
    model = built[0]
    ids = torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)
    return results + [_run(name, lambda c=check: c(model, ids)) for name, check in PROOFS.items()]  # type: ignore[misc]


def can_be_cut(results: list[CheckResult]) -> bool:
    """Whether everything that a cut needs passed."""
    return REQUIRED.issubset(result.name for result in results if result.passed)


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
        model = _auto_model.from_config(
            copy.deepcopy(config), trust_remote_code=brings_code(config)
        )
    blocks = find_blocks(model)
    kinds = sorted({type(block).__name__ for block in blocks})
    return f"{len(blocks)} blocks ({', '.join(kinds)}) in {type(model).__name__}"


def _copy(config: PreTrainedConfig, depth: int, built: list[PreTrainedModel]) -> str:
    model = tiny_model(config, depth=depth)
    built.append(model)
    return f"{len(find_blocks(model))} blocks, {model.num_parameters():,} parameters"
