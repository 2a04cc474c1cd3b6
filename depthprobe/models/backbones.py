"""Backbones: the embedded default, a folder or a commit on the hub; loaded, hashed, described."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT as HUB_ENDPOINT
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_torchao_available,
)

from depthprobe.errors import BadInput, one_of, short
from depthprobe.models.blocks import find_blocks
from depthprobe.study import ATTENTIONS, OWN_SOURCE, QUANTIZATIONS, Backbone

Source = str | os.PathLike[str]
EMBEDDED = "embedded"
ADAPTER = "an adapter is beside its weights: merge it into them, or take it out of the folder"
ALLOWED = f"a folder with config.json and safetensors weights, a Hugging Face id, or {EMBEDDED}"
DTYPES = ("auto", "float64", "float32", "bfloat16", "float16")
COMMIT = re.compile(r"[0-9a-f]{40}")
HASH = "sha256:"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SAFE = ".safetensors"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
# what decides a model's numbers beside its configuration and weights, or goes into an export
BESIDE = (
    *TOKENIZER_FILES, SAFE_WEIGHTS_INDEX_NAME, "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "generation_config.json", "*.py",
)  # fmt: skip
ADAPTER_FILE = "adapter_config.json"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
MOST_BLOCKS = 10_000
LARGE = 20_000_000  # parameters from which on bfloat16 is the faster one, see analyses/real_llm
DEPTHS = re.compile(r"(layers?|blocks)$")  # names of fields that say how many there are
# Recomputed by the model: old checkpoints stored them.
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|attn\.bias|attention\.bias)$"
)
# what transformers says on a quantised model; accelerate and peft look for it
QUANTIZED_MARKS = (
    "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "hf_quantizer",
)  # fmt: skip
# The embedded default: a small Llama and a byte-level tokenizer, made on the spot, no download.
BLOCKS, WIDTH, HEADS, INTERMEDIATE, POSITIONS = 12, 32, 2, 88, 512
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")  # ids 0, 1, 2

_auto: Any = AutoModelForCausalLM  # untyped in transformers

logger = logging.getLogger(__name__)


# How a backbone computes.


def resolve_device(name: str) -> torch.device:
    """The device that ``auto``, ``cpu``, ``cuda`` or ``mps`` names here."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has.get(name):
        here = ", ".join(kind for kind in has if has[kind])
        raise BadInput("device", name, f"auto or one of those on this machine: {here}")
    return torch.device(name)


def precision_on(device: torch.device, parameters: int) -> Literal["float32", "bfloat16"]:
    """What ``precision = "auto"`` is on a device, for a backbone of so many parameters.

    By what the hardware has, and not by a measurement: two runs on one machine must agree.
    """
    has = False
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        has = bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("bf16"))
    elif device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has and parameters >= LARGE else "float32"


def compute_in_bfloat16(backbone: nn.Module) -> None:
    """Let every block compute in bfloat16 from now on, beside weights and states that keep theirs.

    By hooks, so that whoever calls a block, or cuts or copies the model, computes the same.
    """
    entered: list[torch.autocast] = []  # of blocks that are running

    def enter(block: nn.Module, _: Any) -> None:
        context = torch.autocast(next(block.parameters()).device.type, torch.bfloat16)
        context.__enter__()
        entered.append(context)

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    for block in find_blocks(backbone):
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave, always_call=True)


def _resolve_dtype(dtype: str | torch.dtype) -> Any:
    """``"auto"``, or the torch dtype of a name."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    one_of("dtype", dtype, DTYPES)
    return getattr(torch, dtype)


def check_attention(attention: str | None) -> str | None:
    """The implementation that transformers is to use; None leaves it the choice."""
    if attention is None or attention == "auto":
        return None
    one_of("attention", attention, ATTENTIONS)
    flash = {
        "flash_attention_2": is_flash_attn_2_available,
        "flash_attention_3": is_flash_attn_3_available,
    }
    if attention in flash and not flash[attention]():
        allowed = "the package flash-attn installed and a CUDA GPU, or eager, sdpa, flex_attention"
        raise BadInput("attention", attention, allowed)
    return attention


def can_quantize() -> bool:
    """Whether bitsandbytes and a CUDA GPU are here."""
    return is_bitsandbytes_available() and torch.cuda.is_available()


def quantization(quantize: str | None) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the weights of linear maps; None leaves them as they are.

    8 bits: LLM.int8 (arXiv 2208.07339). 4 bits: NF4, computed in bfloat16 (arXiv 2305.14314).
    """
    if quantize is None or quantize == "none":
        return None
    one_of("quantize", quantize, QUANTIZATIONS)
    if not can_quantize():
        allowed = "bitsandbytes (pip install 'depthprobe[quantize]') and a CUDA GPU"
        raise BadInput("quantize", quantize, allowed)
    make: Any = BitsAndBytesConfig  # untyped in transformers
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    config: BitsAndBytesConfig = make(
        load_in_8bit=quantize == "8bit", load_in_4bit=quantize == "4bit", **four
    )
    return config


