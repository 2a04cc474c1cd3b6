"""The methods: one record each, which holds all that the package knows of a method.

The planner takes its trials from there, the worker its function, the dry run its work, the report
its label and role. To add a method, add a record to :data:`METHODS`; from another package, call
:func:`register` in a module that the entry-point group ``depthprobe.methods`` names.

A trained method may be followed by a colon and a selection of blocks or a variant of the study:
``heal:ends``, ``distill:cos``. These are separate methods with the same record.
"""

from __future__ import annotations

import importlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal

from depthprobe.errors import BadInput, nearest

if TYPE_CHECKING:
    from depthprobe.study import Study

Role = Literal["baseline", "teacher", "probe", "trained", "control"]
Part = Literal["attention", "mlp"]
Kept = tuple[int, ...]  # indices of the blocks that are kept


@dataclass(frozen=True)
class Trial:
    """One (method, kept blocks, seed): one record."""

    id: str  #: the name of the trial and of its folder.
    method: str
    #: the blocks that are kept; until it has run, the first ones for a trial whose blocks are
    #: searched for. Empty without a backbone, and at depth 0.
    kept: Kept
    seed: int
    blocks: int  #: of the full backbone; 0 without a backbone.
    dropped: int | None = None  #: the block that loses a part; it counts as kept.
    part: Part | None = None  #: which part it loses.
    #: of a screened span, how many of its length have a smaller angular distance.
    place: int | None = None
    #: the budget, in whole blocks, for blocks that may be kept in part.
    budget: int | None = None
    of: str | None = None  #: the trial whose trained model it is a variant of.

    @property
    def depth(self) -> int:
        """How many blocks are kept, or the budget in blocks."""
        return len(self.kept) if self.budget is None else self.budget

    @property
    def removed(self) -> Kept:
        """The blocks that are not kept, or that lack a part."""
        if self.dropped is not None:
            return (self.dropped,)
        return tuple(block for block in range(self.blocks) if block not in self.kept)


@dataclass(frozen=True)
class Task:
    """Work that one process does at a time: all trials that share one pass or one training."""

    method: str
    seed: int
    trials: tuple[Trial, ...]  #: none if it makes a table.
    needs: tuple[str, ...] = ()  #: ids of trials that must be done before.
    blocks: int = 0  #: of the full backbone.

    @property
    def id(self) -> str:
        """The only trial's id, or the method's for a shared pass."""
        if len(self.trials) == 1:
            return self.trials[0].id
        return f"{self.method.replace(':', '-')}-s{self.seed}"

    @property
    def names(self) -> set[str]:
        """The names by which other tasks may need it: its own id, and its trials'."""
        return {self.id, *(trial.id for trial in self.trials)}


@dataclass(frozen=True)
class Request:
    """The input for a method's plan: one seed of a study on one backbone."""

    name: str  #: of the method, with its variant: ``distill:cos``.
    seed: int
    blocks: int  #: of the full backbone.
    depths: tuple[int, ...]  #: that the study asks for, ascending.
    select: str  #: which blocks stay.
    picked: Kept | None  #: the blocks themselves, if ``select`` lists them.
    study: Study  #: all settings.

    def trial(self, kept: Iterable[int], tag: str | None = None, **more: Any) -> Trial:
        """A trial of this request; ``tag`` makes its name unique, by default its depth."""
        kept = tuple(kept)
        tag = f"d{len(kept):02d}" if tag is None else tag
        parts = filter(None, (self.name.replace(":", "-"), tag, f"s{self.seed}"))
        return Trial("-".join(parts), self.name, kept, self.seed, self.blocks, **more)


Groups = list[tuple[Trial, ...]]  # the trials of each task


@dataclass(frozen=True)
class Sizes:
    """The sizes of a study's data and recipes, from which a method's work is computed."""

    windows: int  # histories that are trained on
    validation: int  # users
    test: int  # users
    epochs: int = 0  # of the method's recipe, an upper bound
    steps: int = 0  # an epoch
    depths: tuple[int, ...] = ()  # of the study


