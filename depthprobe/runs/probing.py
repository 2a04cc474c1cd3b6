"""Probing methods: they train nothing but the teacher, and take a few passes over the users."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
from filelock import FileLock

from depthprobe.cost.size import count_parameters, parameters_by_block
from depthprobe.data.batches import negatives
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import evaluate, mean_ndcg
from depthprobe.files import temporary_folder
from depthprobe.methods import Kept, Task, Trial
from depthprobe.models.backbones import move, pretrained, pretrained_config
from depthprobe.models.blocks import check_tokens
from depthprobe.models.build import merge_lora, prompt_and_suffix
from depthprobe.models.recommender import Popularity, Recommender
from depthprobe.models.words import item_tokens
from depthprobe.probing.controls import against_random, by_score, random_sets, without_order
from depthprobe.probing.mix import part_sizes
from depthprobe.probing.passes import early_exit, settled_frame, settling
from depthprobe.probing.prompt_only import rank_by_title
from depthprobe.probing.readout import cache_states, fit_lenses, fit_readouts, rank_readouts
from depthprobe.probing.replace import Replacement, fit_cosine, fit_replacements, fold_map
from depthprobe.probing.similarity import Similarities, similarities
from depthprobe.probing.similarity import to_frame as to_scores
from depthprobe.probing.taylor import taylor_importance
from depthprobe.probing.walk import (
    Removal,
    Span,
    greedy,
    nearest_spans,
    rank_routes,
    route,
    route_without,
)
from depthprobe.runs.context import Context, Result, Scores
from depthprobe.runs.plan import SASREC, TEACHER, full_trial
from depthprobe.runs.records import ALONE, is_done, read_sealed, typed, write_sealed
from depthprobe.study import parse_layers

REMOVAL = "removal"  # prefix of a greedy removal's file
SHUFFLED_USERS = 20_000  # enough to see what order is worth; each is ranked six times per depth
TAYLOR_USERS = 512  # a gradient's size settles fast, and a backward pass costs twice a forward pass

CANDIDATES, CANDIDATE_SEED = 100, 99  # a user's target and 99 drawn items
# SmolLM2 of 135 M parameters takes 6 s of a core a user at six depths in float32, 3 s in bfloat16
# (ML-100K, AMD Zen 5): ten minutes, or five, on two cores
PROMPT_USERS = 200


def early_exits(context: Context, task: Task, *, norm: bool = True) -> Iterator[Result]:
    """The teacher read out after each block, behind the final norm or without it."""
    teacher = _teacher(context, task)
    ranks, validation = (
        early_exit(teacher, users, device=context.device, norm=norm)
        for users in (context.test, context.validation)
    )
    for trial in task.trials:
        score = mean_ndcg(validation[trial.depth]["full"])
        yield Result(trial, ranks[trial.depth], part_of(teacher, trial), validation=score)


def raw_exits(context: Context, task: Task) -> Iterator[Result]:
    """The teacher read out after each block, without the final norm."""
    return early_exits(context, task, norm=False)


def walk_blocks(context: Context, task: Task) -> Iterator[Result]:
    """The teacher without a block, or without one part of it."""
    teacher = _teacher(context, task)
    routes = [
        route(trial.kept)
        if trial.part is None or trial.dropped is None
        else route_without(trial.part, trial.dropped, trial.blocks)
        for trial in task.trials
    ]
    ranked = rank_routes(teacher, context.test, routes, device=context.device)
    for trial, ranks in zip(task.trials, ranked, strict=True):
        yield Result(trial, ranks, part_of(teacher, trial))


def walk_spans(context: Context, task: Task) -> Iterator[Result]:
    """The teacher without each span of blocks, or without those that angular distance picks."""
    if not context.study.probing.spans:
        yield from walk_blocks(context, task)
        return
    angular = similar_states(context, task.seed, task.blocks).angular
    trials = []
    for trial in task.trials:
        ranked = nearest_spans(angular, trial.blocks - trial.depth)
        trials.append(replace(trial, kept=outside(ranked[trial.place or 0], trial.blocks)))
    yield from walk_blocks(context, replace(task, trials=tuple(trials)))


def walk_greedy(context: Context, task: Task) -> Iterator[Result]:
    """The teacher after each greedy removal, chosen on validation users."""
    order = removal(context, task.seed, task.blocks)
    trials = [replace(trial, kept=order.kept(trial.depth)) for trial in task.trials]
    yield from walk_blocks(context, replace(task, trials=tuple(trials)))


def read_outs(context: Context, task: Task, *, lens: bool = False) -> Iterator[Result]:
    """A head fitted at each depth: to the targets, or to the teacher's scores (tuned lens)."""
    teacher, device = _teacher(context, task), context.device
    fit = fit_lenses if lens else fit_readouts
    with temporary_folder(context.shared) as folder:
        train, validation = (
            cache_states(teacher, eval_set, path=folder / f"{name}.npy", device=device)
            for name, eval_set in (("train", context.training), ("validation", context.validation))
        )
        fitted = fit(teacher, train, validation, device=device, seed=task.seed)
    ranked = rank_readouts(teacher, fitted, context.test, device=device)
    # a read-out takes the place of the teacher's own adapter; a translator comes before it
    more = fitted.weight[0].numel() + fitted.bias[0].numel() if lens else 0
    for trial in task.trials:
        counts = part_of(teacher, trial)
        counts |= {name: counts[name] + more for name in ("adapters", "total")}
        yield Result(trial, ranked[trial.depth], counts, validation=fitted.ndcg[trial.depth])


