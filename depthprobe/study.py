"""What to run: a study and its settings, dataclasses that are checked when they are made.

Types and bounds stand in the annotations, and msgspec checks them; what a key means stands beside
it as ``#:``, and docs/study-file.md is made of that. An error names the whole key:
``sasrec.recipe.epochs: expected a whole number of at least 1, got 0``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from functools import cache
from importlib import resources
from pathlib import Path
from stat import S_ISFIFO, S_ISREG
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from depthprobe.errors import BadInput, nearest, short
from depthprobe.methods import METHODS, Method, base_of, method_info, method_of, names

T = TypeVar("T")
# every number has both bounds: a run can only be read again, and end, with what they allow
Count = Annotated[int, Meta(ge=1, le=1_000_000)]
CountOrNone = Annotated[int, Meta(ge=0, le=1_000_000)]
Many = Annotated[int, Meta(ge=1, le=10**9)]  # of which nothing is made
Few = Annotated[int, Meta(ge=1, le=1000)]  # seeds, blocks, parts of a step
Width = Annotated[int, Meta(ge=1, le=65_536)]
# a line of a job's script would end, and the rest be a command
Printable = Annotated[str, Meta(pattern=r"^[^\x00-\x1f\x7f]*\Z")]
Rate = Annotated[float, Meta(gt=0, lt=10)]
Weight = Annotated[float, Meta(ge=0, le=10**9)]
Share = Annotated[float, Meta(ge=0, lt=1)]

FIND = "find"  # instead of depths
OWN = "own"  # instead of an item table
# the function that builds a recommender of the user's own: module:function
OWN_SOURCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
PROMPT = "Purchase history:"
TITLE = "{title}"  # its place in a template
# transformers' own; any other name would be that of a kernel, that is code, to fetch from a hub
Quantization = Literal["none", "8bit", "4bit"]
Attention = Literal[
    "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
]
ATTENTIONS, QUANTIZATIONS = typing.get_args(Attention), typing.get_args(Quantization)
# which blocks stay: those that turn the trained teacher's states most, one by one, or those outside
# the run that turns them least; those that greedy removal leaves; the first and the last, or some
# spread evenly; the first ones, or a random choice
STATE_SELECTIONS = ("influence", "angular")
TEACHER_SELECTIONS = (*STATE_SELECTIONS, "greedy")  # that the trained teacher decides
NAMED_SELECTIONS = ("ends", "interval", *TEACHER_SELECTIONS)  # that may follow a method's colon
SELECTIONS = ("prefix", *NAMED_SELECTIONS, "random")
ITEM_TABLES = re.compile(r"sasrec|learned|own|text(:[1-9][0-9]{0,3})?(:last)?|.*\.npy", re.DOTALL)
DEFAULT_METHODS = tuple(name for name, method in METHODS.items() if method.default)
# settings and tables that change no trial's numbers: a run may be continued with others
NOT_DECIDING = frozenset(
    {
        *("name", "device", "cache", "methods", "slurm", "tracking"),
        *("seeds", "protocol.user_slices", "protocol.item_slices", "cost.seconds"),
        *("search.method", "search.hours"),
        *("protocol.margin", "protocol.level", "protocol.metric", "protocol.resamples"),
    }
)
# settings of the backbone that a recommender of the user's own decides itself
OWN_DECIDES = (
    *("revision", "trust_remote_code", "dtype", "attention", "quantize", "prompt", "suffix"),
    *("reads", "head"),
)
GONE = {"accumulation": 1}  # keys that runs of earlier versions have, at what means nothing now
VARIANT_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
LARGEST_FILE = 10_000_000  # bytes of a study file
MOST_BLOCKS = 10_000  # of any backbone
MOST_VARIANTS = 1000
LONGEST_TEXT = 20_000  # characters
# a key of so many parts would keep Python's reader busy for hours
LONG_KEY = re.compile(r"""(?<![\w-])(("[^"\n]*"|'[^'\n]*'|[\w-]++)[ \t]*\.[ \t]*){50}""")
HALVES = re.compile(r"[\ud800-\udfff]")  # of characters: no text in UTF-8 holds any
WORDS = {  # msgspec's, and ours
    "`float | array`": "a number, or a list of numbers",
    "`array`": "a list of strings",
    "`bool`": "true or false",
    "Number out of range": "a finite number",
    "`int`": "a whole number",
    "`float`": "a number",
    "`str`": "text",
    " >=": " of at least",
    " <=": " of at most",
    " >": " above",
    " <": " below",
}


@cache
def _hints(kind: Any) -> dict[str, Any]:
    found = typing.get_type_hints(kind, include_extras=True)
    return {each.name: found[each.name] for each in fields(kind)}


def _expected(hint: Any, message: str) -> str:
    """What msgspec expected, in our words."""
    for each in (hint, *typing.get_args(hint)):
        if typing.get_origin(each) is Literal:
            return f"one of {', '.join(typing.get_args(each))}"
        if typing.get_origin(each) is tuple and str in typing.get_args(each):
            return WORDS["`array`"]
    text = message.removeprefix("Expected ").partition(", got")[0].partition(" - at")[0]
    text = text.replace(" | null", "")
    if "matching regex" in text:
        return "text in one line"
    for theirs, ours in WORDS.items():
        text = text.replace(theirs, ours)
    return text


class Checked:
    """A dataclass whose values are converted to its annotations, or refused, when it is made."""

    def __post_init__(self) -> None:
        """Hold each value against its annotation.

        Raises:
            BadInput: that names the first that does not fit, and what is allowed.
        """
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if is_dataclass(value) or name == "variants":
                continue  # checked when it was made
            if isinstance(value, float) and not math.isfinite(value):
                raise BadInput(name, value, "a finite number")
            for text in value if isinstance(value, tuple | list) else (value,):
                if isinstance(text, str) and (HALVES.search(text) or len(text) > LONGEST_TEXT):
                    allowed = f"at most {LONGEST_TEXT:,} characters that UTF-8 can hold"
                    raise BadInput(name, text, allowed)
            try:
                object.__setattr__(self, name, msgspec.convert(value, hint))
            except msgspec.ValidationError as error:
                raise BadInput(name, value, _expected(hint, str(error))) from None


