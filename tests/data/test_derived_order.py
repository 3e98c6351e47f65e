from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vitscale.data.derived_order import SkippingOrder, nth_left
from vitscale.data.order import Order


@given(st.sets(st.integers(0, 30)))
def test_what_is_left_is_counted_without_gaps(skipped: set[int]) -> None:
    left = [number for number in range(60) if number not in skipped]
    assert [nth_left(place, sorted(skipped)) for place in range(len(left))] == left


def test_an_order_without_some_of_its_batches() -> None:
    order = Order(np.array([20, 13, 30]), seed=3, global_batch=8, lanes=2, window=16)
    without = SkippingOrder(order, (1, 2, 7))
    for number, batch in enumerate([0, 3, 4, 5, 6, 8]):
        for name, arguments in (("refs", (2, 7)), ("candidates", (3,))):
            mine, theirs = (getattr(*each)(at, *arguments) for each, at in
                            (((without, name), number), ((order, name), batch)))  # fmt: skip
            assert mine.ids.tolist() == theirs.ids.tolist()
        assert without.epoch(number) == order.epoch(batch)
        assert without.shards_ahead(number, 0, 8, 8).tolist() == order.shards_ahead(batch, 0, 8, 8).tolist()
    assert (without.lanes, without.block, without.batches_per_epoch) == (2, order.block, 7)
