"""The options that commands share, and the study that they describe."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from depthprobe.data.readers.streams import stem
from depthprobe.errors import BadInput, check_writable, short
from depthprobe.study import (
    OWN_SOURCE,
    Study,
    override,
    parse_setting,
    read_demo,
    read_study,
    study_from_dict,
    with_keys,
)

Command = TypeVar("Command", bound=Callable[..., Any])


def option(metavar: str, help: str, **more: Any) -> Any:
    """An option of a command, named after its parameter."""
    return typer.Option(metavar=metavar, help=help, **more)


def _parser(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def parse(text: Any) -> Any:
        try:
            return kind(text) if isinstance(text, str) else text  # a default has the type already
        except ValueError:  # typer's own message would not show the given text
            raise typer.BadParameter(f"expected a {what}, got {short(text)}") from None

    return parse


def _number(text: str) -> float:
    return float(_ascii(text))


def _share(text: str) -> float:
    return _number(text.removesuffix("%")) / 100 if text.endswith("%") else _number(text)


def _ascii(text: str) -> str:
    """The text, without the underscores and non-ASCII digits that Python accepts in numbers."""
    if not text.isascii() or "_" in text:
        raise ValueError(text)
    return text


def _path(text: str) -> Path:
    """A valid path; ``~`` is the home folder, also in ``--output=~/run``."""
    name = os.path.expanduser(text)
    raw = name.encode()  # ValueError for bytes that are not text
    if not raw or b"\0" in raw or len(raw) > 4095 or max(map(len, raw.split(b"/"))) > 255:
        raise ValueError(text)
    return Path(name)


def _function(text: str) -> str:
    if not OWN_SOURCE.fullmatch(text):
        raise ValueError(text)
    return text


function = _parser(_function, "function as my_package.my_module:build")
whole, number = _parser(lambda text: int(_ascii(text)), "whole number"), _parser(_number, "number")
share = _parser(_share, "share such as 2% or 0.02")
path = _parser(_path, "path of names of 1 to 255 bytes, in UTF-8")


@dataclass(frozen=True)
class Flag:
    """An option that changes a setting of a study."""

    setting: str  # the key, with dots
    metavar: str
    help: str
    kind: type = str  # the type of the value; ``tuple`` for a list with commas
    parser: Callable[[str], Any] | None = None

    def parameter(self, name: str) -> Parameter:
        """The parameter in a command's signature that typer reads."""
        parser = self.parser or {int: whole, float: number}.get(self.kind)
        kind = str if self.kind is tuple else self.kind
        hint = Annotated[kind | None, option(self.metavar, self.help, parser=parser)]  # type: ignore[valid-type]
        return Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=hint)


COLUMN = "The column's name, or without a header its number from 1 [default: guessed]."
LOG = {  # how a log is read and cleaned
    "format": Flag("data.format", "F", "The log's format, see data list [default: detected]."),
    "items": Flag("data.items", "FILE", "A file of item titles [default: beside the log]."),
    "user_column": Flag("data.columns.user", "C", COLUMN),
    "item_column": Flag("data.columns.item", "C", COLUMN),
    "time_column": Flag("data.columns.time", "C", COLUMN),
    "time_format": Flag(
        "data.columns.time_format", "F", "How times are written, such as %d/%m/%Y [default: ISO]."
    ),
    "rating_column": Flag("data.columns.rating", "C", COLUMN),
    "title_column": Flag("data.columns.title", "C", COLUMN),
    "ties": Flag("data.ties", "random|file|item", "Order of equal times [default: random]."),
    "ties_seed": Flag("data.ties_seed", "N", "Seed of the random order [default: 0].", int),
    "min_rating": Flag("data.cleaning.min_rating", "X", "Drop interactions rated lower.", float),
    "repeats": Flag(
        "data.cleaning.repeats",
        "keep|first|last",
        "Repeats of an item by a user: keep all, or only the first or last [default: keep].",
    ),
    "latest": Flag("data.cleaning.latest", "N", "Keep each user's latest N interactions.", int),
    "core": Flag("data.cleaning.core", "K", "Keep users and items with K or more (k-core).", int),
    "users": Flag("data.cleaning.users", "N", "Keep N users, drawn at random.", int),
}
SPLIT = {
    "split": Flag("protocol.split", "leave-one-out|temporal|given", "How to split the log."),
    "split_at": Flag("protocol.split_at", "V,T", "Where validation and test begin.", tuple),
}
VERDICT = {  # settings of a report, which can change without another training
    "margin": Flag("protocol.margin", "M", "The acceptable loss: 2% or 0.02.", float, share),
    "level": Flag("protocol.level", "P", "The confidence of intervals: 95% or 0.95.", float, share),
    "metric": Flag("protocol.metric", "HR@K|NDCG@K|MRR", "The metric of the verdict."),
}
SWEEP = {
    "data": Flag("data.source", "D", "A log, a prepared folder, a public set, or embedded."),
    "backbone": Flag(
        "backbone.source", "B", "A folder with config.json, a Hugging Face id, or embedded."
    ),
    "recommender": Flag(
        "backbone.source",
        "MODULE:FUNCTION",
        "A trained recommender of your own, by the function that builds it.",
        parser=function,
    ),
    "revision": Flag("backbone.revision", "REV", "The branch, tag or commit of a Hugging Face id."),
    "layers": Flag("layers", "DEPTHS", "Depths: 1,2,4 or 1-12 or all or auto, or find."),
    "methods": Flag(
        "methods", "NAMES", "Methods from the list below, or variants such as heal:ends.", tuple
    ),
    "seeds": Flag("seeds", "N", "Number of seeds. Raise it to add seeds to a run.", int),
    "hours": Flag("search.hours", "H", "With find: maximum hours of training.", float),
    "epochs": Flag("recipe.epochs", "N", "Maximum number of epochs. SASRec keeps its own.", int),
    "device": Flag("device", "auto|cpu|cuda|mps", "Where to compute."),
    "budget": Flag("budget", "steps|compute", "What to hold constant: training steps or compute."),
    "cache": Flag("cache", "DIR", "Share trainings between runs through this folder."),
    "tuning": Flag("backbone.tuning", "full|lora|frozen", "Which weights of the blocks to train."),
    "item_embeddings": Flag(
        "item_table", "FILE.npy|text[:K]|learned|sasrec", "Where the item embeddings come from."
    ),
    **SPLIT,
    **VERDICT,
    "name": Flag("name", "NAME", "The study's name."),
}
FLAGS = LOG | SWEEP
SET = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any key of a study file, such as recipe.batch_size=64. Repeatable.",
    ),
]
AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
WORDS = {  # arguments as the help names them
    **{"data.source": "D", "study": "STUDY.toml", "run": "RUN", "trial": "TRIAL"},
    **dict.fromkeys(("recommender", "folder", "dir", "output"), "DIR"),
}