def check_torchao(field: str, value: object) -> None:
    """Refuse what needs torchao where it is not installed."""
    if not is_torchao_available():
        allowed = "torchao, which is not installed: pip install 'depthprobe[quantize]'"
        raise BadInput(field, value, allowed, fault=True)


# Where a backbone comes from.


def is_folder(source: Source) -> bool:
    """Whether this names a place on disk: what exists, and what can be no id of the hub."""
    text = os.fspath(source)
    if text == EMBEDDED or (isinstance(source, str) and not os.path.exists(text)):
        try:
            validate_repo_id(text)
        except HFValidationError:
            return True
        return False
    return True


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
    # the cache keeps files by commit; what the configuration object knows of it depends on the
    # version of transformers
    with one_line("found", source):
        file = hf_hub_download(
            os.fspath(source),
            "config.json",
            revision=revision or "main",
            local_files_only=offline(source),
        )
    return Path(file).parent.name


@contextmanager
def one_line(what: str, source: Source) -> Iterator[None]:
    """Turn a library's error into one line: ``what`` could not be done with the source."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # each family checks its configuration in its own ways
        first, *more = [*str(error).strip().splitlines(), type(error).__name__]
        reason = f"{first} {more[0].strip()}" if first.endswith(":") else first
        if isinstance(error, LocalEntryNotFoundError):
            reason = (
                "no such folder; the Hub can't be reached, and this id was not downloaded before"
            )
        elif isinstance(error, KeyError | IndexError):
            reason = f"{type(error).__name__}: {reason}"
        if pointer := _pointer(source):
            reason = f"{pointer} is a pointer of Git LFS and not the file: git lfs pull"
        allowed = f"cannot be {what} ({reason}); expected {ALLOWED}"
        raise BadInput("backbone", str(source), allowed, fault=True) from error


def _pointer(source: Source) -> str | None:
    """The name of a file of a folder in whose place a clone without Git LFS has a pointer."""
    folder = Path(_location(source))
    patterns = ("*.json", f"*{SAFE}", *BESIDE) if is_folder(source) else ()
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    small = (file for file in files if file.is_file() and file.stat().st_size < 1024)
    return next((file.name for file in small if file.read_bytes().startswith(LFS_POINTER)), None)


def _location(source: Source) -> str:
    """What the libraries are given: a path without ``~``, or the hub id."""
    return str(Path(source).expanduser()) if is_folder(source) else os.fspath(source)


def _origin(source: Source, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What the libraries' ``from_pretrained`` are given beside it, to find one commit's files."""
    if trust_remote_code and revision is None and not is_folder(source):
        raise BadInput("revision", None, "a commit or tag, required by trust_remote_code")
    return {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "local_files_only": offline(source),
    }


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


def embedded_backbone(seed: int = 0) -> PreTrainedModel:
    """The embedded backbone, float32, in evaluation mode; the same seed gives the same weights."""
    make: Any = LlamaForCausalLM  # untyped in transformers
    return _fresh(lambda: make(embedded_config()).float(), seed)


