"""Backbones: the embedded default, a folder or a commit on the hub; loaded, hashed, described."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
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
from depthprobe.models.blocks import find_blocks
from depthprobe.models.precision import (
    check_attention,
    check_dtype,
    mark_quantized,
    placement,
    plain_weights,
    quantization,
)
from depthprobe.study import ATTENTIONS, Backbone

Source = str | os.PathLike[str]
EMBEDDED = "embedded"
ALLOWED = f'"{EMBEDDED}", a folder with config.json and safetensors weights, or a hub model id'
# what the libraries raise for a source that can't be used; a missing package is an ImportError
FAILURES = (
    OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, ImportError,
    SafetensorError,
)  # fmt: skip
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = "sha256:"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
# Recomputed by the model: old checkpoints stored them.
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|attn\.bias|attention\.bias)$"
)
# The embedded default: a small Llama and a byte-level tokenizer, made on the spot, no download.
BLOCKS, WIDTH, HEADS, INTERMEDIATE, POSITIONS = 12, 32, 2, 88, 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2

_auto: Any = AutoModelForCausalLM  # untyped in transformers


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` names here."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has.get(name):
        here = ", ".join(kind for kind in has if has[kind])
        raise BadInput("device", name, f"auto or one of those on this machine: {here}")
    return torch.device(name)


# Where a backbone comes from.


def is_folder(source: Source) -> bool:
    """Whether this names a place on disk rather than a model on the hub."""
    text = os.fspath(source)
    return (
        not isinstance(source, str)
        or text.startswith((".", "~", os.sep))
        or text.count(os.sep) > 1
        or os.path.exists(text)
    )


def folder_of(source: Source) -> Path:
    """The path of a source on disk."""
    return Path(source).expanduser()


def offline(source: Source) -> bool:
    """Whether only local files can serve; without a name server the hub client retries for 30 s."""
    if is_folder(source):
        return True
    if getproxies():
        return False
    try:
        socket.getaddrinfo(urlsplit(HUB_ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def resolve_revision(source: Source, revision: str | None = None) -> str | None:
    """The commit that a branch or tag of a hub id points to now; None for what is not on the hub.

    Without a network it is the commit in the local cache. No revision is ``main``.
    """
    if str(source) == EMBEDDED or is_folder(source):
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        # the cache keeps files by commit; what the configuration object knows of it depends on
        # the version of transformers
        file = hf_hub_download(
            os.fspath(source),
            "config.json",
            revision=revision or "main",
            local_files_only=offline(source),
        )
    except FAILURES as error:
        raise _cannot("found", source, error) from error
    commit = Path(file).parent.name
    if not COMMIT.fullmatch(commit):
        allowed = "a model whose hub says which commit it serves, or a downloaded folder"
        raise BadInput("backbone", str(source), allowed)
    return commit


def _cannot(what: str, source: Source, error: Exception) -> BadInput:
    """A library's error as one line; ``what`` could not be done with the source."""
    lines = str(error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return BadInput("backbone", str(source), f"cannot be {what} ({reason}): {ALLOWED}")


def _location(source: Source) -> str:
    """What the libraries are given: a path without ``~``, or the hub id."""
    return str(folder_of(source)) if is_folder(source) else os.fspath(source)


def _origin(source: Source, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What the libraries' ``from_pretrained`` are given beside it, to find one commit's files."""
    _check_trust(source, revision, trust_remote_code)
    return {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "local_files_only": offline(source),
    }


def _check_trust(source: Source, revision: str | None, trust_remote_code: bool) -> None:
    if trust_remote_code and revision is None and not is_folder(source):
        raise BadInput("revision", None, "a commit or tag, required by trust_remote_code")


# The embedded default.


def embedded_config() -> LlamaConfig:
    """The configuration of the embedded backbone."""
    return LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
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
    backbone: LlamaForCausalLM = model.float().eval()
    return backbone


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


# Load a backbone, its configuration or its tokenizer.


def load_backbone(
    path_or_id: Source,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype = "auto",
    attention: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    random_init: int | None = None,
    weights: bool = True,
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
        weights: False checks the names and shapes of the weights, and reads none of them: the
            model is on the meta device (but for the small embedded one).

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
    options: dict[str, Any] = {} if chosen is None else {"attn_implementation": chosen}
    if str(path_or_id) == EMBEDDED:
        return _embedded(random_init or 0, kind, chosen)
    _check_trust(path_or_id, revision, trust_remote_code)
    commit = resolve_revision(path_or_id, revision)
    config = backbone_config(path_or_id, revision=commit, trust_remote_code=trust_remote_code)
    if chosen is None:
        for written in _attentions(config):
            check_attention(written)
    if random_init is not None:
        options["trust_remote_code"] = trust_remote_code
        return _random(path_or_id, config, kind, random_init, options)
    quantized = bool(getattr(config, "quantization_config", None))
    if packed is not None and quantized:
        raise BadInput("quantize", quantize, "a checkpoint that is not quantised already")
    if not weights and not quantized:
        options["device_map"] = "meta"
    elif packed is not None:
        options |= {"quantization_config": packed, "device_map": placement()}
    options |= {"dtype": kind} | _origin(path_or_id, commit, trust_remote_code)
    model = _read_weights(path_or_id, config, options)
    if packed is not None:
        mark_quantized(model)
    return model


def _embedded(seed: int, dtype: str | torch.dtype, attention: str | None) -> PreTrainedModel:
    model: Any = embedded_backbone(seed)
    if dtype != "auto":
        model = model.to(dtype=dtype)
    if attention is not None:
        try:
            model.set_attn_implementation(attention)
        except FAILURES as error:
            raise _cannot(f"run with attention {attention}", EMBEDDED, error) from error
    ready: PreTrainedModel = model.eval()
    return ready


def _random(
    source: Source,
    config: PreTrainedConfig,
    dtype: str | torch.dtype,
    seed: int,
    options: dict[str, Any],
) -> PreTrainedModel:
    """A model with fresh weights, from the configuration alone."""
    chosen = dtype if isinstance(dtype, torch.dtype) else (config.dtype or torch.float32)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs
            model: PreTrainedModel = _auto.from_config(config, dtype=chosen, **options)
    except FAILURES as error:
        raise _cannot("built", source, error) from error
    model.eval()
    return model


def _read_weights(
    source: Source, config: PreTrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    """The pretrained model; BadInput if its weights are not those of its configuration."""
    if is_folder(source):
        check_weights(folder_of(source))
    try:
        model: PreTrainedModel
        model, loaded = _auto.from_pretrained(
            _location(source),
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except FAILURES as error:
        raise _cannot("loaded", source, error) from error
    for what, names in (
        ("missing", loaded["missing_keys"]),
        ("unexpected", [key for key in loaded["unexpected_keys"] if not HARMLESS.search(key)]),
        ("of another shape than the configuration says", loaded["mismatched_keys"]),
    ):
        if names:
            keys = sorted(name if isinstance(name, str) else name[0] for name in names)
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            raise BadInput(
                "backbone",
                str(source),
                f"{len(keys)} of its weights are {what} ({shown}):"
                " the checkpoint must fit its configuration",
            )
    model.eval()
    return model


def check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors weights."""
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


def backbone_config(
    path_or_id: Source, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a backbone; no weights are read or downloaded.

    Arguments as for :func:`load_backbone`; the source may be the path of a ``config.json``, too.
    """
    if str(path_or_id) == EMBEDDED:
        return embedded_config()
    origin = _origin(path_or_id, revision, trust_remote_code)
    if is_folder(path_or_id):
        _check_config_file(path_or_id)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(_location(path_or_id), **origin)
    except FAILURES as error:
        raise _cannot("found", path_or_id, error) from error
    for written in _attentions(config):
        if written not in ATTENTIONS:
            allowed = f"a configuration without attention {written!r}: a kernel to download and run"
            raise BadInput("backbone", str(path_or_id), allowed)
    return config


def _check_config_file(source: Source) -> None:
    """Refuse a place on disk without a configuration in JSON."""
    path = folder_of(source)
    if not path.exists():
        raise BadInput("backbone", str(source), f"no such folder: expected {ALLOWED}")
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = " (it holds an adapter: merge it into its base first)" if adapter else ""
        raise BadInput("backbone", str(source), f"no config.json in it{hint}: {ALLOWED}")
    try:
        json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise _cannot("read: its configuration is not JSON", source, error) from error


def _attentions(config: PreTrainedConfig) -> Iterator[str]:
    """What the configuration and its parts say that their attention should be."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        # transformers has no public name for what it reads from ``attn_implementation``
        written = getattr(part, "_attn_implementation", None)
        if isinstance(written, str):
            yield written


def load_tokenizer(
    path_or_id: Source, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a backbone; arguments as for :func:`load_backbone`."""
    if str(path_or_id) == EMBEDDED:
        return embedded_tokenizer()
    if is_folder(path_or_id):
        folder = folder_of(path_or_id)
        if not folder.is_dir():
            raise BadInput("backbone", str(path_or_id), f"no such folder: expected {ALLOWED}")
        # Without any of these the library makes up an empty tokenizer.
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise BadInput("backbone", str(path_or_id), "no tokenizer in it (tokenizer.json)")
    origin = _origin(path_or_id, revision, trust_remote_code)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _location(path_or_id), **origin
        )
    except FAILURES as error:
        raise _cannot("given a tokenizer", path_or_id, error) from error
    return tokenizer


# The backbone of a study.


def pretrained(
    settings: Backbone, *, random_init: int | None = None, plain: bool = False, weights: bool = True
) -> PreTrainedModel:
    """The backbone that a study's settings describe, at full depth.

    Args:
        random_init: as for :func:`load_backbone`.
        plain: with ordinary weights, of the same values where they are quantised.
        weights: as for :func:`load_backbone`.
    """
    model = load_backbone(
        settings.source,
        revision=settings.revision,
        dtype=settings.dtype,
        attention=settings.attention,
        quantize=settings.quantize,
        trust_remote_code=settings.trust_remote_code,
        random_init=random_init,
        weights=weights,
    )
    find_blocks(model)
    return plain_weights(model) if plain else model


def pretrained_config(settings: Backbone) -> PreTrainedConfig:
    """The configuration of the backbone that a study's settings describe; no weights are read."""
    trust = settings.trust_remote_code
    return backbone_config(settings.source, revision=settings.revision, trust_remote_code=trust)


def pretrained_tokenizer(settings: Backbone) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone that a study's settings describe."""
    trust = settings.trust_remote_code
    return load_tokenizer(settings.source, revision=settings.revision, trust_remote_code=trust)


def backbone_revision(settings: Backbone) -> str:
    """Which weights exactly: the hub's commit, or ``sha256:`` of configuration and weights."""
    if settings.source != EMBEDDED and not is_folder(settings.source):
        return str(resolve_revision(settings.source, settings.revision))
    digest = hashlib.sha256()
    if settings.source == EMBEDDED:
        model = embedded_backbone()
        digest.update(model.config.to_json_string().encode())
        for name, weight in sorted(model.state_dict().items()):
            digest.update(name.encode())
            digest.update(weight.detach().contiguous().flatten().view(torch.uint8).numpy())
    else:
        folder = folder_of(settings.source)
        for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            digest.update(path.name.encode())
            with path.open("rb") as file:
                while chunk := file.read(4 * 2**20):
                    digest.update(chunk)
    return f"{HASH}{digest.hexdigest()[:16]}"


def pinned(settings: Backbone, recorded: str | None) -> Backbone:
    """The settings with the recorded commit in place of a branch or tag, which may move.

    Args:
        recorded: :func:`backbone_revision` when the run began; None and hashes change nothing.
    """
    unchanged = recorded is None or recorded.startswith(HASH)
    return settings if unchanged else replace(settings, revision=recorded)


def pinned_now(settings: Backbone) -> Backbone:
    """The settings with the commit that their branch or tag points to now; a folder has none."""
    return pinned(settings, resolve_revision(settings.source, settings.revision))


def describe(settings: Backbone, revision: str) -> dict[str, Any]:
    """What a run records of its backbone. Weights are checked to be there, none is read."""
    model = pretrained(settings, weights=False)
    text_config = model.config.get_text_config(decoder=True)
    return {
        "source": settings.source,
        "revision": revision,
        "blocks": int(text_config.num_hidden_layers),
        "width": int(text_config.hidden_size),
        "family": str(text_config.model_type),
        "parameters": int(model.num_parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
