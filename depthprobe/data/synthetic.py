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

from collections.abc import Callable
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
SHARES = (0.32, 0.18, 0.12, 0.30)  # of series, companions, crossings, taste
MEMORY = 8  # interactions in which a series was begun
MEAN_LENGTH, LONGEST = 12.0, 40


@dataclass(frozen=True)
class Catalogue:
    """Items 0..I-1: genre, next part of the series (-1: none), companion (-1: none), appeal."""

    genre: np.ndarray
    sequel: np.ndarray
    companion: np.ndarray
    appeal: np.ndarray
    titles: list[str]


def embedded_log(n_users: int = 2500, n_items: int = 1200, *, seed: int = 20_405) -> Log:
    """The generated log, the same to the bit on every machine with the same numpy."""
    rng = np.random.default_rng(seed)
    catalogue = _catalogue(n_items, rng)
    crossing = rng.integers(len(GENRES), size=(len(GENRES), len(GENRES)))
    draw = _drawer(catalogue, rng)
    users: list[int] = []
    items: list[int] = []
    times: list[int] = []
    for user in range(n_users):
        history = _history(catalogue, crossing, draw, rng)
        start = int(rng.integers(0, 700 * DAY))
        gaps = np.maximum(60, rng.lognormal(11.5, 1.2, size=len(history))).astype(np.int64)
        users.extend([user] * len(history))
        items.extend(history)
        times.extend((1_577_836_800 + start + np.cumsum(gaps)).tolist())
    names = [f"i{k:04d}" for k in range(n_items)]
    return Log(
        users=encode_ids(f"u{user:05d}" for user in users),
        items=encode_ids(names[item] for item in items),
        times=np.array(times, dtype=np.int64),
        titles=dict(zip(names, catalogue.titles, strict=True)),
        name="embedded",
    )


def _catalogue(size: int, rng: np.random.Generator) -> Catalogue:
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


def _drawer(catalogue: Catalogue, rng: np.random.Generator) -> Callable[[int], int]:
    """Draws an item of a genre by appeal; -1, or an empty genre, draws from the whole catalogue."""
    pools = [np.flatnonzero(catalogue.genre == g) for g in range(len(GENRES))]
    pools.append(np.arange(len(catalogue.genre)))
    weights = [catalogue.appeal[pool] for pool in pools]
    steps = [np.cumsum(w) / max(w.sum(), 1e-9) for w in weights]

    def draw(genre: int) -> int:
        genre = genre if len(pools[genre]) else -1
        place = int(np.searchsorted(steps[genre], rng.random(), side="right"))
        return int(pools[genre][min(place, len(pools[genre]) - 1)])

    return draw


def _history(
    catalogue: Catalogue,
    crossing: np.ndarray,
    draw: Callable[[int], int],
    rng: np.random.Generator,
) -> list[int]:
    length = int(min(LONGEST, 5 + rng.geometric(1 / (MEAN_LENGTH - 4))))
    taste = np.log(rng.dirichlet(np.full(len(GENRES), 0.15)) + 1e-6)
    bounds = np.cumsum(SHARES)
    history: list[int] = []
    seen: set[int] = set()
    while len(history) < length:
        cause = int(np.searchsorted(bounds, rng.random(), side="right"))
        item = -1
        if cause == 0:
            recent = reversed(history[-MEMORY:])
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
