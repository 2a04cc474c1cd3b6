"""Where a backbone comes from: a folder or a commit on the hub; its files checked and hashed."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import ENDPOINT as HUB_ENDPOINT
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import safe_open
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from depthprobe.errors import BadInput
from depthprobe.models.embedded import EMBEDDED

Source = str | os.PathLike[str]
ALLOWED = f"a folder with config.json and safetensors weights, a Hugging Face id, or {EMBEDDED}"
COMMIT = re.compile(r"[0-9a-f]{40}")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
SAFE = ".safetensors"
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
# files besides configuration and weights that decide a model's numbers, or go into an export
BESIDE = (
    *TOKENIZER_FILES, SAFE_WEIGHTS_INDEX_NAME, "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "generation_config.json", "*.py",
)  # fmt: skip
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# Recomputed by the model: old checkpoints stored them.
HARMLESS = re.compile(
    r"(^|\.)(inv_freq|position_ids|masked_bias|cos_cached|sin_cached|attn\.bias|attention\.bias)$"
)


def is_folder(source: Source) -> bool:
    """Whether this names a place on disk: it exists, or it can't be an id of the hub."""
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
    """The commit that a hub id's branch or tag points to now; None for other sources.

    Without a network it is the commit in the local cache. No revision is ``main``.
    """
    if str(source) == EMBEDDED or is_folder(source):
        return None
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    # read the commit from the cache's path; not every version of transformers puts it into the
    # configuration object
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
    except Exception as error:  # families check their configurations in different ways
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
    """The name of a file that is only a Git LFS pointer, if the folder has one."""
    folder = Path(location_of(source))
    patterns = ("*.json", f"*{SAFE}", *BESIDE) if is_folder(source) else ()
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    small = (file for file in files if file.is_file() and file.stat().st_size < 1024)
    return next((file.name for file in small if file.read_bytes().startswith(LFS_POINTER)), None)


def location_of(source: Source) -> str:
    """What to pass to the libraries: a path without ``~``, or the hub id."""
    return str(Path(source).expanduser()) if is_folder(source) else os.fspath(source)


def origin_of(source: Source, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """Further arguments of ``from_pretrained``, to get the files of one commit."""
    if trust_remote_code and revision is None and not is_folder(source):
        raise BadInput("revision", None, "a commit or tag, required by trust_remote_code")
    return {
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "local_files_only": offline(source),
    }


def existing_path(source: Source) -> Path:
    """The path of a source on disk; the libraries would take one that is not there for a hub id."""
    path = Path(location_of(source))
    if not path.exists():
        raise BadInput("backbone", str(source), f"{ALLOWED} (no such folder)")
    return path


def weight_files(source: Source, config: PreTrainedConfig, commit: str | None = None) -> list[Path]:
    """The files of weights that are read: only safetensors of the source's own folder.

    For a hub id, the downloaded files that its index names.
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
    folder = Path(location_of(source))
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


def check_files(
    source: Source, files: Iterable[Path], model: PreTrainedModel, *, whole_numbers: bool
) -> None:
    """Refuse a weight that is in two files: transformers takes the last, whatever the index says.

    Without ``whole_numbers``, also refuse integer weights: they would be read without a scale.
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


def stored_in(files: Iterable[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of some files, one after the other."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                yield name, file.get_tensor(name)


def not_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first weight that holds NaN or infinity, if one does."""
    for name, weight in weights:
        if weight.is_floating_point() and weight.numel() and not HARMLESS.search(name):
            # one pass without a copy; torch can't compare 8-bit floats
            ends = (weight if weight.element_size() > 1 else weight.float()).aminmax()
            if not all(math.isfinite(end) for end in ends):
                return name
    return None


def weights_hash(weights: Iterable[tuple[str, torch.Tensor]], also: str = "") -> str:
    """Sixteen digits of a hash of weights and their names, in any order."""
    digest = hashlib.sha256(also.encode())
    for name, weight in sorted(weights):
        digest.update(name.encode())
        plain = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()[:16]


def files_hash(files: Iterable[Path]) -> str:
    """Sixteen digits of a hash of the names and contents of files."""
    states = ((path, path.stat()) for path in sorted(files))
    return _digest(tuple((path, s.st_ino, s.st_size, s.st_mtime_ns) for path, s in states))


@lru_cache(maxsize=8)
def _digest(files: tuple[tuple[Path, int, int, int], ...]) -> str:
    """Hash files; the rest of the key makes sure that a changed file is read again."""
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(4 * 2**20):
                digest.update(chunk)
    return digest.hexdigest()[:16]