@dataclass(frozen=True)
class Work:
    """The work of a task, in units that the timing rig measures."""

    #: users encoded, by depth; SASRec's under ``"sasrec"``.
    encode: Mapping[int | str, float] = field(default_factory=dict)
    score: float = 0.0  #: users whose catalogue is scored.
    #: training steps, by the depth of the trained model; SASRec's under ``"sasrec"``.
    steps: Mapping[int | str, float] = field(default_factory=dict)


# --- which trials a method has ---------------------------------------------------------------


def full_depth(request: Request) -> Groups:
    """One trial that keeps all blocks."""
    return [(request.trial(range(request.blocks)),)]


def no_backbone(request: Request) -> Groups:
    """One trial without a backbone."""
    name = request.name
    return [(Trial(f"{name}-s{request.seed}", name, (), request.seed, 0),)]


def no_trials(request: Request) -> Groups:
    """One task that makes a table."""
    return [()]


def once(request: Request) -> Groups:
    """One task that makes a table, only for the first seed."""
    return [] if request.seed else [()]


def first_seed(request: Request) -> Groups:
    """One task that makes a table, only of the first seed's teacher; none for a single block."""
    return [] if request.blocks == 1 else once(request)


def prefixes(first: int, last: int, request: Request) -> Groups:
    """The first blocks at every depth from ``first`` to ``blocks + last``, all in one pass."""
    depths = range(first, request.blocks + last + 1)
    return [tuple(request.trial(range(depth)) for depth in depths)]


def every_depth_once(request: Request) -> Groups:
    """A trial per depth from 0 to all blocks, only for the first seed: seeds do not matter."""
    return [] if request.seed else prefixes(0, 0, request)


def each_run(shortest: int, longest: int, request: Request) -> Groups:
    """The teacher without each span of some lengths; at least one block stays."""
    trials, every = [], range(request.blocks)
    for length in range(shortest, min(longest, request.blocks - 1) + 1):
        for first in every[: request.blocks - length + 1]:
            last = first + length - 1
            tag = f"b{first:02d}" if length == 1 else f"b{first:02d}-{last:02d}"
            trials.append(request.trial([b for b in every if not first <= b <= last], tag))
    return [tuple(trials)]


def spans(request: Request) -> Groups:
    """Every span of at least two blocks; or of each length those that turn states least."""
    most, blocks = request.study.probing.spans, request.blocks
    if not most:
        return each_run(2, blocks, request)
    return [
        tuple(
            request.trial(range(blocks - length), f"d{blocks - length:02d}-n{n + 1}", place=n)
            for length in range(2, blocks)
            for n in range(min(most, blocks - length + 1))
        )
    ]


def every_nth(request: Request) -> Groups:
    """The teacher without every second, every third, ... block."""
    every = range(request.blocks)
    return [
        tuple(
            request.trial([b for b in every if (b + 1) % step], f"e{step:02d}")
            for step in range(2, request.blocks + 1)
        )
    ]


def each_part(part: Part, request: Request) -> Groups:
    """All blocks, one of them without its attention or its MLP."""
    every = range(request.blocks)
    return [tuple(request.trial(every, f"b{b:02d}", dropped=b, part=part) for b in every)]


def by_budget(request: Request) -> Groups:
    """A budget for each depth of the study below the full one, all in one walk."""
    depths = [depth for depth in request.depths if depth < request.blocks]
    trials = tuple(request.trial(range(depth), budget=depth) for depth in depths)
    return [trials] if trials else []


def selected(request: Request) -> Groups:
    """A trial per depth below the full one, or the one that the selection lists.

    Also at full depth, if the study asks for it and blocks are narrower or looped.
    """
    if request.picked is not None:
        return [(request.trial(request.picked),)]
    own = request.study.variants.get(request.name.partition(":")[2])
    most = request.blocks if own is not None and own.reshapes else request.blocks - 1
    return _by_depth(request, {depth for depth in request.depths if depth <= most})


def selected_and_full(request: Request) -> Groups:
    """A trial per depth and one of full depth, as a control of the teacher too."""
    own = request.study.variants.get(request.name.partition(":")[2])
    more = {request.blocks} if own is None or own.layers is None else set()
    return _by_depth(request, {*request.depths} | more)


