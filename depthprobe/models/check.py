"""Self-test of an architecture: can its blocks be cut, skipped, saved and cached without error?

Each check compares a tiny random model with an oracle. It takes the model and token ids,
(2, TOKENS), returns one line, and raises if the comparison fails or the architecture refuses.
Adding one is a function and an entry in ``CHECKS``.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Cache, PreTrainedConfig, PreTrainedModel

from depthprobe.errors import BadInput
from depthprobe.models.backbones import backbone_config
from depthprobe.models.blocks import find_blocks, find_decoder, no_token, per_layer
from depthprobe.models.build import cut_copy, fill, save_weights
from depthprobe.models.cutting import keep_blocks
from depthprobe.models.own import OwnRecommender, load_own, own_digest
from depthprobe.models.parts import Part, find_sublayers
from depthprobe.models.prompt import CACHE_NAMES
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.skipping import after_blocks, skip_blocks
from depthprobe.models.taps import first_tensor, input_state, removed_after, tap_blocks
from depthprobe.models.tiny import DEPTH, TOKENS, brings_code, tiny_model

# A shallower model can't be trusted without these; the others tell what else the family can do.
REQUIRED = frozenset({"blocks", "tiny copy", "causal", "cut", "skip", "reload", "cache"})
PROMPT, ITEMS, D_ITEM = (5, 6, 7), 11, 4  # of the recommender that is tried

_auto: Any = AutoModelForCausalLM  # untyped in transformers


@dataclass(frozen=True)
class CheckResult:
    """One line of the self-test."""

    name: str
    passed: bool
    detail: str

    @property
    def required(self) -> bool:
        """Whether a cut model can only be trusted if this check passes."""
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
    rest runs on a tiny random copy: float64, the same kinds of blocks in the same order, ``depth``
    of them at most. Sources are those of :func:`load_backbone`, or a configuration.
    """
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        config = backbone_config(source, revision=revision, trust_remote_code=trust_remote_code)
    results: list[CheckResult] = []
    models: list[PreTrainedModel] = []

    def run(name: str, check: Callable[[], str]) -> bool:
        try:
            results.append(CheckResult(name, True, check()))
        except Exception as error:  # any error of an architecture is a finding, not a crash
            results.append(CheckResult(name, False, _reason(error)))
        return results[-1].passed

    def tiny_copy() -> str:
        models.append(model := tiny_model(config, depth=depth))
        return f"{len(find_blocks(model))} blocks, {model.num_parameters():,} parameters"

    if run("blocks", partial(_blocks, config)) and run("tiny copy", tiny_copy):
        ids = torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)
        for name, check in CHECKS.items():
            run(name, partial(check, models[0], ids))
    return results


def can_be_cut(results: list[CheckResult]) -> bool:
    """Whether everything that a cut needs passed."""
    return REQUIRED.issubset(result.name for result in results if result.passed)


def _reason(error: Exception) -> str:
    """The first line of an error."""
    text = error.allowed if isinstance(error, BadInput) else str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)


