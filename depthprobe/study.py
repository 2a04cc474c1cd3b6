"""What to run: a study and its settings, dataclasses that are checked when they are made.

Types and bounds stand in the annotations; msgspec checks them. An error names the whole key:
``sasrec.recipe.epochs: 0 is not usable; a number of at least 1``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from depthprobe.errors import BadInput, nearest, short
from depthprobe.methods import METHODS, Method, method_of, names

T = TypeVar("T")
Count = Annotated[int, Meta(ge=1, le=10**9)]
CountOrNone = Annotated[int, Meta(ge=0, le=10**9)]
Weight = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, lt=1)]

PROMPT = "Purchase history:"
# transformers' own; any other name would be that of a kernel, that is code, to fetch from a hub
Quantization = Literal["none", "8bit", "4bit"]
Attention = Literal[
    "auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"
]
ATTENTIONS, QUANTIZATIONS = typing.get_args(Attention), typing.get_args(Quantization)
# which blocks stay: the first ones; the first and the last ones; some spread evenly; those outside
# the run that turns the teacher's state least; those that greedy removal leaves; a random choice
SELECTIONS = ("prefix", "ends", "interval", "angular", "greedy", "random")
NAMED_SELECTIONS = ("ends", "interval", "angular", "greedy")  # that may follow a method's colon
TEACHER_SELECTIONS = ("angular", "greedy")  # that the trained teacher decides
ITEM_TABLES = ("sasrec", "text", "learned")
# settings and tables that change no trial's numbers: a run may be continued with others
NOT_DECIDING = frozenset(
    {
        *("name", "device", "cache", "methods", "slurm", "tracking"),
        *("protocol.user_slices", "protocol.item_slices", "cost.seconds"),
    }
)
VARIANT_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


@cache
def _hints(kind: Any) -> dict[str, Any]:
    found = typing.get_type_hints(kind, include_extras=True)
    return {each.name: found[each.name] for each in fields(kind)}


def _fault(value: Any, hint: Any) -> str:
    """What a value should have been; empty for one that fits."""
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is finite"
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        return _allowed(hint, str(error))
    return ""


def _allowed(hint: Any, message: str) -> str:
    """What msgspec expected, in our words."""
    options = [each for each in (hint, *typing.get_args(hint)) if each is not type(None)]
    for each in options:
        if typing.get_origin(each) is Literal:
            return f"one of {', '.join(map(str, typing.get_args(each)))}"
        if typing.get_origin(each) is tuple:
            return "a list of strings"
    bounds = next((each for each in _parts(hint) if isinstance(each, Meta)), None)
    if bounds is not None and re.search(r"[<>]", message):
        return _range(bounds, too_large="<" in message)
    kind = next((each for each in _parts(hint) if each in (bool, int, float, str)), str)
    return f"a value of type {kind.__name__}"


def _range(bounds: Meta, *, too_large: bool) -> str:
    """``a number in (0, 1]``; of a range that is only a sanity check, the end that was passed."""
    low, high = (bounds.ge if bounds.gt is None else bounds.gt), bounds.le or bounds.lt
    if high is None or high > 100:
        if too_large:
            return f"a number of at most {high:,}"
        return (
            f"a number above {low:g}" if bounds.gt is not None else f"a number of at least {low:g}"
        )
    left, right = "[" if bounds.gt is None else "(", "]" if bounds.lt is None else ")"
    return f"a number in {left}{low:g}, {high:g}{right}"


def _parts(hint: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield hint
    for each in (*typing.get_args(hint), *getattr(hint, "__metadata__", ())):
        yield from _parts(each)


class Checked:
    """A dataclass whose values are held against its annotations when it is made."""

    KEY: typing.ClassVar[str] = ""  # what its keys begin with in a study

    def __post_init__(self) -> None:
        """Refuse the first value that does not fit.

        Raises:
            BadInput: that names the key, the value and what is allowed.
        """
        for name, hint in _hints(type(self)).items():  # type: ignore[arg-type]
            value = getattr(self, name)
            if is_dataclass(value) or name == "variants":
                continue  # checked when it was made
            fault = _fault(value, hint)
            if fault:
                raise BadInput(f"{self.KEY}{name}", value, fault)


@dataclass(frozen=True, kw_only=True)
class Columns(Checked):
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

    KEY = "data.columns."
    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    title: str | None = None

    def given(self) -> dict[str, str]:
        """The columns that were named, by what they hold."""
        return {what: name for what, name in asdict(self).items() if name is not None}


@dataclass(frozen=True, kw_only=True)
class Cleaning(Checked):
    """Which interactions stay; the steps come in the order of the keys.

    Attributes:
        min_rating: drop interactions rated lower.
        repeats: of a user's interactions with the same item keep all, the first, or the last.
        latest: keep so many of each user's.
        core: drop users and items with fewer interactions, again and again until none is left
            (k-core); 1 drops nothing.
    """

    KEY = "data.cleaning."
    min_rating: float | None = None
    repeats: Literal["keep", "first", "last"] = "keep"
    latest: Count | None = None
    core: Count = 1


@dataclass(frozen=True, kw_only=True)
class Data(Checked):
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

    KEY = "data."
    source: str = "embedded"
    format: str | None = None
    items: str | None = None
    max_history: Annotated[int, Meta(ge=1, le=100_000)] = 50
    columns: Columns = Columns()
    cleaning: Cleaning = Cleaning()


@dataclass(frozen=True, kw_only=True)
class Backbone(Checked):
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

    KEY = "backbone."
    source: str = "embedded"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    attention: Attention = "auto"
    quantize: Quantization = "none"
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: Annotated[int, Meta(ge=1, le=65_536)] = 16
    prompt: str = PROMPT
    suffix: str = ""
    head: Literal["dot", "linear"] = "dot"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantize != "none" and self.tuning == "full":
            allowed = "tuning = lora or frozen beside it: quantised weights can't be trained"
            raise BadInput("backbone.quantize", self.quantize, allowed)
        if self.trust_remote_code and not self.revision:
            raise BadInput("backbone.revision", None, "remote code needs a pinned revision")


@dataclass(frozen=True, kw_only=True)
class Recipe(Checked):
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

    KEY = "recipe."
    epochs: Annotated[int, Meta(ge=1, le=1_000_000)] = 6
    batch_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 128
    learning_rate: Annotated[float, Meta(gt=0, lt=10)] = 1e-3
    weight_decay: Weight = 0.01
    warmup: Share = 0.1
    clip: Annotated[float, Meta(gt=0)] = 1.0
    patience: Count = 3
    objective: Literal["every", "last"] = "every"
    loss: Literal["full", "sampled-softmax", "gbce"] = "full"
    negatives: Annotated[int, Meta(ge=1, le=10_000_000)] = 256
    gbce_t: Annotated[float, Meta(ge=0, le=1)] = 0.75
    accumulation: Count = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulation > self.batch_size:
            allowed = f"at most batch_size ({self.batch_size})"
            raise BadInput("recipe.accumulation", self.accumulation, allowed)


@dataclass(frozen=True, kw_only=True)
class SasRecSettings(Checked):
    """The non-LLM baseline, and where the item embeddings come from (Kang and McAuley, 2018).

    Attributes:
        width: of its states, and of the item table that it makes.
        blocks: how many it has.
        heads: of its attention; ``width`` must be a multiple.
        dropout: the share of states that are dropped in training.
        recipe: how it is trained.
    """

    KEY = "sasrec."
    width: Annotated[int, Meta(ge=1, le=65_536)] = 64
    blocks: Annotated[int, Meta(ge=1, le=1_000)] = 2
    heads: Annotated[int, Meta(ge=1, le=65_536)] = 2
    dropout: Share = 0.5
    recipe: Recipe = Recipe(epochs=16, patience=4, learning_rate=2e-3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise BadInput("sasrec.width", self.width, f"a multiple of heads ({self.heads})")


@dataclass(frozen=True, kw_only=True)
class Heal(Checked):
    """How a cut teacher is trained further.

    Attributes:
        share: of the recipe's epochs.
    """

    KEY = "heal."
    share: Annotated[float, Meta(gt=0, le=1)] = 0.5


@dataclass(frozen=True, kw_only=True)
class Distillation(Checked):
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

    KEY = "distillation."
    groups: Annotated[int, Meta(ge=1, le=1_000)] = 4
    ce: Weight = 1.0
    cosine: Weight = 1.0
    norm: Weight = 0.1
    supervision: Weight = 0.1
    logits: Weight = 0.0
    norm_form: Literal["distance", "squared"] = "distance"
    positions: Literal["asked", "last"] = "asked"
    temperature: Annotated[float, Meta(gt=0)] = 1.0
    top: CountOrNone = 0
    init: Literal["backbone", "teacher", "random"] = "backbone"
    features: Literal["cached", "online"] = "cached"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.ce or self.cosine or self.norm or self.supervision or self.logits):
            raise BadInput("distillation.ce", self.ce, "one of the losses with a weight above 0")

    @property
    def follows_states(self) -> bool:
        """Whether the teacher's states are needed."""
        return bool(self.cosine or self.norm)


