"""What the commands share: a study from flags, and checks that need no torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from depthprobe.data.readers.streams import stem
from depthprobe.errors import BadInput, check_writable
from depthprobe.study import ITEM_TABLES, Study, demo_study, load_study, override, study_from_dict

Command = TypeVar("Command", bound=Callable[..., Any])
RUN_FILES = ("manifest.json", "study.toml")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def option(metavar: str, help: str, **more: Any) -> Any:
    """An option of a command; its name is the parameter's."""
    return typer.Option(metavar=metavar, help=help, **more)


def _parser(kind: type, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:  # typer's own message would not show what was written
            raise typer.BadParameter(f"{text!r} is not a {what}") from None

    return parse


whole, number = _parser(int, "whole number"), _parser(float, "number")


@dataclass(frozen=True)
class Flag:
    """An option that changes a setting of a study.

    Attributes:
        setting: its key, with dots.
        metavar: what stands for the value in the help.
        help: what it is.
        kind: of the value; ``tuple`` for a list with commas.
    """

    setting: str
    metavar: str
    help: str
    kind: type = str

    def parameter(self, name: str) -> Parameter:
        """What typer reads from a command's signature."""
        parser = {int: whole, float: number}.get(self.kind)
        kind = str if self.kind is tuple else self.kind
        hint = Annotated[kind | None, option(self.metavar, self.help, parser=parser)]  # type: ignore[valid-type]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=hint)


COLUMN = "Its name, or its number from 1 [default: guessed]."
LOG = {  # how a log is read and cleaned
    "format": Flag("data.format", "F", "One of data list [default: by the content]."),
    "items": Flag("data.items", "FILE", "The items' titles [default: beside the log]."),
    "user_column": Flag("data.columns.user", "C", COLUMN),
    "item_column": Flag("data.columns.item", "C", COLUMN),
    "time_column": Flag("data.columns.time", "C", COLUMN),
    "rating_column": Flag("data.columns.rating", "C", COLUMN),
    "title_column": Flag("data.columns.title", "C", COLUMN),
    "min_rating": Flag("data.cleaning.min_rating", "X", "Drop lower ratings.", float),
    "repeats": Flag(
        "data.cleaning.repeats", "keep|first|last", "Of the same item [default: keep]."
    ),
    "latest": Flag("data.cleaning.latest", "N", "Keep so many of each user's.", int),
    "core": Flag("data.cleaning.core", "K", "Keep users and items with K or more (k-core).", int),
}
SPLIT = {
    "split": Flag("protocol.split", "leave-one-out|temporal|given", "What trains, what tests."),
    "split_at": Flag("protocol.split_at", "V,T", "Where validation and test begin.", tuple),
}
SWEEP = {
    "data": Flag("data.source", "D", "A log, a prepared folder, a public set, or embedded."),
    "backbone": Flag("backbone.source", "B", "A folder, a Hugging Face id, or embedded."),
    "revision": Flag("backbone.revision", "REV", "The branch, tag or commit of a Hugging Face id."),
    "layers": Flag("layers", "DEPTHS", "Depths: 1,2,4 or 1-12 or all or auto."),
    "methods": Flag("methods", "NAMES", "Of those below; also heal:ends and the like.", tuple),
    "seeds": Flag("seeds", "N", "How many seeds.", int),
    "epochs": Flag("recipe.epochs", "N", "At most so many epochs a training.", int),
    "device": Flag("device", "auto|cpu|cuda|mps", "Where to compute."),
    "budget": Flag("budget", "steps|compute", "What all trainings have the same of."),
    "cache": Flag("cache", "DIR", "Take equal trainings of other runs from there, leave new ones."),
    "tuning": Flag("backbone.tuning", "full|lora|frozen", "What of the blocks is trained."),
    "item_embeddings": Flag("item_table", "FILE.npy|text|learned|sasrec", "The item table."),
    **SPLIT,
    "name": Flag("name", "NAME", "The study's name."),
}
FLAGS = LOG | SWEEP


def takes_flags(flags: Mapping[str, Flag]) -> Callable[[Command], Command]:
    """Give a command options that change a study; their values come as ``**flags``."""

    def extend(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        more = [flag.parameter(name) for name, flag in flags.items()]
        every = sorted([*more, *own], key=lambda each: each.kind)  # what stands after * comes last
        command.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        return command

    return extend


def make_study(file: Path | None = None, **flags: Any) -> Study:
    """The study that the flags of a sweep ask for: a file's, one of data and backbone, the demo.

    Raises:
        BadInput: for a value that can't be used, or a path that does not exist.
    """
    data, backbone = flags.get("data"), flags.get("backbone")
    if file is not None:
        study = load_study(file)
        if study.name == file.stem == "study":
            study = override(study, name=file.resolve().parent.name)
    elif data is None and backbone is None:
        study = demo_study()
    else:
        study = Study(name=_study_name(data, backbone))
    study = apply_flags(study, **flags)
    if (epochs := flags.get("epochs")) is not None:  # of all recipes
        variants = {
            name: each
            if each.recipe is None
            else replace(each, recipe=replace(each.recipe, epochs=epochs))
            for name, each in study.variants.items()
        }
        study = replace(study, variants=variants)
    check_backbone(study.backbone.source)
    check_revision(flags.get("revision"), study.backbone.source)
    if study.item_table not in ITEM_TABLES and not Path(study.item_table).is_file():
        allowed = "a .npy file that exists, text, learned, or sasrec"
        raise BadInput("item_table", study.item_table, allowed)
    return study


def apply_flags(study: Study, **flags: Any) -> Study:
    """The study with the settings that flags change; its log must be there.

    Raises:
        BadInput: for a value that a study file could not have either, or a log that does not exist.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    for name, value in given.items():
        lists = FLAGS[name].kind is tuple
        study = override(study, **{FLAGS[name].setting: split_list(value) if lists else value})
    if "split_at" in given and study.protocol.split != "temporal":
        raise BadInput("split-at", given["split_at"], "with --split temporal alone")
    check_data(study.data.source)
    return study


def split_list(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, without blanks."""
    return tuple(filter(None, (piece.strip() for piece in text.split(","))))


def _study_name(data: str | None, backbone: str | None) -> str:
    parts = [
        "" if data in {None, "embedded"} else stem(Path(str(data))),
        "" if backbone in {None, "embedded"} else Path(str(backbone)).resolve().name,
    ]
    return "-".join(filter(None, parts)) or "embedded"


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


def check_settings(**settings: object) -> None:
    """Refuse what a study file could not say, e.g. layers that name no depths."""
    study_from_dict(settings)


def check_at_least(field: str, value: int | None, low: int) -> None:
    """Refuse a number below ``low``; None is no number and passes."""
    if value is not None and value < low:
        raise BadInput(field, value, f"a whole number of at least {low}")


def check_output_file(path: Path | None) -> None:
    """Refuse a file that can't be written; None passes."""
    if path is None:
        return
    if path.is_dir():
        raise BadInput("output", path, "a file, not a folder")
    check_writable("output", path.absolute().parent)


def check_output(path: Path) -> None:
    """Refuse a folder for a run that holds something else, or can't be written."""
    # sweeps and jobs that are about to begin a run leave names with a dot there
    full = path.is_dir() and any(entry.name[0] != "." for entry in path.iterdir())
    if full and not _is_run(path):
        raise BadInput("output", path, "a new or empty folder, or an earlier run")
    check_writable("output", path)


def check_run(path: Path) -> None:
    """Refuse what is not the folder of a run, complete or begun."""
    if not path.is_dir():
        raise BadInput("run", path, "a folder that exists")
    if not _is_run(path):
        raise BadInput("run", path, f"a folder that sweep wrote ({' or '.join(RUN_FILES)} in it)")


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)
