"""A made-up run, in the shape of a run folder's contents, with numbers like a real one's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest

from depthprobe.evaluation.metrics import metrics_from_ranks
from depthprobe.report.numbers import Summary, summarise
from depthprobe.runs.records import Costs, Manifest, Record, Rounds, TrainingCosts
from depthprobe.runs.store import Run
from depthprobe.study import Study, Variant, override

BLOCKS, USERS, ITEMS, ROUNDS = 12, 1500, 2000, 15
# How strongly a method pulls the target up; about the logarithm of its rank.
FLOOR, TOP = 0.35, 2.2
PARTS = ("drop-attention", "drop-mlp")
TITLES = ("item-text", "item-text-linear")
QUANTISED, NARROW = ("int8:full", "int8:distill", "int8:distill:narrow"), "distill:narrow"
# made only where they are asked for by name
ONLY_ASKED = {*PARTS, "span", "readout", "mix", *TITLES, *QUANTISED, NARROW}


def strength(method: str, depth: int, removed: str) -> float:
    """Accuracy of the made-up methods, on a scale of 0 (chance) to `TOP` (the teacher)."""
    if method in QUANTISED:  # which costs a shallower model more
        return strength(method.partition(":")[2], depth, removed) - 0.3 / depth
    if method == NARROW:
        return strength("distill", depth, removed) - 0.1
    if method in {"popularity", "sasrec", "full"}:
        return {"popularity": FLOOR, "sasrec": 1.9, "full": TOP}[method]
    if method == "readout":
        return 0.5 * TOP * (1 + depth / BLOCKS)
    if method in TITLES:
        return 1.6 - 0.005 * (depth - 4) ** 2 - 0.4 * (method == TITLES[1])
    if method == "early-exit":
        return FLOOR + (TOP - FLOOR) * (depth / BLOCKS) ** 1.6
    if method == "skip":
        return TOP - (1.2 if removed == "0" else 0.35 if removed == str(BLOCKS - 1) else 0.02)
    if method in PARTS:
        return TOP - (0.6 if removed == "0" else 0.01)
    if method == "span":
        first, last = map(int, removed.split("-"))
        return TOP - (1.3 if first == 0 else 0.02 * (last - first + 1))
    if method == "mix":
        return TOP - 0.3 / depth
    gap = {"finetune": 0.25, "heal": 0.2, "distill": 0.1, "random-init": 0.7}[method]
    return TOP - gap / depth ** (0.8 if method != "random-init" else 0.3)


@dataclass
class FakeRun:
    """Duck-typed like `depthprobe.runs.store.Run`."""

    path: Path
    study: Study
    manifest: Manifest
    trials: pd.DataFrame
    metrics: pd.DataFrame
    users: pd.DataFrame
    records: list[Record] = field(default_factory=list)
    slices: pd.DataFrame = field(default_factory=pd.DataFrame)
    probes: dict[str, pd.DataFrame] = field(default_factory=dict)
    seen_items = Run.seen_items

    def scores(self, method: str) -> pd.DataFrame:
        """As a run's: what a probe says where no trial does."""
        return self.probes.get(method, pd.DataFrame())


def span(first: int, last: int) -> str:
    """Blocks from first to last, both included, as a run folder writes them."""
    return "" if last < first else str(first) if first == last else f"{first}-{last}"


