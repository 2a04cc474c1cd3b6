"""A study: one question, all its settings, each checked when it is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from depthprobe.study.errors import BadInput, one_of
from depthprobe.study.inputs import Backbone, Data
from depthprobe.study.layers import parse_layers
from depthprobe.study.measuring import Cost, Probing, Protocol
from depthprobe.study.methods import DEFAULT_METHODS, check_methods, settings_of
from depthprobe.study.running import Slurm, Tracking
from depthprobe.study.training import Distillation, Elastic, Heal, Recipe, SasRec, Variant

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
    sasrec: SasRec = SasRec()
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
