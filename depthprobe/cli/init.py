"""`init`: a study file for a log and a backbone, with a comment for each key."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from depthprobe.cli.options import (
    FLAGS,
    SET,
    check_output_file,
    make_study,
    path,
    takes_flags,
)
from depthprobe.cli.terminal import cell, echo
from depthprobe.errors import BadInput, one_line, shell_line
from depthprobe.files import complete_file
from depthprobe.formatting import part_percent, plural
from depthprobe.study import Study, override, parse_layers

if TYPE_CHECKING:
    from depthprobe.data.storage import Sequences

WIDTH = 98  # width of a comment's text
# tables with every key written out, and keys written as settings even at their defaults
TABLES = ("", "data", "data.columns", "data.cleaning", "backbone", "recipe", "protocol")
CHOSEN = (
    *("name", "layers", "methods", "seeds", "data.source", "data.max_history", "backbone.source"),
    *("backbone.tuning", "recipe.epochs", "recipe.batch_size", "recipe.learning_rate"),
    *("protocol.split", "protocol.metric", "protocol.margin"),
)
HEAD = """\
A study of {data} with {backbone}, written by depthprobe init.

    {sweep} --dry-run    shows the plan and how long it takes
    {sweep}              runs it

A line "# key = value" is a default: take the # away to change it. docs/study-file.md has the tables
that are not here.
"""


@takes_flags(FLAGS)
def init(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY.toml", help="The file to write.", parser=path)
    ] = Path("study.toml"),
    *,
    settings: SET = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a file that is there.")
    ] = False,
    **flags: Any,
) -> None:
    """Write a study file for a log and a backbone, with a comment for each key.

    Reads the log and the backbone's configuration, asks nothing, runs nothing.
    """
    if study.exists() and not overwrite:
        raise BadInput("STUDY.toml", study, "already exists; --overwrite replaces it", fault=True)
    check_output_file(study, "STUDY.toml")
    chosen = make_study(None, settings or (), **flags)

    from depthprobe.data.prepared import read_data
    from depthprobe.data.storage import MANIFEST
    from depthprobe.models.backbones import pretrained_config

    sequences = read_data(chosen.data)
    config = pretrained_config(chosen.backbone)
    blocks = int(config.get_text_config(decoder=True).num_hidden_layers)
    depths = parse_layers(chosen.layers, blocks)
    if sequences.columns and not (Path(chosen.data.source).expanduser() / MANIFEST).is_file():
        read = sequences.columns.read
        named = {f"data.columns.{what}": read.get(what) for what in ("user", "item", "time")}
        chosen = override(chosen, **named)
    if sequences.given is not None and flags["split"] is None:
        chosen = override(chosen, **{"protocol.split": "given"})
    facts = facts_of(sequences, chosen)
    facts["layers"] = f"{plural(blocks, 'block')} ({config.model_type}); this stands for depths "
    facts["layers"] += ", ".join(map(str, depths))
    text = commented(chosen, facts, file=study)
    with complete_file(study) as temporary:
        temporary.write_text(text, encoding="utf-8")
    if sequences.columns:
        echo(f"columns: {sequences.columns}")
    for warning in sequences.warnings:
        echo(f"warning: {one_line(warning)}")
    echo(study)
    echo(f"next: {_sweep(study)} --dry-run")


def facts_of(sequences: Sequences, study: Study) -> dict[str, str]:
    """Comments on single keys of a study that the log suggests."""
    import numpy as np

    from depthprobe.data.splits import make_split
    from depthprobe.data.statistics import popularity

    lengths, numbers = np.diff(sequences.offsets), sequences.statistics
    longest = study.data.max_history
    few = [int((counts < 5).sum()) for counts in (lengths, popularity(sequences))]
    size = f"{cell(sequences.n_users)} users, {cell(sequences.n_items)} items,"
    facts = {
        "data.source": f"{size} {cell(sequences.n_interactions)} interactions",
        "data.max_history": f"histories of {cell(np.median(lengths))} items in the median, "
        f"{cell(lengths.max())} at most; {part_percent(float((lengths > longest).mean()))} have "
        f"more than {longest}",
        "data.cleaning.core": f"{cell(few[0])} users and {cell(few[1])} items have fewer than 5",
        "protocol.filter_seen": f"{part_percent(float(numbers['repeats']))} of the interactions "
        "repeat an item of their user",
    }
    if sequences.times is not None:
        facts["data.source"] += f", {numbers['first']} to {numbers['last']}"
        tied = part_percent(float(numbers["shared_times"]))
        facts["data.ties"] = f"{tied} of neighbours in a history have the same time"
    if sequences.columns is not None:
        facts["data.columns"] = str(sequences.columns)
    try:
        split = make_split(sequences, study.protocol)
        users = cell(split.statistics["test_users"])
        facts["protocol.split"] = f"{users} test users with {study.protocol.split}"
    except BadInput as error:
        facts["protocol.split"] = f"no {study.protocol.split} split ({error.allowed})"
    return {key: one_line(fact) for key, fact in facts.items()}


def commented(study: Study, facts: dict[str, str], *, file: Path = Path("study.toml")) -> str:
    """A study as TOML: settings, and defaults commented out, each below its explanation.

    Args:
        study: settings that differ from their defaults are written.
        facts: further comments by key, from :func:`facts_of`.
        file: the file's name, for the example commands at the top.
    """
    names = {"data": study.data.source, "backbone": study.backbone.source}
    named = {
        key: f"the embedded {key}" if name == "embedded" else one_line(name)
        for key, name in names.items()
    }
    lines = [f"# {line}".rstrip() for line in HEAD.format(**named, sweep=_sweep(file)).splitlines()]
    defaults = dict(_tables(Study()))
    for name, table in _tables(study):
        own = list(_keys(name, table, defaults.get(name, type(table)()), facts))
        if name and own:
            lines += [
                "",
                *([] if name not in facts else _comment(f"Here: {facts[name]}")),
                f"[{name}]",
            ]
        lines += own
    return "\n".join(lines) + "\n"


def _keys(name: str, table: Any, default: Any, facts: dict[str, str]) -> Iterator[str]:
    docs, prefix = field_docs(type(table)), f"{name}." if name else ""
    for each in fields(table):
        value, usual = getattr(table, each.name), getattr(default, each.name)
        key = prefix + each.name
        setting = value != usual or key in CHOSEN
        if is_dataclass(value) or each.name == "variants" or not (setting or name in TABLES):
            continue
        yield ""
        yield from _comment(docs[each.name])
        if key in facts:
            yield from _comment(f"Here: {facts[key]}.")
        text = "..." if value is None else json.dumps(value, ensure_ascii=False)
        yield f"{'' if setting else '# '}{each.name} = {text}".replace("\x7f", "\\u007f")


def _tables(table: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tables of a study by name, as in its file, with those of variants."""
    yield name, table
    prefix = f"{name}." if name else ""
    inner = {f"{prefix}{each.name}": getattr(table, each.name) for each in fields(table)}
    if isinstance(table, Study):
        inner |= {f"variants.{name}": variant for name, variant in table.variants.items()}
    for key, value in inner.items():
        if is_dataclass(value):
            yield from _tables(value, key)


def _comment(text: str) -> list[str]:
    """A comment's lines, with the first letter in upper case."""
    plain = text.replace("``", "`")
    lines = textwrap.wrap(plain[0].upper() + plain[1:], WIDTH, break_on_hyphens=False)
    return [f"# {line}" for line in lines]


def _sweep(file: Path) -> str:
    return shell_line(["depthprobe", "sweep", str(file)])


def field_docs(kind: type) -> dict[str, str]:
    """The ``#:`` comment of each field, before or after it; inherited fields included."""
    found, words = dict[str, str](), list[str]()
    bases = [each for each in reversed(kind.__mro__[1:]) if is_dataclass(each)]
    sources = [textwrap.dedent(inspect.getsource(each)) for each in (*bases, kind)]
    for line in "\n".join(sources).splitlines():
        code, _, comment = line.partition("#: ")
        words += [comment] if comment else []
        name = re.match(r"    (\w+):", code)
        if name and words:
            found[name[1]], words = " ".join(words), []
    return found
