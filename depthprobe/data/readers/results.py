"""Results of any recommender: ranks by user, or lists and their targets, in tables or TREC files.

All become ranks of one target per user: 1-based, infinite for a target that its list misses.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from depthprobe.data.log import Ids
from depthprobe.data.readers.arrow import Column, Where, row_number, to_ids, to_numbers
from depthprobe.data.readers.columns import SPELLINGS, guess_column, listed, place_of
from depthprobe.data.readers.streams import FIELD, head
from depthprobe.data.readers.tables import BLANK, csv_table, parquet_table
from depthprobe.errors import BadInput

KNOWN = {name: SPELLINGS[name] for name in ("user", "item")} | {
    name: [[name]] for name in ("rank", "score", "items", "seed", "protocol")
}


class _Kind(NamedTuple):
    """A kind of file: its columns in TREC's form, and in a table."""

    line: str  # columns of TREC's files, which have no header
    places: dict[str, int]  # the columns of it that are read
    enough: tuple[set[str], ...]  # at least one of these is needed
    words: str


RESULTS = _Kind(
    r"\S+\s+\S+\s+\S+\s+\d+\s+[-+.\deE]+\s+\S+",
    {"user": 0, "item": 2, "score": 4},
    ({"user", "rank"}, {"user", "items"}, {"user", "item", "score"}),
    "user and rank; or user, item and rank or score; or user and items; or a TREC run",
)
TARGETS = _Kind(
    r"\S+\s+\S+\s+\S+\s+-?\d+",
    {"user": 0, "item": 2, "relevance": 3},
    ({"user", "item"},),
    "user and item, or TREC's qrels",
)
Labels = dict[str, dict[str, str]]  # by the name of a column, then by user


class Targets(NamedTuple):
    """The target of each user."""

    items: dict[str, str]
    labels: Labels


@dataclass(frozen=True)
class Results:
    """The ranks of one arm of a comparison."""

    ranks: pd.DataFrame  # users by seeds, float64; NaN where a seed lacks the user
    labels: Labels
    longest: int | None = None  # items in the longest list; None of ranks
    missed: int = 0  # number of lists without their target, over all seeds
    left_out: int = 0  # number of users with a list but no target


@dataclass(frozen=True)
class _File:
    """The columns of a file, and what messages call its rows."""

    table: pa.Table
    path: Path
    where: Where

    def __post_init__(self) -> None:
        if not len(self.table):
            raise self.fault("expected at least one row")

    def __contains__(self, what: str) -> bool:
        return what in self.table.column_names

    def column(self, what: str) -> Column:
        return Column(self.table[what], what, self.path, self.where)

    def ids(self, what: str) -> Ids:
        return to_ids(self.column(what))

    def ranks(self) -> np.ndarray:
        """The ranks, float64 (N,): from 1, infinite for a miss."""
        column = self.column("rank").plain()
        numbers = pd.to_numeric(column.values.to_pandas(), errors="coerce")
        ranks: np.ndarray = numbers.to_numpy(np.float64)
        column.check(~(ranks >= 1), "a number from 1, or inf for a miss")
        return ranks

    def take(self, rows: np.ndarray) -> _File:
        """Some of the rows, by number."""
        return _File(self.table.take(pa.array(rows)), self.path, lambda row: self.where(rows[row]))

    def fault(self, text: str) -> BadInput:
        return BadInput(FIELD, self.path, text, fault=True)

    def labels(self, users: Ids, slices: Collection[str]) -> Labels:
        """The label of each user in the columns of ``slices`` that the file has."""
        found = {}
        first = np.unique(users.codes, return_index=True)[1]  # a row of each user, in code order
        for name in filter(lambda name: _slice(name) in self, slices):
            column = Column(self.table[_slice(name)], name, self.path, self.where)
            texts = column.values.cast(pa.large_string()).fill_null("")
            labels = texts.to_numpy()
            differ = labels != labels[first][users.codes]
            column.check(differ, "the same in all rows of a user")
            found[name] = dict(zip(users.names, labels[first].tolist(), strict=True))
        return found


