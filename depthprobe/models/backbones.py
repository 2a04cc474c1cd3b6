"""Where to compute."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT as HUB_ENDPOINT
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from depthprobe.errors import BadInput
from depthprobe.models.precision import (
    check_attention,
    check_dtype,
    mark_quantized,
    placement,
    plain_weights,
    quantization,
)
from depthprobe.study import ATTENTIONS, Backbone


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` names here.

    Raises:
        BadInput: if this machine doesn't have it.
    """
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has.get(name):
        here = ", ".join(kind for kind in has if has[kind])
        raise BadInput("device", name, f"auto or one of those on this machine: {here}")
    return torch.device(name)


# Where a backbone comes from: the embedded one, a place on disk, or a commit on the hub.

EMBEDDED = "embedded"
ALLOWED = f'"{EMBEDDED}", a folder with config.json and safetensors weights, or a hub model id'
# what the libraries raise for a source that can't be used; a missing package is an ImportError
FAILURES = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError)
COMMIT = re.compile(r"[0-9a-f]{40}")


def is_folder(path_or_id: str | os.PathLike[str]) -> bool:
    """Whether this names a place on disk rather than a model on the hub."""
    text = os.fspath(path_or_id)
    return (
        not isinstance(path_or_id, str)
        or text.startswith((".", "~", os.sep))
        or text.count(os.sep) > 1
        or os.path.exists(text)
    )


def folder_of(path_or_id: str | os.PathLike[str]) -> Path:
    """The path of a source on disk."""
    return Path(path_or_id).expanduser()


def location(path_or_id: str | os.PathLike[str]) -> str:
    """What the libraries are given: a path without ``~``, or the hub id."""
    return str(folder_of(path_or_id)) if is_folder(path_or_id) else os.fspath(path_or_id)


def offline(path_or_id: str | os.PathLike[str]) -> bool:
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


def resolve_revision(path_or_id: str | os.PathLike[str], revision: str | None = None) -> str | None:
    """The commit that a branch or tag of a hub id points to now; None for what is not on the hub.

    Without a network it is the commit in the local cache.

    Args:
        revision: branch, tag or commit; None is ``main``.

    Raises:
        BadInput: if there is no such model or revision.
    """
    if str(path_or_id) == EMBEDDED or is_folder(path_or_id):
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        # the cache keeps files by commit; what the configuration object knows of it depends on
        # the version of transformers
        file = hf_hub_download(
            os.fspath(path_or_id),
            "config.json",
            revision=revision or "main",
            local_files_only=offline(path_or_id),
        )
    except FAILURES as error:
        raise cannot("found", path_or_id, error) from error
    parent = Path(file).parent.name
    if not COMMIT.fullmatch(parent):
        allowed = "a model whose hub says which commit it serves, or a downloaded folder"
        raise BadInput("backbone", str(path_or_id), allowed)
    return parent


def cannot(what: str, path_or_id: str | os.PathLike[str], error: Exception) -> BadInput:
    """A library's error as one line; ``what`` could not be done with the source."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return BadInput("backbone", str(path_or_id), f"cannot be {what} ({reason}): {ALLOWED}")


# What a checkpoint must hold: safetensors weights, each of them the model's.

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Recomputed by the model: old checkpoints stored them.
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|attn\.bias|attention\.bias)$"
)


def check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors weights.

    Raises:
        BadInput: if there are none, or pickled ones alone.
    """
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


