"""Which weights exactly: a hub commit, or a hash of the files or weights that are at hand."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from depthprobe.models.backbones import (
    EMBEDDED,
    embedded_backbone,
    folder_of,
    is_folder,
    pretrained,
    resolve_revision,
)
from depthprobe.study import Backbone

CHUNK = 4 * 2**20
HASHED = "sha256:"


def backbone_revision(settings: Backbone) -> str:
    """The hub's commit, or ``sha256:`` of the configuration and the weights; loads no model.

    Raises:
        BadInput: if the hub has no such model or revision.
    """
    if settings.source == EMBEDDED:
        return _hash_embedded()
    if is_folder(settings.source):
        return _hash_folder(folder_of(settings.source))
    return str(resolve_revision(settings.source, settings.revision))


def pinned(settings: Backbone, recorded: str | None) -> Backbone:
    """The settings with the recorded commit in place of a branch or tag, which may move.

    Args:
        recorded: what :func:`backbone_revision` gave when the run began; None and hashes change
            nothing.
    """
    if recorded is None or recorded.startswith(HASHED):
        return settings
    return replace(settings, revision=recorded)


def pinned_now(settings: Backbone) -> Backbone:
    """The settings with the commit that their branch or tag points to now; a folder has none.

    Raises:
        BadInput: if the hub has no such model or revision.
    """
    return pinned(settings, resolve_revision(settings.source, settings.revision))


def describe(settings: Backbone, revision: str) -> dict[str, Any]:
    """What a run records of its backbone; loads it, so that weights that are missing are refused.

    Args:
        revision: what :func:`backbone_revision` says.

    Raises:
        BadInput: if it can't be loaded.
    """
    model = pretrained(settings)
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


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return f"{HASHED}{digest.hexdigest()[:16]}"


def _hash_embedded() -> str:
    model = embedded_backbone()
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().flatten().view(torch.uint8).numpy())
    return f"{HASHED}{digest.hexdigest()[:16]}"
