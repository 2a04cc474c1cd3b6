"""Depths and blocks as people write them: ``1,2,4``, ``1-12``, ``all``, ``auto``; ``0,10-11``."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from depthprobe.errors import BadInput, at_least, nearest, one_of, short


def parse_layers(text: str, blocks: int | None) -> tuple[int, ...]:
    """Depths named by ``1,2,4``, ``1-12`` (both included), ``all`` or ``auto`` (1, 2, 4, ...).

    Args:
        text: what the user wrote.
        blocks: the backbone's number of blocks; None checks the spelling alone and returns ().

    Raises:
        BadInput: for anything that is not a depth between 1 and ``blocks``.
    """
    top = "the backbone's number of blocks" if blocks is None else f"{blocks}"
    allowed = f"depths from 1 to {top}, as 1,2,4 or 1-12 or all"
    word = text.strip().lower()
    if word in {"all", "auto"}:
        if blocks is None:
            return ()
        if word == "all":
            return tuple(range(1, blocks + 1))
        return tuple(2**k for k in range(blocks.bit_length()) if 2**k < blocks)
    depths: set[int] = set()
    for part in word.split(","):
        low, high = _ends(part)
        if low < 1 or high < low or (blocks is not None and high > blocks):
            raise BadInput("layers", text, allowed)
        if blocks is not None:
            depths.update(range(low, high + 1))
    return tuple(sorted(depths))


def parse_blocks(text: str, blocks: int | None = None) -> tuple[int, ...]:
    """Block indices named by ``0,1,10-11``, both ends of a range included.

    Args:
        blocks: the backbone's number of blocks, if it is known.

    Raises:
        BadInput: for anything that is not a block from 0 to ``blocks - 1``, in their order.
    """
    top = "the last block" if blocks is None else f"{blocks - 1}"
    found: list[int] = []
    for part in text.split(","):
        low, high = _ends(part)
        wrong = low < 0 or high < low or (blocks is not None and high >= blocks)
        if wrong or (found and low <= found[-1]):
            allowed = f"blocks from 0 to {top} in their order, as 0,1,10-11"
            raise BadInput("select", text, allowed)
        found += range(low, high + 1)
    return tuple(found)


def ranges(numbers: Iterable[int]) -> str:
    """Sorted whole numbers as text.

    >>> ranges([0, 1, 2, 5])
    '0-2,5'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs)


def _ends(part: str) -> tuple[int, int]:
    """The ends of ``3-5``, of ``4``; (-1, -1) for what is neither."""
    first, dash, last = (piece.strip() for piece in part.partition("-"))
    if not (_is_count(first) and (_is_count(last) if dash else True)):
        return -1, -1
    return int(first), int(last if dash else first)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6


# What a study reads: the log, what of it stays, and the backbone.