def tuned_lenses(context: Context, task: Task) -> Iterator[Result]:
    """A translator fitted at each depth to the teacher's scores."""
    return read_outs(context, task, lens=True)


def replacements(
    context: Context, task: Task, fit: Callable[..., list[Replacement]] = fit_replacements
) -> Iterator[Result]:
    """The teacher with a linear map in place of the span that turns states least, at each depth.

    Validation users give spans and maps. The first block always stays, since no block before it
    could carry the map.
    """
    teacher, device = copy.deepcopy(_teacher(context, task)), context.device
    merge_lora(teacher)
    angular = similar_states(context, task.seed, task.blocks).angular
    spans = [
        nearest_spans(angular, trial.blocks - trial.depth, first=1)[0] for trial in task.trials
    ]
    fitted = fit(teacher, context.validation, spans, device=device)
    for trial, linear in zip(task.trials, fitted, strict=True):
        model = copy.deepcopy(teacher)
        fold_map(model, linear, cut=True)
        done = replace(trial, kept=outside((linear.start, linear.end), trial.blocks))
        (ranks,) = rank_routes(model, context.test, [route(range(done.depth))], device=device)
        yield Result(done, ranks, part_of(teacher, done), replacement=linear)


def cosine_replacements(context: Context, task: Task) -> Iterator[Result]:
    """The same, with maps fitted to the direction of the state behind the span."""
    return replacements(context, task, partial(fit_cosine, seed=task.seed))


def compare_states(context: Context, task: Task) -> Iterator[Scores]:
    """How alike the states around blocks are, on validation users."""
    yield Scores(to_scores(similar_states(context, task.seed, task.blocks)))


def weigh_blocks(context: Context, task: Task) -> Iterator[Scores]:
    """How much the weights of each block matter to the loss of some validation users."""
    users = context.eval_set("validation", limit=TAYLOR_USERS)
    values = taylor_importance(_teacher(context, task), users, device=context.device)
    starts = np.arange(len(values))
    scores = {"score": task.method, "start": starts, "end": starts + 1, "value": values}
    yield Scores(pd.DataFrame(scores))


