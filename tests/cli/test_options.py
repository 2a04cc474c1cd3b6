"""A study from flags: file, demo or data, then what the flags change."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from depthprobe.cli import data
from depthprobe.cli.app import app
from depthprobe.cli.options import FLAGS, default_output, make_study, number, path, share, whole
from depthprobe.cli.sweep import PHASES, restrict
from depthprobe.errors import BadInput
from depthprobe.methods import METHODS, names
from depthprobe.study import Recipe, Study, Variant, demo_study


def test_no_flags_are_the_demo() -> None:
    study = make_study()
    assert study == demo_study()
    assert default_output(study) == Path("runs/demo")


def test_flags_override_a_study_file(tmp_path: Path) -> None:
    path = tmp_path / "depth.toml"
    path.write_text('layers = "1-3"\nseeds = 4\n[recipe]\nepochs = 7\n', encoding="utf-8")
    log = tmp_path / "log.txt"
    log.write_text("u a b\n", encoding="utf-8")
    study = make_study(
        path,
        data=str(log),
        layers="2",
        methods="full, skip",
        epochs=2,
        device="cpu",
        tuning="lora",
        item_embeddings="text",
    )
    assert study.name == "depth"
    assert (study.layers, study.methods, study.seeds) == ("2", ("full", "skip"), 4)
    assert study.recipe == replace(Recipe(), epochs=2)
    assert (study.device, study.data.source) == ("cpu", str(log))
    assert (study.backbone.tuning, study.backbone.source) == ("lora", "embedded")
    assert study.item_table == "text"


def test_a_revision_is_that_of_a_hub_id(tmp_path: Path) -> None:
    study = make_study(backbone="org/model", revision="v1")
    assert (study.backbone.source, study.backbone.revision) == ("org/model", "v1")
    path = tmp_path / "depth.toml"
    path.write_text('[backbone]\nsource = "org/model"\nrevision = "v1"\n', encoding="utf-8")
    assert make_study(path).backbone.revision == "v1"
    assert make_study(path, revision="v2").backbone.revision == "v2"
    for other in ({"backbone": str(tmp_path)}, {"backbone": "embedded"}, {}):
        (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        with pytest.raises(BadInput, match="revision: expected .*'v1'"):
            make_study(revision="v1", **other)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("amazon-beauty/sequences.txt", "amazon-beauty"),
        ("amazon-beauty", "amazon-beauty"),
        ("logs/shop.txt", "shop"),
        ("shop.v2/ratings.csv", "shop.v2"),
    ],
)
def test_a_study_is_named_after_its_data(tmp_path: Path, path: str, name: str) -> None:
    target = tmp_path / path
    if target.suffix:
        target.parent.mkdir()
        target.write_text("u a b\n", encoding="utf-8")
    else:
        target.mkdir()
    study = make_study(data=str(target))
    assert study == replace(Study(name=name), data=replace(Study().data, source=str(target)))
    with_backbone = make_study(data=str(target), backbone="some/Llama-1B")
    assert with_backbone.name == f"{name}-Llama-1B"
    own = make_study(data=str(target), recommender="my_package.mine:build")
    assert (own.name, own.backbone.source) == (f"{name}-mine", "my_package.mine:build")


def test_a_nameless_study_file_is_named_after_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "which-depth"
    folder.mkdir()
    (folder / "study.toml").write_text("seeds = 1\n", encoding="utf-8")
    assert make_study(folder / "study.toml").name == "which-depth"


@pytest.mark.parametrize("name", ["../../etc", "/etc/x", "a b/c", "..", "", "é"])
def test_a_run_stays_below_runs(name: str) -> None:
    folder = default_output(Study(name=name))
    assert folder.parent == Path("runs")
    assert folder.name not in {"", ".", ".."}


def test_a_phase_keeps_its_own_methods() -> None:
    study = Study(methods=tuple(METHODS))
    kept = {name: restrict(study, name, strict=False).methods for name in PHASES}
    assert kept["sweep"] == tuple(METHODS)
    assert kept["probe"] == names("probe")
    assert kept["distill"] == ("distill",)
    assert {*kept["train"], *kept["probe"], *kept["distill"]} == set(METHODS)


def test_a_phase_without_methods_in_the_study_is_refused() -> None:
    with pytest.raises(
        BadInput, match="methods that probe runs: early-exit, early-exit-raw, readout"
    ):
        restrict(Study(methods=("full",)), "probe", strict=False)


def test_variants_belong_to_the_phase_of_their_method() -> None:
    study = Study(methods=("full", "heal:ends", "distill:a"), variants={"a": Variant()})
    assert restrict(study, "distill", strict=False).methods == ("distill:a",)
    assert restrict(study, "train", strict=False).methods == ("full", "heal:ends")


def test_epochs_are_those_of_all_recipes(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[variants.a.recipe]\nepochs = 9\nbatch_size = 3\n[variants.b]\n", "utf-8")
    study = make_study(file, epochs=2, budget="compute")
    assert study.variants["a"].recipe == Recipe(epochs=2, batch_size=3)
    assert study.variants["b"] == Variant()
    assert (study.recipe.epochs, study.budget) == (2, "compute")


def test_every_flag_sets_something_of_a_study() -> None:
    study = Study()
    for flag in FLAGS.values():
        value: object = study
        for name in flag.setting.split("."):
            value = getattr(value, name)


def test_a_sweep_takes_a_split() -> None:
    study = make_study(split="temporal", split_at="2014-03-01, 2014-05-01")
    assert study.protocol.split == "temporal"
    assert study.protocol.split_at == ("2014-03-01", "2014-05-01")
    with pytest.raises(BadInput, match="protocol.split_at: expected --split temporal"):
        make_study(split_at="0.8,0.9")


def test_every_path_and_number_is_read_by_a_rule_of_ours() -> None:
    found = set()
    for command in (*app.registered_commands, *data.app.registered_commands):
        assert command.callback is not None
        for each in inspect.signature(command.callback, eval_str=True).parameters.values():
            if not hasattr(each.annotation, "__metadata__"):  # typer's own context
                continue
            hint, parser = str(each.annotation.__origin__), each.annotation.__metadata__[0].parser
            assert ("Path" in hint) == (parser is path), each
            assert not re.search(r"\b(int|float)\b", hint) or parser in {whole, number, share}, each
            found.add(parser)
    assert {path, whole, number, share} <= found


@pytest.mark.parametrize("text", ["", "x" * 256, "é" * 128, "a/" * 2100, "a\0b", "caf\udce9"])
def test_a_path_that_no_file_can_have(text: str) -> None:
    with pytest.raises(
        typer.BadParameter, match="expected a path of names of 1 to 255 bytes"
    ) as caught:
        path(text)
    assert len(str(caught.value)) < 250


def test_a_path_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for text, expected in (("~/run", "/home/me/run"), ("~no-such-user/x", "~no-such-user/x")):
        assert path(text) == Path(expected)
    for text in ("x" * 255, "日本/Фильм 😀", ".", "a\nb"):
        assert path(text) == Path(text)


@pytest.mark.parametrize("text", ["１", "٣", "1_000", "9" * 5000, "", "1e", "0x1", "²", "one"])
def test_digits_are_those_of_ascii(text: str) -> None:
    for parser in (whole, number, share):
        if parser is not whole and text.isascii() and text.isdigit():
            continue  # a float, though infinite: the setting's bounds refuse it
        with pytest.raises(typer.BadParameter, match="expected a "):
            parser(text)
    assert (whole("-3"), number("1e-3"), share("5%")) == (-3, 0.001, 0.05)


@pytest.mark.parametrize("name", ["x" * 5000, "日" * 300, "../..", "a\n/b", "~", ""])
def test_the_folder_of_any_name_can_be_made(tmp_path: Path, name: str) -> None:
    folder = tmp_path / default_output(Study(name=name))
    folder.mkdir(parents=True)
    assert folder.resolve().parent == (tmp_path / "runs").resolve()


def test_any_key_can_be_set(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text("[recipe]\nepochs = 4\n[variants.a.recipe]\nbatch_size = 3\n", "utf-8")
    settings = [
        *("recipe.batch_size=64", "recipe.learning_rate=1e-3, 3e-3", "recipe.epochs = 9"),
        *("layers=4", "data.columns.user=1", "protocol.filter_seen=true", "cost.seconds=5"),
        *("methods=full,skip", "backbone.prompt=a, 1", "variants.b.select=ends"),
        *("protocol.split=temporal", "protocol.split_at=2014-03-01,2015-01-01"),
        *("sasrec.recipe.precision=bfloat16", "backbone.lora_targets=up_proj"),
        'slurm.setup=["a, b", "c"]',
    ]
    study = make_study(file, settings)
    recipe = Recipe(batch_size=64, learning_rate=(1e-3, 3e-3), epochs=9)
    assert study.recipe == recipe
    # what a variant's table leaves out is what the study's table says then
    assert study.variants["a"].recipe == replace(recipe, batch_size=3)
    assert study.variants["b"].select == "ends"
    assert (study.layers, study.data.columns.user) == ("4", "1")  # texts, though they are numbers
    assert (study.protocol.filter_seen, study.cost.seconds) == (True, 5.0)
    assert (study.methods, study.backbone.prompt) == (("full", "skip"), "a, 1")
    assert study.protocol.split_at == ("2014-03-01", "2015-01-01")
    assert study.sasrec.recipe.precision == "bfloat16"
    assert study.backbone.lora_targets == ("up_proj",)
    assert study.slurm.setup == ("a, b", "c")
    lora = {"tuning": "lora"}
    flagged = make_study(file, ["recipe.epochs=9", "backbone.quantize=4bit"], epochs=2, **lora)
    assert (flagged.recipe.epochs, flagged.backbone.quantize) == (2, "4bit")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("recipe.batchsize=3", r"a key of \[recipe\]: .*did you mean batch_size"),
        ("recpe.epochs=3", "a key of a study: .*recipe"),
        ("recipe=3", r"its table \[recipe\], as recipe.KEY"),
        ("variants.a=3", r"its table \[variants.a\]"),
        ("recipe.epochs.x=3", "recipe.epochs=VALUE"),
        ("recipe.epochs", "KEY=VALUE"),
        ("=3", "KEY=VALUE"),
        ("recipe.epochs=many", "recipe.epochs: expected a whole number"),
        ("recipe.epochs=0", "recipe.epochs: expected a whole number of at least 1, got 0"),
        ("recipe.learning_rate=a,b", "recipe.learning_rate: expected a number"),
        ("recipe.loss=best", "recipe.loss: expected one of full"),
    ],
)
def test_a_setting_that_is_none(setting: str, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        make_study(None, [setting])
