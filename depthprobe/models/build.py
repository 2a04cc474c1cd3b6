"""Build recommenders from settings, and store only the weights that training changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthprobe.errors import BadInput
from depthprobe.models.backbones import QUANTIZED_MARKS, pretrained, pretrained_tokenizer
from depthprobe.models.blocks import check_tokens, find_blocks
from depthprobe.models.cutting import ModelT, keep_blocks, loop_blocks
from depthprobe.models.narrowing import UnitScores, narrow_blocks, plan_narrowing
from depthprobe.models.own import load_own
from depthprobe.models.recommender import Recommender
from depthprobe.models.sasrec import SASRec
from depthprobe.models.sources import not_finite
from depthprobe.models.tiny import ends_at_positions, positions_of, steady_positions
from depthprobe.models.words import Words
from depthprobe.study import Backbone, SasRecSettings

WEIGHTS = "trained.safetensors"

logger = logging.getLogger(__name__)


class Shape(NamedTuple):
    """How the blocks of a model differ from those of its backbone."""

    width: float = 1.0  # share of channels and heads
    loops: int = 1  # how many times the blocks are applied in turn
    scores: UnitScores | None = None  # choose what stays; else the first ones


PLAIN = Shape()


def build_recommender(
    settings: Backbone,
    items: Tensor,
    *,
    item_ids: Sequence[str] | None = None,
    kept: tuple[int, ...] | None = None,
    shape: Shape = PLAIN,
    seed: int,
    random_init: bool = False,
    train_items: bool = False,
    tokens: Sequence[Sequence[int]] | None = None,
) -> Recommender:
    """A recommender before its training: backbone loaded, cut, made trainable; fresh adapters.

    ``items`` is the item table, (I + 1, d_item); the seed initialises what is fresh; ``shape`` is
    that of the kept blocks; ``tokens`` are of items 1..I, where histories are read in words. A
    recommender of the user's own comes
    with its table and its training; ``item_ids`` are those of the log.
    """
    if settings.own:
        own = load_own(settings.source, item_ids)
        if kept is not None:
            keep_blocks(own.backbone, kept)
        make_trainable(own, settings)
        own.checkpoint_blocks(settings.checkpointing)
        return own
    backbone = pretrained(settings, random_init=seed if random_init else None)
    if kept is not None:
        keep_blocks(backbone, kept)
    reshape(backbone, shape)
    return around(backbone, settings, items, seed=seed, train_items=train_items, tokens=tokens)


def reshape(model: ModelT, shape: Shape) -> ModelT:
    """Make the blocks of a Hugging Face model narrower, or apply them again, in place."""
    if shape.width < 1:
        narrow_blocks(model, plan_narrowing(model, shape.width), shape.scores)
    return loop_blocks(model, shape.loops)


def build_sasrec(
    settings: SasRecSettings, *, items: int, longest: int, table: Tensor | None = None
) -> SASRec:
    """SASRec before training, initialised by torch's present seed.

    A ``table``, (I + 1, D), replaces its own item embeddings.
    """
    return SASRec(
        items,
        width=settings.width,
        blocks=settings.blocks,
        heads=settings.heads,
        drop=settings.dropout,
        longest=longest,
        table=table,
    )


def around(
    backbone: PreTrainedModel,
    settings: Backbone,
    items: Tensor,
    *,
    seed: int,
    train_items: bool = False,
    tokens: Sequence[Sequence[int]] | None = None,
) -> Recommender:
    """A recommender around a backbone, whose blocks it uses in place; fresh adapters."""
    place, (prompt, suffix) = backbone.device, prompt_and_suffix(settings, backbone)
    torch.manual_seed(seed)  # the adapters are drawn from the global generator
    with torch.device(place):  # quantised weights are on the GPU from the start
        model = Recommender(
            backbone,
            items.to(place),
            prompt,
            suffix=suffix,
            head=settings.head,
            words=None if tokens is None else Words(tokens),
        )
    make_trainable(model, settings)
    model.items.requires_grad_(train_items)
    model.checkpoint_blocks(settings.checkpointing)
    return model


def cut_copy(model: ModelT, kept: Iterable[int]) -> ModelT:
    """A shallower copy of a recommender or backbone around the same weights; the original stays."""
    twin = twin_of(model)
    keep_blocks(twin.backbone if isinstance(twin, Recommender) else twin, kept)
    return twin


def twin_of(model: ModelT) -> ModelT:
    """A copy of a recommender or backbone around the same weights."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def learned_table(items: int, width: int, *, seed: int) -> Tensor:
    """A random item table to train, (items + 1, width) float32 of unit length a row; row 0 is 0.

    A fresh output adapter turns rows of this length into scores of a spread near 1.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(items + 1, width, generator=generator).mul_(width**-0.5)
    table[0] = 0
    return table


def prompt_and_suffix(
    settings: Backbone, backbone: PreTrainedModel | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of the texts around the items; the prompt begins with the start token, if any.

    ``BadInput`` if no tokenizer can be used, or a token has no embedding in the backbone.
    """
    prompt: list[int] = []
    suffix: list[int] = []
    if not settings.own and (settings.prompt or settings.suffix):
        tokenizer = pretrained_tokenizer(settings)
        if settings.prompt:
            # titles begin on a new line
            text = settings.prompt.rstrip("\n") + "\n" if settings.reads_titles else settings.prompt
            prompt, start = tokenizer(text)["input_ids"], tokenizer.bos_token_id
            # some tokenizers append an end token, which would stand before the items
            alone = tokenizer(text, add_special_tokens=False)["input_ids"]
            ends = range(len(prompt), len(alone) - 1, -1)
            found = (end for end in ends if prompt[end - len(alone) : end] == alone)
            prompt = prompt[: next(found, None)]
            # some tokenizers have a start token but do not add it
            prompt = prompt if start in (None, *prompt[:1]) else [start, *prompt]
        if settings.suffix:
            suffix = tokenizer(settings.suffix, add_special_tokens=False)["input_ids"]
    if backbone is not None:
        check_tokens("prompt", settings.prompt, prompt, backbone)
        check_tokens("suffix", settings.suffix, suffix, backbone)
    return prompt, suffix


