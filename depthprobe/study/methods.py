"""The methods' names, and the settings that each name stands for.

A trained method may be named once more with a selection of blocks or a variant of the study behind
a colon: ``heal:ends``, ``distill:cos``. Both are then methods of their own, beside each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from depthprobe.study.errors import BadInput, nearest
from depthprobe.study.training import SELECTIONS, Distillation, Elastic, Recipe, Variant

if TYPE_CHECKING:
    from depthprobe.study.settings import Study

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
