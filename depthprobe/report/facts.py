"""How a run was measured, as pairs of a word and what it was; only what the run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from depthprobe.methods import METHODS
from depthprobe.report.numbers import HEADLINE, SAMPLED, Summary
from depthprobe.report.style import count, plural, significant
from depthprobe.study import Study

if TYPE_CHECKING:
    from depthprobe.runs.records import BackboneFacts, Dataset, ItemTable, Machine, Record

SIZES = ("users", "items", "interactions")
SPLITS = {
    "leave-one-out": "Leave-one-out: a user's last item is the test, the one before it "
    "validation. Neither is ever trained on.",
    "temporal": "Temporal: two points in time for all users. Training ends where validation "
    "begins. The target of a user is the first item at or after a point, given everything before "
    "it. Users without anything before a point are cold and have no target.",
    "given": "As the log came, in training, validation and test files. The targets of a user are "
    "the first validation and the first test interaction, given everything before each.",
}


def conditions(summary: Summary) -> tuple[str, ...]:
    """The conditions of the first screen, each a few words."""
    run, manifest = summary.run, summary.run.manifest
    data, machine = manifest.data, manifest.machine
    tested = max((point.users for point in summary.points), default=0)
    seen = ", seen items left out" if run.study.protocol.filter_seen else ""
    said = [
        f"data {data.name}",
        f"{data.users:,} users ({tested:,} tested)",
        f"{data.items:,} items",
        f"backbone {base_name(manifest.backbone.source)}",
        plural(run.study.seeds, "seed"),
        f"{_split_name(run.study, data.split)}, full ranking{seen}",
        f"{machine.name}, {machine.cores} cores" if machine.cores else machine.name,
    ]
    return tuple(filter(None, said))


def base_name(source: str) -> str:
    """A backbone's name for a first look: of a folder the last part, of another source all."""
    path = PurePath(source)
    return path.name if path.is_absolute() else source


def negatives_of(study: Study) -> str:
    """How the negatives of the sampled protocol were drawn, in words."""
    return {
        "uniform": "999 random negatives",
        "popularity": "999 negatives drawn by popularity in training",
    }[study.protocol.negatives]


def how_measured(summary: Summary) -> tuple[tuple[str, str], ...]:
    """Word and fact, in the order of reading; what the run did not record is absent."""
    run, manifest, study = summary.run, summary.run.manifest, summary.run.study
    data, protocol, git = manifest.data, study.protocol, manifest.git
    commit = git.commit if git else None
    candidates = ", ".join(method.label for method in METHODS.values() if method.candidate)
    dirt = ", with uncommitted changes" if git and git.dirty else ""
    facts = [
        ("data", _data(data)),
        ("cleaning", _cleaning(data.cleaning)),
        ("warnings", "; ".join(data.warnings) or "none"),
        ("backbone", _backbone(manifest.backbone, study)),
        ("item embeddings", _item_embeddings(manifest.item_table)),
        ("training", _training(study)),
        ("split", _split(study, data.split)),
        ("ranking", "Every item of the catalogue is ranked for every tested user; items seen "
                    f"before are {'left out' if protocol.filter_seen else 'ranked too'}. "
                    "A rank is the mean rank over ties, so equal scores earn nothing."),
        ("sampled ranking", _sampled(summary)),
        ("intervals", f"95 %, bootstrap of {protocol.resamples:,} draws over users, and over seeds "
                      "where there are several. Comparisons with the teacher use the same users "
                      "and seeds in both arms. Times: the median ratio over paired rounds."),
        ("sufficient depth", "The fewest blocks that, with 95 % confidence, lose at most "
                             f"{100 * protocol.margin:g} % of the teacher's {HEADLINE}. The "
                             "confidence is for all candidates at once (Bonferroni). The "
                             f"candidates are of these methods: {candidates}."),
        ("timing", _timing(manifest.timing or {})),
        ("reused trainings", _reused(run.records)),
        ("machine", _machine(manifest.machine)),
        ("versions", _pairs(manifest.versions)),
        ("git commit", f"{commit}{dirt}" if commit else ""),
        ("study", f"{study.name}, hash {manifest.study_hash}"),
        ("wall time", _duration(manifest.wall_seconds)),
    ]  # fmt: skip
    return tuple((word, text) for word, text in facts if text)


def _data(data: Dataset) -> str:
    sizes = ", ".join(f"{getattr(data, key):,} {key}" for key in SIZES)
    rest = _pairs({k: v for k, v in data.statistics.items() if k not in SIZES})
    said = (f"{data.name}: {sizes}", rest, f"fingerprint {data.fingerprint[:16]}")
    return "; ".join(filter(None, said))


