"""A recommender of the user's own: the same numbers as ours through the protocol, and no less."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaModel,
)

import depthprobe as dp
from depthprobe.cli.app import main
from depthprobe.errors import BadInput
from depthprobe.models.build import build_recommender
from depthprobe.models.check import check_own
from depthprobe.models.embedded import embedded_tokenizer
from depthprobe.models.export import load_recommender
from depthprobe.models.own import load_own, own_facts
from depthprobe.report.numbers import as_summary
from depthprobe.report.search import search_words
from depthprobe.runs.context import Context
from depthprobe.runs.export import export_trial
from depthprobe.runs.store import Run, open_run
from depthprobe.runs.sweep import run_sweep
from depthprobe.study import Backbone, Study

PROBES = ("early-exit", "readout", "skip", "greedy", "drop-mlp", "replace")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples can be imported, and are built for each test."""
    monkeypatch.chdir(ROOT)
    own_facts.cache_clear()


def own_study(study: Study, source: str, **changes: Any) -> Study:
    return replace(study, backbone=Backbone(source=source), variants={}, **changes)


def ranks_of(run: Run, trial: str) -> pd.DataFrame:
    return pd.read_parquet(run.path / "trials" / trial / "users.parquet")


def test_our_own_model_through_the_protocol_gives_the_same_numbers(
    study: Study, small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported = export_trial(small_run.path, "full-d03-s0", tmp_path / "teacher")
    monkeypatch.setenv("EXPORTED", str(exported))
    own = own_study(study, "examples.exported:build", methods=("full", *PROBES))
    assert run_sweep(own, tmp_path / "run", jobs=0).failed == []
    run = open_run(tmp_path / "run")
    probed = [trial for trial in run.trials["trial"] if trial.endswith("-s0")]
    assert len(probed) == 1 + 3 + 4 + 3 + 2 + 3 + 2
    for trial in probed:
        pd.testing.assert_frame_equal(
            ranks_of(run, trial), ranks_of(small_run, trial), check_exact=True
        )


def items_of(run: Run) -> list[str]:
    return [str(raw) for raw in dp.load_data(run.path / "shared" / "data").item_ids]


def gpt2(folder: Path, item_ids: Sequence[str]) -> Path:
    """A GPT-2 over items in the example's layout; they have another order than the log's."""
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(item_ids) + 1, **sizes))
    model.save_pretrained(folder)
    (folder / "items.json").write_text(json.dumps(sorted(item_ids, reverse=True)))
    return folder


def test_a_gpt2_over_items_is_taken_as_it_is_and_cut(
    study: Study,
    small_run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = gpt2(tmp_path / "gpt2", items_of(small_run))
    monkeypatch.setenv("GPT2_ITEMS", str(source))
    methods = ("full", "early-exit", "finetune", "heal", "distill", "elastic")
    own = own_study(study, "examples.gpt2_items:build", methods=methods)
    assert run_sweep(own, tmp_path / "run", jobs=0).failed == []
    run = open_run(tmp_path / "run")
    trials = {*run.trials["trial"]}
    assert {"full-d03-s0", "full-d03-s1", "finetune-d01-s1", "early-exit-d01-s0"} <= trials
    assert "early-exit-d01-s1" not in trials  # one model, whatever the seed

    # a naive loop over users, in the model's own tokens, gives the teacher's ranks
    context, names = Context(run.path, run.study), json.loads((source / "items.json").read_text())
    raw = [str(each) for each in context.sequences.item_ids]
    token = [0, *(1 + names.index(name) for name in raw)]
    model = GPT2LMHeadModel.from_pretrained(source).eval()
    ranks = ranks_of(run, "full-d03-s0")
    for place, history in enumerate(context.test.histories):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([[token[item] for item in history]])).logits[
                0, -1
            ]
        target = int(context.test.targets[place])
        seen = set() if context.test.seen is None else {*context.test.seen[place].tolist()}
        others = [scores[token[i]] for i in range(1, len(token)) if i not in {*seen, target}]
        higher = sum(bool(score > scores[token[target]]) for score in others)
        assert ranks["rank"].iloc[place] in {higher + 1, np.inf if target in seen else higher + 1}

    # exported, it is a folder of the user's own kind, and ours reads it by the same function
    folder = tmp_path / "out"
    assert command("export", str(run.path), "finetune-d01-s1", str(folder)) in {0, None}
    assert "--recommender examples.gpt2_items:build" in capsys.readouterr().out
    assert len(AutoModelForCausalLM.from_pretrained(folder).transformer.h) == 1
    exported = load_recommender(folder, recommender="examples.gpt2_items:build")
    monkeypatch.setenv("GPT2_ITEMS", str(folder))
    again = load_own("examples.gpt2_items:build", exported.item_ids)
    user = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    assert torch.equal(exported.model.encode(*user), again.encode(*user))
    with pytest.raises(BadInput, match="--recommender: required. Give examples.gpt2_items:build"):
        load_recommender(folder)


