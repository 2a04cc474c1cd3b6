"""Study files: parsing, defaults, overrides, the hash, and every refusal in one line."""

from __future__ import annotations

import math
import os
import pickle
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from depthprobe.cost.table import Workload
from depthprobe.errors import BadInput, closest, nearest
from depthprobe.methods import METHODS
from depthprobe.study import (
    Backbone,
    Checked,
    Data,
    Recipe,
    Slurm,
    Study,
    Tracking,
    Variant,
    demo_study,
    differences,
    load_study,
    override,
    parse_layers,
    study_from_dict,
    study_to_dict,
    study_to_toml,
)


def write(folder: Path, text: str) -> Path:
    path = folder / "question.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_keeps_the_defaults_that_it_does_not_name(tmp_path: Path) -> None:
    study = load_study(write(tmp_path, 'layers = "1-3"\n[recipe]\nepochs = 2\nlearning_rate = 1\n'))
    assert study == Study(
        name="question", layers="1-3", recipe=replace(Recipe(), epochs=2, learning_rate=1.0)
    )
    assert isinstance(study.recipe.learning_rate, float)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sedes = 2", ["sedes", "did you mean seeds?"]),
        ("[recipe]\nepoch = 2", ["recipe.epoch", "did you mean epochs?"]),
        ("[sasrec.recipe]\nepochs = 0", ["sasrec.recipe.epochs", "0", "at least 1"]),
        ('seeds = "two"', ["seeds", "'two'", "a whole number"]),
        ("seeds = true", ["seeds", "True", "a whole number"]),
        ("seeds = 1.5", ["seeds", "1.5", "a whole number"]),
        ("seeds = 0", ["seeds", "0"]),
        ("data = 3", ["data", "3", "table"]),
        ('methods = "full"', ["methods", "'full'", "list of strings"]),
        ('methods = ["fintune"]', ["methods", "'fintune'", "did you mean finetune?"]),
        ('methods = ["full", "full"]', ["methods", "full,full", "once"]),
        ("methods = []", ["methods", "at least one"]),
        ('device = "gpu"', ["device", "'gpu'", "cuda"]),
        ('layers = "0"', ["layers", "'0'", "from 1"]),
        ("layers = 4", ["layers", "4", "text"]),
        ('[backbone]\ntuning = "qlora"', ["backbone.tuning", "'qlora'", "full, lora, frozen"]),
        ('[backbone]\ndtype = "int8"', ["backbone.dtype", "'int8'", "auto, float32, bfloat16"]),
        ('[backbone]\nattention = "a/b"', ["backbone.attention", "'a/b'", "eager, sdpa"]),
        ('[backbone]\nquantize = "2bit"', ["backbone.quantize", "'2bit'", "none, 8bit, 4bit"]),
        ("[backbone]\nlora_targets = []", ["backbone.lora_targets", "()", "attention"]),
        ('[backbone]\nlora_targets = "all"', ["backbone.lora_targets", "'all'", "a list"]),
        ('[backbone]\nquantize = "4bit"', ["backbone.quantize", "lora or frozen", "trained"]),
        (
            'device = "cpu"\n[backbone]\nquantize = "8bit"\ntuning = "lora"',
            ["backbone.quantize", "'8bit'", "device = cuda beside it, not cpu"],
        ),
        (
            'methods = ["random-init"]\n[backbone]\nquantize = "8bit"\ntuning = "frozen"',
            ["backbone.quantize", "'8bit'", "without random-init"],
        ),
        ("[recipe]\nlearning_rate = nan", ["recipe.learning_rate", "nan"]),
        ("[recipe]\nweight_decay = nan", ["recipe.weight_decay", "nan"]),
        ("[recipe]\nwarmup = 1.0", ["recipe.warmup", "1.0"]),
        ('[recipe]\nobjective = "first"', ["recipe.objective", "'first'", "every, last"]),
        (
            '[recipe]\nloss = "bpr"',
            ["recipe.loss", "'bpr'", "shared-softmax, gbce"],
        ),
        ('[recipe]\nprecision = "float16"', ["recipe.precision", "float32, bfloat16"]),
        ("[recipe]\nnegatives = 0", ["recipe.negatives", "0", "at least 1"]),
        ("[recipe]\ngbce_t = 1.5", ["recipe.gbce_t", "1.5", "at most 1"]),
        ("[recipe]\ntokens = -1", ["recipe.tokens", "-1", "at least 0"]),
        ('[backbone]\nhead = "tree"', ["backbone.head", "'tree'", "dot, linear"]),
        ('[backbone]\nsuffix = "=>"', ["backbone.suffix", "recipe.objective = last"]),
        ('item_table = "random"', ["item_table", "'random'", "learned"]),
        ('item_table = "text:0"', ["item_table", "'text:0'", "text:K"]),
        ("item_width = 0", ["item_width", "0", "at least 1"]),
        ("[backbone]\ntrust_remote_code = true", ["backbone.revision", "pinned"]),
        ('[protocol]\nmetric = "NDCG@0"', ["protocol.metric", "'NDCG@0'", "HR@K or NDCG@K"]),
        ("[protocol]\nlevel = 1.0", ["protocol.level", "1.0", "below 1"]),
        ("[sasrec]\nheads = 3", ["sasrec.width", "64", "3"]),
        ("layers = ", ["study", "TOML"]),
    ],
)
def test_a_bad_value_is_one_line_with_field_value_and_allowed(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    with pytest.raises(BadInput) as caught:
        load_study(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_file_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a TOML file that exists"):
        load_study(tmp_path / "missing.toml")
    with pytest.raises(BadInput, match="a readable TOML file"):
        load_study(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="a readable TOML file"):
        load_study(tmp_path / "binary.toml")


def test_the_demo_is_a_study_of_embedded_inputs() -> None:
    study = demo_study()
    assert (study.name, study.data.source, study.backbone.source) == (
        "demo",
        "embedded",
        "embedded",
    )
    assert set(study.methods) <= set(METHODS)


names = st.text(min_size=1, max_size=20)
studies = st.builds(
    Study,
    name=names,
    layers=st.sampled_from(["all", "auto", "1-12", "1,2,4"]),
    methods=st.lists(st.sampled_from(tuple(METHODS)), min_size=1, unique=True).map(tuple),
    seeds=st.integers(1, 9),
    device=st.sampled_from(["auto", "cpu", "cuda", "mps"]),
    data=st.builds(Data, source=names, max_history=st.integers(1, 500)),
    recipe=st.builds(
        Recipe,
        epochs=st.integers(1, 99),
        learning_rate=st.floats(1e-9, 9, allow_nan=False),
        weight_decay=st.floats(0, 1e9, allow_nan=False),
    ),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("studies")


@given(study=studies)
def test_a_study_survives_toml_and_dict(study: Study, folder: Path) -> None:
    assert study_from_dict(study_to_dict(study)) == study
    path = folder / "study.toml"
    path.write_text(study_to_toml(study), encoding="utf-8")
    assert load_study(path) == study
    assert load_study(path).digest() == study.digest()


def test_the_hash_changes_with_what_decides_the_numbers_alone() -> None:
    study = Study()
    assert study.digest() == Study().digest()
    same = replace(study, name="other", device="cpu", methods=("full",), seeds=3)
    assert study.digest() == same.digest()
    changed = [
        override(study, layers="1,2"),
        override(study, item_width=3),
        override(study, **{"data.source": "log.txt"}),
        override(study, **{"recipe.epochs": 3}),
        override(study, **{"backbone.prompt": "Next:"}),
        override(study, **{"backbone.attention": "eager"}),
        override(study, **{"backbone.dtype": "auto"}),
        override(study, **{"protocol.filter_seen": False}),
    ]
    assert len({study.digest(), *(other.digest() for other in changed)}) == len(changed) + 1


def test_the_controls_are_part_of_every_study_but_where_they_cannot_be() -> None:
    controls = {"readout", "random-init", "shuffled"}
    assert controls <= set(Study().methods)
    # what the demo's backbone begins with is random anyway
    assert set(Study().methods) - set(demo_study().methods) == {"random-init"}
    quantised = Study(backbone=Backbone(quantize="8bit", tuning="lora"))
    assert set(Study().methods) - set(quantised.methods) == {"random-init"}


def test_how_a_backbone_is_loaded(tmp_path: Path) -> None:
    text = '[backbone]\ndtype = "auto"\nattention = "sdpa"\nquantize = "4bit"\ntuning = "lora"\n'
    found = load_study(write(tmp_path, text)).backbone
    assert found == Backbone(dtype="auto", attention="sdpa", quantize="4bit", tuning="lora")
    assert (Backbone().dtype, Backbone().attention, Backbone().quantize) == (
        "float32",
        "auto",
        "none",
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16"},
        {"attention": "kernels-community/flash-attn2"},
        {"attention": None},
        {"quantize": "int4"},
        {"quantize": "4bit"},
        {"tuning": "qlora"},
    ],
)
def test_a_backbone_is_checked_where_it_is_made(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"^{list(settings)[0]}: ") as caught:
        Backbone(**settings)
    assert "\n" not in str(caught.value)


def test_override_skips_none_and_reaches_into_sections() -> None:
    study = Study(seeds=3)
    assert override(study, seeds=None, **{"data.source": None}) == study
    changed = override(study, layers="1", **{"data.source": "log.txt", "recipe.epochs": 2})
    assert (changed.layers, changed.data.source, changed.recipe.epochs) == ("1", "log.txt", 2)
    assert (changed.seeds, changed.data.max_history) == (3, study.data.max_history)
    for key in ("recipe.epochs", "sasrec.recipe.epochs"):
        with pytest.raises(BadInput, match=rf"^{key}: expected .*got 0"):
            override(study, **{key: 0})


def test_a_study_of_an_earlier_version_is_read() -> None:
    assert study_from_dict({"recipe": {"epochs": 3, "accumulation": 1}}).recipe.epochs == 3
    with pytest.raises(BadInput, match=r"recipe\.accumulation"):
        study_from_dict({"recipe": {"accumulation": 2}})


def test_a_key_of_sasrecs_recipe_leaves_its_other_defaults_as_they_are() -> None:
    study = study_from_dict({"sasrec": {"recipe": {"epochs": 3}}})
    assert study.sasrec.recipe == replace(Study().sasrec.recipe, epochs=3)


def test_differences_name_each_changed_field() -> None:
    old = Study()
    new = override(old, name="x", device="cpu", seeds=5, item_width=3, **{"recipe.epochs": 2})
    assert differences(old, new) == ["item_width: 64 -> 3", "recipe.epochs: 6 -> 2"]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    ("text", "blocks", "depths"),
    [
        ("1,2,4", 12, (1, 2, 4)),
        ("4, 2,2 ,1", 12, (1, 2, 4)),
        ("1-12", 12, tuple(range(1, 13))),
        ("2-3,8", 12, (2, 3, 8)),
        (" ALL ", 3, (1, 2, 3)),
        ("auto", 12, (1, 2, 4, 8)),
        ("auto", 8, (1, 2, 4)),
        ("auto", 1, ()),
        ("12", 12, (12,)),
    ],
)
def test_layers_name_depths(text: str, blocks: int, depths: tuple[int, ...]) -> None:
    assert parse_layers(text, blocks) == depths
    assert parse_layers(text, None) == ()


@pytest.mark.parametrize(
    "text",
    [
        *("", ",", "0", "13", "0-3", "3-1", "1-13", "-1", "1-", "two", "1;2", "1.5", "1,,2"),
        *("١", "²", "find1,2", "finder"),
    ],
)
def test_layers_that_name_no_depth(text: str) -> None:
    with pytest.raises(BadInput, match="depths from 1 to 12, as 1,2,4 or 1-12 or all"):
        parse_layers(text, 12)


@given(
    parts=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10)), min_size=1, max_size=6),
    blocks=st.integers(1, 48),
)
def test_layers_against_the_union_of_their_parts(parts: list[tuple[int, int]], blocks: int) -> None:
    text = ",".join(f"{low}-{low + more}" if more else f"{low}" for low, more in parts)
    expected = sorted({depth for low, more in parts for depth in range(low, low + more + 1)})
    if expected[-1] > blocks:
        with pytest.raises(BadInput):
            parse_layers(text, blocks)
    else:
        assert list(parse_layers(text, blocks)) == expected