@dataclass(frozen=True, kw_only=True)
class Columns(Checked):
    """Which columns of a table hold what; those left out are guessed from common spellings.

    A column is named as the table's header names it, or by its number from 1 in a CSV without a
    header. A log needs a user and an item column.
    """

    user: str | None = None  #: the column of users.
    item: str | None = None  #: the column of items.
    time: str | None = None  #: the column of times; a log may have none.
    rating: str | None = None  #: the column of ratings; needed by ``min_rating`` alone.
    title: str | None = None  #: the column of the items' titles.
    #: how the times are written, in the codes of Python's ``strptime``: ``%d/%m/%Y %H:%M``; by
    #: default numbers, or ISO dates and times.
    time_format: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.time_format is not None:
            try:
                example = datetime(2024, 5, 31).strftime(self.time_format)
                year = datetime.strptime(example, self.time_format).year
            except ValueError:  # a code that is none
                year = None
            if year != 2024:
                allowed = "codes of strptime with a year among them, as %d/%m/%Y"
                raise BadInput("time_format", self.time_format, allowed)

    def given(self) -> dict[str, str]:
        """The columns that were named, by what they hold."""
        named = {what: name for what, name in asdict(self).items() if name is not None}
        named.pop("time_format", None)
        return named


@dataclass(frozen=True, kw_only=True)
class Cleaning(Checked):
    """Which interactions to keep. The steps run in the order of the keys."""

    #: drop interactions rated lower.
    min_rating: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None
    #: if a user has an item more than once, keep all of them, the first, or the last.
    repeats: Literal["keep", "first", "last"] = "keep"
    latest: Many | None = None  #: keep each user's latest N.
    #: drop users and items with fewer interactions, and repeat until all have enough (k-core); 1
    #: drops nothing.
    core: Many = 1
    users: Many | None = None  #: keep N users, drawn at random: to try a large log out.


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
    """Where the interactions come from, what to drop, how much of a history a model reads."""

    #: a log (file or folder), a prepared folder, the name of a public set, or ``embedded``; a path
    #: is relative to where the command runs.
    source: str = "embedded"
    #: a format that ``depthprobe data list`` names; by default it is detected.
    format: str | None = None
    #: a file with the items' titles; by default it is looked for beside the log.
    items: str | None = None
    #: read at most this many of a user's latest items.
    max_history: Annotated[int, Meta(ge=1, le=100_000)] = 50
    #: the order of a user's interactions at the same time: ``random``, as in the ``file``, or by
    #: ``item`` id; a prepared folder keeps its order.
    ties: Literal["random", "file", "item"] = "random"
    ties_seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0  #: the seed of the random order.
    columns: Columns = Columns()  #: names of a table's columns.
    cleaning: Cleaning = Cleaning()  #: what to drop.


