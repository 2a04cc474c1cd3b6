"""Load a backbone, its configuration or its tokenizer from a folder, a hub id or "embedded"."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from depthprobe.models.checkpoints import check_keys, check_weights
from depthprobe.models.embedded import embedded_backbone, embedded_config, embedded_tokenizer
from depthprobe.models.precision import (
    check_attention,
    check_dtype,
    mark_quantized,
    placement,
    plain_weights,
    quantization,
)
from depthprobe.models.sources import (
    ALLOWED,
    EMBEDDED,
    FAILURES,
    cannot,
    folder_of,
    is_folder,
    location,
    offline,
    resolve_revision,
)
from depthprobe.study import ATTENTIONS, Backbone, BadInput

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
