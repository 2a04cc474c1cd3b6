"""Pages that follow from the code: commands, keys of a study file, Python, modules, a schema.

``python docs/generate.py`` writes them; a test compares them with the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from typer.main import get_command

from depthprobe.cli.app import app
from depthprobe.cli.init import field_docs
from depthprobe.methods import METHODS
from depthprobe.report.result import schema
from depthprobe.study import Recipe, Study, study_to_toml

FOLDER = Path(__file__).parent
DONT_EDIT = "<!-- made by docs/generate.py from the code: change it there -->"
COMMANDS = """\
# Commands

`depthprobe COMMAND --help` prints the same. `python -m depthprobe` is `depthprobe`. Exit codes:
0 done, 1 some trials or checks failed or what was written could not be, 2 input that can't be used,
130 interrupted. In a path `~` is the home folder; a name in it has at most 255 bytes, in UTF-8.
"""
STUDY_FILE = """\
# The study file

A study says what to run: TOML, every key optional. `depthprobe sweep STUDY.toml` runs it, flags
override it, and `study.toml` in a run's folder is the whole of it. A key that does not exist, a
value of the wrong type and one that is not allowed are refused before anything is written.
[The guide to sweeps](sweep.md) explains the choices; this page lists them.
"""
HOUSE = """\
# The house, module by module

A module imports only from rooms above its own. `make lint` holds this.
"""
# the same options as another command's: told once
SAME = {"find": "sweep", "train": "sweep", "probe": "sweep", "distill": "sweep"}
GUIDES = {
    "sweep": "sweep.md",
    "probe": "probing.md",
    "train": "shallow-models.md",
    "distill": "shallow-models.md",
    "find": "find.md",
    "init": "sweep.md",
    "report": "report.md",
    "status": "sweep.md",
    "compare": "compare.md",
    "cost": "cost.md",
    "export": "export.md",
    "recommend": "serve.md",
    "data": "data.md",
    "check": "surgery.md",
}


def commands_page() -> str:
    """Every command with its arguments and options, from the typer app."""
    group = get_command(app)
    lines = [DONT_EDIT, COMMANDS, *_options(group)]
    for name, command in _commands(group):
        lines += [f"## `depthprobe {name}`", "", *_help(command.help or "")]
        guide = GUIDES[name.split()[0]]
        if (FOLDER / guide).exists():
            lines += [f"The guide: [{guide}]({guide}).", ""]
        if name in SAME:
            whole = SAME[name]
            lines += [f"It takes what [`{whole}`](#depthprobe-{whole}) takes.", ""]
        else:
            lines += [f"    {_usage(name, command)}", "", *_options(command)]
            lines += _methods() if command.epilog else []
    return "\n".join(lines).rstrip() + "\n"


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _usage(name: str, command: Any) -> str:
    words = []
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = parameter.metavar
            words.append(word if parameter.required else f"[{word}]")
        elif parameter.required:
            words.append(f"{parameter.opts[0]} {parameter.metavar}")
    return f"depthprobe {name} {' '.join([*words, '[OPTIONS]'])}"


def _options(command: Any) -> list[str]:
    rows = []
    for parameter in command.params:
        argument = parameter.param_type_name == "argument"
        flag = not argument and parameter.is_flag
        word = parameter.metavar if argument else ", ".join(parameter.opts)
        if not argument and not flag and parameter.metavar:
            word += f" {parameter.metavar}"
        default, help_ = parameter.default, parameter.help or ""
        if parameter.required:
            help_ += " Required."
        elif not flag and default not in (None, ""):
            help_ += f" Default: `{default}`."
        rows.append(f"| `{_cell(word)}` | {_cell(help_)} |")
    return ["| | |", "|---|---|", *rows, ""] if rows else []


def _help(text: str) -> list[str]:
    return [re.sub("^Example: (.*)", r"    \1", inspect.cleandoc(text)), ""]


def _methods() -> list[str]:
    """Every method, from its record."""
    rows = [f"| `{m.name}` | {m.role} | {_cell(m.summary)} |" for m in METHODS.values()]
    return ["| method | role | what it is |", "|---|---|---|", *rows, ""]


def study_page() -> str:
    """Every key of a study file, from the dataclasses and their docstrings."""
    lines = [DONT_EDIT, STUDY_FILE, *_table(Study, Study())]
    for name, kind, default, repeated in _tables(Study, Study()):
        lines += [f"## `[{name}]`", ""]
        if repeated:
            lines += [*repeated, ""]
        else:
            lines += [*_prose(kind), *_table(kind, default)]
    lines += [
        "## All defaults",
        "",
        "As `study.toml` of a run has them; keys without a default are left out.",
        "",
        "```toml",
        study_to_toml(Study()).rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def house_page() -> str:
    """Every module by its first line, in the order of the imports."""
    project = tomllib.loads((FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (each["layers"] for each in project["tool"]["importlinter"]["contracts"])
    rooms = [name for layer in reversed(layers) for name in layer.split(" | ")]
    package, lines = FOLDER.parent / "depthprobe", [DONT_EDIT, HOUSE]
    for name in rooms:
        folder = package / name
        modules = sorted(folder.rglob("*.py")) if folder.is_dir() else [package / f"{name}.py"]
        rows = [
            f"| `{path.relative_to(package).with_suffix('')}` | {_cell(_first_line(path))} |"
            for path in modules
            if path.name != "__init__.py"
        ]
        about = [_first_line(folder / "__init__.py"), ""] if folder.is_dir() else []
        lines += [f"## {name}", "", *about, "| | |", "|---|---|", *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return _code(text.partition("\n")[0])


def dataclasses_of(kind: type) -> Iterator[type]:
    """The dataclass and all that its fields hold."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        inner = _inner(hint)
        if inner is not None:
            yield from dataclasses_of(inner)