def planned() -> list[tuple[str, int, str, str]]:
    """(method, depth, kept, removed) of everything that the made-up study tries."""
    top = BLOCKS - 1
    plan = [("popularity", 0, "", ""), ("sasrec", 0, "", ""), ("full", BLOCKS, span(0, top), "")]
    for block in range(BLOCKS):
        kept = ",".join(filter(None, (span(0, block - 1), span(block + 1, top))))
        plan.append(("skip", top, kept, str(block)))
        plan += [(part, BLOCKS, span(0, top), str(block)) for part in PARTS]
    for first in range(BLOCKS):
        for last in range(first + 1, min(first + 3, BLOCKS)):
            kept = ",".join(filter(None, (span(0, first - 1), span(last + 1, top))))
            plan.append(("span", BLOCKS - (last - first + 1), kept, f"{first}-{last}"))
    for method, depths in {
        "early-exit": range(1, BLOCKS), "readout": (0, BLOCKS), "finetune": (1, 2, 4, 8),
        "distill": (1, 2, 4), "random-init": (1, 2, 4, 12), TITLES[0]: (0, 4, 12),
        TITLES[1]: (0, 1, 4, 12), QUANTISED[0]: (12,), QUANTISED[1]: (1, 2, 4),
        NARROW: (2, 12), QUANTISED[2]: (2, 12), "mix": (2, 4),
    }.items():  # fmt: skip
        plan += [(method, d, span(0, d - 1), span(d, top)) for d in depths]
    return plan


def make_run(
    path: Path,
    *,
    methods: Iterable[str] | None = None,
    seeds: int = 2,
    users: int = USERS,
    failing: Iterable[tuple[str, int, int]] = (),
    timing: bool = True,
    sampled: bool = True,
    gain: Callable[[str, int], float] = lambda method, depth: 0.0,
    error: str = "RuntimeError: loss is not finite",
    dataset: str = "made-up",
    backbone: str = "tiny-decoder",
    resamples: int = 200,
) -> FakeRun:
    """A finished run; `gain(method, depth)` is added to a method's strength."""
    study = override(
        Study(name="made-up"),
        seeds=seeds,
        **{"protocol.resamples": resamples, "data.source": "log.txt", "backbone.source": backbone},
    )
    study = replace(study, variants={"narrow": Variant(width=0.5)})
    # a user has a luck of their own in every trial, so that trials are paired as real ones are
    luck = np.random.default_rng(0).normal(size=users)
    rows, tidy, ranks, records, ids = [], [], [], [], np.arange(users) * 3 + 1
    for seed in range(seeds):
        shared = np.random.default_rng([seed, 1]).normal(size=users)
        for method, depth, kept, removed in planned():
            if method in ONLY_ASKED if methods is None else method not in methods:
                continue
            if method == "popularity" and seed:
                continue
            trial, of = f"{method}-{depth}-{removed or 'x'}-{seed}", None
            if method in QUANTISED:
                of = trial.removeprefix("int8:")
                trial = f"{of}:int8"
            failed = (method, depth, seed) in set(failing)
            own = np.random.default_rng([seed, zlib.crc32(trial.encode())])
            row = _row(trial, method, depth, kept, removed, seed)
            record = Record(id=trial, method=method, seed=seed, of=of, status="done")
            record.costs = Costs(bytes=_bytes(row), training=_training(method, depth))
            if failed:
                row |= {"status": "failed", "error": error, "parameters_total": np.nan}
                record.status, record.costs = "failed", None
            else:
                level = strength(method, depth, removed) + gain(method, depth)
                noise = 1.2 * luck + 0.5 * shared + 0.1 * own.normal(size=users)
                score = np.clip(np.log(ITEMS) * 0.9 - 1.7 * level - 1.4 * noise, 0, np.log(ITEMS))
                found = {"full": np.floor(np.exp(score))}
                if sampled:
                    found["sampled-999"] = np.floor(1 + (found["full"] - 1) * 999 / ITEMS)
                for protocol, values in found.items():
                    ranked = {"trial": trial, "user": ids, "protocol": protocol, "rank": values}
                    ranks.append(pd.DataFrame(ranked))
                    tidy += _metrics(trial, method, depth, seed, protocol, values)
                if timing and (depth in {1, 2, 4, 8, 12} or method == "sasrec"):
                    timing = _timing(method, depth)
                    record.costs.timing = msgspec.convert(timing, dict[str, Rounds])
            rows.append(row)
            records.append(record)
    columns = ["trial", "user", "protocol", "rank"]
    return FakeRun(
        path=path,
        study=study,
        manifest=msgspec.convert(_manifest(dataset, backbone, users, timing), Manifest),
        trials=pd.DataFrame(rows),
        metrics=pd.DataFrame(tidy),
        users=pd.concat(ranks) if ranks else pd.DataFrame(columns=columns),
        records=records,
    )


