"""Load a backbone, its configuration or its tokenizer from a folder, a hub id or "embedded"."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub.constants import ENDPOINT as HUB_ENDPOINT
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from depthprobe.models.embedded import embedded_backbone, embedded_config, embedded_tokenizer
from depthprobe.study import BadInput

EMBEDDED = "embedded"
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Recomputed by the model: old checkpoints stored them.
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|attn\.bias|attention\.bias)$"
)
ALLOWED = f'"{EMBEDDED}", a folder with config.json and safetensors weights, or a hub model id'
FAILURES = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def load_backbone(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    random_init: int | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, with every weight accounted for.

    Args:
        path_or_id: "embedded", a folder, or a hub model id.
        revision: of a hub id: branch, tag or commit.
        dtype: "auto" follows the checkpoint; else a torch dtype or its name.
        trust_remote_code: run Python code from the hub; only with a ``revision``.
        random_init: a seed: the same architecture with fresh weights, from the configuration
            alone; the caller's random state is left as it is.

    Raises:
        BadInput: if there is no such backbone, its weights are absent, pickled or unreadable, or
            they do not fit the model: missing, unexpected or mismatched keys.
    """
    kind = _check_dtype(dtype)
    if str(path_or_id) == EMBEDDED:
        return _ready(embedded_backbone(random_init or 0), kind)
    config = backbone_config(path_or_id, revision=revision, trust_remote_code=trust_remote_code)
    if random_init is not None:
        return _from_config(path_or_id, config, kind, random_init, trust_remote_code)
    if is_folder(path_or_id):
        _check_weights(_folder(path_or_id))
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    try:
        model, loaded = auto.from_pretrained(
            _location(path_or_id),
            config=config,
            revision=revision or "main",
            dtype=kind,
            trust_remote_code=trust_remote_code,
            local_files_only=_offline(path_or_id),
            use_safetensors=True,
            output_loading_info=True,
        )
    except FAILURES as error:
        raise _cannot("loaded", path_or_id, error) from error
    _check_keys(path_or_id, loaded)
    return _ready(model)


def backbone_config(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedConfig:
    """The configuration of a backbone; no weights are read or downloaded.

    Args:
        path_or_id: as for :func:`load_backbone`; also the path of a ``config.json``.
        revision: of a hub id.
        trust_remote_code: run Python code from the hub; only with a ``revision``.

    Raises:
        BadInput: if there is none.
    """
    if str(path_or_id) == EMBEDDED:
        return embedded_config()
    if is_folder(path_or_id):
        path = _folder(path_or_id)
        if not path.exists():
            raise BadInput("backbone", str(path_or_id), f"no such folder: expected {ALLOWED}")
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            adapter = (path / "adapter_config.json").is_file()
            hint = " (it holds an adapter: merge it into its base first)" if adapter else ""
            raise BadInput("backbone", str(path_or_id), f"no config.json in it{hint}: {ALLOWED}")
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise _cannot("read: its configuration is not JSON", path_or_id, error) from error
    elif trust_remote_code and revision is None:
        raise BadInput("revision", None, "a commit or tag, required by trust_remote_code")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            _location(path_or_id),
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=_offline(path_or_id),
        )
    except FAILURES as error:
        raise _cannot("found", path_or_id, error) from error
    return config


def load_tokenizer(
    path_or_id: str | os.PathLike[str], *, revision: str | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone.

    Raises:
        BadInput: if there is none.
    """
    if str(path_or_id) == EMBEDDED:
        return embedded_tokenizer()
    if is_folder(path_or_id):
        folder = _folder(path_or_id)
        if not folder.is_dir():
            raise BadInput("backbone", str(path_or_id), f"no such folder: expected {ALLOWED}")
        # Without any of these the library makes up an empty tokenizer.
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise BadInput("backbone", str(path_or_id), "no tokenizer in it (tokenizer.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _location(path_or_id),
            revision=revision or "main",
            local_files_only=_offline(path_or_id),
        )
    except FAILURES as error:
        raise _cannot("given a tokenizer", path_or_id, error) from error
    return tokenizer


def is_folder(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether this names a place on disk rather than a model on the hub."""
    text = os.fspath(path_or_id)
    return (
        not isinstance(path_or_id, str)
        or text.startswith((".", "~", os.sep))
        or text.count(os.sep) > 1
        or os.path.exists(text)
    )


def _offline(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether only local files can serve; without a name server the hub client retries for 30 s."""
    if is_folder(path_or_id):
        return True
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(HUB_ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _folder(path_or_id: str | os.PathLike[str]) -> Path:
    return Path(path_or_id).expanduser()


def _location(path_or_id: str | os.PathLike[str]) -> str:
    return str(_folder(path_or_id)) if is_folder(path_or_id) else os.fspath(path_or_id)


def _check_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise BadInput("dtype", dtype, ", ".join(DTYPES))
    found: torch.dtype = getattr(torch, dtype)
    return found


def _check_weights(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLED]
    if pickled:
        raise BadInput(
            "backbone",
            str(folder),
            f"only pickled weights in it ({pickled[0]}), which can run code when loaded:"
            " convert them with save_pretrained to safetensors",
        )
    raise BadInput("backbone", str(folder), f"no weights (*.safetensors) in it: {ALLOWED}")


def _check_keys(path_or_id: str | os.PathLike[str], loaded: dict[str, Any]) -> None:
    unexpected = [key for key in loaded["unexpected_keys"] if not HARMLESS.search(key)]
    mismatched = [key[0] if isinstance(key, tuple) else key for key in loaded["mismatched_keys"]]
    for what, keys in (
        ("missing", list(loaded["missing_keys"])),
        ("unexpected", unexpected),
        ("of another shape than the configuration says", mismatched),
    ):
        if keys:
            shown = ", ".join(sorted(keys)[:3]) + (", ..." if len(keys) > 3 else "")
            raise BadInput(
                "backbone",
                str(path_or_id),
                f"{len(keys)} of its weights are {what} ({shown}):"
                " the checkpoint must fit its configuration",
            )


def _from_config(
    path_or_id: str | os.PathLike[str],
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    seed: int,
    trust_remote_code: bool,
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs
            model = auto.from_config(config, dtype=chosen, trust_remote_code=trust_remote_code)
    except FAILURES as error:
        raise _cannot("built", path_or_id, error) from error
    return _ready(model)


def _ready(model: Any, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    found: PreTrainedModel = model.eval() if dtype == "auto" else model.to(dtype=dtype).eval()
    return found


def _cannot(what: str, path_or_id: str | os.PathLike[str], error: Exception) -> BadInput:
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return BadInput("backbone", str(path_or_id), f"cannot be {what} ({reason}): {ALLOWED}")