def _blocks(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder: only decoders can be cut")
    with torch.device("meta"):
        model = _auto.from_config(copy.deepcopy(config), trust_remote_code=brings_code(config))
    blocks = find_blocks(model)
    kinds = sorted({type(block).__name__ for block in blocks})
    return f"{len(blocks)} blocks ({', '.join(kinds)}) in {type(model).__name__}"


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    result: Tensor = model(ids, use_cache=False).logits
    return result


def _assert_close(result: Tensor, expected: Tensor, what: str) -> None:
    # Relative to the logits' spread: some norms and recurrences run in float32 whatever the dtype.
    error = (result - expected).abs().max() / expected.std()
    if not error <= 1e-3:
        raise AssertionError(f"{what} off by {error:.1e} of the spread")


def _cuts(
    model: PreTrainedModel, choices: Iterable[Iterable[int]]
) -> tuple[dict[tuple[int, ...], PreTrainedModel], str]:
    """The cut models, and why others were refused; raises if none is possible."""
    cuts: dict[tuple[int, ...], PreTrainedModel] = {}
    refused: list[str] = []
    for kept in map(tuple, choices):
        try:
            cuts[kept] = keep_blocks(copy.deepcopy(model), kept)
        except BadInput as error:
            refused.append(_reason(error))
    if not cuts:
        raise ValueError(refused[0] if refused else "no cut to try")
    note = f"; {len(refused)} other cuts refused, such as: {refused[0]}" if refused else ""
    return cuts, note


def _uncut_and_cut(model: PreTrainedModel) -> tuple[dict[str, PreTrainedModel], str]:
    """The model and one without its first block, by name; and why that cut was refused."""
    depth = len(find_blocks(model))
    cuts, note = _cuts(model, (range(depth), range(1, depth)))
    names = ("uncut" if len(k) == depth else f"cut to blocks {list(k)}" for k in cuts)
    return dict(zip(names, cuts.values(), strict=True)), note


def causal(model: PreTrainedModel, ids: Tensor) -> str:
    """Later positions do not change earlier ones."""
    start = TOKENS // 2
    other = ids.clone()
    other[:, start:] = ids[:, start:].flip(1) + 1
    before, after = _logits(model, ids), _logits(model, other)
    _assert_close(after[:, :start], before[:, :start], "changing later tokens: earlier ones are")
    if torch.equal(after[:, start:], before[:, start:]):
        raise AssertionError("the tokens change nothing")
    return "earlier positions do not see later ones"


def cut(model: PreTrainedModel, ids: Tensor) -> str:
    """The model cut to k blocks equals the early read-out after block k, bit for bit."""
    cuts, note = _cuts(model, map(range, range(1, len(find_blocks(model)))))
    with torch.no_grad(), tap_blocks(model) as tap:
        model(ids, use_cache=False)
        for kept, shallow in cuts.items():
            expected = find_decoder(shallow)(ids, use_cache=False)[0]
            if not torch.equal(after_blocks(model, tap.states[len(kept)]), expected):
                raise AssertionError(f"the model cut to {len(kept)} blocks differs from read-out")
    return f"{len(cuts)} depths equal the read-out bit for bit{note}"


def skip(model: PreTrainedModel, ids: Tensor) -> str:
    """A skipped block equals one that ran and was undone, and one that was cut out."""
    depth = len(find_blocks(model))
    full = _logits(model, ids)
    all_but_one = [tuple(i for i in range(depth) if i != left_out) for left_out in range(depth)]
    cuts, note = _cuts(model, all_but_one)
    for left_out, kept in enumerate(all_but_one):
        try:
            with skip_blocks(model, {left_out}):
                skipped = _logits(model, ids)
        except ValueError as error:  # also the family's own: HY V4's blocks read an earlier one's
            note += f"; block {left_out} not skippable: {_reason(error)}"
            continue
        with _changed(find_blocks(model)[left_out], lambda before, after: before):
            _assert_close(skipped, _logits(model, ids), f"skipping block {left_out}: it is")
        if kept in cuts and not torch.equal(skipped, _logits(cuts[kept], ids)):
            raise AssertionError(f"skipping block {left_out} differs from cutting it out")
    if not torch.equal(_logits(model, ids), full):
        raise AssertionError("the model is not restored after skipping")
    return f"{depth} blocks equal undoing and cutting them{note}"


def parts(model: PreTrainedModel, ids: Tensor) -> str:
    """Attention or MLP skipped equals one that was silenced; both equal the skipped block."""
    sublayers = find_sublayers(model)
    paths: dict[Part, set[str]] = {"attention": set(), "mlp": set()}
    full = _logits(model, ids)
    for (index, branches), part in itertools.product(enumerate(sublayers), paths):
        chosen = [branch.path for branch in branches if branch.mixes == (part == "attention")]
        if not chosen:
            continue
        paths[part].add(" + ".join(chosen))
        with skip_blocks(model, {index}, part=part):
            skipped = _logits(model, ids)
        if len(chosen) == 1:
            module = find_blocks(model)[index].get_submodule(chosen[0])
            with _changed(module, lambda before, after: torch.zeros_like(after)):
                _assert_close(
                    skipped, _logits(model, ids), f"skipping {part} of block {index}: it is"
                )
        if torch.equal(skipped, full):
            raise AssertionError(f"skipping {part} of block {index} changes nothing")
    if all({branch.mixes for branch in branches} == {True, False} for branches in sublayers):
        every = range(len(sublayers))
        with skip_blocks(model, every, part="attention"), skip_blocks(model, every, part="mlp"):
            both = _logits(model, ids)
        with skip_blocks(model, every):
            _assert_close(both, _logits(model, ids), "skipping all parts: the blocks are")
    return "; ".join(f"{part}: {' or '.join(sorted(n)) or 'none'}" for part, n in paths.items())


@contextmanager
def _changed(module: nn.Module, change: Callable[[Any, Any], Any]) -> Iterator[None]:
    """The module runs, and its state is changed after: an oracle for skipping it."""

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        state = change(input_state(args, kwargs), first_tensor(output))
        return (state, *output[1:]) if isinstance(output, tuple | list) else state

    with module.register_forward_hook(after, with_kwargs=True):
        yield


def reload(model: PreTrainedModel, ids: Tensor) -> str:
    """Stock transformers reads a cut model back without a missing or unexpected key."""
    depth = len(find_blocks(model))
    choices = (range(max(1, depth // 2)), range(0, depth, 2), range(1, depth), range(depth - 1))
    cuts, note = _cuts(model, dict.fromkeys(tuple(kept) for kept in choices if kept))
    for kept, shallow in cuts.items():
        with tempfile.TemporaryDirectory() as folder:
            shallow.save_pretrained(folder)
            loaded, info = _auto.from_pretrained(
                folder,
                dtype=model.dtype,
                experts_implementation="eager",
                trust_remote_code=brings_code(shallow.config),
                output_loading_info=True,
            )
            for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
                if info[what]:
                    keys = sorted(info[what])[:3]
                    raise AssertionError(f"{what} {keys} with blocks {list(kept)}")
            expected = _logits(shallow, ids)
            _assert_close(_logits(loaded.eval(), ids), expected, f"reloaded {list(kept)}:")
    return f"{len(cuts)} cuts, no missing or unexpected keys{note}"


def cache(model: PreTrainedModel, ids: Tensor) -> str:
    """Single steps after a cached beginning equal one pass without a cache."""
    cuts, note = _uncut_and_cut(model)
    start = TOKENS // 2
    positions = torch.arange(TOKENS)[None]
    takes = "position_ids" in inspect.signature(model.forward).parameters

    def at(places: slice) -> dict[str, Tensor]:
        # pass positions as ``generate`` does: some families would count from zero at each step
        given = {"position_ids": positions[:, places].expand(len(ids), -1)} if takes else {}
        return {"input_ids": ids[:, places]} | given

    for which, variant in cuts.items():
        with torch.no_grad():
            expected = variant(**at(slice(None)), use_cache=False).logits[:, start:]
            first = variant(**at(slice(start)), use_cache=True)
            name = next((name for name in CACHE_NAMES if name in first), None)
            if name is None:
                return "has no cache: every step is a whole pass"
            steps = [
                variant(**at(slice(t, t + 1)), **{name: first[name]}, use_cache=True).logits
                for t in range(start, TOKENS)
            ]
        _assert_close(torch.cat(steps, dim=1), expected, f"{which}, step by step:")
    return f"{len(cuts)} models, step by step equal to one pass{note}"


def recommender(model: PreTrainedModel, ids: Tensor) -> str:
    """A recommender whose prompt is shared equals one whose prompt is part of every row."""
    cuts, note = _uncut_and_cut(model)
    generator = torch.Generator().manual_seed(0)
    items = torch.randn(ITEMS + 1, D_ITEM, generator=generator)
    histories = torch.randint(1, ITEMS + 1, ids.shape, generator=generator)
    for which, variant in cuts.items():
        with torch.random.fork_rng(devices=[]):
            tried = Recommender(variant, items, PROMPT).to(model.dtype).eval()
        # prompt and items of every user as one sequence of embeddings, (B, P + T, D)
        tokens = tried.token_embeddings(tried.prompt).expand(len(ids), -1, -1)
        rows = torch.cat([tokens, tried.embed(histories)], dim=1)
        with torch.no_grad():
            filler = torch.full_like(histories, no_token(tried.backbone))
            beside = torch.cat([tried.prompt.expand(len(ids), -1), filler], dim=1)
            expected = tried.backbone(
                inputs_embeds=rows,
                position_ids=tried.first + torch.arange(rows.shape[1])[None],
                use_cache=False,
                **per_layer(tried.backbone, beside),
            )[0]
            states = tried.states(histories)[:, tried.lead :]
        _assert_close(states, expected[:, len(PROMPT) :], f"{which}, its prompt shared:")
    return f"runs; its prompt is computed once a {'user' if tried.lead else 'batch'}{note}"


# --- a trained recommender of the user's own: the object itself, with some made-up histories ------


def check_own(
    model: OwnRecommender,
    source: str,
    *,
    longest: int = TOKENS,
    objective: str | None = None,
) -> list[CheckResult]:
    """Test what can be proven about a user's recommender; it is not changed.

    Args:
        model: the recommender, just built.
        source: the function that builds it, ``module:function``.
        longest: items of the longest history that it is to read.
        objective: of its training, ``every`` or ``last``; None: it need not be trained.
    """
    results: list[CheckResult] = []
    generator = torch.Generator().manual_seed(0)
    items = len(model.item_matrix()) - 1
    histories = torch.randint(1, items + 1, (2, longest), generator=generator)
    shorter = max(1, longest - 3)
    histories[1, shorter:] = 0
    device = model.item_matrix().device
    lengths = torch.tensor([longest, shorter], device=device)
    given = Histories(source, histories.to(device), lengths, objective)
    for name, check in OWN_CHECKS.items():
        try:
            with torch.no_grad():
                results.append(CheckResult(name, True, check(model, given)))
        except Exception as error:  # any error is a finding
            results.append(CheckResult(name, False, _reason(error)))
            if name == "states":  # the other checks need states
                break
    return results


class Histories(NamedTuple):
    """Two users, the second with fewer items, and the source of the recommender that reads them."""

    source: str
    items: Tensor  # (2, T), right-padded with 0
    lengths: Tensor  # (2,)
    objective: str | None  # of its training, if it is to be trained

    @property
    def users(self) -> tuple[Tensor, Tensor]:
        """The histories and lengths that a pass reads."""
        return self.items, self.lengths


def own_states(model: OwnRecommender, given: Histories) -> str:
    """One pass runs each block once and returns states for which there is a read-out."""
    runs: list[int] = []
    blocks = find_blocks(model.backbone)
    prompt = model.prepare_prompt()
    if prompt is not None and not isinstance(prompt, Cache):
        raise ValueError(f"prepare_prompt returns a {type(prompt).__name__}, not a Cache")

    def ran(index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before, after = input_state(args, kwargs), first_tensor(output)
        named = args or "hidden_states" in kwargs
        if not named or getattr(before, "shape", None) != getattr(after, "shape", None):
            rule = "take the state as its first argument and return it, alone or first in a tuple"
            raise ValueError(f"a block must {rule}")
        runs.append(index)

    hooks = [
        block.register_forward_hook(partial(ran, index), with_kwargs=True)
        for index, block in enumerate(blocks)
    ]
    with removed_after(hooks):
        states = model.states(*given.users, prompt)
    expected = f"states ({len(given.items)}, positions, D)"
    if states.dim() != 3 or len(states) != len(given.items):
        raise ValueError(f"expected {expected}, got {tuple(states.shape)}")
    if not torch.isfinite(states).all():
        raise ValueError(f"expected finite {expected}, got NaN or infinity")
    if runs != list(range(len(blocks))):
        allowed = "once, in their order: put a prompt into the sequence, or offer prepare_prompt"
        raise ValueError(f"one pass must run each block {allowed} (it ran {runs})")
    if not torch.equal(model.states(*given.users, prompt), states):
        raise ValueError(
            "two passes over the same histories differ: draw nothing at random in evaluation mode"
        )
    vectors, items = model.encode(*given.users, prompt), model.item_matrix()
    if vectors.shape != (len(given.items), items.shape[1]):
        wide = f"user vectors {tuple(vectors.shape)} can't be scored by items {tuple(items.shape)}"
        raise ValueError(f"{wide}: read_out must return as many numbers as an item has")
    return f"{len(blocks)} blocks, {model.width} wide; {len(items) - 1:,} items"


def own_causal(model: OwnRecommender, given: Histories) -> str:
    """Neither later items nor padding change what comes before."""
    whole = model.encode(*given.users)
    start = int(given.lengths[1])
    alone = model.encode(given.items[1:, :start], given.lengths[1:])
    _assert_close(alone, whole[1:], "a user without padding: the vector is")
    states = model.states(*given.users)
    places, last = model.after_items(states, given.items), model.last_place(*given.users)
    # users must be read out at the states after each item
    ends = places[
        torch.arange(len(last), device=last.device), given.lengths.clamp(max=places.shape[1]) - 1
    ]
    several = places.shape[1] == given.items.shape[1]
    if not several or not torch.allclose(ends, states_at(states, last)):
        if given.objective == "every":
            raise ValueError(
                "it has one read-out a user: say recipe.objective=last, for one target a window"
            )
        return "padding changes nothing; one read-out a user: whether it is causal can't be seen"
    other = given.items.clone()
    other[0, start:] = other[0, start:].flip(0) % (len(model.item_matrix()) - 1) + 1
    changed = model.after_items(model.states(other, given.lengths), other)
    _assert_close(
        changed[0, :start], places[0, :start], "not causal: after changing later items, earlier are"
    )
    return "earlier positions see neither later items nor padding"


def own_cut(model: OwnRecommender, given: Histories) -> str:
    """The recommender cut to k blocks equals the read-out behind block k."""
    prompt, depth = model.prepare_prompt(), model.depth
    with tap_blocks(model.backbone) as tap:
        tap.positions = model.last_place(*given.users)
        vectors = model.encode(*given.users, prompt)
        states = tap.states
    for k in sorted({1, depth // 2, depth} - {0}):
        normed = after_blocks(model.backbone, states[k][:, None])[:, 0]
        read = model.read_out(normed.to(vectors.dtype))
        what = f"the read-out behind {k} blocks is no cut model's:"
        _assert_close(read, cut_copy(model, range(k)).encode(*given.users), what)
    return "cut models equal the read-out: what follows the blocks is the final norm and read_out"


def own_skip(model: OwnRecommender, given: Histories) -> str:
    """A block that is left out for a while equals one that is cut out, and comes back."""
    before, depth = model.encode(*given.users), model.depth
    for index in sorted({0, depth // 2, depth - 1}) if depth > 1 else ():
        with skip_blocks(model.backbone, {index}):
            skipped = model.encode(*given.users)
        expected = cut_copy(model, [b for b in range(depth) if b != index]).encode(*given.users)
        _assert_close(skipped, expected, f"skipping block {index} is not cutting it out:")
    if not torch.equal(model.encode(*given.users), before):
        raise AssertionError("it is not restored after skipping")
    return "a skipped block equals one that is cut out, and comes back"


def own_weights(model: OwnRecommender, given: Histories) -> str:
    """Its weights, written and read back into a fresh one, give the same numbers."""
    before = own_digest(model)
    if own_digest(load_own(given.source)) != before:
        raise AssertionError("it has other weights each time it is built")
    fresh = copy.deepcopy(model).train()
    fresh.states(*given.users)
    if own_digest(fresh) != before:
        reason = "a pass in training changes buffers, such as BatchNorm's, which are not stored"
        raise AssertionError(reason)
    fresh.eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.safetensors"
        save_weights(dict(model.own.named_parameters()), file)
        for weight in fresh.parameters():
            weight.zero_()
        fill(dict(fresh.own.named_parameters()), load_file(file))
    if not torch.equal(fresh.encode(*given.users), model.encode(*given.users)):
        raise AssertionError("it keeps numbers that decide its answers outside its parameters")
    return "all that decides is in its parameters, or the same each time it is built"


def own_training(model: OwnRecommender, given: Histories) -> str:
    """A step of training has a loss that reaches the blocks."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    blocks = {id(weight) for weight in find_blocks(model.backbone).parameters()}
    if given.objective is None or not weights:
        if given.objective is not None:
            raise ValueError("nothing would be trained: build() leaves no weight requires_grad")
        return f"{len(weights)} weights would be trained"
    if (kind := model.item_matrix().dtype) != torch.float32:
        rule = "build() must return float32 to be trained (recipe.precision is what it computes in)"
        raise ValueError(f"its item_matrix is {kind}: {rule}")
    with torch.enable_grad():
        if model.own_loss is None:
            loss = (model.encode(*given.users) @ model.item_matrix().T).logsumexp(1).mean()
        else:
            loss = model.loss(*given.users, given.items)
        if loss.dim() or not torch.isfinite(loss) or not loss.requires_grad:
            raise ValueError("its loss must be a finite scalar that has a gradient")
        found = torch.autograd.grad(loss, weights, allow_unused=True)
    reached = {id(w) for w, grad in zip(weights, found, strict=True) if grad is not None}
    if blocks & {id(weight) for weight in weights} and not blocks & reached:
        raise ValueError("no gradient reaches its blocks: does it run without one?")
    return f"the loss reaches {len(reached)} of {len(weights)} weights that would be trained"


OWN_CHECKS: dict[str, Callable[[OwnRecommender, Histories], str]] = {
    "states": own_states,
    "causal": own_causal,
    "cut": own_cut,
    "skip": own_skip,
    "weights": own_weights,
    "training": own_training,
}
# what no test of the object can show
NOT_SEEN = (
    "Not proven: that its answers are those of your service (compare some), and that its loss is"
    " the one it was trained with."
)

CHECKS: dict[str, Callable[[PreTrainedModel, Tensor], str]] = {
    "causal": causal,
    "cut": cut,
    "skip": skip,
    "parts": parts,
    "reload": reload,
    "cache": cache,
    "recommender": recommender,
}
