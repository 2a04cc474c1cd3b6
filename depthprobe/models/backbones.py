"""Load backbones: every weight is checked, and a study's settings say which backbone."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
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

from depthprobe.errors import BadInput, short
from depthprobe.models.blocks import find_blocks
from depthprobe.models.embedded import (
    EMBEDDED,
    embedded_backbone,
    embedded_config,
    embedded_tokenizer,
    fresh,
)
from depthprobe.models.precision import (
    check_attention,
    check_torchao,
    quantization,
    resolve_dtype,
)
from depthprobe.models.sources import (
    ALLOWED,
    BESIDE,
    HARMLESS,
    TOKENIZER_FILES,
    Source,
    check_files,
    existing_path,
    files_hash,
    is_folder,
    location_of,
    not_finite,
    one_line,
    origin_of,
    resolve_revision,
    stored_in,
    weight_files,
    weights_hash,
)
from depthprobe.study import ATTENTIONS, OWN_SOURCE, Backbone

ADAPTER = "an adapter is beside its weights: merge it into them, or take it out of the folder"
ADAPTER_FILE = "adapter_config.json"
HASH = "sha256:"
MOST_BLOCKS = 10_000
DEPTHS = re.compile(r"(layers?|blocks)$")  # names of fields that say how many there are
# what transformers says on a quantised model; accelerate and peft look for it
QUANTIZED_MARKS = (
    "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer",
)  # fmt: skip

_auto: Any = AutoModelForCausalLM  # untyped in transformers

logger = logging.getLogger(__name__)


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
        attention: None or "auto" follows transformers; else one of its implementations, such as
            "eager", "sdpa" or "flash_attention_2".
        quantize: None or "none"; "8bit" or "4bit" stores the linear maps in fewer bits, which
            needs bitsandbytes and a CUDA GPU. Such a model is on the GPU already.
        trust_remote_code: run Python code from the hub; only with a ``revision``.
        random_init: a seed: the same architecture with random weights, from only the
            configuration; the caller's random state is not changed.
        weights: False checks the weights' names and shapes without reading them: the model is on
            the meta device (except the small embedded one).

    Raises:
        BadInput: if there is no such backbone, its weights are absent, pickled or unreadable, or
            they do not fit the model: missing, unexpected or mismatched keys; if ``dtype``,
            ``attention`` or ``quantize`` can't be used, here or with this backbone.
    """
    kind, chosen = resolve_dtype(dtype), check_attention(attention)
    embedded = str(path_or_id) == EMBEDDED
    if quantize not in {None, "none"} and (random_init is not None or embedded):
        raise BadInput("quantize", quantize, "pretrained weights (random ones can't be quantised)")
    packed = quantization(quantize)
    if embedded:
        model: Any = embedded_backbone(random_init or 0)
        with one_line(f"run with attention {chosen}", EMBEDDED):
            if chosen is not None:
                model.set_attn_implementation(chosen)
        ready: PreTrainedModel = model if kind == "auto" else model.to(dtype=kind)
        return ready
    origin_of(path_or_id, revision, trust_remote_code)  # code needs the caller's own revision
    commit = resolve_revision(path_or_id, revision)
    config = backbone_config(path_or_id, revision=commit, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": kind}
    if chosen is not None:
        options["attn_implementation"] = chosen
    else:
        for written in _attentions(config):
            check_attention(written)
    if random_init is not None:
        options["trust_remote_code"] = trust_remote_code
        options["dtype"] = config.dtype or torch.float32 if kind == "auto" else kind
        with one_line("built", path_or_id):
            return fresh(lambda: _auto.from_config(config, **options), random_init)
    quantized = bool(getattr(config, "quantization_config", None))
    if quantized and "torchao" in str(config.quantization_config):
        check_torchao("backbone", str(path_or_id))
    if packed is not None and quantized:
        raise BadInput("quantize", quantize, "a checkpoint that is not quantised already")
    if not weights and not quantized:
        options["device_map"] = "meta"
    elif packed is not None:  # all of them on the GPU that ``cuda`` means here
        options |= {"quantization_config": packed, "device_map": {"": torch.cuda.current_device()}}
    origin = origin_of(path_or_id, commit, trust_remote_code)
    weight_files(path_or_id, config, commit)  # checks them before they are read
    options |= origin
    with one_line("loaded", path_or_id):
        model, loaded = _auto.from_pretrained(
            location_of(path_or_id),
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if getattr(model, "peft_config", None):
        raise BadInput("backbone", str(path_or_id), ADAPTER, fault=True)
    _tie_missing_head(path_or_id, model, loaded)
    _check_loaded(path_or_id, loaded)
    with one_line("loaded", path_or_id):
        files = weight_files(path_or_id, config, commit)  # the hub's are here by now
        check_files(path_or_id, files, model, whole_numbers=quantized)
        whole = weights and not quantized  # for quantised weights the stored numbers are enough
        stored = model.state_dict().items() if whole else stored_in(files)
        if (name := not_finite(stored)) is not None:
            allowed = f"its weight {name} holds NaN or infinity: the checkpoint is damaged"
            if kind == torch.float16:
                allowed += ", or has weights beyond the range of float16 (bfloat16 has float32's)"
            raise BadInput("backbone", str(path_or_id), allowed, fault=True)
    if packed is not None:
        # A recommender holds only the base model; without the marks there, LoRA would treat packed
        # bytes as weights.
        for name in QUANTIZED_MARKS:
            if hasattr(model, name):
                setattr(model.base_model, name, getattr(model, name))
    return model.eval()  # type: ignore[no-any-return]


def _tie_missing_head(source: Source, model: PreTrainedModel, loaded: dict[str, Any]) -> None:
    """If only the head is missing, tie it to the embeddings: no recommender reads it.

    Checkpoints of embedding models have no head, and some still say that it is not tied.
    """
    head = model.get_output_embeddings()
    names = {f"{name}.weight" for name, module in model.named_modules() if module is head}
    if names and {*loaded["missing_keys"]} == names and getattr(head, "bias", None) is None:
        model.config.tie_word_embeddings = True
        model.tie_weights(recompute_mapping=True)
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            loaded["missing_keys"] = ()
            logger.warning(
                "%s: no language-model head; the embeddings are used in its place", source
            )


def _check_loaded(source: Source, loaded: dict[str, Any]) -> None:
    """Refuse weights that do not match the configuration."""
    for what, names in (
        ("missing", loaded["missing_keys"]),
        ("unexpected", [key for key in loaded["unexpected_keys"] if not HARMLESS.search(key)]),
        ("of another shape than the configuration says", loaded["mismatched_keys"]),
    ):
        if names:
            keys = sorted(name if isinstance(name, str) else name[0] for name in names)
            shown = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
            allowed = f"{len(keys)} of its weights are {what} ({shown}): the checkpoint must fit"
            raise BadInput("backbone", str(source), f"{allowed} its configuration", fault=True)


def backbone_config(
    path_or_id: Source, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """The configuration of a backbone; no weights are read or downloaded.

    Arguments as for :func:`load_backbone`; the source may be the path of a ``config.json``, too.
    """
    if str(path_or_id) == EMBEDDED:
        return embedded_config()
    origin = origin_of(path_or_id, revision, trust_remote_code)
    if is_folder(path_or_id):
        path = existing_path(path_or_id)
        adapter = (path / ADAPTER_FILE).is_file()
        if not (path.is_file() or (path / "config.json").is_file()):
            hint = "; it holds an adapter: merge it into its base first" if adapter else ""
            allowed = f"{ALLOWED} (no config.json in it{hint})"
            raise BadInput("backbone", str(path_or_id), allowed)
        if adapter:
            raise BadInput("backbone", str(path_or_id), ADAPTER, fault=True)
    with one_line("found", path_or_id):
        location = location_of(path_or_id)
        written, _ = PreTrainedConfig.get_config_dict(location, **origin)
        _check_depth(path_or_id, written)  # before a class makes lists of that length
        config: PreTrainedConfig = AutoConfig.from_pretrained(location, **origin)
        text = config.get_text_config(decoder=True)
        _check_depth(path_or_id, {"num_hidden_layers": getattr(text, "num_hidden_layers", 0)})
    for attention in _attentions(config):
        if attention not in ATTENTIONS:
            allowed = (
                f"a configuration without attention {attention!r} (a kernel to download and run)"
            )
            raise BadInput("backbone", str(path_or_id), allowed)
    return config


def _check_depth(source: Source, config: dict[str, Any]) -> None:
    """Refuse a configuration without blocks, or with absurdly many."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_depth(source, value)
        deep = type(value) is int and value > MOST_BLOCKS and DEPTHS.search(name)
        if deep or (name == "num_hidden_layers" and (type(value) is not int or value < 1)):
            allowed = f"{name} is {short(value)}: expected a whole number from 1 to {MOST_BLOCKS:,}"
            raise BadInput("backbone", str(source), allowed, fault=True)


def _attentions(config: PreTrainedConfig) -> Iterator[str]:
    """The attention implementations that the configuration and its parts name."""
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
        folder = existing_path(path_or_id)
        # Without any of these the library makes up an empty tokenizer.
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise BadInput(
                "backbone", str(path_or_id), "no tokenizer in it (tokenizer.json)", fault=True
            )
    origin = origin_of(path_or_id, revision, trust_remote_code)
    with one_line("given a tokenizer", path_or_id):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location_of(path_or_id), **origin
        )
    return tokenizer


# The backbone of a study.


def pretrained(
    settings: Backbone, *, random_init: int | None = None, plain: bool = False, weights: bool = True
) -> PreTrainedModel:
    """The backbone that a study's settings describe, at full depth.

    With ``plain``, quantised weights are turned back into ordinary ones of the same values.
    """
    if settings.own:
        from depthprobe.models.own import load_own  # it imports this module

        return load_own(settings.source).backbone
    model = load_backbone(
        settings.source,
        dtype=settings.dtype,
        attention=settings.attention,
        quantize=settings.quantize,
        random_init=random_init,
        weights=weights,
        **_which(settings),
    )
    find_blocks(model)
    if plain and getattr(model, "is_quantized", False):
        base = model.base_model
        model = model.dequantize(dtype=model.dtype)
        for name in QUANTIZED_MARKS:
            vars(base).pop(name, None)
    return model


def move(backbone: PreTrainedModel, settings: Backbone, device: torch.device) -> None:
    """Move a backbone that the settings describe; packed weights are on their device already."""
    if settings.quantize == "none":
        backbone.to(device)  # type: ignore[arg-type]  # wrapped in transformers, its types lost


def pretrained_config(settings: Backbone) -> PreTrainedConfig:
    """The configuration of the backbone that a study's settings describe; no weights are read."""
    if settings.own:
        from depthprobe.models.own import own_facts

        return own_facts(settings.source)[0]
    return backbone_config(settings.source, **_which(settings))


def pretrained_tokenizer(settings: Backbone) -> PreTrainedTokenizerBase:
    """The tokenizer of the backbone that a study's settings describe."""
    return load_tokenizer(settings.source, **_which(settings))


def _which(settings: Backbone) -> dict[str, Any]:
    return {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}


def backbone_revision(settings: Backbone) -> str:
    """Identify a backbone: the hub's commit, or ``sha256:`` and a hash of what decides its numbers.

    The hash's first part covers configuration and weights. For a folder, the second covers all
    other files that are read, such as the tokenizer's.
    """
    if settings.own:
        from depthprobe.models.own import own_facts

        return f"{HASH}{own_facts(settings.source)[1]}"
    if settings.source == EMBEDDED:
        model = embedded_backbone()
        digest = weights_hash(model.state_dict().items(), model.config.to_json_string())
        return f"{HASH}{digest}"
    if not is_folder(settings.source):
        return str(resolve_revision(settings.source, settings.revision))
    folder = Path(location_of(settings.source))
    weights = weight_files(settings.source, pretrained_config(settings))
    beside = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    parts = [files_hash(files) for files in ([folder / "config.json", *weights], beside)]
    return f"{HASH}{'-'.join(parts)}"


def is_same(recorded: str | None, revision: str) -> bool:
    """Whether a recorded revision is this one; early runs recorded only its first part, or none."""
    return recorded is None or revision.startswith(recorded)


def pinned(settings: Backbone, recorded: str | None, source: str | None = None) -> Backbone:
    """The settings with the backbone that a run recorded when it began, even if names moved since.

    Args:
        settings: of the study.
        recorded: the :func:`backbone_revision`: a commit takes the place of a branch or tag, which
            may move; None changes nothing.
        source: as :func:`describe` recorded it: the absolute path behind a relative one.
    """
    if recorded is None or settings.source == EMBEDDED:
        return settings
    if not recorded.startswith(HASH):
        return replace(settings, revision=recorded)
    if source is not None and Path(source).exists():
        return replace(settings, source=source)
    # it was a folder, so it is no id of the hub
    own = settings.source
    return settings if is_folder(own) else replace(settings, source=os.path.join(".", own))


def pinned_now(settings: Backbone) -> Backbone:
    """The settings with the commit that their branch or tag points to now; a folder has none."""
    return pinned(settings, resolve_revision(settings.source, settings.revision))


def describe(model: PreTrainedModel, source: str, revision: str) -> dict[str, Any]:
    """What a run records of its backbone."""
    text_config = model.config.get_text_config(decoder=True)
    on_disk = source != EMBEDDED and not OWN_SOURCE.fullmatch(source) and is_folder(source)
    return {
        "source": str(Path(location_of(source)).absolute()) if on_disk else source,
        "revision": revision,
        "blocks": int(text_config.num_hidden_layers),
        "width": int(text_config.hidden_size),
        "family": str(text_config.model_type),
        "parameters": int(model.num_parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
