"""The embedded log has the structure that its description promises."""

from __future__ import annotations

import numpy as np
import pytest

from depthprobe.data.prepared import order_log
from depthprobe.data.storage import Sequences
from depthprobe.data.synthetic import embedded_log


@pytest.fixture(scope="module")
def sequences() -> Sequences:
    return order_log(embedded_log())


def test_size_and_times(sequences: Sequences) -> None:
    assert 1000 <= sequences.n_items <= 1200
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


def test_series_continue_far_above_chance(sequences: Sequences) -> None:
    """Part II follows part I within eight steps much more often than it precedes it."""
    assert sequences.titles is not None
    number = {title: i for i, title in enumerate(sequences.titles, start=1)}
    after = before = 0
    for user in range(sequences.n_users):
        place = {int(item): k for k, item in enumerate(sequences.history(user))}
        for item, k in place.items():
            title = str(sequences.titles[item - 1])
            follower = number.get(f"{title}I") if title.endswith(" I") else None
            if follower in place:
                after += 0 < place[follower] - k <= 8
                before += place[follower] < k
    assert after > 5 * before


def test_popularity_is_uneven_but_no_item_rules(sequences: Sequences) -> None:
    counts = np.sort(np.bincount(sequences.items, minlength=sequences.n_items + 1)[1:])[::-1]
    assert counts[: sequences.n_items // 10].sum() > 0.25 * counts.sum()
    assert counts[0] < 0.05 * counts.sum()