def selected_and_ends(request: Request) -> Groups:
    """A trial per depth, and those with no block and with all."""
    return _by_depth(request, {0, *request.depths, request.blocks})


def chosen_blocks(select: str, depth: int, blocks: int, *, seed: int) -> Kept:
    """The blocks that a selection keeps; the first ones if it must ask the teacher.

    >>> [chosen_blocks(name, 3, 8, seed=0) for name in ("prefix", "ends", "interval")]
    [(0, 1, 2), (0, 1, 7), (0, 4, 7)]
    """
    if select == "ends":
        first = (depth + 1) // 2
        return (*range(first), *range(blocks - depth + first, blocks))
    if select == "interval":
        # evenly from the first block to the last, halves rounded up
        gap = (blocks - 1) / (depth - 1) if depth > 1 else 0.0
        return tuple(int(place * gap + 0.5) for place in range(depth))
    if select == "random":
        import numpy as np  # the command line imports this module, and numpy takes its time

        drawn = np.random.default_rng((seed, depth)).choice(blocks, depth, replace=False)
        return tuple(sorted(int(block) for block in drawn))
    return tuple(range(depth))


def _by_depth(request: Request, depths: set[int]) -> Groups:
    # the deepest first, so that the longest task does not start last
    return [
        (request.trial(chosen_blocks(request.select, depth, request.blocks, seed=request.seed)),)
        for depth in sorted(depths, reverse=True)
    ]


# --- what a task takes -----------------------------------------------------------------------

RANKED = 3  # times the best items' seconds: ranks by two protocols, and the lists
FITTED_EPOCHS = 10  # of a read-out, at most


def ranks_popularity(task: Task, sizes: Sizes) -> Work:
    """The catalogue scored for each test user."""
    return Work(score=RANKED * sizes.test)


def trains(task: Task, sizes: Sizes) -> Work:
    """A training at the depth of its deepest trial, with each trial validated every epoch."""
    depth: int | str = task.trials[-1].depth if method_of(task.method).trains else "sasrec"
    read_outs = len(task.trials)
    read_outs += read_outs > 1  # all depths of one pass, and depth 0
    users = sizes.epochs * sizes.validation + sizes.test
    return Work(
        encode={depth: users},
        score=RANKED * read_outs * users,
        steps={depth: sizes.epochs * sizes.steps},
    )


def reads_every_depth(task: Task, sizes: Sizes) -> Work:
    """One pass over the validation and the test users, ranked at every depth."""
    users = sizes.validation + sizes.test
    return Work({task.blocks: users}, RANKED * (task.blocks + 1) * users)


def reads_again(task: Task, sizes: Sizes) -> Work:
    """Six passes of the teacher over the test users, ranked at every depth; SASRec's are small."""
    users = 6 * sizes.test
    return Work({task.blocks: users}, (task.blocks + 2) * users)


def walks_at_random(task: Task, sizes: Sizes) -> Work:
    """Random sets and selections at each depth of the study, chosen by validation users."""
    depths = [depth for depth in sizes.depths if depth < task.blocks]
    sets = [min(20, math.comb(task.blocks, depth)) + 4 for depth in depths]
    blocks = sum(depth * count for depth, count in zip(depths, sets, strict=True))
    users = blocks / task.blocks * sizes.test + task.blocks * sizes.validation
    return Work({task.blocks: users}, sum(sets) * sizes.test)


def fits_every_depth(passes: int, task: Task, sizes: Sizes) -> Work:
    """States are stored once, then a map is fitted at every depth: catalogue products per step."""
    epoch = passes * sizes.windows + RANKED * sizes.validation
    users = sizes.windows + sizes.validation + sizes.test
    score = (task.blocks + 1) * (FITTED_EPOCHS * epoch + RANKED * sizes.test)
    return Work({task.blocks: users}, score)


def fits_titles(task: Task, sizes: Sizes) -> Work:
    """Six regressions at every depth, more than the spread takes; not the pass over the titles."""
    return Work(score=(task.blocks + 1) * (6 * sizes.validation + RANKED * sizes.test))


