"""Do cheap scores of the teacher order all choices of blocks as their accuracy does?

    python analyses/which_score/rank.py RUN

Each choice of kept blocks is judged twice: without any training, and fine-tuned. A score of a
choice is what it says of the blocks that are left out: of a contiguous run of them where the score
knows runs, summed over runs, or summed over blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from depthprobe.evaluation.metrics import per_user_metric
from depthprobe.evaluation.statistics import ratio_interval
from depthprobe.evaluation.trust import trust
from depthprobe.probing.walk import rank_routes, route
from depthprobe.runs.context import Context
from depthprobe.runs.plan import full_trial
from depthprobe.runs.store import Run, open_run

METRIC = "NDCG@10"
Kept = tuple[int, ...]
Spans = dict[tuple[int, int], float]


def main() -> None:
    run = open_run(sys.argv[1])
    folder = Path(sys.argv[1])
    blocks = run.manifest.backbone.blocks
    tuned = fine_tuned(run)  # kept -> (S, U)
    choices = sorted(set(tuned) - {tuple(range(blocks))}, key=lambda kept: (len(kept), kept))
    untrained, scores = teachers(run, folder, choices, blocks)
    teacher = tuned[tuple(range(blocks))]
    shown = pd.DataFrame(
        {
            "kept": [" ".join(map(str, kept)) for kept in choices],
            "untrained": [share(untrained[kept], teacher) for kept in choices],
            "fine-tuned": [share(tuned[kept], teacher) for kept in choices],
            "seeds": [seed_shares(tuned[kept], teacher) for kept in choices],
        }
    )
    print(f"share of the teacher's {METRIC} ({teacher.mean():.4f}), {len(teacher)} seeds\n")
    print(markdown(shown))
    outcomes = {"untrained": untrained, "fine-tuned": tuned}
    for name, found in outcomes.items():
        print(f"\nSpearman with the loss, {name}\n")
        print(markdown(answers(choices, scores, found, teacher)))
    between = seeds_agree(choices, tuned, teacher)
    print(f"\nSpearman of the fine-tuned losses between two seeds: {between}")


def markdown(frame: pd.DataFrame) -> str:
    """A table as Markdown."""
    rows = [list(frame.columns), ["---"] * frame.shape[1], *frame.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def share(found: np.ndarray, teacher: np.ndarray) -> str:
    """Of the teacher's, with a 95 % interval paired over users and seeds: (S, U), (S, U)."""
    ratio = ratio_interval(found, teacher)
    return f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"


def seed_shares(found: np.ndarray, teacher: np.ndarray) -> str:
    """Each seed's share of its own teacher: (S, U), (S, U)."""
    return " ".join(f"{value:.3f}" for value in found.mean(1) / teacher.mean(1))


def fine_tuned(run: Run) -> dict[Kept, np.ndarray]:
    """NDCG@10 of each user, (S, U), by kept blocks; the teacher has all of them."""
    found: dict[Kept, list[np.ndarray]] = {}
    ranks = {
        name: frame["rank"].to_numpy()
        for name, frame in run.users[run.users["protocol"] == "full"].groupby("trial")
    }
    for record in sorted(run.records, key=lambda record: record.seed):
        if record.method == "full" or record.method.startswith("finetune"):
            values = per_user_metric(ranks[record.id], METRIC)
            found.setdefault(record.kept, []).append(values)
    return {kept: np.stack(values) for kept, values in found.items()}