@given(text=st.text(alphabet="0123456789,- alutox", max_size=12), blocks=st.integers(1, 40))
def test_layers_are_sorted_depths_in_range_or_refused(text: str, blocks: int) -> None:
    try:
        depths = parse_layers(text, blocks)
    except BadInput as error:
        refusal = str(error)
        depths = ()
    else:
        refusal = "layers: "
    assert refusal.startswith("layers: ")
    assert list(depths) == sorted(set(depths))
    assert all(1 <= depth <= blocks for depth in depths)


def test_bad_input_says_what_was_expected_and_what_came() -> None:
    assert str(BadInput("layers", "x", "depths")) == "layers: expected depths, got 'x'"
    assert str(BadInput("data", Path("x"), "it is empty", fault=True)) == "data: 'x': it is empty"
    assert str(BadInput("--backbone", None, "a folder")) == "--backbone: required. Give a folder"


@pytest.mark.parametrize("fault", [True, False])
def test_bad_input_survives_pickling(fault: bool) -> None:
    error = BadInput("layers", Path("x"), "depths", fault=fault)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (str(again), again.field, again.value) == (str(error), "layers", Path("x"))
    assert str(again.renamed("a")) == str(error).replace("layers", "a")


def test_a_name_that_goes_on_is_the_likeliest() -> None:
    known = ["finetune-d02-s0", "finetune-d01-s1", "finetune-d01-s0", "finetune-d01x"]
    assert closest("finetune-d01-", known) == ["finetune-d01-s1", "finetune-d01-s0", known[3]]
    assert (
        nearest("fintune", ["full", "finetune"]) == "one of full, finetune (did you mean finetune?)"
    )
    assert nearest("zzz", ["full"]) == "one of full"