def _inner(hint: Any) -> type | None:
    """The dataclass in a field's type: itself, or that of an optional or of a table of them."""
    for each in (hint, *typing.get_args(hint)):
        if is_dataclass(each):
            return typing.cast("type", each)
    return None


def _tables(
    kind: type, default: Any, prefix: str = ""
) -> Iterator[tuple[str, type, Any, list[str]]]:
    hints = typing.get_type_hints(kind)
    for field in fields(kind):  # type: ignore[arg-type]
        inner = _inner(hints[field.name])
        if inner is None:
            continue
        many = typing.get_origin(hints[field.name]) is not None and not _optional(hints[field.name])
        name = f"{prefix}{field.name}" + (".NAME" if many else "")
        own = None if default is None or many else getattr(default, field.name)
        repeated = _repeated(inner, own, name)
        yield name, inner, own if own is not None else inner(), repeated
        if not repeated:
            yield from _tables(inner, own, f"{name}.")


def _repeated(kind: type, own: Any, name: str) -> list[str]:
    """For a table that was described before: which, and the defaults that differ."""
    top = {"Recipe": "recipe", "Distillation": "distillation", "Elastic": "elastic"}
    table = top.get(kind.__name__.removeprefix("SasRec"))
    if table is None or name == table:
        return []
    said = f"The keys of [`[{table}]`](#{table})"
    if own is None:
        return [f"{said}; what is left out is as it is there."]
    differ = [f"`{f.name} = {_value(getattr(own, f.name))}`" for f in fields(kind)  # type: ignore[arg-type]
              if getattr(own, f.name) != getattr(Recipe(), f.name)]  # fmt: skip
    return [f"{said}, with the defaults {', '.join(differ)}."]


def _prose(kind: type) -> list[str]:
    return [_code(inspect.getdoc(kind) or ""), ""]


def _table(kind: type, default: Any) -> list[str]:
    docs, hints, rows = field_docs(kind), typing.get_type_hints(kind), []
    for field in fields(kind):  # type: ignore[arg-type]
        if _inner(hints[field.name]) is not None:
            continue
        value = getattr(default, field.name)
        cells = (
            f"`{field.name}`",
            _type(hints[field.name]),
            "" if value is None else f"`{_value(value)}`",
        )
        rows.append(f"| {' | '.join(map(_cell, cells))} | {_cell(_code(docs[field.name]))} |")
    return ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""] if rows else []


def _type(hint: Any) -> str:
    if _optional(hint):
        return " or ".join(_type(k) for k in typing.get_args(hint) if k is not type(None))
    if typing.get_origin(hint) is typing.Annotated:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(hint))
    words = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`"}
    if typing.get_origin(hint) is tuple:
        return f"list of {'text' if str in typing.get_args(hint) else 'numbers'}"
    return words[hint]


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _value(value: Any) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _code(text: str) -> str:
    return text.replace("``", "`")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


# --- Python ----------------------------------------------------------------------------------

API_HEAD = """\
# Python

`import depthprobe as dp` costs nothing: each name is loaded when it is used. Input that can't be
used raises `depthprobe.errors.BadInput`, a `ValueError` whose message is one line.
"""
FIGURES = (
    "summarise", "kept_vs_depth", "accuracy_vs_depth", "accuracy_vs_cost", "skip_sensitivity",
    "block_influence", "selections", "span_map", "settling_depth", "ablation_changes",
    "speed_vs_depth", "kept_side_by_side",
)  # fmt: skip
# Heading, words, and what stands below it: a name of `dp`, or a module and a name in it.
API: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Data", "", ("prepare_data", "load_data")),
    (
        "Studies and runs", "[The study file](study-file.md) lists every key; `depthprobe.study` "
        "has a dataclass of the same name for each table.",
        ("load_study", "run_sweep", "open_run", "runs.store:Run", "build_report"),
    ),
    (
        "Methods", "[A new method](methods.md) has two complete examples.",
        ("register", "Method", "methods:Request", "methods:Trial", "methods:Task",
         "runs.context:Result"),
    ),
    (
        "Figures", "Each function takes a run, its folder or its summary, and returns matplotlib's "
        "Axes; [the report](report.md) says what each shows.",
        tuple(f"report.figures:{name}" for name in FIGURES),
    ),
    ("Backbones", "", ("load_backbone", "find_blocks", "keep_blocks", "skip_blocks")),
    ("Ranks and metrics", "", ("rank_targets", "metrics_from_ranks")),
    ("An exported model", "", ("load_recommender", "models.export:ExportedRecommender")),
    (
        "Probing a recommender of your own",
        "[The guide](probing.md#your-own-recommender-in-python) has an example.",
        ("probing.passes:CausalEncoder", "evaluation.ranks:EvalSet", "probing.passes:early_exit",
         "probing.walk:route", "probing.walk:rank_routes", "probing.similarity:similarities",
         "probing.walk:greedy", "probing.passes:settling", "probing.taylor:taylor_importance"),
    ),
)  # fmt: skip


