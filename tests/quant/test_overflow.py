"""Tallies of what lies outside: the probability of noise, the size of errors, and bounds."""

from __future__ import annotations

from dataclasses import asdict
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from fhe_fx.quant.left_out import Ends
from fhe_fx.quant.overflow import Overflow, Places, Tally

LOW, HIGH = -8.5, 7.5


def _ends(n: int) -> Ends:
    return Ends(LOW, HIGH, torch.zeros(n, dtype=torch.int64), torch.zeros((1, 2, 1)).double())


def _distance(at: Places, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return x - torch.minimum(torch.maximum(x, low), high)


def _overflow(values: list[float], noise: float, weight: Tensor | None = None) -> Overflow:
    x = torch.tensor(values, dtype=torch.float64).unsqueeze(1)
    tally = Tally(_ends(len(values)), noise, weight)
    for part in torch.arange(len(values)).split(3):
        tally.add(x[part], part, _distance)
    return tally.overflow(size=2.0, n_results=4)


@pytest.mark.parametrize("value", [0.0, 6.0, 7.4, 7.6, -8.6, -6.0])
@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_noise_counts_by_its_probability(value: float, noise: float) -> None:
    found = _overflow([value], noise)
    normal = NormalDist(value, noise)
    assert found.probability == pytest.approx(normal.cdf(LOW) + 1 - normal.cdf(HIGH), abs=1e-9)
    assert found.values_outside == float(not LOW <= value < HIGH)


def test_errors_are_those_of_what_is_outside() -> None:
    found = _overflow([0.0, 9.5, -9.5, 1.0], 0.0, weight=torch.tensor([3.0]).double())
    assert found.probability == found.values_outside == 0.5
    assert found.error == pytest.approx(((2**2 + 1**2) / 2) ** 0.5 / 2.0)
    # Two errors in four samples, weighed, of four results.
    assert found.result_error == pytest.approx((5 / 4 * 3 / 4) ** 0.5)
    assert _overflow([0.0] * 4, 0.0).error is None
    assert _overflow([0.0] * 4, 0.0).result_error is None, "no derivatives"


def test_an_error_near_an_end_is_the_mean_over_the_noise() -> None:
    found = _overflow([7.0], 1.0)
    draws = 7.0 + torch.randn(400_000, generator=torch.Generator().manual_seed(0)).double()
    beyond = (draws - HIGH)[draws >= HIGH]
    expected = float(beyond.square().mean().sqrt()) / 2.0
    assert found.error == pytest.approx(expected, rel=0.03)


def test_bounds_count_what_was_not_seen() -> None:
    none = _overflow([0.0] * 100, 0.0)
    assert (none.probability, none.probability_at_most) == (0.0, 0.03)
    assert none.text() == "< 3 %"
    some = _overflow([0.0] * 90 + [9.0] * 10, 0.0)
    deviation = (0.1 * 0.9 * 100 / 99) ** 0.5 / 10
    assert some.probability_at_most == pytest.approx(0.1 + 1.645 * deviation + 0.03)
    assert some.text() == "10 %"
    two = _overflow([0.0] * 998 + [9.0] * 2, 0.0)
    assert (two.is_seen, two.text()) == (False, "< 0.3 %")
    assert _overflow([9.0], 0.0).probability_at_most == 1.0
    assert _overflow([9.0] * 9, 0.0).text() == "100 %"
    assert _overflow([0.0], 0.0).text() == "< 100 %"
    assert Overflow(**asdict(some)) == some
