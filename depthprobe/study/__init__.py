"""What to run: frozen dataclasses, TOML in, canonical hash out. Imports nothing heavy."""

from depthprobe.study.errors import BadInput
from depthprobe.study.layers import parse_layers
from depthprobe.study.settings import (
    ATTENTIONS,
    DEFAULT_METHODS,
    METHODS,
    NOT_DECIDING,
    PROMPT,
    QUANTIZATIONS,
    Backbone,
    Cleaning,
    Columns,
    Cost,
    Data,
    Distillation,
    Protocol,
    Recipe,
    SasRec,
    Study,
)
from depthprobe.study.toml import (
    demo_study,
    differences,
    load_study,
    override,
    study_from_dict,
    study_to_dict,
    study_to_toml,
)

__all__ = [
    "ATTENTIONS",
    "DEFAULT_METHODS",
    "METHODS",
    "NOT_DECIDING",
    "PROMPT",
    "QUANTIZATIONS",
    "Backbone",
    "BadInput",
    "Cleaning",
    "Columns",
    "Cost",
    "Data",
    "Distillation",
    "Protocol",
    "Recipe",
    "SasRec",
    "Study",
    "demo_study",
    "differences",
    "load_study",
    "override",
    "parse_layers",
    "study_from_dict",
    "study_to_dict",
    "study_to_toml",
]
