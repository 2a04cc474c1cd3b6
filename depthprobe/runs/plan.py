"""The plan: the tasks of a study, each after what it needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from depthprobe.errors import BadInput
from depthprobe.methods import Request, Task, Trial, method_of, method_order
from depthprobe.study import SELECTIONS, Study, parse_blocks, parse_layers, settings_of

# methods that others need: the trained full-depth recommender, the default item table; and what
# a search predicts the depths by, and holds the teacher against
TEACHER, SASREC, READOUT, POPULARITY = "full", "sasrec", "readout", "popularity"
MIX = "mix"  # whose budget may be in a unit that has to be timed


def plan(study: Study, blocks: int) -> list[Task]:
    """All tasks of a study, each after what it needs.

    For a search, all that it may need: every depth of the method that it searches with, and the
    other methods at the ends and the first seed. ``BadInput`` if the study names depths or blocks
    that the backbone does not have.
    """
    parse_layers(study.layers, blocks)  # refused even if no method uses a depth
    searched = study.searched if study.searches else None
    wanted = _with_needs(study, study.methods)
    repeated = wanted
    if study.backbone.own:  # its teacher is one model, whatever the seed
        repeated = {n for n in wanted if method_of(n).trains or n == SASREC}
    if searched is not None:
        wanted |= _with_needs(study, (TEACHER, READOUT, POPULARITY))
        repeated = _with_needs(study, (TEACHER, searched))
        among = settings_of(study, searched).layers
        if not any(depth < blocks for depth in parse_layers(among, blocks)):
            allowed = f"some depth below {blocks}, all blocks of the backbone, to search among"
            raise BadInput("layers", study.layers, allowed)
    tasks: list[Task] = []
    for name in sorted(wanted, key=method_order):
        method = method_of(name)
        if method.lever:
            known = {task.id for task in tasks}  # a lever applies to all methods
            tasks += [task for task in _variants(name, tasks) if task.id not in known]
            continue
        settings = settings_of(study, name)
        listed = settings.select not in SELECTIONS
        depths = parse_layers(settings.layers, blocks)
        if searched is not None and name != searched and settings.layers == study.layers:
            depths = ()
        trains = method.trains or method.settings == "sasrec"
        tuned = trains and len(settings.recipe.rates) > 1
        # without training, a seed changes nothing
        once = (method.role == "baseline" and not method.settings) or name not in repeated
        for seed in range(1 if once else study.seeds):
            before = (*_needs(study, name), *(other for other in method.after if other in wanted))
            needs = tuple(full_trial(need, seed, blocks).id for need in before)
            request = Request(
                name=name,
                seed=seed,
                blocks=blocks,
                depths=depths,
                select=settings.select,
                picked=parse_blocks(settings.select, blocks) if listed else None,
                study=study,
            )
            for trials in method.trials(request):
                if trials or method.table:
                    # the learning rate is found at seed 0
                    first = (at_first_seed(trials[-1]).id,) if tuned and seed else ()
                    tasks.append(Task(name, seed, trials, (*needs, *first), blocks))
    return tasks


def _variants(name: str, tasks: Sequence[Task]) -> list[Task]:
    """A task for each trained trial that the lever applies to; ``BadInput`` if there is none."""
    lever, _, source = name.partition(":")
    made = []
    for task in tasks:
        method = method_of(task.method)
        if method.exportable == "own" and method.role != "control" and source in ("", task.method):
            kind = f"{lever}:{task.method}"
            for trial in task.trials:
                own = replace(trial, id=f"{trial.id}:{lever}", method=kind, of=trial.id)
                made.append(Task(kind, task.seed, (own,), (trial.id,), task.blocks))
    if not made:
        raise BadInput("methods", name, "full, or a method that trains shallower models, beside it")
    return made


def holder_of(study: Study, trial: Trial) -> Trial:
    """The trial whose folder holds the weights: the deepest one of the same training."""
    tasks = plan(study, trial.blocks)
    deepest = next(task.trials[-1] for task in tasks if trial.id in task.names)
    return trial if deepest.id == trial.id else deepest


def at_first_seed(trial: Trial) -> Trial:
    """The same trial of seed 0."""
    return replace(trial, id=f"{trial.id.removesuffix(f'-s{trial.seed}')}-s0", seed=0)


def full_trial(method: str, seed: int, blocks: int) -> Trial:
    """A baseline's trial, or the one that keeps all blocks."""
    return trial_of(method, range(blocks), seed, blocks)


def trial_of(method: str, kept: Iterable[int], seed: int, blocks: int) -> Trial:
    """The trial of a baseline, or of a method that names its trials by their depth."""
    if method_of(method).role == "baseline":
        return Trial(f"{method}-s{seed}", method, (), seed, 0)
    kept = tuple(kept)
    name = f"{method.replace(':', '-')}-d{len(kept):02d}-s{seed}"
    return Trial(name, method, kept, seed, blocks)


def _with_needs(study: Study, names: Iterable[str]) -> set[str]:
    """The methods and everything that they need."""
    wanted = set(names)
    missing = set(wanted)
    while missing:
        missing = {need for name in missing for need in _needs(study, name)} - wanted
        wanted |= missing
    return wanted


def _needs(study: Study, name: str) -> tuple[str, ...]:
    method, source = method_of(name), name.partition(":")[2]
    if method.lever:
        return (source,) if source else ()
    if method.trains and settings_of(study, name).needs_teacher:
        return (TEACHER,)
    # SASRec is not required when the item table comes from elsewhere
    return tuple(n for n in method.needs if n != SASREC or study.item_table == SASREC)