def test_a_sasrec_of_plain_pytorch_with_its_own_loss(
    study: Study, small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from examples import sasrec

    torch.manual_seed(0)
    folder = tmp_path / "sasrec"
    folder.mkdir()
    sasrec.SASRec(items_of(small_run), width=16, blocks=3).save(folder)
    monkeypatch.setenv("SASREC", str(folder))
    losses: list[float] = []
    own_loss = sasrec.SASRec.loss

    def counted(self: Any, *batch: torch.Tensor) -> torch.Tensor:
        losses.append(1.0)
        return own_loss(self, *batch)

    monkeypatch.setattr(sasrec.SASRec, "loss", counted)
    methods = ("full", "early-exit", "skip", "drop-attention", "drop-mlp", "finetune", "distill")
    own = own_study(study, "examples.sasrec:build", methods=methods, seeds=1)
    assert run_sweep(own, tmp_path / "run", jobs=0).failed == []
    assert losses  # finetune minimised it
    run = open_run(tmp_path / "run")
    # a prefix of the blocks, built by hand, ranks as the early exit
    model = sasrec.build().eval()
    model.blocks = model.blocks[:2]
    context = Context(run.path, run.study)
    ids = [str(each) for each in context.sequences.item_ids]
    shallow = load_own_object(model, ids)
    from depthprobe.evaluation.ranks import evaluate

    ranks = evaluate(shallow, context.test, device=context.device)["full"]
    np.testing.assert_array_equal(ranks, ranks_of(run, "early-exit-d02-s0")["rank"])
    monkeypatch.setenv("SASREC", str(export_trial(run.path, "finetune-d02-s0", tmp_path / "out")))
    assert len(sasrec.build().blocks) == 2


def load_own_object(own: Any, item_ids: Sequence[str]) -> Any:
    from depthprobe.models.own import OwnRecommender

    return OwnRecommender(own, item_ids).eval()


def test_e4srec_reads_as_its_code_does_and_as_ours_with_its_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a checkpoint by E4SRec's rules
    base, folder, items = tmp_path / "base", tmp_path / "e4srec", 9
    torch.manual_seed(0)
    tokenizer = embedded_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **heads)
    LlamaModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lora = LoraConfig(r=2, target_modules=["gate_proj", "up_proj"], init_lora_weights=False)
    get_peft_model(AutoModel.from_pretrained(base), lora).save_pretrained(folder)
    project, score = torch.nn.Linear(4, 16), torch.nn.Linear(16, items + 1, bias=False)
    maps = {"input_proj": project.state_dict(), "score": score.state_dict()}
    torch.save(maps, folder / "adapter.pth")
    table = torch.randn(items + 1, 4)
    np.save(folder / "item_embed.npy", table.numpy())
    monkeypatch.setenv("E4SREC_BASE", str(base))
    monkeypatch.setenv("E4SREC", str(folder))

    model = load_own("examples.e4srec:build")
    checks = check_own(model, "examples.e4srec:build")
    assert [each for each in checks if not each.passed] == []
    # users are read out behind the response alone: the states after the items are others
    assert "whether it is causal can't be seen" in checks[1].detail
    every = check_own(model, "examples.e4srec:build", objective="every")
    assert [each.name for each in every if not each.passed] == ["causal"]
    assert "say recipe.objective=last" in every[1].detail
    history = torch.tensor([[3, 1, 7, 2]])
    with torch.no_grad():
        vectors = model.encode(torch.tensor([[3, 1, 7, 2], [5, 5, 0, 0]]), torch.tensor([4, 2]))
        scores = vectors[0] @ model.item_matrix().T

        # its predict(): instruction, items, response; the last state is scored
        own: Any = model.own
        tokens = own.backbone.get_input_embeddings()
        parts = [tokens(own.instruction), project(table[history[0]]), tokens(own.response)]
        states = own.backbone(inputs_embeds=torch.cat(parts)[None]).last_hidden_state
        torch.testing.assert_close(scores, score(states[0, -1]), rtol=1e-5, atol=1e-5)

        # ours, with prompt, suffix and a linear head
        from examples.e4srec import INSTRUCTION, RESPONSE

        settings = Backbone(source=str(base), prompt=INSTRUCTION, suffix=RESPONSE, head="linear")
        ours = build_recommender(settings, table, seed=0)
        ours.prompt = own.instruction  # ours begins with a start token
        ours.backbone.load_state_dict(own.backbone.state_dict())
        ours.input_adapter.load_state_dict(maps["input_proj"])  # type: ignore[union-attr]
        ours.head.load_state_dict(maps["score"])  # type: ignore[union-attr]
        expected = ours.eval().encode(history, torch.tensor([4]))
    torch.testing.assert_close(vectors[:1], expected, rtol=1e-5, atol=1e-5)


