"""The embedded log: a seeded catalogue and users whose next item depends on several ranges.

What a good model must learn, by the share of interactions that each cause makes:

- **series** (32 %): the next part of a series begun in the last eight interactions. Other items
  stand between the parts, so a model must remember which part came last.
- **companions** (18 %): every third item has one companion, in another genre, that follows at once.
- **crossings** (12 %): a genre drawn from a fixed table indexed by the *two* last genres:
  neither of them alone tells it.
- **taste** (30 %): the user's own mix of genres, which drifts slowly: the recent part of
  a history says more than the early part.
- **popularity** (8 %): any item at all, by a Zipf law: noise that nobody can foresee.

Inside a genre, items are drawn by the same Zipf law, and nobody takes an item twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from depthprobe.data.log import Log, encode_ids

GENRES = (
    "Noir", "Saga", "Comedy", "Western", "Mystery", "Romance", "Thriller", "Fable",
    "Opera", "Chronicle", "Ballad", "Satire", "Legend", "Memoir", "Odyssey", "Parable",
    "Tragedy", "Caper", "Pastoral", "Epic",
)  # fmt: skip
ADJECTIVES = (
    "Amber", "Broken", "Crimson", "Distant", "Electric", "Frozen", "Gilded", "Hidden", "Iron",
    "Jade", "Last", "Midnight", "Northern", "Paper", "Quiet", "Restless", "Silver", "Velvet",
)  # fmt: skip
NOUNS = (
    "Harbor", "Orchard", "Signal", "River", "Lantern", "Mirror", "Garden", "Station", "Winter",
    "Engine", "Island", "Crown", "Compass", "Shadow", "Bridge", "Letter", "Canyon", "Tide",
)  # fmt: skip
NUMERALS = ("I", "II", "III", "IV", "V", "VI")
DAY = 86_400


@dataclass(frozen=True, kw_only=True)
class Process:
    """The generating process; the defaults are the embedded log."""

    users: int = 2500
    items: int = 1200
    seed: int = 20_405
    series: float = 0.32
    companion: float = 0.18
    crossing: float = 0.12
    taste: float = 0.30
    memory: int = 8
    mean_length: float = 12.0
    longest: int = 40


@dataclass(frozen=True)
class Catalogue:
    """Items 0..I-1: genre, next part of the series (-1: none), companion (-1: none), appeal."""

    genre: np.ndarray
    sequel: np.ndarray
    companion: np.ndarray
    appeal: np.ndarray
    titles: list[str]


def embedded_log(process: Process | None = None) -> Log:
    """The generated log, the same to the bit on every machine with the same numpy."""
    process = process or Process()
    rng = np.random.default_rng(process.seed)
    catalogue = _catalogue(process, rng)
    crossing = rng.integers(len(GENRES), size=(len(GENRES), len(GENRES)))
    draw = _Drawer(catalogue, rng)
    users: list[int] = []
    items: list[int] = []
    times: list[int] = []
    for user in range(process.users):
        history = _history(process, catalogue, crossing, draw, rng)
        start = int(rng.integers(0, 700 * DAY))
        gaps = np.maximum(60, rng.lognormal(11.5, 1.2, size=len(history))).astype(np.int64)
        users.extend([user] * len(history))
        items.extend(history)
        times.extend((1_577_836_800 + start + np.cumsum(gaps)).tolist())
    names = [f"i{k:04d}" for k in range(process.items)]
    return Log(
        users=encode_ids(f"u{user:05d}" for user in users),
        items=encode_ids(names[item] for item in items),
        times=np.array(times, dtype=np.int64),
        titles=dict(zip(names, catalogue.titles, strict=True)),
        name="embedded",
    )


def _catalogue(process: Process, rng: np.random.Generator) -> Catalogue:
    size = process.items
    genre = np.empty(size, dtype=np.int64)
    sequel = np.full(size, -1)
    titles: list[str] = []
    used: set[str] = set()
    while len(titles) < size:
        parts = min(
            int(rng.choice([1, 2, 3, 4, 6], p=[0.25, 0.2, 0.25, 0.2, 0.1])), size - len(titles)
        )
        kind = int(rng.integers(len(GENRES)))
        name = ""
        while not name or name in used:
            name = f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} ({GENRES[kind]})"
        used.add(name)
        for part in range(parts):
            here = len(titles)
            genre[here] = kind
            sequel[here] = here + 1 if part + 1 < parts else -1
            titles.append(f"{name} {NUMERALS[part]}" if parts > 1 else name)
    appeal = 1.0 / (1.0 + rng.permutation(size)) ** 0.8
    companion = np.full(size, -1)
    with_one = rng.permutation(size)[: size // 3]
    companion[with_one] = rng.permutation(size)[: size // 3]
    companion[companion == np.arange(size)] = -1
    return Catalogue(genre, sequel, companion, appeal / appeal.sum(), titles)


class _Drawer:
    """Draws items by appeal, from all or from one genre."""

    def __init__(self, catalogue: Catalogue, rng: np.random.Generator) -> None:
        self._rng = rng
        self._pools = [np.flatnonzero(catalogue.genre == g) for g in range(len(GENRES))]
        self._pools.append(np.arange(len(catalogue.genre)))
        weights = [catalogue.appeal[pool] for pool in self._pools]
        self._steps = [np.cumsum(w) / max(w.sum(), 1e-9) for w in weights]

    def __call__(self, genre: int) -> int:
        """One item of the genre; -1, or a genre without items, draws from the whole catalogue."""
        genre = genre if len(self._pools[genre]) else -1
        place = int(np.searchsorted(self._steps[genre], self._rng.random(), side="right"))
        return int(self._pools[genre][min(place, len(self._pools[genre]) - 1)])


def _history(
    process: Process,
    catalogue: Catalogue,
    crossing: np.ndarray,
    draw: _Drawer,
    rng: np.random.Generator,
) -> list[int]:
    length = int(min(process.longest, 5 + rng.geometric(1 / (process.mean_length - 4))))
    taste = np.log(rng.dirichlet(np.full(len(GENRES), 0.15)) + 1e-6)
    bounds = np.cumsum([process.series, process.companion, process.crossing, process.taste])
    history: list[int] = []
    seen: set[int] = set()
    while len(history) < length:
        cause = int(np.searchsorted(bounds, rng.random(), side="right"))
        item = -1
        if cause == 0:
            recent = reversed(history[-process.memory :])
            open_parts = [int(catalogue.sequel[i]) for i in recent]
            item = next((i for i in open_parts if i >= 0 and i not in seen), -1)
        elif cause == 1 and history:
            item = int(catalogue.companion[history[-1]])
        elif cause == 2 and len(history) > 1:
            before, last = catalogue.genre[history[-2]], catalogue.genre[history[-1]]
            item = draw(int(crossing[before, last]))
        elif cause == 4:
            item = draw(-1)
        if item < 0 or item in seen:  # nothing to continue: taste decides
            chance = np.exp(taste - taste.max())
            item = draw(int(np.searchsorted(np.cumsum(chance / chance.sum()), rng.random())))
        if item in seen:
            continue
        seen.add(item)
        history.append(item)
        taste = taste + rng.normal(0, 0.25, size=len(GENRES))
    return history