@contextmanager
def _named(field: str) -> Iterator[None]:
    """Make errors of a file name the argument that it came from."""
    try:
        yield
    except BadInput as error:
        raise (error.renamed(field) if error.field == FIELD else error) from None


def read_targets(path: Path, slices: Collection[str] = ()) -> Targets:
    """The target of each user, of a table or TREC's qrels; ``BadInput`` if one has several."""
    with _named("targets"):
        file = _read(path, TARGETS, slices)
        if "relevance" in file:
            relevance = to_numbers(file.column("relevance"))
            if not (relevance > 0).any():
                raise file.fault("expected at least one target")
            file = file.take(np.flatnonzero(relevance > 0))
        users, items = file.ids("user"), file.ids("item")
        again = pd.Series(users.codes).duplicated().to_numpy()
        file.column("user").check(again, "one target a user")
        names = (items.names[code] for code in items.codes)
        targets = dict(zip((users.names[code] for code in users.codes), names, strict=True))
        return Targets(targets, file.labels(users, slices))


def read_results(
    paths: Sequence[Path], targets: Targets | None = None, slices: Collection[str] = ()
) -> Results:
    """The ranks of one arm; files without a column of seeds are a seed each.

    A list without ranks is in the order of its scores, and equal scores share their mean rank.

    Raises:
        BadInput: for a rank below 1, a user twice in a seed, an item twice in a list, a file
            without the columns that it needs, and lists without targets.
    """
    with _named("file"):
        arms = [
            _read_arm(_read(path, RESULTS, slices), targets, slices, seed=str(place))
            for place, path in enumerate(paths)
        ]
    ranks = pd.concat([arm.ranks for arm in arms], axis=1)
    if ranks.columns.has_duplicates:
        seed = ranks.columns[ranks.columns.duplicated()][0]
        raise BadInput("file", paths[-1], f"an earlier file has the seed {seed} too", fault=True)
    labels: Labels = {}
    for arm in arms:
        labels |= {name: labels.get(name, {}) | own for name, own in arm.labels.items()}
    lengths = [arm.longest for arm in arms if arm.longest is not None]
    return Results(
        ranks, labels, min(lengths, default=None), sum(arm.missed for arm in arms),
        max(arm.left_out for arm in arms),
    )  # fmt: skip


def _read_arm(
    file: _File, targets: Targets | None, slices: Collection[str], *, seed: str
) -> Results:
    if "protocol" in file:  # the ranks of a trial, in its run's folder
        protocols = file.ids("protocol")
        full = [name == "full" for name in protocols.names]
        file = file.take(np.flatnonzero(np.array(full)[protocols.codes]))
    # an item with a rank may be the target itself; --targets decides
    are_lists = "items" in file or ("item" in file and (targets is not None or "rank" not in file))
    if are_lists and targets is None:
        raise file.fault("it has lists; say each user's target with --targets")
    users = file.ids("user")
    seeds = file.ids("seed") if "seed" in file else Ids(np.zeros(len(users), np.int32), [seed])
    keys = seeds.codes.astype(np.int64) * len(users.names) + users.codes  # (N,): seed and user
    ranks = np.full(len(seeds.names) * len(users.names), np.nan)
    if not are_lists or "items" in file:
        hint = "" if are_lists else " (lists need --targets)"
        again = pd.Series(keys).duplicated().to_numpy()
        file.column("user").check(again, f"each user once a seed{hint}")
    if not are_lists:
        ranks[keys] = file.ranks()
        table = _table(ranks, users, seeds)
        return Results(table, file.labels(users, slices))
    assert targets is not None  # noqa: S101  (for mypy)
    ranks[keys] = np.inf
    entries, rows = (file, np.arange(len(users))) if "item" in file else _entries(file)
    items, own = entries.ids("item"), keys[rows]  # (M,)
    again = pd.Series(own * len(items.names) + items.codes).duplicated().to_numpy()
    entries.column("item").check(again, "each item once in a list")
    if "rank" in entries:
        places = entries.ranks()
        longest = int(places[np.isfinite(places)].max(initial=0))
    else:
        scores = pd.Series(to_numbers(entries.column("score")))
        places = scores.groupby(own).rank(ascending=False).to_numpy()
        longest = int(np.bincount(pd.factorize(own)[0]).max())
    number = {name: code for code, name in enumerate(items.names)}
    asked = [targets.items.get(user) for user in users.names]  # of each user; None without targets
    wanted = np.array([number.get(item, -1) if item is not None else -1 for item in asked])
    hits = items.codes == wanted[users.codes[rows]]
    ranks[own[hits]] = places[hits]
    table = _table(ranks, users, seeds)[[item is not None for item in asked]]
    if table.empty:
        raise file.fault("none of its users has a target in --targets")
    return Results(
        table, file.labels(users, slices), longest, int(np.isinf(table.to_numpy()).sum()),
        asked.count(None),
    )  # fmt: skip