RUNNING = """
[slurm]
partition = "gpu"
minutes = 90
setup = ["module load cuda"]

[tracking]
to = ["tensorboard", "wandb"]
"""


def test_tables_of_a_study_file(tmp_path: Path) -> None:
    path = tmp_path / "study.toml"
    path.write_text(RUNNING, encoding="utf-8")
    study = load_study(path)
    assert study.slurm == Slurm(partition="gpu", minutes=90, setup=("module load cuda",))
    assert study.tracking == Tracking(to=("tensorboard", "wandb"))
    path.write_text(study_to_toml(study), encoding="utf-8")
    assert load_study(path) == study


def test_a_run_may_go_on_elsewhere_and_be_tracked_otherwise() -> None:
    study = Study()
    other = override(study, **{"slurm.gpus": 0, "tracking.to": ("wandb",)})
    asked = {"protocol.margin": 0.02, "protocol.level": 0.9, "protocol.metric": "HR@20"}
    other = override(other, **asked, **{"protocol.resamples": 500})
    assert other != study
    assert other.digest() == study.digest()
    assert differences(study, other) == []
    assert differences(study, override(other, **{"recipe.epochs": 9})) == ["recipe.epochs: 6 -> 9"]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Slurm(minutes=0), "minutes"),
        (lambda: Slurm(gpus=-1), "gpus"),
        (lambda: Slurm(memory_gb=0), "memory_gb"),
        (lambda: Tracking(to=("wandb", "wandb")), "to"),
    ],
)
def test_settings_of_jobs_and_trackers_are_checked(make: Any, named: str) -> None:
    with pytest.raises(BadInput, match=f"^{named}"):
        make()


