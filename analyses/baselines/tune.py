"""One tuning run of SASRec: its best validation NDCG@10 becomes a row of tuning.csv.

    python analyses/baselines/tune.py STUDY.toml --data PATH [sasrec.dropout=0.4 ...]

Trains seed 0 as the study says. The test questions are not even made.
"""

from __future__ import annotations

import argparse
import csv
import logging
import tomllib
from pathlib import Path
from typing import Any

import torch

from depthprobe.data.prepared import read_data
from depthprobe.data.splits import make_split
from depthprobe.evaluation.ranks import evaluate, make_eval_set, mean_ndcg
from depthprobe.models.build import build_sasrec
from depthprobe.study import Study, study_from_dict
from depthprobe.training.loop import Fit, fit
from depthprobe.training.objectives import NextItem

TABLE = Path(__file__).with_name("tuning.csv")
HEADER = ("dataset", "settings", "epochs", "best_epoch", "seconds", "validation_ndcg10")


def read_study(path: Path, changes: list[str]) -> Study:
    """The study of a file with ``section.key=value`` changes, values as in TOML."""
    content: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    for change in changes:
        name, _, value = change.partition("=")
        *sections, key = name.split(".")
        table = content
        for section in sections:
            table = table.setdefault(section, {})
        table[key] = tomllib.loads(f"value = {value}")["value"]
    return study_from_dict(content)


def train(study: Study) -> Fit:
    """Train SASRec with seed 0, asking every validation user after each epoch."""
    history, device = study.data.max_history, torch.device("cpu")
    sequences = read_data(study.data)
    split = make_split(sequences, study.protocol)
    windows = [split.train_history(user, history + 1) for user in range(sequences.n_users)]
    asked = make_eval_set(split, "validation", max_history=history, filter_seen=True)
    settings = study.sasrec
    torch.manual_seed(0)
    model = build_sasrec(settings, items=sequences.n_items, longest=history)
    return fit(
        NextItem(model, settings.recipe),
        [window for window in windows if len(window) > 1],
        recipe=settings.recipe,
        validate=lambda: mean_ndcg(evaluate(model, asked, device=device)["full"]),
        seed=0,
        device=device,
    )


def row_of(study: Study, done: Fit) -> dict[str, object]:
    """What tuning.csv says of a run."""
    settings, recipe = study.sasrec, study.sasrec.recipe
    shown = {
        **{name: getattr(settings, name) for name in ("width", "blocks", "heads", "dropout")},
        **{name: getattr(recipe, name) for name in ("epochs", "batch_size", "learning_rate")},
        **{name: getattr(recipe, name) for name in ("weight_decay", "patience", "warmup")},
    }
    values = (
        Path(study.data.source).name,
        " ".join(f"{name}={value:g}" for name, value in shown.items()),
        done.epochs,
        done.best_epoch,
        round(done.seconds),
        round(done.best_score, 5),
    )
    return dict(zip(HEADER, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("changes", nargs="*", metavar="SECTION.KEY=VALUE")
    given = parser.parse_intermixed_args()
    torch.set_num_threads(given.threads)
    study = read_study(given.study, [*given.changes, f"data.source='{given.data}'"])
    row = row_of(study, train(study))
    fresh = not TABLE.exists()
    with TABLE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