def _table(ranks: np.ndarray, users: Ids, seeds: Ids) -> pd.DataFrame:
    """Ranks (S * U,) as a table of users by seeds."""
    by_user = ranks.reshape(len(seeds.names), -1).T
    return pd.DataFrame(by_user, index=pd.Index(users.names), columns=pd.Index(seeds.names))


def _entries(file: _File) -> tuple[_File, np.ndarray]:
    """Lists in cells as one row per item, with each one's row in the file, (M,)."""
    column = file.column("items")
    values = column.values
    if column.is_text:
        values = pc.utf8_trim_whitespace(values.fill_null(""))
        bracketed = pc.match_substring_regex(values, r"^[\[({]")
        column.check(bracketed, "items with blanks between them, and no brackets")
        values = pc.utf8_split_whitespace(values)
    elif not pa.types.is_list(values.type) and not pa.types.is_large_list(values.type):
        raise column.wrong_type("lists, or texts of items with blanks between them")
    values = values.combine_chunks()
    rows, items = pc.list_parent_indices(values).to_numpy(), pc.list_flatten(values)
    if column.is_text:  # an empty text splits into one empty item
        filled = pc.not_equal(items, "")
        rows, items = rows[filled.to_numpy(zero_copy_only=False)], items.filter(filled)
    places = np.arange(len(rows)) - np.searchsorted(rows, rows) + 1
    table = pa.table({"item": items, "rank": places})
    return _File(table, file.path, lambda row: file.where(rows[row])), rows


def _read(path: Path, kind: _Kind, slices: Collection[str]) -> _File:
    """The columns that are known, and those of slices, of a table or a file of TREC's."""
    start, pick = head(path), partial(_pick, path, kind, slices)
    if start.startswith("PAR1"):
        return _File(parquet_table(path, pick), path, row_number)
    if re.fullmatch(kind.line, start.strip().partition("\n")[0].strip()):
        table, where = csv_table(path, lambda _: kind.places, BLANK, header=False)
    else:
        table, where = csv_table(path, pick)
    return _File(table, path, where)


def _pick(path: Path, kind: _Kind, slices: Collection[str], names: list[str]) -> dict[str, int]:
    guess = partial(guess_column, names, source=path, spellings=KNOWN, advice="expected one")
    places = {what: place for what in KNOWN if (place := guess(what)) is not None}
    if not any(needed <= set(places) for needed in kind.enough):
        fault = f"its columns are {listed(names)}; expected {kind.words}"
        raise BadInput(FIELD, path, fault, fault=True)
    own = {_slice(name): place_of(names, name) for name in slices}
    return places | {name: place for name, place in own.items() if place is not None}


def _slice(name: str) -> str:
    """What a column of slices is called in a table: a name that no other column has."""
    return f"slice {name}"