# --- numbers, by reflection over every setting ----------------------------------------------------


def kinds(kind: type[Any] = Study) -> Iterator[type[Any]]:
    """A dataclass of settings, and those inside it."""
    yield kind
    for hint in typing.get_type_hints(kind).values():
        for each in (hint, *typing.get_args(hint)):
            if is_dataclass(each):
                yield from kinds(typing.cast("type[Any]", each))


def numbers() -> list[tuple[type[Any], str]]:
    """Every setting that is a number, or a list of them."""
    found = {}
    for kind in (*kinds(), Workload):
        hints = typing.get_type_hints(kind)
        for field in fields(kind):
            words = str(hints[field.name])
            if "int" in words.replace("Mapping", "") or "float" in words:
                found[kind.__name__, field.name] = (kind, field.name)
    return list(found.values())


BEYOND = [10**10, 10**32, 10**400, -(10**10), -(10**400), math.inf, -math.inf, math.nan]


@pytest.mark.parametrize(
    ("kind", "name"), numbers(), ids=lambda each: getattr(each, "__name__", each)
)
def test_every_number_has_bounds(kind: type[Any], name: str) -> None:
    values: list[Any] = [*BEYOND, "1", "１", True, [10**400], [math.nan], [math.inf]]
    wide = {"min_rating", "ties_seed", "clip"}  # a value, a seed, and in effect no clipping
    for value in values[1:] if name in wide else values:
        if value is True and "bool" in str(typing.get_type_hints(kind)[name]):
            continue
        with pytest.raises(BadInput, match=f"^{name}: expected ") as caught:
            kind(**{name: value})
        assert len(str(caught.value)) < 400