def _cleaning(steps: Sequence[Mapping[str, Any]]) -> str:
    """What each step left; the first is the log as it was read."""
    said = [f"{s['step']}: " + ", ".join(f"{s[key]:,} {key}" for key in SIZES) for s in steps]
    return "; ".join(said) if len(said) > 1 else "none" if said else ""


def _split_name(study: Study, split: Mapping[str, Any]) -> str:
    name = str(study.protocol.split)
    if "test_begins" not in split:
        return f"{name} split" if name == "given" else name
    return f"{name} split at {split['validation_begins']} and {split['test_begins']}"


def _split(study: Study, split: Mapping[str, Any]) -> str:
    """What the split is, where its points lie, who and what is unknown to training."""
    said = [SPLITS[study.protocol.split]]
    if "test_begins" in split:
        begins = split["validation_begins"], split["test_begins"]
        said.append("Validation begins on {}, the test on {}.".format(*begins))
    if "training_interactions" in split:
        said.append(
            f"Training has {split['training_interactions']:,} interactions of "
            f"{split['training_items']:,} items. {split['validation_users']:,} users have a target "
            f"in validation and {split['test_users']:,} in the test. "
            f"{split['cold_test_targets']:,} of the test targets are items unknown to training."
        )
    if "cold_test_users" in split:
        before = "cold_validation_users" in split
        more = f"{split['cold_validation_users']:,} in validation and " if before else ""
        said.append(f"Cold users: {more}{split['cold_test_users']:,} in the test.")
    return " ".join(said)


def _backbone(backbone: BackboneFacts, study: Study) -> str:
    said = [backbone.source, backbone.family, f"{backbone.blocks} blocks"]
    said += [f"width {backbone.width}", f"{count(backbone.parameters)} parameters"]
    said += [f"revision {backbone.revision}"] if backbone.revision else []
    return ", ".join([*said, f"tuning {study.backbone.tuning}", study.backbone.dtype])


def _item_embeddings(table: ItemTable) -> str:
    made = {
        "sasrec": "learnt by SASRec from the same training data, anew for each seed",
        "text": "titles through the backbone, mean over the tokens of the last normed states",
        "learned": "random at first, anew for each seed",
    }.get(table.source, f"from {table.source}")
    trained = "trained with the recommender" if table.trained else "frozen"
    said = [made, f"width {table.width}", trained]
    if table.sha256:
        said += ["centred and scaled", "the same for all seeds", table.sha256]
    return ", ".join(said)


def _training(study: Study) -> str:
    """What the trials minimise; nothing of epochs or rates, which the study file holds."""
    recipe = study.recipe
    where = {"every": "at every position of a history", "last": "at its last position alone"}
    loss = {
        "full": "cross-entropy over the whole catalogue",
        "sampled-softmax": f"softmax over {recipe.negatives} random items",
        "gbce": f"gBCE with {recipe.negatives} random items, t = {recipe.gbce_t:g}",
    }
    said = [f"the next item {where[recipe.objective]}", loss[recipe.loss], recipe.precision]
    said += ["a linear head over the items"] * (study.backbone.head == "linear")
    return ", ".join(said)


def _sampled(summary: Summary) -> str:
    if not any(point.value(HEADLINE, SAMPLED) for point in summary.points):
        return ""
    return (
        f"Beside it, the item is ranked among {negatives_of(summary.run.study)} that the user "
        "never took, the same for every trial. These numbers are higher. They can't be compared "
        "with those of full ranking, nor with those of another way to draw."
    )


def _timing(timing: Mapping[str, Any]) -> str:
    if not timing:
        return ""
    return (
        f"{_pairs(timing)}. Rounds are interleaved over depths, so that a drift of the machine "
        "meets all alike. Inference is encoding the users and scoring the catalogue; a training "
        "step is forward, backward and update."
    )


def _reused(records: Sequence[Record]) -> str:
    """How many trainings come from the cache: their seconds were measured in another run."""
    found = sum(record.training is not None and record.training.reused for record in records)
    if not found:
        return ""
    return (
        f"{found} trials have their training from the cache. Its seconds were measured in the "
        "earlier run that left it there, on such a machine. The trials were tested anew."
    )


def _machine(machine: Machine) -> str:
    said = [
        machine.name,
        f"{machine.cores} cores" if machine.cores else "",
        f"{significant(machine.memory_gib)} GiB" if machine.memory_gib else "",
        f"device {machine.device}" if machine.device else "",
    ]
    return ", ".join(filter(None, said))


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


def _pairs(values: Mapping[str, Any]) -> str:
    said = ((k, v) for k, v in values.items() if v is not None)
    return ", ".join(f"{str(key).replace('_', ' ')} {_plain(value)}" for key, value in said)


def _plain(value: object) -> str:
    if isinstance(value, float):
        return significant(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
