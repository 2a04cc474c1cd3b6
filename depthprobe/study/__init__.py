"""What to run: frozen dataclasses, TOML in, canonical hash out. Imports nothing heavy."""

from depthprobe.study.errors import BadInput, check_writable
from depthprobe.study.inputs import (
    ATTENTIONS,
    PROMPT,
    QUANTIZATIONS,
    Backbone,
    Cleaning,
    Columns,
    Data,
)
from depthprobe.study.layers import parse_blocks, parse_layers, ranges
from depthprobe.study.measuring import Cost, Probing, Protocol
from depthprobe.study.methods import (
    ASKED,
    DEFAULT_METHODS,
    METHODS,
    PROBES,
    TRAINED,
    Settings,
    base_of,
    settings_of,
)
from depthprobe.study.running import Slurm, Tracking
from depthprobe.study.settings import ITEM_TABLES, NOT_DECIDING, Study
from depthprobe.study.toml import (
    demo_study,
    differences,
    load_study,
    override,
    study_from_dict,
    study_to_dict,
    study_to_toml,
)
from depthprobe.study.training import (
    SELECTIONS,
    Distillation,
    Elastic,
    Heal,
    Recipe,
    SasRec,
    Variant,
)

__all__ = [
    "ASKED",
    "ATTENTIONS",
    "Backbone",
    "BadInput",
    "Cleaning",
    "Columns",
    "Cost",
    "DEFAULT_METHODS",
    "Data",
    "Distillation",
    "Elastic",
    "Heal",
    "ITEM_TABLES",
    "METHODS",
    "NOT_DECIDING",
    "PROBES",
    "PROMPT",
    "Probing",
    "Protocol",
    "QUANTIZATIONS",
    "Recipe",
    "SELECTIONS",
    "SasRec",
    "Settings",
    "Slurm",
    "Study",
    "TRAINED",
    "Tracking",
    "Variant",
    "base_of",
    "check_writable",
    "demo_study",
    "differences",
    "load_study",
    "override",
    "parse_blocks",
    "parse_layers",
    "ranges",
    "settings_of",
    "study_from_dict",
    "study_to_dict",
    "study_to_toml",
]