@dataclass(frozen=True, kw_only=True)
class Elastic(Checked):
    """One model for every depth (LayerSkip, arXiv 2404.16710).

    A step leaves block l out with probability ``dropout (2^(l / (L - 1)) - 1)``, for all its users:
    never the first, the last with ``dropout``. Its loss is that of the whole model and ``weight``
    times the mean loss of ``exits`` shallower ones, at depths drawn anew at each step.

    Attributes:
        dropout: the probability that the last block is left out of a step.
        exits: so many shallower losses a step.
        weight: of their mean.
    """

    KEY = "elastic."
    dropout: Share = 0.1
    exits: Count = 1
    weight: Weight = 1.0


@dataclass(frozen=True, kw_only=True)
class Variant(Checked):
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

    KEY = "variants."
    select: str = "prefix"
    layers: str | None = None
    recipe: Recipe | None = None
    distillation: Distillation | None = None
    elastic: Elastic | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select not in SELECTIONS:
            parse_blocks(self.select)
        if self.layers is not None:
            parse_layers(self.layers, None)


@dataclass(frozen=True, kw_only=True)
class Protocol(Checked):
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

    KEY = "protocol."
    split: Literal["leave-one-out", "temporal", "given"] = "leave-one-out"
    split_at: tuple[str, ...] = ("0.8", "0.9")
    filter_seen: bool = True
    sampled: bool = True
    negatives: Literal["uniform", "popularity"] = "uniform"
    user_slices: tuple[str, ...] = ()
    item_slices: tuple[str, ...] = ()
    validation_users: Count = 4096
    margin: Annotated[float, Meta(gt=0, lt=1)] = 0.01
    resamples: Annotated[int, Meta(ge=100, le=1_000_000)] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.split_at) != 2:
            allowed = "where validation and test begin: two dates, or two quantiles as 0.8,0.9"
            raise BadInput("protocol.split_at", ",".join(self.split_at), allowed)


