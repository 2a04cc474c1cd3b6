"""What to run: frozen dataclasses, TOML in, canonical hash out. Imports nothing heavy."""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

METHODS = (
    "popularity",
    "sasrec",
    "full",
    "early-exit",
    "skip",
    "finetune",
    "heal",
    "distill",
    "random-init",
)
DEFAULT_METHODS = ("popularity", "sasrec", "full", "early-exit", "skip", "finetune", "distill")
# settings that change no trial's numbers: a run may be continued with others
NOT_DECIDING = frozenset({"name", "device", "methods"})
PROMPT = "Purchase history:"

T = TypeVar("T")


class BadInput(ValueError):
    """Input that can't be used; the message is one line: field, value, what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        self.field, self.value, self.allowed = field, value, allowed
        super().__init__(f"{field}: {_short(value)} is not usable; {allowed}")


def _short(value: object, limit: int = 120) -> str:
    text = repr(str(value)) if isinstance(value, Path) else repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _at_least(owner: str, values: Mapping[str, float], low: float) -> None:
    for name, value in values.items():
        if not value >= low or value == float("inf"):
            raise BadInput(f"{owner}.{name}", value, f"a number of at least {low:g}")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the interactions come from and how much of a history a model reads."""

    source: str = "embedded"
    max_history: int = 50

    def __post_init__(self) -> None:
        _at_least("data", {"max_history": self.max_history}, 1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The pretrained decoder, what of it is trained, and the prompt before the items.

    ``tuning`` trains every weight of the blocks (``full``), low-rank updates of the MLP
    projections (``lora``, as SLMRec does), or the adapters alone (``frozen``).
    """

    source: str = "embedded"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = 16
    prompt: str = PROMPT

    def __post_init__(self) -> None:
        _at_least("backbone", {"lora_rank": self.lora_rank}, 1)
        if self.trust_remote_code and not self.revision:
            raise BadInput("backbone.revision", None, "remote code needs a pinned revision")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained: AdamW, cosine with warm-up, early stopping on validation NDCG@10."""

    epochs: int = 6
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    clip: float = 1.0
    patience: int = 3

    def __post_init__(self) -> None:
        whole = {"epochs": self.epochs, "batch_size": self.batch_size, "patience": self.patience}
        _at_least("recipe", whole, 1)
        _at_least("recipe", {"weight_decay": self.weight_decay, "warmup": self.warmup}, 0)
        if not 0 < self.learning_rate < 10:
            raise BadInput("recipe.learning_rate", self.learning_rate, "a number in (0, 10)")
        if not self.warmup < 1:
            raise BadInput("recipe.warmup", self.warmup, "a share of the steps, in [0, 1)")
        if not self.clip > 0:
            raise BadInput("recipe.clip", self.clip, "a number above 0")


@dataclass(frozen=True, kw_only=True)
class SasRec:
    """The non-LLM baseline, and where the item embeddings come from (Kang and McAuley, 2018)."""

    width: int = 64
    blocks: int = 2
    heads: int = 2
    dropout: float = 0.5
    recipe: Recipe = Recipe(epochs=16, patience=4, learning_rate=2e-3)

    def __post_init__(self) -> None:
        sizes = {"width": self.width, "blocks": self.blocks, "heads": self.heads}
        _at_least("sasrec", sizes, 1)
        if self.width % self.heads:
            raise BadInput("sasrec.width", self.width, f"a multiple of heads ({self.heads})")
        if not 0 <= self.dropout < 1:
            raise BadInput("sasrec.dropout", self.dropout, "a share in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """SLMRec's losses: ``CE + cosine * D_cos + norm * D_norm + supervision * L_ms``."""

    groups: int = 4
    cosine: float = 1.0
    norm: float = 0.1
    supervision: float = 0.1

    def __post_init__(self) -> None:
        _at_least("distillation", {"groups": self.groups}, 1)
        weights = {"cosine": self.cosine, "norm": self.norm, "supervision": self.supervision}
        _at_least("distillation", weights, 0)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How accuracy is measured, and how much of it a shallower model may lose."""

    filter_seen: bool = True
    sampled: bool = True
    validation_users: int = 4096
    margin: float = 0.01
    resamples: int = 1000

    def __post_init__(self) -> None:
        _at_least("protocol", {"validation_users": self.validation_users}, 1)
        _at_least("protocol", {"resamples": self.resamples}, 100)
        if not 0 < self.margin < 1:
            raise BadInput("protocol.margin", self.margin, "a share of the accuracy, in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How time is measured: one batch of real users, rounds interleaved over the depths."""

    batch_size: int = 128
    warmup: int = 3
    rounds: int = 15

    def __post_init__(self) -> None:
        _at_least("cost", {"batch_size": self.batch_size, "rounds": self.rounds}, 1)
        _at_least("cost", {"warmup": self.warmup}, 0)


@dataclass(frozen=True, kw_only=True)
class Study:
    """One question: which depths of which backbone, on which log, by which methods."""

    name: str = "study"
    layers: str = "auto"
    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: int = 2
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    data: Data = Data()
    backbone: Backbone = Backbone()
    sasrec: SasRec = SasRec()
    recipe: Recipe = Recipe()
    distillation: Distillation = Distillation()
    protocol: Protocol = Protocol()
    cost: Cost = Cost()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise BadInput("seeds", self.seeds, "a whole number of at least 1")
        if not self.methods:
            raise BadInput("methods", "", f"at least one of {', '.join(METHODS)}")
        for name in self.methods:
            if name not in METHODS:
                raise BadInput("methods", name, _nearest(name, METHODS))
        if len(set(self.methods)) != len(self.methods):
            raise BadInput("methods", ",".join(self.methods), "each method once")
        parse_layers(self.layers, None)

    def digest(self) -> str:
        """Hash of everything that decides the numbers of a trial."""
        content = {k: v for k, v in asdict(self).items() if k not in NOT_DECIDING}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_layers(text: str, blocks: int | None) -> tuple[int, ...]:
    """Depths named by ``1,2,4``, ``1-12`` (both included), ``all`` or ``auto`` (1, 2, 4, ...).

    Args:
        text: what the user wrote.
        blocks: the backbone's number of blocks; None checks the spelling alone and returns ().

    Raises:
        BadInput: for anything that is not a depth between 1 and ``blocks``.
    """
    top = "the backbone's number of blocks" if blocks is None else f"{blocks}"
    allowed = f"depths from 1 to {top}, as 1,2,4 or 1-12 or all"
    word = text.strip().lower()
    if word in {"all", "auto"}:
        if blocks is None:
            return ()
        if word == "all":
            return tuple(range(1, blocks + 1))
        return tuple(2**k for k in range(blocks.bit_length()) if 2**k < blocks)
    depths: set[int] = set()
    for part in word.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not (_is_count(first) and (_is_count(last) if dash else True)):
            raise BadInput("layers", text, allowed)
        low, high = int(first), int(last if dash else first)
        if low < 1 or high < low or (blocks is not None and high > blocks):
            raise BadInput("layers", text, allowed)
        if blocks is not None:
            depths.update(range(low, high + 1))
    return tuple(sorted(depths))


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}one of {', '.join(known)}"


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
    return _build(Study, {"name": file.stem, **content}, "")


def demo_study() -> Study:
    """The embedded default: what ``depthprobe sweep`` runs without arguments."""
    text = resources.files("depthprobe").joinpath("demo.toml").read_text(encoding="utf-8")
    return _build(Study, tomllib.loads(text), "")


def study_from_dict(content: Mapping[str, Any]) -> Study:
    """The study that ``study_to_dict`` wrote; unknown keys and wrong types are BadInput."""
    return _build(Study, content, "")


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
            if isinstance(value, dict):
                lines.extend(["", f"[{prefix}{key}]"])
                write(value, f"{prefix}{key}.")

    write(study_to_dict(study), "")
    return "\n".join(lines) + "\n"


def differences(old: Study, new: Study) -> list[str]:
    """``field: old -> new`` for every setting that differs and decides the numbers."""

    def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in table.items():
            out |= (
                flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
            )
        return out

    before, after = flat(asdict(old)), flat(asdict(new))
    return [
        f"{key}: {_short(before[key])} -> {_short(after[key])}"
        for key in before
        if key not in NOT_DECIDING and before[key] != after[key]
    ]


def override(study: Study, **changes: Any) -> Study:
    """A study with dotted fields replaced, e.g. ``{"data.source": "log.txt"}``; None is skipped."""
    for key, value in changes.items():
        if value is None:
            continue
        section, _, name = key.rpartition(".")
        if section:
            value = replace(getattr(study, section), **{name: value})
        study = replace(study, **{section or name: value})
    return study


def _build(kind: type[T], content: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise BadInput(f"study key {prefix}{key}", value, _nearest(key, known))
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
    if origin in {typing.Union, types.UnionType}:
        hint = next(option for option in options if option is not type(None))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise BadInput(name, value, f"a value of type {hint.__name__}")
    return value
