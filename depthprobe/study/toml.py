"""Studies as TOML and as plain values; what is wrong in one is named by its key."""

from __future__ import annotations

import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from depthprobe.study.errors import BadInput, nearest, short
from depthprobe.study.settings import NOT_DECIDING, Study

T = TypeVar("T")


def load_study(path: str | Path) -> Study:
    """Read a study file (TOML); keys that are absent keep their defaults.

    Raises:
        BadInput: for a file that can't be read, an unknown key, or a value of the wrong type.
    """
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput("study", str(path), "a TOML file that exists") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput("study", str(path), f"a readable TOML file ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise BadInput("study", str(path), f"valid TOML ({error})") from None
    return study_from_dict({"name": file.stem, **content})


def demo_study() -> Study:
    """The embedded default: what ``depthprobe sweep`` runs without arguments."""
    text = resources.files("depthprobe").joinpath("demo.toml").read_text(encoding="utf-8")
    return study_from_dict(tomllib.loads(text))


def study_from_dict(content: Mapping[str, Any]) -> Study:
    """The study that ``study_to_dict`` wrote; unknown keys and wrong types are BadInput.

    What a variant's table leaves out is what the study's own table of that name says.
    """
    variants = content.get("variants")
    if isinstance(variants, Mapping):
        inherited = {name: _inherit(table, content) for name, table in variants.items()}
        content = {**content, "variants": inherited}
    return _build(Study, content, "")


def _inherit(variant: Any, study: Mapping[str, Any]) -> Any:
    if not isinstance(variant, Mapping):
        return variant
    return {
        key: {**study.get(key, {}), **value} if isinstance(value, Mapping) else value
        for key, value in variant.items()
    }


def study_to_dict(study: Study) -> dict[str, Any]:
    """Plain values (strings, numbers, lists, dicts), None left out as TOML has no null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return list(value) if isinstance(value, tuple) else value

    return typing.cast("dict[str, Any]", plain(asdict(study)))


def study_to_toml(study: Study) -> str:
    """The whole study as TOML, defaults written out, so that a run says all that it used."""
    lines: list[str] = []

    def write(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            if not isinstance(value, dict):
                # JSON's strings, numbers, booleans and lists are TOML's too, but for delete
                text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
                lines.append(f"{key} = {text}")
        for key, value in table.items():
            if isinstance(value, dict) and (value or prefix):
                lines.extend(["", f"[{prefix}{key}]"])
                write(value, f"{prefix}{key}.")

    write(study_to_dict(study), "")
    return "\n".join(lines) + "\n"


def differences(old: Study, new: Study) -> list[str]:
    """``field: old -> new`` for every setting that differs and decides the numbers.

    A variant that one of them alone has is no difference: it changes no trial of the other.
    """

    def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in table.items():
            out |= (
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return out

    common = old.variants.keys() & new.variants.keys()
    before, after = (
        flat(asdict(study) | {"variants": {name: asdict(study.variants[name]) for name in common}})
        for study in (old, new)
    )
    return [
        f"{key}: {short(before.get(key))} -> {short(after.get(key))}"
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
        and NOT_DECIDING.isdisjoint({key, key.partition(".")[0]})  # a setting, or its table
    ]


def override(study: Study, **changes: Any) -> Study:
    """A study with dotted fields replaced, e.g. ``{"data.cleaning.core": 5}``; None is skipped."""
    for key, value in changes.items():
        if value is not None:
            study = _with(study, key, value)
    return study


def _with(settings: T, key: str, value: Any) -> T:
    name, _, rest = key.partition(".")
    if rest:
        value = _with(getattr(settings, name), rest, value)
    return replace(settings, **{name: value})  # type: ignore[type-var]


def _build(kind: type[T], content: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise BadInput(f"study key {prefix}{key}", value, nearest(key, known))
        values[key] = _convert(hints[key], value, f"{prefix}{key}")
    return kind(**values)


def _convert(hint: Any, value: Any, name: str) -> Any:
    if is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise BadInput(name, value, f"a table [{name}]")
        return _build(typing.cast("type[Any]", hint), value, f"{name}.")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in options:
            raise BadInput(name, value, f"one of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            raise BadInput(name, value, "a list of strings")
        return tuple(value)
    if origin in {dict, Mapping}:
        if not isinstance(value, Mapping):
            raise BadInput(name, value, f"a table [{name}]")
        return {key: _convert(options[1], each, f"{name}.{key}") for key, each in value.items()}
    if origin in {typing.Union, types.UnionType}:
        hint = next(option for option in options if option is not type(None))
        return _convert(hint, value, name)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BadInput(name, value, f"a value of type {hint.__name__}")
    return value
