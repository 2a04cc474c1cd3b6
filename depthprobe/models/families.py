"""The self-test of every decoder family that transformers ships, and the table of its results."""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from depthprobe.models.check import CHECKS, CheckResult, can_be_cut, check_backbone

TIMEOUT = 120.0  # seconds a family may take
PREFERRED = "forkserver"  # import once, then fork a process per family
# Changes to a configuration class's defaults, where these do not describe a model that runs or that
# has all kinds of its blocks. Everything else is the default.
COMPLETED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [9, 18, 27]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"kv_n_heads": 8, "clip_qkv": 8.0, "rope_theta": 1e4}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "gemma3n_text": {"num_kv_shared_layers": 10},
    "granitemoehybrid": {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 8, "moe_topk": 2},
    "lfm2_moe": {"layer_types": (["conv"] * 3 + ["full_attention"]) * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "nemotron_h": {"layers_block_type": ["full_attention", "mlp", "linear_attention", "moe"] * 2},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 16},
}
PAGE = """# Architectures

{cut} of the {all} decoder families of transformers {version} can be cut safely, {every} of them
with every check passed. Each was checked on a tiny random copy that has its kinds of blocks.
`depthprobe check --backbone B` asks the same of one configuration, `depthprobe check --all` makes
this page.

| check | what passed |
|---|---|
| cut | the model cut to its first k blocks equals the read-out after block k, bit for bit |
| skip | a block left out equals one that ran and was undone, and one that was cut out |
| parts | attention and MLP can be left out alone |
| reload | stock transformers loads the cut model: no key missing or unexpected, equal outputs |
| cache | step by step with a cache equals one pass |
| recommender | it works as the backbone of a recommender |

*in part*: some sets of blocks are refused, and a reason is shown. Every family below is causal: no
position sees a later one.

## Families that can be cut

"""


@dataclass(frozen=True)
class Family:
    """The self-test's result for one family."""

    name: str  # the configuration's model type
    architecture: str
    results: tuple[CheckResult, ...]

    @property
    def can_be_cut(self) -> bool:
        """Whether everything that a cut needs passed."""
        return can_be_cut(list(self.results))

    @property
    def reason(self) -> str:
        """Why it can't be cut, or what is limited; empty if nothing is."""
        failed = [f"{r.name}: {r.detail}" for r in self.results if not r.passed]
        limits = [r.detail.partition("such as: ")[2] for r in self.results if r.passed]
        reason = next(iter([*failed, *filter(None, limits)]), "")
        return reason.replace("it cannot be cut", "no cut")

    def mark(self, check: str) -> str:
        """``yes``, ``in part`` (some cuts are refused, with a reason), ``no``; ``-``: not run."""
        for result in self.results:
            if result.name == check:
                refused = "refused, such as" in result.detail
                return ("in part" if refused else "yes") if result.passed else "no"
        return "-"


def families() -> list[str]:
    """The model types that transformers has a causal language model for."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def family_config(name: str, **changes: Any) -> PreTrainedConfig:
    """A family's default configuration as a decoder, completed so that it runs, and changed."""
    config: PreTrainedConfig = CONFIG_MAPPING[name](**COMPLETED.get(name, {}) | changes)
    if getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder:
        config.is_decoder = True
    return config


def check_families(
    names: Sequence[str] | None = None, *, jobs: int = 1, timeout: float = TIMEOUT
) -> Iterator[Family]:
    """Check every family, or those named, each in its own process."""
    kinds = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context(PREFERRED if PREFERRED in kinds else "spawn")
    context.set_forkserver_preload([__name__])
    chosen = families() if names is None else names
    # Ctrl-C reaches every process of a terminal; children inherit that it is blocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        started = context.Pool(jobs, initializer=_quiet, maxtasksperchild=1)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    with started as pool:
        waiting = [pool.apply_async(check_family, (name,)) for name in chosen]
        for name, answer in zip(chosen, waiting, strict=True):
            try:
                yield answer.get(timeout)
            except multiprocessing.TimeoutError:
                yield _failed(name, f"took more than {timeout:g} s, or its process died")


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    set_verbosity_error()


def check_family(name: str) -> Family:
    """Check a family in this process."""
    try:
        results = tuple(check_backbone(family_config(name)))
    except Exception as error:  # some configuration classes can't be built
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return _failed(name, lines[-1].strip())
    return Family(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name], results)


def _failed(name: str, reason: str) -> Family:
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name]
    return Family(name, architecture, (CheckResult("blocks", False, reason),))


def support_table(checked: Sequence[Family]) -> str:
    """The results as a Markdown page: what can be cut, then the rest with reasons."""
    good = [family for family in checked if family.can_be_cut]
    perfect = [f for f in good if all(f.mark(name) == "yes" for name in CHECKS)]
    head = PAGE.format(
        cut=len(good),
        every=len(perfect),
        all=len(checked),
        version=metadata.version("transformers"),
    )
    shown = [name for name in CHECKS if name != "causal"]  # every family that can be cut
    lines = [f"| family | model | {' | '.join(shown)} | limits |", "|---" * (len(shown) + 3) + "|"]
    for family in good:
        marks = [family.mark(name) for name in shown]
        cells = [f"`{family.name}`", family.architecture, *marks, _short(family.reason)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## The rest, each with the first reason", ""]
    lines += ["| family | model | why |", "|---|---|---|"]
    for family in checked:
        if not family.can_be_cut:
            lines.append(f"| `{family.name}` | {family.architecture} | {_short(family.reason)} |")
    return head + "\n".join(lines) + "\n"


def _short(text: str, most: int = 160) -> str:
    plain = " ".join(text.replace("|", "/").replace("<", "&lt;").split())
    return plain if len(plain) <= most else plain[:most].rsplit(" ", 1)[0] + " ..."
