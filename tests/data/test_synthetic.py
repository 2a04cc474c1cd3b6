"""The embedded log has the structure that its description promises."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import pytest

from depthprobe.data.prepared import order_log
from depthprobe.data.storage import Sequences
from depthprobe.data.synthetic import GENRES, PLACES, embedded_log


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return order_log(embedded_log())


def test_size_and_times(sequences: Sequences) -> None:
    assert sequences.n_items == 320
    assert sequences.n_users >= 2000
    assert sequences.times is not None
    for user in range(0, sequences.n_users, 97):
        span = slice(sequences.offsets[user], sequences.offsets[user + 1])
        assert (np.diff(sequences.times[span]) > 0).all()
        assert len(set(sequences.items[span].tolist())) == span.stop - span.start


def test_same_seed_same_log_and_another_seed_another() -> None:
    one, two, other = (embedded_log(40, 100, seed=seed) for seed in (1, 1, 2))
    assert one.items.codes.tolist() == two.items.codes.tolist()
    assert one.items.codes.tolist() != other.items.codes.tolist()


def test_every_item_has_a_title_of_its_own(sequences: Sequences) -> None:
    assert sequences.titles is not None
    assert len(set(sequences.titles)) == sequences.n_items
    assert all(sequences.titles)


def best_guess(sequences: Sequences, seen: Callable[[np.ndarray], Hashable]) -> float:
    """How often the genre most often taken after what is seen of a history is the next one.

    Of the second half of the users, by counts in the first.
    """
    assert sequences.titles is not None
    genre = np.array([0, *(GENRES.index(t.split("(")[1][:-1]) for t in sequences.titles)])
    counts: dict[Hashable, np.ndarray] = {}
    hits, half = [], sequences.n_users // 2
    for user in range(sequences.n_users):
        kinds = genre[sequences.history(user)]
        for place in range(PLACES, len(kinds)):
            count = counts.setdefault(seen(kinds[place - PLACES : place]), np.zeros(len(GENRES)))
            if user < half:
                count[kinds[place]] += 1
            else:
                hits.append(count.argmax() == kinds[place])
    return float(np.mean(hits))


def test_the_next_genre_takes_more_than_one_film(sequences: Sequences) -> None:
    """One film tells less than half, and every further one more, if their order is known."""
    last, *more = (
        best_guess(sequences, lambda kinds: tuple(kinds[-many:].tolist()))  # noqa: B023
        for many in (1, 2, 3, 4)
    )
    unordered = best_guess(sequences, lambda kinds: tuple(sorted(kinds[-3:].tolist())))
    assert last < 0.5
    assert last + 0.15 < more[0]
    assert more[0] + 0.05 < more[1]
    assert more[1] + 0.03 < more[2]
    assert unordered + 0.1 < more[1]


def test_popularity_is_uneven_but_no_item_rules(sequences: Sequences) -> None:
    counts = np.sort(np.bincount(sequences.items, minlength=sequences.n_items + 1)[1:])[::-1]
    assert counts[: sequences.n_items // 10].sum() > 0.25 * counts.sum()
    assert counts[0] < 0.05 * counts.sum()
