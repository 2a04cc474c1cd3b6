"""SASRec equals a plain one that computes its padding, is causal, drops what it is told to."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import multi_head_attention_forward, pad, relu

from depthprobe.models.recommender import Popularity
from depthprobe.models.sasrec import SASRec, dropout


def make() -> SASRec:
    torch.manual_seed(0)
    model = SASRec(9, width=8, blocks=2, heads=2, drop=0.5, longest=6).double().eval()
    with torch.no_grad():
        for block in model.blocks:  # as if trained: padding's value is this bias
            block.value.bias.normal_()
    return model


def plain(model: SASRec, history: Tensor) -> Tensor:
    """The vector after the last item, from a window that is padded in front and all computed."""
    window = pad(history, (6 - len(history), 0))[:, None]  # (T, 1)
    real = (window != 0).double()[:, :, None]  # (T, 1, 1)
    x = model.items(window) * 8**0.5 + model.positions.weight[:, None]  # (T, 1, D)
    x = x * real
    later = torch.ones(6, 6).triu(1).bool()
    for block in model.blocks:
        q, k, v, out = block.query, block.key, block.value, block.out
        weight = torch.cat([q.weight, k.weight, v.weight])
        bias = torch.cat([q.bias, torch.zeros(8), v.bias])
        query = block.norm_attention(x)
        a, _ = multi_head_attention_forward(
            query, x, x, 8, 2, weight, bias, None, None, False, 0.0, out.weight, out.bias,
            training=False, attn_mask=later,
        )  # fmt: skip
        x = block.norm_mlp(x + a)
        x = (x + block.down(relu(block.up(x)))) * real
    return model.norm(x[-1])


@pytest.mark.parametrize("length", [1, 3, 6])
def test_equals_one_that_computes_its_padding(length: int) -> None:
    model, history = make(), torch.tensor([7, 2, 9, 1, 4, 2])[:length]
    padded = pad(history, (0, 6 - length))[None]
    vector = model.encode(padded, torch.tensor([length]))
    torch.testing.assert_close(vector, plain(model, history), rtol=1e-12, atol=1e-12)
    model.train()(padded).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_no_position_sees_a_later_one() -> None:
    model = make()
    one, two = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[1, 2, 8, 9]])
    assert torch.equal(model(one)[:, :2], model(two)[:, :2])
    assert not torch.allclose(model(one)[:, 2], model(two)[:, 2])


def test_padding_changes_nothing() -> None:
    model = make()
    short, padded = torch.tensor([[5, 6]]), torch.tensor([[5, 6, 0, 0]])
    lengths = torch.tensor([2])
    torch.testing.assert_close(model.encode(short, lengths), model.encode(padded, lengths))
    assert model.items.weight[0].abs().sum() == 0


def test_order_matters_and_dropout_is_off_in_evaluation() -> None:
    model, lengths = make(), torch.tensor([3])
    one = model.encode(torch.tensor([[1, 2, 3]]), lengths)
    assert torch.equal(one, model.encode(torch.tensor([[1, 2, 3]]), lengths))
    assert not torch.allclose(one, model.encode(torch.tensor([[2, 1, 3]]), lengths))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_zeroes_its_share_and_keeps_the_mean(share: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1001, 999, requires_grad=True)  # no multiple of four: the last word is cut
    out = dropout(x, share, True)
    dropped = (out == 0).double()
    # a million draws: five standard deviations of a share of one half are .0025
    assert dropped.mean().item() == pytest.approx(share, abs=0.0025)
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - share)))
    # the four draws of a word are independent of each other
    words = dropped.flatten()[: 4 * 249_000].view(-1, 4)
    assert (torch.corrcoef(words.T) - torch.eye(4)).abs().max() < 0.011
    out.sum().backward()
    torch.testing.assert_close(x.grad, out.detach())


def test_dropout_follows_the_seed_and_is_off_outside_training() -> None:
    x = torch.ones(50, 3)
    torch.manual_seed(3)
    one = dropout(x, 0.5, True)
    torch.manual_seed(3)
    assert torch.equal(one, dropout(x, 0.5, True))
    assert not torch.equal(one, dropout(x, 0.5, True))
    assert dropout(x, 0.5, False) is x


def test_popularity_scores_are_training_counts() -> None:
    model = Popularity(np.array([1, 3, 3, 3, 2, 2]), 4)
    vectors = model.encode(torch.tensor([[1], [2]]), torch.tensor([1, 1]))
    assert (vectors @ model.item_matrix().T).tolist() == [[0, 1, 2, 3, 0]] * 2


def test_on_a_frozen_table_equals_one_that_has_its_rows_as_items() -> None:
    """Oracle: the rows through the linear map, written into the embeddings of a plain one."""
    torch.manual_seed(0)
    table = torch.randn(10, 5).double()
    table[0] = 0
    sizes = {"width": 8, "blocks": 2, "heads": 2, "drop": 0.5, "longest": 6}
    model = SASRec(9, table=table, **sizes).double().eval()  # type: ignore[arg-type]
    other = make()
    weights = {k: v for k, v in model.state_dict().items() if k != "adapter.weight"}
    rows = table @ model.adapter.weight.T  # type: ignore[operator]
    other.load_state_dict(weights | {"items.weight": rows})
    histories, lengths = torch.tensor([[7, 2, 9], [4, 1, 0]]), torch.tensor([3, 2])
    torch.testing.assert_close(model.item_matrix(), other.item_matrix())
    torch.testing.assert_close(model.encode(histories, lengths), other.encode(histories, lengths))
    (model.encode(histories, lengths) @ model.item_matrix().T).square().sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert "adapter.weight" in trained
    assert {name for name, _ in model.named_parameters()} - trained == {"items.weight"}
    torch.testing.assert_close(model.items.weight, table)