def teachers(
    run: Run, folder: Path, choices: Sequence[Kept], blocks: int
) -> tuple[dict[Kept, np.ndarray], dict[str, np.ndarray]]:
    """What each choice is worth without training, (S, U), and its scores (M,), means over seeds."""
    context = Context(folder, run.study)
    worth: dict[Kept, list[np.ndarray]] = {kept: [] for kept in choices}
    scores: dict[str, list[list[float]]] = {}
    routes = [route(kept) for kept in (tuple(range(blocks)), *choices)]
    for seed in range(run.study.seeds):
        model = context.trained(full_trial("full", seed, blocks))
        for kept, ranks in zip(
            choices,
            rank_routes(model, context.test, routes, device=context.device)[1:],
            strict=True,
        ):
            worth[kept].append(per_user_metric(ranks["full"], METRIC))
        seen = rank_routes(model, context.validation, routes, device=context.device)
        means = [per_user_metric(ranks["full"], METRIC).mean() for ranks in seen]
        own = dict(cheap_scores(run, seed, choices, blocks))
        own["untrained loss, validation"] = [means[0] - mean for mean in means[1:]]
        for name, values in own.items():
            scores.setdefault(name, []).append(values)
    return (
        {kept: np.stack(values) for kept, values in worth.items()},
        {name: np.mean(values, axis=0) for name, values in scores.items()},
    )


def cheap_scores(
    run: Run, seed: int, choices: Sequence[Kept], blocks: int
) -> Iterator[tuple[str, list[float]]]:
    """Each score of each choice, higher where it believes that more is lost."""
    yield "blocks left out", [float(blocks - len(kept)) for kept in choices]
    maps: dict[str, Spans] = {}
    for method in ("similarity", "taylor"):
        frame = run.scores(method)
        for row in frame[frame["seed"] == seed].itertuples():
            value = 1 - row.value if row.score == "cka" else row.value
            maps.setdefault(row.score, {})[row.start, row.end] = value
    for name, label in (
        ("block-influence", "block influence, summed"),
        ("angular-distance", "angular distance of runs"),
        ("cka", "1 - CKA of runs"),
        ("taylor", "Taylor, summed"),
    ):
        spans = maps[name]
        whole = all((a, b) in spans for a in range(blocks) for b in range(a + 1, blocks + 1))
        yield label, [sum(spans[s] for s in left_out(kept, blocks, whole)) for kept in choices]


def left_out(kept: Kept, blocks: int, runs: bool) -> list[tuple[int, int]]:
    """What a choice leaves out, as runs of blocks [a, b) or as single ones."""
    gone = [block for block in range(blocks) if block not in kept]
    if not runs:
        return [(block, block + 1) for block in gone]
    pieces = [
        [block for _, block in group]
        for _, group in groupby(enumerate(gone), lambda pair: pair[1] - pair[0])
    ]
    return [(piece[0], piece[-1] + 1) for piece in pieces]


def answers(
    choices: Sequence[Kept],
    scores: dict[str, np.ndarray],
    found: dict[Kept, np.ndarray],
    teacher: np.ndarray,
) -> pd.DataFrame:
    """A row a score: over all choices, and among those of one depth."""
    groups = {"all": list(range(len(choices)))} | {
        f"{depth} kept": [i for i, kept in enumerate(choices) if len(kept) == depth]
        for depth in sorted({len(kept) for kept in choices})
    }
    columns: dict[str, pd.Series] = {}
    for group, places in groups.items():
        outcome = np.stack([found[choices[i]].mean(0) for i in places], axis=1)  # (U, M)
        table = trust({n: v[places] for n, v in scores.items()}, teacher.mean(0), outcome)
        reliable = table["reliability"].iloc[0]
        told = [
            ""
            if np.isnan(row.spearman)
            else f"{row.spearman:.2f} [{row.spearman_low:.2f}, {row.spearman_high:.2f}]"
            for row in table.itertuples()
        ]
        columns[f"{group} ({len(places)}; reliability {reliable:.2f})"] = pd.Series(told)
    return pd.DataFrame({"score": list(scores), **columns})


def seeds_agree(choices: Sequence[Kept], found: dict[Kept, np.ndarray], teacher: np.ndarray) -> str:
    """How well the loss of one seed orders the choices as that of another does."""
    losses = pd.DataFrame(
        {
            seed: [teacher[seed].mean() - found[kept][seed].mean() for kept in choices]
            for seed in range(len(teacher))
        }
    )
    matrix = losses.corr("spearman").to_numpy()
    return ", ".join(f"{value:.2f}" for value in matrix[np.triu_indices(len(teacher), 1)])


if __name__ == "__main__":
    main()