def walks(task: Task, sizes: Sizes) -> Work:
    """Shallower models in one walk over the teacher's blocks: shared prefixes run once."""
    prefixes = {trial.kept[:depth] for trial in task.trials for depth in range(1, trial.depth + 1)}
    # a block without a part is a separate branch, with everything after it
    extra = sum(task.blocks - trial.dropped for trial in task.trials if trial.dropped is not None)
    blocks = len(prefixes) + extra
    score = RANKED * len(task.trials) * sizes.test
    return Work({task.blocks: blocks / max(1, task.blocks) * sizes.test}, score)


def walks_found(passes: int, task: Task, sizes: Sizes) -> Work:
    """Shallower models whose blocks are found by passes over validation users."""
    blocks = sum(trial.depth for trial in task.trials)
    users = blocks / max(1, task.blocks) * sizes.test + passes * sizes.validation
    return Work({task.blocks: users}, RANKED * len(task.trials) * sizes.test)


def walks_options(task: Task, sizes: Sizes) -> Work:
    """Four options of each block in one walk and a map of each, then the chosen combinations."""
    mixed = sum(trial.depth for trial in task.trials) / max(1, task.blocks)
    on_validation = 1 + 4 * (task.blocks + 1) / 2 + mixed
    ranked = (4 * task.blocks + len(task.trials)) * sizes.validation
    return Work(
        {task.blocks: on_validation * sizes.validation + (1 + mixed) * sizes.test},
        ranked + RANKED * len(task.trials) * sizes.test,
    )


def evaluates(task: Task, sizes: Sizes) -> Work:
    """One pass over the test users at the depth of its only trial."""
    return Work({task.trials[0].depth: sizes.test}, RANKED * sizes.test)


def validation_passes(passes: int, task: Task, sizes: Sizes, most: int = 10**9) -> Work:
    """Passes over validation users, or over the first of them."""
    return Work({task.blocks: passes * min(most, sizes.validation)})


def scores_titles(users: int, task: Task, sizes: Sizes) -> Work:
    """100 titles scored for some test users, which takes as long as about 50 histories of items."""
    return Work({task.blocks: 50 * min(users, sizes.test)})


# --- defaults of a method that is registered without them ------------------------------------


def usual_trials(request: Request) -> Groups:
    """A trial per depth for a method that trains, one of full depth for a probe."""
    return selected(request) if method_of(request.name).trains else full_depth(request)


def usual_work(task: Task, sizes: Sizes) -> Work:
    """A training, or a walk over the blocks that the trials keep."""
    return (trains if method_of(task.method).trains else walks)(task, sizes)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The record of a method."""

    name: str  #: as studies and the command line write it.
    #: ``baseline`` (no backbone), ``teacher``, ``probe`` (trains no block), ``trained`` (a
    #: shallower model), ``control`` (trained too, but no answer).
    role: Role
    #: what runs a task: ``"module:function"`` below ``depthprobe``, or a callable. It takes the
    #: context and the task, and yields a ``Result`` a trial, or ``Scores``.
    run: str | Callable[..., Any]
    label: str = ""  #: as figures and tables write it; the name by default.
    #: one phrase for help, glossary and docs; by default the first line of what runs it.
    summary: str = ""
    #: the trials of each task, from a :class:`Request`.
    trials: Callable[[Request], Groups] = usual_trials
    work: Callable[[Task, Sizes], Work] = usual_work  #: what a task takes, for the estimate.
    needs: tuple[str, ...] = ()  #: methods whose trial of the same seed must be done before.
    #: methods whose trial of the same seed must be done before, where the study has them.
    after: tuple[str, ...] = ()
    table: bool = False  #: it makes a table of scores instead of trials.
    titles: bool = False  #: it reads the titles of the items.
    #: its trials are told apart by the blocks they remove, not by their depth.
    by_block: bool = False
    #: the backbone reads titles and no user: its depth is the one of the item encoder.
    items_only: bool = False
    candidate: bool = False  #: its depth may be the sufficient one.
    #: its model can be written: its ``own`` weights, the ``teacher``'s, cut, those with the
    #: trial's linear map ``folded`` into a block, or those of another trial, ``quantized``.
    exportable: Literal["own", "teacher", "folded", "quantized"] | None = None
    #: its trials are variants of the trained ones, each of the same depth and seed: ``int8`` of all
    #: methods of the study whose models can be written, ``int8:distill`` of one method's.
    lever: bool = False
    settings: str = ""  #: the table of the study that it reads beside ``recipe``.
    select: str = "prefix"  #: its own selection of blocks, if the name implies one.
    selectable: bool = False  #: it takes a selection after a colon.
    fresh: bool = False  #: its blocks start from random weights.
    default: bool = False  #: it is part of a study that names no methods.
    #: in figures; at least 3:1 on white, told apart by colour-blind readers.
    colour: str = "#5b636d"
    marker: str = "h"  #: matplotlib's.
    line: str = "-."  #: matplotlib's.
    reference: str = ""  #: where it comes from.

    def __post_init__(self) -> None:
        """Fill in missing texts."""
        about = "" if isinstance(self.run, str) else self.run.__doc__ or ""
        summary = self.summary or about.partition("\n")[0].rstrip(".")
        object.__setattr__(self, "label", self.label or self.name)
        object.__setattr__(self, "summary", summary)

    @property
    def trains(self) -> bool:
        """Whether it trains a model with blocks of the backbone."""
        return self.role in ("teacher", "trained", "control")

    @property
    def reads_users(self) -> bool:
        """Whether the backbone reads the users' histories."""
        return self.role != "baseline" and not self.items_only

    @property
    def takes_variants(self) -> bool:
        """Whether a name may follow it after a colon."""
        return self.role in ("trained", "control")

    def runner(self) -> Callable[..., Any]:
        """What runs a task, imported now."""
        if callable(self.run):
            return self.run
        module, _, name = self.run.partition(":")
        place = module if module.startswith("depthprobe.") else f"depthprobe.{module}"
        runner: Callable[..., Any] = getattr(importlib.import_module(place), name)
        return runner


