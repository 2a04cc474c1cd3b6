"""A billion requests by hand."""

from __future__ import annotations

import pytest

from depthprobe.cost.serving import check_price, serving_cost
from depthprobe.errors import BadInput


def test_a_billion_requests_by_hand() -> None:
    found = serving_cost(0.5, 100, price=3)  # 200 users a second, so 5,000,000 seconds
    assert found["users_per_second"] == 200
    assert found["hours_per_billion"] == pytest.approx(5e6 / 3600)
    assert found["money_per_billion"] == pytest.approx(3 * 5e6 / 3600)
    assert serving_cost(0.5, 100)["money_per_billion"] is None


@pytest.mark.parametrize("price", [0, -1, float("nan"), float("inf")])
def test_a_price_that_is_none(price: float) -> None:
    with pytest.raises(BadInput, match="price"):
        check_price(price)