@dataclass(frozen=True, kw_only=True)
class Cost(Checked):
    """How time is measured: one batch of real users, rounds interleaved over the depths.

    Attributes:
        batch_size: users in the batch.
        warmup: rounds before the first that counts, at most.
        rounds: that count, at most.
        seconds: that all of it may take; one round is always taken.
    """

    KEY = "cost."
    batch_size: Annotated[int, Meta(ge=1, le=10_000_000)] = 128
    warmup: Annotated[int, Meta(ge=0, le=1_000_000)] = 3
    rounds: Annotated[int, Meta(ge=1, le=1_000_000)] = 15
    seconds: Annotated[float, Meta(gt=0, le=1_000_000)] = 60.0


@dataclass(frozen=True, kw_only=True)
class Probing(Checked):
    """How much is probed.

    Attributes:
        spans: of each length, leave out so many runs of blocks alone, those between whose ends the
            angular distance is smallest; 0 leaves out every run.
    """

    KEY = "probing."
    spans: CountOrNone = 0


@dataclass(frozen=True, kw_only=True)
class Slurm(Checked):
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

    KEY = "slurm."
    partition: str | None = None
    account: str | None = None
    minutes: Count = 720
    gpus: Annotated[int, Meta(ge=0, le=10_000)] = 1
    cpus: Count = 4
    memory_gb: Count = 32
    setup: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Tracking(Checked):
    """Where trainings are told to while they run.

    Attributes:
        to: names of accelerate's trackers: ``tensorboard``, ``wandb``, ``trackio``, ``mlflow``, ...
    """

    KEY = "tracking."
    to: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.to)) != len(self.to):
            raise BadInput("tracking.to", ",".join(self.to), "each tracker once")


