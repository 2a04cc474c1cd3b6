"""The timing rig: turns, budgets, shared weights, and that what is timed computes what it says."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from depthprobe.cost import table, timing
from depthprobe.cost.table import Workload
from depthprobe.cost.timing import (
    Action,
    Timing,
    encode_actions,
    measure,
    optimizer_of,
    step,
    summarize,
    times_faster,
)
from depthprobe.models import recommender
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import cut_copy, make_trainable
from depthprobe.models.recommender import Recommender, one_prompt
from depthprobe.study import Backbone

CPU = torch.device("cpu")


def run(actions: Mapping[str, Action], **options: Any) -> Timing:
    usual = {"batch": 4, "seconds": 1e9, "warmup": 2, "rounds": 3, "device": CPU}
    return measure(lambda batch: actions, **(usual | options))


class Clock:
    """A clock that only the timed calls move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def takes(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            self.now += seconds

        return call


def test_actions_take_turns_after_the_warm_up() -> None:
    calls: list[str] = []
    actions = {name: Action(lambda n=name: calls.append(n)) for name in "ab"}
    found = run(actions)
    assert "".join(calls) == "aabb" + "abababab"
    assert {name: len(values) for name, values in found.seconds.items()} == {"a": 3, "b": 3}
    assert (found.warmup, found.rounds) == (2, 3)


def test_rounds_end_with_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    actions = {"a": Action(clock.takes(1)), "b": Action(clock.takes(3))}
    found = run(actions, seconds=20, warmup=3, rounds=100)
    assert clock.now == 20
    assert (found.warmup, found.rounds) == (1, 3)
    assert found.seconds == {"a": [1, 1, 1], "b": [3, 3, 3]}


def test_one_round_is_always_taken_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run({"a": Action(Clock(monkeypatch).takes(9))}, seconds=5)
    assert (found.seconds, found.warmup, found.rounds) == ({"a": [9]}, 0, 1)


@pytest.mark.parametrize("work", [0, 30])
def test_the_first_call_does_not_count(monkeypatch: pytest.MonkeyPatch, work: int) -> None:
    clock = Clock(monkeypatch)
    costs = iter([9.0, 1.0])
    found = run({"train:30": Action(lambda: clock.takes(next(costs))(), work)}, seconds=5)
    assert (found.seconds, found.warmup, found.rounds) == ({"train:30": [1]}, 0, 1)


def test_what_would_take_many_budgets_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(monkeypatch)
    actions = {
        "train:30": Action(clock.takes(1000), work=90),
        "train:1": Action(clock.takes(2), work=3),  # so 30 blocks are expected to take 60
        "score": Action(clock.takes(1)),
    }
    found = run(actions, seconds=20)
    assert found.left_out == ("train:30",)
    assert set(found.seconds) == {"train:1", "score"}
    assert "train:30 left out, a call would take about 60 s" in caplog.text


def test_a_call_that_takes_long_makes_the_batch_smaller(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, began = Clock(monkeypatch), []

    def make(batch: int) -> dict[str, Action]:
        began.append(batch)
        return {f"train:{d}": Action(clock.takes(d * batch / 10), d * batch) for d in (1, 30)}

    found = measure(make, batch=128, seconds=60, warmup=0, rounds=1, device=CPU)
    # 30 blocks and 128 windows take 384 s, a quarter of the budget is 15
    assert began == [128, 8]
    assert (found.batch, found.seconds["train:30"]) == (8, [pytest.approx(24)])
    assert "a call would take about 384 s; trying steps of 8 windows" in caplog.text
    assert measure(make, batch=128, seconds=1e4, warmup=0, rounds=1, device=CPU).batch == 128


def test_the_budget_is_that_of_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def make(batch: int) -> dict[str, Action]:
        clock.now += 50 if batch == 128 else 0
        return {f"train:{d}": Action(clock.takes(d * batch / 128), d * batch) for d in (1, 30)}

    found = measure(make, batch=128, seconds=60, warmup=0, rounds=1000, device=CPU)
    # 52 s are lost with 128 windows, whose longest step would take twice a quarter of the budget
    assert (found.batch, clock.now) == (32, 52 + 2 * (0.25 + 7.5))


def test_progress_is_logged_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run({"a": Action(Clock(monkeypatch).takes(6))}, seconds=60, warmup=0, rounds=9)
    lines = [record.message for record in caplog.records]
    assert lines[0] == "timing 1 actions for about 60 s"
    assert lines[1:] == [
        "timing: first round, a, 12 s so far",
        *(f"timing: round {n} of 9, {6 * (n + 1)} s so far" for n in (3, 5, 7, 9)),
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    def make(batch: int) -> dict[str, Action]:
        def call() -> None:
            if batch > 4:
                raise error

        return {"a": Action(call)}

    options: dict[str, Any] = {"seconds": 1.0, "warmup": 0, "rounds": 1, "device": CPU}
    assert measure(make, batch=16, **options).batch == 4
    assert "trying steps of 8 windows" in caplog.text
    assert "trying steps of 4 windows" in caplog.text
    with pytest.raises(type(error)):
        measure(lambda batch: make(16), batch=2, **options)


def test_other_errors_are_no_lack_of_memory() -> None:
    def fail() -> None:
        raise RuntimeError("a kernel is missing")

    with pytest.raises(RuntimeError, match="kernel"):
        run({"a": Action(fail)})


# --- what is timed ---------------------------------------------------------------------------


@pytest.fixture
def model(llama_config: Callable[..., LlamaConfig]) -> Recommender:
    torch.manual_seed(0)
    made = Recommender(LlamaForCausalLM(llama_config()), torch.randn(21, 4), [1, 2])
    make_trainable(made, Backbone())
    return made


def test_depths_share_weights_and_optimiser(model: Recommender) -> None:
    half = cut_copy(model, range(2))
    assert (half.depth, model.depth) == (2, 4)
    assert {id(p) for p in half.parameters()} < {id(p) for p in model.parameters()}
    optimizer = optimizer_of(model, half)
    histories = torch.randint(1, 21, (3, 5))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for each in (model, half):
        step([lambda m=each: m(histories).square().sum()], optimizer)()
    block = find_blocks(model.backbone)
    assert optimizer.state[block[0].mlp.up_proj.weight]["step"] == 2
    assert optimizer.state[block[3].mlp.up_proj.weight]["step"] == 1
    for name, weight in model.named_parameters():
        assert torch.equal(before[name], weight) != weight.requires_grad, name
        assert weight.grad is None


def test_the_parts_of_a_timed_step_share_the_prompt(
    model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, run = [], recommender.shared_prompt
    monkeypatch.setattr(
        recommender, "shared_prompt", lambda *given, **named: runs.append(1) or run(*given, **named)
    )
    losses = [lambda: model(torch.randint(1, 21, (3, 5))).square().sum()] * 2
    step(losses, optimizer_of(model), around=partial(one_prompt, model))()
    assert len(runs) == 1
    step(losses, optimizer_of(model))()
    assert len(runs) == 3


def test_a_cut_copy_computes_what_the_first_blocks_do(model: Recommender) -> None:
    histories, lengths = torch.randint(1, 21, (3, 5)), torch.tensor([5, 5, 5])
    half = cut_copy(model, range(2)).eval()
    full = model.eval().encode(histories, lengths)
    kept = find_blocks(model.backbone)
    expected = half.encode(histories, lengths)
    del kept[2:]
    torch.testing.assert_close(model.encode(histories, lengths), expected)
    assert not torch.allclose(full, expected)


def test_an_answer_is_the_best_items(model: Recommender) -> None:
    histories, lengths = torch.randint(1, 21, (6, 5)), torch.full((6,), 5)
    actions = encode_actions({"4": model}, histories, lengths, items=model.item_matrix())
    assert set(actions) == {"score", "encode:4", "latency:4"}
    vectors = actions["encode:4"].call()
    assert isinstance(vectors, torch.Tensor)
    torch.testing.assert_close(vectors, model.eval().encode(histories, lengths))
    best = (vectors[:1] @ model.item_matrix().T).topk(10).indices
    assert torch.equal(torch.as_tensor(actions["latency:4"].call()), best)
    assert (actions["encode:4"].work, actions["latency:4"].work) == (6 * 4 * 5, 0)
    few = encode_actions({"4": model}, histories % 3, lengths, items=model.item_matrix()[:4])
    assert torch.as_tensor(few["score"].call()).shape == (6, 4)  # a catalogue of three items


def test_the_loss_of_parts_is_that_of_all(
    model: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "CHUNK", 4 * 21 * 4)  # four positions at a time
    drawn = [torch.randint(1, 21, (3, 5)) for _ in range(2)]
    parts = iter([(each, each) for each in drawn])
    monkeypatch.setattr(table, "_users", lambda *_: next(parts))
    found = table._next_item_loss(model, Workload(items=20), 3, CPU)()
    vectors = model(drawn[0]).flatten(0, 1)
    torch.testing.assert_close(
        found, cross_entropy(vectors @ model.item_matrix().T, drawn[1].flatten())
    )


# --- summaries -------------------------------------------------------------------------------


def test_a_summary_by_hand() -> None:
    # P(Bin(10, 1/2) < 2) = 11/1024 <= 2.5 % < P(Bin < 3) = 56/1024: the 2nd value from either end
    found = summarize([10, 9, 8, 7, 6, 5, 4, 3, 2, 1])
    assert (found.p50, found.low, found.high, found.n) == (5.5, 2, 9, 10)
    assert found.p90 == pytest.approx(9.1)
    few = summarize([3.0, 1.0, 2.0])
    assert few.p50 == 2
    assert math.isnan(few.low)
    assert math.isnan(few.high)


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    drawn = [summarize(rng.exponential(size=15).tolist()) for _ in range(2000)]
    held = np.mean([each.low <= math.log(2) <= each.high for each in drawn])
    assert 0.95 <= held <= 0.975  # 96.5 % by the binomial distribution


def test_faster_is_paired_by_round() -> None:
    noise = [1.0, 5.0, 2.0, 9.0, 1.0, 3.0, 4.0]  # a machine's, the same for both in a round
    found = times_faster([4 * x for x in noise], noise)
    assert (found.p50, found.low, found.high) == (4, 4, 4)


def test_the_machine_is_named() -> None:
    found = timing.machine(CPU)
    assert found["device"] == "cpu"
    assert found["device_name"]
