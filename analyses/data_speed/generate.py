"""A log of any size, with popular items and busy users: as CSV, and as Amazon's reviews of 2018.

python analyses/data_speed/generate.py FOLDER [INTERACTIONS] [USERS] [ITEMS]
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

SEED = 20_405
ALPHABET = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", dtype=np.uint8)
BEGIN, END = 1_072_915_200, 1_538_352_000  # 2004 to October 2018, as Amazon's reviews of 2018
CHUNK = 1_000_000  # rows


def main(folder: str, interactions: int = 10**7, users: int = 10**6, items: int = 300_000) -> None:
    """Write ``log.csv`` and ``log.json.gz``, the same rows in the same order of time."""
    rng = np.random.default_rng(SEED)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    # popularity as rank ** -0.8 but for the very top; activity is log-normal, the median about 6
    popularity = 1 / (20 + np.arange(items)) ** 0.8
    activity = rng.lognormal(0, 1, users)
    columns = {
        "reviewerID": raw_ids("A", users, 13, rng).take(
            pa.array(draw(activity, interactions, rng))
        ),
        "asin": raw_ids("B0", items, 8, rng).take(pa.array(draw(popularity, interactions, rng))),
        "overall": pa.array(
            rng.choice([1, 2, 3, 4, 5], interactions, p=[0.08, 0.05, 0.1, 0.2, 0.57])
        ),
        "unixReviewTime": pa.array(np.sort(rng.integers(BEGIN, END, interactions))),
    }
    table = pa.table(columns)
    csv.write_csv(table, place / "log.csv")
    with gzip.open(place / "log.json.gz", "wb", compresslevel=1) as file:
        for lines in json_lines(table):
            file.write(lines)


def draw(weights: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Places in ``weights``, int64 (size,), each as likely as its weight says."""
    steps = np.cumsum(weights)
    return np.searchsorted(steps, rng.random(size) * steps[-1], side="right")


def raw_ids(prefix: str, count: int, digits: int, rng: np.random.Generator) -> pa.Array:
    """Distinct ids of letters and digits, in no order; the first five digits number them."""
    numbers = rng.permutation(count)
    places = rng.integers(36, size=(count, digits))
    for place in range(5):
        places[:, place] = numbers // 36**place % 36
    texts = ALPHABET[places].view(f"S{digits}").ravel()  # (count,)
    return pc.binary_join_element_wise(prefix, pa.array(texts.astype(str)), "")


def json_lines(table: pa.Table) -> Iterator[bytes]:
    """A line a review, some megabytes at a time."""
    for batch in table.to_batches(max_chunksize=CHUNK):
        user, item, overall, time = (column.cast(pa.string()) for column in batch.columns)
        lines = pc.binary_join_element_wise(
            '{"overall": ', overall, '.0, "verified": true, "reviewerID": "', user,
            '", "asin": "', item, '", "reviewText": "Fine, and as it was described.", '
            '"unixReviewTime": ', time, "}\n", "",
        ).cast(pa.large_string())  # fmt: skip
        yield lines.buffers()[2].to_pybytes()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