def check_lengths(settings: Backbone, config: PreTrainedConfig, longest: int) -> list[str]:
    """Warnings about a backbone's positions for these texts and histories.

    Raises:
        BadInput: if it has too few positions and can't go beyond the last one, or if it can't read
            the texts.
    """
    texts = sum(map(len, prompt_and_suffix(settings)))
    steady = steady_positions(config)
    most = steady or positions_of(config)
    if most is None or texts + longest <= most:
        return []
    found = f"{texts} tokens and histories of up to {longest} are more than the {most} positions"
    if steady is not None or ends_at_positions(config):
        fewer = ""
        if settings.reads_titles:
            fewer = ", a smaller data.max_history or fewer title_tokens"
        elif most > texts:
            fewer = f", or data.max_history = {most - texts}"
        which = "that it has"
        if steady is not None:  # see steady_positions
            which = "up to which its rotary table is the same for all users"
        allowed = f"{found} {which}: take a shorter prompt or suffix{fewer}"
        raise BadInput("backbone", settings.source, allowed, fault=True)
    warning = f"{found} of the backbone: it was not trained on texts of that length"
    logger.warning("%s", warning)
    return [warning]


def make_trainable(model: Recommender, settings: Backbone) -> None:
    """Mark the trained weights: the adapters, and those of the backbone that ``tuning`` selects.

    Token embeddings are not trained: only prompt and suffix read them. A user's own recommender
    says itself what is trained outside its blocks.
    """
    backbone: PreTrainedModel = model.backbone
    if not settings.own:
        backbone.requires_grad_(settings.tuning == "full")
        backbone.get_input_embeddings().requires_grad_(False)
    elif settings.tuning != "full":
        find_blocks(backbone).requires_grad_(False)
    if settings.tuning == "lora":
        # imported late: it takes as long as all the rest, and most runs do without it
        from peft import LoraConfig, inject_adapter_in_model

        lora = LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_rank,
            lora_dropout=0.05,
            target_modules=lora_maps(backbone, settings.lora_targets),
        )
        # Only in the blocks: for a model that it knows, PEFT would adapt other weights than asked,
        # or none. It looks for marks of packed weights on the module that it is given.
        blocks = find_blocks(backbone)
        for name in QUANTIZED_MARKS:
            if hasattr(backbone, name):
                setattr(blocks, name, getattr(backbone, name))
        inject_adapter_in_model(lora, blocks)


