"""The table of methods, and what a name with a selection or a variant behind a colon stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from depthprobe.errors import BadInput
from depthprobe.methods import (
    METHODS,
    Method,
    Request,
    _load_others,
    full_depth,
    method_info,
    method_of,
    method_order,
    names,
    register,
    walks,
)
from depthprobe.study import (
    Distillation,
    Elastic,
    Heal,
    Recipe,
    Study,
    Variant,
    differences,
    load_study,
    parse_blocks,
    settings_of,
    study_from_dict,
    study_to_dict,
    study_to_toml,
)

FILE = """
layers = "1,2"
methods = ["full", "heal", "heal:ends", "distill:ms", "distill:own", "elastic:own"]

[recipe]
epochs = 7
batch_size = 64

[distillation]
groups = 3

[variants.ms.distillation]
cosine = 0
norm = 0

[variants.own]
layers = "2"

[variants.own.recipe]
epochs = 9

[variants.own.elastic]
exits = 2
"""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    path = tmp_path / "question.toml"
    path.write_text(FILE, encoding="utf-8")
    return load_study(path)


def test_a_variant_changes_what_it_names_alone(study: Study) -> None:
    ms = settings_of(study, "distill:ms")
    assert ms.distillation == Distillation(groups=3, cosine=0, norm=0)
    assert ms.recipe == study.recipe == Recipe(epochs=7, batch_size=64)
    own = settings_of(study, "distill:own")
    assert own.recipe == Recipe(epochs=9, batch_size=64)
    assert (own.layers, own.distillation) == ("2", Distillation(groups=3))
    assert settings_of(study, "elastic:own").elastic == Elastic(exits=2)


def test_a_study_with_variants_survives_toml_and_dict(study: Study, tmp_path: Path) -> None:
    assert study_from_dict(study_to_dict(study)) == study
    path = tmp_path / "again.toml"
    path.write_text(study_to_toml(study), encoding="utf-8")
    assert load_study(path) == study
    assert load_study(path).digest() == study.digest()


def test_the_hash_does_not_tell_1_from_1_point_0() -> None:
    whole = Study(variants={"a": Variant(distillation=Distillation(norm=1, logits=0))})
    assert study_from_dict(study_to_dict(whole)).digest() == whole.digest()
    other = Study(variants={"a": Variant(distillation=Distillation(norm=2))})
    assert other.digest() != whole.digest()


def test_healing_takes_a_part_of_the_epochs() -> None:
    study = Study(methods=("heal", "heal:ends"), recipe=Recipe(epochs=7), heal=Heal(share=0.5))
    assert settings_of(study, "heal").recipe.epochs == 4
    assert settings_of(study, "heal:ends").recipe.epochs == 4
    own = {"own": Variant(recipe=Recipe(epochs=9))}
    assert settings_of(replace(study, variants=own), "heal:own").recipe.epochs == 9
    assert settings_of(replace(study, heal=Heal(share=0.01)), "heal").recipe.epochs == 1


def test_selections_have_names_of_their_own() -> None:
    study = Study(methods=tuple(METHODS))
    for name in ("ends", "interval", "influence", "angular", "greedy"):
        assert settings_of(study, f"finetune:{name}").select == name
    assert settings_of(study, "finetune").select == "prefix"
    assert settings_of(study, "random-selection").select == "random"


def test_who_needs_the_teacher() -> None:
    study = Study(methods=tuple(METHODS))
    trained = names("trained", "control")
    asking = {name for name in trained if settings_of(study, name).needs_teacher}
    assert asking == {"heal", "distill"}
    assert settings_of(study, "finetune:greedy").needs_teacher
    assert not settings_of(study, "finetune:ends").needs_teacher


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        (("heal:end",), "heal: and one of ends.*did you mean ends"),
        (("distill:kl",), "one of ends"),
        (("skip:ends",), "with finetune"),
        (("finetune:prefix",), "one of ends"),
        (("finetune:random",), "one of ends"),
        (("elastic:ends",), "elastic alone"),
        (("random-selection:greedy",), "random-selection alone"),
        (("full:ends",), "with finetune"),
        (("heal:",), "one of ends"),
        (("fintune:ends",), "did you mean finetune"),
    ],
)
def test_names_that_stand_for_nothing(methods: tuple[str, ...], words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        Study(methods=methods)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ends", "A", "a b", "a/b", "", "a:b", "random"])
def test_names_that_no_variant_may_have(name: str) -> None:
    with pytest.raises(BadInput, match="variants"):
        Study(variants={name: Variant()})


def test_a_variant_that_selects_is_none_of_elastic() -> None:
    with pytest.raises(BadInput, match="without select"):
        Study(methods=("elastic:own",), variants={"own": Variant(select="ends")})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[variants.a]\nselekt = 'ends'", ["variants.a.selekt", "did you mean select?"]),
        ("[variants.a.distillation]\ncosin = 1", ["variants.a.distillation.cosin"]),
        ("[variants.a.distillation]\ncosine = 'x'", ["variants.a.distillation.cosine", "a number"]),
        ("variants = 3", ["variants", "table"]),
        ("[variants]\na = 3", ["variants.a", "table"]),
        ("[variants.a]\nselect = '3,1'", ["select", "in their order"]),
        ("[variants.a]\nlayers = 'two'", ["layers", "'two'"]),
        ("[distillation]\nnorm_form = 'l1'", ["norm_form", "distance"]),
        ("[distillation]\ntemperature = 0", ["temperature", "at least 0.001"]),
        ("[distillation]\nce=0\ncosine=0\nnorm=0\nsupervision=0", ["distillation.ce", "above 0"]),
        ("[elastic]\ndropout = 1", ["elastic.dropout", "below 1"]),
        ("[heal]\nshare = 0", ["heal.share", "above 0"]),
        ("[probing]\nspans = -1", ["probing.spans", "at least 0"]),
        ("budget = 'time'", ["budget", "compute"]),
    ],
)
def test_bad_settings_are_one_line(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "question.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        load_study(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_variant_that_both_have_can_differ(study: Study) -> None:
    bare = replace(study, methods=("full",), variants={})
    assert differences(bare, study) == differences(study, bare) == []
    other = replace(study, variants={**study.variants, "ms": Variant(layers="1")})
    assert any(line.startswith("variants.ms.layers") for line in differences(study, other))


@pytest.mark.parametrize(
    ("text", "blocks"), [("0,1,10-11", (0, 1, 10, 11)), (" 3 ", (3,)), ("0-2", (0, 1, 2))]
)
def test_blocks_by_index(text: str, blocks: tuple[int, ...]) -> None:
    assert parse_blocks(text, 12) == blocks


@pytest.mark.parametrize("text", ["", "a", "1,0", "0,0", "2-1", "-1", "12", "0-12", "1,,2"])
def test_blocks_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="select"):
        parse_blocks(text, 12)


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_record_is_complete(method: Method) -> None:
    assert callable(method.runner())
    assert set(method.needs) <= set(METHODS)
    assert method.label
    assert method.summary[-1] != "."
    assert method.candidate <= (method.exportable is not None)
    assert method.table <= (method.exportable is None)


def plain(**changes: Any) -> Method:
    record = {"name": "swapped", "label": "swapped", "summary": "two blocks swapped"}
    made = {"role": "probe", "run": abs, "trials": full_depth, "work": walks, "needs": ("full",)}
    return Method(**{**record, **made, **changes})


def test_a_method_is_registered_once_and_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("depthprobe.methods.METHODS", dict(METHODS))
    register(plain(label="first try"))
    method = register(plain())  # a notebook's cell that runs again
    assert method_of("swapped") is method
    assert "swapped" in names("probe")
    assert method_order("settling") < method_order("swapped") < method_order("unknown")
    with pytest.raises(BadInput, match="a name that is not taken"):
        register(plain(name="full"))
    with pytest.raises(BadInput, match="did you mean full"):
        register(plain(name="third", needs=("ful",)))


def test_methods_of_other_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        value = "other.package"

        def __init__(self, load: Callable[[], Any]) -> None:
            self.load = load

    def broken() -> None:
        raise ImportError("no such thing")

    monkeypatch.setattr("depthprobe.methods.METHODS", dict(METHODS))
    entries = [Entry(broken), Entry(plain)]
    monkeypatch.setattr("depthprobe.methods.entry_points", lambda group: entries)
    with pytest.warns(UserWarning, match="other.package: ImportError: no such thing"):
        _load_others()
    assert "swapped" in names("probe")  # in spite of the broken one before it


STYLES = {name: method for name, method in METHODS.items() if not method.table}


def test_every_method_plans_trials_of_a_backbone_of_one_block() -> None:
    """Or none: there is nothing to choose, and nothing to leave out."""
    for name, method in METHODS.items():
        groups = method.trials(Request(name, 0, 1, (1,), "prefix", None, Study()))
        kept = {trial.kept for group in groups for trial in group if trial.blocks}
        assert kept <= {(), (0,)}
    assert not METHODS["random-blocks"].trials(Request("", 0, 1, (1,), "prefix", None, Study()))


def test_methods_differ_in_marker_and_colour() -> None:
    # skip is never in a figure of these
    lines = [s for m, s in STYLES.items() if m != "skip"]
    assert len({s.marker for s in lines}) == len(lines)
    assert len({s.colour for s in lines}) == len(lines)
    assert method_info("elastic").label == "elastic"
    # a variant of a study may go with each method that takes variants
    several = [method_info(f"{name}:long") for name, m in METHODS.items() if m.takes_variants]
    assert len({(each.colour, each.marker) for each in several}) == len(several) > 2


@pytest.mark.parametrize("style", STYLES.values(), ids=list(STYLES))
def test_colours_stand_out_from_paper(style: Method) -> None:
    red, green, blue = matplotlib.colors.to_rgb(style.colour)

    def linear(channel: float) -> float:
        return channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4

    luminance = 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)
    assert 1.05 / (luminance + 0.05) >= 3  # WCAG 2.2, 1.4.11, against white
