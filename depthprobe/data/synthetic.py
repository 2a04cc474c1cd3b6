"""The embedded log: seeded users whose next film depends on the genres of their last five.

Each of the last five films pulls the next one towards some genres and away from others, with a
separate table for every position; the genre with the strongest total pull is taken. The last film
alone predicts less than half of the genres; the last four in order predict four of five. Within a
genre, films are drawn by a Zipf law that no history predicts. No user takes a film twice.

Five positions need five tables, and a block of the embedded backbone has fewer heads. So on this
log one block is not enough.
"""

from __future__ import annotations

import numpy as np

from depthprobe.data.log import Log, encode_ids

GENRES = ("Noir", "Saga", "Comedy", "Western", "Mystery", "Romance", "Thriller", "Fable")
ADJECTIVES = (
    "Amber", "Broken", "Crimson", "Distant", "Electric", "Frozen", "Gilded", "Hidden", "Iron",
    "Jade", "Last", "Midnight", "Northern", "Paper", "Quiet", "Restless", "Silver", "Velvet",
)  # fmt: skip
NOUNS = (
    "Harbor", "Orchard", "Signal", "River", "Lantern", "Mirror", "Garden", "Station", "Winter",
    "Engine", "Island", "Crown", "Compass", "Shadow", "Bridge", "Letter", "Canyon", "Tide",
)  # fmt: skip
DAY = 86_400
PLACES = 5  # films that decide the next one
FREE = 0.05  # share of films with a random genre
ZIPF = 0.6
SHORTEST, MEAN_LENGTH, LONGEST = 7, 12.0, 40


def embedded_log(n_users: int = 2500, n_items: int = 320, *, seed: int = 20_405) -> Log:
    """The generated log, the same to the bit on every machine with the same numpy."""
    rng = np.random.default_rng(seed)
    genre = np.arange(n_items) % len(GENRES)
    pull = rng.normal(size=(PLACES, len(GENRES), len(GENRES)))  # position, genre, next one
    appeal = (1.0 + rng.permutation(n_items)) ** -ZIPF
    titles = _titles(genre, rng)
    users: list[int] = []
    items: list[int] = []
    times: list[int] = []
    for user in range(n_users):
        history = _history(genre, pull, appeal, rng)
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
        titles=dict(zip(names, titles, strict=True)),
        name="embedded",
    )


def _titles(genre: np.ndarray, rng: np.random.Generator) -> list[str]:
    """A unique title for each film, with its genre."""
    places = rng.choice(len(ADJECTIVES) * len(NOUNS), size=len(genre), replace=False)
    return [
        f"{ADJECTIVES[place % len(ADJECTIVES)]} {NOUNS[place // len(ADJECTIVES)]} ({GENRES[kind]})"
        for place, kind in zip(places.tolist(), genre.tolist(), strict=True)
    ]


def _history(
    genre: np.ndarray, pull: np.ndarray, appeal: np.ndarray, rng: np.random.Generator
) -> list[int]:
    """The films of a user, the oldest first: numbers from 0."""
    length = int(min(LONGEST, SHORTEST - 1 + rng.geometric(1 / (MEAN_LENGTH - SHORTEST + 1))))
    history: list[int] = []
    left = appeal.copy()  # 0 once a film is taken
    while len(history) < length:
        kind = int(rng.integers(len(GENRES)))
        if history and rng.random() >= FREE:
            latest = genre[history[: -PLACES - 1 : -1]]  # the latest first
            kind = int(pull[np.arange(len(latest)), latest].sum(axis=0).argmax())
        chances = np.cumsum(np.where(genre == kind, left, 0.0))
        if not chances[-1]:  # all of the genre's films are taken
            chances = np.cumsum(left)
        item = int(np.searchsorted(chances, rng.random() * chances[-1], side="right"))
        left[item] = 0.0
        history.append(item)
    return history