def settle_users(context: Context, task: Task) -> Iterator[Scores]:
    """The depth from which each test user's answers no longer change."""
    settled = settling(_teacher(context, task), context.test, device=context.device)
    yield Scores(settled_frame(settled, context.test.users))


def shuffle_histories(context: Context, task: Task) -> Iterator[Scores]:
    """Ranks with histories in random order, at every depth and by SASRec."""
    teacher, device = _teacher(context, task), context.device
    users = context.eval_set("test", limit=SHUFFLED_USERS)
    found = without_order(partial(early_exit, teacher, device=device), users)
    frames = [found.rename(columns={"place": "depth"})]
    frames[0].insert(0, "method", np.where(found["place"] < task.blocks, "early-exit", TEACHER))
    baseline = full_trial(SASREC, task.seed, 0)
    if is_done(context.trial_folder(baseline)):
        sasrec = context.sasrec(task.seed)
        found = without_order(lambda each: [evaluate(sasrec, each, device=device)], users)
        frames.append(found.rename(columns={"place": "depth"}).assign(method=SASREC))
    yield Scores(pd.concat(frames, ignore_index=True))


def draw_blocks(context: Context, task: Task) -> Iterator[Scores]:
    """Sets of blocks that scores choose, each score's reverse, and random sets of the same size.

    At the depths of the study. Scores come from validation users, a set's worth from test users.
    """
    teacher, device, blocks = _teacher(context, task), context.device, task.blocks
    without = [route(outside((b, b + 1), blocks)) for b in range(blocks)]
    skipped = rank_routes(teacher, context.validation, without, device=device)
    damage = [-mean_ndcg(ranks["full"]) for ranks in skipped]
    states = similar_states(context, task.seed, blocks)
    order = removal(context, task.seed, blocks)
    # a list of removals lacks the last block, since it is never removed
    went = (*order.removed, *order.kept(1))
    chosen: list[tuple[str, Kept]] = []
    drawn: list[Kept] = []
    for depth in parse_layers(context.study.layers, blocks):
        if depth == blocks:
            continue
        spans = nearest_spans(states.angular, blocks - depth)
        chosen += [
            ("prefix", tuple(range(depth))),
            ("skip", by_score(damage, depth)),
            ("skip-reversed", by_score(damage, depth, reverse=True)),
            ("influence", kept_by_states("influence", states, depth)),
            ("influence-reversed", by_score(states.influence, depth, reverse=True)),
            ("greedy", order.kept(depth)),
            ("greedy-reversed", tuple(sorted(went[:depth]))),
            ("angular", kept_by_states("angular", states, depth)),
            ("angular-reversed", outside(spans[-1], blocks)),
        ]
        drawn += random_sets(depth, blocks)
    sets = list(dict.fromkeys([*(kept for _, kept in chosen), *drawn]))
    plain = replace(context.test, negatives=None, lists=False)
    ranked = rank_routes(teacher, plain, [route(kept) for kept in sets], device=device)
    ranks = dict(zip(sets, ranked, strict=True))
    yield Scores(
        against_random({each: ranks[each[1]] for each in chosen}, {k: ranks[k] for k in drawn})
    )