@dataclass(frozen=True, kw_only=True)
class Backbone(Checked):
    """The pretrained decoder, which of its weights to train, and the prompt before the items."""

    #: a folder with ``config.json`` and safetensors weights, a Hugging Face id, or ``embedded``; or
    #: a trained recommender of your own, by the function that builds it: ``module:function``.
    source: str = "embedded"
    revision: str | None = None  #: the branch, tag or commit of a Hugging Face id.
    #: run Python code that comes with the model; needs a ``revision``.
    trust_remote_code: bool = False
    #: the precision of the weights; ``auto`` is the checkpoint's.
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    #: the implementation of attention; ``auto`` leaves the choice to transformers.
    attention: Attention = "auto"
    #: store the weights of the blocks in fewer bits; needs a GPU, bitsandbytes, and ``tuning``
    #: ``lora`` or ``frozen``.
    quantize: Quantization = "none"
    #: train every weight of the blocks (``full``), low-rank updates of some of their linear maps
    #: (``lora``), or the adapters alone (``frozen``).
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: Width = 16  #: the rank of those updates.
    #: which maps they update: ``mlp`` (as SLMRec does), ``attention``, ``all``, or names such as
    #: ``q_proj`` or ``mlp.up_proj``.
    lora_targets: tuple[str, ...] = ("mlp",)
    prompt: str = PROMPT  #: what the model reads before the items; may be empty.
    #: how an item of a history is read: as one vector, its row of the item table through an
    #: adapter (``items``, as SLMRec does), or as the tokens of its title (``titles``). The item
    #: table scores the items either way.
    reads: Literal["items", "titles"] = "items"
    title_tokens: Count = 16  #: with ``titles``: read at most this many tokens of a title.
    title_template: str = "{title}\n"  #: with ``titles``: the text of an item.
    #: what the model reads after the items, such as SLMRec's response prompt; needs the objective
    #: ``last``.
    suffix: str = ""
    #: score by the dot product with the item table (``dot``, SLMRec), or by a linear map from the
    #: last state to the items (``linear``, E4SRec).
    head: Literal["dot", "linear"] = "dot"
    #: recompute the blocks' activations in the backward pass: less memory, more time, the same
    #: numbers.
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != "none" and self.tuning == "full":
            allowed = "tuning = lora or frozen beside it (quantised weights can't be trained)"
            raise BadInput("quantize", self.quantize, allowed)
        if not self.lora_targets or "" in self.lora_targets:
            raise BadInput("lora_targets", self.lora_targets, "mlp, attention, all, or names")
        if self.trust_remote_code and not self.revision:
            raise BadInput("revision", None, "a pinned revision for remote code")
        if self.title_template.count(TITLE) != 1:
            raise BadInput("title_template", self.title_template, f"a text with {TITLE} in it once")

        if self.own:
            for name in OWN_DECIDES:
                if getattr(self, name) != getattr(type(self), name):
                    allowed = f"nothing beside source = {self.source} (it decides that itself)"
                    raise BadInput(name, getattr(self, name), allowed)

    @property
    def own(self) -> bool:
        """Whether the source is a recommender of the user's own."""
        return bool(OWN_SOURCE.fullmatch(self.source))

    @property
    def reads_titles(self) -> bool:
        """Whether histories are read in words."""
        return self.reads == "titles"


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
    """How a model is trained: AdamW, cosine with warm-up, early stopping on validation NDCG@10."""

    epochs: Count = 6  #: maximum number of passes over the training data.
    #: users (windows of a history) per step.
    batch_size: Count = 128
    #: the peak learning rate. Given a list, every model tries each rate at seed 0 and keeps the one
    #: with the best validation NDCG@10 for all seeds.
    learning_rate: Rate | tuple[Rate, ...] = 1e-3
    weight_decay: Weight = 0.01  #: AdamW's weight decay.
    warmup: Share = 0.1  #: the share of the steps in which the learning rate rises.
    clip: Annotated[float, Meta(gt=0, le=1e12)] = 1.0  #: the norm at which gradients are clipped.
    patience: Many = 3  #: stop after this many epochs without a better validation NDCG@10.
    #: predict the next item at ``every`` position of a history, or only at the ``last`` (one
    #: target per user, as SLMRec does).
    objective: Literal["every", "last"] = "every"
    #: cross-entropy over the whole catalogue (``full``); over the target and random items, drawn
    #: for each target (``sampled-softmax``) or once a step (``shared-softmax``, the cheapest on a
    #: CPU); or gSASRec's binary cross-entropy (``gbce``).
    loss: Literal["full", "sampled-softmax", "shared-softmax", "gbce"] = "full"
    #: how many random items a sampled loss draws.
    negatives: Count = 256
    gbce_t: Annotated[float, Meta(ge=0, le=1)] = 0.75  #: the calibration of ``gbce``, from 0 to 1.
    #: compute a batch in parts of at most this many positions: items, or tokens of titles. ``0``
    #: is 1,024 on a CPU, where larger parts take more memory and no less time, and 8,192 on a GPU.
    tokens: CountOrNone = 0
    #: 1 makes the batches random. With more, windows are sorted by length within this many
    #: batches: less padding, but a step sees windows of one length, and the model is worse.
    pool: Count = 1
    #: the precision in which blocks compute; the weights keep their own. ``auto`` is bfloat16 for a
    #: backbone of 20 million parameters or more on hardware that supports it.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: bool = False  #: use ``torch.compile``.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rates or len(set(self.rates)) < len(self.rates):
            allowed = "a number, or a list of different ones"
            raise BadInput("learning_rate", self.learning_rate, allowed)

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try; one where there is nothing to choose."""
        rates = self.learning_rate
        return rates if isinstance(rates, tuple) else (rates,)

    def positions_on(self, device: str) -> int:
        """How many positions of a batch are computed at once on a kind of device."""
        return self.tokens or (1024 if device == "cpu" else 8192)


@dataclass(frozen=True, kw_only=True)
class SasRecRecipe(Recipe):
    """SASRec's own defaults: it trains longer, and faster."""

    epochs: Count = 80
    learning_rate: Rate | tuple[Rate, ...] = 2e-3
    patience: Many = 8


@dataclass(frozen=True, kw_only=True)
class SasRecSettings(Checked):
    """The non-LLM baseline, and where the item embeddings come from (Kang and McAuley, 2018)."""

    #: the width of its states and of its item table.
    width: Width = 64
    blocks: Few = 2  #: its number of blocks.
    #: its number of attention heads; must divide ``width``.
    heads: Width = 1
    dropout: Share = 0.5  #: the dropout of its states in training.
    recipe: SasRecRecipe = SasRecRecipe()  #: how it is trained.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise BadInput("width", self.width, f"a multiple of heads ({self.heads})")


@dataclass(frozen=True, kw_only=True)
class Heal(Checked):
    """How a cut teacher is trained further."""

    share: Annotated[float, Meta(gt=0, le=1)] = 0.5  #: the share of the recipe's epochs.


@dataclass(frozen=True, kw_only=True)
class Distillation(Checked):
    """A student's loss: ``ce CE + cosine D_cos + norm D_norm + supervision L_ms + logits KL``.

    The first four are SLMRec's.
    """

    #: cut teacher and student into this many groups of blocks; compare them where groups end.
    groups: Few = 4
    ce: Weight = 1.0  #: weight of the recipe's own loss.
    cosine: Weight = 1.0  #: weight of 1 - cos of the two states.
    norm: Weight = 0.1  #: weight of their distance.
    #: weight of the loss of recommending from inner groups; needs no teacher.
    supervision: Weight = 0.1
    #: weight of the divergence from the teacher's distribution over the catalogue.
    logits: Weight = 0.0
    #: the distance of two states (``distance``, as SLMRec does), or its square divided by their
    #: width (``squared``), which does not grow with the width.
    norm_form: Literal["distance", "squared"] = "distance"
    #: compare states wherever the recipe predicts an item (``asked``), or only at the last item
    #: (``last``, as SLMRec does).
    positions: Literal["asked", "last"] = "asked"
    #: the temperature of the distributions that ``logits`` compares.
    temperature: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0
    top: CountOrNone = 0  #: compare only the scores of the teacher's best N items; 0: all.
    #: the student begins as the pretrained ``backbone``, as the trained ``teacher``, or at
    #: ``random``.
    init: Literal["backbone", "teacher", "random"] = "backbone"
    #: compute the teacher's outputs once and keep them on disk (``cached``), or anew at every step
    #: (``online``).
    features: Literal["cached", "online"] = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ce or self.cosine or self.norm or self.supervision or self.logits):
            raise BadInput("ce", self.ce, "a loss with a weight above 0")

    @property
    def follows_states(self) -> bool:
        """Whether the teacher's states are needed."""
        return bool(self.cosine or self.norm)


