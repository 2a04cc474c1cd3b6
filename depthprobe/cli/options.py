"""What the commands share: a study from flags, and checks that need no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from depthprobe.data.readers.streams import stem
from depthprobe.errors import BadInput, check_writable
from depthprobe.study import (
    ITEM_TABLES,
    Protocol,
    Study,
    Variant,
    demo_study,
    load_study,
    override,
    study_from_dict,
    study_to_dict,
)

RUN_FILES = ("manifest.json", "study.toml")
SplitKind = Annotated[
    str | None,
    typer.Option(metavar="leave-one-out|temporal|given", help="What trains, what tests."),
]
SplitPoints = Annotated[
    str | None,
    typer.Option(metavar="V,T", help="Where validation and test begin: dates, quantiles."),
]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, kw_only=True)
class StudyFlags:
    """The flags that make a study or change one; None leaves it as it is."""

    study: Path | None = None
    data: str | None = None
    backbone: str | None = None
    revision: str | None = None
    layers: str | None = None
    methods: str | None = None
    seeds: int | None = None
    epochs: int | None = None
    budget: str | None = None
    cache: str | None = None
    device: str | None = None
    tuning: str | None = None
    item_embeddings: str | None = None
    split: str | None = None
    split_at: str | None = None
    name: str | None = None


def make_study(flags: StudyFlags) -> Study:
    """The study that the flags ask for: from a file, from data and backbone, or the demo.

    Raises:
        BadInput: for a value that can't be used, or a path that does not exist.
    """
    if flags.study is not None:
        study = load_study(flags.study)
        if study.name == flags.study.stem == "study":
            study = override(study, name=flags.study.resolve().parent.name)
    elif flags.data is None and flags.backbone is None:
        study = demo_study()
    else:
        study = Study(name=_study_name(flags.data, flags.backbone))
    changes = {
        "name": flags.name,
        "layers": flags.layers,
        "methods": None if flags.methods is None else split_list(flags.methods),
        "seeds": flags.seeds,
        "budget": flags.budget,
        "device": flags.device,
        "cache": flags.cache,
        "recipe.epochs": flags.epochs,
        "data.source": flags.data,
        "backbone.source": flags.backbone,
        "backbone.revision": flags.revision,
        "backbone.tuning": flags.tuning,
        "item_table": flags.item_embeddings,
        "protocol.split": flags.split,
        "protocol.split_at": None if flags.split_at is None else split_list(flags.split_at),
    }
    study = checked(study, **changes)
    if flags.epochs is not None:  # of all recipes
        study = replace(study, variants=_with_epochs(study.variants, flags.epochs))
    check_split_at(flags.split_at, study.protocol)
    check_data(study.data.source)
    check_backbone(study.backbone.source)
    check_revision(flags.revision, study.backbone.source)
    check_item_table(study.item_table)
    return study


def _with_epochs(variants: Mapping[str, Variant], epochs: int) -> dict[str, Variant]:
    return {
        name: each
        if each.recipe is None
        else replace(each, recipe=replace(each.recipe, epochs=epochs))
        for name, each in variants.items()
    }


def checked(study: Study, **changes: object) -> Study:
    """The study with dotted settings changed; None leaves one as it is.

    Raises:
        BadInput: for a value that a study file could not have either.
    """
    # once through plain values: it checks the flags as a study file's values are checked
    return study_from_dict(study_to_dict(override(study, **changes)))


def split_list(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, without blanks."""
    return tuple(part for part in (piece.strip() for piece in text.split(",")) if part)


def _study_name(data: str | None, backbone: str | None) -> str:
    parts: list[str] = []
    if data not in {None, "embedded"}:
        parts.append(stem(Path(str(data))))
    if backbone not in {None, "embedded"}:
        parts.append(Path(str(backbone)).resolve().name)
    return "-".join(part for part in parts if part) or "embedded"


def default_output(study: Study) -> Path:
    """The folder of a run that has not been named: ``runs/<study's name>``."""
    return Path("runs", re.sub(r"[^\w.-]+|^\.+", "-", study.name).strip("-") or "study")


def check_data(source: str) -> None:
    """Refuse what is neither a path that exists nor the name of a log."""
    if source == "embedded" or Path(source).exists():
        return

    from depthprobe.data.public import is_public, public_set

    if not is_public(source):
        allowed = "a file or folder that exists, a public set (depthprobe data list), or embedded"
        raise BadInput("data", source, allowed)
    public_set(source)  # refuses a category that does not exist


def check_split_at(text: str | None, protocol: Protocol) -> None:
    """Refuse points in time that the split would not look at."""
    if text is not None and protocol.split != "temporal":
        raise BadInput("split-at", text, "with --split temporal alone")


def check_backbone(source: str) -> None:
    """Refuse what is neither a model's folder nor spelled like a Hugging Face id."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput("backbone", source, "a folder with config.json")
    elif not path.exists() and not HUB_ID.fullmatch(source):
        raise BadInput("backbone", source, "a folder that exists, a Hugging Face id, or embedded")


def check_revision(revision: str | None, source: str) -> None:
    """Refuse a revision of what has none, and one without a name."""
    if revision is not None and not revision.strip():
        raise BadInput("revision", revision, "a branch, tag or commit")
    if revision is not None and (source == "embedded" or Path(source).exists()):
        raise BadInput("revision", revision, f"with a Hugging Face id; {source} has no revisions")


def check_item_table(source: str) -> None:
    """Refuse a file of item embeddings that does not exist."""
    if source not in ITEM_TABLES and not Path(source).is_file():
        raise BadInput("item_table", source, "a .npy file that exists, text, learned, or sasrec")


def check_settings(**settings: object) -> None:
    """Refuse what a study file could not say, e.g. layers that name no depths."""
    study_from_dict(settings)


def whole(text: str) -> int:
    """An option's whole number; the library's own message would not show what was written."""
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """An option's number."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a number") from None


def check_at_least(field: str, value: int | None, low: int) -> None:
    """Refuse a number below ``low``; None is no number and passes."""
    if value is not None and value < low:
        raise BadInput(field, value, f"a whole number of at least {low}")


def check_output(path: Path) -> None:
    """Refuse a folder for a run that holds something else, or can't be written."""
    # what begins with a dot, sweeps or jobs that are about to begin the run leave there
    held = path.is_dir() and any(entry.name[0] != "." for entry in path.iterdir())
    if held and not is_run(path):
        raise BadInput("output", path, "a new or empty folder, or an earlier run")
    check_writable("output", path)


def is_run(path: Path) -> bool:
    """Whether the folder is a run, complete or begun."""
    return any((path / name).is_file() for name in RUN_FILES)


def check_run(path: Path) -> None:
    """Refuse what is not the folder of a run."""
    if not path.is_dir():
        raise BadInput("run", path, "a folder that exists")
    if not is_run(path):
        raise BadInput("run", path, f"a folder that sweep wrote ({' or '.join(RUN_FILES)} in it)")