def ask_untouched(context: Context, task: Task) -> Iterator[Scores]:
    """Rank test users' targets among 100 candidates by the likelihood of their titles.

    The backbone is as pretrained, at the depths of the study. The run's trained models and
    popularity rank the same candidates.
    """
    sequences, device = context.sequences, context.device
    users = context.eval_set("test", limit=PROMPT_USERS)
    drawn = negatives(sequences, users.users, count=CANDIDATES - 1, seed=CANDIDATE_SEED)
    if drawn is None:
        allowed = f"a log in which every user has {CANDIDATES - 1} items left to draw from"
        raise BadInput("methods", task.method, allowed)
    users = replace(users, negatives=drawn)
    frames = []

    def add(by: str, depth: int, ranks: np.ndarray) -> None:
        columns = {"by": by, "depth": depth, "candidates": CANDIDATES, "user": users.users}
        frames.append(pd.DataFrame(columns | {"rank": ranks}))

    settings = replace(context.backbone, reads="titles")  # even if the recommenders read items
    model = pretrained(settings)
    if model.config.tie_word_embeddings and not pretrained_config(settings).tie_word_embeddings:
        raise BadInput("backbone", settings.source, "weights with a language-model head")
    move(model, settings, device)
    tokens = item_tokens(settings, sequences.item_ids.tolist(), sequences.titles) or []
    check_tokens("methods", task.method, chain.from_iterable(tokens), model)
    prompt, suffix = prompt_and_suffix(settings, model)
    depths = sorted({*parse_layers(context.study.layers, task.blocks), task.blocks})
    found = rank_by_title(model, users, tokens, prompt=prompt, suffix=suffix, depths=depths)
    for by, ranks in found.items():
        for depth, own in zip(depths, ranks, strict=True):
            add(by, depth, own)
    del model  # free it before the next one is loaded

    training = sequences.items[context.split.trained]
    others: dict[str, tuple[int, Any]] = {
        "popularity": (0, Popularity(training, sequences.n_items).to(device))
    }
    if is_done(context.trial_folder(full_trial(SASREC, task.seed, 0))):
        others[SASREC] = 0, context.sasrec(task.seed)
    if is_done(context.trial_folder(full_trial(TEACHER, task.seed, task.blocks))):
        others[TEACHER] = task.blocks, context.teacher(task.seed, task.blocks)
    for name, (depth, other) in others.items():
        add(name, depth, evaluate(other, users, device=device)[f"sampled-{CANDIDATES - 1}"])
    yield Scores(pd.concat(frames, ignore_index=True))


def removal(context: Context, seed: int, blocks: int) -> Removal:
    """The greedy removal on validation users, computed once and shared."""
    path = context.shared / f"{REMOVAL}-s{seed}-{context.teacher_digest(seed, blocks)}.json"
    with FileLock(path.with_name(f".{path.stem}.lock")):
        if not path.exists():
            teacher = context.teacher(seed, blocks)
            write_sealed(path, asdict(greedy(teacher, context.validation, device=context.device)))
    content = read_sealed(path, ALONE)
    content.pop("digest", None)
    return typed(content, Removal, path, ALONE)


@lru_cache(maxsize=1)  # `replace`, screened spans and selected blocks share this
def similar_states(context: Context, seed: int, blocks: int) -> Similarities:
    """How alike the teacher's states around blocks are, by validation users."""
    teacher = context.teacher(seed, blocks)
    return similarities(teacher, context.validation, device=context.device)


def kept_by_states(select: str, states: Similarities, depth: int) -> tuple[int, ...]:
    """The blocks that block influence or angular distance keeps."""
    blocks = len(states.influence)
    if select == "influence":
        return by_score(states.influence, depth)
    return outside(nearest_spans(states.angular, blocks - depth)[0], blocks)


def outside(span: Span, blocks: int) -> tuple[int, ...]:
    """The blocks outside a span."""
    return tuple(b for b in range(blocks) if not span[0] <= b < span[1])


def _teacher(context: Context, task: Task) -> Recommender:
    return context.teacher(task.seed, task.blocks)


def part_of(teacher: Recommender, trial: Trial) -> dict[str, int]:
    """The teacher's parameters with only the trial's blocks and parts."""
    counts, blocks = count_parameters(teacher), parameters_by_block(teacher)
    lighter = sum(blocks[b] for b in trial.kept) - counts["blocks"]
    if trial.part is not None and trial.dropped is not None:
        lighter = -part_sizes(teacher.backbone, trial.part, [trial.dropped])[0]
    return counts | {
        "blocks": counts["blocks"] + lighter,
        "total": counts["total"] + lighter,
        "trainable": 0,
    }
