"""Recommenders from settings: parts where the backbone is, the same parts for the same seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from depthprobe.models.backbones import embedded_backbone
from depthprobe.models.build import WEIGHTS, around, build_recommender, load_trained, save_trained
from depthprobe.study import Backbone


def test_the_parts_are_where_the_backbone_is():
    """A quantised backbone is on a GPU before its recommender is made; the meta device is here."""
    backbone = embedded_backbone().to("meta")
    settings = Backbone(prompt="", tuning="frozen")
    model = around(backbone, settings, torch.randn(5, 3), seed=0)
    assert {p.device.type for p in (*model.parameters(), *model.buffers())} == {"meta"}
    assert torch.empty(1).device.type == "cpu"


def test_a_seed_decides_the_adapters_and_a_random_backbone_alone():
    items = torch.randn(5, 3)
    first, again = (build_recommender(Backbone(), items, kept=(0, 3), seed=1) for _ in range(2))
    other = build_recommender(Backbone(), items, kept=(0, 3), seed=2)
    control = build_recommender(Backbone(), items, kept=(0, 3), seed=1, random_init=True)
    assert first.depth == 2
    weights = [model.input_adapter.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    inside = [m.backbone.layers[1].mlp.up_proj.weight for m in (first, other, control)]
    assert torch.equal(inside[0], inside[1])
    assert not torch.equal(inside[0], inside[2])


def test_weights_that_were_damaged_are_named(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    save_trained(model, tmp_path)
    load_trained(model, tmp_path)
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match=f"{WEIGHTS} is damaged .* delete its trial"):
        load_trained(model, tmp_path)
