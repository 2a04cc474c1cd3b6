"""What is computed when cost is counted, predicted or measured: users, catalogue, training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthprobe.errors import BadInput

DTYPES = ("auto", "float32", "bfloat16", "float16")
TUNINGS = ("full", "lora", "frozen")
TOP = 10  # items of an answer


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of users with full histories, a catalogue, and what of the model is trained.

    ``batch`` None: one is found that keeps the device busy. ``prompt``: slots before the items,
    computed once for all users. ``width``: of the item table. ``dtype``: of the backbone; auto
    follows the configuration. ``seconds``: how long to measure; 0 measures nothing.
    """

    batch: int | None = None
    length: int = 30
    items: int = 10_000
    width: int = 64
    prompt: int = 0
    dtype: str = "auto"
    tuning: Literal["full", "lora", "frozen"] = "full"
    seconds: float = 20.0

    def __post_init__(self) -> None:
        whole = {"batch": self.batch, "length": self.length, "width": self.width}
        for name, value in whole.items():
            if value is not None and value < 1:
                raise BadInput(name, value, "a whole number of at least 1")
        if self.items < TOP:
            raise BadInput("items", self.items, f"a whole number of at least {TOP}")
        if self.prompt < 0:
            raise BadInput("prompt", self.prompt, "a whole number of at least 0")
        if self.dtype not in DTYPES:
            raise BadInput("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.tuning not in TUNINGS:
            raise BadInput("tuning", self.tuning, f"one of {', '.join(TUNINGS)}")
        if not 0 <= self.seconds < float("inf"):
            raise BadInput("seconds", self.seconds, "a number of at least 0")
