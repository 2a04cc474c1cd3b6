"""A user's own trained recommender: what it must offer, and how it takes the place of ours.

A function builds it, ``my_package.my_module:build``. Everything that probes, cuts, trains and
measures works on an :class:`OwnRecommender` as on our recommender.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from depthprobe.errors import BadInput, closest, one_line
from depthprobe.models.blocks import PlainDecoder, find_decoder, refusal
from depthprobe.models.recommender import Recommender, states_at
from depthprobe.models.sources import weights_hash

FIELD = "backbone.source"
REQUIRED = ("backbone", "states", "item_matrix")


class OwnRecommender(Recommender):
    """Wraps a user's recommender with the interface of ours; items are numbered as in the log."""

    rows: Tensor | None

    def __init__(self, own: Any, item_ids: Sequence[str] | None = None) -> None:
        """Wrap a user's object.

        Args:
            own: an ``nn.Module`` with ``backbone``, ``states`` and ``item_matrix``; docs/own.md
                says what they are, and what else it may offer.
            item_ids: of the log, items 1..I; None: items are numbered as the object has them.

        Raises:
            BadInput: if something is missing, or it does not know an item of the log.
        """
        nn.Module.__init__(self)
        _check_offers(own)
        self.own = own
        if isinstance(own.backbone, PreTrainedModel) or hasattr(own.backbone, "peft_config"):
            self.backbone = find_decoder(own.backbone)
        else:
            self.backbone = PlainDecoder(own)
        self.words = self.input_adapter = self.output_adapter = self.head = None
        device = own.item_matrix().device
        for name in ("prompt", "suffix"):
            self.register_buffer(name, torch.empty(0, dtype=torch.long, device=device))
        self.lead, self.checkpointing = 0, False
        rows = None if item_ids is None else _rows(own, item_ids)
        self.register_buffer("rows", None if rows is None else rows.to(device))
        matrix = own.item_matrix()
        tables = (module for module in own.modules() if isinstance(module, nn.Embedding))
        table = next((module for module in tables if module.weight is matrix), None)
        self.items: Any = table  # if it is a table of its own

    @property
    def prompt_mode(self) -> Any:
        """Not ours to know: the recommender handles its own prompt."""
        return "shared" if hasattr(self.own, "prepare_prompt") else "none"

    @property
    def own_loss(self) -> Any:
        """Its own loss: histories (B, T), lengths (B,), targets (B, T) -> scalar; or None."""
        return getattr(self.own, "loss", None)

    def loss(self, histories: Tensor, lengths: Tensor, targets: Tensor) -> Tensor:
        """The mean of its own loss; a target of 0 does not count."""
        loss: Tensor = self.own.loss(self._own(histories), lengths, self._own(targets))
        return loss

    def _own(self, items: Tensor) -> Tensor:
        """Map items of the log to rows of the recommender's matrix."""
        return items if self.rows is None else self.rows[items]

    def item_matrix(self) -> Tensor:
        """The matrix that scores user vectors, (I + 1, d), in the order of the log."""
        matrix: Tensor = self.own.item_matrix()
        return matrix if self.rows is None else matrix[self.rows]

    def read_out(self, states: Tensor) -> Tensor:
        """Normed states (..., D) to user vectors (..., d)."""
        own = getattr(self.own, "read_out", None)
        return states if own is None else own(states)

    def last_place(self, histories: Tensor, lengths: Tensor) -> Tensor:
        """Where, in a block's output, users are read out: (B, T) and (B,) -> (B,)."""
        own = getattr(self.own, "last_place", None)
        return lengths - 1 if own is None else own(self._own(histories), lengths)

    def after_items(self, states: Tensor, histories: Tensor) -> Tensor:
        """Of a block's output (B, P, D), the states after each item, (B, T, D)."""
        own = getattr(self.own, "after_items", None)
        if own is not None:
            return own(states, self._own(histories))  # type: ignore[no-any-return]
        return states[:, : histories.shape[1]]

    def prepare_prompt(self) -> Any:
        """Compute what its passes share for all users."""
        own = getattr(self.own, "prepare_prompt", None)
        if own is None:
            return None
        with self._running():
            return own()

    def states(
        self, histories: Tensor, lengths: Tensor | None = None, prompt: Any = None
    ) -> Tensor:
        """States behind the final norm, (B, T) and (B,) -> (B, P, D)."""
        given = (histories != 0).sum(dim=1) if lengths is None else lengths
        prompt = prompt or self.prepare_prompt()
        rows, more = self._own(histories), () if prompt is None else (prompt,)
        with self._running():
            if isinstance(self.backbone, PlainDecoder):
                out: Tensor = self.backbone(rows, given, *more)[0]
            else:
                out = self.own.states(rows, given, *more)
        return out.to(self.own.item_matrix().dtype)

    def forward(
        self,
        histories: Tensor,
        lengths: Tensor | None = None,
        prompt: Any = None,
        *,
        states: bool = False,
    ) -> Tensor:
        """User vectors after every item, (B, T, d); with lengths after the last one, (B, d)."""
        out = self.states(histories, lengths, prompt)
        if states:
            return out
        if lengths is None:
            return self.read_out(self.after_items(out, histories))
        return self.read_out(states_at(out, self.last_place(histories, lengths)))

    encode = forward

    def update_configs(self) -> None:
        """Update the configurations of models around a cut decoder before they are saved."""
        for module in self.own.modules():
            if isinstance(module, PreTrainedModel) and find_decoder(module) is self.backbone:
                module.config = self.backbone.config