@dataclass(frozen=True, kw_only=True)
class Elastic(Checked):
    """One model for every depth (LayerSkip, arXiv 2404.16710).

    A step leaves out block l with probability ``dropout (2^(l / (L - 1)) - 1)``: never the first
    block, the last one with probability ``dropout``. Its loss is that of the whole model plus
    ``weight`` times the mean loss of ``exits`` shallower ones, whose depths are drawn at each step.
    """

    dropout: Share = 0.1  #: the probability that the last block is left out of a step.
    exits: Few = 1  #: the number of shallower losses in a step.
    weight: Weight = 1.0  #: the weight of their mean.


@dataclass(frozen=True, kw_only=True)
class Variant(Checked):
    """Settings under a name: ``distill:NAME`` is ``distill`` with these in place of the study's.

    What a variant's table leaves out is what the study's own table of that name says.
    """

    #: which blocks stay: ``prefix`` (the first), ``ends``, ``interval``, ``influence``,
    #: ``angular``, ``greedy``, ``random``, or their indices, as ``0,1,10-11``.
    select: str = "prefix"
    layers: str | None = None  #: depths other than the study's.
    #: keep this share of the MLP channels and attention heads of every block.
    width: Annotated[float, Meta(gt=0, le=1)] = 1.0
    #: which of them: those that hand on the most in the trained teacher (``activation``), or whose
    #: weights matter the most to its loss (``taylor``).
    importance: Literal["activation", "taylor"] = "activation"
    #: apply the kept blocks this many times in turn, with the same weights.
    loops: Annotated[int, Meta(ge=1, le=16)] = 1
    #: ``heal`` alone: cut and heal in turn, removing at most this share of the blocks that are left
    #: at a time; 1 removes all at once.
    at_once: Annotated[float, Meta(gt=0, le=1)] = 1.0
    recipe: Recipe | None = None  #: how it is trained.
    distillation: Distillation | None = None  #: the losses of ``distill:NAME``.
    elastic: Elastic | None = None  #: the settings of ``elastic:NAME``.

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in SELECTIONS:
            parse_blocks(self.select)
        if self.layers is not None:
            parse_layers(self.layers, None)
        if self.loops > 1 and self.at_once < 1:
            raise BadInput("loops", self.loops, "1 beside at_once (looped blocks can't be cut)")

    @property
    def reshapes(self) -> bool:
        """Whether its blocks are others than the teacher's: narrower, or applied again."""
        return self.width < 1 or self.loops > 1


@dataclass(frozen=True, kw_only=True)
class Protocol(Checked):
    """How accuracy is measured, and how much of it a shallower model may lose."""

    #: predict each user's last item (``leave-one-out``), what comes after two points in time that
    #: all users share (``temporal``), or what the log's own validation and test files hold
    #: (``given``).
    split: Literal["leave-one-out", "temporal", "given"] = "leave-one-out"
    #: the two points of ``temporal``: dates, or quantiles of the interactions.
    split_at: tuple[str, ...] = ("0.8", "0.9")
    #: leave the items of the history out of the ranking; a target among them is a miss. ``auto``
    #: does so if at most 1 % of the test targets are such repeats.
    filter_seen: bool | Literal["auto"] = "auto"
    sampled: bool = True  #: also report the 999-negative protocol, labelled.
    #: how the sampled protocol draws among the items that a user never took: ``uniform``, or in
    #: proportion to an item's count in training (``popularity``: harder, and an item without
    #: training interactions is never drawn).
    negatives: Literal["uniform", "popularity"] = "uniform"
    #: your own groups of test users, each ``FILE:COLUMN`` of a table of users.
    user_slices: tuple[str, ...] = ()
    #: groups of test users by their target item, each ``FILE:COLUMN`` of a table of items.
    item_slices: tuple[str, ...] = ()
    validation_users: Many = 4096  #: choose the best epoch on at most this many.
    #: the acceptable relative loss of ``metric``.
    margin: Annotated[float, Meta(gt=0, lt=1)] = 0.01
    #: the confidence of the verdict and of all intervals.
    level: Annotated[float, Meta(gt=0.5, lt=1)] = 0.95
    #: the metric of the verdict: any ``HR@K``, ``NDCG@K``, or ``MRR``. Early stopping always uses
    #: validation NDCG@10.
    metric: str = "NDCG@10"
    #: bootstrap draws for the rank correlations of cheap scores; all other intervals have closed
    #: forms.
    resamples: Annotated[int, Meta(ge=100, le=1_000_000)] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"MRR|(HR|NDCG)@[1-9][0-9]{0,5}", self.metric):
            raise BadInput("metric", self.metric, "HR@K or NDCG@K, K from 1, or MRR")
        if len(self.split_at) != 2:
            allowed = "where validation and test begin: two dates, or two quantiles as 0.8,0.9"
            raise BadInput("split_at", ",".join(self.split_at), allowed)


@dataclass(frozen=True, kw_only=True)
class Cost(Checked):
    """How time is measured: one batch of real users, rounds interleaved over the depths."""

    batch_size: Count = 128  #: users in the batch.
    #: maximum number of rounds before timing begins.
    warmup: Annotated[int, Meta(ge=0, le=1_000_000)] = 3
    rounds: Count = 15  #: maximum number of timed rounds.
    #: maximum time in total; one round always runs.
    seconds: Annotated[float, Meta(gt=0, le=1_000_000)] = 60.0