def _fresh(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """A model of random weights; the caller's random state is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach the GPUs too
        model = make()
    model.eval()
    return model


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
        attention: None or "auto" follows transformers; else one of its implementations, such as
            "eager", "sdpa" or "flash_attention_2".
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
    kind, chosen = _resolve_dtype(dtype), check_attention(attention)
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
    _origin(path_or_id, revision, trust_remote_code)  # code needs the caller's own revision
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
            return _fresh(lambda: _auto.from_config(config, **options), random_init)
    quantized = bool(getattr(config, "quantization_config", None))
    if quantized and "torchao" in str(config.quantization_config):
        check_torchao("backbone", str(path_or_id))
    if packed is not None and quantized:
        raise BadInput("quantize", quantize, "a checkpoint that is not quantised already")
    if not weights and not quantized:
        options["device_map"] = "meta"
    elif packed is not None:  # all of them on the GPU that ``cuda`` means here
        options |= {"quantization_config": packed, "device_map": {"": torch.cuda.current_device()}}
    origin = _origin(path_or_id, commit, trust_remote_code)
    weight_files(path_or_id, config, commit)  # checks them before they are read
    options |= origin
    with one_line("loaded", path_or_id):
        model, loaded = _auto.from_pretrained(
            _location(path_or_id),
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
        _check_files(path_or_id, files, model, whole_numbers=quantized)
        whole = weights and not quantized  # of a quantised weight what is stored says all
        stored = model.state_dict().items() if whole else _stored(files)
        if (name := not_finite(stored)) is not None:
            allowed = f"its weight {name} holds NaN or infinity: the checkpoint is damaged"
            if kind == torch.float16:
                allowed += ", or has weights beyond the range of float16 (bfloat16 has float32's)"
            raise BadInput("backbone", str(path_or_id), allowed, fault=True)
    if packed is not None:
        # A recommender holds the base model alone; without the marks there, LoRA would treat packed
        # bytes as weights.
        for name in QUANTIZED_MARKS:
            if hasattr(model, name):
                setattr(model.base_model, name, getattr(model, name))
    return model.eval()  # type: ignore[no-any-return]


def _tie_missing_head(source: Source, model: PreTrainedModel, loaded: dict[str, Any]) -> None:
    """Tie a head that alone is missing to the embeddings, for no recommender reads it.

    Checkpoints of embedding models have none, and some say all the same that theirs is not tied.
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
    """Refuse weights that are not those of the configuration."""
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


def weight_files(source: Source, config: PreTrainedConfig, commit: str | None = None) -> list[Path]:
    """The files of weights that are read: safetensors of the source's own folder alone.

    Of a hub id there are those that its index names and that are downloaded.
    """
    named = getattr(config, "transformers_weights", None)
    single, index = named or SAFE_WEIGHTS_NAME, named or SAFE_WEIGHTS_INDEX_NAME
    if not is_folder(source):
        try:
            file = hf_hub_download(
                os.fspath(source), index, revision=commit, local_files_only=offline(source)
            )
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return []
        return [path for path in _shards(source, Path(file)) if path.is_file()]
    folder = Path(_location(source))
    if single.endswith(SAFE) and (folder / single).is_file():
        return [folder / single]
    if (folder / index).is_file():
        return _shards(source, folder / index)
    allowed = f"no weights (*.safetensors) in it; expected {ALLOWED}"
    pickled = [file.name for file in sorted(folder.iterdir()) if file.suffix in PICKLED]
    if pickled:
        allowed = (
            f"only pickled weights in it ({pickled[0]}), which can run code when loaded:"
            " convert them with save_pretrained to safetensors"
        )
    raise BadInput("backbone", str(source), allowed, fault=True)


def _shards(source: Source, index: Path) -> list[Path]:
    """The files that an index names."""
    with one_line("loaded", source):
        names = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        for name in names:
            place = Path(name)
            if place.suffix != SAFE or place.is_absolute() or ".." in place.parts:
                allowed = f"{index.name} names {name!r}: expected safetensors files of its folder"
                raise BadInput("backbone", str(source), allowed, fault=True)
    return [index.parent / name for name in sorted(names)]


def _check_files(
    source: Source, files: Iterable[Path], model: PreTrainedModel, *, whole_numbers: bool
) -> None:
    """Refuse a weight in two files, of which transformers takes the last whatever the index says.

    And one of ``whole_numbers`` where none is expected: it would be read as if it had no scale.
    """
    holders: dict[str, str] = {}
    prefix = f"{model.base_model_prefix}."
    weights = {n.removeprefix(prefix) for n, p in model.named_parameters() if p.is_floating_point()}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                kind = file.get_slice(name).get_dtype()
                plain = whole_numbers or not kind.startswith(("I", "U", "BOOL"))
                if not plain and name.removeprefix(prefix) in weights:
                    allowed = f"its weight {name} is of whole numbers ({kind}), as if it were"
                    allowed += " quantised, but its configuration has no quantization_config"
                    raise BadInput("backbone", str(source), allowed, fault=True)
                first = holders.setdefault(name, path.name)
                if first != path.name and not HARMLESS.search(name):
                    allowed = f"{first} and {path.name} both hold its weight {name}: which is meant"
                    raise BadInput("backbone", str(source), f"{allowed} is not clear", fault=True)


def _stored(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of some files, one after the other."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first weight that holds NaN or infinity, if one does."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel() and not HARMLESS.search(name):
            # one pass without a copy; types of 8 bits have no order in torch
            ends = (weight if weight.element_size() > 1 else weight.float()).aminmax()
            if not all(math.isfinite(end) for end in ends):
                return name
    return None


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
        path = _existing(path_or_id)
        adapter = (path / ADAPTER_FILE).is_file()
        if not (path.is_file() or (path / "config.json").is_file()):
            hint = "; it holds an adapter: merge it into its base first" if adapter else ""
            allowed = f"{ALLOWED} (no config.json in it{hint})"
            raise BadInput("backbone", str(path_or_id), allowed)
        if adapter:
            raise BadInput("backbone", str(path_or_id), ADAPTER, fault=True)
    with one_line("found", path_or_id):
        location = _location(path_or_id)
        written, _ = PreTrainedConfig.get_config_dict(location, **origin)
        _check_depth(path_or_id, written)  # some classes make lists of that length
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
    """Refuse a configuration whose number of blocks is none, or beyond reason."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_depth(source, value)
        deep = type(value) is int and value > MOST_BLOCKS and DEPTHS.search(name)
        if deep or (name == "num_hidden_layers" and (type(value) is not int or value < 1)):
            allowed = f"{name} is {short(value)}: expected a whole number from 1 to {MOST_BLOCKS:,}"
            raise BadInput("backbone", str(source), allowed, fault=True)


def _existing(source: Source) -> Path:
    """The path of a source on disk; the libraries would take one that is not there for a hub id."""
    path = Path(_location(source))
    if not path.exists():
        raise BadInput("backbone", str(source), f"{ALLOWED} (no such folder)")
    return path


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
        folder = _existing(path_or_id)
        # Without any of these the library makes up an empty tokenizer.
        if not any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern)):
            raise BadInput(
                "backbone", str(path_or_id), "no tokenizer in it (tokenizer.json)", fault=True
            )
    origin = _origin(path_or_id, revision, trust_remote_code)
    with one_line("given a tokenizer", path_or_id):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _location(path_or_id), **origin
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
        from depthprobe.models.own import load_own  # it stands on this module

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
    """Which backbone exactly: the hub's commit, or ``sha256:`` of what decides its numbers.

    The first part is of configuration and weights; of a folder the second one is of all else that
    is read, such as the tokenizer's files.
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
    folder = Path(_location(settings.source))
    weights = weight_files(settings.source, pretrained_config(settings))
    beside = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
    parts = [_digest(_versions(files)) for files in ([folder / "config.json", *weights], beside)]
    return f"{HASH}{'-'.join(parts)}"


def is_same(recorded: str | None, revision: str) -> bool:
    """Whether a recorded revision is this one; early runs recorded its first part, or none."""
    return recorded is None or revision.startswith(recorded)


def _versions(files: Iterable[Path]) -> tuple[tuple[Path, int, int, int], ...]:
    """Files with what changes when they do."""
    states = ((path, path.stat()) for path in sorted(files))
    return tuple((path, each.st_ino, each.st_size, each.st_mtime_ns) for path, each in states)


def weights_hash(weights: Iterable[tuple[str, torch.Tensor]], also: str = "") -> str:
    """Sixteen digits of a hash of weights and their names, in any order."""
    digest = hashlib.sha256(also.encode())
    for name, weight in sorted(weights):
        digest.update(name.encode())
        plain = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()[:16]


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """A hash of the names and contents of files; read once, while they stay as they are."""
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(4 * 2**20):
                digest.update(chunk)
    return digest.hexdigest()[:16]


def pinned(settings: Backbone, recorded: str | None, source: str | None = None) -> Backbone:
    """The settings with what a run recorded when it began, whatever the names mean now.

    Args:
        settings: of the study.
        recorded: the :func:`backbone_revision`: a commit takes the place of a branch or tag, which
            may move; None changes nothing.
        source: as :func:`describe` recorded it: where a relative path led to from the folder in
            which the run began.
    """
    if recorded is None or settings.source == EMBEDDED:
        return settings
    if not recorded.startswith(HASH):
        return replace(settings, revision=recorded)
    if source is not None and Path(source).exists():
        return replace(settings, source=source)
    # it was a folder, so no id of the hub is meant
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
        "source": str(Path(_location(source)).absolute()) if on_disk else source,
        "revision": revision,
        "blocks": int(text_config.num_hidden_layers),
        "width": int(text_config.hidden_size),
        "family": str(text_config.model_type),
        "parameters": int(model.num_parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
