"""Write a log without its times, its lines as they are: what a reader gets that does not sort.

Its arguments are RecBole's file and the CSV: ``ml-100k/ml-100k.inter ml-100k-unsorted.csv``.
"""

from __future__ import annotations

import sys

import pandas as pd


def main() -> None:
    source, target = sys.argv[1:]
    log = pd.read_csv(source, sep="\t")
    log.columns = [name.partition(":")[0] for name in log.columns]
    log[["user_id", "item_id"]].to_csv(target, index=False)
    print(f"{len(log):,} interactions in the order of the file, without times: {target}")


if __name__ == "__main__":
    main()
