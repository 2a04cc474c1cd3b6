"""What a folder holds: one log, or the training, validation and test part of one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import numpy as np

from depthprobe.data.log import PARTS, Ids, Log
from depthprobe.data.readers.columns import listed
from depthprobe.data.readers.streams import FIELD
from depthprobe.errors import BadInput

ENDINGS = {"csv", "dat", "inter", "json", "jsonl", "parquet", "tsv", "txt"}
# names that are those of a log, whatever lies beside it
LOGS = ("sequences.txt", "*.inter", "u.data", "ratings.dat", "ratings.csv")
# names that are not, though they end like one
OTHERS = ("items.*", "movies.*", "users.*", "meta_*", "readme*", "license*", "_*", ".*")
WORDS = {
    "training": {"train", "training"},
    "validation": {"valid", "validation", "val", "dev"},
    "test": {"test"},
}
EXPECTED = (
    "expected one log (sequences.txt, X.inter, u.data, ratings.dat, ratings.csv, or one CSV, "
    "JSON-lines or Parquet file), or train, valid and test files, or Parquet part files"
)

_COMPRESSED = re.compile(r"\.(gz|zst|zstd)$")
_SHARD = re.compile(r"-\d+-of-\d+$")


def logs_in(folder: Path) -> list[Path]:
    """The file that is the log, the folder itself if all its files make it, or one file a part.

    Three paths are in the order of :data:`depthprobe.data.log.PARTS`.

    Raises:
        BadInput: if there is no log, or nothing tells which of several is meant.
    """
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file())
    except OSError as error:
        raise BadInput(FIELD, folder, f"a folder that can be read ({error.strerror})") from error
    named = [path for path in files if _fits(path, LOGS) and not _part(path)]
    parts = {part: [path for path in files if _part(path) == part] for part in PARTS}
    if parts["training"]:
        return _three(folder, parts, others=named)
    found = named or [path for path in files if _ending(path) and not is_other(path)]
    if len(found) == 1:
        return found
    if found and all(_ending(path) == "parquet" for path in found):
        return [folder]
    names = listed(path.name for path in found or files)
    fault = f"it has several logs, {names}" if found else f"it has {names or 'no file'}"
    raise BadInput(FIELD, folder, f"{fault}; {EXPECTED}")


def is_other(path: Path) -> bool:
    """Whether the name tells that a file is no log: titles, users, notes, what is hidden."""
    return _fits(path, OTHERS)


def join_parts(logs: Sequence[Log], *, folder: Path) -> Log:
    """One log of a training, a validation and a test part, ids united, in that order.

    Raises:
        BadInput: if some of them have times, or ratings, and others don't.
    """
    for what in ("times", "ratings"):
        without = [p for p, log in zip(PARTS, logs, strict=True) if getattr(log, what) is None]
        if 0 < len(without) < len(logs):
            fault = f"the {' and '.join(without)} part has no {what}, and the others have"
            raise BadInput(FIELD, folder, f"{fault}; expected the same columns in all three")
    users, items = _united([log.users for log in logs]), _united([log.items for log in logs])
    parts = np.repeat(np.arange(len(logs), dtype=np.int8), [len(log) for log in logs])
    pairs = users.codes.astype(np.int64) * len(items.names) + items.codes
    both = np.intersect1d(pairs[parts == 0], pairs[parts == len(logs) - 1])
    notes = list(chain.from_iterable(log.notes for log in logs))
    if len(both):
        notes.append(f"{len(both)} (user, item) pairs are in training and in test")
    return Log(
        users,
        items,
        _joined(log.times for log in logs),
        _joined(log.ratings for log in logs),
        parts,
        titles={item: title for log in logs for item, title in log.titles.items()},
        name=folder.resolve().name,
        notes=tuple(dict.fromkeys(notes)),
    )


def _three(folder: Path, parts: dict[str, list[Path]], *, others: list[Path]) -> list[Path]:
    missing = [part for part, paths in parts.items() if not paths]
    several = next((paths for paths in parts.values() if len(paths) > 1), others)
    found = listed(path.name for path in chain(*parts.values()))
    if missing:
        fault = f"it came split ({found}), and there is no {' and no '.join(missing)} file"
        raise BadInput(FIELD, folder, f"{fault}; all three are needed, or name one file as the log")
    if several:
        fault = f"it came split ({found}), and has {listed(path.name for path in several)} as well"
        raise BadInput(FIELD, folder, f"{fault}; expected one file a part and no other log")
    return [paths[0] for paths in parts.values()]


def _part(path: Path) -> str | None:
    """The part that a name tells: ``train.csv``, ``X.train.inter``, ``train-0-of-1.parquet``."""
    if _ending(path) is None:
        return None
    word = _SHARD.sub("", _plain(path).split(".")[-2])
    return next((part for part, words in WORDS.items() if word in words), None)


def _fits(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch(_plain(path), pattern) for pattern in patterns)


def _ending(path: Path) -> str | None:
    """What a file's name ends with, if it is what a log's may."""
    start, _, ending = _plain(path).rpartition(".")
    return ending if start and ending in ENDINGS else None


def _plain(path: Path) -> str:
    return _COMPRESSED.sub("", path.name.lower())


def _united(columns: Sequence[Ids]) -> Ids:
    place: dict[str, int] = {}
    codes = []
    for ids in columns:
        new = [place.setdefault(name, len(place)) for name in ids.names]
        codes.append(np.array(new, dtype=np.int32)[ids.codes])
    return Ids(np.concatenate(codes), list(place))


def _joined(columns: Iterable[np.ndarray | None]) -> np.ndarray | None:
    given = [column for column in columns if column is not None]
    return np.concatenate(given) if given else None