def check_keys(path_or_id: str | os.PathLike[str], loaded: dict[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not exactly the model's.

    Args:
        loaded: what ``from_pretrained(output_loading_info=True)`` told.

    Raises:
        BadInput: for missing, unexpected or mismatched keys.
    """
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


# The embedded default: a small Llama and a byte-level tokenizer, made on the spot, no download.

BLOCKS = 12
WIDTH = 32
HEADS = 2
INTERMEDIATE = 88
POSITIONS = 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2
VOCABULARY = 256 + len(SPECIAL_TOKENS)


def embedded_config() -> LlamaConfig:
    """The configuration of the embedded backbone."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )


def embedded_backbone(seed: int = 0) -> LlamaForCausalLM:
    """The embedded backbone, float32, in evaluation mode.

    The same seed gives the same weights; the caller's random state is left as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs too
        model: Any = LlamaForCausalLM(embedded_config())  # untyped in transformers
    found: LlamaForCausalLM = model.float().eval()
    return found


def embedded_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte of UTF-8: any text round-trips. Adds no special tokens."""
    # The 256 printable stand-ins of the byte-level pre-tokenizer, in a fixed order.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    pad, start, end = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


# Load a backbone, its configuration or its tokenizer from a folder, a hub id or "embedded".

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


def load_backbone(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    random_init: int | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, with every weight accounted for.

    Args:
        path_or_id: "embedded", a folder, or a hub model id.
        revision: of a hub id: branch, tag or commit. All files come from the commit that it points
            to now.
        dtype: "auto" follows the checkpoint; else a torch dtype or its name.
        attention: None or "auto" follows transformers; else "eager", "sdpa", "flash_attention_2",
            "flash_attention_3" or "flex_attention".
        quantize: None or "none"; "8bit" or "4bit" stores the linear maps in fewer bits, which
            needs bitsandbytes and a CUDA GPU. Such a model is on the GPU already.
        trust_remote_code: run Python code from the hub; only with a ``revision``.
        random_init: a seed: the same architecture with fresh weights, from the configuration
            alone; the caller's random state is left as it is.

    Raises:
        BadInput: if there is no such backbone, its weights are absent, pickled or unreadable, or
            they do not fit the model: missing, unexpected or mismatched keys; if ``dtype``,
            ``attention`` or ``quantize`` can't be used, here or with this backbone.
    """
    kind, chosen = check_dtype(dtype), check_attention(attention)
    fewer_bits = quantize not in {None, "none"}
    if fewer_bits and (random_init is not None or str(path_or_id) == EMBEDDED):
        raise BadInput("quantize", quantize, "pretrained weights: random ones can't be quantised")
    packed = quantization(quantize)
    if str(path_or_id) == EMBEDDED:
        return _embedded(random_init or 0, kind, chosen)
    _check_trust(path_or_id, revision, trust_remote_code)
    commit = resolve_revision(path_or_id, revision)
    config = backbone_config(path_or_id, revision=commit, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if chosen is not None:
        options["attn_implementation"] = chosen
    else:
        for written in _attentions(config):
            check_attention(written)
    if random_init is not None:
        return _from_config(path_or_id, config, kind, random_init, options)
    if is_folder(path_or_id):
        check_weights(folder_of(path_or_id))
    if packed is not None:
        if getattr(config, "quantization_config", None):
            raise BadInput("quantize", quantize, "a checkpoint that is not quantised already")
        options |= {"quantization_config": packed, "device_map": placement()}
    auto: Any = AutoModelForCausalLM  # untyped in transformers
    try:
        model, loaded = auto.from_pretrained(
            location(path_or_id),
            config=config,
            revision=commit or "main",
            dtype=kind,
            local_files_only=offline(path_or_id),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except FAILURES as error:
        raise cannot("loaded", path_or_id, error) from error
    check_keys(path_or_id, loaded)
    if packed is not None:
        mark_quantized(model)
    return _ready(model)


def pretrained(
    settings: Backbone, *, random_init: int | None = None, plain: bool = False
) -> PreTrainedModel:
    """The backbone that a study's settings describe, whole.

    Args:
        random_init: as for :func:`load_backbone`.
        plain: with ordinary weights, of the same values where they are quantised.
    """
    model = load_backbone(
        settings.source,
        revision=settings.revision,
        dtype=settings.dtype,
        attention=settings.attention,
        quantize=settings.quantize,
        trust_remote_code=settings.trust_remote_code,
        random_init=random_init,
    )
    return plain_weights(model) if plain else model


def pretrained_config(settings: Backbone) -> PreTrainedConfig:
    """The configuration of the backbone that a study's settings describe; no weights are read."""
    return backbone_config(
        settings.source,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


def pretrained_tokenizer(settings: Backbone) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone that a study's settings describe."""
    return load_tokenizer(
        settings.source,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
    )


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
    _check_trust(path_or_id, revision, trust_remote_code)
    if is_folder(path_or_id):
        path = folder_of(path_or_id)
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
            raise cannot("read: its configuration is not JSON", path_or_id, error) from error
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            location(path_or_id),
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=offline(path_or_id),
        )
    except FAILURES as error:
        raise cannot("found", path_or_id, error) from error
    for written in _attentions(config):
        if written not in ATTENTIONS:
            allowed = f"a configuration without attention {written!r}: a kernel to download and run"
            raise BadInput("backbone", str(path_or_id), allowed)
    return config


def _attentions(config: PreTrainedConfig) -> Iterator[str]:
    """What the configuration and its parts say that their attention should be."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        written = getattr(part, "_attn_implementation", None)
        if isinstance(written, str):
            yield written


def load_tokenizer(
    path_or_id: str | os.PathLike[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone; arguments as for :func:`load_backbone`.

    Raises:
        BadInput: if there is none.
    """
    if str(path_or_id) == EMBEDDED:
        return embedded_tokenizer()
    if is_folder(path_or_id):
        folder = folder_of(path_or_id)
        if not folder.is_dir():
            raise BadInput("backbone", str(path_or_id), f"no such folder: expected {ALLOWED}")
        # Without any of these the library makes up an empty tokenizer.
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise BadInput("backbone", str(path_or_id), "no tokenizer in it (tokenizer.json)")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location(path_or_id),
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            local_files_only=offline(path_or_id),
        )
    except FAILURES as error:
        raise cannot("given a tokenizer", path_or_id, error) from error
    return tokenizer


def _check_trust(
    path_or_id: str | os.PathLike[str], revision: str | None, trust_remote_code: bool
) -> None:
    if trust_remote_code and revision is None and not is_folder(path_or_id):
        raise BadInput("revision", None, "a commit or tag, required by trust_remote_code")


def _embedded(seed: int, dtype: str | torch.dtype, attention: str | None) -> PreTrainedModel:
    model = _ready(embedded_backbone(seed), dtype)
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except FAILURES as error:
            raise cannot(f"run with attention {attention}", EMBEDDED, error) from error
    return model


def _from_config(
    path_or_id: str | os.PathLike[str],
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    seed: int,
    options: dict[str, Any],
) -> PreTrainedModel:
    auto: Any = AutoModelForCausalLM
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs
            model = auto.from_config(config, dtype=chosen, **options)
    except FAILURES as error:
        raise cannot("built", path_or_id, error) from error
    return _ready(model)


def _ready(model: Any, dtype: str | torch.dtype = "auto") -> PreTrainedModel:
    found: PreTrainedModel = model.eval() if dtype == "auto" else model.to(dtype=dtype).eval()
    return found