@dataclass(frozen=True, kw_only=True)
class Study(Checked):
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
    methods: tuple[str, ...] = tuple(name for name, method in METHODS.items() if method.default)
    seeds: Annotated[int, Meta(ge=1, le=10_000)] = 2
    budget: Literal["steps", "compute"] = "steps"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    cache: str | None = None
    item_table: str = "sasrec"
    item_width: Annotated[int, Meta(ge=1, le=65_536)] = 64
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
        super().__post_init__()
        if self.item_table not in ITEM_TABLES and not self.item_table.endswith(".npy"):
            raise BadInput("item_table", self.item_table, "sasrec, text, learned, or a .npy file")
        _check_methods(self.methods, self.variants)
        parse_layers(self.layers, None)
        recipes = {"recipe": self.recipe} | {
            f"variants.{name}.recipe": variant.recipe
            for name, variant in self.variants.items()
            if variant.recipe is not None
        }
        for owner, recipe in recipes.items():
            if self.backbone.suffix and recipe.objective != "last":
                allowed = f"with {owner}.objective = last alone: it follows the last item"
                raise BadInput("backbone.suffix", self.backbone.suffix, allowed)
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

    @property
    def fresh(self) -> bool:
        """Whether the blocks begin without their pretraining."""
        distils = self.method.settings == "distillation"
        return self.method.fresh or (distils and self.distillation.init == "random")

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher must be trained before: to be cut, followed, or to choose blocks."""
        return self.select in TEACHER_SELECTIONS or "full" in self.method.needs


def settings_of(study: Study, name: str) -> Settings:
    """The settings of one of the study's methods; the teacher's for what trains nothing."""
    method, variant_name = method_of(name), name.partition(":")[2]
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
    )


def _check_methods(chosen: tuple[str, ...], variants: Mapping[str, Variant]) -> None:
    for name in variants:
        if not VARIANT_NAME.fullmatch(name) or name in SELECTIONS:
            allowed = "a name of a-z, 0-9 and single dashes that is no selection of blocks"
            raise BadInput("variants", name, allowed)
    if not chosen:
        raise BadInput("methods", "", f"at least one of {', '.join(METHODS)}")
    for full_name in chosen:
        method = method_of(full_name)
        _, colon, name = full_name.partition(":")
        if not colon:
            continue
        if not method.takes_variants:
            able = ", ".join(names("trained", "control"))
            raise BadInput("methods", full_name, f"a name behind the colon with {able} alone")
        known = (*(NAMED_SELECTIONS if method.selectable else ()), *variants)
        if name not in known:
            only = f"{method.name} alone: the study has no variants"
            raise BadInput("methods", full_name, nearest(name, known) if known else only)
        if not method.selectable and variants[name].select != "prefix":
            allowed = f"a variant without select: {method.name} has its own"
            raise BadInput("methods", full_name, allowed)
    if len(set(chosen)) != len(chosen):
        raise BadInput("methods", ",".join(chosen), "each method once")


# --- TOML and plain values -------------------------------------------------------------------


def load_study(path: str | Path) -> Study:
    """Read a study file (TOML); keys that are absent keep their defaults.

    Raises:
        BadInput: for a file that can't be read, an unknown key, or a value that is not allowed.
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
    """The study that ``study_to_dict`` wrote; an error names the whole key.

    What a variant's table leaves out is what the study's own table of that name says.
    """
    variants = content.get("variants")
    if isinstance(variants, Mapping):
        content = {**content, "variants": {k: _inherit(v, content) for k, v in variants.items()}}
    return _build(Study, content, "")


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
            name = prefix + key
            out |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
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
            try:
                study = _with(study, key, value)
            except BadInput as error:  # a recipe does not know whose it is
                if error.field.rpartition(".")[2] != key.rpartition(".")[2]:
                    raise
                raise BadInput(key, error.value, error.allowed) from None
    return study


def _with(settings: T, key: str, value: Any) -> T:
    name, _, rest = key.partition(".")
    if rest:
        value = _with(getattr(settings, name), rest, value)
    return replace(settings, **{name: value})  # type: ignore[type-var]


def _canonical(value: object) -> object:
    """Settings in which 1 and 1.0 are the same."""
    if isinstance(value, dict):
        return {key: _canonical(each) for key, each in value.items()}
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _inherit(variant: Any, study: Mapping[str, Any]) -> Any:
    if not isinstance(variant, Mapping):
        return variant
    return {
        key: {**study.get(key, {}), **value} if isinstance(value, Mapping) else value
        for key, value in variant.items()
    }


def _build(kind: type[T], content: Any, key: str) -> T:
    """A dataclass of settings from a table; ``key`` is the table's own."""
    if not isinstance(content, Mapping):
        raise BadInput(key, content, f"a table [{key}]")
    prefix, hints = f"{key}." if key else "", _hints(kind)  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in content.items():
        if name not in hints:
            raise BadInput(f"study key {prefix}{name}", value, nearest(name, hints))
        values[name] = _value(hints[name], value, f"{prefix}{name}")
    try:
        return kind(**values)
    except BadInput as error:  # it names its usual table; this one may stand elsewhere
        own = kind.KEY  # type: ignore[attr-defined]
        if own and error.field.startswith(own) and own != prefix:
            name = prefix + error.field.removeprefix(own)
            raise BadInput(name, error.value, error.allowed) from None
        raise


def _value(hint: Any, value: Any, key: str) -> Any:
    tables = [each for each in (hint, *typing.get_args(hint)) if is_dataclass(each)]
    if typing.get_origin(hint) is Mapping:  # variants
        if not isinstance(value, Mapping):
            raise BadInput(key, value, f"a table [{key}]")
        return {name: _build(tables[0], each, f"{key}.{name}") for name, each in value.items()}  # type: ignore[arg-type]
    if tables:
        return _build(tables[0], value, key)  # type: ignore[arg-type]
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError:
        raise BadInput(key, value, _fault(value, hint)) from None


# --- depths and blocks as people write them --------------------------------------------------


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