def api_page() -> str:
    """The public functions and classes, from their signatures and docstrings."""
    lines = [DONT_EDIT, API_HEAD]
    for title, words, entries in API:
        lines += [f"## {title}", "", *([words, ""] if words else [])]
        for entry in entries:
            module, _, name = entry.rpartition(":")
            path = f"depthprobe.{module}" if module else "depthprobe"
            thing = getattr(importlib.import_module(path), name)
            shown = f"dp.{name}" if not module else f"{path}.{name}"
            shown = shown.replace("depthprobe.report.figures", "dp.figures")
            lines += [f"### `{shown}`", "", *_class(thing, name), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def _class(thing: Any, name: str) -> list[str]:
    """A function; or a class: its words, its fields, its methods."""
    if not inspect.isclass(thing):
        return ["```python", f"def {_signature(thing, name)}: ...", "```", "", *_docstring(thing)]
    lines, docs = [*_docstring(thing), ""], field_docs(thing) if is_dataclass(thing) else {}
    lines += [f"- `{field}`: {_code(_roles(text))}" for field, text in docs.items()]
    for key, value in vars(thing).items():
        function = getattr(value, "func", None) or getattr(value, "fget", None) or value
        if key.startswith("_") or key in docs or not inspect.isroutine(function):
            continue
        head = _signature(value, key) if inspect.isfunction(value) else key
        first = inspect.cleandoc(function.__doc__ or "").partition("\n\n")[0]
        head = " ".join(head.split()).replace("( ", "(").replace(", )", ")")
        lines.append(f"- `{head}`: {_code(_roles(' '.join(first.split())))}")
    return lines


def _signature(function: Any, name: str) -> str:
    """As it is written, one parameter a line where a definition is long; without ``self``."""
    made, star, whole = [], False, inspect.signature(function)
    for parameter in whole.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            made.append("*")
        star = star or parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        text = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        text += parameter.name
        if parameter.annotation is not parameter.empty:
            text += f": {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            default = parameter.default
            text += f" = {json.dumps(default) if isinstance(default, str) else repr(default)}"
        made.append(text)
    result = whole.return_annotation
    end = ")" if result is whole.empty else f") -> {_annotation(result)}"
    line = f"{name}({', '.join(made)}{end}"
    return line if len(line) <= 91 else f"{name}(\n    " + ",\n    ".join(made) + f",\n{end}"


def _annotation(kind: Any) -> str:
    return kind if isinstance(kind, str) else inspect.formatannotation(kind)


def _docstring(thing: Any) -> list[str]:
    """Markdown of a docstring in Google's style: lists of arguments, what is raised, examples."""
    lines, inside = list[str](), ""
    for line in inspect.cleandoc(thing.__doc__ or "").splitlines():
        heading = re.fullmatch(r"(Args|Attributes|Raises|Returns|Yields):", line)
        item = re.fullmatch(r"    (\*{0,2}\w[\w, ]*): (.*)", line)
        example = line.lstrip().startswith((">>> ", "... "))
        if inside == "example" and not line.strip():
            lines, inside = [*lines, "```"], ""
        if heading:
            inside = heading[1]
            lines += ["", f"{'Arguments' if inside == 'Args' else inside}:", ""]
        elif example and inside != "example":
            lines, inside = [*lines, "```python", line], "example"
        elif inside == "example":
            lines.append(line)
        elif inside in ("Args", "Attributes", "Raises") and item:
            lines.append(f"- `{item[1]}`: {_code(_roles(item[2]))}")
        else:
            inside = inside if line.startswith(" ") or not line else ""
            of_list = inside in ("Args", "Attributes", "Raises") and line
            text = f"  {line.strip()}" if of_list else line.strip() if inside else line
            lines.append(_code(_roles(text)))
    return [*lines, "```"] if inside == "example" else lines


def _roles(text: str) -> str:
    """:func:`depthprobe.figures.summarise` as ``summarise``."""
    return re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"``\1``", text)


def result_schema() -> str:
    """The JSON Schema of RUN/result.json, from its structures."""
    return json.dumps(schema(), indent=1) + "\n"


PAGES: Mapping[str, Any] = {
    "api.md": api_page,
    "commands.md": commands_page,
    "study-file.md": study_page,
    "house.md": house_page,
    "result.schema.json": result_schema,
}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (FOLDER / page).write_text(make(), encoding="utf-8")
