"""The check over families: isolated, complete, and what the page in the docs says."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from depthprobe.models import families as support
from depthprobe.models.check import CHECKS, CheckResult
from depthprobe.models.families import (
    Family,
    check_families,
    families,
    family_config,
    support_table,
)

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ROW = re.compile(r"^\| `([^`]+)` \| (.*) \|$", re.MULTILINE)


def passed(*names):
    return tuple(CheckResult(name, True, "") for name in ("blocks", "tiny copy", *names))


def rows(page):
    return {name: cells.split(" | ") for name, cells in ROW.findall(page)}


def test_every_family_of_the_library_is_named():
    names = families()
    assert len(names) > 100
    assert {"llama", "gpt2", "bloom", "mamba", "qwen3_next", "gemma3_text", "opt"} <= set(names)


def test_encoders_are_asked_as_decoders():
    assert family_config("bert").is_decoder
    assert family_config("dbrx").attn_config.kv_n_heads == 8
    assert not family_config("bart").is_decoder  # an encoder-decoder has both


@pytest.mark.slow
def test_a_family_in_a_process_of_its_own():
    llama, bart = check_families(["llama", "bart"], jobs=2)
    assert llama.can_be_cut
    assert [llama.mark(name) for name in CHECKS] == ["yes"] * len(CHECKS)
    assert llama.reason == ""
    assert not bart.can_be_cut
    assert bart.reason == "blocks: bart is an encoder-decoder: only decoders can be cut"
    assert [bart.mark(name) for name in CHECKS] == ["-"] * len(CHECKS)


def _die(name):
    os._exit(3)


def _hang(name):
    time.sleep(60)


@pytest.mark.parametrize("target", [_die, _hang])
def test_a_family_that_takes_its_process_down(target, monkeypatch):
    monkeypatch.setattr(support, "check_family", target)
    monkeypatch.setattr(support, "PREFERRED", "fork")  # what is patched reaches a fork alone
    (family,) = check_families(["llama"], timeout=2)
    assert not family.can_be_cut
    assert family.reason == "blocks: took more than 2 s, or its process died"


def _mask(name):
    return support._failed(name, f"{signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())}")


def test_ctrl_c_ends_the_command_alone(monkeypatch):
    monkeypatch.setattr(support, "check_family", _mask)
    monkeypatch.setattr(support, "PREFERRED", "fork")
    (family,) = check_families(["llama"])
    assert family.reason == "blocks: True"
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_a_configuration_that_does_not_build():
    (family,) = check_families(["gemma4_assistant"])
    assert "hidden_size_per_layer_input must be 0" in family.reason


def test_the_page():
    limited = CheckResult(
        "cut",
        True,
        "2 depths; 5 other cuts refused, such as: it cannot be cut to [0]: a | <b> reason",
    )
    others = [name for name in CHECKS if name != "cut"]
    page = support_table(
        [
            Family("whole", "WholeForCausalLM", passed(*CHECKS)),
            Family("limited", "LimitedForCausalLM", (*passed(*others), limited)),
            Family("none", "NoneForCausalLM", (CheckResult("blocks", False, "no list"),)),
        ]
    )
    assert page.startswith("# Architectures\n\n2 of the 3 decoder families of transformers ")
    assert ", 1 of them" in page
    found = rows(page)
    assert found["whole"] == ["WholeForCausalLM", *["yes"] * 6, ""]
    assert found["limited"][:2] == ["LimitedForCausalLM", "in part"]
    assert found["limited"][-1] == "no cut to [0]: a / &lt;b> reason"
    assert found["none"] == ["NoneForCausalLM", "blocks: no list"]


def test_the_docs_name_every_family_and_thirty_pass_every_check():
    page = PAGE.read_text(encoding="utf-8")
    found = rows(page)
    whole = [name for name, cells in found.items() if cells[1:7] == ["yes"] * 6]
    assert len(whole) >= 30
    refused = page.partition("## The rest, each with the first reason")[2]
    assert all(cells[-1].strip() for cells in rows(refused).values())  # each with its reason
    named = {
        "gpt2", "opt", "gpt_neox", "falcon", "bloom", "phi", "llama", "mistral", "qwen2", "qwen3",
        "qwen3_moe", "mixtral", "gemma2", "gemma3_text", "olmo2", "stablelm", "cohere",
        "deepseek_v3", "granitemoe", "smollm3", "qwen3_next", "lfm2", "mamba",
    }  # fmt: skip
    assert not {name for name in named if name not in found or name in rows(refused)}


@pytest.mark.slow
def test_the_docs_say_what_the_check_says():
    documented = rows(PAGE.read_text(encoding="utf-8"))
    for family in check_families(["bloom", "gemma3n_text", "lfm2", "mamba", "rwkv"], jobs=2):
        if family.can_be_cut:
            shown = [family.mark(name) for name in CHECKS if name != "causal"]
            assert documented[family.name][1:7] == shown, family.name
        else:
            assert len(documented[family.name]) == 2, family.name
