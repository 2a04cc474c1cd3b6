"""How models are trained: recipes, the baseline, the distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprobe.study.errors import BadInput, at_least, one_of
from depthprobe.study.layers import parse_blocks, parse_layers

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
class SasRec:
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