@dataclass(frozen=True, kw_only=True)
class Probing(Checked):
    """How much to probe."""

    #: for each length, try only this many runs of blocks: those with the smallest angular distance
    #: between their ends; 0 tries every run.
    spans: CountOrNone = 0
    #: what the budget of ``mix`` counts, and each depth's whole blocks may take: ``parameters``, or
    #: ``milliseconds`` of encoding on this machine.
    budget: Literal["parameters", "milliseconds"] = "parameters"


@dataclass(frozen=True, kw_only=True)
class Search(Checked):
    """What ``layers = "find"`` searches with, and when it stops.

    It decides by ``protocol.margin`` and ``protocol.level``. A depth gets at most ``seeds`` seeds.
    """

    #: the method that trains the depths; by default the first of ``methods`` that is ``finetune``,
    #: ``heal`` or ``distill``, or one of their variants.
    method: str | None = None
    #: stop before all trainings together take longer; by default when the verdict stands.
    hours: Annotated[float, Meta(gt=0, le=1_000_000)] | None = None


@dataclass(frozen=True, kw_only=True)
class Slurm(Checked):
    """Resources each job on SLURM requests; unset fields use the cluster's defaults."""

    partition: Printable | None = None  #: the SLURM partition of the jobs.
    account: Printable | None = None  #: the SLURM account to charge.
    minutes: Count = 720  #: time limit; a job that reaches it is queued again and continues.
    gpus: Annotated[int, Meta(ge=0, le=10_000)] = 1  #: GPUs of a job.
    cpus: Count = 4  #: CPU cores of a job.
    memory_gb: Count = 32  #: memory of a job.
    setup: tuple[str, ...] = ()  #: lines of shell that a job runs first.


@dataclass(frozen=True, kw_only=True)
class Tracking(Checked):
    """Trackers that follow the trainings while they run."""

    #: names of accelerate's trackers: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``, ...
    to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.to)) != len(self.to):
            raise BadInput("to", ",".join(self.to), "each tracker once")


@dataclass(frozen=True, kw_only=True)
class Study(Checked):
    """One question: which depths of which backbone, on which log, by which methods."""

    name: str = "study"  #: names the run's folder and the report; by default the file's.
    #: depths, that is how many blocks are kept: ``1,2,4``, ``1-12``, ``all``, or ``auto`` (1, 2, 4,
    #: 8, ...). ``find`` searches for the sufficient depth and trains only the depths that decide
    #: it; ``find:1,2,4`` searches among these.
    layers: str = "auto"
    #: the methods to compare.
    methods: tuple[str, ...] = DEFAULT_METHODS
    #: every training is repeated with seeds 0 to N - 1.
    seeds: Few = 2
    #: what to hold constant: training ``steps``, or ``compute``. With ``compute`` a shallower model
    #: trains for more epochs, in proportion to the FLOPs it saves, and ``elastic`` gets the compute
    #: of all depths together.
    budget: Literal["steps", "compute"] = "steps"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  #: where to compute.
    #: a folder through which runs share trainings: one with the same settings is not run again.
    cache: str | None = None
    #: where the item embeddings come from: ``sasrec`` (trained first), ``text`` (titles through the
    #: backbone), a ``.npy`` file with a row per item, or ``learned`` (random ones, trained with the
    #: recommender).
    item_table: str = "sasrec"
    item_width: Width = 64  #: the width of a ``learned`` table.
    train_items: bool = False  #: also train a table that is not ``learned``.
    data: Data = Data()  #: the log.
    backbone: Backbone = Backbone()  #: the pretrained decoder.
    sasrec: SasRecSettings = SasRecSettings()  #: the baseline.
    recipe: Recipe = Recipe()  #: how the teacher, the variants and the students are trained.
    heal: Heal = Heal()  #: how ``heal`` continues the training.
    distillation: Distillation = Distillation()  #: the losses of ``distill``.
    elastic: Elastic = Elastic()  #: the settings of ``elastic``.
    #: named variants of methods.
    variants: Mapping[str, Variant] = field(default_factory=dict)
    probing: Probing = Probing()  #: how much to probe.
    search: Search = Search()  #: how ``layers = "find"`` searches.
    protocol: Protocol = Protocol()  #: how accuracy is measured.
    cost: Cost = Cost()  #: how time is measured.
    slurm: Slurm = Slurm()  #: the jobs of ``--executor slurm``.
    tracking: Tracking = Tracking()  #: trackers to log to.

    def __post_init__(self) -> None:
        super().__post_init__()
        if not ITEM_TABLES.fullmatch(self.item_table):
            allowed = "sasrec, learned, a .npy file, text, or text:K (titles read by K blocks)"
            raise BadInput("item_table", self.item_table, allowed)
        _check_methods(self.methods, self.variants)
        parse_layers(self.layers, None)
        if self.searches:
            _ = self.searched  # refused where no method can be searched with
        recipes = {"recipe": self.recipe} | {
            f"variants.{name}.recipe": variant.recipe
            for name, variant in self.variants.items()
            if variant.recipe is not None
        }
        for owner, recipe in recipes.items():
            if self.backbone.suffix and recipe.objective != "last":
                allowed = f"{owner}.objective = last beside it (it follows the last item)"
                raise BadInput("backbone.suffix", self.backbone.suffix, allowed)
        if self.backbone.own or self.backbone.tuning != "full":
            for name in self.methods:
                if settings_of(self, name).reshapes:
                    key = "source" if self.backbone.own else "tuning"
                    value = getattr(self.backbone, key)
                    allowed = f"tuning = full of a Hugging Face model beside {name} (width, loops)"
                    raise BadInput(f"backbone.{key}", value, allowed)
        own = self.backbone.own
        if own or self.backbone.quantize != "none":
            if self.methods == DEFAULT_METHODS:  # nobody asked for what begins without pretraining
                kept = tuple(n for n in self.methods if not settings_of(self, n).fresh)
                object.__setattr__(self, "methods", kept)
            self._check_pretrained()
        if own or self.item_table == OWN:
            table = OWN if own else "sasrec"  # it brings its own
            object.__setattr__(self, "item_table", table)

    def with_precision(self, precision: Literal["float32", "bfloat16"]) -> Study:
        """The study with what ``auto`` stands for here; ``auto`` of SASRec is float32."""

        def resolved(recipe: Recipe) -> Recipe:
            return replace(recipe, precision=precision) if recipe.precision == "auto" else recipe

        variants = {
            name: variant
            if variant.recipe is None
            else replace(variant, recipe=resolved(variant.recipe))
            for name, variant in self.variants.items()
        }
        return replace(self, recipe=resolved(self.recipe), variants=variants)

    @property
    def searches(self) -> bool:
        """Whether the depths to train are searched for."""
        return self.layers.strip().lower().startswith(FIND)

    @property
    def searched(self) -> str:
        """The method that a search trains depths with.

        Raises:
            BadInput: if the study has none.
        """
        able = [n for n in self.methods if method_of(n).selectable and is_candidate(self, n)]
        wanted = self.search.method
        if not able or (wanted is not None and wanted not in able):
            allowed = f"one of {', '.join(able)}" if able else "finetune, heal or distill beside it"
            field, value = ("search.method", wanted) if able else ("layers", self.layers)
            raise BadInput(field, value, allowed)
        return wanted or able[0]

    @property
    def embeds_titles(self) -> bool:
        """Whether the item table is made from titles, by the backbone."""
        return self.item_table.partition(":")[0] == "text"

    @property
    def title_blocks(self) -> int | None:
        """How many blocks read the titles of an item table of texts; None for all."""
        return next((int(part) for part in self.item_table.split(":") if part.isdigit()), None)

    @property
    def trains_items(self) -> bool:
        """Whether the item table is trained with the recommender."""
        return self.train_items or self.item_table == "learned"

    def _check_pretrained(self) -> None:
        backbone = self.backbone
        if backbone.own:
            for name in self.methods:
                reason = "can be drawn at random" if settings_of(self, name).fresh else ""
                reason = "reads titles" if method_of(name).titles else reason
                reason = "is an item table of ours" if base_of(name) == "int8-items" else reason
                if reason:
                    allowed = f"methods without {name} beside it (none of it {reason})"
                    raise BadInput("backbone.source", backbone.source, allowed)
            if self.cache is not None:
                allowed = f"none beside backbone.source = {backbone.source} (a cache knows weights,"
                raise BadInput("cache", self.cache, f"{allowed} and its code decides too)")
            return
        chosen = backbone.quantize
        if self.device not in {"auto", "cuda"}:
            raise BadInput(
                "backbone.quantize", chosen, f"device = cuda beside it, not {self.device}"
            )
        for name in self.methods:
            reason = (
                "nothing pretrained is left to quantise" if settings_of(self, name).fresh else ""
            )
            reason = "the weights are quantised already" if method_of(name).lever else reason
            if reason:
                allowed = f"methods without {name} beside it ({reason})"
                raise BadInput("backbone.quantize", chosen, allowed)

    def digest(self) -> str:
        """Hash of everything that decides the numbers of a trial."""
        return study_digest(study_to_dict(self))


