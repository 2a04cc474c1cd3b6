"""What a billion requests take: hours of the device, and money where an hour has a price."""

from __future__ import annotations

import math

from depthprobe.errors import BadInput

BILLION = 1_000_000_000


def serving_cost(
    seconds: float, batch: int, *, price: float | None = None
) -> dict[str, float | None]:
    """Throughput and the cost of a billion requests, on a device that is never idle.

    Args:
        seconds: of a batch of users, from histories to their best items.
        batch: users in it.
        price: of an hour of the device, in any currency.

    Returns:
        ``users_per_second``, ``hours_per_billion``, ``money_per_billion`` (None without a price).
    """
    rate = batch / seconds
    hours = BILLION / rate / 3600
    return {
        "users_per_second": rate,
        "hours_per_billion": hours,
        "money_per_billion": None if price is None else price * hours,
    }


def check_price(price: float | None) -> None:
    """Refuse what nothing costs."""
    if price is not None and not (price > 0 and math.isfinite(price)):
        raise BadInput("price", price, "what an hour of the device costs, a number above 0")