# --- what can't be used ---------------------------------------------------------------------------

SOUND = """
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.act = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x):
            past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            return x + self.act(self.map(past))

    class Norm(nn.BatchNorm1d):
        def __init__(self):
            super().__init__(4)

        def forward(self, x):
            return super().forward(x.transpose(1, 2)).transpose(1, 2)

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.items = nn.Embedding(6, 4)
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        @property
        def backbone(self):
            return self

        def states(self, histories, lengths):
            x = self.items(histories)
            for block in self.blocks:
                x = block(x)
            return x

        def item_matrix(self):
            return self.items.weight

    def build():
        return Mine()
"""
END = "return x\n\n"
FAULTS = {
    "no module": ("", "", r"no_such_module:build'?: its module can't be imported"),
    "no import": ("import torch", "import nowhere", "can't be imported .*nowhere"),
    "no function": ("def build", "def bild", r"no function build \(did you mean bild\?\)"),
    "fails": ("return Mine()", "return 1 / 0", r"build\(\) fails \(ZeroDivisionError"),
    "no recommender": ("return Mine()", "return 3", "expected a torch.nn.Module, got .* int"),
    "no states": ("def states", "def state", "Mine has no states"),
    "no matrix": ("return self.items.weight", "return 3", r"item_matrix\(\) is \(\), not"),
    "width": ("return self.items.weight", "return torch.ones(6, 5)", "can't be scored by items"),
    "shape": (
        "return x\n\n        def item",
        "return x[:, -1]\n\n        def item",
        "got \\(2, 4\\)",
    ),
    "NaN": ("return x\n\n        def item", "return x / 0\n\n        def item", "NaN or infinity"),
    "not causal": ("x.cumsum(1)", "x.cumsum(1) + x.flip(1)", "causal: "),
    "twice": (
        "for block in self.blocks",
        "for block in [*self.blocks] * 2",
        "must run each block once",
    ),
    "more behind": (
        "return x\n\n        def item",
        "return x + self.items(histories)\n\n        def item",
        "cut: ",
    ),
    "keyword": ("block(x)", "block(x=x)", "a block must take the state as its first argument"),
    "dropout": ("x = block(x)", "x = nn.functional.dropout(block(x))", "two passes over the same"),
    "exits": ("return Mine()", "raise SystemExit('bye')", r"build\(\) fails \(SystemExit: bye"),
    "dict": (
        "torch.manual_seed(0)",
        "torch.manual_seed(0); self.item_ids = {'1': 1}",
        "its item_ids are a dict",
    ),
    "other each time": ("torch.manual_seed(0)", "torch.seed()", "other weights each time"),
    "buffers": (
        "self.act = nn.Linear(4, 4), nn.Tanh()",
        "self.act = nn.Linear(4, 4), Norm()",
        "training changes buffers",
    ),
    "too short": ("x = self.items(histories)", "x = self.items(histories[:, :2])", "states|causal"),
    "one read-out": (
        "def item_matrix",
        "def after_items(self, x, _): return x[:, :1]\n\n        def item_matrix",
        "say recipe.objective=last",
    ),
    "no gradient": ("def states", "@torch.no_grad()\n        def states", "no gradient reaches"),
    "loss": (
        "def states",
        "def loss(self, *_):\n            return torch.ones(2)\n\n        def states",
        "finite scalar",
    ),
    "frozen": ("return Mine()", "return Mine().requires_grad_(False)", "nothing would be trained"),
    "double": ("return Mine()", "return Mine().double()", "must return float32 to be trained"),
    "half": ("return Mine()", "return Mine().bfloat16()", "must return float32"),
    "items": ("nn.Embedding(6, 4)", "nn.Embedding(9, 4)", "it has|items of the log"),
}


def command(*words: str) -> object:
    with pytest.raises(SystemExit) as ended:
        main([*words])
    return ended.value.code


def mine(folder: Path, monkeypatch: pytest.MonkeyPatch, old: str = "", new: str = "") -> str:
    """The source of a small recommender with one change."""
    text = textwrap.dedent(SOUND)
    old, new = textwrap.dedent(old), textwrap.dedent(new)
    assert old in SOUND
    name = f"mine_{hashlib.sha256((old + new).encode()).hexdigest()[:8]}"
    text = textwrap.dedent(SOUND.replace(old, new) if old else SOUND)
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    return f"{name}:build"


