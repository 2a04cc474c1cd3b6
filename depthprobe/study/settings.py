"""The settings of a study, each checked when it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from depthprobe.study.errors import BadInput, nearest
from depthprobe.study.layers import parse_layers

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
METHODS = (
    "popularity",
    "sasrec",
    "full",
    *PROBES,
    "finetune",
    "heal",
    "distill",
    "random-init",
)
DEFAULT_METHODS = ("popularity", "sasrec", "full", "early-exit", "skip", "finetune", "distill")
# settings that change no trial's numbers: a run may be continued with others
NOT_DECIDING = frozenset({"name", "device", "methods"})
PROMPT = "Purchase history:"
# the library's own; any other name would be that of a kernel, that is code, to fetch from a hub
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
ITEM_TABLES = ("sasrec", "text", "learned")
QUANTIZATIONS = ("none", "8bit", "4bit")


def _at_least(owner: str, values: Mapping[str, float], low: float) -> None:
    for name, value in values.items():
        if not value >= low or value == float("inf"):
            raise BadInput(f"{owner}.{name}", value, f"a number of at least {low:g}")


def _one_of(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise BadInput(field, value, f"one of {', '.join(allowed)}")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; None guesses from common spellings.

    A column is named as the table's header names it, or by its number from 1 in a CSV without a
    header. A log needs a user and an item column; times and ratings may be absent.
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
    """Which interactions stay, in this order: rating, repeats, latest, core.

    ``min_rating`` drops lower ratings. ``repeats`` of a (user, item) pair are all kept, or the
    first or the last of them. ``latest`` keeps so many of each user's. ``core`` drops users and
    items with fewer interactions, again and again until none is left (k-core).
    """

    min_rating: float | None = None
    repeats: Literal["keep", "first", "last"] = "keep"
    latest: int | None = None
    core: int = 1

    def __post_init__(self) -> None:
        _one_of("data.cleaning.repeats", self.repeats, ("keep", "first", "last"))
        if self.min_rating is not None and not abs(self.min_rating) < float("inf"):
            raise BadInput("data.cleaning.min_rating", self.min_rating, "a number")
        _at_least("data.cleaning", {"core": self.core}, 1)
        if self.latest is not None:
            _at_least("data.cleaning", {"latest": self.latest}, 1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the interactions come from, what is dropped, how much of a history a model reads.

    ``format`` None recognises the log by its content; ``items`` is a file with the items' titles,
    None looks beside the log.
    """

    source: str = "embedded"
    format: str | None = None
    items: str | None = None
    max_history: int = 50
    columns: Columns = Columns()
    cleaning: Cleaning = Cleaning()

    def __post_init__(self) -> None:
        _at_least("data", {"max_history": self.max_history}, 1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The pretrained decoder, what of it is trained, and the prompt before the items.

    ``dtype`` auto and ``attention`` auto follow the checkpoint and transformers. ``quantize``
    stores the weights of the blocks in fewer bits, on a GPU and with bitsandbytes alone.
    ``tuning`` trains every weight of the blocks (``full``), low-rank updates of the MLP
    projections (``lora``, as SLMRec does), or the adapters alone (``frozen``).
    ``suffix`` follows the items, as SLMRec's response prompt does, and needs the objective
    ``last``. ``head`` scores by the dot product with the item table (SLMRec), or by a linear map
    from the last state to the items (E4SRec). ``checkpointing`` computes the blocks again in the
    backward pass in place of keeping their activations.
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
        _at_least("backbone", {"lora_rank": self.lora_rank}, 1)
        _one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        _one_of("backbone.attention", self.attention, ATTENTIONS)
        _one_of("backbone.quantize", self.quantize, QUANTIZATIONS)
        _one_of("backbone.tuning", self.tuning, ("full", "lora", "frozen"))
        _one_of("backbone.head", self.head, ("dot", "linear"))
        if self.quantize != "none" and self.tuning == "full":
            allowed = "tuning = lora or frozen beside it: quantised weights can't be trained"
            raise BadInput("backbone.quantize", self.quantize, allowed)
        if self.trust_remote_code and not self.revision:
            raise BadInput("backbone.revision", None, "remote code needs a pinned revision")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained: AdamW, cosine with warm-up, early stopping on validation NDCG@10.

    ``objective``: the next item at ``every`` position of a history, or at its ``last`` alone (one
    target a user, SLMRec's). ``loss``: cross-entropy over the whole catalogue (``full``), over the
    target and ``negatives`` random items (``sampled-softmax``), or gSASRec's binary one with its
    calibration ``gbce_t`` (``gbce``). ``accumulation`` computes a batch in so many parts, which
    changes its memory and not its result. ``precision`` is what the training computes in, beside
    weights that stay in their own.
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
        _at_least("recipe", whole, 1)
        _at_least("recipe", {"weight_decay": self.weight_decay, "warmup": self.warmup}, 0)
        _one_of("recipe.objective", self.objective, ("every", "last"))
        _one_of("recipe.loss", self.loss, ("full", "sampled-softmax", "gbce"))
        _one_of("recipe.precision", self.precision, ("float32", "bfloat16"))
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
class SasRec:
    """The non-LLM baseline, and where the item embeddings come from (Kang and McAuley, 2018)."""

    width: int = 64
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.5
    recipe: Recipe = Recipe(epochs=16, patience=4, learning_rate=2e-3)

    def __post_init__(self) -> None:
        sizes = {"width": self.width, "blocks": self.blocks, "heads": self.heads}
        _at_least("sasrec", sizes, 1)
        if self.width % self.heads:
            raise BadInput("sasrec.width", self.width, f"a multiple of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise BadInput("sasrec.dropout", self.dropout, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """SLMRec's losses: ``CE + cosine * D_cos + norm * D_norm + supervision * L_ms``."""

    groups: int = 4
    cosine: float = 1.0
    norm: float = 0.1
    supervision: float = 0.1

    def __post_init__(self) -> None:
        _at_least("distillation", {"groups": self.groups}, 1)
        weights = {"cosine": self.cosine, "norm": self.norm, "supervision": self.supervision}
        _at_least("distillation", weights, 0)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How accuracy is measured, and how much of it a shallower model may lose.

    ``split``: ``leave-one-out`` (each user's last item), ``temporal`` (what comes after two points
    in time that all users share, ``split_at``: dates, or quantiles of the interactions), or
    ``given`` (the log came in training, validation and test files).
    """

    split: Literal["leave-one-out", "temporal", "given"] = "leave-one-out"
    split_at: tuple[str, ...] = ("0.8", "0.9")
    filter_seen: bool = True
    sampled: bool = True
    validation_users: int = 4096
    margin: float = 0.01
    resamples: int = 1000

    def __post_init__(self) -> None:
        _at_least("protocol", {"validation_users": self.validation_users}, 1)
        _at_least("protocol", {"resamples": self.resamples}, 100)
        if len(self.split_at) != 2:
            allowed = "where validation and test begin: two dates, or two quantiles as 0.8,0.9"
            raise BadInput("protocol.split_at", ",".join(self.split_at), allowed)
        if not 0 < self.margin < 1:
            raise BadInput("protocol.margin", self.margin, "a share of the accuracy, in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How time is measured: one batch of real users, rounds interleaved over the depths."""

    batch_size: int = 128
    warmup: int = 3
    rounds: int = 15

    def __post_init__(self) -> None:
        _at_least("cost", {"batch_size": self.batch_size, "rounds": self.rounds}, 1)
        _at_least("cost", {"warmup": self.warmup}, 0)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question: which depths of which backbone, on which log, by which methods.

    ``item_table`` is where the item embeddings come from: ``sasrec`` (trained first), ``text``
    (titles through the backbone), a ``.npy`` file with a row an item, or ``learned`` (random ones,
    ``item_width`` wide, trained with the recommender). ``train_items`` trains the others too.
    """

    name: str = "study"
    layers: str = "auto"
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: int = 2
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    item_table: str = "sasrec"
    item_width: int = 64
    train_items: bool = False
    data: Data = Data()
    backbone: Backbone = Backbone()
    sasrec: SasRec = SasRec()
    recipe: Recipe = Recipe()
    distillation: Distillation = Distillation()
    protocol: Protocol = Protocol()
    cost: Cost = Cost()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise BadInput("seeds", self.seeds, "a whole number of at least 1")
        named = self.item_table in ITEM_TABLES
        if not named and not self.item_table.endswith(".npy"):
            raise BadInput("item_table", self.item_table, "sasrec, text, learned, or a .npy file")
        if self.item_width < 1:
            raise BadInput("item_width", self.item_width, "a whole number of at least 1")
        if self.backbone.suffix and self.recipe.objective != "last":
            allowed = "with recipe.objective = last alone: it follows the last item"
            raise BadInput("backbone.suffix", self.backbone.suffix, allowed)
        if not self.methods:
            raise BadInput("methods", "", f"at least one of {', '.join(METHODS)}")
        for name in self.methods:
            if name not in METHODS:
                raise BadInput("methods", name, nearest(name, METHODS))
        if len(set(self.methods)) != len(self.methods):
            raise BadInput("methods", ",".join(self.methods), "each method once")
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
        if "random-init" in self.methods:
            allowed = "methods without random-init: nothing pretrained is left to quantise"
            raise BadInput("backbone.quantize", chosen, allowed)

    def digest(self) -> str:
        """Hash of everything that decides the numbers of a trial."""
        content = {k: v for k, v in asdict(self).items() if k not in NOT_DECIDING}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
