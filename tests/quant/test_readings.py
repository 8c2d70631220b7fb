"""`Readings`: which look-ups are read once more, in which order, and when it stops."""

from __future__ import annotations

import pytest

from fhe_fx.quant.readings import Readings

ERRORS, COSTS, MOST = [8.0, 1.0, 1.0], [1.0, 1.0, 10.0], [4, 4, 4]


def _direct(counts: list[int]) -> tuple[float, float]:
    return (
        sum(e / k for e, k in zip(ERRORS, counts, strict=True)),
        sum(c * k for c, k in zip(COSTS, counts, strict=True)),
    )


def test_after_every_step_error_and_cost_are_those_of_its_counts() -> None:
    readings = Readings.of(ERRORS, COSTS, MOST)
    for n in range(len(readings.steps) + 1):
        error, cost = _direct(readings.counts(n))
        assert (readings.errors[n], readings.costs[n]) == pytest.approx((error, cost))


def test_each_step_is_the_one_that_saves_most_for_its_price() -> None:
    readings = Readings.of(ERRORS, COSTS, MOST)
    for n in range(len(readings.steps)):
        counts = readings.counts(n)
        gains = [
            e / (k * (k + 1)) / c
            for e, c, k, most in zip(ERRORS, COSTS, counts, MOST, strict=True)
            if k < most
        ]
        taken = readings.steps[n]
        assert taken.gain / taken.price == pytest.approx(max(gains))


def test_nothing_is_read_more_often_than_it_may_be() -> None:
    readings = Readings.of(ERRORS, COSTS, [1, 3, 2])
    assert readings.counts(len(readings.steps)) == [1, 3, 2]


@pytest.mark.parametrize("exchange", [0.5, 1.1, 2.1, 8.1])
def test_steps_go_on_as_long_as_they_are_worth_their_price(exchange: float) -> None:
    readings = Readings.of(ERRORS, COSTS, MOST)
    n = readings.worthwhile(exchange)
    for k in range(len(readings.steps)):
        saved = 1 - readings.errors[k + 1] / readings.errors[k]
        spent = readings.costs[k + 1] / readings.costs[k] - 1
        if k < n:
            assert saved >= exchange * spent
        elif k == n:
            assert saved < exchange * spent