def as_typed(error: BadInput, arguments: Sequence[str]) -> BadInput:
    """The error with the option that the user wrote in place of the key."""
    names = [name for name, flag in FLAGS.items() if flag.setting == error.field]
    flags = {f"--{name.replace('_', '-')}" for name in names or [error.field]}
    typed = {word.partition("=")[0] for word in arguments}
    if flag := next(iter(flags & typed), None):
        return error.renamed(flag)
    word = WORDS.get(error.field)
    return error.renamed(word) if word and str(error.value) in arguments else error


def takes_flags(flags: Mapping[str, Flag]) -> Callable[[Command], Command]:
    """Give a command options that change a study; it gets their values as ``**flags``."""

    def extend(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind != each.VAR_KEYWORD]
        more = [flag.parameter(name) for name, flag in flags.items()]
        every = sorted([*more, *own], key=lambda each: each.kind)  # keyword-only ones last
        command.__signature__ = signature.replace(parameters=every)  # type: ignore[attr-defined]
        return command

    return extend


def make_study(file: Path | None = None, settings: Sequence[str] = (), **flags: Any) -> Study:
    """The study of a sweep: from a file, from data and backbone, or the demo.

    ``settings``, such as ``recipe.epochs=3``, change it, then the flags do.
    """
    data, backbone = flags.get("data"), flags.get("backbone")
    if (own := flags.get("recommender")) is not None:
        if backbone is not None:
            raise BadInput("--recommender", own, f"no --backbone {backbone} beside it")
        backbone = own
    if file is not None:
        try:
            content = read_study(file)
        except BadInput as error:
            if error.field != "study" or file.suffix == ".toml":
                raise
            raise BadInput("study", str(file), f"{error.allowed}; a log needs --data") from None
        if content["name"] == file.stem == "study":
            content["name"] = file.resolve().parent.name
    elif data is None and backbone is None:
        content = read_demo()
    else:
        content = {"name": _study_name(data, backbone)}
    keys = dict(map(parse_setting, settings))
    study = study_from_dict(with_keys(content, keys | _changes(flags)))
    if (epochs := flags.get("epochs")) is not None:
        own = [name for name, variant in study.variants.items() if variant.recipe is not None]
        study = override(study, **{f"variants.{name}.recipe.epochs": epochs for name in own})
    _check_split(study, flags)
    check_revision(flags.get("revision"), study.backbone.source)
    return study


def apply_flags(study: Study, **flags: Any) -> Study:
    """The study with the flags' settings."""
    study = override(study, **_changes(flags))
    _check_split(study, flags)
    return study


def _changes(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that flags give, by key."""
    given = {name: value for name, value in flags.items() if value is not None}
    changes = {FLAGS[name].setting: value for name, value in given.items()}
    for name, value in given.items():
        if FLAGS[name].kind is tuple:
            pieces = tuple(filter(None, (piece.strip() for piece in value.split(","))))
            changes[FLAGS[name].setting] = pieces
    return changes


def _check_split(study: Study, flags: Mapping[str, Any]) -> None:
    if flags.get("split_at") is not None and study.protocol.split != "temporal":
        raise BadInput("protocol.split_at", flags["split_at"], "--split temporal beside it")


def _study_name(data: str | None, backbone: str | None) -> str:
    parts = [
        "" if data in {None, "embedded"} else stem(Path(str(data))),
        "" if backbone in {None, "embedded"} else _base_name(str(backbone)),
    ]
    return "-".join(filter(None, parts)) or "embedded"


def _base_name(backbone: str) -> str:
    if OWN_SOURCE.fullmatch(backbone):
        return backbone.partition(":")[0].rpartition(".")[2]
    return Path(backbone).resolve().name


def default_output(study: Study) -> Path:
    """The default folder of a run: ``runs/<study's name>``."""
    name = re.sub(r"[^\w.-]+|^\.+", "-", study.name).strip("-.").encode()[:200]
    return Path("runs", name.decode(errors="ignore") or "study")


def check_revision(revision: str | None, source: str) -> None:
    """Refuse an empty revision, and a revision of a source that is not on the hub."""
    local = source == "embedded" or Path(source).exists()
    if revision is not None and (local or not revision.strip()):
        raise BadInput("revision", revision, "a branch, tag or commit of a Hugging Face id")


def check_output_file(path: Path | None, field: str = "output") -> None:
    """Refuse a file that can't be written; None is accepted."""
    if path is None:
        return
    if path.is_dir():
        raise BadInput(field, path, "a file, not a folder")
    check_writable(field, path.parent)