def _row(trial: str, method: str, depth: int, kept: str, removed: str, seed: int) -> dict[str, Any]:
    blocks = 0 if depth == 0 else depth * (525_000 if NARROW in method else 1_050_000)
    table = ITEMS * 64
    total = {"popularity": ITEMS, "sasrec": table + 110_000}.get(method, blocks + table + 90_000)
    return {
        "trial": trial, "method": method, "depth": depth, "kept": kept, "removed": removed,
        "seed": seed, "status": "done", "error": None, "parameters_blocks": blocks,
        "parameters_token_embeddings": 0, "parameters_adapters": 90_000 if depth else 0,
        "parameters_item_table": table, "parameters_total": total, "parameters_trainable": total,
        "training_seconds": 60.0 * (depth + 1),
    }  # fmt: skip


def _bytes(row: dict[str, Any]) -> dict[str, int]:
    """Four a weight, and of the blocks of a quantised model one."""
    saved = 3 * row["parameters_blocks"] * (row["method"] in QUANTISED)
    return {"total": 4 * row["parameters_total"] - saved}


def _training(method: str, depth: int) -> TrainingCosts | None:
    """A hundred steps a block; a student's teacher, with its features, took 900 seconds."""
    if method not in {"sasrec", "full", "finetune", "distill", NARROW, "random-init"}:
        return None
    teacher = 900.0 * ("distill" in method)
    return TrainingCosts(
        epochs=3, steps=100 * (depth + 1), seconds=60.0 * (depth + 1), teacher_seconds=teacher
    )


def _metrics(
    trial: str, method: str, depth: int, seed: int, protocol: str, ranks: np.ndarray
) -> list[dict[str, Any]]:
    return [
        {
            "trial": trial, "method": method, "depth": depth, "seed": seed, "split": "test",
            "protocol": protocol, "slice": "all", "metric": name, "value": value,
            "ci_low": 0.92 * value, "ci_high": 1.08 * value, "users": len(ranks),
        }
        for name, value in metrics_from_ranks(ranks).items()
        if name != "NDCG@1"
    ]  # fmt: skip


def _timing(method: str, depth: int) -> dict[str, Any]:
    """Measured once a run: every seed's record holds the same rounds."""
    size = (depth + 0.6) * (1.3 if method in QUANTISED else 1) if method != "sasrec" else 1.1
    drift = np.random.default_rng(7).lognormal(0, 0.08, ROUNDS)  # the machine's, so shared

    def rounds(milliseconds: float) -> dict[str, list[float]]:
        rng = np.random.default_rng(round(1000 * milliseconds))
        seconds = milliseconds / 1e3 * drift * rng.lognormal(0, 0.03, ROUNDS)
        return {"seconds": [float(s) for s in seconds]}

    extra = 1.07 if method == "distill" else 1.0
    found = {"encode": rounds(9.5 * size), "score": rounds(2.1), "latency": rounds(size + 0.4)}
    trained = method not in {"early-exit", "skip", *QUANTISED}
    return found | ({"train_step": rounds(31 * size * extra)} if trained else {})