def small_log(folder: Path) -> Path:
    log = folder / "log.csv"
    rows = [f"{user},{1 + (user + place) % 5},{place}" for user in range(9) for place in range(5)]
    log.write_text("user,item,time\n" + "\n".join(rows))
    return log


@pytest.mark.parametrize("fault", FAULTS)
def test_what_can_not_be_used_is_one_line_and_nothing_is_written(
    fault: str,
    study: Study,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old, new, expected = FAULTS[fault]
    source = mine(tmp_path, monkeypatch, old, new) if old else "no_such_module:build"
    log, run = str(small_log(tmp_path)), str(tmp_path / "run")
    sweep = ("sweep", "--recommender", source, "--data", log, "--output", run)
    assert command(*sweep, "--methods", "full,finetune", "--layers", "1", "--jobs", "0") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: --recommender: "), error
    assert re.search(expected, error), error
    assert not (tmp_path / "run").exists()


def test_a_save_that_fails_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new = """def save(self, folder):
            print("saving")
            (folder / "half").touch()
            raise OSError("the disk\\nis full")

        def states"""
    source = mine(tmp_path, monkeypatch, "def states", new)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    sweep = ("sweep", "--recommender", source, "--data", str(small_log(tmp_path)), "--output", run)
    methods = ("--methods", "full,early-exit", "--layers", "1", "--seeds", "1", "--jobs", "0")
    assert command(*sweep, *methods) == 0
    capsys.readouterr()
    before = sorted(tmp_path.iterdir())
    assert command("export", run, "early-exit-d01-s0", str(out)) == 2
    shown = capsys.readouterr()
    expected = f"error: backbone.source: {source!r}: its save fails (OSError: the disk is full)"
    assert shown.err.strip().splitlines()[-1] == expected
    assert (shown.out, sorted(tmp_path.iterdir())) == ("", before)


def test_a_sound_one_passes_its_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("check", "--recommender", mine(tmp_path, monkeypatch)) == 0
    shown = capsys.readouterr().out
    assert "FAILED" not in shown
    assert "Not proven" in shown
    broken = mine(tmp_path, monkeypatch, "x.cumsum(1)", "x.cumsum(1) + x.flip(1)")
    assert command("check", "--recommender", broken) == 1
    assert "causal" in capsys.readouterr().out
    assert command("check", "--recommender", broken, "--backbone", "embedded") == 2


def test_what_it_prints_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load_own(mine(tmp_path, monkeypatch, "return Mine()", "print('loading'); return Mine()"))
    shown = capsys.readouterr()
    assert (shown.out, "loading" in shown.err) == ("", True)


def test_items_that_it_does_not_know_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = mine(tmp_path, monkeypatch, "torch.manual_seed(0)", "self.item_ids = list('abcde')")
    assert load_own(source, list("edcba")).rows is not None
    numbers = "self.item_ids = torch.arange(5)"
    numbered = mine(tmp_path, monkeypatch, "torch.manual_seed(0)", numbers)
    assert load_own(numbered, list("43210")).rows.tolist() == [0, 5, 4, 3, 2, 1]  # type: ignore[union-attr]
    with pytest.raises(
        BadInput, match="does not know 2 of 3 items of the log, such as 'x': .* like 'a'"
    ):
        load_own(source, ["a", "x", "y"])


def test_what_it_decides_itself_is_refused(study: Study) -> None:
    with pytest.raises(BadInput, match=r"prompt: expected nothing beside source"):
        Backbone(source="a.b:c", prompt="Next:")
    for method in ("random-init", "prompt-only"):
        with pytest.raises(BadInput, match=f"methods without {method} beside it"):
            own_study(study, "a.b:c", methods=("full", method))
    with pytest.raises(BadInput, match="cache: expected none beside backbone.source = a.b:c"):
        own_study(study, "a.b:c", methods=("full",), cache="there")
    assert sys.path  # nothing was imported for that


def test_a_search_counts_no_teacher_that_came_as_it_is(
    study: Study, small_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT2_ITEMS", str(gpt2(tmp_path / "gpt2", items_of(small_run))))
    methods = ("popularity", "finetune")
    own = own_study(study, "examples.gpt2_items:build", methods=methods, layers="find")
    assert run_sweep(own, tmp_path / "run", jobs=0).failed == []
    words = search_words(as_summary(open_run(tmp_path / "run")))
    assert words.startswith("The search trained 0 of the 4 models of a full sweep, 0 %")
    assert "no better than popularity" in words
    assert "odds" not in words  # there is nothing to hold a shallower one against
