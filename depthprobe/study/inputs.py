"""What a study reads: the log, what of it stays, and the backbone."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from depthprobe.study.errors import BadInput, at_least, one_of

PROMPT = "Purchase history:"
# the library's own; any other name would be that of a kernel, that is code, to fetch from a hub
ATTENTIONS = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
QUANTIZATIONS = ("none", "8bit", "4bit")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; those left out are guessed from common spellings.

    A column is named as the table's header names it, or by its number from 1 in a CSV without a
    header. A log needs a user and an item column.

    Attributes:
        user: the column of users.
        item: the column of items.
        time: the column of times; a log may have none.
        rating: the column of ratings; needed by ``min_rating`` alone.
        title: the column of the items' titles.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    title: str | None = None

    def given(self) -> dict[str, str]:
        """The columns that were named, by what they hold."""
        return {what: name for what, name in asdict(self).items() if name is not None}


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """Which interactions stay; the steps come in the order of the keys.

    Attributes:
        min_rating: drop interactions rated lower.
        repeats: of a user's interactions with the same item keep all, the first, or the last.
        latest: keep so many of each user's.
        core: drop users and items with fewer interactions, again and again until none is left
            (k-core); 1 drops nothing.
    """

    min_rating: float | None = None
    repeats: Literal["keep", "first", "last"] = "keep"
    latest: int | None = None
    core: int = 1

    def __post_init__(self) -> None:
        one_of("data.cleaning.repeats", self.repeats, ("keep", "first", "last"))
        if self.min_rating is not None and not abs(self.min_rating) < float("inf"):
            raise BadInput("data.cleaning.min_rating", self.min_rating, "a number")
        at_least("data.cleaning", {"core": self.core}, 1)
        if self.latest is not None:
            at_least("data.cleaning", {"latest": self.latest}, 1)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the interactions come from, what is dropped, how much of a history a model reads.

    Attributes:
        source: a log (file or folder), a prepared folder, the name of a public set, or
            ``embedded``; a path is relative to where the command runs.
        format: one of those that ``depthprobe data list`` names; left out, the content tells.
        items: a file with the items' titles; left out, it is looked for beside the log.
        max_history: so many of a user's latest items are read.
        columns: names of a table's columns.
        cleaning: what is dropped.
    """

    source: str = "embedded"
    format: str | None = None
    items: str | None = None
    max_history: int = 50
    columns: Columns = Columns()
    cleaning: Cleaning = Cleaning()

    def __post_init__(self) -> None:
        at_least("data", {"max_history": self.max_history}, 1)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The pretrained decoder, what of it is trained, and the prompt before the items.

    Attributes:
        source: a folder with ``config.json`` and safetensors weights, a Hugging Face id, or
            ``embedded``.
        revision: branch, tag or commit of an id; left out, the hub's ``main``.
        trust_remote_code: run Python code that comes with the model; only with a ``revision``.
        dtype: of the weights; ``auto`` is the checkpoint's.
        attention: the implementation: ``auto`` (transformers' choice), ``eager``, ``sdpa``,
            ``flash_attention_2``, ``flash_attention_3`` or ``flex_attention``.
        quantize: store the weights of the blocks in fewer bits; on a GPU, with bitsandbytes, and
            with ``tuning`` ``lora`` or ``frozen`` alone.
        tuning: train every weight of the blocks (``full``), low-rank updates of the MLP projections
            (``lora``, as SLMRec does), or the adapters alone (``frozen``).
        lora_rank: the rank of those updates.
        prompt: what the model reads before the items; may be empty.
        suffix: what it reads after them, as SLMRec's response prompt; needs the objective ``last``.
        head: score by the dot product with the item table (``dot``, SLMRec), or by a linear map
            from the last state to the items (``linear``, E4SRec).
        checkpointing: compute the blocks again in the backward pass in place of keeping their
            activations: less memory, more time, the same numbers.
    """

    source: str = "embedded"
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    attention: str = "auto"
    quantize: Literal["none", "8bit", "4bit"] = "none"
    tuning: Literal["full", "lora", "frozen"] = "full"
    lora_rank: int = 16
    prompt: str = PROMPT
    suffix: str = ""
    head: Literal["dot", "linear"] = "dot"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        at_least("backbone", {"lora_rank": self.lora_rank}, 1)
        one_of("backbone.dtype", self.dtype, ("auto", "float32", "bfloat16"))
        one_of("backbone.attention", self.attention, ATTENTIONS)
        one_of("backbone.quantize", self.quantize, QUANTIZATIONS)
        one_of("backbone.tuning", self.tuning, ("full", "lora", "frozen"))
        one_of("backbone.head", self.head, ("dot", "linear"))
        if self.quantize != "none" and self.tuning == "full":
            allowed = "tuning = lora or frozen beside it: quantised weights can't be trained"
            raise BadInput("backbone.quantize", self.quantize, allowed)
        if self.trust_remote_code and not self.revision:
            raise BadInput("backbone.revision", None, "remote code needs a pinned revision")