# --- what a method's name stands for ---------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """What a method's name stands for in a study."""

    method: Method
    select: str
    layers: str  # depths
    recipe: Recipe
    distillation: Distillation
    elastic: Elastic
    width: float
    importance: Literal["activation", "taylor"]
    loops: int
    at_once: float

    @property
    def reshapes(self) -> bool:
        """Whether its blocks are others than the teacher's: narrower, or applied again."""
        return self.width < 1 or self.loops > 1

    @property
    def fresh(self) -> bool:
        """Whether the blocks begin without their pretraining."""
        distils = self.method.settings == "distillation"
        return self.method.fresh or (distils and self.distillation.init == "random")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher must be trained before: to be cut, followed, or to choose by."""
        chosen_by = self.select in TEACHER_SELECTIONS or (self.width < 1 and not self.fresh)
        return chosen_by or "full" in self.method.needs


def settings_of(study: Study, name: str) -> Settings:
    """The settings of one of the study's methods; the teacher's for what trains nothing."""
    method, variant_name = method_of(name), name.partition(":")[2]
    if method.lever and variant_name:  # of the trials that it makes variants of
        return replace(settings_of(study, variant_name), method=method, select="prefix")
    named = Variant(select=variant_name if variant_name in NAMED_SELECTIONS else "prefix")
    variant = study.variants.get(variant_name, named)
    recipe = variant.recipe or (
        study.sasrec.recipe if method.settings == "sasrec" else study.recipe
    )
    if method.settings == "heal" and variant.recipe is None:
        recipe = replace(recipe, epochs=max(1, round(study.heal.share * recipe.epochs)))
    return Settings(
        method=method,
        select=method.select if method.select != "prefix" else variant.select,
        layers=variant.layers or study.layers,
        recipe=recipe,
        distillation=variant.distillation or study.distillation,
        elastic=variant.elastic or study.elastic,
        width=variant.width,
        importance=variant.importance,
        loops=variant.loops,
        at_once=variant.at_once,
    )


def is_candidate(study: Study, name: str) -> bool:
    """Whether a method's depth may be the sufficient one: of blocks as the teacher has them."""
    variant = study.variants.get(name.partition(":")[2])
    return method_info(name).candidate and not (variant is not None and variant.reshapes)