PROMPT = "Purchase history:"
# the library's own; any other name would be that of a kernel, that is code, to fetch from a hub
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTIZATIONS = ("none", "8bit", "4bit")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; those left out are guessed from common spellings.

    A column is named as the table's header names it, or by its number from 1 in a CSV without a
    header. A log needs a user and an item column.

    Attributes:
        user: the column of users.
        item: the column of items.
        time: the column of times; a log may have none.
        rating: the column of ratings; needed by ``min_rating`` alone.
        title: the column of the items' titles.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    title: str | None = None

    def given(self) -> dict[str, str]:
        """The columns that were named, by what they hold."""
        return {what: name for what, name in asdict(self).items() if name is not None}


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which interactions stay; the steps come in the order of the keys.

    Attributes:
        min_rating: drop interactions rated lower.
        repeats: of a user's interactions with the same item keep all, the first, or the last.
        latest: keep so many of each user's.
        core: drop users and items with fewer interactions, again and again until none is left
            (k-core); 1 drops nothing.
    """

    min_rating: float | None = None
    repeats: Literal["keep", "first", "last"] = "keep"
    latest: int | None = None
    core: int = 1

    def __post_init__(self) -> None:
        one_of("data.cleaning.repeats", self.repeats, ("keep", "first", "last"))
        if self.min_rating is not None and not abs(self.min_rating) < float("inf"):
            raise BadInput("data.cleaning.min_rating", self.min_rating, "a number")
        at_least("data.cleaning", {"core": self.core}, 1)
        if self.latest is not None:
            at_least("data.cleaning", {"latest": self.latest}, 1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the interactions come from, what is dropped, how much of a history a model reads.

    Attributes:
        source: a log (file or folder), a prepared folder, the name of a public set, or
            ``embedded``; a path is relative to where the command runs.
        format: one of those that ``depthprobe data list`` names; left out, the content tells.
        items: a file with the items' titles; left out, it is looked for beside the log.
        max_history: so many of a user's latest items are read.
        columns: names of a table's columns.
        cleaning: what is dropped.
    """

    source: str = "embedded"
    format: str | None = None
    items: str | None = None
    max_history: int = 50
    columns: Columns = Columns()
    cleaning: Cleaning = Cleaning()

    def __post_init__(self) -> None:
        at_least("data", {"max_history": self.max_history}, 1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The pretrained decoder, what of it is trained, and the prompt before the items.

    Attributes:
        source: a folder with ``config.json`` and safetensors weights, a Hugging Face id, or
            ``embedded``.
        revision: branch, tag or commit of an id; left out, the hub's ``main``.
        trust_remote_code: run Python code that comes with the model; only with a ``revision``.
        dtype: of the weights; ``auto`` is the checkpoint's.
        attention: the implementation: ``auto`` (transformers' choice), ``eager``, ``sdpa``,
            ``flash_attention_2``, ``flash_attention_3`` or ``flex_attention``.
        quantize: store the weights of the blocks in fewer bits; on a GPU, with bitsandbytes, and
            with ``tuning`` ``lora`` or ``frozen`` alone.
        tuning: train every weight of the blocks (``full``), low-rank updates of the MLP projections
            (``lora``, as SLMRec does), or the adapters alone (``frozen``).
        lora_rank: the rank of those updates.
        prompt: what the model reads before the items; may be empty.
        suffix: what it reads after them, as SLMRec's response prompt; needs the objective ``last``.
        head: score by the dot product with the item table (``dot``, SLMRec), or by a linear map
            from the last state to the items (``linear``, E4SRec).
        checkpointing: compute the blocks again in the backward pass in place of keeping their
            activations: less memory, more time, the same numbers.
    """

    source: str = "embedded"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    attention: str = "auto"
    quantize: Literal["none", "8bit", "4bit"] = "none"
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = 16
    prompt: str = PROMPT
    suffix: str = ""
    head: Literal["dot", "linear"] = "dot"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        at_least("backbone", {"lora_rank": self.lora_rank}, 1)
        one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        one_of("backbone.attention", self.attention, ATTENTIONS)
        one_of("backbone.quantize", self.quantize, QUANTIZATIONS)
        one_of("backbone.tuning", self.tuning, ("full", "lora", "frozen"))
        one_of("backbone.head", self.head, ("dot", "linear"))
        if self.quantize != "none" and self.tuning == "full":
            allowed = "tuning = lora or frozen beside it: quantised weights can't be trained"
            raise BadInput("backbone.quantize", self.quantize, allowed)
        if self.trust_remote_code and not self.revision:
            raise BadInput("backbone.revision", None, "remote code needs a pinned revision")


# How models are trained: recipes, the baseline, the distillation.

# which blocks stay: the first ones; the first and the last ones; some spread evenly; those outside
# the run that turns the teacher's state least; those that greedy removal leaves; a random choice
SELECTIONS = ("prefix", "ends", "interval", "angular", "greedy", "random")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained: AdamW, cosine with warm-up, early stopping on validation NDCG@10.

    Attributes:
        epochs: passes over the training data, at most.
        batch_size: users (windows of a history) a step.
        learning_rate: at its highest.
        weight_decay: of AdamW.
        warmup: the share of the steps in which the learning rate rises.
        clip: the norm at which gradients are clipped.
        patience: stop after so many epochs without a better validation NDCG@10.
        objective: ask for the next item at ``every`` position of a history, or at its ``last``
            alone (one target a user, SLMRec's).
        loss: cross-entropy over the whole catalogue (``full``), over the target and random items
            (``sampled-softmax``), or gSASRec's binary one (``gbce``).
        negatives: how many random items the two sampled losses draw.
        gbce_t: the calibration of ``gbce``, from 0 to 1.
        accumulation: compute a batch in so many parts, which changes its memory and not its result.
        precision: what the training computes in, beside weights that stay in their own.
        compile: use ``torch.compile``.
    """

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    patience: int = 3
    objective: Literal["every", "last"] = "every"
    loss: Literal["full", "sampled-softmax", "gbce"] = "full"
    negatives: int = 256
    gbce_t: float = 0.75
    accumulation: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        whole = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "patience": self.patience,
            "negatives": self.negatives,
            "accumulation": self.accumulation,
        }
        at_least("recipe", whole, 1)
        at_least("recipe", {"weight_decay": self.weight_decay, "warmup": self.warmup}, 0)
        one_of("recipe.objective", self.objective, ("every", "last"))
        one_of("recipe.loss", self.loss, ("full", "sampled-softmax", "gbce"))
        one_of("recipe.precision", self.precision, ("float32", "bfloat16"))
        if not 0 < self.learning_rate < 10:
            raise BadInput("recipe.learning_rate", self.learning_rate, "a number in (0, 10)")
        if not self.warmup < 1:
            raise BadInput("recipe.warmup", self.warmup, "a share of the steps, in [0, 1)")
        if not self.clip > 0:
            raise BadInput("recipe.clip", self.clip, "a number above 0")
        if not 0 <= self.gbce_t <= 1:
            raise BadInput("recipe.gbce_t", self.gbce_t, "a number in [0, 1]")
        if self.accumulation > self.batch_size:
            allowed = f"at most batch_size ({self.batch_size})"
            raise BadInput("recipe.accumulation", self.accumulation, allowed)


@dataclass(frozen=True, kw_only=True)
class SasRecSettings:
    """The non-LLM baseline, and where the item embeddings come from (Kang and McAuley, 2018).

    Attributes:
        width: of its states, and of the item table that it makes.
        blocks: how many it has.
        heads: of its attention; ``width`` must be a multiple.
        dropout: the share of states that are dropped in training.
        recipe: how it is trained.
    """

    width: int = 64
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.5
    recipe: Recipe = Recipe(epochs=16, patience=4, learning_rate=2e-3)

    def __post_init__(self) -> None:
        sizes = {"width": self.width, "blocks": self.blocks, "heads": self.heads}
        at_least("sasrec", sizes, 1)
        if self.width % self.heads:
            raise BadInput("sasrec.width", self.width, f"a multiple of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise BadInput("sasrec.dropout", self.dropout, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A student's loss: ``ce CE + cosine D_cos + norm D_norm + supervision L_ms + logits KL``.

    The first four are SLMRec's.

    Attributes:
        groups: into so many groups of blocks teacher and student are cut, to be compared at their
            ends.
        ce: weight of the recipe's own loss.
        cosine: weight of 1 - cos of the two states.
        norm: weight of their distance.
        supervision: weight of the loss of recommending from inner groups; asks no teacher.
        logits: weight of the divergence from the teacher's distribution over the catalogue.
        norm_form: the distance of two states (``distance``, SLMRec's), or its square over their
            width, which no width makes large (``squared``).
        positions: compare states wherever the recipe asks for the next item (``asked``), or at the
            last item alone (``last``, SLMRec's).
        temperature: at which ``logits`` compares distributions.
        top: compare scores of the teacher's best items alone; 0 is all.
        init: the student begins as the pretrained ``backbone``, as the trained ``teacher``, or at
            ``random``.
        features: what the teacher says is computed once and kept on disk (``cached``), or again at
            every step (``online``).
    """

    groups: int = 4
    ce: float = 1.0
    cosine: float = 1.0
    norm: float = 0.1
    supervision: float = 0.1
    logits: float = 0.0
    norm_form: Literal["distance", "squared"] = "distance"
    positions: Literal["asked", "last"] = "asked"
    temperature: float = 1.0
    top: int = 0
    init: Literal["backbone", "teacher", "random"] = "backbone"
    features: Literal["cached", "online"] = "cached"

    def __post_init__(self) -> None:
        at_least("distillation", {"groups": self.groups}, 1)
        weights = {
            "ce": self.ce,
            "cosine": self.cosine,
            "norm": self.norm,
            "supervision": self.supervision,
            "logits": self.logits,
            "top": self.top,
        }
        at_least("distillation", weights, 0)
        if not any(weights[name] for name in weights if name != "top"):
            raise BadInput("distillation.ce", self.ce, "one of the losses with a weight above 0")
        one_of("distillation.norm_form", self.norm_form, ("distance", "squared"))
        one_of("distillation.positions", self.positions, ("asked", "last"))
        one_of("distillation.init", self.init, ("backbone", "teacher", "random"))
        one_of("distillation.features", self.features, ("cached", "online"))
        if not 0 < self.temperature < float("inf"):
            raise BadInput("distillation.temperature", self.temperature, "a number above 0")

    @property
    def follows_states(self) -> bool:
        """Whether the teacher's states are needed."""
        return bool(self.cosine or self.norm)


@dataclass(frozen=True, kw_only=True)
class Elastic:
    """One model for every depth (LayerSkip, arXiv 2404.16710).

    A step leaves block l out with probability ``dropout (2^(l / (L - 1)) - 1)``, for all its users:
    never the first, the last with ``dropout``. Its loss is that of the whole model and ``weight``
    times the mean loss of ``exits`` shallower ones, at depths drawn anew at each step.

    Attributes:
        dropout: the probability that the last block is left out of a step.
        exits: so many shallower losses a step.
        weight: of their mean.
    """

    dropout: float = 0.1
    exits: int = 1
    weight: float = 1.0

    def __post_init__(self) -> None:
        at_least("elastic", {"exits": self.exits}, 1)
        at_least("elastic", {"dropout": self.dropout, "weight": self.weight}, 0)
        if not self.dropout < 1:
            raise BadInput("elastic.dropout", self.dropout, "a share of the steps, in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Heal:
    """How a cut teacher is trained further.

    Attributes:
        share: of the recipe's epochs.
    """

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise BadInput("heal.share", self.share, "a share of the epochs, in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Settings under a name: ``distill:NAME`` is ``distill`` with these in place of the study's.

    What a variant's table leaves out is what the study's own table of that name says.

    Attributes:
        select: which blocks stay: ``prefix`` (the first), ``ends``, ``interval``, ``angular``,
            ``greedy``, ``random``, or their indices, as ``0,1,10-11``.
        layers: depths other than the study's.
        recipe: how it is trained.
        distillation: the losses of ``distill:NAME``.
        elastic: the settings of ``elastic:NAME``.
    """

    select: str = "prefix"
    layers: str | None = None
    recipe: Recipe | None = None
    distillation: Distillation | None = None
    elastic: Elastic | None = None

    def __post_init__(self) -> None:
        if self.select not in SELECTIONS:
            parse_blocks(self.select)
        if self.layers is not None:
            parse_layers(self.layers, None)


# How accuracy and time are measured, and what is probed.


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How accuracy is measured, and how much of it a shallower model may lose.

    Attributes:
        split: ask for each user's last item (``leave-one-out``), for what comes after two points in
            time that all users share (``temporal``), or as the log came in training, validation
            and test files (``given``).
        split_at: the two points of ``temporal``: dates, or quantiles of the interactions.
        filter_seen: items of the history are not ranked.
        sampled: the 999-negative protocol beside full ranking, labelled.
        negatives: of the sampled protocol, drawn from the items that a user never took:
            ``uniform``, or in proportion to how often training holds an item (``popularity``:
            harder, and what training never holds is never drawn).
        user_slices: own groups of test users, each ``FILE:COLUMN`` of a table of users.
        item_slices: groups by the item that is asked for, each ``FILE:COLUMN`` of a table of items.
        validation_users: so many at most choose the best epoch.
        margin: the relative loss of NDCG@10 that is acceptable.
        resamples: draws of the bootstrap.
    """

    split: Literal["leave-one-out", "temporal", "given"] = "leave-one-out"
    split_at: tuple[str, ...] = ("0.8", "0.9")
    filter_seen: bool = True
    sampled: bool = True
    negatives: Literal["uniform", "popularity"] = "uniform"
    user_slices: tuple[str, ...] = ()
    item_slices: tuple[str, ...] = ()
    validation_users: int = 4096
    margin: float = 0.01
    resamples: int = 1000

    def __post_init__(self) -> None:
        one_of("protocol.negatives", self.negatives, ("uniform", "popularity"))
        at_least("protocol", {"validation_users": self.validation_users}, 1)
        at_least("protocol", {"resamples": self.resamples}, 100)
        if len(self.split_at) != 2:
            allowed = "where validation and test begin: two dates, or two quantiles as 0.8,0.9"
            raise BadInput("protocol.split_at", ",".join(self.split_at), allowed)
        if not 0 < self.margin < 1:
            raise BadInput("protocol.margin", self.margin, "a share of the accuracy, in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How time is measured: one batch of real users, rounds interleaved over the depths.

    Attributes:
        batch_size: users in the batch.
        warmup: rounds before the first that counts.
        rounds: that count.
    """

    batch_size: int = 128
    warmup: int = 3
    rounds: int = 15

    def __post_init__(self) -> None:
        at_least("cost", {"batch_size": self.batch_size, "rounds": self.rounds}, 1)
        at_least("cost", {"warmup": self.warmup}, 0)


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How much is probed.

    Attributes:
        spans: of each length, leave out so many runs of blocks alone, those between whose ends the
            angular distance is smallest; 0 leaves out every run.
    """

    spans: int = 0

    def __post_init__(self) -> None:
        at_least("probing", {"spans": self.spans}, 0)


# How a study is run and what is told about it meanwhile: nothing here decides a number.


@dataclass(frozen=True, kw_only=True)
class Slurm:
    """What each job of ``--executor slurm`` asks the cluster for; what is left out, it decides.

    Attributes:
        partition: where the jobs run.
        account: who pays.
        minutes: a job's time limit: one that reaches it is queued again and goes on.
        gpus: of a job.
        cpus: of a job.
        memory_gb: of a job.
        setup: lines of shell that a job runs first.
    """

    partition: str | None = None
    account: str | None = None
    minutes: int = 720
    gpus: int = 1
    cpus: int = 4
    memory_gb: int = 32
    setup: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = {"minutes": self.minutes, "cpus": self.cpus, "memory_gb": self.memory_gb}
        at_least("slurm", sizes, 1)
        at_least("slurm", {"gpus": self.gpus}, 0)


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """Where trainings are told to while they run.

    Attributes:
        to: names of accelerate's trackers: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``, ...
    """

    to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.to)) != len(self.to):
            raise BadInput("tracking.to", ",".join(self.to), "each tracker once")


# The methods' names, and the settings that each name stands for.
#
# A trained method may be named once more with a selection of blocks or a variant of the study
# behind
# a colon: ``heal:ends``, ``distill:cos``. Both are then methods of their own, beside each other.

# what needs no training but the teacher's
PROBES = (
    "early-exit",
    "early-exit-raw",
    "readout",
    "tuned-lens",
    "skip",
    "span",
    "interval",
    "greedy",
    "drop-attention",
    "drop-mlp",
    "replace",
    "similarity",
    "taylor",
    "settling",
)
# shallower models, each trained
TRAINED = ("finetune", "heal", "distill", "elastic", "random-init", "random-selection")
METHODS = ("popularity", "sasrec", "full", *PROBES, *TRAINED)
DEFAULT_METHODS = ("popularity", "sasrec", "full", "early-exit", "skip", "finetune", "distill")
# those for which it matters which blocks stay, and that don't say so by their name
SELECTED = ("finetune", "heal", "distill")
NAMEABLE = tuple(name for name in SELECTIONS if name not in ("prefix", "random"))
ASKED = ("angular", "greedy")  # selections that the teacher decides
NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@dataclass(frozen=True)
class Settings:
    """What a method's name stands for in a study."""

    base: str  # the method before the colon
    select: str
    layers: str  # depths
    recipe: Recipe
    distillation: Distillation
    elastic: Elastic

    @property
    def fresh(self) -> bool:
        """Whether the blocks begin without their pretraining."""
        random = self.base == "distill" and self.distillation.init == "random"
        return random or self.base == "random-init"

    @property
    def asks_teacher(self) -> bool:
        """Whether the teacher must be trained before: to be cut, followed, or asked for blocks."""
        return self.select in ASKED or self.base in ("heal", "distill")


def base_of(method: str) -> str:
    """The method before the colon.

    >>> base_of("distill:cos"), base_of("skip")
    ('distill', 'skip')
    """
    return method.partition(":")[0]


def settings_of(study: Study, method: str) -> Settings:
    """The settings of one of the study's methods; the teacher's for what trains nothing."""
    base, _, name = method.partition(":")
    variant = study.variants.get(name, Variant(select=name if name in NAMEABLE else "prefix"))
    recipe = variant.recipe or study.recipe
    if base == "heal" and variant.recipe is None:
        recipe = replace(recipe, epochs=max(1, round(study.heal.share * recipe.epochs)))
    return Settings(
        base=base,
        select="random" if base == "random-selection" else variant.select,
        layers=variant.layers or study.layers,
        recipe=recipe,
        distillation=variant.distillation or study.distillation,
        elastic=variant.elastic or study.elastic,
    )


def check_methods(methods: tuple[str, ...], variants: Mapping[str, Variant]) -> None:
    """Refuse names that stand for nothing.

    Raises:
        BadInput: for a name that is no method, selection or variant, or is there twice.
    """
    for name in variants:
        if not NAME.fullmatch(name) or name in SELECTIONS:
            allowed = "a name of a-z, 0-9 and single dashes that is no selection of blocks"
            raise BadInput("variants", name, allowed)
    if not methods:
        raise BadInput("methods", "", f"at least one of {', '.join(METHODS)}")
    for method in methods:
        base, colon, name = method.partition(":")
        if base not in METHODS:
            raise BadInput("methods", method, nearest(base, METHODS))
        if not colon:
            continue
        if base not in TRAINED:
            allowed = f"a name behind the colon with {', '.join(TRAINED)} alone"
            raise BadInput("methods", method, allowed)
        known = (*(NAMEABLE if base in SELECTED else ()), *variants)
        if name not in known:
            allowed = nearest(name, known) if known else f"{base} alone: the study has no variants"
            raise BadInput("methods", method, allowed)
        if base not in SELECTED and variants[name].select != "prefix":
            raise BadInput("methods", method, f"a variant without select: {base} has its own")
    if len(set(methods)) != len(methods):
        raise BadInput("methods", ",".join(methods), "each method once")


# A study: one question, all its settings, each checked when it is made.

# settings and tables that change no trial's numbers: a run may be continued with others
NOT_DECIDING = frozenset(
    {
        "name",
        "device",
        "cache",
        "methods",
        "protocol.user_slices",
        "protocol.item_slices",
        "slurm",
        "tracking",
    }
)
ITEM_TABLES = ("sasrec", "text", "learned")


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question: which depths of which backbone, on which log, by which methods.

    Attributes:
        name: of the run's folder and in the report; the file's by default.
        layers: depths, that is how many blocks are kept: ``1,2,4``, ``1-12``, ``all``, or ``auto``
            (1, 2, 4, 8, ...).
        methods: what is compared.
        seeds: every training is repeated with seeds 0 to N - 1.
        budget: every model is trained for the same ``steps``, or with the same ``compute``: a
            shallower one then for more epochs, in the ratio of their FLOPs, and ``elastic`` with
            that of all depths together.
        device: where to compute.
        cache: a folder whose trainings several runs share: one that has been done before, equal in
            all that decides it, is not done again.
        item_table: where the item embeddings come from: ``sasrec`` (trained first), ``text``
            (titles through the backbone), a ``.npy`` file with a row an item, or ``learned``
            (random ones, trained with the recommender).
        item_width: of a ``learned`` table.
        train_items: train another table, too.
        data: the log.
        backbone: the pretrained decoder.
        sasrec: the baseline.
        recipe: how the teacher, the variants and the students are trained.
        heal: how ``heal`` goes on.
        distillation: the losses of ``distill``.
        elastic: the settings of ``elastic``.
        variants: other settings, by their names.
        probing: how much is probed.
        protocol: how accuracy is measured.
        cost: how time is measured.
        slurm: the jobs of ``--executor slurm``.
        tracking: who is told.
    """

    name: str = "study"
    layers: str = "auto"
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: int = 2
    budget: Literal["steps", "compute"] = "steps"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    cache: str | None = None
    item_table: str = "sasrec"
    item_width: int = 64
    train_items: bool = False
    data: Data = Data()
    backbone: Backbone = Backbone()
    sasrec: SasRecSettings = SasRecSettings()
    recipe: Recipe = Recipe()
    heal: Heal = Heal()
    distillation: Distillation = Distillation()
    elastic: Elastic = Elastic()
    variants: Mapping[str, Variant] = field(default_factory=dict)
    probing: Probing = Probing()
    protocol: Protocol = Protocol()
    cost: Cost = Cost()
    slurm: Slurm = Slurm()
    tracking: Tracking = Tracking()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise BadInput("seeds", self.seeds, "a whole number of at least 1")
        named = self.item_table in ITEM_TABLES
        if not named and not self.item_table.endswith(".npy"):
            raise BadInput("item_table", self.item_table, "sasrec, text, learned, or a .npy file")
        if self.item_width < 1:
            raise BadInput("item_width", self.item_width, "a whole number of at least 1")
        one_of("budget", self.budget, ("steps", "compute"))
        check_methods(self.methods, self.variants)
        recipes = {"recipe": self.recipe} | {
            f"variants.{name}.recipe": variant.recipe
            for name, variant in self.variants.items()
            if variant.recipe is not None
        }
        for owner, recipe in recipes.items():
            if self.backbone.suffix and recipe.objective != "last":
                allowed = f"with {owner}.objective = last alone: it follows the last item"
                raise BadInput("backbone.suffix", self.backbone.suffix, allowed)
        parse_layers(self.layers, None)
        if self.backbone.quantize != "none":
            self._check_quantized()

    @property
    def trains_items(self) -> bool:
        """Whether the item table is trained with the recommender."""
        return self.train_items or self.item_table == "learned"

    def _check_quantized(self) -> None:
        chosen = self.backbone.quantize
        if self.device not in {"auto", "cuda"}:
            raise BadInput("backbone.quantize", chosen, f"device = cuda, not {self.device}")
        for name in self.methods:
            if settings_of(self, name).fresh:
                allowed = f"methods without {name}: nothing pretrained is left to quantise"
                raise BadInput("backbone.quantize", chosen, allowed)

    def digest(self) -> str:
        """Hash of everything that decides the numbers of a trial."""
        content = asdict(self)
        for name in NOT_DECIDING:
            owner, _, key = name.rpartition(".")
            (content[owner] if owner else content).pop(key)
        content = {key: _canonical(value) for key, value in content.items()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(value: object) -> object:
    """Settings in which 1 and 1.0 are the same."""
    if isinstance(value, dict):
        return {key: _canonical(each) for key, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Studies as TOML and as plain values; what is wrong in one is named by its key.

T = TypeVar("T")


def load_study(path: str | Path) -> Study:
    """Read a study file (TOML); keys that are absent keep their defaults.

    Raises:
        BadInput: for a file that can't be read, an unknown key, or a value of the wrong type.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("study", str(path), "a TOML file that exists") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("study", str(path), f"a readable TOML file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput("study", str(path), f"valid TOML ({error})") from None
    return study_from_dict({"name": file.stem, **content})


def demo_study() -> Study:
    """The embedded default: what ``depthprobe sweep`` runs without arguments."""
    text = resources.files("depthprobe").joinpath("demo.toml").read_text(encoding="utf-8")
    return study_from_dict(tomllib.loads(text))


def study_from_dict(content: Mapping[str, Any]) -> Study:
    """The study that ``study_to_dict`` wrote; unknown keys and wrong types are BadInput.

    What a variant's table leaves out is what the study's own table of that name says.
    """
    variants = content.get("variants")
    if isinstance(variants, Mapping):
        inherited = {name: _inherit(table, content) for name, table in variants.items()}
        content = {**content, "variants": inherited}
    return _build(Study, content, "")


def _inherit(variant: Any, study: Mapping[str, Any]) -> Any:
    if not isinstance(variant, Mapping):
        return variant
    return {
        key: {**study.get(key, {}), **value} if isinstance(value, Mapping) else value
        for key, value in variant.items()
    }


def study_to_dict(study: Study) -> dict[str, Any]:
    """Plain values (strings, numbers, lists, dicts), None left out as TOML has no null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast("dict[str, Any]", plain(asdict(study)))


def study_to_toml(study: Study) -> str:
    """The whole study as TOML, defaults written out, so that a run says all that it used."""
    lines: list[str] = []

    def write(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if not isinstance(value, dict):
                # JSON's strings, numbers, booleans and lists are TOML's too, but for delete
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{key} = {text}")
        for key, value in table.items():
            if isinstance(value, dict) and (value or prefix):
                lines.extend(["", f"[{prefix}{key}]"])
                write(value, f"{prefix}{key}.")

    write(study_to_dict(study), "")
    return "\n".join(lines) + "\n"


def differences(old: Study, new: Study) -> list[str]:
    """``field: old -> new`` for every setting that differs and decides the numbers.

    A variant that one of them alone has is no difference: it changes no trial of the other.
    """

    def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in table.items():
            out |= (
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return out

    common = old.variants.keys() & new.variants.keys()
    before, after = (
        flat(asdict(study) | {"variants": {name: asdict(study.variants[name]) for name in common}})
        for study in (old, new)
    )
    return [
        f"{key}: {short(before.get(key))} -> {short(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
        and NOT_DECIDING.isdisjoint({key, key.partition(".")[0]})  # a setting, or its table
    ]


def override(study: Study, **changes: Any) -> Study:
    """A study with dotted fields replaced, e.g. ``{"data.cleaning.core": 5}``; None is skipped."""
    for key, value in changes.items():
        if value is not None:
            study = _with(study, key, value)
    return study


def _with(settings: T, key: str, value: Any) -> T:
    name, _, rest = key.partition(".")
    if rest:
        value = _with(getattr(settings, name), rest, value)
    return replace(settings, **{name: value})  # type: ignore[type-var]


def _build(kind: type[T], content: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise BadInput(f"study key {prefix}{key}", value, nearest(key, known))
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    return kind(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise BadInput(name, value, f"a table [{name}]")
        return _build(typing.cast("type[Any]", hint), value, f"{name}.")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise BadInput(name, value, f"one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise BadInput(name, value, "a list of strings")
        return tuple(value)
    if origin in {dict, Mapping}:
        if not isinstance(value, Mapping):
            raise BadInput(name, value, f"a table [{name}]")
        return {key: _convert(options[1], each, f"{name}.{key}") for key, each in value.items()}
    if origin in {typing.Union, types.UnionType}:
        hint = next(option for option in options if option is not type(None))
        return _convert(hint, value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BadInput(name, value, f"a value of type {hint.__name__}")
    return value