def lora_maps(backbone: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Paths in the blocks of the linear maps that targets name: those that LoRA adapts.

    Args:
        targets: ``attention``, ``mlp`` (all maps outside attention), ``all``, or the last parts of
            a map's path in its block, as ``q_proj`` or ``mlp.up_proj``.

    Raises:
        BadInput: for the first target that names no map.
    """
    paths = [*linear_maps(find_blocks(backbone))]
    named = {
        "all": paths,
        "mlp": [path for path in paths if "att" not in path.lower()],
        "attention": [path for path in paths if "att" in path.lower()],
    }
    chosen: set[str] = set()
    for target in targets:
        inside = (f".{path.partition('.')[2]}" for path in paths)  # without the block's number
        ends = [p for p, part in zip(paths, inside, strict=True) if part.endswith(f".{target}")]
        found = named.get(target, ends)
        if not found:
            groups = [name for name, group in named.items() if group]
            known = [*groups, *dict.fromkeys(path.rpartition(".")[2] for path in paths)]
            allowed = f"some of {', '.join(known)}" if known else "tuning = full (no map to adapt)"
            raise BadInput("backbone.lora_targets", target, allowed)
        chosen.update(found)
    return [path for path in paths if path in chosen]


def linear_maps(blocks: nn.Module) -> dict[str, nn.Module]:
    """The linear maps that blocks call, by their paths.

    Of a state-space mixer only the first: kernels use the others' weights without calling them, so
    an adapter there would do nothing.
    """
    mixers = {name for name, module in blocks.named_modules() if hasattr(module, "A_log")}
    return {
        name: module
        for name, module in blocks.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and (name.rpartition(".")[0] not in mixers or ".in_proj" in name)
    }


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Fold low-rank updates into the weights and put the plain layers back, in place."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LoraLayer)]
    for name, layer in layers:
        layer.merge(safe_merge=True)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layer.get_base_layer())
    for module in model.modules():
        vars(module).pop("peft_config", None)


def save_trained(model: nn.Module, folder: Path) -> None:
    """Write the weights that were trained; the rest comes from the backbone and the item table."""
    folder.mkdir(parents=True, exist_ok=True)
    save_weights({n: p for n, p in model.named_parameters() if p.requires_grad}, folder / WEIGHTS)


def load_trained(model: nn.Module, folder: Path) -> None:
    """Read what ``save_trained`` wrote."""
    with intact(folder / WEIGHTS):
        trained = load_file(folder / WEIGHTS)
        fill({n: p for n, p in model.named_parameters() if p.requires_grad}, trained)


@contextmanager
def intact(file: Path) -> Iterator[None]:
    """Turn an error about a file of weights into one line that names the file."""
    try:
        yield
    except Exception as error:  # safetensors has several
        reason = str(error).partition("\n")[0]
        allowed = f"it is absent or damaged ({reason}): delete its trial"
        raise BadInput("weights", str(file), allowed, fault=True) from error


def save_weights(
    weights: Mapping[str, Tensor], file: Path, told: dict[str, str] | None = None
) -> None:
    """Write weights of any device, also views; ``told`` goes into the file's header."""
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, file, told)


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    """Copy stored values into weights; ``ValueError`` if a name or shape differs, or for NaN."""
    odd = sorted(stored.keys() ^ weights.keys())
    odd += [n for n in stored.keys() & weights.keys() if stored[n].shape != weights[n].shape]
    if odd:
        raise ValueError(f"it does not fit the model: {', '.join(odd[:3])}")
    if (name := not_finite(stored.items())) is not None:
        raise ValueError(f"{name} holds NaN or infinity")
    for name, weight in weights.items():
        weight.copy_(stored[name])