# --- the table -------------------------------------------------------------------------------

INK = "#1b1f24"
# colours and markers for a method's variants
VARIANT_COLOURS = ("#0069a8", "#c2500a", "#00805e", "#9b4f96", "#857200", "#b3365b", "#4a55b8")
VARIANT_MARKERS = ("s", "o", "^", "D", "v", "P", "X", "p")
METHODS: dict[str, Method] = {}  # by name, in the order of reports
BUILT_IN: set[str] = set()  # reserved names


def register(method: Method) -> Method:
    """Register a method under its name; returns it.

    It replaces an earlier one of that name, so that a notebook's cell can run again.

    Raises:
        BadInput: for the name of one of our own methods, or a need that is not known.
    """
    if method.name in BUILT_IN:
        raise BadInput("method", method.name, "a name that is not taken")
    for need in (*method.needs, *method.after):
        method_of(need)
    METHODS[method.name] = method
    return method


def base_of(name: str) -> str:
    """The method before the colon.

    >>> base_of("distill:cos"), base_of("skip")
    ('distill', 'skip')
    """
    return name.partition(":")[0]


def method_of(name: str) -> Method:
    """The record of a method; for a variant, that of its method.

    Raises:
        BadInput: for a name that is no method.
    """
    base = base_of(name)
    if base not in METHODS:
        raise BadInput("methods", name, nearest(base, METHODS))
    return METHODS[base]


def method_info(name: str) -> Method:
    """The record of a method; a variant gets its own label and look.

    A run may hold trials of a plug-in that this machine lacks: they are shown, but can't be the
    answer.
    """
    base, _, variant = name.partition(":")
    method = METHODS.get(base) or Method(name=base, role="probe", run="")
    if not variant:
        return method
    if method.lever:
        return replace(method, label=f"{method_info(variant).label}, {base}")
    # by name, so that it is the same in every figure; methods with one variant differ in it
    place = zlib.crc32(variant.encode()) + [*METHODS, base].index(base)
    colour = VARIANT_COLOURS[place % len(VARIANT_COLOURS)]
    marker = VARIANT_MARKERS[place % len(VARIANT_MARKERS)]
    label = f"{method.label}: {variant}"
    return replace(method, label=label, colour=colour, marker=marker, line="-.")


def names(*roles: Role) -> tuple[str, ...]:
    """The methods of some roles, in the order of reports."""
    return tuple(name for name, method in METHODS.items() if method.role in roles)


