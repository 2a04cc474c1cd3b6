"""Weights in fewer bits: what they stand for, what they take, and that they come back from disk."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from depthprobe.cost.size import count_parameters, served_bytes
from depthprobe.errors import BadInput
from depthprobe.evaluation.ranks import rank_users
from depthprobe.models.blocks import find_blocks
from depthprobe.models.build import cut_copy
from depthprobe.models.export import load_recommender, write_recommender
from depthprobe.models.families import family_config
from depthprobe.models.precision import compute_in_bfloat16
from depthprobe.models.quantize import (
    GROUP,
    SCHEMES,
    check_scheme,
    int8_rows,
    make_ready,
    quantize,
)
from depthprobe.models.recommender import Recommender, score
from depthprobe.models.tiny import tiny_model

pytest.importorskip("torchao", reason="in the extra dev")
BLOCKS = [scheme for scheme in SCHEMES if scheme != "int8-items"]
HISTORIES, LENGTHS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]]), torch.tensor([5, 3])
ITEMS = 10

Make = Callable[..., tuple[Recommender, PreTrainedModel]]


@pytest.fixture
def make(llama_config: Callable[..., Any]) -> Make:
    """``make(head=..., **config)``: a recommender on a small Llama, and its causal model."""

    def build(head: Any = "dot", **changes: Any) -> tuple[Recommender, PreTrainedModel]:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        whole = LlamaForCausalLM(llama_config(**sizes | changes)).eval()
        for weight in whole.model.layers.parameters():
            weight.data.mul_(5 if weight.dim() > 1 else 1)
        items = torch.randn(ITEMS + 1, 8)
        items[0] = 0
        return Recommender(whole, items, [1, 2], head=head).eval(), whole

    return build


@torch.inference_mode()
def answers(model: Recommender) -> Tensor:
    vectors = model.encode(HISTORIES, LENGTHS)
    return score(vectors, model.item_matrix())


def maps(model: Recommender) -> dict[str, nn.Linear]:
    named = find_blocks(model.backbone).named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Linear)}


def by_hand(weight: Tensor, scheme: str) -> Tensor:
    """What a row's numbers become, one group of them after the other.

    In float32: the greatest of a row lies between two steps, and either would be as near.
    """
    rows = []
    for row in weight:
        for group in row.split(GROUP if scheme == "int4" else len(row)):
            if scheme == "int4":
                step = ((group.max() - group.min()) / 15).bfloat16().float()
                middle = (group.min() + 8 * step).bfloat16().float()
                rows.append(middle + step * ((group - middle) / step).round().clamp(-8, 7))
            else:
                step = group.abs().max() / 127.5
                rows.append(step * (group * (1 / step)).round().clamp(-128, 127))
    return torch.cat(rows).view_as(weight)


def test_a_model_computes_with_the_weights_it_was_rounded_to(make: Make) -> None:
    model, _ = make()
    expected = copy.deepcopy(model)
    for module in (*maps(expected).values(), expected.token_embeddings):
        module.weight.data = by_hand(module.weight.detach(), "int8")
    before = answers(model)
    quantize(model, "int8")
    make_ready(model.backbone)
    torch.testing.assert_close(answers(model), answers(expected), atol=2e-4, rtol=2e-3)
    assert not torch.allclose(answers(model), before, atol=2e-4, rtol=2e-3)


def test_int4_maps_compute_with_sixteen_steps_a_group_in_bfloat16(make: Make) -> None:
    model, _ = make()
    plain = {name: module.weight.detach() for name, module in maps(model).items()}
    quantize(model, "int4")
    make_ready(model.backbone)
    for name, module in maps(model).items():
        inputs = torch.randn(7, module.in_features)
        found, rounded, whole = (
            module(inputs), inputs @ by_hand(plain[name], "int4").T, inputs @ plain[name].T
        )  # fmt: skip
        assert found.dtype == torch.float32
        assert (found - rounded).norm() < 0.015 * whole.norm()  # bfloat16 has eight bits
        assert (found - whole).norm() > 0.04 * whole.norm()


def test_dynamic_int8_rounds_the_inputs_of_each_position(make: Make) -> None:
    model, _ = make(num_hidden_layers=1)
    module = maps(model)["0.mlp.down_proj"]
    inputs, weight = torch.randn(3, 5, 64) * torch.rand(3, 5, 1), module.weight.detach()
    quantize(model, "int8-dynamic")
    expected = by_hand(inputs.flatten(0, 1), "int8") @ by_hand(weight, "int8").T
    found = module(inputs).flatten(0, 1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    plain = inputs.flatten(0, 1) @ weight.T
    assert not torch.allclose(found, plain, atol=1e-4, rtol=1e-3)


def test_int4_numbers_are_those_of_torchao(make: Make) -> None:
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    model, _ = make()
    plain = {name: module.weight.detach() for name, module in maps(model).items()}
    quantize(model, "int4")
    make_ready(model.backbone)
    for name, module in maps(model).items():
        theirs = Int4OpaqueTensor.from_hp(plain[name].bfloat16(), [1, GROUP])
        ours: Any = module.weight
        # they compute the steps in bfloat16 too, and so do some numbers fall on the next one
        torch.testing.assert_close(
            ours.scale_and_zero, theirs.scale_and_zero, atol=0.004, rtol=0.02
        )
        assert (ours.qdata != theirs.qdata).float().mean() < 0.1


def test_a_copy_leaves_the_weights_that_it_shared(make: Make) -> None:
    model, _ = make()
    before = answers(model)
    twin = cut_copy(model, [0])
    for scheme in SCHEMES:
        quantize(cut_copy(twin, [0]), scheme)
    assert torch.equal(answers(model), before)


@pytest.mark.parametrize(("scheme", "bfloat16", "a_weight"), [
    ("int8", False, 1), ("int8-dynamic", True, 1), ("int4", False, 0.5), ("int4", True, 0.5),
])  # fmt: skip
def test_bytes_are_counted_one_by_one(
    make: Make, scheme: str, bfloat16: bool, a_weight: float
) -> None:
    model, _ = make()
    plain, counts = served_bytes(model, bfloat16=bfloat16), count_parameters(model)
    size = 2 if bfloat16 else 4
    assert plain["blocks"] == size * counts["blocks"]
    assert plain["item_table"] == 4 * counts["item_table"]
    assert plain["total"] == sum(plain[part] for part in plain if part != "total")
    expected = 0.0
    for module in maps(model).values():
        rows, columns = module.weight.shape
        # a float32 scale and torchao's offset of a byte, which is 0; or two of bfloat16 a group
        beside = 4 * rows * columns / GROUP if scheme == "int4" else 5 * rows
        expected += a_weight * rows * columns + beside
    norms = counts["blocks"] - sum(m.weight.numel() for m in maps(model).values())
    quantize(model, scheme, bfloat16=bfloat16)
    make_ready(model.backbone)
    found = served_bytes(model, bfloat16=bfloat16)
    assert found["blocks"] == expected + size * norms
    tokens, width = model.token_embeddings.weight.shape
    assert found["token_embeddings"] == tokens * (width + 5)
    same = {"adapters", "item_table"}
    assert {part: found[part] for part in same} == {part: plain[part] for part in same}
    assert count_parameters(model)["blocks"] == counts["blocks"]


def test_what_two_maps_share_is_rounded_and_counted_once(make: Make) -> None:
    model, _ = make()
    first, second = (maps(model)[f"{block}.mlp.up_proj"] for block in (0, 1))
    second.weight = first.weight
    alone = served_bytes(model)["blocks"]
    quantize(model, "int8")
    assert second.weight is first.weight
    assert served_bytes(model)["blocks"] < alone / 3


def test_maps_whose_sizes_the_kernel_has_not_stay_whole(make: Make) -> None:
    model, _ = make(intermediate_size=40)  # as rows no multiple of 16, as columns none of 32
    quantize(model, "int4")
    kinds = {name: type(module.weight).__name__ for name, module in maps(model).items()}
    assert {kinds[name] for name in kinds if "mlp" in name} == {"Parameter"}
    assert {kinds[name] for name in kinds if "attn" in name} == {"Int4Tensor"}


def test_what_cannot_be_rounded_is_refused_in_one_line(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = make(hidden_size=16, intermediate_size=24)
    with pytest.raises(BadInput, match="rows in 16s and columns in 32s .those of this llama"):
        quantize(model, "int4")
    quantize(model, "int8")
    with pytest.raises(BadInput, match="not quantised already"):
        quantize(model, "int8")
    with pytest.raises(BadInput, match="on cuda take int8"):
        check_scheme("int4", torch.device("cuda"))
    check_scheme("int8", torch.device("cuda"))
    monkeypatch.setattr("depthprobe.models.precision.is_torchao_available", lambda: False)
    with pytest.raises(BadInput, match=r"pip install 'depthprobe\[quantize\]'"):
        quantize(make()[0], "int8")


@pytest.mark.parametrize("head", ["dot", "linear"])
def test_int8_items_are_scored_and_read_in_chunks(
    make: Make, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("depthprobe.models.recommender.ROW_BYTES", 300)  # a few rows at a time
    model, _ = make(head=head)
    expected = copy.deepcopy(model)
    for module in filter(None, (expected.items, expected.head)):
        weight = module.weight.data
        steps = (weight.abs().amax(1, keepdim=True) / 127.5).clamp_min(1e-9)
        module.weight.data = steps * (weight * (1 / steps)).round().clamp(-128, 127)
    quantize(model, "int8-items")
    torch.testing.assert_close(answers(model), answers(expected), atol=1e-5, rtol=1e-5)
    vectors = torch.randn(4, model.item_matrix().shape[1])
    asked = {"targets": [1, 5, 9, 10], "top": 3}
    with torch.inference_mode():
        found = rank_users(vectors, model.item_matrix(), **asked)  # type: ignore[arg-type]
    wanted = rank_users(vectors, expected.item_matrix(), **asked)  # type: ignore[arg-type]
    assert {name: ranks.tolist() for name, ranks in found.items()} == {
        name: ranks.tolist() for name, ranks in wanted.items()
    }


def test_an_item_of_zeros_stays_zero() -> None:
    table = torch.zeros(2, 3)
    table[1] = torch.tensor([1.0, -2.0, 0.5])
    rounded: Any = int8_rows(table)
    assert rounded.dequantize()[0].tolist() == [0, 0, 0]


def write(folder: Path, model: Recommender, whole: PreTrainedModel, precision: Any) -> None:
    folder.mkdir()
    write_recommender(
        folder,
        model,
        whole,
        item_ids=[f"i{item}" for item in range(1, ITEMS + 1)],
        titles=None,
        max_history=8,
        filter_seen=False,
        precision=precision,
    )


def check_reload(
    folder: Path, model: Recommender, whole: PreTrainedModel, scheme: str, precision: str
) -> None:
    """Round, write, compute in memory, and read again: the same to the last bit."""
    quantize(model, scheme, bfloat16=precision == "bfloat16")
    write(folder, model, whole, precision)
    if precision == "bfloat16":
        compute_in_bfloat16(model.backbone)
    make_ready(model.backbone)
    assert torch.equal(answers(load_recommender(folder).model), answers(model))  # type: ignore[arg-type]


def stored(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_folder_holds_the_few_bits_and_ranks_the_same(
    make: Make, scheme: str, precision: str, tmp_path: Path
) -> None:
    model, whole = make()
    folder = tmp_path / "model"
    check_reload(folder, model, whole, scheme, precision)
    blocks = {n: k for n, k in stored(folder / "model.safetensors").items() if "_proj" in n}
    rows = stored(folder / "recommender.safetensors")
    if scheme == "int8-items":
        assert {*blocks.values()} == {"F32"}
        assert rows["items._weight_qdata"] == "I8"
        return
    assert {kind for name, kind in blocks.items() if name.endswith("qdata")} == {"I8"}
    assert not any(name.endswith("_proj.weight") for name in blocks)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "torchao"
    assert config["modules_to_not_convert"] == ["lm_head"]
    assert stored(folder / "model.safetensors")["model.embed_tokens._weight_qdata"] == "I8"


@pytest.mark.parametrize("scheme", ["int8", "int8-dynamic"])
def test_transformers_reads_the_folder_alone(make: Make, scheme: str, tmp_path: Path) -> None:
    model, whole = make()
    quantize(model, scheme)
    write(tmp_path / "model", model, whole, "float32")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([[1, 2, 3]])
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, whole(tokens).logits)


def test_a_tied_head_is_stored_once(make: Make, tmp_path: Path) -> None:
    model, whole = make(tie_word_embeddings=True)
    check_reload(tmp_path / "model", model, whole, "int8", "float32")
    assert not any("lm_head" in name for name in stored(tmp_path / "model/model.safetensors"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_a_damaged_folder_is_refused_in_one_line(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = make(head="linear")
    quantize(model, "int8-items")
    folder = tmp_path / "model"
    model.head.weight.scale[3] = torch.nan  # type: ignore[union-attr]
    write(folder, model, whole, "float32")
    with pytest.raises(BadInput, match="holds NaN"):
        load_recommender(folder)
    model.head.weight.scale[3] = 1.0  # type: ignore[union-attr]
    quantized = copy.deepcopy(model)
    quantize(quantized, "int8")
    for name, written in (("items", model), ("blocks", quantized)):
        write(tmp_path / name, written, whole, "float32")
        with monkeypatch.context() as patch:
            patch.setattr("depthprobe.models.precision.is_torchao_available", lambda: False)
            with pytest.raises(BadInput, match=r"pip install 'depthprobe\[quantize\]'"):
                load_recommender(tmp_path / name)
    with pytest.raises(BadInput, match="float32"):
        load_recommender(tmp_path / "items", float32=True)


# Each rounded, written and read again; the page says so of them, and why not of the others.
SUPPORTED = (
    "llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "phi", "phi3", "opt",
    "gpt_neox", "bloom", "olmo2", "smollm3", "stablelm", "starcoder2", "mamba",
)  # fmt: skip
REFUSED = ("gpt2", "falcon")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", SUPPORTED)
def test_every_scheme_works_on_a_family(kind: str, precision: str, tmp_path: Path) -> None:
    whole = tiny_model(family_config(kind), depth=3).float()
    for scheme in SCHEMES:
        own = copy.deepcopy(whole)
        model = Recommender(own, torch.randn(ITEMS + 1, 8), [1, 2]).eval()
        check_reload(tmp_path / scheme, model, own, scheme, precision)


@pytest.mark.slow
@pytest.mark.parametrize("kind", REFUSED)
def test_families_without_plain_linear_maps_are_refused(kind: str, tmp_path: Path) -> None:
    whole = tiny_model(family_config(kind), depth=3).float()
    model = Recommender(whole, torch.randn(ITEMS + 1, 8), [1, 2]).eval()
    for scheme in BLOCKS:
        with pytest.raises(BadInput, match=f"those of this {kind} have none"):
            quantize(model, scheme)
    check_reload(tmp_path / "model", model, whole, "int8-items", "float32")


@pytest.mark.slow
def test_experts_that_are_one_weight_stay_whole() -> None:
    whole = tiny_model(family_config("mixtral"), depth=2).float()
    model = Recommender(whole, torch.randn(ITEMS + 1, 8), [1, 2]).eval()
    before = served_bytes(model)["blocks"]
    quantize(model, "int8")
    after = served_bytes(model)["blocks"]
    experts = sum(p.nbytes for n, p in model.named_parameters() if "experts" in n)
    assert experts < after < before