def _check_methods(chosen: tuple[str, ...], variants: Mapping[str, Variant]) -> None:
    if len(variants) > MOST_VARIANTS:
        raise BadInput("variants", len(variants), f"at most {MOST_VARIANTS:,}")
    for name in variants:
        if not VARIANT_NAME.fullmatch(name) or name in SELECTIONS or len(name) > 64:
            allowed = (
                "a name of at most 64 a-z, 0-9 and single dashes that is no selection of blocks"
            )
            raise BadInput("variants", name, allowed)
    if not chosen:
        raise BadInput("methods", "", f"at least one of {', '.join(METHODS)}")
    for full_name in chosen:
        method = method_of(full_name)
        _, colon, name = full_name.partition(":")
        if not colon:
            continue
        if method.lever:
            source = method_of(name)
            if source.exportable != "own" or source.role == "control":
                able = nearest(name, [*names("teacher"), *names("trained")])
                raise BadInput("methods", full_name, f"{method.name}: and {able}")
            _check_methods((name,), variants)
            continue
        if not method.takes_variants:
            able = ", ".join(names("trained", "control"))
            raise BadInput("methods", full_name, f"a name behind the colon with {able} only")
        known = (*(NAMED_SELECTIONS if method.selectable else ()), *variants)
        if name not in known:
            only = f"{method.name} alone (the study has no variants)"
            allowed = f"{method.name}: and {nearest(name, known)}"
            raise BadInput("methods", full_name, allowed if known else only)
        if not method.selectable and variants[name].select != "prefix":
            allowed = f"a variant without select ({method.name} has its own)"
            raise BadInput("methods", full_name, allowed)
        variant = variants.get(name, Variant())
        if method.settings == "elastic" and variant.reshapes:
            allowed = "a variant without width and loops (elastic is one model for every depth)"
            raise BadInput("methods", full_name, allowed)
        if method.settings != "heal" and variant.at_once < 1:
            allowed = f"a variant without at_once ({method.name} does not cut a trained model)"
            raise BadInput("methods", full_name, allowed)
    if len(set(chosen)) != len(chosen):
        raise BadInput("methods", ",".join(chosen), "each method once")


# --- TOML and plain values -------------------------------------------------------------------


def load_study(path: str | Path) -> Study:
    """Read a study file (TOML); keys that are absent keep their defaults.

    Raises:
        BadInput: for a file that can't be read, an unknown key, or a value that is not allowed.
    """
    return study_from_dict(read_study(path))