def _manifest(dataset: str, backbone: str, users: int, timing: bool) -> dict[str, Any]:
    conditions = {
        "device": "cpu", "dtype": "float32", "batch": 128, "length": 30, "threads": 2, "warmup": 3,
        "rounds": ROUNDS,
    }  # fmt: skip
    return {
        "schema": 1, "study_hash": "0123456789abcdef", "created": "2026-01-02T03:04:05+00:00",
        "command": "depthprobe sweep study.toml --output runs/made-up",
        "data": {
            "name": dataset, "users": users + 12, "items": ITEMS, "interactions": users * 21,
            "fingerprint": "ab" * 32, "warnings": ["no times: order is the file's"],
            "statistics": {"median_length": 17, "density": 0.0104999123},
        },
        "backbone": {
            "source": backbone, "revision": None, "blocks": BLOCKS, "width": 256, "family": "llama",
            "parameters": 12_900_000,
        },
        "item_table": {"source": "sasrec", "width": 64},
        "machine": {
            "device": "cpu", "cpu": "Example CPU 2.4 GHz", "cores": 2, "memory_gib": 7.8,
            "gpu": None,
        },
        "versions": {"depthprobe": "0.1.0", "python": "3.11.9", "torch": "2.13.0"},
        "git": {"commit": "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567", "dirty": False},
        "timing": conditions if timing else None, "wall_seconds": 171.4,
    }  # fmt: skip


def add_probes(run: FakeRun) -> FakeRun:
    """Scores of blocks and spans as two teachers might have them, and when users are settled."""
    draw, rows = np.random.default_rng(5), []
    for seed in (0, 1):
        for start in range(BLOCKS):
            for end in range(start + 1, BLOCKS + 1):
                turned = (0.4 if start == 0 else 0.02 * (end - start)) * draw.uniform(0.9, 1.1)
                rows += [("angular-distance", start, end, turned, seed)]
                rows += [("cka", start, end, 1 - turned, seed)]
            for name, share in (("block", 1.0), ("attention", 0.5), ("mlp", 0.3)):
                value = share * (0.9 if start == 0 else 0.01 * (1 + start))
                rows.append((f"{name}-influence", start, start + 1, value, seed))
    columns = ["score", "start", "end", "value", "seed"]
    users = np.unique(run.users["user"])
    frames = []
    for seed in (0, 1):
        best = draw.integers(1, 40, len(users)).astype(np.float64)
        final = best + draw.integers(0, 2, len(users)) * 5
        names = ("top_settled", "set_settled", "rank_settled", "best_depth")
        own = {name: draw.integers(6, BLOCKS + 1, len(users)) for name in names}
        own |= {"user": users, "final_rank": final, "best_rank": best, "seed": seed}
        frames.append(pd.DataFrame(own | {"overthinking": final > best}))
    spread = {"anisotropy": [0.4, 0.8, 0.9], "effective_rank": [70.1, 41.5, 28.5], "seed": 0}
    run.probes = {
        "item-text-spread": pd.DataFrame({"depth": [0, 4, 12]} | spread),
        "similarity": pd.DataFrame(rows, columns=columns),
        "settling": pd.concat(frames, ignore_index=True),
        "shuffled": shuffled(0.4),
        "random-blocks": chosen_blocks(),
        "prompt-only": untouched(),
        "mix": mixed(),
    }
    return run


def shuffled(share: float) -> pd.DataFrame:
    """A teacher that loses this share of its hits when histories are shuffled, SASRec all."""
    users, frames = np.arange(200), []
    ranks = np.where(users < 100, 1.0, 100.0)
    for method, depth, lost in (("early-exit", 4, share), ("full", 12, share), ("sasrec", 0, 1.0)):
        own = {f"shuffled-{draw}": np.where(users < lost * 100, 100.0, ranks) for draw in (1, 2)}
        found = {"method": method, "depth": depth, "user": users, "rank": ranks}
        frames += [pd.DataFrame(found | own | {"seed": seed}) for seed in (0, 1)]
    return pd.concat(frames, ignore_index=True)


