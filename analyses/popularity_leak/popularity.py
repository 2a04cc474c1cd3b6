"""Popularity counted on the training parts, and on everything, test interactions included.

python analyses/popularity_leak/popularity.py LOG
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from depthprobe.data.prepared import prepare_data
from depthprobe.data.splits import leave_one_out
from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.ranks import evaluate, make_eval_set
from depthprobe.evaluation.statistics import mean_interval
from depthprobe.models.recommender import Popularity


def main(source: str) -> None:
    """Print HR@10 and NDCG@10 of both ways to count, with 95 % intervals over users."""
    sequences = prepare_data(source)
    split = leave_one_out(sequences)
    asked = make_eval_set(split, "test", max_history=50, filter_seen=True)
    training = [split.train_history(user) for user in range(sequences.n_users)]
    counted = {"training parts": np.concatenate(training), "all interactions": sequences.items}
    for name, items in counted.items():
        model = Popularity(items, sequences.n_items)
        ranks = evaluate(model, asked, device=torch.device("cpu"))["full"]
        for metric in ("HR@10", "NDCG@10"):
            found = mean_interval(per_user_metric(ranks, metric))
            print(f"{name:17} {metric:8} {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]")


if __name__ == "__main__":
    main(sys.argv[1])