def load_own(source: str, item_ids: Sequence[str] | None = None) -> OwnRecommender:
    """Build a user's recommender, ``module:function``, in evaluation mode; or ``BadInput``."""
    module, _, name = source.partition(":")
    if os.getcwd() not in sys.path:  # as for ``python -m``
        sys.path.insert(0, os.getcwd())
    with code_of(source, "its module can't be imported"):
        found = importlib.import_module(module)
    function = getattr(found, name, None)
    if not callable(function):
        mine = [each for each, of in vars(found).items() if isinstance(of, FunctionType)]
        hint = "".join(f" (did you mean {each}?)" for each in closest(name, mine, most=1))
        raise BadInput(FIELD, source, f"its module has no function {name}{hint}", fault=True)
    with code_of(source, f"{name}() fails"):
        own = function()
    try:
        return OwnRecommender(own, item_ids).eval()
    except BadInput as error:
        raise BadInput(FIELD, source, error.allowed, fault=True) from error


@contextmanager
def code_of(source: str, fault: str) -> Iterator[None]:
    """Run a user's code: its output goes to stderr, and its errors become one line."""
    try:
        with redirect_stdout(sys.stderr):  # stdout is only for results
            yield
    except BadInput:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{fault} ({type(error).__name__}: {one_line(error)})"
        raise BadInput(FIELD, source, reason, fault=True) from error


@lru_cache(maxsize=2)
def own_facts(source: str) -> tuple[PreTrainedConfig, str]:
    """The configuration of a user's decoder, and a hash of its weights; built once a process."""
    model = load_own(source)
    return model.backbone.config, own_digest(model)


def own_digest(model: OwnRecommender) -> str:
    """A hash of a user's weights and buffers."""
    return weights_hash([*model.own.named_parameters(), *model.own.named_buffers()])


def _check_offers(own: Any) -> None:
    """Refuse an object that lacks what is required; the caller adds its source."""
    if not isinstance(own, nn.Module):
        raise refusal(
            own, f"expected a torch.nn.Module, got an object of type {type(own).__name__}"
        )
    for name in REQUIRED:
        if not hasattr(own, name):
            raise refusal(own, f"{type(own).__name__} has no {name}")
    if not isinstance(own.backbone, nn.Module):
        raise refusal(own, f"{type(own).__name__}.backbone is no torch.nn.Module")
    matrix = cast("Any", own).item_matrix()
    if not isinstance(matrix, Tensor) or matrix.dim() != 2 or len(matrix) < 2:
        shape = tuple(getattr(matrix, "shape", ()))
        raise refusal(own, f"{type(own).__name__}.item_matrix() is {shape}, not (items + 1, width)")


def _rows(own: Any, item_ids: Sequence[str]) -> Tensor | None:
    """Row of the matrix by item of the log, (I + 1,); None where both have the same order."""
    size = len(own.item_matrix())
    names = getattr(own, "item_ids", None)
    if names is None:
        if size != len(item_ids) + 1:
            reason = f"its item_matrix has {size:,} rows for {len(item_ids):,} items of the log and"
            raise refusal(own, f"{reason} padding: give it item_ids")
        return None
    if isinstance(names, dict):  # rows by id or ids by row: it can't be decided
        reason = "its item_ids are a dict, not a list: raw ids of rows 1, 2, ..."
        raise refusal(own, reason)
    names = names.tolist() if isinstance(names, Tensor) else names
    numbers = {str(raw): row for row, raw in enumerate(names, start=1)}
    if len(numbers) != size - 1:
        reason = f"its item_ids are {len(numbers):,} different ones for {size - 1:,} rows"
        raise refusal(own, f"{reason} of item_matrix")
    unknown = [str(raw) for raw in item_ids if str(raw) not in numbers]
    if unknown:
        reason = f"it does not know {len(unknown):,} of {len(item_ids):,} items of the log"
        reason += f", such as {unknown[0]!r}: its own are like {next(iter(numbers))!r}"
        raise refusal(own, reason)
    rows = torch.tensor([0, *(numbers[str(raw)] for raw in item_ids)])
    return None if torch.equal(rows, torch.arange(size)) else rows