def method_order(name: str) -> tuple[int, str]:
    """Sort key: the order of the table, variants by name; unknown methods come last."""
    base = base_of(name)
    return (list(METHODS).index(base) if base in METHODS else len(METHODS), name)


TEACHER, SASREC = ("full",), ("sasrec",)
EXITS, SHALLOWER = partial(prefixes, 0, -1), partial(prefixes, 1, -1)

# fmt: off
for _method in (
    Method(
        name="popularity", label="popularity", role="baseline", default=True,
        summary="items ranked by their count in the training data",
        run="runs.training:popularity", trials=no_backbone, work=ranks_popularity, colour="#858d96",
        marker="v", line=":",
    ),
    Method(
        name="sasrec", label="SASRec", role="baseline", settings="sasrec", default=True,
        summary="the non-LLM baseline, and where the item embeddings come from",
        run="runs.training:sasrec", trials=no_backbone, work=trains, colour="#4d5761", marker="P",
        line="--", reference="arXiv 1808.09781",
    ),
    Method(
        name="full", label="teacher", role="teacher", needs=SASREC, default=True,
        summary="the teacher: the recommender with all its blocks, trained",
        run="runs.training:fine_tune", trials=full_depth, work=trains, exportable="own", colour=INK,
        marker="D", line="-",
    ),
    Method(
        name="early-exit", label="early exit", role="probe", needs=TEACHER, default=True,
        summary="the teacher read out after each block, through the final norm",
        run="runs.probing:early_exits", trials=EXITS, work=reads_every_depth, exportable="teacher",
        colour="#9b4f96", marker=".", line="-",
    ),
    Method(
        name="early-exit-raw", label="exit, no norm", role="probe", needs=TEACHER,
        summary="the teacher read out after each block, without the final norm, as SLMRec does",
        run="runs.probing:raw_exits", trials=EXITS, work=reads_every_depth, colour="#b06aab",
        marker="x", line=":", reference="arXiv 2405.17890",
    ),
    Method(
        name="readout", label="read-out", role="probe", needs=TEACHER, default=True,
        summary="a fresh output adapter fitted at each depth of the frozen teacher",
        run="runs.probing:read_outs", trials=partial(prefixes, 0, 0),
        work=partial(fits_every_depth, 2), colour="#a35c00", marker="p", line="--",
    ),
    Method(
        name="tuned-lens", label="tuned lens", role="probe", needs=TEACHER,
        summary="a translator fitted at each depth to the teacher's answers, before its own head",
        run="runs.probing:tuned_lenses", trials=EXITS, work=partial(fits_every_depth, 4),
        colour="#6b5aa8", marker="*", line="--", reference="arXiv 2303.08112",
    ),
    Method(
        name="skip", label="skip", role="probe", needs=TEACHER, by_block=True, default=True,
        summary="the teacher without one block",
        run="runs.probing:walk_blocks", trials=partial(each_run, 1, 1), work=walks,
        exportable="teacher", colour="#35618e", marker="o", line="-",
    ),
    Method(
        name="span", label="span left out", role="probe", needs=TEACHER, by_block=True,
        summary="the teacher without a run of neighbouring blocks",
        run="runs.probing:walk_spans", trials=spans, work=partial(walks_found, 1),
        exportable="teacher", colour="#4f79a6", marker="_", line="-", reference="arXiv 2403.17887",
    ),
    Method(
        name="interval", label="every n-th left out", role="probe", needs=TEACHER, by_block=True,
        summary="the teacher without every n-th block",
        run="runs.probing:walk_blocks", trials=every_nth, work=walks, exportable="teacher",
        colour="#6a6f9e", marker="|", line="-",
    ),
    Method(
        name="greedy", label="greedy", role="probe", needs=TEACHER, candidate=True, select="greedy",
        summary="the teacher with its least important blocks removed one by one",
        run="runs.probing:walk_greedy", trials=SHALLOWER, work=partial(walks_found, 0),
        exportable="teacher", colour="#4a55b8", marker="d", line="-", reference="arXiv 2402.09025",
    ),
    Method(
        name="drop-attention", label="attention left out", role="probe", needs=TEACHER,
        by_block=True,
        summary="the teacher without the attention of one block",
        run="runs.probing:walk_blocks", trials=partial(each_part, "attention"), work=walks,
        colour="#b3365b", marker="1", line="-", reference="arXiv 2406.15786",
    ),
    Method(
        name="drop-mlp", label="MLP left out", role="probe", needs=TEACHER, by_block=True,
        summary="the teacher without the MLP of one block",
        run="runs.probing:walk_blocks", trials=partial(each_part, "mlp"), work=walks,
        colour="#5c7a1f", marker="2", line="-", reference="arXiv 2406.15786",
    ),
    Method(
        name="replace", label="linear map", role="probe", needs=TEACHER, candidate=True,
        summary="the teacher with a fitted linear map in place of a run of blocks",
        run="runs.probing:replacements", trials=SHALLOWER, work=partial(walks_found, 5),
        exportable="folded", colour="#00786f", marker="<", line="-.", reference="arXiv 2505.02819",
    ),
    Method(
        name="replace-cosine", label="linear map, cosine", role="probe", needs=TEACHER,
        candidate=True,
        summary="the same, with the map fitted to the direction of the state",
        run="runs.probing:cosine_replacements", trials=SHALLOWER, work=partial(walks_found, 10),
        exportable="folded", colour="#2f7f4f", marker="4", line="-.",
        reference="arXiv 2505.02819",
    ),
    Method(
        name="mix", label="mixed by budget", role="probe", needs=TEACHER,
        summary="the teacher with the parts and maps of blocks that lose least under a budget",
        run="runs.mix:mixes", trials=by_budget, work=walks_options, colour="#a1467e", marker="3",
        line="-",
    ),
    Method(
        name="similarity", label="similarity", role="probe", needs=TEACHER, table=True,
        summary="how much each block, its parts and each run of blocks turn the state",
        run="runs.probing:compare_states", trials=no_trials, work=partial(validation_passes, 1),
        reference="arXiv 2403.03853",
    ),
    Method(
        name="taylor", label="Taylor", role="probe", needs=TEACHER, table=True,
        summary="how much the weights of each block matter to the loss",
        run="runs.probing:weigh_blocks", trials=no_trials,
        work=partial(validation_passes, 3, most=512), reference="arXiv 2402.02834",
    ),
    Method(
        name="settling", label="settling", role="probe", needs=TEACHER, table=True,
        summary="the depth from which each user's answer stays the same",
        run="runs.probing:settle_users", trials=no_trials, work=reads_every_depth,
    ),
    Method(
        name="shuffled", label="histories shuffled", role="probe", needs=TEACHER, after=SASREC,
        table=True, default=True,
        summary="what trained models lose when they read each history in a random order",
        run="runs.probing:shuffle_histories", trials=no_trials, work=reads_again, colour="#8a5a78",
        reference="arXiv 2408.12008",
    ),
    Method(
        name="random-blocks", label="random blocks left out", role="probe", needs=TEACHER,
        table=True,
        summary="whether blocks chosen by a score beat as many random ones",
        run="runs.probing:draw_blocks", trials=first_seed, work=walks_at_random, colour="#7d7d52",
    ),
    Method(
        name="prompt-only", label="prompt only", role="probe", after=("sasrec", "full"),
        table=True, titles=True,
        summary="the untouched backbone ranks 100 candidates by how likely their titles are",
        run="runs.probing:ask_untouched", trials=once, work=partial(scores_titles, 200),
        reference="arXiv 2104.08315",
    ),
    Method(
        name="item-text", label="SASRec on titles", role="probe", titles=True, items_only=True,
        settings="sasrec",
        summary="SASRec on the items' titles, read by the untouched backbone up to each depth",
        run="runs.titles:sasrec_on_titles", trials=selected_and_ends, work=trains,
        colour="#1f7a8c", marker="8", line="-", reference="arXiv 2206.05941",
    ),
    Method(
        name="item-text-linear", label="linear on titles", role="probe", titles=True,
        items_only=True,
        summary="a linear read-out of the titles of a history, read up to each depth",
        run="runs.titles:linear_readouts", trials=every_depth_once, work=fits_titles,
        colour="#8c4a5f", marker=">", line="--",
    ),
    Method(
        name="item-text-spread", label="titles, spread", role="probe", titles=True, items_only=True,
        table=True,
        summary="anisotropy and effective rank of the items' titles, read up to each depth",
        run="runs.titles:spread_by_depth", trials=once, work=fits_titles,
    ),
    Method(
        name="finetune", label="fine-tuned", role="trained", needs=SASREC, candidate=True,
        selectable=True, default=True,
        summary="a variant: cut out of the pretrained backbone, then trained",
        run="runs.training:fine_tune", trials=selected, work=trains, exportable="own",
        colour="#0069a8", marker="s", line="-",
    ),
    Method(
        name="heal", label="healed", role="trained", needs=TEACHER, candidate=True, settings="heal",
        selectable=True,
        summary="cut out of the trained teacher, then trained further",
        run="runs.training:fine_tune", trials=selected, work=trains, exportable="own",
        colour="#00805e", marker="^", line="-",
    ),
    Method(
        name="distill", label="distilled", role="trained", needs=TEACHER, candidate=True,
        settings="distillation", selectable=True, default=True,
        summary="a student: a variant trained to follow the teacher's states or scores",
        run="runs.training:distill", trials=selected, work=trains, exportable="own",
        colour="#c2500a", marker="o", line="-", reference="arXiv 2405.17890",
    ),
    Method(
        name="elastic", label="elastic", role="trained", needs=SASREC, candidate=True,
        settings="elastic",
        summary="one model trained to be good at every depth, then cut",
        run="runs.training:elastic", trials=partial(prefixes, 1, 0), work=trains, exportable="own",
        colour="#7a4a00", marker="h", line="-", reference="arXiv 2404.16710",
    ),
    Method(
        name="random-init", label="random init", role="control", needs=SASREC, fresh=True,
        default=True,
        summary="the same architecture without pretraining, trained",
        run="runs.training:fine_tune", trials=selected_and_full, work=trains, exportable="own",
        colour="#857200", marker="X", line="--",
    ),
    Method(
        name="random-selection", label="random blocks", role="control", needs=SASREC,
        select="random",
        summary="blocks drawn at random, then trained",
        run="runs.training:fine_tune", trials=selected, work=trains, exportable="own",
        colour="#6f6a3a", marker="H", line="--",
    ),
    Method(
        name="int8", label="int8", role="probe", lever=True,
        summary="each trained model with the weights of its blocks in 8 bits",
        run="runs.quantize:quantized", trials=no_trials, work=evaluates, exportable="quantized",
        colour="#2f6f3a", marker="$8$", line=":",
    ),
    Method(
        name="int8-dynamic", label="int8, dynamic", role="probe", lever=True,
        summary="the same, with the inputs of the linear maps in 8 bits as well",
        run="runs.quantize:quantized", trials=no_trials, work=evaluates, exportable="quantized",
        colour="#7a3f8a", marker="$d$", line=":", reference="arXiv 2206.01861",
    ),
    Method(
        name="int4", label="int4", role="probe", lever=True,
        summary="each trained model with the weights of its blocks in 4 bits",
        run="runs.quantize:quantized", trials=no_trials, work=evaluates, exportable="quantized",
        colour="#9a3b2c", marker="$4$", line=":",
    ),
    Method(
        name="int8-items", label="int8 items", role="probe", lever=True,
        summary="each trained model with its item table in 8 bits, its blocks as they are",
        run="runs.quantize:quantized", trials=no_trials, work=evaluates, exportable="quantized",
        colour="#4d6b8f", marker="$i$", line=":",
    ),
):
    register(_method)
# fmt: on
BUILT_IN.update(METHODS)


def _load_others() -> None:
    """Import other packages' methods; a package that fails is named and skipped."""
    for entry in entry_points(group="depthprobe.methods"):
        try:
            loaded = entry.load()
            if isinstance(loaded, Method):
                register(loaded)
        except Exception as error:  # noqa: BLE001 - somebody else's code, whatever it raises
            warnings.warn(
                f"methods of {entry.value}: {type(error).__name__}: {error}", stacklevel=2
            )


_load_others()
