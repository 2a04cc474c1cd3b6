"""How a run was measured, as pairs of a word and what it was; only what the run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from depthprobe.methods import METHODS
from depthprobe.report.numbers import SAMPLED, Summary
from depthprobe.report.style import count, plural, significant
from depthprobe.study import Study

if TYPE_CHECKING:
    from depthprobe.runs.records import BackboneFacts, ItemTable, Machine

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
    texts = (
        f"data {data.name}",
        f"{data.users:,} users ({tested:,} tested)",
        f"{data.items:,} items",
        f"backbone {base_name(manifest.backbone.source)}",
        plural(run.study.seeds, "seed"),
        f"{_split_name(run.study, data.split)}, full ranking{seen}",
        _joined(machine.name, machine.cores and f"{machine.cores} cores"),
    )
    return tuple(filter(None, texts))


def _joined(*texts: object) -> str:
    """The texts that there are, with commas."""
    return ", ".join(str(text) for text in texts if text)


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
    metric, level = summary.headline, f"{100 * summary.level:g} %"
    data, protocol, git = manifest.data, study.protocol, manifest.git
    candidates = ", ".join(method.label for method in METHODS.values() if method.candidate)
    sizes = ", ".join(f"{getattr(data, key):,} {key}" for key in SIZES)
    statistics = _pairs({k: v for k, v in data.statistics.items() if k not in SIZES})
    texts = (f"{data.name}: {sizes}", statistics, f"fingerprint {data.fingerprint[:16]}")
    reused = sum(bool(record.training and record.training.reused) for record in run.records)
    facts = [
        ("data", "; ".join(filter(None, texts))),
        ("cleaning", _cleaning(data.cleaning)),
        ("warnings", "; ".join(data.warnings) or "none"),
        ("backbone", _backbone(manifest.backbone, study)),
        ("item embeddings", _item_embeddings(manifest.item_table)),
        ("training", _training(study)),
        ("split", _split(study, data.split)),
        ("ranking", "Every item of the catalogue is ranked for every tested user; items seen "
                    f"before are {'left out' if protocol.filter_seen else 'ranked too'}. "
                    "A rank is the mean rank over ties, so equal scores earn nothing."),
        ("sampled ranking", any(point.value(metric, SAMPLED) for point in summary.points) and
                            f"Beside it, the item is ranked among {negatives_of(study)} that the "
                            "user never took, the same for every trial. These numbers are higher. "
                            "They can't be compared with those of full ranking, nor with those of "
                            "another way to draw."),
        ("intervals", f"{level}, bootstrap of {protocol.resamples:,} draws over users, and over "
                      "seeds where there are several. Comparisons with the teacher use the same "
                      "users and seeds in both arms. Times: the median ratio over paired rounds."),
        ("sufficient depth", f"The fewest blocks that, with {level} confidence, lose at most "
                             f"{100 * summary.margin:g} % of the teacher's {metric}. The "
                             "confidence is for all candidates at once (Bonferroni). The "
                             f"candidates are of these methods: {candidates}."),
        ("timing", manifest.timing and
                   f"{_pairs(manifest.timing)}. Rounds are interleaved over depths, so that a "
                   "drift of the machine meets all alike. Inference is encoding the users and "
                   "scoring the catalogue; a training step is forward, backward and update."),
        ("reused trainings", reused and
                             f"{reused} trials have their training from the cache. Its seconds "
                             "were measured in the earlier run that left it there, on such a "
                             "machine. The trials were tested anew."),
        ("machine", _machine(manifest.machine)),
        ("versions", _pairs(manifest.versions)),
        ("git commit", git and git.commit and
                       f"{git.commit}{', with uncommitted changes' if git.dirty else ''}"),
        ("study", f"{study.name}, hash {manifest.study_hash}"),
        ("wall time", _duration(manifest.wall_seconds)),
    ]  # fmt: skip
    return tuple((word, str(text)) for word, text in facts if text)


def _cleaning(steps: Sequence[Mapping[str, Any]]) -> str:
    """What each step left; the first is the log as it was read."""
    texts = [f"{s['step']}: " + ", ".join(f"{s[key]:,} {key}" for key in SIZES) for s in steps]
    return "; ".join(texts) if len(texts) > 1 else "none" if texts else ""


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
    return _joined(
        backbone.source, backbone.family, f"{backbone.blocks} blocks", f"width {backbone.width}",
        f"{count(backbone.parameters)} parameters",
        backbone.revision and f"revision {backbone.revision}",
        f"tuning {study.backbone.tuning}", study.backbone.dtype,
    )  # fmt: skip


def _item_embeddings(table: ItemTable) -> str:
    made = {
        "sasrec": "learnt by SASRec from the same training data, anew for each seed",
        "text": "titles through the backbone, mean over the tokens of the last normed states",
        "learned": "random at first, anew for each seed",
    }.get(table.source, f"from {table.source}")
    trained = "trained with the recommender" if table.trained else "frozen"
    same = table.sha256 and f"centred and scaled, the same for all seeds, {table.sha256}"
    return _joined(made, f"width {table.width}", trained, same)


def _training(study: Study) -> str:
    """What the trials minimise; nothing of epochs or rates, which the study file holds."""
    recipe = study.recipe
    where = {"every": "at every position of a history", "last": "at its last position alone"}
    loss = {
        "full": "cross-entropy over the whole catalogue",
        "sampled-softmax": f"softmax over {recipe.negatives} random items",
        "gbce": f"gBCE with {recipe.negatives} random items, t = {recipe.gbce_t:g}",
    }
    head = study.backbone.head == "linear" and "a linear head over the items"
    place = f"the next item {where[recipe.objective]}"
    return _joined(place, loss[recipe.loss], recipe.precision, head)


def _machine(machine: Machine) -> str:
    return _joined(
        machine.name,
        machine.cores and f"{machine.cores} cores",
        machine.memory_gib and f"{significant(machine.memory_gib)} GiB",
        machine.device and f"device {machine.device}",
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest if not hours else 0, "s"))
    return " ".join(f"{value} {unit}" for value, unit in parts if value)


def _pairs(values: Mapping[str, Any]) -> str:
    """Names and values; numbers as a reader writes them."""
    texts = []
    for key, value in values.items():
        if isinstance(value, float):
            value = significant(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            value = f"{value:,}"
        if value is not None:
            texts.append(f"{str(key).replace('_', ' ')} {value}")
    return ", ".join(texts)
