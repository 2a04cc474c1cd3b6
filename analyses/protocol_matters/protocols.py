"""The same trained models, ranked in other ways: which conclusions survive?

    python analyses/protocol_matters/protocols.py RUN [--metric NDCG@10] [--student 4]

Every model that the claims need is loaded from the run and ranks every test user again, by naive
code of this file: all scores of a user at once, and each protocol's rule on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from depthprobe.data.batches import length_buckets, negatives, pad
from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import mean_interval, ratio_interval
from depthprobe.methods import Trial
from depthprobe.models.recommender import Popularity
from depthprobe.runs.context import Context
from depthprobe.runs.plan import plan
from depthprobe.runs.store import Run, open_run

BATCH = 256
Arm = tuple[str, int]  # method, depth


class Same(nn.Module):
    """A model that says nothing: all items score alike."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.register_buffer("items", torch.zeros(items + 1, 1))

    def item_matrix(self) -> Tensor:
        """(I + 1, 1)."""
        return self.items

    def encode(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """(B, T), (B,) -> (B, 1)."""
        return torch.zeros(len(histories), 1)


def above(scores: Tensor, target: Tensor) -> Tensor:
    return (scores > target).sum(1)


def tied(scores: Tensor, target: Tensor) -> Tensor:
    """Others with the target's score; the target is among the scores."""
    return (scores == target).sum(1) - 1


@dataclass(frozen=True)
class Scored:
    """Some users' scores: of all items, the same without what they had taken, of their targets."""

    chosen: np.ndarray  # (B,) which users
    every: Tensor  # (B, I)
    new: Tensor  # (B, I), -inf where the user had taken an item before
    target: Tensor  # (B, 1)


Rule = Callable[[Scored], Tensor]


def rules(drawn: dict[str, Tensor]) -> dict[str, Rule]:
    """Each protocol's ranks (B,)."""

    def ranked(ties: float, *, half: bool = False) -> Rule:
        def ranks(of: Scored) -> Tensor:
            new, target = (of.new.bfloat16(), of.target.bfloat16()) if half else (of.new, of.target)
            return 1 + above(new, target) + ties * tied(new, target)

        return ranks

    def among(name: str) -> Rule:
        def ranks(of: Scored) -> Tensor:
            found = of.every.gather(1, drawn[name][of.chosen] - 1)
            return 1 + above(found, of.target) + 0.5 * (found == of.target).sum(1)

        return ranks

    return {
        "full": ranked(0.5),
        "ties won": ranked(0),
        "ties lost": ranked(1),
        "bfloat16": ranked(0.5, half=True),
        "bfloat16, ties won": ranked(0, half=True),
        "taken items ranked": lambda of: (
            1 + above(of.every, of.target) + 0.5 * tied(of.every, of.target)
        ),
        **{name: among(name) for name in drawn},
    }


@torch.inference_mode()
def rank_all(context: Context, model: nn.Module, drawn: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Ranks of every test user by protocol, (U,)."""
    asked, protocols = context.test, rules(drawn)
    seen = [context.split.history("test", place) for place in range(len(asked.users))]
    found = {name: np.empty(len(asked.users)) for name in protocols}
    items = model.item_matrix()[1:]  # (I, d), without padding
    lengths = np.array([len(history) for history in asked.histories])
    for chosen in length_buckets(lengths, BATCH):
        histories = torch.from_numpy(pad([asked.histories[i] for i in chosen]))
        vectors = model.encode(histories, torch.from_numpy(lengths[chosen]))
        scores = vectors.float() @ items.float().T  # (B, I)
        places = torch.from_numpy(asked.targets[chosen].astype(np.int64))[:, None] - 1
        target = scores.gather(1, places)
        new = scores.clone()
        for row, user in enumerate(chosen.tolist()):
            new[row, torch.from_numpy(seen[user].astype(np.int64)) - 1] = -torch.inf
        new.scatter_(1, places, target)  # taken again, it is still what is asked for
        for name, rule in protocols.items():
            found[name][chosen] = rule(Scored(chosen, scores, new, target)).numpy()
    return found


def models(context: Context, wanted: set[Arm], run: Run) -> Iterator[tuple[Arm, nn.Module]]:
    """The trained models of the arms, a seed after the other, and those that say little."""
    sequences = context.sequences
    users = range(sequences.n_users)
    training = np.concatenate([context.split.train_history(user) for user in users])
    yield ("popularity", 0), Popularity(training, sequences.n_items).eval()
    yield ("all items alike", 0), Same(sequences.n_items).eval()
    for task in plan(context.study, run.manifest.backbone.blocks):
        for trial in task.trials:
            if (trial.method, trial.depth) in wanted and context.trial_folder(trial).is_dir():
                yield (trial.method, trial.depth), _load(context, trial)


def _load(context: Context, trial: Trial) -> nn.Module:
    return context.sasrec(trial.seed) if trial.method == "sasrec" else context.trained(trial)


def main() -> None:
    options = _options()
    run = open_run(options.run)
    context = Context(options.run, run.study)
    whole, cut = run.manifest.backbone.blocks, options.student
    claims: dict[str, tuple[Arm, Arm]] = {
        "the teacher is better than SASRec": (("full", whole), ("sasrec", 0)),
        f"{cut} distilled blocks are better than the teacher": (("distill", cut), ("full", whole)),
        f"{cut} distilled blocks are better than {cut} fine-tuned": (
            ("distill", cut),
            ("finetune", cut),
        ),
        "1 fine-tuned block is as good as the teacher": (("finetune", 1), ("full", whole)),
        "pretraining helps": (("full", whole), ("random-init", whole)),
    }
    sequences, users = context.sequences, context.test.users
    pool = sequences.items[context.split.trained]
    drawn = {
        name: torch.from_numpy(made.astype(np.int64))
        for name, made in {
            "999 uniform": negatives(sequences, users, seed=0),
            "999 popular": negatives(sequences, users, seed=0, pool=pool),
            "99 uniform": negatives(sequences, users, seed=0, count=99),
        }.items()
        if made is not None
    }
    found: dict[Arm, dict[str, list[np.ndarray]]] = {}
    for arm, model in models(context, {arm for pair in claims.values() for arm in pair}, run):
        for name, ranks in rank_all(context, model, drawn).items():
            values = per_user_metric(ranks, options.metric)
            found.setdefault(arm, {}).setdefault(name, []).append(values)
    values = {
        arm: {name: np.stack(seeds) for name, seeds in each.items()} for arm, each in found.items()
    }
    claims = {claim: pair for claim, pair in claims.items() if values.keys() >= set(pair)}
    names = list(rules(drawn))
    print(f"{run.study.name}: {options.metric}, {len(users):,} users\n")
    print("\n".join(_levels(values, names)), "\n")
    print("\n".join(_changes("change, %", _together, values, claims, names)), "\n")
    print("\n".join(_changes("change a seed, %", _alone, values, claims, names)))


def _levels(values: dict[Arm, dict[str, np.ndarray]], names: list[str]) -> Iterator[str]:
    yield f"| model | seeds | {' | '.join(names)} |"
    yield "|---" * (len(names) + 2) + "|"
    for (method, depth), own in values.items():
        cells = []
        for name in names:
            found = mean_interval(own[name])
            cells.append(f"{found.value:.4f} [{found.low:.4f}, {found.high:.4f}]")
        label = f"{method}, {depth}" if depth else method
        yield f"| {label} | {len(own[names[0]])} | {' | '.join(cells)} |"


def _changes(
    head: str,
    cell: Callable[[np.ndarray, np.ndarray], str],
    values: dict[Arm, dict[str, np.ndarray]],
    claims: dict[str, tuple[Arm, Arm]],
    names: list[str],
) -> Iterator[str]:
    """A row a claim: of its two arms, (S, U) each, what ``cell`` says by each protocol."""
    yield f"| {head} | {' | '.join(names)} |"
    yield "|---" * (len(names) + 1) + "|"
    for claim, (one, other) in claims.items():
        cells = [cell(values[one][name], values[other][name]) for name in names]
        yield f"| {claim} | {' | '.join(cells)} |"


def _together(one: np.ndarray, other: np.ndarray) -> str:
    """All seeds, with an interval."""
    found = ratio_interval(one, other)
    change, low, high = (100 * (v - 1) for v in (found.value, found.low, found.high))
    return f"{change:+.1f} [{low:+.1f}, {high:+.1f}]"


def _alone(one: np.ndarray, other: np.ndarray) -> str:
    """What each seed alone would have printed."""
    pairs = zip(one, other, strict=True)
    return " ".join(f"{100 * (a.mean() / b.mean() - 1):+.1f}" for a, b in pairs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--metric", default="NDCG@10")
    parser.add_argument("--student", type=int, default=4, help="the student's depth")
    return parser.parse_args()


if __name__ == "__main__":
    main()