def test_the_settings_are_found() -> None:
    assert {"seeds", "lora_rank", "learning_rate", "top", "memory_gb", "resamples", "items"} <= {
        name for _, name in numbers()
    }
    assert len(numbers()) > 40
    assert all(issubclass(kind, Checked) for kind, _ in numbers())


# --- files and names ------------------------------------------------------------------------------

HOSTILE = {
    "nested arrays": "a = " + "[" * 3000 + "]" * 3000,
    "nested tables": "a = " + "{a=" * 3000 + "1" + "}" * 3000,
    "a number of thousands of digits": "seeds = " + "9" * 5000,
    "a key of many parts": ".".join("a" * 100_000) + " = 1",
    "a key of many quoted parts": ".".join(["'a b'"] * 50_000) + " = 1",
    "a table of many parts": "[" + ".".join("a" * 100_000) + "]",
    "an inline key of many parts": "x = { " + " . ".join("a" * 100_000) + " = 1 }",
    "a long word": "a" * 2_000_000,
    "a key twice": "seeds = 1\nseeds = 2",
    "a table twice": "[recipe]\n[recipe]",
    "an unknown key": "'\x1b[31m' = 1".replace("\x1b", "\\u001b"),
    "half a character": 'name = "\\ud800"',
    "a table that inherits from a number": "recipe = 5\n[variants.x.recipe]\nepochs = 1",
    "a table that inherits from text": 'elastic = "x"\n[variants.x.elastic]\nexits = 1',
    "a variant that is a number": "variants.x = 3",
    "variants that are a list": "variants = [1]",
    "a long name of a variant": f"[variants.{'x' * 300}]",
    "many variants": "".join(f"[variants.v{n}]\n" for n in range(2000)),
    "depths without end": f"layers = '{','.join(['1-999999'] * 1000)}'",
    "blocks without end": f"[variants.x]\nselect = '0-999999{',1000000' * 1000}'",
    "a long text": f"[backbone]\nprompt = '{'a' * 10**6}'",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line(tmp_path: Path, case: str) -> None:
    with pytest.raises(BadInput) as caught:
        load_study(write(tmp_path, HOSTILE[case]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3000


def test_files_of_other_editors_and_shells(tmp_path: Path) -> None:
    file = tmp_path / "question.toml"
    for content in (b"\xef\xbb\xbfseeds = 3\n", b"seeds = 3\r\n[recipe]\r\nepochs = 6\r\n"):
        file.write_bytes(content)
        assert load_study(file) == Study(name="question", seeds=3)
    for content in (b"name = 'caf\xe9'", "seeds = 3".encode("utf-16")):
        file.write_bytes(content)
        with pytest.raises(BadInput, match="a readable TOML file"):
            load_study(file)


def test_what_is_no_plain_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    for path in (tmp_path / "pipe.toml", Path("/dev/zero"), tmp_path):
        with pytest.raises(BadInput, match="it is no plain file"):
            load_study(path)
    reader, writer = os.pipe()  # as of sweep <(...)
    os.write(writer, b"seeds = 3")
    os.close(writer)
    assert load_study(f"/dev/fd/{reader}").seeds == 3
    os.close(reader)
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(BadInput, match="more than 10,000,000 bytes"):
        load_study(tmp_path / "large.toml")


def test_a_prompt_may_hold_what_looks_like_keys(tmp_path: Path) -> None:
    prompt = "a. b. c. " * 16 + "." * 100 + " 1.2.3.4"
    assert load_study(write(tmp_path, f'[backbone]\nprompt = "{prompt}"')).backbone.prompt == prompt


def test_auto_precision_is_resolved_for_recommenders_alone() -> None:
    variants = {
        "plain": Variant(),
        "auto": Variant(recipe=Recipe(epochs=2)),
        "fixed": Variant(recipe=Recipe(precision="float32")),
    }
    study = Study(variants=variants).with_precision("bfloat16")
    assert study.recipe.precision == "bfloat16"
    assert study.sasrec.recipe.precision == "auto"
    assert study.variants["auto"].recipe == Recipe(epochs=2, precision="bfloat16")
    assert study.variants["fixed"].recipe == Recipe(precision="float32")
    assert study.variants["plain"].recipe is None
