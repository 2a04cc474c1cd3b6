"""Which blocks of a backbone are built alike, so that what one costs all of them cost."""

from __future__ import annotations

from typing import Any

from torch import nn

from depthprobe.models.blocks import find_blocks
from depthprobe.models.cutting import INDEX_ATTRIBUTE, block_kinds


def first_alike(backbone: nn.Module) -> list[int]:
    """For each block the first one that is built like it, (L,) indices.

    Alike are blocks of the same sub-modules, shapes and settings, of which the configuration says
    the same too; numbers that only say where in the model a block is don't count.

    Raises:
        ValueError: as :func:`find_blocks`.
    """
    blocks = find_blocks(backbone)
    config: Any = backbone.config
    said = block_kinds(config)
    seen: dict[Any, int] = {}
    return [
        seen.setdefault((kind, _build(block)), index)
        for index, (block, kind) in enumerate(zip(blocks, said, strict=True))
    ]


def _build(block: nn.Module) -> tuple[Any, ...]:
    """Class, settings and shapes of every sub-module, hashable."""
    return tuple(
        (
            path,
            type(module),
            id(vars(module).get("forward")),  # one of its own (a skipped block's) is like no other
            tuple(
                sorted(
                    (name, repr(value))
                    for name, value in vars(module).items()
                    if _is_setting(name, value)
                )
            ),
            tuple(
                (name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None
            ),
        )
        for path, module in block.named_modules()
    )


def _is_setting(name: str, value: object) -> bool:
    # floats scale what is computed and never its shape
    plain = isinstance(value, bool | int | str | None)
    return plain and not name.startswith("_") and not INDEX_ATTRIBUTE.search(name)