def read_study(path: str | Path) -> dict[str, Any]:
    """What a study file says, unchecked; by default its name is the file's.

    Raises:
        BadInput: for a file that can't be read, or is no TOML.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
        # what the shell's <(...) gives is a pipe below /dev; to another one nobody may ever write
        if not S_ISREG(mode) and not (S_ISFIFO(mode) and str(file).startswith("/dev/")):
            raise OSError("it is no plain file")
        with file.open("rb") as stream:
            raw = stream.read(LARGEST_FILE + 1)
        if len(raw) > LARGEST_FILE:
            raise OSError(f"it has more than {LARGEST_FILE:,} bytes")
        text = raw.decode("utf-8-sig")
        if LONG_KEY.search(text):
            raise ValueError("a key has too many parts")
        content = tomllib.loads(text)
    except FileNotFoundError:
        raise BadInput("study", str(path), "a TOML file that exists") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("study", str(path), f"a readable TOML file ({error})") from None
    except ValueError as error:  # tomllib's own, and an integer of thousands of digits
        raise BadInput("study", str(path), f"valid TOML ({error})") from None
    except RecursionError:
        raise BadInput("study", str(path), "valid TOML (it is nested too deeply)") from None
    return {"name": file.stem, **content}


def read_demo() -> dict[str, Any]:
    """What the study file of the embedded default says."""
    text = resources.files("depthprobe").joinpath("demo.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def demo_study() -> Study:
    """The embedded default: what ``depthprobe sweep`` runs without arguments."""
    return study_from_dict(read_demo())


def study_from_dict(content: Mapping[str, Any]) -> Study:
    """The study that ``study_to_dict`` wrote; an error names the whole key.

    What a variant's table leaves out is what the study's own table of that name says.
    """
    variants = content.get("variants", {})
    if not isinstance(variants, Mapping):
        raise BadInput("variants", variants, "a table [variants]")
    built = {}
    for name, own in variants.items():
        if isinstance(own, Mapping):
            own = {
                key: {**base, **value}
                if isinstance(value, Mapping) and isinstance(base := content.get(key, {}), Mapping)
                else value
                for key, value in own.items()
            }
        built[name] = _build(Variant, own, f"variants.{name}")
    return _build(Study, {**content, "variants": built}, "")


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


def study_digest(content: Mapping[str, Any]) -> str:
    """Hash of what decides the numbers in a study's plain values, as its file has them."""
    text = json.dumps(_deciding(content), sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _deciding(content: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that decide the numbers, by their whole keys."""
    found: dict[str, Any] = {}

    def collect(table: Mapping[str, Any], prefix: str) -> None:
        for name, value in table.items():
            key = f"{prefix}{name}"
            if key in NOT_DECIDING:
                continue
            if isinstance(value, dict):
                collect(value, f"{key}.")
            else:
                found[key] = value

    collect(content, "")
    return found


def differences(old: Study, new: Study) -> list[str]:
    """``key: old -> new`` for every setting that differs and decides the numbers.

    A variant that one of them alone has is no difference: it changes no trial of the other.
    """
    before, after = _deciding(asdict(old)), _deciding(asdict(new))
    return [
        f"{key}: {short(before.get(key))} -> {short(after.get(key))}"
        for key in before | after
        if before.get(key) != after.get(key)
        and (
            not key.startswith("variants.")
            or key.split(".")[1] in old.variants.keys() & new.variants
        )
    ]


def override(study: Study, **changes: Any) -> Study:
    """A study with dotted keys replaced, e.g. ``{"data.cleaning.core": 5}``; None is skipped."""
    return study_from_dict(with_keys(study_to_dict(study), changes))


def with_keys(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A study's plain values with dotted keys replaced; None is skipped."""
    changed = dict(content)
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        if value is None:
            continue
        table = changed.get(first, {})
        if rest and not isinstance(table, Mapping):
            raise BadInput(first, table, f"a table [{first}]")
        changed[first] = with_keys(table, {rest: value}) if rest else value
    return changed


def parse_setting(text: str) -> tuple[str, Any]:
    """The key and the value of ``recipe.batch_size=64``, as the command line has them.

    A value is written as in TOML, but quotes and brackets may be left out.

    Raises:
        BadInput: if there is no such key; whether the value is allowed, the study says.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not equals or not key:
        raise BadInput("--set", text, "KEY=VALUE, as recipe.batch_size=64")
    hint: Any = Study
    parts = key.split(".")
    for place, name in enumerate(parts):
        table = ".".join(parts[:place])
        known: Mapping[str, Any] = _hints(hint) if is_dataclass(hint) else {}  # type: ignore[arg-type]
        if typing.get_origin(hint) is Mapping:  # of variants any name
            hint = typing.get_args(hint)[1]
        elif name in known:
            hint = known[name]
            if typing.get_origin(hint) is types.UnionType:
                hint = next(filter(is_dataclass, typing.get_args(hint)), hint)
        elif not known:
            raise BadInput("--set", key, f"{table}=VALUE ({table} is no table)")
        else:
            where = f"[{table}]" if table else "a study"
            raise BadInput("--set", key, f"a key of {where}: {nearest(name, known)}")
    if is_dataclass(hint) or typing.get_origin(hint) is Mapping:
        raise BadInput("--set", key, f"a key of its table [{key}], as {key}.KEY")
    kinds = _kinds(hint)
    if tuple not in kinds:
        return key, value if str in kinds else _toml_or_text(value)
    if value.startswith("["):
        return key, _toml_or_text(value)
    pieces = [piece.strip() for piece in value.split(",") if piece.strip()]
    if float not in kinds:
        return key, pieces
    numbers = [_toml_or_text(piece) for piece in pieces]
    return key, numbers[0] if len(numbers) == 1 else numbers


def _kinds(hint: Any) -> set[Any]:
    """The plain types that a value may have: ``{float, tuple}`` of ``Rate | tuple[Rate, ...]``."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return set().union(*map(_kinds, typing.get_args(hint)))
    return _kinds(typing.get_args(hint)[0]) if origin is Annotated else {origin or hint}


def _toml_or_text(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def _build(kind: type[T], content: Any, key: str) -> T:
    """A dataclass of settings from a table; ``key`` is the table's own."""
    if not isinstance(content, Mapping):
        raise BadInput(key, content, f"a table [{key}]")
    prefix, hints = f"{key}." if key else "", _hints(kind)  # type: ignore[arg-type]
    values = {name: value for name, value in content.items() if GONE.get(name) != value}
    for name, value in values.items():
        if name not in hints:
            allowed = f"a key of {f'[{key}]' if key else 'a study'}: {nearest(name, hints)}"
            raise BadInput("study file", f"{prefix}{name}", allowed)
        table = next(filter(is_dataclass, (hints[name], *typing.get_args(hints[name]))), None)
        if table is not None and name != "variants":
            values[name] = _build(table, value, f"{prefix}{name}")  # type: ignore[arg-type]
    try:
        return kind(**values)
    except BadInput as error:  # a table does not know where it stands
        raise error.renamed(prefix + error.field) from None


# --- depths and blocks as people write them --------------------------------------------------


def parse_layers(text: str, blocks: int | None) -> tuple[int, ...]:
    """Depths named by ``1,2,4``, ``1-12`` (both included), ``all`` or ``auto`` (1, 2, 4, ...).

    Those of ``find`` are all that a search may look at.

    Args:
        text: what the user wrote.
        blocks: the backbone's number of blocks; None checks the spelling alone and returns ().

    Raises:
        BadInput: for anything that is not a depth between 1 and ``blocks``.
    """
    top = "the backbone's number of blocks" if blocks is None else blocks
    word = text.strip().lower()
    if word == FIND or word.startswith(f"{FIND}:"):
        return parse_layers(word.partition(":")[2] or "all", blocks)
    if word in {"all", "auto"}:
        every = range(1, (blocks or 0) + 1)
        return tuple(every if word == "all" else (d for d in every[:-1] if d.bit_count() == 1))
    depths = _numbers(text, 1, blocks)
    if not depths:
        raise BadInput("layers", text, f"depths from 1 to {top}, as 1,2,4 or 1-12 or all or find")
    return () if blocks is None else tuple(sorted(set(depths)))


def parse_blocks(text: str, blocks: int | None = None) -> tuple[int, ...]:
    """Block indices named by ``0,1,10-11``, both ends of a range included.

    Args:
        blocks: the backbone's number of blocks, if it is known.

    Raises:
        BadInput: for anything that is not a block from 0 to ``blocks - 1``, in their order.
    """
    top = "the last block" if blocks is None else blocks - 1
    found = _numbers(text, 0, None if blocks is None else blocks - 1)
    if not found or found != sorted(set(found)):
        raise BadInput("select", text, f"blocks from 0 to {top} in their order, as 0,1,10-11")
    return tuple(found)


def _numbers(text: str, low: int, high: int | None) -> list[int]:
    """The numbers of ``1,3-5``; empty where one is not from ``low`` to ``high``."""
    found: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,6})\s*(?:-\s*([0-9]{1,6})\s*)?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if not low <= first <= last or (high is not None and last > high):
            return []
        found += range(first, last + 1)
        if last > MOST_BLOCKS or len(found) > MOST_BLOCKS:
            return []
    return found


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