def untouched() -> pd.DataFrame:
    """An untouched backbone by both scores, and popularity, on 100 candidates of forty users."""
    users, frames = np.arange(40), []
    for by, depth, hits in (("likelihood", 4, 10), ("normalised", 4, 20), ("popularity", 0, 8)):
        own = {"by": by, "depth": depth, "candidates": 100, "user": users, "seed": 0}
        frames.append(pd.DataFrame(own | {"rank": np.where(users < hits, 1.0, 50.0)}))
    return pd.concat(frames, ignore_index=True)


def mixed() -> pd.DataFrame:
    """Two budgets of two teachers, which choose alike: what is measured is twice the sum."""
    few = ["kept", "replace"] + ["skip"] * 8 + ["drop-attention", "drop-mlp"]
    more = ["kept"] * 3 + ["replace"] + ["skip"] * 6 + ["drop-attention", "drop-mlp"]
    rows = [
        (depth, block, option, 0.0 if option == "kept" else 0.01, seed, total)
        for seed in (0, 1)
        for depth, total, options in ((2, 0.11, few), (4, 0.09, more))
        for block, option in enumerate(options)
    ]
    frame = pd.DataFrame(rows, columns=["depth", "block", "option", "damage", "seed", "predicted"])
    frame["validation"], frame["test"] = 2 * frame["predicted"], 3 * frame["predicted"]
    return frame.assign(budget="parameters", share=frame["depth"] / BLOCKS)


def chosen_blocks() -> pd.DataFrame:
    """Twenty random sets of four blocks, a selection that beats all and its reverse."""
    rows = [("random", 4, f"{n}", 0.01 * n, np.nan, np.nan) for n in range(1, 21)]
    rows += [("greedy", 4, "0-3", 0.3, 1.0, 1 / 21), ("greedy-reversed", 4, "8-11", 0.0, 0.0, 1.0)]
    frame = pd.DataFrame(rows, columns=["selection", "depth", "kept", "value", "beats", "p"])
    return pd.concat([frame.assign(metric=name) for name in ("HR@10", "NDCG@10")])


@pytest.fixture(scope="session")
def make() -> Callable[..., FakeRun]:
    """Makes other runs: `make(path, methods=..., seeds=..., failing=...)`."""
    return make_run


@pytest.fixture(scope="session")
def add_more() -> Callable[[FakeRun], FakeRun]:
    """Adds slices, lists and the tables of probes to a run."""
    return lambda run: add_probes(add_slices(run))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    """The whole made-up run, a failed trial in it; tests only read it."""
    folder = tmp_path_factory.mktemp("run")
    methods = {method for method, *_ in planned()} - {"readout", "mix"}
    made = make_run(folder, methods=methods, users=400, failing=[("random-init", 1, 1)])
    return add_probes(add_slices(made))


def add_slices(run: FakeRun) -> FakeRun:
    """Which slice each user is in, and what was counted of the items that trials recommend."""
    users = np.unique(run.users["user"])
    draw = np.random.default_rng(3)
    run.slices = pd.DataFrame({"user": users})
    for family, labels, shares in (
        ("history", ["3-4", "5-8"], [0.6, 0.4]),
        ("target", ["head", "middle", "tail", "cold"], [0.2, 0.5, 0.28, 0.02]),
    ):
        kinds = pd.CategoricalDtype(labels)
        codes = draw.choice(len(labels), len(users), p=shares)
        run.slices[family] = pd.Categorical.from_codes(codes, dtype=kinds)
    rows = run.metrics.drop_duplicates("trial").assign(
        protocol="full", ci_low=np.nan, ci_high=np.nan
    )
    for metric, low, high in (
        ("coverage@10", 0.2, 0.8),
        ("gini@10", 0.5, 0.99),
        ("popularity@10", 1.0, 6.0),
    ):
        values = draw.uniform(low, high, len(rows))
        run.metrics = pd.concat([run.metrics, rows.assign(metric=metric, value=values)])
    return run


@pytest.fixture(scope="session")
def summary(run: FakeRun) -> Summary:
    """Its numbers."""
    return summarise(run)
