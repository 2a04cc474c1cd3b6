"""Self-test of an architecture: can its blocks be cut, skipped, saved and cached without error?"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from depthprobe.models.backbones import backbone_config
from depthprobe.models.blocks import find_blocks
from depthprobe.models.proofs import PROOFS
from depthprobe.models.tiny import DEPTH, TOKENS, brings_code, tiny_model

# Without these a shallower model can't be trusted; the others tell what else the family can do.
REQUIRED = frozenset({"blocks", "tiny copy", "causal", "cut", "skip", "reload", "cache"})

_auto: Any = AutoModelForCausalLM  # untyped in transformers


@dataclass(frozen=True)
class CheckResult:
    """One line of the self-test."""

    name: str
    passed: bool
    detail: str

    @property
    def required(self) -> bool:
        """Whether a cut model can't be trusted without it."""
        return self.name in REQUIRED


def check_backbone(
    source: str | os.PathLike[str] | PreTrainedConfig,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    depth: int = DEPTH,
) -> list[CheckResult]:
    """Test in seconds, without its weights, whether an architecture can be cut safely.

    The blocks of the real configuration are found on the meta device, which holds no numbers. The
    rest runs on a tiny random copy (float64, the same kinds of blocks in the same order): see
    :mod:`depthprobe.models.proofs`.

    Args:
        source: as for :func:`load_backbone`, or a configuration.
        revision: of a hub id.
        trust_remote_code: run Python code from the hub; only with a ``revision``.
        depth: blocks of the tiny copy at most.

    Raises:
        BadInput: if there is no such backbone.
    """
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        config = backbone_config(source, revision=revision, trust_remote_code=trust_remote_code)
    results = [_run("blocks", lambda: _blocks(config))]
    built: list[PreTrainedModel] = []
    if results[0].passed:
        results.append(_run("tiny copy", lambda: _copy(config, depth, built)))
    if not built:
        return results
    model = built[0]
    ids = torch.arange(3, 3 + 2 * TOKENS).reshape(2, TOKENS)
    return results + [_run(name, lambda c=check: c(model, ids)) for name, check in PROOFS.items()]  # type: ignore[misc]


def can_be_cut(results: list[CheckResult]) -> bool:
    """Whether everything that a cut needs passed."""
    return REQUIRED.issubset(result.name for result in results if result.passed)


def _run(name: str, check: Callable[[], str]) -> CheckResult:
    try:
        return CheckResult(name, True, check())
    except Exception as error:  # whatever an architecture does is a finding, not a crash
        lines = str(error).strip().splitlines()
        return CheckResult(name, False, lines[0] if lines else type(error).__name__)


def _blocks(config: PreTrainedConfig) -> str:
    if config.is_encoder_decoder:
        raise ValueError(f"{config.model_type} is an encoder-decoder: only decoders can be cut")
    with torch.device("meta"):
        model = _auto.from_config(copy.deepcopy(config), trust_remote_code=brings_code(config))
    blocks = find_blocks(model)
    kinds = sorted({type(block).__name__ for block in blocks})
    return f"{len(blocks)} blocks ({', '.join(kinds)}) in {type(model).__name__}"


def _copy(config: PreTrainedConfig, depth: int, built: list[PreTrainedModel]) -> str:
    model = tiny_model(config, depth=depth)
    built.append(model)
    return f"{len(find_blocks(model))} blocks, {model.num_parameters():,} parameters"
